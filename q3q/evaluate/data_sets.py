"""Resolve the tasks' data sets before a sweep starts, and refuse tasks that no trial could run."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from q3q.data.questions import Library, serving
from q3q.data.repositories import DataSet
from q3q.errors import ConfigError
from q3q.evaluate.catalogue import OWN_TASKS, TASKS

if TYPE_CHECKING:
    from datasets import DatasetDict


def resolve_data_sets(
    tasks: Sequence[str],
    library: Library,
    *,
    shots: Mapping[str, int] = MappingProxyType({}),
    limits: Mapping[str, int | None] = MappingProxyType({}),
    include: Path | None = None,
    most: int | None = None,
    window: int = sys.maxsize,
    downloads: bool = True,
) -> list[str]:
    """Identify every data set of the tasks, and refuse tasks that no trial could run.

    lm-eval loads tasks that are not in the catalogue, to find their data sets; no task of the
    catalogue generates text.

    Args:
        shots: examples in the prompt, by task.
        limits: most questions, by task.
        most: tokens of a generated text; None for the task's own number.
        window: the model's window in tokens.
        downloads: download the study's data sets that are not here, and look at them; else take
            the Hub's word for them.

    Returns:
        The tasks (of groups, their tasks) that have the model generate text.

    Raises:
        ConfigError: a data set is unavailable or incomplete, a task cannot be loaded or run with
            these settings, or two of them have a task in common.
        IntegrityError: a task has no documents.
    """
    for task in tasks:
        if task in TASKS:
            _identify(task, library, shots.get(task, 0), limits.get(task), downloads)
    others = [task for task in tasks if task not in TASKS]
    if not others:
        return []
    from q3q.evaluate.harness.sources import source_files
    from q3q.evaluate.harness.task_files import examine, tasks_from

    def load(data: DataSet, options: dict[str, Any]) -> "DatasetDict":
        library.identify(data, **options)
        return library.load(data, **options)

    if include is not None:
        library.files.pin(sorted(source_files(include)))
    with serving(library, load):
        index = tasks_from([OWN_TASKS, *([include] if include else [])], others)
        output_types = examine(index, others, shots, most, window)
    library.files.not_pinned |= {
        f"the data of {name}, which its own code loads," for name in index.loading_by_themselves
    }
    known = {task: TASKS[task].subtasks or [task] for task in tasks if task in TASKS}
    _refuse_overlaps({task: known.get(task) or output_types[task] for task in tasks})
    return [
        name
        for subtasks in output_types.values()
        for name, output_type in subtasks.items()
        if output_type == "generate_until"
    ]


def _identify(name: str, library: Library, shots: int, limit: int | None, downloads: bool) -> None:
    """Identify the data sets of a task of the catalogue.

    Raises:
        ConfigError: one of them has too few examples, more questions than the official data set, or
            fewer and the limit does not say so.
    """
    task = TASKS[name]
    if shots and task.examples_split is None:
        raise ConfigError(
            f"{name} has no examples, and cannot show {shots}; name others in evaluation.shots"
        )
    for data, official in zip(task.data, task.questions, strict=False):
        if not downloads and not library.is_here(data):
            library.assume(data)
            continue
        split, source = data.splits[0], task.examples_split
        needed = (split, source) if source and (shots or source in data.splits) else (split,)
        library.identify(replace(data, splits=needed))
        rows, where = library.load(data), library.where(data)
        if source and shots and shots > (examples := len(rows[source])):
            raise ConfigError(
                f"{name} is to show {shots} examples, and {where} has {examples} in {source}"
            )
        count = len(rows[split])
        if count > official or (count < official and (limit is None or count < limit)):
            less = f"all of them, or say evaluation.limits={{{name}:{count}}}"
            remedy = "these alone" if count > official else less
            raise ConfigError(
                f"{name}: {where} has {count} rows of the split {split}, and {official} are its "
                f"questions: give {remedy}"
            )


def _refuse_overlaps(subtasks: Mapping[str, Iterable[str]]) -> None:
    owner: dict[str, str] = {}
    for task, names in subtasks.items():
        for name in names:
            if owner.setdefault(name, task) != task:
                raise ConfigError(
                    f"evaluation.tasks: {name} is in both {owner[name]} and {task}; leave one of "
                    "them out"
                )
