"""Run lm-eval's tasks on a model and read its metrics and samples."""

import os
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lm_eval import evaluate

from q3q.data.prepared import Shelf
from q3q.errors import IntegrityError
from q3q.evaluate.batches import Choose, first_questions
from q3q.evaluate.catalogue import OWN_TASKS
from q3q.evaluate.chat import CHATS, PLAIN_CHAT, Chat
from q3q.evaluate.compare import share_interval
from q3q.evaluate.harness.lm import HarnessLM
from q3q.evaluate.harness.metrics import read_metrics, sample_rows, shares_of
from q3q.evaluate.harness.requests import REQUESTS_VERSION, prepared_tasks
from q3q.evaluate.harness.task_files import CheckedTasks, tasks_from
from q3q.evaluate.harness.templates import templates_compiled_once
from q3q.evaluate.journal import SCORES, Journal
from q3q.evaluate.scoring import Effort
from q3q.evaluate.version import lm_eval_version
from q3q.models.decoder import Decoder
from q3q.reporter import Steps, no_steps
from q3q.spec import Json, digest

# Of lm-eval's answer, what the record keeps.
RESULTS = ("results", "n-samples", "versions", "configs", "group_subtasks", "higher_is_better")


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


@dataclass(frozen=True)
class Keeping:
    """Where the requests of tasks are kept for later trials.

    identity: all that determines the requests, as far as it is known before the tasks are loaded
    pinned: returns True, once they are loaded, if each data set that they read has an identity
    """

    shelf: Shelf
    identity: Json
    pinned: Callable[[], bool]


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
    keeping: Keeping | None = None,
    steps: Steps = no_steps,
) -> TaskScores:
    """Score lm-eval tasks through `lm_eval.evaluate`.

    Args:
        limit: number of each task's first documents that are scored; None for all.
        choose: chooses the documents instead.
        num_fewshot, max_gen_toks: the task's own if None.
        include_path: a folder with the user's own task files.
        max_length: tokens of a window; the model's own if None.
        journal: folder of the scores so far. Scores in it are not computed again; others are added
            as batches end.
        identity: the scores' identity, see `Journal`.
        keeping: where the requests are kept; None to build them without keeping them.
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
    with templates_compiled_once(), closing(stored) if stored is not None else nullcontext():
        loaded = index.load(tasks)
        choose_all = choose or partial(first_questions, limit)
        documents = {task: list(choose_all(task, count)) for task, count in index.documents.items()}
        shelf = None if keeping is None else _shelf_of(keeping, index, chat, tokenizer)
        whole: Json = {}
        if keeping is not None and shelf is not None:
            whole = _whole_identity(keeping, loaded["tasks"], documents, lm)
        wait = partial(steps, 0, 1)
        with prepared_tasks(loaded["tasks"], lm.encode_all, shelf, whole, wait) as prepared:
            _set_up(loaded["tasks"].values(), num_fewshot, seed)
            answer: Any = evaluate(
                lm,
                loaded,
                limit=limit if choose is None else None,
                samples=None if choose is None else documents,
                # Means have closed-form standard errors; 0 would switch those off too.
                bootstrap_iters=1000,
                log_samples=True,
                system_instruction=chat.system,
                apply_chat_template=chat.template,
                fewshot_as_multiturn=True,
            )
    check_samples(answer["samples"], documents)
    for task, rows in answer["samples"].items():
        hashes = prepared.prompt_hashes(task, documents[task])
        for row in rows:
            row["prompt_hash"] = hashes[row["doc_id"]]
    return _scores_of(answer, loaded, lm, thinks=chat.thinks)


def _scores_of(answer: Any, loaded: Any, lm: HarnessLM, *, thinks: bool) -> TaskScores:
    """Read lm-eval's answer about loaded tasks; `thinks`: answers may end before a thought does."""
    shares = shares_of(loaded["tasks"], loaded["groups"], answer["samples"], answer["results"])
    metrics, intervals = read_metrics(answer["results"], shares)
    for task, finished in lm.finished.items() if thinks else ():
        share, name = finished.count(False) / len(finished), f"unfinished/{task}"
        metrics[name], intervals[name] = share, share_interval(share, len(finished))
    samples = {
        task: list(sample_rows(task, rows, shares)) for task, rows in answer["samples"].items()
    }
    results = {key: answer[key] for key in RESULTS if key in answer}
    return TaskScores(metrics, intervals, results, samples, shares.without, lm.scorer.effort)


def _set_up(tasks: Iterable[Any], num_fewshot: int | None, seed: int) -> None:
    """Set seeds and numbers of examples as `lm_eval.simple_evaluate` does before it evaluates.

    That function then runs a dozen programs to describe the machine, which the record does itself.
    """
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    for task in tasks:
        own = task.get_config("num_fewshot")
        if own is None or (own and num_fewshot is not None):
            task.set_config("num_fewshot", num_fewshot or 0)
        task.set_fewshot_seed(seed)


def _shelf_of(keeping: Keeping, index: CheckedTasks, chat: Chat, tokenizer: Any) -> Shelf | None:
    """Return the shelf; None where the requests may be others in the next trial."""
    dated = chat.template and "strftime_now" in str(tokenizer.chat_template)
    if dated or index.loading_by_themselves or not keeping.pinned():
        return None
    return keeping.shelf


def _whole_identity(
    keeping: Keeping, tasks: Mapping[str, Any], documents: Mapping[str, list[int]], lm: HarnessLM
) -> Json:
    """Return all that determines the requests of these tasks, but for the tokenizer."""
    configs = {name: task.dump_config() for name, task in tasks.items()}
    # A function without source code is written with its address.
    written = re.sub(r" at 0x[0-9a-f]+", "", repr(configs))
    return {
        **keeping.identity,
        "version": REQUESTS_VERSION,
        "lm_eval": lm_eval_version(),
        "files": digest({"configs": written}),
        "documents": digest({"numbers": documents}),
        "window": lm.max_length,
    }


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
