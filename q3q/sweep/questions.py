"""Say before a study what its questions can show."""

from collections.abc import Iterable

from q3q.evaluate.metrics import accuracy_metric, mean_metrics, measures_text
from q3q.evaluate.power import DISCORDANCE, POWER, effective_questions, smallest_difference
from q3q.formatting import percent, plural
from q3q.spec import TrialSpec
from q3q.sweep.costs import questions_of


def shown_by_questions(specs: Iterable[TrialSpec]) -> list[str]:
    """Return a line for each set of questions: the smallest difference that it finds.

    Trials without a task, and the unquantized model alone, have none.
    """
    lines: dict[str, None] = {}
    for spec in specs:
        in_mean = mean_metrics(spec)
        counts = [
            questions_of(task, spec.evaluation)
            for task in spec.evaluation.tasks
            if accuracy_metric(spec, task.name) in in_mean and not measures_text(task.name)
        ]
        if spec.scheme is not None and counts and min(counts) > 0:
            lines[_line(counts)] = None
    return list(lines)


def _line(counts: list[int]) -> str:
    asked = plural(sum(counts), "question") + (f" of {len(counts)} tasks" if counts[1:] else "")
    found = smallest_difference(effective_questions(counts), DISCORDANCE)
    assumed = f"if two trials answer {percent(DISCORDANCE, 0)} % differently (docs/STATISTICS.md)"
    if found is None:
        return f"{asked}: too few to find any difference in accuracy, {assumed}."
    where = "the mean accuracy" if counts[1:] else "accuracy"
    return (
        f"{asked}: a difference of {percent(found)} points in {where} is found in "
        f"{percent(POWER, 0)} % of studies, {assumed}."
    )
