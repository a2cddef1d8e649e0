"""The tokenizer in a GGUF file, and how it differs from a model's own. No torch.

Files of the supported architectures hold one of two kinds: byte-level BPE (`gpt2`: tokens and
merges as tokenizer.json has them) or SentencePiece (`llama`: tokens and scores).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from q3q.models.gguf_header import GgufValue

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BPE = "gpt2"
# Types of tokens, as llama.cpp numbers them.
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
PADDING = "[PAD"  # begins the names of rows of the embedding that no token has
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
# Regular expressions that cut a text -> llama.cpp's name.
RULES = {
    rf"{_ENDINGS}|{_WORDS}|\p{{N}}|{_REST}": "qwen2",
    rf"{_ENDINGS}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}": "llama-bpe",
}
# Other names of the same rules in files.
SAME_RULES = {"llama3": "llama-bpe", "llama-v3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}


@dataclass(frozen=True)
class GgufTokenizer:
    """What a file says of its tokenizer; None or nothing where it says nothing.

    kind: `gpt2` for byte-level BPE, `llama` for SentencePiece, or another of llama.cpp's words
    splitter: the name of the rule that cuts a text before BPE (`tokenizer.ggml.pre`)
    tokens, types: by id
    merges: `left right`, in order
    begins: a text begins with `bos`
    """

    kind: str
    splitter: str | None
    tokens: tuple[str, ...]
    types: tuple[int, ...]
    merges: tuple[str, ...]
    bos: int | None
    eos: int | None
    begins: bool | None
    chat_template: str | None

    @classmethod
    def of(cls, values: Mapping[str, GgufValue]) -> GgufTokenizer | None:
        """Return it; None if the file has none."""

        def given(key: str, kind: type[Any]) -> Any:
            value = values.get(f"tokenizer.ggml.{key}")
            return value if isinstance(value, kind) else None

        word = given("model", str)
        if word is None:
            return None
        template = values.get("tokenizer.chat_template")
        return cls(
            kind=word,
            splitter=given("pre", str),
            tokens=tuple(given("tokens", list) or ()),
            types=tuple(given("token_type", list) or ()),
            merges=tuple(given("merges", list) or ()),
            bos=given("bos_token_id", int),
            eos=given("eos_token_id", int),
            begins=given("add_bos_token", bool),
            chat_template=template if isinstance(template, str) else None,
        )

    def differences(self, reference: PreTrainedTokenizerBase) -> Iterator[str]:
        """Yield in a few words how it differs from a model's own tokenizer.

        Rows of the embedding that no token of the reference has may have any name.
        """
        pieces = reference.convert_ids_to_tokens(list(range(len(reference))))
        ours = self.tokens[: len(pieces)]
        if len(self.tokens) < len(pieces):
            yield f"{len(self.tokens)} tokens instead of {len(pieces)}"
        others = [
            k
            for k, (ours_k, theirs_k) in enumerate(zip(ours, pieces, strict=False))
            if theirs_k is not None and ours_k != theirs_k
        ]
        if others:
            k = others[0]
            yield f"{len(others)} other tokens, first {ours[k]!r} instead of {pieces[k]!r} (id {k})"
        if self.kind == BPE and (merges := merges_of(reference)) != self.merges:
            pairs = zip(self.merges, merges, strict=False)
            equal = next((k for k, (a, b) in enumerate(pairs) if a != b), None)
            where = "in number" if equal is None else f"from number {equal} on"
            yield f"other merges ({len(self.merges)} and {len(merges)}, which differ {where})"
        if self.kind == BPE:
            yield from self._differing_cuts(reference)
        for word, own in (("bos", self.bos), ("eos", self.eos)):
            theirs = getattr(reference, f"{word}_token_id")
            if own != theirs and not (own is None and theirs is None):
                yield f"{word} token {own} instead of {theirs}"
        begins = reference("a").input_ids[:1] == [reference.bos_token_id]
        if self.begins not in (None, begins):
            yield f"texts begin with{'' if self.begins else 'out'} a bos token"
        theirs = reference.chat_template
        if (self.chat_template or None) != (theirs or None):
            shown = "no" if not self.chat_template else "another"
            yield f"{shown} chat template" + ("" if theirs else ", where the model has none")

    def _differing_cuts(self, reference: PreTrainedTokenizerBase) -> Iterator[str]:
        """Yield that texts are cut otherwise before BPE, if the model's own rule has a name."""
        theirs = splitter_of(json.loads(reference.backend_tokenizer.to_str()))
        ours = self.splitter and SAME_RULES.get(self.splitter, self.splitter)
        if theirs is not None and ours != theirs:
            yield f"texts are cut by {self.splitter or 'no named rule'} instead of {theirs}"


def merges_of(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Return a BPE tokenizer's merges as `left right`; nothing of another kind's."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = {} if backend is None else json.loads(backend.to_str())["model"]
    merges = model.get("merges") or ()
    return tuple(merge if isinstance(merge, str) else " ".join(merge) for merge in merges)


def splitter_of(backend: Mapping[str, Any]) -> str | None:
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
