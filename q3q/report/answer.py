"""The answer first: for each model and bit width the best method, what it loses, and what cannot be told apart.

Only trials of the same weights that were evaluated alike are compared, and a method that was tried with several seeds
counts by its mean. A loss is measured against the unquantized model on the same questions and windows, and so is one
method against another: what makes a question hard is hard for both, and cancels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from q3q.record import Comparison, TrialRecord
from q3q.report.measures import (
    ABSENT,
    DIVERGED,
    FAILED,
    headline_metrics,
    interval,
    is_better,
    is_perplexity,
    judged_metrics,
    short,
)
from q3q.report.pairs import difference, stratified, told_by_seeds
from q3q.report.pools import Pool, comparable, pools
from q3q.report.tables import MARK, MARKED, Table, other_versions
from q3q.spec import MEAN_ACCURACY, mean_metrics

RULE = (
    "Losses are against the unquantized model, with 95 % intervals of paired differences where a trial has them. Two "
    "methods are not distinguishable where a paired test on the same windows and questions does not tell them apart "
    "(p < 0.05), or, tried with several seeds, the spread over seeds explains their difference (Welch's test). "
    "A single seed does not say how much of a difference is luck of the calibration text. Unknown: the samples that a "
    "paired test needs are not there."
)
UNKNOWN = "unknown"
DECIMALS = (1, 4)  # of a loss, the fewest and the most


@dataclass(frozen=True)
class Loss:
    """What was lost on one metric against the unquantized model.

    value: of a perplexity the ratio less one, of an accuracy the difference (negative is worse). low, high: its 95 %
    interval, None without a paired comparison. distinguishable: from no loss at all; None if unknown.
    """

    metric: str
    value: float
    low: float | None = None
    high: float | None = None
    distinguishable: bool | None = None

    def __str__(self) -> str:
        """To two digits of the interval's reach: `+20.0 % [+10.0, +30.0]`, `-0.25 points`; a ratio from 10 on."""
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
    """A table per model, and for each way that it was evaluated: a row per bit width."""
    strangers = other_versions(records)
    tables = [_answer(name, mine, strangers) for name, mine in comparable(records).items()]
    return [table for table in tables if table]


def loss(pool: Pool, reference: Pool | None, metric: str) -> Loss | None:
    """None where one of the two has no number, or there is no reference."""
    ours = pool.cell(metric)
    if not isinstance(ours, float):
        return None
    found = _recorded(pool, metric)
    if found is None and reference is not None:
        found = difference(pool, reference, metric)
    if found is not None and found.difference is not None:
        value, low, high = (
            None if one is None else math.expm1(one) if is_perplexity(metric) else one
            for one in (found.difference, found.low, found.high)
        )
        assert value is not None
        return Loss(metric, value, low, high, found.distinguishable)
    theirs = None if reference is None else reference.cell(metric)
    if not isinstance(theirs, float):
        return None
    return Loss(metric, ours / theirs - 1 if is_perplexity(metric) else ours - theirs)


def alike(one: Pool, other: Pool, reference: Pool | None, metric: str) -> bool | None:
    """Whether two of the things tried cannot be told apart on a metric, by the rule above; None if that is unknown.

    Without samples, intervals that do not overlap still tell them apart: what the two have in common only makes a
    paired test's interval narrower. Of intervals that overlap nothing follows.
    """
    if one.cell(metric) == other.cell(metric):
        return True
    if told_by_seeds(one, other, metric) is False:
        return True
    found = difference(one, other, metric)
    if found is not None:
        return not found.distinguishable
    for bounds in zip(*(_bounds(pool, reference, metric) for pool in (one, other)), strict=True):
        if bounds[0] is not None and bounds[1] is not None:
            return False if bounds[0][0] > bounds[1][1] or bounds[1][0] > bounds[0][1] else None
    return None


def _bounds(pool: Pool, reference: Pool | None, metric: str) -> list[tuple[float, float] | None]:
    """The intervals of its loss, and of its metric."""
    lost = loss(pool, reference, metric)
    of_loss = (
        None if lost is None or lost.low is None or lost.high is None else (lost.low, lost.high)
    )
    return [of_loss, interval(pool.records[0], metric) if len(pool.records) == 1 else None]


def _recorded(pool: Pool, metric: str) -> Comparison | None:
    """The comparison with the unquantized model that a single trial's record holds."""
    if len(pool.records) > 1:
        return None
    known = pool.records[0].comparisons
    if metric != MEAN_ACCURACY:
        return known.get(metric)
    names = mean_metrics(pool.spec)
    return (
        stratified([known[name] for name in names])
        if all(name in known for name in names)
        else None
    )


def _answer(name: str, records: Sequence[TrialRecord], strangers: frozenset[str]) -> Table | None:
    judged = judged_metrics(records)
    if not judged or not headline_metrics(records):
        return None
    everything = pools(records)
    reference = next(
        (pool for pool in everything if pool.spec.scheme is None and pool.records[0].completed),
        None,
    )
    tried = [pool for pool in everything if pool.spec.scheme is not None]
    rows = tuple(
        _row(bits, [pool for pool in tried if pool.bits == bits], reference, judged, strangers)
        for bits in sorted({pool.bits for pool in tried})
    )
    if not rows:
        return None
    heads = [text for metric in judged for text in (short(metric), "loss")]
    by = f" by {short(judged[0])}" if len(judged) > 1 else ""
    last = [
        "not distinguishable from the best",
        *(["best by the others"] if len(judged) > 1 else []),
    ]
    note = MARKED if any(MARK in row[1] for row in rows) else ""
    return Table(name, ("bits", f"best method{by}", *heads, *last), rows, note)


def _row(
    bits: int,
    mine: Sequence[Pool],
    reference: Pool | None,
    judged: Sequence[str],
    strangers: frozenset[str],
) -> tuple[str, ...]:
    first, *others = judged
    best = _best(mine, first)
    if best is None:
        words = {pool.cell(first) for pool in mine} & {DIVERGED, FAILED}
        left = 2 * len(judged) + (1 if others else 0)
        return (str(bits), ABSENT, " or ".join(sorted(map(str, words))) or ABSENT, *[ABSENT] * left)
    mark = MARK if any(record.spec.id in strangers for record in best.records) else ""
    numbers = [
        text
        for metric in judged
        for text in (best.shown(metric), str(loss(best, reference, metric) or UNKNOWN))
    ]
    found: dict[bool | None, list[str]] = {}
    for pool in mine:
        if pool is not best and isinstance(pool.cell(first), float):
            found.setdefault(alike(best, pool, reference, first), []).append(pool.label)
    told = [", ".join(found[True])] if True in found else []
    told += [f"{UNKNOWN}: {', '.join(found[None])}"] if None in found else []
    last = ["; ".join(told) or ABSENT]
    if others:
        last.append(
            "; ".join(filter(None, (_otherwise(best, mine, reference, one) for one in others)))
            or "the same"
        )
    return (str(bits), best.label + mark, *numbers, *last)


def _best(mine: Sequence[Pool], metric: str) -> Pool | None:
    best: Pool | None = None
    for pool in mine:
        value = pool.cell(metric)
        if isinstance(value, float) and (
            best is None or is_better(value, float(best.cell(metric)), metric)
        ):
            best = pool
    return best


def _otherwise(best: Pool, mine: Sequence[Pool], reference: Pool | None, metric: str) -> str:
    """The method that is best by another metric, and whether that is more than chance; nothing if it is the same."""
    other = _best(mine, metric)
    if other is None or other is best or other.cell(metric) == best.cell(metric):
        return ""
    chance = {True: " (not distinguishable)", None: f" ({UNKNOWN} whether by chance)", False: ""}
    same = alike(best, other, reference, metric) if isinstance(best.cell(metric), float) else False
    return f"{short(metric)}: {other.label}{chance[same]}"
