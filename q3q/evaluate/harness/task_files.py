"""Find task files of lm-eval, q3q and the user, and refuse those that cannot be run."""

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval.tasks
import numpy as np
from lm_eval.api.metrics import mean, perplexity, weighted_mean, weighted_perplexity
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from q3q.errors import ConfigError, IntegrityError, Q3QError
from q3q.evaluate.catalogue import OWN_TASKS, TASKS
from q3q.evaluate.harness.answers import greedy_settings
from q3q.evaluate.harness.documents import read_quickly
from q3q.evaluate.metrics import exp_or_infinity

OFFICIAL = Path(lm_eval.tasks.__file__).parent


class CheckedTasks(TaskManager):
    """lm-eval's index of tasks, which refuses tasks that cannot be loaded or have no documents.

    documents: number of documents of each task loaded last
    loading_by_themselves: tasks, not of q3q's own, whose own code loads their data
    """

    documents: dict[str, int]
    loading_by_themselves: frozenset[str] = frozenset()
    _loaded: tuple[list[str], Any] | None = None

    def load(self, task_list: Any) -> Any:
        """Return what lm-eval's own method returns; for the same tasks again, the same objects.

        Raises:
            ConfigError: a task's file is broken.
            IntegrityError: a task has no documents.
        """
        names = [str(name) for name in task_list]
        if self._loaded is None or self._loaded[0] != names:
            parts = [self._load_one(name) for name in names]
            keys = ("tasks", "groups", "group_map")
            loaded = {key: {k: v for part in parts for k, v in part[key].items()} for key in keys}
            for task in loaded["tasks"].values():
                read_quickly(task)
                aggregations = task.aggregation()
                for name, aggregation in aggregations.items():
                    aggregations[name] = Aggregation(STAND_INS.get(aggregation, aggregation))
            self.documents = {name: len(task.eval_docs) for name, task in loaded["tasks"].items()}
            if empty := [name for name, count in self.documents.items() if not count]:
                raise IntegrityError(f"no documents to evaluate: {', '.join(empty)}")
            self.loading_by_themselves |= {
                name
                for name, task in loaded["tasks"].items()
                if name not in TASKS and callable(task.get_config("custom_dataset"))
            }
            self._loaded = names, loaded
        return self._loaded[1]

    def _load_one(self, name: str) -> Any:
        try:
            return super().load([name])
        except Q3QError:
            raise
        except Exception as error:  # a task file has templates and functions, which may raise any
            # `datasets` raises this where there is no first row.
            if isinstance(error, IndexError) and "size 0" in str(error):
                raise IntegrityError(f"{name} has no documents to evaluate") from error
            entry = self.task_index.get(name)
            where = f" ({entry.yaml_path})" if entry is not None and entry.yaml_path else ""
            raise ConfigError(f"{name}{where} cannot be loaded: {_in_a_line(error)}") from error


class Aggregation:
    """A metric's aggregation that returns nan where the function raises an error.

    What lm-eval cannot aggregate (`likelihood` by its default, a mean; `brier_score` where the
    numbers of choices differ) costs this metric, and not the whole trial after all its work.

    function: the task's own
    error: the last error, in a line; lm-eval also calls the function on resamples
    """

    def __init__(self, function: Callable[[Sequence[Any]], Any]) -> None:
        self.function = function
        self.error: str | None = None
        self.__name__ = getattr(function, "__name__", type(function).__name__)  # lm-eval prints it
        self._has_arrays = False

    def __call__(self, items: Sequence[Any]) -> Any:
        self._has_arrays = any(isinstance(item, np.ndarray) for item in items)
        try:
            return self.function(items)
        except Exception as error:  # a task's own function may raise any
            self.error = _in_a_line(error)
            return math.nan

    # lm-eval finds a function's standard error by the function, after it has called it. It cannot
    # compute that of arrays, even of one element.
    def __eq__(self, other: object) -> bool:
        usable = self.error is None and not self._has_arrays
        return self is other or (usable and self.function == other)

    def __hash__(self) -> int:
        return hash(self.function)


def perplexity_or_infinity(items: Sequence[float]) -> float:
    """Return lm-eval's `perplexity`, but infinity where that raises an OverflowError.

    Args:
        items: log-likelihood of each document.
    """
    return exp_or_infinity(-float(mean(items)))


def weighted_perplexity_or_infinity(items: Sequence[tuple[float, float]]) -> float:
    """Return lm-eval's `weighted_perplexity`, but infinity where that raises an OverflowError.

    Args:
        items: log-likelihood and weight (words or bytes) of each document.
    """
    return exp_or_infinity(-weighted_mean(items))


# Of lm-eval's aggregations, those that raise an OverflowError where the model diverged.
STAND_INS: Mapping[Callable[..., Any], Callable[..., Any]] = {
    perplexity: perplexity_or_infinity,
    weighted_perplexity: weighted_perplexity_or_infinity,
}


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def tasks_from(folders: Sequence[Path], names: Sequence[str]) -> CheckedTasks:
    """Return an index that has these tasks.

    All of lm-eval's files are read only if neither the folders nor the catalogue has a task.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    paths = [str(folder) for folder in folders]
    official = dict.fromkeys(
        str(OFFICIAL / folder)
        for name in names
        if name in TASKS and (folder := TASKS[name].lm_eval_folder)
    )
    index = CheckedTasks(include_path=[*official, *paths], include_defaults=False)
    return index if set(index.all_tasks).issuperset(names) else CheckedTasks(include_path=paths)


def refuse_namesakes(include: Path, requested: Sequence[str]) -> None:
    """Refuse task files of the user's that are unreadable or define a name that exists already.

    lm-eval would silently take such a task for the official one.

    Args:
        requested: names in evaluation.tasks. A tag of lm-eval's that is also on a user's task would
            mean this task alone. It is refused only if it is requested, because a file that
            includes an official file has that file's tags.

    Raises:
        ConfigError: a file is broken, or defines a name that lm-eval or q3q defines.
    """
    own: dict[str, Path] = {}
    tags: set[str] = set()
    for path in sorted(include.rglob("*.yaml")):
        try:
            content = load_yaml(path, resolve_func=False)
        except Exception as error:
            raise ConfigError(
                f"evaluation.include_path: {path} cannot be read: {_in_a_line(error)}"
            ) from error
        name, tag = content.get("group", content.get("task")), content.get("tag") or []
        requested_tags = set(requested) & ({tag} if isinstance(tag, str) else set(tag))
        tags |= requested_tags
        own |= dict.fromkeys([*requested_tags, *([name] if isinstance(name, str) else [])], path)
    if not own:
        return
    # lm-eval's index has the same names, and takes ten times as long to build.
    names = "|".join(map(re.escape, own))
    definition = re.compile(
        rf"""^(?:(?:task|group|tag):|(?P<item>[ ]*-))[ ]*(["']?)(?P<name>{names})\2[ ]*(?:#.*)?$""",
        re.MULTILINE,
    )
    # Some files that others include have no suffix.
    official = [path for path in OFFICIAL.rglob("*yaml*") if path.suffix in ("", ".yaml")]
    for path in (*OWN_TASKS.rglob("*.yaml"), *official):
        for match in definition.finditer(path.read_text(encoding="utf-8")):
            if match["item"] is None or match["name"] in tags:
                owner = "q3q" if path.is_relative_to(OWN_TASKS) else "lm-eval"
                raise ConfigError(
                    f"evaluation.include_path: {own[match['name']]} defines {match['name']}, "
                    f"which is a name of {owner}'s; give it another"
                )


def examine(
    index: CheckedTasks,
    tasks: Sequence[str],
    shots: Mapping[str, int],
    most: int | None,
    window: int,
) -> dict[str, dict[str, str]]:
    """Load tasks as a trial will, and refuse what a trial would refuse after hours, or not notice.

    Args:
        shots: examples in the prompt, by task.
        most: tokens of a generated text; the task's own number if None.
        window: the model's window in tokens.

    Returns:
        By task the names of the tasks that it consists of, with their types of output.

    Raises:
        ConfigError: a task cannot be loaded or run.
        IntegrityError: it has no documents.
    """
    output_types = {}
    for task in tasks:
        leaves = index.load([task])["tasks"]
        for name, leaf in leaves.items():
            _refuse_unusable(name, leaf, shots.get(task), most, window)
        output_types[task] = {name: str(leaf.OUTPUT_TYPE) for name, leaf in leaves.items()}
    return output_types


def _refuse_unusable(
    name: str, task: Any, shots: int | None, most: int | None, window: int
) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise ConfigError(
            f"{name} runs the code that a model writes, which q3q does not do; leave it out"
        )
    if getattr(task, "MULTIMODAL", False):
        raise ConfigError(f"{name} shows images or sound, and q3q's models read text; leave it out")
    own = task.get_config("num_fewshot")
    if shots and own == 0:
        raise ConfigError(
            f"{name} says num_fewshot: 0 in its file, and lm-eval then shows no example: not "
            f"{shots}"
        )
    if shots and task.OUTPUT_TYPE == "loglikelihood_rolling":
        raise ConfigError(f"{name} reads whole texts and shows no example: not {shots}")
    if shots and not _has_examples(task):
        raise ConfigError(
            f"{name} has no examples but the questions themselves, so it cannot show {shots}"
        )
    needed = shots if shots is not None and own != 0 else own or 0
    if needed and (count := len(list(task.fewshot_docs()))) < needed:
        raise ConfigError(f"{name} is to show {needed} examples, and its data set has {count}")
    if task.OUTPUT_TYPE == "generate_until":
        greedy_settings(task.get_config("generation_kwargs") or {}, name, most, window)


def _has_examples(task: Any) -> bool:
    """Return False if examples could only be the questions, which lm-eval falls back on."""
    config, fewshot = task.config, getattr(task, "fewshot_cfg", None)
    questions = config.test_split or config.validation_split
    if fewshot is not None and fewshot.split is not None:
        # Of the test split, lm-eval shows no question as its own example.
        return fewshot.split != questions or fewshot.split == config.test_split
    if fewshot is not None and fewshot.samples is not None:
        return True
    if task.has_training_docs() and config.training_split != questions:
        return True
    return (
        bool(task.has_test_docs() and task.has_validation_docs())
        and config.validation_split != questions
    )
