"""An evaluation's parts: which tasks are scored together, on which questions, and the results."""

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field

from q3q.evaluate.catalogue import STUDY_MMLU, TASKS
from q3q.spec import QUICK_SEED, Evaluation, Json, TaskRef

# Receives a task's name and its number of questions; returns the chosen numbers, ascending.
Choose = Callable[[str, int], Sequence[int]]


@dataclass
class Part:
    """The results of one part of an evaluation.

    samples: rows as `samples.py` stores them
    results: lm-eval's own, plain JSON
    """

    metrics: dict[str, float] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    results: Json = field(default_factory=dict)
    samples: list[Json] = field(default_factory=list)

    def to_json(self) -> Json:
        return asdict(self)


@dataclass(frozen=True)
class Batch:
    """Tasks that are scored in one run of lm-eval.

    shots: examples in the prompt; None for the tasks' own number
    limit: most questions of a task; None for all
    """

    tasks: tuple[str, ...]
    shots: int | None
    limit: int | None


def batches(evaluation: Evaluation) -> list[Batch]:
    """Group tasks with equal settings, in the order of each group's first task."""
    groups: dict[tuple[bool, int | None, int | None], list[str]] = {}
    for task in evaluation.tasks:
        key = (task.name == STUDY_MMLU, task.shots, evaluation.limit_of(task))
        groups.setdefault(key, []).append(task.name)
    return [Batch(tuple(tasks), shots, limit) for (_, shots, limit), tasks in groups.items()]


def draws_shots(tasks: Iterable[TaskRef]) -> bool:
    """Return True if a seed decides which examples some task shows."""
    return any(
        task.name not in TASKS or (not TASKS[task.name].first_examples and (task.shots or 0) > 0)
        for task in tasks
    )


def first_questions(limit: int | None, task: str, count: int) -> Sequence[int]:
    """Return the numbers of the first questions."""
    return range(count if limit is None else min(count, limit))


def random_questions(limit: int | None, task: str, count: int) -> Sequence[int]:
    """Return the numbers of a random choice of questions, always the same one for a task."""
    if limit is None or count <= limit:
        return range(count)
    return sorted(random.Random(f"{QUICK_SEED} {task}").sample(range(count), limit))
