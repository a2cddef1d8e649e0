"""Titles, captions and file names of plots."""

import re
from collections.abc import Sequence

from q3q.evaluation import is_perplexity
from q3q.report.measures import DIVERGED, FAILED
from q3q.report.pools import Pool
from q3q.spec import MEAN_ACCURACY

MOST_NAMED = 12  # trials in a caption


def metric_title(metric: str) -> str:
    if metric == MEAN_ACCURACY:
        return "Mean accuracy of the tasks, %"
    if is_perplexity(metric):
        return f"Perplexity of {metric.partition('/')[2]}"
    return f"Accuracy on {metric.removesuffix('/acc')}, %"


def not_shown(left_out: Sequence[tuple[Pool, str]], metric: str, *, models: bool = False) -> str:
    """Return a sentence that names the trials without a point, and why each has none.

    Args:
        left_out: each with its reason, which counts where the trial neither failed nor diverged.
    """
    reasons = {DIVERGED: "diverged", FAILED: "failed"}
    texts = [
        f"{pool.spec.name if pool.spec.scheme else pool.label}"
        f"{f' · {pool.spec.model.label}' if models else ''} "
        f"({reasons.get(str(pool.cell(metric))) or reason or 'not measured'})"
        for pool, reason in left_out
    ]
    more = f" and {len(texts) - MOST_NAMED} more" if len(texts) > MOST_NAMED else ""
    return f"Not shown: {', '.join(texts[:MOST_NAMED])}{more}." if texts else ""


def slug(name: str) -> str:
    return re.sub(r"[^\w]+", "-", name)
