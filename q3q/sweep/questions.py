"""Say before a study what its questions can show."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from q3q.evaluate.identities import conditions_of
from q3q.evaluate.metrics import accuracy_metric, mean_metrics, measures_text
from q3q.evaluate.power import (
    DISCORDANCE,
    LEVEL,
    POWER,
    effective_questions,
    smallest_difference,
)
from q3q.formatting import percent, plural
from q3q.spec import TrialSpec
from q3q.sweep.costs import questions_of


def shown_by_questions(specs: Iterable[TrialSpec]) -> list[str]:
    """Return a line for each set of questions: the smallest difference that it finds.

    Trials without a task, and the unquantized model alone, have none.
    """
    choices: dict[str, dict[str, TrialSpec]] = {}
    for spec in specs:
        if not spec.rounds_nothing and spec.reference is None:
            # As the report has them: compared in these groups, where seeds are one choice.
            choices.setdefault(conditions_of(spec), {})[replace(spec, seed=0).id] = spec
    lines: dict[str, None] = {}
    for group in choices.values():
        spec = next(iter(group.values()))
        in_mean = mean_metrics(spec)
        counts = [
            questions_of(task, spec.evaluation)
            for task in spec.evaluation.tasks
            if accuracy_metric(spec, task.name) in in_mean and not measures_text(task.name)
        ]
        if counts and min(counts) > 0:
            lines[_line(counts, len(group))] = None
    return list(lines)


def _line(counts: Sequence[int], changes: int) -> str:
    """Say what so many questions of each task show, alone and among the study's changes."""
    asked = plural(sum(counts), "question") + (f" of {len(counts)} tasks" if counts[1:] else "")
    questions = effective_questions(counts)
    alone = smallest_difference(questions, DISCORDANCE)
    among = smallest_difference(questions, DISCORDANCE, level=LEVEL / changes)
    assumed = f"if two trials answer {percent(DISCORDANCE, 0)} % differently (docs/STATISTICS.md)"
    if alone is None:
        return f"{asked}: too few to find any difference in accuracy, {assumed}."
    where = "the mean accuracy" if counts[1:] else "accuracy"
    corrected = ""
    if changes > 1:
        least = "none at all" if among is None else f"one of {percent(among)} points"
        corrected = (
            f", and {least} where the report corrects for all {changes} changes from the "
            "unquantized model"
        )
    return (
        f"{asked}: a difference of {percent(alone)} points in {where} is found in "
        f"{percent(POWER, 0)} % of studies that test it alone{corrected}, {assumed}."
    )
