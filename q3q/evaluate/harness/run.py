"""Run lm-eval's tasks on a model and read its metrics and samples."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from q3q.errors import IntegrityError
from q3q.evaluate.batches import Choose, first_questions
from q3q.evaluate.catalogue import OWN_TASKS
from q3q.evaluate.chat import CHATS, PLAIN_CHAT, Chat
from q3q.evaluate.compare import share_interval
from q3q.evaluate.harness.lean import simple_evaluate
from q3q.evaluate.harness.lm import HarnessLM
from q3q.evaluate.harness.metrics import read_metrics, sample_rows, shares_of
from q3q.evaluate.harness.task_files import tasks_from
from q3q.evaluate.journal import SCORES, Journal
from q3q.evaluate.scoring import Effort
from q3q.models.decoder import Decoder
from q3q.reporter import Steps, no_steps


@dataclass(frozen=True)
class TaskScores:
    """The scores of some tasks.

    metrics: by `<task>/<metric>`
    intervals: 95 %, of metrics with a standard error or a number for each document, and of the
        share of unfinished thoughts
    results: lm-eval's own
    samples: for each task a row a document (and filter), see `metrics.sample_rows`
    without: by metric, why no document has a share in it
    effort: the cost in tokens
    """

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    results: dict[str, Any]
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    without: dict[str, str] = field(default_factory=dict)
    effort: Effort = field(default_factory=Effort)


def run_tasks(
    model: Decoder,
    tokenizer: Any,
    tasks: Sequence[str],
    *,
    limit: int | None,
    seed: int,
    choose: Choose | None = None,
    num_fewshot: int | None = None,
    include_path: str | Path | None = None,
    chat: Chat = CHATS[PLAIN_CHAT],
    max_gen_toks: int | None = None,
    max_length: int | None = None,
    journal: Path | None = None,
    identity: str = "",
    steps: Steps = no_steps,
) -> TaskScores:
    """Score lm-eval tasks through `lm_eval.simple_evaluate`.

    Args:
        limit: number of each task's first documents that are scored; None for all.
        choose: chooses the documents instead.
        num_fewshot, max_gen_toks: the task's own if None.
        include_path: a folder with the user's own task files.
        max_length: tokens of a window; the model's own if None.
        journal: folder of the scores so far. Scores in it are not computed again; others are added
            as batches end.
        identity: the scores' identity, see `Journal`.
        steps: receives the requests done and in all.

    Raises:
        IntegrityError: a score is not finite, a task is empty, or a document has no sample or more
            than one.
    """
    # Otherwise lm-eval's bootstrap forks this process with its model and threads.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    index = tasks_from(
        [OWN_TASKS, *([Path(include_path)] if include_path is not None else [])], tasks
    )
    stored = None if journal is None else Journal(journal / SCORES, identity)
    lm = HarnessLM(
        model,
        tokenizer,
        steps,
        max_length=max_length,
        journal=stored,
        chat=chat,
        max_gen_toks=max_gen_toks,
    )
    try:
        loaded = index.load(tasks)
        choose_all = choose or partial(first_questions, limit)
        documents = {task: list(choose_all(task, count)) for task, count in index.documents.items()}
        answer: Any = simple_evaluate(
            model=lm,
            tasks=list(tasks),
            limit=limit if choose is None else None,
            samples=None if choose is None else documents,
            num_fewshot=num_fewshot,
            task_manager=index,
            # Means have closed-form standard errors; 0 would switch those off too.
            bootstrap_iters=1000,
            log_samples=True,
            apply_chat_template=chat.template,
            system_instruction=chat.system,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    finally:
        if stored is not None:
            stored.close()
    check_samples(answer["samples"], documents)
    shares = shares_of(loaded["tasks"], loaded["groups"], answer["samples"], answer["results"])
    metrics, intervals = read_metrics(answer["results"], shares)
    for task, finished in lm.finished.items() if chat.thinks else ():
        share, name = finished.count(False) / len(finished), f"unfinished/{task}"
        metrics[name], intervals[name] = share, share_interval(share, len(finished))
    samples = {
        task: list(sample_rows(task, rows, shares)) for task, rows in answer["samples"].items()
    }
    results = {
        key: answer[key]
        for key in (
            "results",
            "n-samples",
            "versions",
            "configs",
            "group_subtasks",
            "higher_is_better",
        )
        if key in answer
    }
    return TaskScores(metrics, intervals, results, samples, shares.without, lm.scorer.effort)


def check_samples(
    samples: Mapping[str, Sequence[dict[str, Any]]], documents: Mapping[str, Sequence[int]]
) -> None:
    """Check that exactly the chosen documents of each task have a sample, one for each filter.

    Raises:
        IntegrityError: a sample is missing, doubled or of another document.
    """
    for task, chosen in documents.items():
        by_filter: dict[str, list[int]] = {}
        for sample in samples.get(task, ()):
            by_filter.setdefault(sample["filter"], []).append(sample["doc_id"])
        for name, scored in by_filter.items() or [("none", [])]:
            if sorted(scored) != sorted(chosen):
                raise IntegrityError(
                    f"{task} (filter {name}): {len(scored)} samples of {len(set(scored))} "
                    f"documents, there should be {len(chosen)}"
                )
