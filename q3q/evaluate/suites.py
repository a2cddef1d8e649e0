"""Score a batch of an evaluation's tasks, by lm-eval or by the study's script."""

import gc
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from q3q.data.prepared import Shelf
from q3q.data.questions import Library, serving
from q3q.evaluate.batches import Batch, Part, first_questions, random_questions
from q3q.evaluate.catalogue import STUDY_MMLU
from q3q.evaluate.chat import CHATS, PLAIN_CHAT
from q3q.evaluate.identities import requests_identity
from q3q.evaluate.metrics import task_metric
from q3q.evaluate.mmlu_paper import Questions, score_study_mmlu, study_questions
from q3q.reporter import Steps
from q3q.spec import Evaluation, Json

if TYPE_CHECKING:
    from q3q.evaluate.harness.run import Asked
    from q3q.models.decoder import Decoder
    from q3q.models.facts import ModelFacts

NEW_OBJECTS = 200_000  # after which garbage is looked for while requests and samples are made


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Look for garbage in circles rarely while hundreds of thousands of requests are made."""
    before = gc.get_threshold()
    gc.set_threshold(NEW_OBJECTS, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


@_rare_collections()
def score_batch(
    model: "Decoder",
    tokenizer: Any,
    evaluation: Evaluation,
    batch: Batch,
    library: Library,
    *,
    include: Path | None,
    seed: int,
    journal: Path,
    identity: str,
    steps: Steps,
    shelf: Shelf | None = None,
) -> Part:
    """Score a batch of tasks; its metrics have the record's names (see `task_metric`).

    Args:
        journal: folder of the scores so far.
        identity: the model's, and of all that was done to it.
        shelf: where encoded requests are kept; None to build them anew.

    Raises:
        IntegrityError: a score is not finite, or a task is empty or has another number of samples
            than documents.
    """
    quick = evaluation.quick
    if batch.tasks == (STUDY_MMLU,):
        wait = partial(steps, 0, 1)
        questions = _study_questions(tokenizer, evaluation, batch, library, seed, shelf, wait)
        part = score_study_mmlu(model, questions, journal=journal, identity=identity, steps=steps)
    else:
        from q3q.evaluate.harness.run import run_tasks  # lm-eval takes seconds to import

        with serving(library, lambda data, options: library.load(data, **options)):
            scores = run_tasks(
                model,
                tokenizer,
                _asked(evaluation, batch, library, include, seed, shelf),
                max_gen_toks=evaluation.max_gen_toks,
                journal=journal,
                identity=identity,
                steps=steps,
            )
        part = Part(scores.metrics, scores.intervals)
        not_pinned = library.files.not_pinned
        part.results["+".join(batch.tasks)] = {
            **_as_json(scores.results),
            "effort": asdict(scores.effort),
            **({"not_by_document": scores.without} if scores.without else {}),
            **({"not_pinned": sorted(not_pinned)} if not_pinned else {}),
        }
        _add_samples(part, scores.samples, scores.results.get("group_subtasks", {}))
    part.metrics = {task_metric(name, quick): value for name, value in part.metrics.items()}
    part.intervals = {task_metric(name, quick): value for name, value in part.intervals.items()}
    return part


@_rare_collections()
def prepare_batch(
    facts: "ModelFacts",
    tokenizer: Any,
    evaluation: Evaluation,
    batch: Batch,
    library: Library,
    *,
    include: Path | None,
    seed: int,
    shelf: Shelf,
    wait: Callable[[], object],
) -> None:
    """Put on the shelf what `score_batch` will take from there, unless it is there.

    Args:
        facts: the model's, which need not be loaded.
        wait: called at every poll while another process makes it; may raise to stop waiting.
    """
    if batch.tasks == (STUDY_MMLU,):
        _study_questions(tokenizer, evaluation, batch, library, seed, shelf, wait)
        return
    from q3q.evaluate.harness.run import prepare_tasks

    asked = _asked(evaluation, batch, library, include, seed, shelf)
    with serving(library, lambda data, options: library.load(data, **options)):
        prepare_tasks(facts, tokenizer, asked, wait)


def _study_questions(
    tokenizer: Any,
    evaluation: Evaluation,
    batch: Batch,
    library: Library,
    seed: int,
    shelf: Shelf | None,
    wait: Callable[[], object],
) -> Questions:
    choose = partial(random_questions if evaluation.quick else first_questions, batch.limit)
    identity = requests_identity(evaluation, batch, seed)
    return study_questions(tokenizer, library, choose, shelf, identity, wait)


def _asked(
    evaluation: Evaluation,
    batch: Batch,
    library: Library,
    include: Path | None,
    seed: int,
    shelf: Shelf | None,
) -> "Asked":
    """Return what lm-eval is to ask."""
    from q3q.evaluate.harness.run import Asked, Keeping

    identity, keeping = requests_identity(evaluation, batch, seed), None
    if shelf is not None:
        keeping = Keeping(shelf, identity, lambda: not library.files.not_pinned)
    return Asked(
        tasks=batch.tasks,
        limit=batch.limit,
        choose=partial(random_questions, batch.limit) if evaluation.quick else None,
        num_fewshot=batch.shots,
        seed=seed,
        include_path=include,
        chat=CHATS[evaluation.chat or PLAIN_CHAT],
        keeping=keeping,
    )


def _add_samples(
    part: Part, samples: Mapping[str, Sequence[Json]], members: Mapping[str, Sequence[str]]
) -> None:
    """Add lm-eval's samples to a part.

    members: tasks and groups of each group
    """
    leaves = {group: _leaves(group, members) for group in members}
    for task, rows in samples.items():
        groups = [group for group, tasks in leaves.items() if task in tasks and task != group]
        part.samples += [_sample(task, groups, row) for row in rows]


def _leaves(group: str, members: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the tasks of a group and of its groups."""
    if not members.get(group):
        return [group]
    return [leaf for member in members[group] for leaf in _leaves(member, members)]


def _sample(task: str, groups: Sequence[str], row: Json) -> Json:
    """Return one of lm-eval's samples as `samples.py` stores it."""
    return {
        "task": task,
        "groups": groups,
        **row,
        "target": None if row["target"] is None else str(row["target"]),
        "values": {
            name: json.dumps(_as_json(value, finite=False)) for name, value in row["values"].items()
        },
    }


def _as_json(value: Any, *, finite: bool = True) -> Any:
    """Return the value in JSON's own types: lm-eval's results hold functions and arrays.

    finite: write numbers that are not finite as text.
    """
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): _as_json(item, finite=finite) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(item, finite=finite) for item in value]
    if value is None or isinstance(value, (str, int, bool)):
        return value
    if isinstance(value, float) and (math.isfinite(value) or not finite):
        return value
    return str(getattr(value, "__name__", value))
