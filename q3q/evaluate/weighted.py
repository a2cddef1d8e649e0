"""Perplexities per word or byte: documents' contributions, and intervals, which lm-eval lacks."""

import math
from collections.abc import Mapping, Sequence

from q3q.evaluate.compare import NORMAL_95, estimate
from q3q.evaluate.perplexity import exp_or_infinity
from q3q.spec import Json


def weighted_losses(rows: Sequence[Json]) -> dict[str, list[float]]:
    """Return each document's contribution to a perplexity per word or byte, and to bits per byte.

    The contributions are nats (or bits) whose mean is the perplexity's logarithm (or the bits per
    byte) L = -sum l / sum w, where l and w are the documents' log-likelihoods and weights (words or
    bytes). A longer document counts more: with n documents, each contributes
    L + n (-l - L w) / sum w. The variance of these is the ratio's (Cochran, Sampling Techniques,
    1977, section 6.4), so intervals and paired comparisons of their mean are the ratio's.
    """
    losses: dict[str, list[float]] = {}
    for name in ("word_perplexity", "byte_perplexity", "bits_per_byte"):
        pairs = [tuple(row[name]) for row in rows if isinstance(row.get(name), (tuple, list))]
        if not pairs or len(pairs) < len(rows):
            continue
        n, weight = len(pairs), sum(w for _, w in pairs)
        loss = -sum(score for score, _ in pairs) / weight
        unit = math.log(2) if name == "bits_per_byte" else 1.0
        losses[name] = [(loss + n * (-score - loss * w) / weight) / unit for score, w in pairs]
    return losses


def weighted_intervals(
    task: str, losses: Mapping[str, Sequence[float]]
) -> dict[str, tuple[float, float]]:
    """Return 95 % intervals of the metrics to which `weighted_losses` are the contributions."""
    intervals: dict[str, tuple[float, float]] = {}
    for name, values in losses.items():
        if len(values) < 2:
            continue
        mean = estimate({str(number): value for number, value in enumerate(values)})
        spread = NORMAL_95 * mean.standard_error
        low, high = mean.value - spread, mean.value + spread
        if name != "bits_per_byte":
            low, high = exp_or_infinity(low), exp_or_infinity(high)
        intervals[f"{task}/{name}"] = low, high
    return intervals
