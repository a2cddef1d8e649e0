"""Token windows of a text, drawn as the published methods do, or cut for evaluation."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from q3q.data.prepared import Arrays, Shelf, prepared
from q3q.data.texts import Text, load_text
from q3q.errors import CalibrationError, ConfigError
from q3q.placement import Trial
from q3q.spec import QUICK_SEED, Json, TextRef

if TYPE_CHECKING:
    from torch import Tensor

Encode = Callable[[str], list[int]]

WINDOWS_VERSION = 1  # of prepared windows: raised when texts are cut or drawn in another way
# Tokens dropped at a cut: a merge across it may make them differ from the whole text's.
_SEAM = 64


def encoder(tokenizer: Any) -> Encode:
    """Return a tokenizer as a function, with its own special tokens, silent about long texts."""
    return lambda text: tokenizer(text, verbose=False)["input_ids"]


@dataclass(frozen=True)
class Knobs:
    """The names of the settings that decide on windows, for advice; None: it cannot be set."""

    length: str
    samples: str | None = None
    draw: str | None = None


CALIBRATION = Knobs("calibration.length", "calibration.samples", "calibration.draw")
MIXED = Knobs("calibration.length")  # of a part of a mix, whose number of windows follows
EVALUATION = Knobs("evaluation.window")


def draw_windows(
    text: Text,
    encode: Encode,
    *,
    samples: int,
    length: int,
    draw: str,
    seed: int,
    knobs: Knobs = CALIBRATION,
) -> "Tensor":
    """Return what `drawn_tokens` draws as a tensor, int64."""
    import torch

    rows = drawn_tokens(
        text, encode, samples=samples, length=length, draw=draw, seed=seed, knobs=knobs
    )
    return torch.tensor(rows, dtype=torch.int64)


def drawn_tokens(
    text: Text,
    encode: Encode,
    *,
    samples: int,
    length: int,
    draw: str,
    seed: int,
    knobs: Knobs = CALIBRATION,
) -> list[list[int]]:
    """Draw windows of tokens to calibrate on (or, from C4, the study's 256 to evaluate on).

    Args:
        draw: one of
            `first`: consecutive windows from the text's start, which other tools can read too.
            `random`: as GPTQ does (IST-DASLab/gptq, datautils.py): draw documents until one has
                more than `length` tokens, then a random window of it. From a running text, a single
                document, or if no document is longer than `length`: random windows of the joined
                text. Windows may overlap.
            `documents`: as AWQ does (mit-han-lab/llm-awq, calib_data.py): shuffle, take the first
                `samples` documents of 1 to `length` tokens (outer white space stripped),
                concatenate and cut; the tail is dropped, so there are at most `samples` windows,
                often fewer. The shuffle is that of `datasets`; AWQ's own seed is 42.
        seed: seed of `random` and `documents`.
        knobs: the settings that an error names.

    Returns:
        [samples, length]; for `documents`, [at most samples, length]. These are lists: whether a
        text is long enough is known without torch.

    Raises:
        CalibrationError: the text is too short, or `draw` is not one of these.
    """
    if samples < 1 or length < 1:
        raise CalibrationError(f"samples={samples} and length={length} must both be 1 or more")
    wish = _Wish(text, encode, samples, length, knobs)
    if draw == "first":
        return _first(wish)
    if draw == "random":
        return _random(wish, seed)
    if draw == "documents":
        return _documents(wish, seed)
    raise CalibrationError(f"draw={draw!r}: give first, random or documents")


@dataclass(frozen=True)
class _Wish:
    """The windows that are asked for, and what helps if the text cannot give them."""

    text: Text
    encode: Encode
    samples: int
    length: int
    knobs: Knobs

    def refuse(self, found: str, *, each: int = 1, documents: bool | None = None) -> NoReturn:
        """Raise a CalibrationError that says what was found, and the settings that would do.

        Args:
            each: windows that must lie side by side in the text.
            documents: windows are made of whole documents, and more of these would help; False:
                more of them would not be taken. None: windows are cut anywhere.
        """
        tokens, knobs = len(self.encode(self.text.joined)), self.knobs
        ways = []
        if documents is not None:
            if tokens >= self.length:
                ways.append(f"{knobs.draw}=random, which cuts windows anywhere in the text")
            elif tokens:
                ways.append(f"{knobs.draw}=random {knobs.length}={tokens}")
            if documents:
                ways.append(f"a .jsonl file with more documents of at most {self.length} tokens")
        else:
            if tokens >= self.length and knobs.samples:
                ways.append(f"{knobs.samples}={tokens // self.length} or less")
            if tokens // each >= 2:
                ways.append(f"{knobs.length}={tokens // each} or less")
            ways.append("a longer text")
        raise CalibrationError(f"{found}. Give {', or '.join(ways)}")


def consecutive_windows(
    ids: "Sequence[int] | Tensor", window: int, limit: int | None = None
) -> "Tensor":
    """Cut tokens into windows without overlap; the tail is dropped, as in the papers' perplexity.

    Args:
        limit: the most windows; all if None.

    Returns:
        [n, window] int64, n >= 1.

    Raises:
        CalibrationError: the text is shorter than one window.
    """
    import torch

    if len(ids) < window:
        raise CalibrationError(
            f"the text has {len(ids)} tokens, but one window needs {window}. Give a longer text or "
            "a shorter window"
        )
    count = min(len(ids) // window, len(ids) if limit is None else limit)
    return torch.as_tensor(ids[: count * window], dtype=torch.int64).view(count, window)


def _cut(ids: list[int], window: int) -> list[list[int]]:
    """Cut tokens into windows without overlap; the tail is dropped."""
    whole = len(ids) - len(ids) % window
    return [ids[start : start + window] for start in range(0, whole, window)]


def _first(wish: _Wish) -> list[list[int]]:
    samples, length = wish.samples, wish.length
    ids = _leading_tokens(wish.text, wish.encode, samples * length)
    if len(ids) < samples * length:
        wish.refuse(
            f"the text {wish.text.name} has {len(ids) // length} windows of {length} tokens, "
            f"{samples} were asked for",
            each=samples,
        )
    return _cut(ids, length)


def _leading_tokens(text: Text, encode: Encode, count: int) -> list[int]:
    """Return the joined text's first `count` tokens, or all, encoding few documents beyond them."""
    documents = 1
    while True:
        ids = encode(text.joiner.join(text.documents[:documents]))
        if len(ids) >= count + _SEAM or documents >= len(text.documents):
            return ids[:count]
        documents *= 2


def _random(wish: _Wish, seed: int) -> list[list[int]]:
    text, encode, samples, length = wish.text, wish.encode, wish.samples, wish.length
    generator = random.Random(seed)
    whole_text = text.running or len(text.documents) == 1
    candidates = set() if whole_text else _maybe_longer(text, encode, length)
    if not candidates:
        ids = encode(text.joined)
        if len(ids) < length:
            wish.refuse(
                f"the text {text.name} has {len(ids)} tokens, but one window needs {length}"
            )
        return [_window(generator, ids, length) for _ in range(samples)]
    rows: list[list[int]] = []
    while len(rows) < samples:  # ends: at least one document is long enough
        i = generator.randint(0, len(text.documents) - 1)
        if i in candidates:
            ids = encode(text.documents[i])
            if len(ids) > length:
                rows.append(_window(generator, ids, length))
            else:
                candidates.remove(i)  # never encoded again
    return rows


def _window(generator: random.Random, ids: list[int], length: int) -> list[int]:
    # GPTQ never draws the last window, and fails on exactly `length` tokens; this returns those.
    start = generator.randint(0, max(0, len(ids) - length - 1))
    return ids[start : start + length]


def _maybe_longer(text: Text, encode: Encode, length: int) -> set[int]:
    """Return the documents that may have more than `length` tokens; none if none really has.

    A token spells at least one byte, so a document of few bytes need not be encoded.
    """
    size = {i: len(document.encode()) for i, document in enumerate(text.documents)}
    candidates = sorted((i for i in size if size[i] > length), key=lambda i: -size[i])
    for rank, i in enumerate(candidates):
        if len(encode(text.documents[i])) > length:
            return set(candidates[rank:])
    return set()


def _documents(wish: _Wish, seed: int) -> list[list[int]]:
    import numpy

    text, encode, samples, length = wish.text, wish.encode, wish.samples, wish.length
    tokens, count = list[int](), 0
    order = numpy.random.default_rng(seed).permutation(len(text.documents))  # as Dataset.shuffle
    for i in order:
        ids = encode(text.documents[i].strip())
        if 0 < len(ids) <= length:
            tokens += ids
            count += 1
        if count == samples:
            break
    if len(tokens) < length:
        wish.refuse(
            f"{count} document{'' if count == 1 else 's'} of 1 to {length} tokens, drawn from the "
            f"{len(text.documents)} of the text {text.name}: {len(tokens)} tokens, but one window "
            f"needs {length}",
            documents=count < samples,
        )
    return _cut(tokens, length)


def evaluation_windows(
    tokenizer: Any, trial: Trial, text: TextRef, wait: Callable[[], object] = lambda: None
) -> "Tensor":
    """Return token windows [N, T] of one of the evaluation's texts.

    wait: called at every poll while another process cuts them; may raise to stop waiting
    """
    placement, limit, quick = trial.placement, text.limit, trial.spec.evaluation.quick

    def cut() -> "Tensor":
        content = load_text(
            str(text.source),
            split="evaluation",
            path=placement.evaluation_file(text.name),
            data=placement.data,
        )
        refuse_changed_text(content.digest, text.digest, text.name)
        encode = encoder(tokenizer)
        if text.draw == "random":
            assert text.samples is not None
            return draw_windows(
                content,
                encode,
                samples=min(text.samples, limit or text.samples),
                length=text.window,
                draw="random",
                seed=0,
                knobs=EVALUATION,
            )
        most = None if quick else limit
        windows_NT = consecutive_windows(encode(content.joined), text.window, most)
        if quick and limit and limit < len(windows_NT):
            drawn = random.Random(QUICK_SEED).sample(range(len(windows_NT)), limit)
            return windows_NT[sorted(drawn)]
        return windows_NT

    identity = evaluation_identity(text, quick)
    return prepared_windows(Shelf.of(trial, tokenizer), identity, cut, wait)


def evaluation_identity(text: TextRef, quick: bool) -> Json:
    """Return what determines a text's windows, but for the tokenizer."""
    return {
        "windows": WINDOWS_VERSION,
        "text": text.digest,
        "samples": text.samples,
        "length": text.window,
        "draw": text.draw,
        "limit": text.limit,
        "quick": quick,
    }


def prepared_windows(
    shelf: Shelf | None, identity: Json, cut: Callable[[], "Tensor"], wait: Callable[[], object]
) -> "Tensor":
    """Return windows from the shelf, int64; a trial that finds them reads no text at all."""
    import torch

    def make() -> Arrays:
        return {"windows": cut().numpy().astype("int32")}

    windows_NT = prepared(shelf, identity, make, wait)["windows"]
    return torch.from_numpy(windows_NT.astype("int64"))


def refuse_changed_text(digest: str, planned: str, name: str) -> None:
    if digest != planned:
        raise ConfigError(
            f"the text {name} changed since the trial was planned "
            f"(digest {digest}, planned {planned})"
        )
