"""Find lm-eval's task files, ours and the user's, and refuse those that cannot be run."""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lm_eval.tasks
from lm_eval.api.metrics import weighted_mean, weighted_perplexity
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from q3q.errors import ConfigError, IntegrityError, Q3QError
from q3q.evaluate.catalogue import OWN_TASKS
from q3q.evaluate.harness.answers import greedy_settings
from q3q.evaluate.perplexity import exp_or_infinity

OFFICIAL = Path(lm_eval.tasks.__file__).parent
# Where in lm-eval some tasks lie: to look through all of it takes seconds.
SHIPPED = {
    **{name: name for name in ("piqa", "hellaswag", "winogrande", "wikitext")},
    "arc_easy": "arc",
    "arc_challenge": "arc",
    "boolq": "super_glue/boolq",
    "mmlu": "mmlu/default",
}


class CheckedTasks(TaskManager):
    """lm-eval's tasks, refused where they cannot be loaded or there is nothing to evaluate.

    documents: how many each of the tasks loaded last has.
    """

    documents: dict[str, int]
    _loaded: tuple[list[str], Any] | None = None

    def load(self, task_list: Any) -> Any:
        """What lm-eval's own returns; asked for the same tasks again, the same objects.

        Raises:
            ConfigError: a task's file is broken. IntegrityError: a task has no documents.
        """
        names = [str(name) for name in task_list]
        if self._loaded is None or self._loaded[0] != names:
            parts = [self._load_one(name) for name in names]
            keys = ("tasks", "groups", "group_map")
            loaded = {key: {k: v for part in parts for k, v in part[key].items()} for key in keys}
            for task in loaded["tasks"].values():
                aggregations = task.aggregation()
                for name in [
                    name for name, one in aggregations.items() if one is weighted_perplexity
                ]:
                    aggregations[name] = perplexity_or_infinity
            self.documents = {name: len(task.eval_docs) for name, task in loaded["tasks"].items()}
            if empty := [name for name, count in self.documents.items() if not count]:
                raise IntegrityError(f"no documents to evaluate: {', '.join(empty)}")
            self._loaded = names, loaded
        return self._loaded[1]

    def _load_one(self, name: str) -> Any:
        try:
            return super().load([name])
        except Q3QError:
            raise
        except (
            Exception
        ) as error:  # a task file is a program: its templates and functions may raise anything
            if isinstance(error, IndexError) and "size 0" in str(
                error
            ):  # `datasets`, asked for a first row
                raise IntegrityError(f"{name} has no documents to evaluate") from error
            entry = self.task_index.get(name)
            where = f" ({entry.yaml_path})" if entry is not None and entry.yaml_path else ""
            raise ConfigError(f"{name}{where} cannot be loaded: {_told(error)}") from error


def perplexity_or_infinity(items: Sequence[tuple[float, float]]) -> float:
    """lm-eval's `weighted_perplexity`, which ends in an OverflowError where that is too large for a number.

    items: log-likelihood and weight (words, bytes) of each document.
    """
    return exp_or_infinity(-weighted_mean(items))


def _told(error: Exception) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def tasks_from(folders: Sequence[Path], wanted: Sequence[str]) -> CheckedTasks:
    """A manager that knows the wanted tasks. lm-eval's own thousands are read only if the folders lack one."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    paths = [str(folder) for folder in folders]
    few = [
        str(OFFICIAL / folder)
        for folder in dict.fromkeys(SHIPPED[task] for task in wanted if task in SHIPPED)
    ]
    manager = CheckedTasks(include_path=[*few, *paths], include_defaults=False)
    known = set(manager.all_tasks)
    return manager if known.issuperset(wanted) else CheckedTasks(include_path=paths)


def refuse_namesakes(include: Path, wanted: Sequence[str]) -> None:
    """The user's task files must be readable, and not put themselves in the place of tasks that are there already:
    lm-eval would take them for the official ones, and say nothing.

    wanted: what is asked for. A tag of lm-eval's that the user's tasks bear too would mean these alone; that counts
    only if it is asked for, since whoever includes an official file has its tags.

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
                f"evaluation.include_path: {path} cannot be read: {_told(error)}"
            ) from error
        name, borne = content.get("group", content.get("task")), content.get("tag") or []
        asked = {borne} & set(wanted) if isinstance(borne, str) else set(borne) & set(wanted)
        tags |= asked
        own |= dict.fromkeys([*asked, *([name] if isinstance(name, str) else [])], path)
    if not own:
        return
    # lm-eval's index says the same, and takes ten times as long to build.
    names = "|".join(map(re.escape, own))
    says = (
        rf"""^(?:(?:task|group|tag):|(?P<item>[ ]*-))[ ]*(["']?)(?P<name>{names})\2[ ]*(?:#.*)?$"""
    )
    defines = re.compile(says, re.MULTILINE)
    files = [
        path for path in OFFICIAL.rglob("*yaml*") if path.suffix in ("", ".yaml")
    ]  # some that are included have none
    for path in (*OWN_TASKS.rglob("*.yaml"), *files):
        for found in defines.finditer(path.read_text(encoding="utf-8")):
            if found["item"] is None or found["name"] in tags:
                raise ConfigError(
                    f"evaluation.include_path: {own[found['name']]} defines {found['name']}, which is a name of "
                    f"{'q3q' if path.is_relative_to(OWN_TASKS) else 'lm-eval'}'s; give it another"
                )


def examine(
    manager: CheckedTasks,
    tasks: Sequence[str],
    shots: Mapping[str, int],
    most: int | None,
    window: int,
) -> dict[str, dict[str, str]]:
    """Load tasks as a trial will, and refuse what it would refuse after hours of quantization, or not even notice.

    Args:
        shots: examples asked for, by task. most: tokens of a generated text, the task's own number if None. window: in
            tokens.

    Returns:
        For each of the tasks those that it consists of, with their types of output.

    Raises:
        ConfigError: a task cannot be loaded or run. IntegrityError: it has no documents.
    """
    found = {}
    for task in tasks:
        leaves = manager.load([task])["tasks"]
        for name, leaf in leaves.items():
            _refuse_unusable(name, leaf, shots.get(task), most, window)
        found[task] = {name: str(leaf.OUTPUT_TYPE) for name, leaf in leaves.items()}
    return found


def _refuse_unusable(
    name: str, task: Any, shots: int | None, most: int | None, window: int
) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise ConfigError(
            f"{name} runs the code that a model writes, which q3q does not do; leave it out"
        )
    if getattr(task, "MULTIMODAL", False):
        raise ConfigError(f"{name} shows images or sound, and Qwen3 reads text; leave it out")
    own = task.get_config("num_fewshot")
    if shots and own == 0:
        raise ConfigError(
            f"{name} says num_fewshot: 0 in its file, and lm-eval then shows no example: not {shots}"
        )
    if shots and task.OUTPUT_TYPE == "loglikelihood_rolling":
        raise ConfigError(f"{name} reads whole texts and shows no example: not {shots}")
    if shots and not _has_examples(task):
        raise ConfigError(
            f"{name} has no examples but the questions themselves, so it cannot show {shots}"
        )
    needed = shots if shots is not None and own != 0 else own or 0
    if needed and len(there := list(task.fewshot_docs())) < needed:
        raise ConfigError(f"{name} is to show {needed} examples, and its data set has {len(there)}")
    if task.OUTPUT_TYPE == "generate_until":
        greedy_settings(task.get_config("generation_kwargs") or {}, name, most, window)


def _has_examples(task: Any) -> bool:
    """Whether examples come from elsewhere than the questions, which lm-eval falls back on."""
    config, given = task.config, getattr(task, "fewshot_cfg", None)
    asked = config.test_split or config.validation_split
    if given is not None and given.split is not None:
        return (
            given.split != asked or given.split == config.test_split
        )  # then no question is its own example
    if given is not None and given.samples is not None:
        return True
    if task.has_training_docs() and config.training_split != asked:
        return True
    return (
        bool(task.has_test_docs() and task.has_validation_docs())
        and config.validation_split != asked
    )
