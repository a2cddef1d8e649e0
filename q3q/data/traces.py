"""What traces are written from: the identity of a text that a model writes itself."""

from q3q.data.texts import Text
from q3q.spec import TRACES, Calibration, Json, TrialSpec, digest

FOLDER = "traces"  # of a storage folder
TRACES_VERSION = 1  # raised when the same recipe gives other tokens
PART_BYTES = 1 << 30  # of the keys and values of rows that are written together
MOST_ROWS = 32  # of a part: what a killed trial may lose


def recipe(prompts: Text | None, temperature: float) -> str:
    """Return the digest of all that decides on traces, but for the model, the seed and the length.

    Args:
        prompts: what they go on from; None: nothing but the token before a text.
        temperature: 0 for greedy traces.
    """
    facts = {"traces": TRACES_VERSION, "temperature": float(temperature)}
    return digest(facts | {"prompts": None if prompts is None else prompts.digest})


def traces_identity(spec: TrialSpec, calibration: Calibration) -> Json:
    """Return what determines the windows that a trial's model writes, but for the tokenizer.

    Greedy traces do not depend on the seed. Nor does it matter how many others there are.

    Args:
        calibration: of traces, all of a trial's or its part of a mix.
    """
    return {
        "traces": TRACES_VERSION,
        "model": spec.model.identity,
        "recipe": calibration.digest,
        "length": calibration.length,
        "seed": spec.seed if calibration.temperature else None,
    }


def traces_of(spec: TrialSpec) -> list[Calibration]:
    """Return the traces that a trial is calibrated on, each part of a mix as if it were all."""
    calibration = spec.calibration
    if calibration is None:
        return []
    every = calibration.every_part
    return [calibration.of_part(part) for part in every if part.source == TRACES]


def written_parts(samples: int, length: int, token_bytes: int) -> list[range]:
    """Return the numbers of the windows that are written together, whatever memory is free.

    Other numbers of rows could round differently, and the windows would depend on the machine.

    Args:
        token_bytes: what a token leaves in the model's cache.
    """
    rows = max(1, min(MOST_ROWS, PART_BYTES // max(1, token_bytes * length)))
    return [range(first, min(first + rows, samples)) for first in range(0, samples, rows)]


def part_identity(spec: TrialSpec, calibration: Calibration, numbers: range) -> Json:
    """Return what determines the windows with these numbers, but for the tokenizer."""
    return {**traces_identity(spec, calibration), "rows": [numbers.start, numbers.stop]}
