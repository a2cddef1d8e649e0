"""Score a batch of an evaluation's tasks, by lm-eval or by the study's script."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from q3q.data.questions import Library, serving
from q3q.evaluate.batches import Batch, Part, first_questions, random_questions
from q3q.evaluate.catalogue import STUDY_MMLU
from q3q.evaluate.chat import CHATS, PLAIN_CHAT
from q3q.evaluate.metrics import task_metric
from q3q.evaluate.mmlu_paper import score_study_mmlu
from q3q.evaluate.weighted import weighted_intervals, weighted_losses
from q3q.reporter import Steps
from q3q.spec import Evaluation, Json

if TYPE_CHECKING:
    from q3q.models.decoder import Decoder

# Columns of a sample beside its task, its groups and its scores.
COLUMNS = (
    "doc_id",
    "doc_hash",
    "prompt_hash",
    "filter",
    "target",
    "log_likelihood",
    "greedy",
    "text",
)


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
) -> Part:
    """Score a batch of tasks; its metrics have the record's names (see `task_metric`).

    Args:
        include: a folder with task files.
        journal: folder of the scores so far.
        identity: the model's, and of all that was done to it.

    Raises:
        IntegrityError: a score is not finite, or a task is empty or has another number of samples
            than documents.
    """
    quick = evaluation.quick
    if batch.tasks == (STUDY_MMLU,):
        choose = partial(random_questions if quick else first_questions, batch.limit)
        part = score_study_mmlu(
            model, tokenizer, library, choose, journal=journal, identity=identity, steps=steps
        )
    else:
        from q3q.evaluate.harness.run import run_tasks  # lm-eval takes seconds to import

        with serving(lambda data, options: library.load(data, **options)):
            scores = run_tasks(
                model,
                tokenizer,
                batch.tasks,
                limit=batch.limit,
                choose=partial(random_questions, batch.limit) if quick else None,
                num_fewshot=batch.shots,
                max_gen_toks=evaluation.max_gen_toks,
                seed=seed,
                include_path=include,
                chat=CHATS[evaluation.chat or PLAIN_CHAT],
                journal=journal,
                identity=identity,
                steps=steps,
            )
        part = Part(scores.metrics, scores.intervals)
        part.results["+".join(batch.tasks)] = {
            **_as_json(scores.results),
            "effort": asdict(scores.effort),
        }
        _add_samples(part, scores.samples, scores.results.get("group_subtasks", {}))
    part.metrics = {task_metric(name, quick): value for name, value in part.metrics.items()}
    part.intervals = {task_metric(name, quick): value for name, value in part.intervals.items()}
    return part


def _add_samples(
    part: Part, samples: Mapping[str, Sequence[Json]], members: Mapping[str, Sequence[str]]
) -> None:
    """Add lm-eval's samples to a part, and the intervals that lm-eval lacks.

    members: tasks and groups of each group
    """
    leaves = {group: _leaves(group, members) for group in members}
    for task, rows in samples.items():
        groups = [group for group, tasks in leaves.items() if task in tasks and task != group]
        weighted = weighted_losses(rows)
        part.intervals |= weighted_intervals(task, weighted)
        for number, row in enumerate(rows):
            contributions = {name: losses[number] for name, losses in weighted.items()}
            part.samples.append(_sample(task, groups, row, contributions))


def _leaves(group: str, members: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the tasks of a group and of its groups."""
    if not members.get(group):
        return [group]
    return [leaf for member in members[group] for leaf in _leaves(member, members)]


def _sample(task: str, groups: Sequence[str], row: Json, weighted: dict[str, float]) -> Json:
    """Return one of lm-eval's samples as `samples.py` stores it.

    Its scores are the metrics that are numbers, and its `weighted_losses`.
    """
    scores = {
        name: float(value)
        for name, value in row.items()
        if name not in COLUMNS and isinstance(value, (int, float, bool))
    } | weighted
    suffix = "" if row["filter"] == "none" else f"/{row['filter']}"
    return {
        "task": task,
        "groups": groups,
        **{name: row.get(name) for name in COLUMNS},
        "target": None if row.get("target") is None else str(row["target"]),
        "scores": {name + suffix: value for name, value in scores.items()},
    }


def _as_json(value: Any) -> Any:
    """Return the value in JSON's own types: lm-eval's results hold functions and arrays."""
    if isinstance(value, dict):
        return {str(key): _as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(item) for item in value]
    if value is None or isinstance(value, (str, int, bool)):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    return str(getattr(value, "__name__", value))
