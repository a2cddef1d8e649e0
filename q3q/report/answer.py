"""The answer: for each model and bit width the best method, its loss, and which methods equal it.

Only trials of the same weights and the same evaluation are compared, and a method with several
seeds counts by its mean. A loss is measured against the unquantized model on the same questions and
windows; methods are compared with each other in the same way. A question's difficulty is the same
for both and cancels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from q3q.evaluate.metrics import mean_metrics
from q3q.record import Comparison, TrialRecord
from q3q.report.measures import (
    ABSENT,
    DIVERGED,
    FAILED,
    interval,
    is_better,
    is_perplexity,
    judged_metrics,
    short,
)
from q3q.report.pairs import differ_by_seeds, difference, stratified
from q3q.report.pools import Pool, comparable, pools
from q3q.report.tables import MARK, MARKED, Table, other_versions
from q3q.spec import MEAN_ACCURACY

RULE = (
    "Losses are relative to the unquantized model, with 95 % intervals of paired differences where "
    "a trial has them. Two methods are not distinguishable if a paired test on the same windows "
    "and questions does not tell them apart (p < 0.05) or, for methods with several seeds, the "
    "spread over seeds explains the difference (Welch's test). A single seed does not tell how "
    "much of a difference is due to the calibration text that was drawn. Unknown: the samples that "
    "a paired test needs are missing."
)
UNKNOWN = "unknown"
DECIMALS = (1, 4)  # of a loss, the fewest and the most


@dataclass(frozen=True)
class Loss:
    """The loss on one metric relative to the unquantized model.

    value: a perplexity's ratio less one, an accuracy's difference (negative is worse).
    low, high: the 95 % interval; None without a paired comparison.
    distinguishable: from no loss; None if unknown.
    """

    metric: str
    value: float
    low: float | None = None
    high: float | None = None
    distinguishable: bool | None = None

    def __str__(self) -> str:
        """Format to two digits of the interval's width: `+20.0 % [+10.0, +30.0]`, `-0.25 points`.

        A perplexity of ten times the original's or more is given as a ratio.
        """
        ends = [self.value, *(end for end in (self.low, self.high) if end is not None)]
        if is_perplexity(self.metric) and self.value > 9:
            text, *bounds = (f"{1 + end:.3g}" for end in ends)
            text = f"{text} times"
        else:
            reach = 100 * max(
                map(abs, (end - self.value for end in ends[1:])), default=abs(self.value)
            )
            fewest, most = DECIMALS
            digits = (
                min(most, max(fewest, 1 - math.floor(math.log10(reach)))) if reach > 0 else fewest
            )
            text, *bounds = (f"{100 * end:+.{digits}f}" for end in ends)
            text += " %" if is_perplexity(self.metric) else " points"
        if len(bounds) == 2:
            text += f" [{', '.join(bounds)}]"
        return text + (" (not distinguishable from none)" if self.distinguishable is False else "")


def answers(records: Sequence[TrialRecord]) -> list[Table]:
    """Return a table per model and evaluation, with a row per bit width."""
    outliers = other_versions(records)
    tables = [_answer(name, group, outliers) for name, group in comparable(records).items()]
    return [table for table in tables if table]


def loss(pool: Pool, reference: Pool | None, metric: str) -> Loss | None:
    """Return a pool's loss; None if it or the unquantized model has no number."""
    ours = pool.cell(metric)
    if not isinstance(ours, float):
        return None
    paired = _recorded(pool, metric)
    if paired is None and reference is not None:
        paired = difference(pool, reference, metric)
    if paired is not None and paired.difference is not None:
        value, low, high = (
            None if end is None else math.expm1(end) if is_perplexity(metric) else end
            for end in (paired.difference, paired.low, paired.high)
        )
        assert value is not None
        return Loss(metric, value, low, high, paired.distinguishable)
    theirs = None if reference is None else reference.cell(metric)
    if not isinstance(theirs, float):
        return None
    return Loss(metric, ours / theirs - 1 if is_perplexity(metric) else ours - theirs)


def indistinguishable(
    first: Pool, second: Pool, reference: Pool | None, metric: str
) -> bool | None:
    """Return True if two pools are not distinguishable by `RULE`, None if that is unknown.

    Without samples, intervals that do not overlap still show a difference: what the two have in
    common only makes a paired test's interval narrower. Overlapping intervals show nothing.
    """
    if first.cell(metric) == second.cell(metric):
        return True
    if differ_by_seeds(first, second, metric) is False:
        return True
    paired = difference(first, second, metric)
    if paired is not None:
        return not paired.distinguishable
    for a, b in zip(*(_intervals(p, reference, metric) for p in (first, second)), strict=True):
        if a is not None and b is not None:
            return False if a[0] > b[1] or b[0] > a[1] else None
    return None


def _intervals(pool: Pool, reference: Pool | None, metric: str) -> list[tuple[float, float] | None]:
    """Return the intervals of a pool's loss and of its metric."""
    lost = loss(pool, reference, metric)
    ends = None if lost is None or lost.low is None or lost.high is None else (lost.low, lost.high)
    return [ends, interval(pool.records[0], metric) if len(pool.records) == 1 else None]


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


def _answer(name: str, records: Sequence[TrialRecord], outliers: frozenset[str]) -> Table | None:
    judged = judged_metrics(records)
    if not judged:
        return None
    every = pools(records)
    references = (p for p in every if p.spec.scheme is None and p.records[0].completed)
    reference = next(references, None)
    tried = [pool for pool in every if pool.spec.scheme is not None]
    rows = tuple(
        _row(bits, [pool for pool in tried if pool.bits == bits], reference, judged, outliers)
        for bits in sorted({pool.bits for pool in tried})
    )
    if not rows:
        return None
    several = len(judged) > 1
    columns = (
        "bits",
        f"best method by {short(judged[0])}" if several else "best method",
        *(head for metric in judged for head in (short(metric), "loss")),
        "not distinguishable from the best",
        *(["best by the others"] if several else []),
    )
    return Table(name, columns, rows, MARKED if any(MARK in row[1] for row in rows) else "")


def _row(
    bits: int,
    tried: Sequence[Pool],
    reference: Pool | None,
    judged: Sequence[str],
    outliers: frozenset[str],
) -> tuple[str, ...]:
    first, *others = judged
    best = _best(tried, first)
    if best is None:
        outcomes = {str(pool.cell(first)) for pool in tried} & {DIVERGED, FAILED}
        empty = [ABSENT] * (2 * len(judged) + bool(others))
        return (str(bits), ABSENT, " or ".join(sorted(outcomes)) or ABSENT, *empty)
    mark = MARK if any(record.spec.id in outliers for record in best.records) else ""
    numbers = [
        text
        for metric in judged
        for text in (best.shown(metric), str(loss(best, reference, metric) or UNKNOWN))
    ]
    rivals: dict[bool | None, list[str]] = {True: [], False: [], None: []}
    for pool in tried:
        if pool is not best and isinstance(pool.cell(first), float):
            rivals[indistinguishable(best, pool, reference, first)].append(pool.label)
    equals = [", ".join(rivals[True])] if rivals[True] else []
    equals += [f"{UNKNOWN}: {', '.join(rivals[None])}"] if rivals[None] else []
    last = ["; ".join(equals) or ABSENT]
    if others:
        differing = filter(None, (_other_best(best, tried, reference, name) for name in others))
        last.append("; ".join(differing) or "the same")
    return (str(bits), best.label + mark, *numbers, *last)


def _best(tried: Sequence[Pool], metric: str) -> Pool | None:
    best: Pool | None = None
    for pool in tried:
        value = pool.cell(metric)
        if isinstance(value, float) and (
            best is None or is_better(value, float(best.cell(metric)), metric)
        ):
            best = pool
    return best


def _other_best(best: Pool, tried: Sequence[Pool], reference: Pool | None, metric: str) -> str:
    """Name the best method by another metric, if it is not `best` or equal to it."""
    other = _best(tried, metric)
    if other is None or other is best or other.cell(metric) == best.cell(metric):
        return ""
    chance = {True: " (not distinguishable)", None: f" ({UNKNOWN} whether by chance)", False: ""}
    same = (
        indistinguishable(best, other, reference, metric)
        if isinstance(best.cell(metric), float)
        else False
    )
    return f"{short(metric)}: {other.label}{chance[same]}"
