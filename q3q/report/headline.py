"""The best value of each metric at each bit width, for lists of several studies."""

import math
from collections.abc import Sequence

from q3q.evaluation import is_perplexity
from q3q.formatting import plural
from q3q.record import TrialRecord
from q3q.report.budgets import best_of
from q3q.report.measures import judged_metrics
from q3q.report.pools import comparable, pools

UNQUANTIZED = "unquantized"


def headline(records: Sequence[TrialRecord]) -> dict[str, float]:
    """Return the best value of each metric that methods are judged by, at each bit-width.

    Names are like `best at 4 bits/perplexity of stories`; where there are several models or
    evaluations, theirs comes first.
    """
    groups = comparable(records)
    best_values: dict[str, float] = {}
    for name, group in groups.items():
        start = f"{name}/" if len(groups) > 1 else ""
        for metric in judged_metrics(group):
            measure, _, text = metric.partition("/")
            words = f"{measure} of {text}" if is_perplexity(metric) else metric.replace("/", " ")
            tried = [pool for pool in pools(group) if isinstance(pool.cell(metric), float)]
            places = [
                f"best at {plural(p.bits, 'bit')}" if p.spec.scheme else UNQUANTIZED for p in tried
            ]
            for place in dict.fromkeys(places):
                own = [pool for pool, other in zip(tried, places, strict=True) if other == place]
                best = best_of(own, metric)
                best_values[f"{start}{place}/{words}"] = (
                    float(best.cell(metric)) if best else math.nan
                )
    return best_values
