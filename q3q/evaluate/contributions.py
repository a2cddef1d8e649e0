"""What each document contributes to a metric: numbers whose mean is the metric, or its logarithm.

lm-eval makes one number of a metric's values for all documents by a function, its *aggregation*. A
mean is the simplest, but there are ratios, exponentials and functions of the whole set. A
comparison of two trials, and an interval, need a number for each document, and may only speak of
the metric if its number follows from these.

- For a mean the values themselves serve; for `perplexity` the losses, whose mean is its logarithm.
- A weighted mean (per word or byte, or over the values that are not nan) is a ratio of sums. A
  document contributes L + n (x - L w) / sum w, where L is the ratio, and x and w its sums' terms.
  The mean of these is L, and their variance is the ratio's (Cochran, Sampling Techniques, 1977,
  section 6.4).
- F1 and Matthews' correlation are smooth functions of few counts: a document contributes its
  jackknife pseudo-value, n T - (n - 1) T_(-i), shifted so that their mean is T (Efron and
  Tibshirani, An Introduction to the Bootstrap, 1993, chapter 11).
- Any other function is tried: if, of these documents and of resamples, it returns the mean (or the
  sum, or the exponential of the mean logarithm) of what it returns of each document alone, then
  that is what it is.
- Of what is left (a median, BLEU and others of the whole set) no document has a share.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy

from q3q.evaluate.compare import NORMAL_95, Estimate, estimate
from q3q.evaluate.metrics import exp_or_infinity

Aggregate = Callable[[Sequence[Any]], Any]

FEW = 8  # documents that a function is tried on first
TRIALS = 6  # resamples of all documents that it is tried on
MOST_KINDS = 1000  # different values for which pseudo-values are computed
# The possible values of a metric, by its aggregation's name in lm-eval.
RANGES = {
    "f1": (0.0, 1.0),
    "matthews_corrcoef": (-1.0, 1.0),
    "brier_score": (0.0, 2.0),
    "bleu": (0.0, 100.0),
    "chrf": (0.0, 100.0),
    "chrf++": (0.0, 100.0),
    "ter": (0.0, math.inf),
    "perplexity": (0.0, math.inf),
    "weighted_perplexity": (0.0, math.inf),
    "bits_per_byte": (0.0, math.inf),
}
ANYTHING = (-math.inf, math.inf)


@dataclass(frozen=True)
class Contributions:
    """What each document contributes to a metric.

    values: one a document
    logarithmic: their mean is the metric's logarithm, not the metric
    """

    values: tuple[float, ...]
    logarithmic: bool = False

    @property
    def mean(self) -> float:
        return self._estimate.value

    @property
    def _estimate(self) -> Estimate:
        return estimate({str(number): value for number, value in enumerate(self.values)})

    @property
    def number(self) -> float:
        """The metric."""
        return exp_or_infinity(self.mean) if self.logarithmic else self.mean

    def interval(self, within: tuple[float, float] = ANYTHING) -> tuple[float, float] | None:
        """Return the metric's 95 % interval; None for a single document.

        Args:
            within: the metric's possible values.
        """
        result = self._estimate
        if result.n < 2:
            return None
        spread = NORMAL_95 * result.standard_error
        low, high = result.value - spread, result.value + spread
        if self.logarithmic:
            low, high = exp_or_infinity(low), exp_or_infinity(high)
        return cut((low, high), within)


def cut(interval: tuple[float, float], within: tuple[float, float]) -> tuple[float, float]:
    """Return the part of an interval that is possible."""
    return max(interval[0], within[0]), min(interval[1], within[1])


def number_of(value: Any) -> float | None:
    """Return a document's value as a number, None if it is not one.

    NumPy's numbers and its arrays of one element are numbers, as are True and False.
    """
    if isinstance(value, (int, float)):
        return float(value)
    if not isinstance(value, (numpy.ndarray, numpy.generic)):
        return None
    return float(value.item()) if value.size == 1 and value.dtype.kind in "biuf" else None


def contributions(aggregate: Aggregate, name: str | None, items: Sequence[Any]) -> Contributions:
    """Return what each document contributes to a metric.

    Args:
        aggregate: the function that makes the metric of all documents' values.
        name: the function's name in lm-eval; None for a function of the task's own.
        items: the documents' values.

    Raises:
        ValueError: no document has a share in this metric; the message says why.
    """
    if name == "bypass":
        raise ValueError("bypass measures nothing")
    if all(item is None for item in items):
        raise ValueError("no document has a value")
    if name in _KNOWN:
        return _KNOWN[name](items)
    if name in ("f1", "matthews_corrcoef"):
        return Contributions(_pseudo_values(aggregate, items))
    return _of_single_documents(aggregate, name or "the task's own aggregation", items)


def of_group(
    parts: Sequence[tuple[Contributions, float]],
) -> list[Contributions]:
    """Return what the documents of a group's tasks contribute to the weighted mean of its tasks.

    With weights w_k (of sum 1) and metrics v_k of n_k documents, of N in all, a document of task k
    with contribution c adds N w_k / n_k (c - mean of c) to the group's number, times v_k where c is
    a logarithm. So the spread within tasks counts and that between them does not: the tasks are
    fixed, not drawn (Cochran, chapter 5).

    Args:
        parts: each task's contributions and its weight.
    """
    whole = sum(weight for _, weight in parts)
    group = sum(part.number * weight for part, weight in parts) / whole
    documents = sum(len(part.values) for part, _ in parts)
    shares = []
    for part, weight in parts:
        mean, slope = part.mean, documents * weight / whole / len(part.values)
        if part.logarithmic:
            slope *= part.number
        shares.append(Contributions(tuple(group + slope * (x - mean) for x in part.values)))
    return shares


def _means(items: Sequence[Any]) -> Contributions:
    return Contributions(_numbers(items))


def _losses(items: Sequence[Any]) -> Contributions:
    """Return the losses of lm-eval's `perplexity`, whose values are log-likelihoods."""
    return Contributions(tuple(-value for value in _numbers(items)), logarithmic=True)


def _means_without_nan(items: Sequence[Any]) -> Contributions:
    values = _numbers(items)
    if not any(map(math.isnan, values)):
        return Contributions(values)
    pairs = [(0.0, 0.0) if math.isnan(value) else (value, 1.0) for value in values]
    return Contributions(_of_ratio(pairs))


def _losses_by_weight(items: Sequence[Any]) -> Contributions:
    return Contributions(_of_ratio(_negated(items)), logarithmic=True)


def _bits_by_weight(items: Sequence[Any]) -> Contributions:
    return Contributions(tuple(nats / math.log(2) for nats in _of_ratio(_negated(items))))


# By an aggregation's name in lm-eval.
_KNOWN: dict[str | None, Callable[[Sequence[Any]], Contributions]] = {
    "mean": _means,
    "nanmean": _means_without_nan,
    "perplexity": _losses,
    "weighted_perplexity": _losses_by_weight,
    "bits_per_byte": _bits_by_weight,
}


def _numbers(items: Sequence[Any]) -> tuple[float, ...]:
    values = tuple(number for item in items if (number := number_of(item)) is not None)
    if len(values) < len(items):
        raise ValueError("not every document has a number")
    return values


def _negated(items: Sequence[Any]) -> list[tuple[float, float]]:
    """Return losses and weights of pairs of log-likelihoods and weights."""
    return [(-float(score), float(weight)) for score, weight in items]


def _of_ratio(pairs: Sequence[tuple[float, float]]) -> tuple[float, ...]:
    """Return the contributions to sum x / sum w of pairs (x, w)."""
    n, weight = len(pairs), math.fsum(w for _, w in pairs)
    if weight == 0:
        raise ValueError("all weights are zero")
    ratio = math.fsum(x for x, _ in pairs) / weight
    return tuple(ratio + n * (x - ratio * w) / weight for x, w in pairs)


def _pseudo_values(aggregate: Aggregate, items: Sequence[Any]) -> tuple[float, ...]:
    keys = [repr(item) for item in items]
    n, kinds = len(items), {key: number for number, key in enumerate(keys)}
    if len(kinds) > MOST_KINDS:
        raise ValueError(f"its documents have more than {MOST_KINDS} different values")
    whole = float(aggregate(items))
    if n == 1:
        return (whole,)
    without = {
        key: float(aggregate([*items[:number], *items[number + 1 :]]))
        for key, number in kinds.items()
    }
    pseudo = [n * whole - (n - 1) * without[key] for key in keys]
    shift = whole - math.fsum(pseudo) / n
    return tuple(value + shift for value in pseudo)


def _of_single_documents(aggregate: Aggregate, name: str, items: Sequence[Any]) -> Contributions:
    refusal = ValueError(f"{name} is of the whole set: no document has a share in it")

    def alone(some: Sequence[Any]) -> list[float]:
        return [float(aggregate([item])) for item in some]

    try:
        first = items[:FEW]
        if not _ways(alone(first), [range(len(first))], lambda _: float(aggregate(first))):
            raise refusal
        singles, dice = alone(items), numpy.random.default_rng(0)
        draws = [range(len(items)), *dice.integers(len(items), size=(TRIALS, len(items))).tolist()]
        ways = _ways(singles, draws, lambda draw: float(aggregate([items[i] for i in draw])))
    except ValueError as error:
        raise error if error is refusal else refusal from error
    except Exception as error:  # a task's own function may raise any
        raise refusal from error
    if "mean" in ways:
        return Contributions(tuple(singles))
    if "sum" in ways:
        return Contributions(tuple(len(items) * single for single in singles))
    if "exponential" in ways:
        return Contributions(tuple(map(math.log, singles)), logarithmic=True)
    raise refusal


def _ways(
    singles: Sequence[float],
    draws: Sequence[Sequence[int]],
    aggregate: Callable[[Sequence[int]], float],
) -> set[str]:
    """Return in which ways a function of some documents follows from those of single ones.

    Args:
        singles: the function of each document alone.
        draws: numbers of documents.
        aggregate: the function of the documents with these numbers.
    """
    ways = {"mean", "sum"} | ({"exponential"} if all(single > 0 for single in singles) else set())
    for draw in draws:
        values, whole = [singles[i] for i in draw], aggregate(draw)
        total = math.fsum(values)
        expected = {"mean": total / len(draw), "sum": total}
        if "exponential" in ways:
            expected["exponential"] = exp_or_infinity(
                math.fsum(map(math.log, values)) / len(values)
            )
        ways = {
            way for way in ways if math.isclose(expected[way], whole, rel_tol=1e-7, abs_tol=1e-9)
        }
    return ways
