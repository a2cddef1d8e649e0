"""Text to token ids as lm-eval encodes it, without encoding a shared prompt thousands of times."""

import json
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from q3q.evaluate.prefixes import Ids

QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Behind a single newline that follows a non-space and precedes a letter or digit, both Qwen's and
# GPT-2's split begin a new word whatever the context, and no merge crosses words.
LINE_START = re.compile(r"(?<=\S\n)(?=[A-Za-z0-9])")
MOST_LINES = 1 << 18


class LineEncoder:
    """A tokenizer that caches lines. Its ids equal the tokenizer's own of the whole text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._lines: dict[str, list[int]] = {}
        self._by_line = cuts_at_lines(tokenizer)

    def __call__(self, text: str, **options: Any) -> list[int]:
        """Encode a text. options: the tokenizer's own; with any, nothing is cached."""
        if not self._by_line or options:
            return self._encode(text, **options)
        ids: list[int] = []
        for line in LINE_START.split(text):
            if line not in self._lines:
                if len(self._lines) >= MOST_LINES:
                    self._lines.clear()
                self._lines[line] = self._encode(line)
            ids += self._lines[line]
        return ids

    def learn(self, texts: Iterable[str]) -> None:
        """Cache the lines of these texts; the tokenizer encodes new ones together, on all cores."""
        if not self._by_line:
            return
        lines = {line for text in texts for line in LINE_START.split(text)}
        if fresh := list(lines - self._lines.keys()):
            if len(self._lines) + len(fresh) > MOST_LINES:
                self._lines.clear()
            # The backend's fast method leaves out offsets, which take longer than the ids.
            encode = self._tokenizer.backend_tokenizer.encode_batch_fast
            encodings = zip(fresh, encode(fresh, add_special_tokens=False), strict=True)
            self._lines |= {line: encoding.ids for line, encoding in encodings}

    def _encode(self, text: str, **options: Any) -> list[int]:
        return self._tokenizer(text, verbose=False, **options)["input_ids"]


def cuts_at_lines(tokenizer: Any) -> bool:
    """Return True for byte-level BPE with a known split that adds nothing at the ends."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if (
        backend is None
        or tokenizer("a")["input_ids"] != tokenizer("a", add_special_tokens=False)["input_ids"]
    ):
        return False
    config = json.loads(backend.to_str())
    match config["pre_tokenizer"] or {}:
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
    normal = (config["normalizer"] or {"type": None})["type"] in (None, "NFC")
    plain = all("\n" not in token["content"] for token in config["added_tokens"])
    return split and normal and plain and config["model"]["type"] == "BPE"


def encode_pair(encode: Callable[[str], Ids], context: str, continuation: str) -> tuple[Ids, Ids]:
    """Encode context and continuation as lm-eval splits them.

    Spaces between them belong to the continuation: whatever follows the tokens of the context.
    """
    context_ids = encode(context.rstrip())
    return context_ids, encode(context + continuation)[len(context_ids) :]


def as_ids(ids: list[int]) -> Ids:
    return np.array(ids, dtype=np.int32)
