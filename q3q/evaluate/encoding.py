"""Text to token ids as lm-eval does it, without encoding a shared prompt thousands of times."""

import json
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from q3q.evaluate.prefixes import Ids

QWEN_SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# A single newline between something and a letter or digit: in Qwen's way of cutting text into words, and in GPT-2's,
# a word ends there whatever stands before or after, and no merge crosses words.
LINE_START = re.compile(r"(?<=\S\n)(?=[A-Za-z0-9])")
MOST_LINES = 1 << 18


class LineEncoder:
    """A tokenizer that remembers the lines it has seen. Ids equal the tokenizer's own of the whole text (tested)."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._lines: dict[str, list[int]] = {}
        self._by_line = cuts_at_lines(tokenizer)

    def __call__(self, text: str, **options: Any) -> list[int]:
        """options: what the tokenizer takes beside the text."""
        if not self._by_line or options:
            return self._whole(text, **options)
        ids: list[int] = []
        for line in LINE_START.split(text):
            known = self._lines.get(line)
            if known is None:
                if len(self._lines) >= MOST_LINES:
                    self._lines.clear()
                known = self._lines[line] = self._whole(line)
            ids += known
        return ids

    def learn(self, texts: Iterable[str]) -> None:
        """Remember the lines of these texts; those not seen yet go to the tokenizer together, which uses all cores."""
        if not self._by_line:
            return
        fresh = list(
            {line for text in texts for line in LINE_START.split(text)} - self._lines.keys()
        )
        if fresh:
            if len(self._lines) + len(fresh) > MOST_LINES:
                self._lines.clear()
            # The library's own way: what it would say beside the ids takes longer than the ids.
            found = self._tokenizer.backend_tokenizer.encode_batch_fast(
                fresh, add_special_tokens=False
            )
            self._lines |= {line: encoding.ids for line, encoding in zip(fresh, found, strict=True)}

    def _whole(self, text: str, **options: Any) -> list[int]:
        ids: list[int] = self._tokenizer(text, verbose=False, **options)["input_ids"]
        return ids


def cuts_at_lines(tokenizer: Any) -> bool:
    """Whether text may be encoded line by line: byte-level BPE with a known split, and nothing added at the ends."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if (
        backend is None
        or tokenizer("a")["input_ids"] != tokenizer("a", add_special_tokens=False)["input_ids"]
    ):
        return False
    known = json.loads(backend.to_str())
    steps = known["pre_tokenizer"] or {}
    match steps:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            split = True
        case {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": str(regex)},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            split = regex == QWEN_SPLIT
        case _:
            split = False
    normal = (known["normalizer"] or {"type": None})["type"] in (None, "NFC")
    plain = all("\n" not in token["content"] for token in known["added_tokens"])
    return split and normal and plain and known["model"]["type"] == "BPE"


def encode_pair(encode: Callable[[str], Ids], context: str, continuation: str) -> tuple[Ids, Ids]:
    """Context and continuation as lm-eval splits them: spaces between them belong to the continuation, and what does
    not belong to the context encoded alone is the continuation."""
    stripped = context.rstrip()
    whole = encode(context + continuation)
    context_ids = encode(stripped)
    return context_ids, whole[len(context_ids) :]


def as_ids(ids: list[int]) -> Ids:
    return np.array(ids, dtype=np.int32)
