"""Token windows of a text: the three ways in which the published methods draw them, and evaluation's."""

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from q3q.data.texts import Text, load_text
from q3q.errors import CalibrationError, ConfigError
from q3q.spec import QUICK_SEED, Json, TrialSpec

if TYPE_CHECKING:
    pass

Encode = Callable[[str], list[int]]
# The last tokens of a text that is cut may differ from the whole text's (a merge across the cut): kept away from.
_SEAM = 64


def encoder(tokenizer: Any) -> Encode:
    """A tokenizer as a plain function, adding what it adds by itself (Qwen adds nothing), silent about long texts."""
    return lambda text: tokenizer(text, verbose=False)["input_ids"]


def draw_windows(
    text: Text, encode: Encode, *, samples: int, length: int, draw: str, seed: int
) -> Tensor:
    """Windows of tokens to calibrate on (or, of C4, the study's 256 to evaluate on).

    Args:
        text: what to draw from.
        encode: text to token ids.
        samples: windows wanted.
        length: tokens per window.
        draw:
            `first`: consecutive windows from the start of the joined text, so that other tools can be given the same.
            `random`: as GPTQ does (IST-DASLab/gptq, datautils.py): draw documents until one has more than `length`
                tokens, then a random window of it. Of a running text, of a single document, and where no document is
                longer than `length`: random windows of the joined text. Windows may overlap.
            `documents`: as AWQ does (mit-han-lab/llm-awq, calib_data.py): shuffle, take the first `samples` documents
                of 1 to `length` tokens (outer white space stripped), concatenate, cut; the tail is dropped, so there
                are at most `samples` windows, often fewer. Its shuffle is that of `datasets`; its own seed is 42.
        seed: of `random` and `documents`.

    Returns:
        [samples, length] int64; of `documents`, [at most samples, length].

    Raises:
        CalibrationError: the text is too short, or `draw` is not one of these.
    """
    if samples < 1 or length < 1:
        raise CalibrationError(f"samples={samples} and length={length} must both be 1 or more")
    if draw == "first":
        windows = _first(text, encode, samples, length)
    elif draw == "random":
        windows = _random(text, encode, samples, length, seed)
    elif draw == "documents":
        windows = _documents(text, encode, samples, length, seed)
    else:
        raise CalibrationError(f"draw={draw!r}: give first, random or documents")
    return windows


def consecutive_windows(
    ids: Sequence[int] | Tensor, window: int, limit: int | None = None
) -> Tensor:
    """Cut tokens into windows that do not overlap; the tail is dropped, as the papers' perplexity does.

    Args:
        ids: tokens of a text, [T].
        window: tokens per window.
        limit: windows at most; all if None.

    Returns:
        [n, window] int64, n >= 1.

    Raises:
        CalibrationError: not even one window.
    """
    _check_enough(len(ids), window, "the text")
    count = len(ids) // window
    count = count if limit is None else min(count, limit)
    return torch.as_tensor(ids[: count * window], dtype=torch.int64).view(count, window)


def _first(text: Text, encode: Encode, samples: int, length: int) -> Tensor:
    ids = _leading_tokens(text, encode, samples * length)
    _check_enough(len(ids), length, f"the text {text.name}")
    windows = consecutive_windows(ids, length, samples)
    if len(windows) < samples:
        raise CalibrationError(
            f"the text {text.name} has {len(windows)} windows of {length} tokens, {samples} were asked for: "
            "lower samples or length, or give a longer text"
        )
    return windows


def _leading_tokens(text: Text, encode: Encode, count: int) -> list[int]:
    """The first `count` tokens of the joined text (all, if it has fewer), encoding no more documents than it takes."""
    documents = 1
    while True:
        ids = encode(text.joiner.join(text.documents[:documents]))
        if len(ids) >= count + _SEAM or documents >= len(text.documents):
            return ids[:count]
        documents *= 2


def _random(text: Text, encode: Encode, samples: int, length: int, seed: int) -> Tensor:
    dice = random.Random(seed)
    rows = []
    if (
        text.running
        or len(text.documents) == 1
        or not (long_enough := _maybe_longer(text, encode, length))
    ):
        ids = encode(text.joined)
        _check_enough(len(ids), length, f"the text {text.name}")
        for _ in range(samples):
            rows.append(_window(dice, ids, length))
        return torch.tensor(rows)
    while (
        len(rows) < samples
    ):  # ends: one document at least is long enough, and each is as likely as any
        drawn = dice.randint(0, len(text.documents) - 1)
        if drawn in long_enough:
            ids = encode(text.documents[drawn])
            if len(ids) > length:
                rows.append(_window(dice, ids, length))
            else:
                long_enough.remove(drawn)  # never encoded again
    return torch.tensor(rows)


def _window(dice: random.Random, ids: list[int], length: int) -> list[int]:
    # GPTQ never draws the last window there is, and stops with an error at exactly `length` tokens: we give that one.
    start = dice.randint(0, max(0, len(ids) - length - 1))
    return ids[start : start + length]


def _maybe_longer(text: Text, encode: Encode, length: int) -> set[int]:
    """Documents that may have more than `length` tokens; none, if not one really does.

    A token spells at least one byte, so a document of few bytes need not be encoded.
    """
    size = {i: len(document.encode()) for i, document in enumerate(text.documents)}
    maybe = sorted((i for i in size if size[i] > length), key=lambda i: -size[i])
    for rank, i in enumerate(maybe):
        if len(encode(text.documents[i])) > length:
            return set(maybe[rank:])
    return set()


def _documents(text: Text, encode: Encode, samples: int, length: int, seed: int) -> Tensor:
    import numpy

    tokens: list[int] = []
    taken = 0
    for i in numpy.random.default_rng(seed).permutation(
        len(text.documents)
    ):  # datasets.Dataset.shuffle(seed)
        ids = encode(text.documents[i].strip())
        if 0 < len(ids) <= length:
            tokens += ids
            taken += 1
        if taken == samples:
            break
    _check_enough(
        len(tokens),
        length,
        f"{taken} documents of 1 to {length} tokens, drawn from the text {text.name}",
    )
    return consecutive_windows(tokens, length)


def _check_enough(tokens: int, window: int, what: str) -> None:
    if tokens < window:
        raise CalibrationError(
            f"{what}: {tokens} tokens, but one window needs {window}. Give a longer text or a shorter window"
        )


AWQ_SHUFFLE_SEED = 42  # so that seed 0 draws the documents that AWQ's official code draws


def calibration_windows(spec: TrialSpec, tokenizer: Any) -> Tensor | None:
    """Token windows [samples, length], None for a method that observes nothing."""
    if spec.calibration is None:
        return None
    wanted = spec.calibration
    text = load_text(
        wanted["source"],
        split="calibration",
        path=spec.places.get("calibration"),
        data=spec.places.get("data"),
    )
    refuse_changed_text(text.digest, wanted["digest"], wanted["source"])
    return draw_windows(
        text,
        encoder(tokenizer),
        samples=wanted["samples"],
        length=wanted["length"],
        draw=wanted["draw"],
        seed=spec.seed + (AWQ_SHUFFLE_SEED if wanted["draw"] == "documents" else 0),
    )


def evaluation_windows(tokenizer: Any, spec: TrialSpec, wanted: Json) -> Tensor:
    """Token windows [N, T] of one of the evaluation's texts."""
    text = load_text(
        wanted["source"],
        split="evaluation",
        path=spec.places.get("evaluation"),
        data=spec.places.get("data"),
    )
    refuse_changed_text(text.digest, wanted["digest"], wanted["name"])
    encode, limit = encoder(tokenizer), wanted["limit"]
    if wanted["draw"] == "random":
        samples = min(wanted["samples"], limit or wanted["samples"])
        return draw_windows(
            text, encode, samples=samples, length=wanted["window"], draw="random", seed=0
        )
    quick = bool(spec.evaluation.get("quick"))
    windows_NT = consecutive_windows(
        encode(text.joined), wanted["window"], None if quick else limit
    )
    if quick and limit and limit < len(windows_NT):
        windows_NT = windows_NT[
            sorted(random.Random(QUICK_SEED).sample(range(len(windows_NT)), limit))
        ]
    return windows_NT


def refuse_changed_text(found: str, wanted: str, name: str) -> None:
    if found != wanted:
        raise ConfigError(
            f"the text {name} changed since the trial was planned (digest {found}, planned {wanted})"
        )
