"""The documents of lm-eval's tasks: processed once, and read from a table many at a time.

lm-eval asks a task for its documents some six times, has the task's own code process them each time
(HellaSwag's takes a second), and reads them row by row. A row is a new object each time that it is
read, here as there, so no code sees what other code did to it.

It also asks for a document's target twice, for its metrics and for its sample.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from itertools import islice
from typing import Any

from datasets import Dataset
from lm_eval.api.task import ConfigurableTask, Task

ROWS = 1000  # read at a time


def read_quickly(task: Any) -> None:
    """Replace, on a loaded task object alone, the methods that give its documents."""
    for name in ("training_docs", "validation_docs", "test_docs"):
        setattr(task, name, _Once(getattr(task, name)))
    evaluated = task.test_docs if task.has_test_docs() else task.validation_docs
    evaluated.table = _table(getattr(task, "task_docs", None))  # made when the task was loaded
    if type(task).doc_iterator is Task.doc_iterator:
        task.doc_iterator = _Numbered(task)
    own = task.config.process_results
    if type(task).process_results is ConfigurableTask.process_results and not callable(own):
        task.doc_to_target = _LastTarget(task.doc_to_target)  # nothing changes it in between


class _Once:
    """A split's documents as a task's method returns them; it is called again unless a table is.

    Documents in a list would be the same objects again, changed by whoever asked before.
    """

    def __init__(self, documents: Callable[[], Any]) -> None:
        self._documents = documents
        self.table: Dataset | None = None

    def __call__(self) -> Any:
        if self.table is not None:
            return self.table
        documents = self._documents()
        self.table = _table(documents)
        return documents


class _Numbered:
    """lm-eval's `Task.doc_iterator` of one process."""

    def __init__(self, task: Any) -> None:
        self._task = task

    def __call__(
        self,
        *,
        rank: int = 0,
        limit: int | None = None,
        world_size: int = 1,
        samples: Sequence[int] | None = None,
    ) -> Iterator[tuple[int, Any]]:
        documents = _rows(self._task.eval_docs)
        if not samples:
            return islice(enumerate(documents), limit or None)
        chosen = set(samples)
        return enumerate(row for number, row in enumerate(documents) if number in chosen)


class _LastTarget:
    """A task's `doc_to_target`, which makes the target of the same object once."""

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make
        self._document: Any = None
        self._target: Any = None

    def __call__(self, doc: Any, *settings: Any, **named: Any) -> Any:
        if settings or named:
            return self._make(doc, *settings, **named)
        if doc is not self._document:
            self._target, self._document = self._make(doc), doc
        return deepcopy(self._target)


def _table(documents: Any) -> Dataset | None:
    plain = isinstance(documents, Dataset) and documents.format["type"] is None
    return documents if plain else None


def _rows(documents: Any) -> Iterator[Any]:
    if _table(documents) is None:
        yield from documents
        return
    names = documents.column_names
    for columns in documents.iter(ROWS):
        for values in zip(*(columns[name] for name in names), strict=True):
            yield dict(zip(names, values, strict=True))
