"""What traces are written from: the identity of a text that a model writes itself."""

from q3q.data.texts import Text
from q3q.spec import Calibration, Json, TrialSpec, digest

FOLDER = "traces"  # of a storage folder
TRACES_VERSION = 1  # raised when the same recipe gives other tokens


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
