"""Run lm-eval's tasks on a model and read its metrics and samples."""

import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
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
from q3q.evaluate.budget import TokenBudget
from q3q.evaluate.catalogue import OWN_TASKS
from q3q.evaluate.chat import CHATS, PLAIN_CHAT, Chat
from q3q.evaluate.compare import share_interval
from q3q.evaluate.harness.hashes import documents_written_quickly
from q3q.evaluate.harness.lm import HarnessLM
from q3q.evaluate.harness.metrics import read_metrics, sample_rows, shares_of
from q3q.evaluate.harness.requests import REQUESTS_VERSION, PreparedTasks, prepared_tasks
from q3q.evaluate.harness.task_files import CheckedTasks, tasks_from
from q3q.evaluate.harness.templates import templates_compiled_once
from q3q.evaluate.journal import SCORES, Journal
from q3q.evaluate.scoring import Effort
from q3q.evaluate.version import lm_eval_version
from q3q.models.decoder import Decoder
from q3q.models.facts import ModelFacts
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


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is asked of a model.

    limit: number of each task's first documents that are scored; None for all
    choose: chooses the documents instead
    num_fewshot: the task's own if None
    include_path: a folder with the user's own task files
    keeping: where the requests are kept; None to build them without keeping them
    """

    tasks: Sequence[str]
    limit: int | None
    seed: int
    choose: Choose | None = None
    num_fewshot: int | None = None
    include_path: str | Path | None = None
    chat: Chat = CHATS[PLAIN_CHAT]
    keeping: Keeping | None = None


@dataclass(frozen=True)
class _Unloaded:
    """Stands for a model that is asked nothing: requests depend on its facts alone."""

    facts: ModelFacts
    streamed: bool = False


class _AllBuiltError(Exception):
    """Ends lm-eval's evaluation where it would begin to ask the model."""


def prepare_tasks(
    facts: ModelFacts, tokenizer: Any, asked: Asked, wait: Callable[[], object]
) -> None:
    """Build and keep the requests that `run_tasks` will take, unless they are there.

    Args:
        wait: called at every poll while another process builds them; may raise to stop waiting.
    """
    model: Any = _Unloaded(facts)
    lm = HarnessLM(model, tokenizer, chat=asked.chat, budget=TokenBudget())

    def stop() -> None:
        raise _AllBuiltError

    with (
        suppress(_AllBuiltError),
        templates_compiled_once(),
        _asking(lm, asked, wait, stop) as asking,
    ):
        if asking.prepared.builds:
            asking.evaluate()


def run_tasks(
    model: Decoder,
    tokenizer: Any,
    asked: Asked,
    *,
    max_gen_toks: int | None = None,
    max_length: int | None = None,
    journal: Path | None = None,
    identity: str = "",
    steps: Steps = no_steps,
) -> TaskScores:
    """Score lm-eval tasks through `lm_eval.evaluate`.

    Args:
        max_gen_toks: the task's own if None.
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
    stored = None if journal is None else Journal(journal / SCORES, identity)
    lm = HarnessLM(
        model,
        tokenizer,
        steps,
        max_length=max_length,
        journal=stored,
        chat=asked.chat,
        max_gen_toks=max_gen_toks,
    )
    with (
        templates_compiled_once(),
        documents_written_quickly(),
        closing(stored) if stored is not None else nullcontext(),
        _asking(lm, asked, partial(steps, 0, 1)) as asking,
    ):
        answer = asking.evaluate()
    loaded, documents, prepared = asking.loaded, asking.documents, asking.prepared
    check_samples(answer["samples"], documents)
    for task, rows in answer["samples"].items():
        hashes = prepared.prompt_hashes(task, documents[task])
        for row in rows:
            row["prompt_hash"] = hashes[row["doc_id"]]
    return _scores_of(answer, loaded, lm, thinks=asked.chat.thinks)


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


@dataclass(frozen=True)
class _Asking:
    """Tasks that are loaded and ready to be evaluated.

    loaded: lm-eval's tasks and groups
    documents: the numbers of those that are scored, by task
    """

    lm: HarnessLM
    asked: Asked
    loaded: Any
    documents: dict[str, list[int]]
    prepared: PreparedTasks

    def evaluate(self) -> Any:
        """Have lm-eval build the requests, ask the model, and return its results."""
        asked = self.asked
        _set_up(self.loaded["tasks"].values(), asked.num_fewshot, asked.seed)
        return evaluate(
            self.lm,
            self.loaded,
            limit=asked.limit if asked.choose is None else None,
            samples=None if asked.choose is None else self.documents,
            # Means have closed-form standard errors; 0 would switch those off too.
            bootstrap_iters=1000,
            log_samples=True,
            system_instruction=asked.chat.system,
            apply_chat_template=asked.chat.template,
            fewshot_as_multiturn=True,
        )


@contextmanager
def _asking(
    lm: HarnessLM,
    asked: Asked,
    wait: Callable[[], object],
    then: Callable[[], object] = lambda: None,
) -> Iterator[_Asking]:
    """Load tasks, and have them take their requests from where they are kept, or keep them there.

    wait, then: see `prepared_tasks`
    """
    own, keeping = asked.include_path, asked.keeping
    index = tasks_from([OWN_TASKS, *([Path(own)] if own is not None else [])], asked.tasks)
    loaded = index.load(asked.tasks)
    choose = asked.choose or partial(first_questions, asked.limit)
    documents = {task: list(choose(task, count)) for task, count in index.documents.items()}
    shelf = None if keeping is None else _shelf_of(keeping, index, asked.chat, lm.tokenizer)
    whole: Json = {}
    if keeping is not None and shelf is not None:
        whole = _whole_identity(keeping, loaded["tasks"], documents, lm)
    with prepared_tasks(loaded["tasks"], lm.encode_all, shelf, whole, wait, then) as prepared:
        yield _Asking(lm, asked, loaded, documents, prepared)


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
