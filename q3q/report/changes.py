"""Changes against the unquantized model, with their sign and unit, and what tells two pools apart.

A change is measured on the same questions and windows, and methods are compared with each other in
the same way. A question's difficulty is the same for both and cancels.
"""

import math
from dataclasses import dataclass

from q3q.evaluate.metrics import mean_metrics
from q3q.evaluate.power import LEVEL
from q3q.evaluation import change_in_words, change_of, is_accuracy, is_perplexity, is_share
from q3q.record import Comparison, TrialRecord
from q3q.report.measures import interval, is_better
from q3q.report.pairs import difference, p_by_seeds, stratified
from q3q.report.pools import Pool
from q3q.spec import MEAN_ACCURACY

SAME = "no significant difference"
UNTESTED = "not tested"


@dataclass(frozen=True)
class Change:
    """The change of one metric from a reference, which is the unquantized model or another trial.

    value: of a perplexity the ratio less one, of any other metric the difference.
    low, high: the 95 % interval; None without a paired comparison.
    distinguishable: from no change; None if unknown. Corrected where the change is one of a family.
    p_value: of this change alone; None if unknown.
    paired: what the interval and the p-value come from.
    """

    metric: str
    value: float
    low: float | None = None
    high: float | None = None
    distinguishable: bool | None = None
    p_value: float | None = None
    paired: Comparison | None = None

    @property
    def amount(self) -> str:
        """The change with its sign, unit and interval: `+20.0 % [+10.0, +30.0]`."""
        ends = [] if self.low is None or self.high is None else [self.low, self.high]
        return change_in_words(self.metric, self.value, *ends)

    @property
    def direction(self) -> str:
        """`better`, `worse` or `no change`; empty if it is not known which the sign means."""
        if self.value == 0:
            return "no change"
        if not is_perplexity(self.metric) and not is_share(self.metric):
            return ""
        return "better" if is_better(self.value, 0.0, self.metric) else "worse"

    def __str__(self) -> str:
        """Return the amount and what it means: `+20.0 % [+10.0, +30.0], worse`."""
        if self.distinguishable is False:
            return f"{self.amount}, {SAME}"
        tested = "" if self.distinguishable or self.value == 0 else f" ({UNTESTED})"
        return ", ".join(filter(None, [self.amount, self.direction])) + tested


def change(pool: Pool, reference: Pool | None, metric: str) -> Change | None:
    """Return a pool's change from the unquantized model; None if one of them has no number."""
    ours = pool.cell(metric)
    if not isinstance(ours, float):
        return None
    paired = _recorded(pool, metric)
    if paired is None and reference is not None:
        paired = difference(pool, reference, metric)
    return _change(metric, ours, reference, paired)


def change_between(ours: Pool, theirs: Pool, metric: str) -> Change | None:
    """Return the change from one quantized pool to another; None if one of them has no number."""
    value = ours.cell(metric)
    if not isinstance(value, float):
        return None
    # What the scores of samples say of other metrics depends on how these are computed from them.
    testable = is_perplexity(metric) or is_accuracy(metric)
    return _change(metric, value, theirs, difference(ours, theirs, metric) if testable else None)


def p_of_pair(
    first: Pool, second: Pool, reference: Pool | None, change_of_pair: Change | None
) -> float | None:
    """Return how often chance alone makes two pools differ so; None if that is unknown.

    They are compared by a paired test on the same windows and questions; where methods have several
    seeds, their spread is a second source of chance, and without samples Welch's test of the seeds
    may show that it explains the difference.

    Without samples, intervals that do not overlap still show a difference: what the two have in
    common only makes a paired test's interval narrower. Overlapping intervals show nothing.

    Args:
        found: the change from the second to the first; None if one has no number.
    """
    if change_of_pair is None:
        return None
    metric = change_of_pair.metric
    if first.cell(metric) == second.cell(metric):
        return 1.0
    paired = change_of_pair.paired or difference(first, second, metric)
    if paired is not None:
        return p_of(paired)
    of_seeds = p_by_seeds(first, second, metric)
    if of_seeds is not None and of_seeds >= LEVEL:
        return of_seeds
    for a, b in zip(*(_intervals(p, reference, metric) for p in (first, second)), strict=True):
        if a is not None and b is not None:
            return _p_of_gap(a, b)
    return None


def p_of(paired: Comparison) -> float | None:
    """Return a comparison's p-value; None if there were too few samples for a test.

    The bootstrap resolves no p-value below one in its resamples; there the interval's counts, so
    that a large family's correction does not swallow what no resample contradicts. All other tests
    have p-values of their own, however small.
    """
    from q3q.evaluate.compare import BOOTSTRAP, RESAMPLES
    from q3q.evaluate.equivalence import p_of_interval

    if paired.p_value is None:
        if paired.distinguishable or paired.difference is None:  # not all are finite
            return 0.0 if paired.distinguishable else 1.0
        return None
    ends = (paired.difference, paired.low, paired.high)
    at_floor = paired.test.startswith(BOOTSTRAP) and paired.p_value <= 2 / (RESAMPLES + 1)
    if not at_floor or None in ends:
        return paired.p_value
    return min(paired.p_value, p_of_interval(*ends))  # type: ignore[arg-type]


def _p_of_gap(a: tuple[float, float], b: tuple[float, float]) -> float | None:
    """Return the p-value of two intervals that do not overlap, as of independent numbers."""
    from q3q.evaluate.compare import NORMAL_95
    from q3q.evaluate.equivalence import upper_tail

    low, high = sorted((a, b))
    if high[0] <= low[1]:
        return None
    reach = math.hypot(low[1] - low[0], high[1] - high[0]) / 2
    return 2 * upper_tail((high[0] + high[1] - low[0] - low[1]) / 2, reach / NORMAL_95)


def _change(
    metric: str, ours: float, reference: Pool | None, paired: Comparison | None
) -> Change | None:
    """Return the paired difference as a change or, without samples, that of the two numbers."""
    if paired is not None and paired.difference is not None:
        value, low, high = (
            None if end is None else math.expm1(end) if is_perplexity(metric) else end
            for end in (paired.difference, paired.low, paired.high)
        )
        assert value is not None
        p_value = p_of(paired)
        tested = None if p_value is None else paired.distinguishable
        return Change(metric, value, low, high, tested, p_value, paired)
    theirs = None if reference is None else reference.cell(metric)
    if not isinstance(theirs, float):
        return None
    return Change(metric, change_of(metric, ours, theirs))


def _intervals(pool: Pool, reference: Pool | None, metric: str) -> list[tuple[float, float] | None]:
    """Return the intervals of a pool's change and of its metric."""
    changed = change(pool, reference, metric)
    both = changed is not None and changed.low is not None and changed.high is not None
    ends = (changed.low, changed.high) if changed is not None and both else None
    own: TrialRecord | None = pool.records[0] if len(pool.records) == 1 else None
    return [ends, None if own is None else interval(own, metric)]  # type: ignore[list-item]


def _recorded(pool: Pool, metric: str) -> Comparison | None:
    """Return the comparison with the unquantized model in a single trial's record."""
    if len(pool.records) > 1:
        return None
    recorded = pool.records[0].comparisons
    if metric != MEAN_ACCURACY:
        return recorded.get(metric)
    names = mean_metrics(pool.spec)
    complete = all(name in recorded for name in names)
    return stratified([recorded[name] for name in names]) if complete else None
