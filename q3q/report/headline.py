"""The answer in numbers, for people who see a study among others."""

from collections.abc import Sequence

from q3q.record import TrialRecord
from q3q.report.measures import is_better, is_perplexity, judged_metrics
from q3q.report.pools import Pool, comparable, pools

UNQUANTIZED = "unquantized"


def headline(records: Sequence[TrialRecord]) -> dict[str, float]:
    """Return the best value of each metric that methods are judged by, at each bit-width.

    Names are like `best at 4 bits/perplexity of stories`; where there are several models or
    evaluations, theirs comes first.
    """
    groups = comparable(records)
    found: dict[str, float] = {}
    for name, group in groups.items():
        start = f"{name}/" if len(groups) > 1 else ""
        for metric in judged_metrics(group):
            measure, _, text = metric.partition("/")
            words = f"{measure} of {text}" if is_perplexity(metric) else metric.replace("/", " ")
            for width, pool in _best(group, metric).items():
                place = f"best at {_bits(width)}" if width else UNQUANTIZED
                found[f"{start}{place}/{words}"] = float(pool.cell(metric))
    return found


def _best(records: Sequence[TrialRecord], metric: str) -> dict[int, Pool]:
    """Return the best pool of each bit-width; 0 stands for the unquantized model."""
    best: dict[int, Pool] = {}
    for pool in pools(records):
        width = 0 if pool.spec.scheme is None else pool.bits
        value = pool.cell(metric)
        if not isinstance(value, float):
            continue
        if width not in best or is_better(value, float(best[width].cell(metric)), metric):
            best[width] = pool
    return best


def _bits(width: int) -> str:
    return f"{width} bit" if width == 1 else f"{width} bits"
