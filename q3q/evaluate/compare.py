"""Paired statistics: is a difference between two trials more than chance?

Two trials that answer the same questions and read the same windows are compared question by
question and window by window: a hard question is hard for both, and its difficulty cancels. Each
score's key names its sample (`<task>/<doc id>/<hash of the document>`, or `<digest of the
windows>/<window>`), so that only equal samples are compared.

The statistics treat samples as independent. Windows cut from one running text, or two from one
document, are nearly so; intervals of a text that repeats itself are too narrow.

A difference is distinguishable if its test's p-value is below LEVEL. The interval agrees: it
excludes zero then, and only then.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy
from numpy.typing import NDArray

from q3q.errors import IntegrityError
from q3q.evaluate.power import LEVEL
from q3q.record import Comparison

Scores = Mapping[str, float]
Floats = NDArray[numpy.float64]

BOOTSTRAP = "paired studentized bootstrap"  # how the test's name starts
RESAMPLES = 10_000  # of the bootstrap; the seed moves an interval's ends by about 1 % of its width
QUANTILE_RESAMPLES = 1000  # fewer, as each goes through all values
EXACT_BELOW = 25  # discordant pairs; from here on McNemar's chi-squared approximation holds
FEWEST_PAIRS = 6  # of fewer, all have one sign by chance more often than LEVEL: 2 * 2**-5 > 0.05
NORMAL_95 = 1.959964  # 97.5 % quantile of the normal distribution
_DRAWS = 1 << 21  # random indices held at one time
_KEPT = 1 << 22  # random indices of one number of samples that are kept for the next comparison


@dataclass(frozen=True)
class Estimate:
    """A mean over n samples; standard_error is nan if n is too small to estimate it."""

    value: float
    standard_error: float
    n: int


def compare(
    metric: str,
    ours: Scores,
    baseline: Scores,
    *,
    ratio: bool = False,
    higher_is_better: bool | None = None,
    seed: int = 0,
) -> Comparison:
    """Compare a trial with its baseline: answers by McNemar's test, other scores by the bootstrap.

    Args:
        ours: the trial's score of each sample; all 0 or 1 if they tell right from wrong answers.
        ratio: the mean of the scores is the metric's logarithm.
        higher_is_better: None if unknown.

    Raises:
        IntegrityError: the two were not scored on the same samples, or on none.
    """
    ours_N, baseline_N = _pairs(metric, ours, baseline)
    binary = all(bool(numpy.isin(scores, (0.0, 1.0)).all()) for scores in (ours_N, baseline_N))
    if binary and not ratio:
        comparison = _compare_answers(metric, ours_N == 1, baseline_N == 1)
    else:
        comparison = _compare_means(metric, ours_N, baseline_N, seed)
    return replace(comparison, ratio=ratio, higher_is_better=higher_is_better)


def estimate(scores: Scores) -> Estimate:
    """Return the mean of a metric's scores and its standard error, s / sqrt(n), s over n - 1."""
    values_N = numpy.array(list(scores.values()), dtype=numpy.float64)
    n = len(values_N)
    error = float(values_N.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan
    return Estimate(float(values_N.mean()) if n else math.nan, error, n)


def quantile_interval(value_KP: Floats, share: float) -> tuple[float, float]:
    """Compute the 95 % interval of the `share` quantile of K windows' values; nan if K is 1.

    The percentile bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993, section
    13.3) of whole windows, since positions of one window are not independent. Quantiles between two
    values are interpolated linearly.
    """
    count, length = value_KP.shape
    if count < 2:
        return math.nan, math.nan
    order = numpy.argsort(value_KP, axis=None, kind="stable")
    value_M, window_M = value_KP.ravel()[order], order // length
    rank = share * (count * length - 1)
    below = int(rank)
    dice = numpy.random.default_rng(0)
    quantile_R = numpy.empty(QUANTILE_RESAMPLES)
    for r in range(QUANTILE_RESAMPLES):
        times_K = numpy.bincount(dice.integers(count, size=count), minlength=count)
        # The resample's i-th smallest value is the first whose cumulative count exceeds i.
        counts_M = numpy.cumsum(times_K[window_M])
        low, high = numpy.searchsorted(counts_M, [below, below + 1], side="right")
        step = value_M[min(high, len(value_M) - 1)] - value_M[low]
        quantile_R[r] = value_M[low] + (rank - below) * step
    low, high = numpy.quantile(quantile_R, [LEVEL / 2, 1 - LEVEL / 2])
    return float(low), float(high)


def mcnemar(better: int, worse: int) -> tuple[float, str]:
    """Return the two-sided p-value of `better` pairs against `worse` pairs, and the test's name.

    McNemar (Psychometrika 12, 1947): if both are equally good, each discordant pair is the toss of
    a fair coin. Below EXACT_BELOW pairs by the binomial distribution, p = min(1, 2 P(X <=
    min(better, worse))), X ~ Bin(better + worse, 1/2); else by chi^2 = (|better - worse| - 1)^2 /
    (better + worse) with one degree of freedom, that is with the continuity correction of Edwards
    (Psychometrika 13, 1948).
    """
    pairs = better + worse
    if pairs < EXACT_BELOW:
        tail = sum(math.comb(pairs, k) for k in range(min(better, worse) + 1))
        return min(1.0, 2 * tail / 2**pairs), "McNemar exact"
    chi_squared = max(0, abs(better - worse) - 1) ** 2 / pairs
    return math.erfc(math.sqrt(chi_squared / 2)), "McNemar with continuity correction"


def paired_interval(both: int, first: int, second: int, neither: int) -> tuple[float, float]:
    """Compute the 95 % interval of the difference of two paired proportions, first less second.

    Newcombe (Statistics in Medicine 17, 1998, 2635-2650), method 10: the Wilson intervals of the
    two proportions, combined with their correlation phi (its numerator corrected for continuity).
    Unlike Wald's it stays within +-1 and has a width when all pairs agree.
    """
    n = both + first + second + neither
    p, q = (both + first) / n, (both + second) / n
    (p_low, p_high), (q_low, q_high) = share_interval(p, n), share_interval(q, n)
    margins = (both + first) * (second + neither) * (both + second) * (first + neither)
    product = both * neither - first * second
    corrected = product if product < 0 else max(0.0, product - n / 2)
    phi = corrected / math.sqrt(margins) if margins else 0.0

    def spread(down: float, up: float) -> float:
        return math.sqrt(max(0.0, down**2 - 2 * phi * down * up + up**2))

    return p - q - spread(p - p_low, q_high - q), p - q + spread(p_high - p, q - q_low)


def share_interval(p: float, n: int) -> tuple[float, float]:
    """Compute the 95 % score interval of a proportion (Wilson, JASA 22, 1927)."""
    z2 = NORMAL_95**2
    middle = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = NORMAL_95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n**2)) / (1 + z2 / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def _pairs(metric: str, ours: Scores, baseline: Scores) -> tuple[Floats, Floats]:
    """Return both sides' scores [N] in the same order."""
    only = [sorted(ours.keys() - baseline.keys()), sorted(baseline.keys() - ours.keys())]
    if only[0] or only[1]:
        shown = "; ".join(
            f"{len(keys)} only in the {whose}, first {keys[0]}"
            for keys, whose in zip(only, ("trial", "baseline"), strict=True)
            if keys
        )
        raise IntegrityError(
            f"{metric}: trial and baseline were not scored on the same samples ({shown}). "
            "Evaluate both with the same settings and data"
        )
    if not ours:
        raise IntegrityError(f"{metric}: no samples to compare")
    keys = sorted(ours)
    sides = ([side[key] for key in keys] for side in (ours, baseline))
    ours_N, baseline_N = (numpy.array(scores, dtype=numpy.float64) for scores in sides)
    return ours_N, baseline_N


def _compare_answers(
    metric: str, ours_N: NDArray[numpy.bool_], baseline_N: NDArray[numpy.bool_]
) -> Comparison:
    n = len(ours_N)
    masks = ours_N & baseline_N, ours_N & ~baseline_N, ~ours_N & baseline_N
    both, better, worse = (int(mask_N.sum()) for mask_N in masks)
    p_value, test = mcnemar(better, worse)
    ends = paired_interval(both, better, worse, n - both - better - worse)
    low, high = _as_the_test_says(*ends, p_value)
    return Comparison(
        metric=metric,
        difference=(better - worse) / n,
        low=low,
        high=high,
        distinguishable=p_value < LEVEL,
        p_value=p_value,
        n=n,
        test=f"{test}; interval Newcombe's",
    )


def _as_the_test_says(
    low: float | None, high: float | None, p_value: float
) -> tuple[float | None, float | None]:
    """Extend an interval to zero where the test does not exclude zero.

    Newcombe's interval is a little too narrow for McNemar's test, but never includes a zero that
    the test excludes.
    """
    if p_value < LEVEL:
        return low, high
    return None if low is None else min(low, 0.0), None if high is None else max(high, 0.0)


def _compare_means(metric: str, ours_N: Floats, baseline_N: Floats, seed: int) -> Comparison:
    """Compare means by `studentized_bootstrap`, where scores are finite and enough."""
    n = len(ours_N)
    finite = [bool(numpy.isfinite(scores).all()) for scores in (ours_N, baseline_N)]
    difference = low = high = p_value = None
    if not all(finite):
        distinguishable, test = finite[0] != finite[1], "none: not all scores are finite"
    else:
        difference = float((ours_N - baseline_N).mean())
        if n < FEWEST_PAIRS:
            distinguishable = False
            test = f"none: {FEWEST_PAIRS} pairs are the fewest that can tell"
        else:
            low, high, p_value = studentized_bootstrap(ours_N - baseline_N, seed)
            low, high = _as_the_test_says(low, high, p_value)
            distinguishable = p_value < LEVEL
            test = f"{BOOTSTRAP}, {RESAMPLES} resamples"
    return Comparison(
        metric=metric,
        difference=difference,
        low=low,
        high=high,
        distinguishable=distinguishable,
        p_value=p_value,
        n=n,
        test=test,
    )


def studentized_bootstrap(
    difference_N: Floats, seed: int
) -> tuple[float | None, float | None, float]:
    """Compute a mean's 95 % interval, and the p-value of its being zero.

    The bootstrap-t of Efron and Tibshirani (An Introduction to the Bootstrap, 1993, section 12.5):
    the distance of a resample's mean m* from the mean m, in the resample's standard errors, t* =
    (m* - m) / se*, estimates m's distance from the truth; the interval is m - se t*_(97.5 %) to m -
    se t*_(2.5 %). With 12 normal samples it covers the truth in 95 % of cases, with 12 exponential
    ones in 94 %; the percentile interval covers it in 91 % and 87 %. The p-value inverts the
    interval: twice the smaller share of t* on either side of m / se, with one added to each count,
    so that none is zero (Davison and Hinkley, Bootstrap Methods, 1997, chapter 4).

    Returns:
        low, high, p-value. An end is None if resamples without any spread leave it unbounded.
    """
    n, mean = len(difference_N), float(difference_N.mean())
    error = float(difference_N.std(ddof=1)) / math.sqrt(n)
    if error == 0:
        return mean, mean, 1.0 if mean == 0 else 2 / (RESAMPLES + 1)
    t_R = _resampled_t(difference_N, seed)
    t_ends = numpy.quantile(t_R, (0.975, 0.025), method="inverted_cdf")
    ends = (mean - error * float(t) for t in t_ends)
    low, high = (end if math.isfinite(end) else None for end in ends)
    smaller = min(int((t_R >= mean / error).sum()), int((t_R <= mean / error).sum()))
    return low, high, min(1.0, 2 * (smaller + 1) / (RESAMPLES + 1))


def _resampled_t(values_N: Floats, seed: int) -> Floats:
    """Return t* [RESAMPLES]; infinite for a resample without spread that is off the mean."""
    n, mean = len(values_N), values_N.mean()
    parts = []
    for draw_RN in _kept_draws(n, seed) if n * RESAMPLES <= _KEPT else _draws(n, seed):
        drawn_RN = values_N[draw_RN]
        off_R, error_R = drawn_RN.mean(1) - mean, drawn_RN.std(1, ddof=1) / math.sqrt(n)
        without_spread_R = numpy.where(off_R == 0, 0.0, numpy.copysign(numpy.inf, off_R))
        parts.append(numpy.divide(off_R, error_R, out=without_spread_R, where=error_R > 0))
    return numpy.concatenate(parts)


def _draws(n: int, seed: int) -> Iterator[NDArray[numpy.int64]]:
    """Yield the samples' numbers in each resample, [R, N], some resamples at a time."""
    dice, rows = numpy.random.default_rng(seed), max(1, _DRAWS // n)
    for start in range(0, RESAMPLES, rows):
        yield dice.integers(0, n, (min(rows, RESAMPLES - start), n))


@lru_cache(maxsize=4)
def _kept_draws(n: int, seed: int) -> tuple[NDArray[numpy.int64], ...]:
    """Return these draws, kept: a report compares all pairs of trials on the same windows."""
    return tuple(_draws(n, seed))
