"""How much of a difference is luck: spreads over seeds, over calibrations and over methods."""

import math
import statistics
from collections.abc import Sequence

from q3q.evaluation import is_accuracy
from q3q.formatting import fixed, significant
from q3q.record import TrialRecord
from q3q.report.measures import judged_metrics, title
from q3q.report.pools import Pool, comparable, pools
from q3q.report.tables import Table

NOTE = (
    "Standard deviations over seeds, within a method and calibration; over calibrations, within a "
    "method (each calibration counts by the mean of its seeds); and over methods (each counts by "
    "the mean of its calibrations). Last column: spread between methods divided by spread between "
    "seeds. Near 1, the ranking is noise."
)


def luck_tables(records: Sequence[TrialRecord]) -> list[Table]:
    """Return a table per model and metric, a row per bit width with a method of several seeds."""
    columns = ("bits", "over seeds", "over calibrations", "over methods", "methods / seeds")
    tables = []
    for name, group in comparable(records).items():
        tried = [pool for pool in pools(group) if not pool.is_reference]
        for metric in judged_metrics(group):
            rows = [_row(bits, tried, metric) for bits in sorted({pool.bits for pool in tried})]
            complete = tuple(row for row in rows if row is not None)
            if complete:
                heading = f"{name}: how much is luck, {title(metric)}"
                tables.append(Table(heading, columns, complete))
    return tables


def _row(bits: int, tried: Sequence[Pool], metric: str) -> tuple[str, ...] | None:
    """Return None where no method has several seeds at this bit width."""
    values = [
        (pool.spec.method.name, pool.values(metric))
        for pool in tried
        if pool.bits == bits and pool.values(metric)
    ]
    by_method: dict[str, list[float]] = {}
    for method, numbers in values:
        by_method.setdefault(method, []).append(statistics.fmean(numbers))
    seeds = _within([numbers for _, numbers in values])
    if seeds is None:
        return None
    calibrations = _within(list(by_method.values()))
    methods = _within([[statistics.fmean(means) for means in by_method.values()]])
    ratio = "-" if methods is None or seeds == 0 else fixed(methods / seeds, 1)
    size, unit = (100, " points") if is_accuracy(metric) else (1, "")
    spreads = (
        "-" if spread is None else significant(size * spread, 2) + unit
        for spread in (seeds, calibrations, methods)
    )
    return (str(bits), *spreads, ratio)


def _within(groups: Sequence[Sequence[float]]) -> float | None:
    """Return the pooled standard deviation within groups; None if every group has one value."""
    several = [group for group in groups if len(group) > 1]
    freedom = sum(len(group) - 1 for group in several)
    if not freedom:
        return None
    squares = math.fsum((len(group) - 1) * statistics.variance(group) for group in several)
    return math.sqrt(squares / freedom)
