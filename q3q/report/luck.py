"""How much of a difference is luck: what moves when only the seed does, or only the calibration, beside the methods."""

import math
import statistics
from collections.abc import Sequence

from q3q.record import TrialRecord
from q3q.report.measures import is_accuracy, judged_metrics, title
from q3q.report.pools import Pool, comparable, pools, shown_spread
from q3q.report.tables import Table

NOTE = (
    "Standard deviations: over seeds within one method and calibration; over calibrations, each by the mean of its "
    "seeds, within one method; over methods, each by the mean of its calibrations. The last column says how many times "
    "the seeds' spread that of the methods is: where it is near 1, which method is best is luck."
)


def luck_tables(records: Sequence[TrialRecord]) -> list[Table]:
    """For each model and metric a row per bit width; nothing where no method was tried with several seeds."""
    tables = []
    for name, mine in comparable(records).items():
        tried = [pool for pool in pools(mine) if pool.spec.scheme is not None]
        for metric in judged_metrics(mine):
            rows = [_row(bits, tried, metric) for bits in sorted({pool.bits for pool in tried})]
            found = tuple(row for row in rows if row is not None)
            if found:
                columns = (
                    "bits",
                    "over seeds",
                    "over calibrations",
                    "over methods",
                    "methods / seeds",
                )
                tables.append(Table(f"{name}: how much is luck, {title(metric)}", columns, found))
    return tables


def _row(bits: int, tried: Sequence[Pool], metric: str) -> tuple[str, ...] | None:
    """None where no method was tried with several seeds at this width."""
    mine = [pool for pool in tried if pool.bits == bits and pool.values(metric)]
    by_method: dict[str, list[float]] = {}
    for pool in mine:
        by_method.setdefault(str(pool.spec.method["name"]), []).append(
            statistics.fmean(pool.values(metric))
        )
    seeds = _within([pool.values(metric) for pool in mine])
    if seeds is None:
        return None
    calibrations = _within(list(by_method.values()))
    methods = _within([[statistics.fmean(means) for means in by_method.values()]])
    ratio = "-" if methods is None or seeds == 0 else f"{methods / seeds:.1f}"
    return (
        str(bits),
        *("-" if one is None else _told(one, metric) for one in (seeds, calibrations, methods)),
        ratio,
    )


def _within(groups: Sequence[Sequence[float]]) -> float | None:
    """The standard deviation within groups, pooled; None if each has one value."""
    several = [group for group in groups if len(group) > 1]
    freedom = sum(len(group) - 1 for group in several)
    return (
        math.sqrt(math.fsum((len(g) - 1) * statistics.variance(g) for g in several) / freedom)
        if freedom
        else None
    )


def _told(spread: float, metric: str) -> str:
    return shown_spread(spread, metric) + (" points" if is_accuracy(metric) else "")
