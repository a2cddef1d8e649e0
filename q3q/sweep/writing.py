"""What writing traces costs: a model runs once for each token of the windows written together."""

from q3q.data.traces import traces_of, written_parts
from q3q.models.facts import DTYPE_BYTES, ModelFacts
from q3q.models.footprint import cache_shape
from q3q.spec import Calibration, TrialSpec


def parts_of(spec: TrialSpec, facts: ModelFacts) -> list[tuple[Calibration, range]]:
    """Return the traces of a trial, and the numbers of the windows that are written together."""
    token_bytes = cache_shape(facts).numbers * DTYPE_BYTES[spec.model.dtype]
    return [
        (traces, numbers)
        for traces in traces_of(spec)
        for numbers in written_parts(traces.samples, traces.length, token_bytes)
    ]


def written_tokens(spec: TrialSpec) -> int:
    """Return how many tokens a trial's model writes, or reads of its prompts."""
    return sum(traces.tokens for traces in traces_of(spec))


def steps_of_writing(spec: TrialSpec, facts: ModelFacts) -> int:
    """Return how many times the model runs on one more token of windows written together."""
    return sum(traces.length - 1 for traces, _ in parts_of(spec, facts))
