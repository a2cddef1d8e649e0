"""Equivalence: is a difference shown to be small, rather than merely not shown to be large?

That two trials cannot be told apart may mean that there were few questions. Equivalence is a claim
of its own, for which the reader says how much is small.
"""

import math

from q3q.evaluate.compare import NORMAL_95
from q3q.evaluate.power import LEVEL
from q3q.record import Comparison


def equivalence(comparison: Comparison, margin: float) -> float | None:
    """Return the p-value of two one-sided tests that the difference lies within the margin.

    Schuirmann (Journal of Pharmacokinetics and Biopharmaceutics 15, 1987): the difference is
    neither as low as -margin nor as high as +margin; the larger p-value of the two counts. At 5 %
    this says that the 90 % interval lies within the margin. Each p-value is read off the paired
    95 % interval (Altman and Bland, BMJ 343:d2304, 2011): the distance from the difference to an
    end is 1.96 standard errors on that side or, for a mean over seeds, Student's quantile of them,
    whose tails are far longer. So the test is as good as the interval: Newcombe's of answers, the
    bootstrap's of losses, Student's of seeds.

    Args:
        margin: in the difference's unit, above zero: nats for a perplexity, a share for an
            accuracy.

    Returns:
        None if there is no paired interval.

    Raises:
        ValueError: the margin is not above zero.
    """
    if not (margin > 0 and math.isfinite(margin)):
        raise ValueError(f"a margin must be a number above zero, got {margin}")
    middle, low, high = comparison.difference, comparison.low, comparison.high
    if middle is None or low is None or high is None:
        return None
    above = _beyond(middle + margin, middle - low, comparison.freedom)
    below = _beyond(margin - middle, high - middle, comparison.freedom)
    return max(above, below)


def _beyond(distance: float, reach: float, freedom: float | None) -> float:
    """Return how often chance exceeds the distance, given how far the interval's end is.

    Args:
        freedom: Student's degrees of freedom; None for a normal variable.
    """
    if freedom is None or reach <= 0:
        return upper_tail(distance, reach / NORMAL_95)
    from scipy.stats import t

    return float(t.sf(distance * t.ppf(1 - LEVEL / 2, freedom) / reach, freedom))


def upper_tail(distance: float, error: float) -> float:
    """Return how often a normal variable of this standard error exceeds the distance."""
    if error <= 0:
        return 0.0 if distance > 0 else 1.0
    return math.erfc(distance / error / math.sqrt(2)) / 2


def p_of_interval(difference: float, low: float, high: float) -> float:
    """Return the two-sided p-value that a 95 % interval stands for (Altman and Bland, 2011).

    It is below 0.05 if the interval excludes zero, and only then. The side that faces zero counts.
    """
    reach = difference - low if difference > 0 else high - difference
    if difference == 0:
        return 1.0
    return min(1.0, 2 * upper_tail(abs(difference), reach / NORMAL_95))
