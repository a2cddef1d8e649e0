"""The windows that a trial calibrates on: of a text, of a mix, or written by the model itself.

A budget's sensitivities are measured on windows that are drawn likewise.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from q3q.data.chats import rendered
from q3q.data.prepared import Shelf
from q3q.data.texts import Text, load_text
from q3q.data.windows import (
    WINDOWS_VERSION,
    Encode,
    draw_windows,
    encoder,
    prepared_windows,
    refuse_changed_text,
)
from q3q.placement import Trial
from q3q.spec import TRACES, Calibration, Json, TrialSpec

if TYPE_CHECKING:
    from torch import Tensor

AWQ_SHUFFLE_SEED = 42  # so that seed 0 draws the documents that AWQ's official code draws
# Windows on which sensitivities are measured are drawn with another seed than those that a method
# calibrates on: on its own text, a method looks better than it is.
OTHER_DRAW = 1000

Write = Callable[[Calibration], "Tensor"]  # returns the windows of traces


def calibration_windows(
    trial: Trial,
    tokenizer: Any,
    wait: Callable[[], object] = lambda: None,
    write: Write | None = None,
) -> "Tensor | None":
    """Return token windows [samples, length]; None for a method that observes nothing.

    Args:
        wait: called at every poll while another process draws them; may raise to stop waiting.
        write: has the model write those windows that are traces.
    """
    calibration = trial.spec.calibration
    if calibration is None:
        return None
    if not calibration.writes:
        identity = calibration_identity(calibration, trial.spec.seed)
        shelf = Shelf.of(trial, tokenizer)
        return prepared_windows(shelf, identity, lambda: _drawn(trial, tokenizer, None), wait)
    return _drawn(trial, tokenizer, write)


def drawing(spec: TrialSpec) -> list[TrialSpec]:
    """Return specs whose `calibration` and `seed` are those of all windows that a trial draws.

    The first is the spec itself, if it observes anything; with a budget, the last one calibrates on
    the windows on which sensitivities are measured.
    """
    specs, budget = [spec] if spec.calibration is not None else [], spec.budget
    if budget is not None:
        text = Calibration(
            source=budget.source,
            digest=budget.digest,
            samples=budget.samples,
            length=budget.length,
            draw=budget.draw,
        )
        specs.append(replace(spec, calibration=text, seed=spec.seed + OTHER_DRAW))
    return specs


def drawn_identities(spec: TrialSpec) -> list[Json]:
    """Return the identities of all windows that a trial draws, but for those that a model writes.

    See `calibration_identity`.
    """
    return [
        calibration_identity(drawn_spec.calibration, drawn_spec.seed)
        for drawn_spec in drawing(spec)
        if drawn_spec.calibration is not None and not drawn_spec.calibration.writes
    ]


def calibration_identity(calibration: Calibration, seed: int) -> Json:
    """Return what determines calibration windows of texts, but for the tokenizer."""
    return {
        "windows": WINDOWS_VERSION,
        "text": calibration.digest,
        "samples": calibration.samples,
        "length": calibration.length,
        "draw": calibration.draw,
        "seed": None if calibration.draw == "first" else _draw_seed(calibration, seed),
    }


def as_read(text: Text, tokenizer: Any, *, answers: bool = False) -> tuple[Text, Encode]:
    """Return a text as the model reads it, and what makes tokens of it.

    A chat template writes the special tokens itself, so none are added to what it wrote.

    Args:
        answers: the model is to answer each conversation.
    """
    if not text.chat:
        return text, encoder(tokenizer)
    documents = rendered(text.documents, tokenizer, text.name, answers=answers)

    def encode(content: str) -> list[int]:
        return tokenizer(content, verbose=False, add_special_tokens=False)["input_ids"]

    return replace(text, documents=documents, chat=False), encode


def _drawn(trial: Trial, tokenizer: Any, write: Write | None) -> "Tensor":
    """Return the windows of each part, one part after the other."""
    import torch

    calibration, windows = trial.spec.calibration, []
    assert calibration is not None
    for part in map(calibration.of_part, calibration.every_part):
        if part.source == TRACES:
            assert write is not None
            windows.append(write(part))
        else:
            windows.append(_of_text(part, trial, tokenizer))
    return torch.cat(windows)


def _of_text(calibration: Calibration, trial: Trial, tokenizer: Any) -> "Tensor":
    placement = trial.placement
    text = load_text(
        calibration.source,
        split="calibration",
        path=placement.calibration_file(calibration.digest),
        data=placement.data,
    )
    refuse_changed_text(text.digest, calibration.digest, calibration.source)
    text, encode = as_read(text, tokenizer)
    return draw_windows(
        text,
        encode,
        samples=calibration.samples,
        length=calibration.length,
        draw=calibration.draw,
        seed=_draw_seed(calibration, trial.spec.seed),
    )


def _draw_seed(calibration: Calibration, seed: int) -> int:
    return seed + (AWQ_SHUFFLE_SEED if calibration.draw == "documents" else 0)
