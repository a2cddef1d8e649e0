"""Mean accuracies: which trials may share one, and which tasks it averages."""

from collections.abc import Sequence

from q3q.evaluate.metrics import accuracy_metric, mean_metrics
from q3q.record import TrialRecord
from q3q.report.measures import has_mean

MOST_TASKS = 8  # named by a mean


def by_mean(records: Sequence[TrialRecord]) -> dict[str, list[TrialRecord]]:
    """Group the trials whose mean accuracy is over the same questions, by what the mean is over."""
    groups: dict[tuple[tuple[str, int | None], ...], list[TrialRecord]] = {}
    for record in records:
        spec = record.spec
        if has_mean(spec):
            limits = {
                accuracy_metric(spec, t.name): spec.evaluation.limit_of(t)
                for t in spec.evaluation.tasks
            }
            key = tuple(sorted((name, limits[name]) for name in mean_metrics(spec)))
            groups.setdefault(key, []).append(record)
    named: dict[str, list[TrialRecord]] = {}
    for key, group in groups.items():
        words = _mean_in_words(dict(key))
        named[words if words not in named else f"{words}, set {len(named) + 1}"] = group
    return dict(sorted(named.items()))


def _mean_in_words(limits: dict[str, int | None]) -> str:
    """Return `stories_who, stories_where (10 questions each)`, from each task's limit."""
    names = [name.removesuffix("/acc") for name in limits]
    shown = names if len(names) <= MOST_TASKS else [*names[: MOST_TASKS - 1], "…"]
    count = f"{len(names)} tasks: " if len(names) > MOST_TASKS else ""
    asked = dict.fromkeys(limits.values())
    number = " or ".join("all" if most is None else str(most) for most in asked)
    each = "" if [*asked] == [None] else f" ({number} questions each)"
    return f"{count}{', '.join(shown)}{each}"
