"""Run lm-eval's tasks on a model and read its metrics and samples."""

import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval import simple_evaluate

from q3q.errors import IntegrityError
from q3q.evaluate.catalogue import OWN_TASKS, Chat, Choose, Tell
from q3q.evaluate.compare import share_interval
from q3q.evaluate.harness.lm import HarnessLM
from q3q.evaluate.harness.task_files import tasks_from
from q3q.evaluate.journal import SCORES, Journal
from q3q.evaluate.perplexity import NORMAL_95
from q3q.evaluate.scoring import Effort
from q3q.models.decoder import Decoder


@dataclass(frozen=True)
class TaskScores:
    """metrics by `<task>/<metric>`, their 95 % intervals where lm-eval gives a standard error (and of unfinished
    thoughts), and its own results.

    samples: for each task a row a document (and filter), see `sample_row`. effort: what it cost, in tokens.
    """

    metrics: dict[str, float]
    intervals: dict[str, tuple[float, float]]
    results: dict[str, Any]
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
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
    chat: Chat = Chat(),
    max_gen_toks: int | None = None,
    max_length: int | None = None,
    journal: Path | None = None,
    identity: str = "",
    progress: Tell = lambda done, total: None,
) -> TaskScores:
    """Score lm-eval tasks through `lm_eval.simple_evaluate`.

    Args:
        limit: the first documents of each task, all if None. choose: instead, which ones (their numbers, ascending) of
            a task by its name and how many it has. num_fewshot, max_gen_toks: the task's own if None.
        include_path: a folder with the user's own task files. max_length: tokens of a window, the model's own if None.
        journal: folder where scores are kept as batches end; what it holds is not scored again. identity: whose scores.
        progress: told (requests done, in all).

    Raises:
        IntegrityError: a score is not finite, a task is empty, or a document has no sample or more than one.
    """
    os.environ.setdefault(
        "DISABLE_MULTIPROC", "1"
    )  # else its bootstrap forks this process, model and threads and all
    manager = tasks_from(
        [OWN_TASKS, *([Path(include_path)] if include_path is not None else [])], tasks
    )
    kept = None if journal is None else Journal(journal / SCORES, identity)
    lm = HarnessLM(
        model,
        tokenizer,
        progress,
        max_length=max_length,
        journal=kept,
        chat=chat,
        max_gen_toks=max_gen_toks,
    )
    try:
        manager.load(tasks)
        asked = asked_documents(manager.documents, limit, choose)
        answer: Any = simple_evaluate(
            model=lm,
            tasks=list(tasks),
            limit=limit if choose is None else None,
            samples=None if choose is None else asked,
            num_fewshot=num_fewshot,
            task_manager=manager,
            bootstrap_iters=1000,  # means have closed-form standard errors; 0 would switch those off too
            log_samples=True,
            apply_chat_template=chat.template,
            system_instruction=chat.system,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    finally:
        if kept is not None:
            kept.close()
    check_samples(answer["samples"], asked)
    metrics, intervals = read_metrics(answer["results"], shares(answer["samples"]))
    for task, finished in lm.finished.items() if chat.thinks else ():
        share, name = finished.count(False) / len(finished), f"unfinished/{task}"
        metrics[name], intervals[name] = share, share_interval(share, len(finished))
    samples = {
        task: [sample_row(sample) for sample in rows] for task, rows in answer["samples"].items()
    }
    results = {
        key: answer[key]
        for key in ("results", "n-samples", "versions", "configs", "group_subtasks")
        if key in answer
    }
    return TaskScores(metrics, intervals, results, samples, lm.effort)


def asked_documents(
    documents: Mapping[str, int], limit: int | None, choose: Choose | None
) -> dict[str, list[int]]:
    """The numbers of the documents that each task is scored on."""
    if choose is not None:
        return {task: list(choose(task, count)) for task, count in documents.items()}
    return {
        task: list(range(count if limit is None else min(count, limit)))
        for task, count in documents.items()
    }


def check_samples(
    samples: Mapping[str, Sequence[dict[str, Any]]], asked: Mapping[str, Sequence[int]]
) -> None:
    """Each document asked must have one sample of each filter, and no other has any.

    Raises:
        IntegrityError: that is not so.
    """
    for task, wanted in asked.items():
        by_filter: dict[str, list[int]] = {}
        for sample in samples.get(task, ()):
            by_filter.setdefault(sample["filter"], []).append(sample["doc_id"])
        for name, found in by_filter.items() or [("none", [])]:
            if sorted(found) != sorted(wanted):
                raise IntegrityError(
                    f"{task} (filter {name}): {len(found)} samples of {len(set(found))} documents, "
                    f"there should be {len(wanted)}"
                )


def sample_row(sample: dict[str, Any]) -> dict[str, Any]:
    """What statistics need of one of lm-eval's samples, and to know that two are about the same document.

    Returns:
        doc_id, doc_hash, prompt_hash, filter, target, the task's metrics, and for each of the document's requests
        log_likelihood (and greedy), or text.
    """
    row = {name: sample[name] for name in ("doc_id", "doc_hash", "prompt_hash", "filter", "target")}
    row.update((name, sample[name]) for name in sample["metrics"])
    answers = sample["filtered_resps"]
    if all(isinstance(answer, tuple) for answer in answers):
        row["log_likelihood"], row["greedy"] = (
            [answer[0] for answer in answers],
            [answer[1] for answer in answers],
        )
    elif all(isinstance(answer, float) for answer in answers):
        row["log_likelihood"] = list(answers)
    else:
        row["text"] = list(answers)
    return row


def shares(samples: Mapping[str, Sequence[dict[str, Any]]]) -> set[tuple[str, str]]:
    """Metric and filter of those that are 0 or 1 for every document that has them, of whatever task."""
    found: dict[tuple[str, str], bool] = {}
    for sample in chain.from_iterable(samples.values()):
        for name in sample["metrics"]:
            key, value = (name, sample["filter"]), sample[name]
            found[key] = found.get(key, True) and np.ndim(value) == 0 and value in (0, 1)
    return {key for key, share in found.items() if share}


def read_metrics(
    results: dict[str, dict[str, Any]], within_1: Collection[tuple[str, str]] = ()
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Values by `<task>/<metric>` (and `/<filter>`, if one is named), and 95 % intervals.

    within_1: `shares`, whose intervals end at 0 and 1, as those of accuracies do.
    """
    metrics: dict[str, float] = {}
    intervals: dict[str, tuple[float, float]] = {}
    for task, scores in results.items():
        for key, value in scores.items():
            name, _, filtered = key.partition(",")
            if not isinstance(value, (int, float)) or not filtered or name.endswith("_stderr"):
                continue
            metric = f"{task}/{name}" + ("" if filtered == "none" else f"/{filtered}")
            metrics[metric] = float(value)
            error = scores.get(f"{name}_stderr,{filtered}")
            if isinstance(error, (int, float)):
                low, high = value - NORMAL_95 * error, value + NORMAL_95 * error
                share = name.startswith("acc") or (name, filtered) in within_1
                intervals[metric] = (max(0.0, low), min(1.0, high)) if share else (low, high)
    return metrics, intervals
