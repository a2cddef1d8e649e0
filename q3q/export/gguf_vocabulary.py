"""A tokenizer as GGUF files hold it: byte-level BPE, as Qwen, Llama 3 and SmolLM2 have it.

llama.cpp cuts a text before BPE by rules of its own, each with a name; the rule of a tokenizer is
found by what its tokenizer.json says. A rule that llama.cpp lacks would tokenize otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gguf import GGUFWriter
from transformers import PreTrainedTokenizerBase

from q3q.errors import ExportError
from q3q.models.gguf_tokenizer import (
    BPE,
    CONTROL,
    NORMAL,
    PADDING,
    UNUSED,
    USER_DEFINED,
    merges_of,
)

_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
# Regular expressions that cut a text -> llama.cpp's name.
RULES = {
    rf"{_ENDINGS}|{_WORDS}|\p{{N}}|{_REST}": "qwen2",
    rf"{_ENDINGS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}": "llama-bpe",
}


@dataclass(frozen=True)
class Vocabulary:
    """What is written of a tokenizer.

    splitter: llama.cpp's name of the rule that cuts a text
    tokens, types: of all rows of the embedding
    special: ids by `bos`, `eos`, `pad` and `eot`
    begins: a text begins with `bos`
    """

    splitter: str
    tokens: Sequence[str]
    types: Sequence[int]
    merges: Sequence[str]
    special: Mapping[str, int]
    begins: bool
    chat_template: str | None


def vocabulary_of(
    tokenizer: PreTrainedTokenizerBase, rows: int, ends: Sequence[int] = ()
) -> Vocabulary:
    """Return a tokenizer as a file holds it.

    Args:
        rows: of the embedding; those that no token has get names of their own.
        ends: tokens that end a generated text.

    Raises:
        ExportError: llama.cpp has no tokenizer like it, or none that it has by this name.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    splitter = _splitter(backend)
    if splitter is None:
        kind = backend["model"]["type"]
        fallback = " with bytes as a last resort" if backend["model"].get("byte_fallback") else ""
        raise ExportError(
            "export=gguf takes byte-level BPE that cuts texts as Qwen's, Llama 3's, SmolLM2's or "
            f"GPT-2's does; this tokenizer ({kind}{fallback}) does it otherwise. With export=hf, "
            "llama.cpp's own convert_hf_to_gguf.py makes a file of the model"
        )
    added = {int(entry["id"]): entry for entry in backend["added_tokens"]}
    pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    tokens, types = [], []
    for k in range(rows):
        if k >= len(pieces) or pieces[k] is None:
            tokens.append(f"{PADDING}{k}]")
            types.append(UNUSED)
        else:
            tokens.append(str(pieces[k]))
            types.append(
                NORMAL if k not in added else CONTROL if added[k]["special"] else USER_DEFINED
            )
    special = {
        word: int(number)
        for word in ("bos", "eos", "pad")
        if (number := getattr(tokenizer, f"{word}_token_id")) is not None
    }
    others = [end for end in ends if end != special.get("eos")]
    if ends:
        special["eos"] = special.get("eos", ends[0])
    if others:
        special["eot"] = others[0]
    template = tokenizer.chat_template
    begins = tokenizer("a").input_ids[:1] == [special.get("bos")]
    return Vocabulary(
        splitter=splitter,
        tokens=tokens,
        types=types,
        merges=merges_of(tokenizer),
        special=special,
        begins=begins,
        chat_template=template if isinstance(template, str) else None,
    )


def add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    writer.add_tokenizer_model(BPE)
    writer.add_tokenizer_pre(vocabulary.splitter)
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types(list(vocabulary.types))
    writer.add_token_merges(list(vocabulary.merges))
    for word, number in vocabulary.special.items():
        getattr(writer, f"add_{word}_token_id")(number)
    writer.add_add_bos_token(vocabulary.begins)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def _splitter(backend: Mapping[str, Any]) -> str | None:
    """Return llama.cpp's name of the rule that cuts a text; None if it has none."""
    before, model = backend.get("pre_tokenizer") or {}, backend["model"]
    if model["type"] != "BPE" or model.get("byte_fallback"):
        return None
    steps = before.get("pretokenizers") or [before]
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm" if steps[1].get("use_regex", True) else None
    if kinds == ["Split", "ByteLevel"] and not steps[1].get("use_regex", True):
        return RULES.get(steps[0]["pattern"].get("Regex", ""))
    return None
