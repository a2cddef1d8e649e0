"""Resolve what is evaluated: texts, tasks, shots, limits and chat templates."""

import functools
import json
from pathlib import Path

from omegaconf import DictConfig

from q3q.config.schema import nearest, refuse_unknown
from q3q.config.texts import (
    RANDOM_TEXTS,
    check_long_enough,
    check_path_is_read,
    data_folder,
    name_of_text,
    open_text,
)
from q3q.data.questions import Library, folder_digest
from q3q.errors import ConfigError
from q3q.evaluate.catalogue import (
    CHATS,
    EVALUATION_VERSION,
    KNOWN,
    OWN_TASKS,
    PLAIN_CHAT,
    STUDY_MMLU,
    THINK_END,
    draws_shots,
    lm_eval_version,
)
from q3q.evaluate.mmlu_paper import SHOTS as MMLU_SHOTS
from q3q.evaluate.suites import settle
from q3q.models.checkpoint import end_tokens
from q3q.models.facts import ModelFacts
from q3q.models.hub import fetch_file
from q3q.spec import Json


def seed_of_shots(evaluation: Json, seed: int) -> int:
    """The seed, where it decides about the examples in some prompt; 0 where it decides nothing."""
    return seed if draws_shots(evaluation["tasks"], evaluation.get("shots", {})) else 0


def resolve_evaluation(config: DictConfig, facts: ModelFacts, folder: Path | None) -> Json:
    """What is measured. What is not asked for is absent; `drift` says on how many windows: auto, or a number."""
    wanted = config.evaluation
    least = {
        "window": 2,
        "limit": 1,
        "task_limit": 1,
        "drift_windows": 1,
        "num_fewshot": 0,
        "max_gen_toks": 1,
    }
    for key, lowest in least.items():
        value = wanted[key]
        if value is not None and value < lowest:
            raise ConfigError(f"evaluation.{key}={value}: give {lowest} or more")
    if wanted.window > facts.max_positions:
        raise ConfigError(
            f"evaluation.window={wanted.window}: this model takes at most {facts.max_positions} tokens"
        )
    check_path_is_read(wanted.path, "evaluation", wanted.texts)
    if wanted.quick and wanted.limit is None:
        raise ConfigError(
            "evaluation.quick=true draws evaluation.limit windows and questions: give evaluation.limit"
        )
    texts = []
    for source in wanted.texts:
        text = open_text(source, "evaluation", wanted.path, config.data.path)
        samples = RANDOM_TEXTS.get(source)
        check_long_enough(text, folder, 1, wanted.window, "random" if samples else "first")
        texts.append(
            {
                "name": name_of_text(source, text),
                "source": source,
                "digest": text.digest,
                "window": wanted.window,
                "limit": wanted.limit,
                "draw": "random" if samples else "first",
                "samples": samples,
            }
        )
    names = [text["name"] for text in texts]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(
            f"evaluation.texts: {', '.join(twice)} is there more than once, and has one place in the record"
        )
    evaluation: Json = {"texts": texts, **_tasks(config, facts, folder)}
    if texts or evaluation["tasks"]:
        evaluation["version"] = EVALUATION_VERSION
    if wanted.quick:
        evaluation["quick"] = True
    if wanted.drift and texts:
        evaluation["drift"] = "auto" if wanted.drift_windows is None else wanted.drift_windows
    return evaluation


def _shots_and_limits(
    wanted: DictConfig, tasks: list[str]
) -> tuple[dict[str, int], dict[str, int]]:
    """By task: examples in the prompt, where they are given, and questions, where they differ from all tasks'."""
    shots, limits = (
        {str(task): value for task, value in wanted[key].items()} for key in ("shots", "limits")
    )
    for key, given, lowest in (("shots", shots, 0), ("limits", limits, 1)):
        for task, value in given.items():
            if task not in tasks:
                raise ConfigError(f"evaluation.{key}: {task} is not one of evaluation.tasks")
            if value < lowest:
                raise ConfigError(
                    f"evaluation.{key}: {task}: {value} is too few, give {lowest} or more"
                )
    studied = shots.get(STUDY_MMLU, wanted.num_fewshot)
    if STUDY_MMLU in tasks and studied not in (None, MMLU_SHOTS):
        raise ConfigError(
            f"{STUDY_MMLU} shows {MMLU_SHOTS} examples, not {studied}; mmlu takes any number"
        )
    if wanted.num_fewshot is not None:
        shots = {task: shots.get(task, wanted.num_fewshot) for task in tasks}
    shots.pop(STUDY_MMLU, None)
    return shots, limits


def _tasks(config: DictConfig, facts: ModelFacts, folder: Path | None) -> Json:
    """The tasks, their settings and what their data sets are; all of it is known to be there."""
    wanted = config.evaluation
    tasks = list(dict.fromkeys(wanted.tasks))
    refuse_unknown("evaluation.chat", wanted.chat, tuple(CHATS))
    shots, limits = _shots_and_limits(wanted, tasks)
    include = (
        None if wanted.include_path is None else Path(wanted.include_path).expanduser().absolute()
    )
    if include is not None and not include.is_dir():
        raise ConfigError(
            f"evaluation.include_path={wanted.include_path} is not a folder with task files"
        )
    _check_tasks(tuple(tasks), include)
    found: Json = {"tasks": tasks, "task_limit": None}
    if not tasks and wanted.name == "tasks":
        raise ConfigError("evaluation=tasks needs some: evaluation.tasks=[piqa,mmlu]")
    generating: list[str] = []
    template = ""
    if tasks:
        if wanted.chat != PLAIN_CHAT:
            template = _chat_template(config.model.source, config.model.revision, folder)
            if not template:
                where = folder or config.model.source
                raise ConfigError(
                    f"evaluation.chat={wanted.chat}: the tokenizer in {where} has no chat template"
                )
        found["task_limit"] = wanted.limit if wanted.task_limit is None else wanted.task_limit
        known, generating = _data_sets(
            tuple(tasks),
            tuple(sorted(shots.items())),
            tuple((task, limits.get(task, found["task_limit"])) for task in tasks),
            include,
            data_folder(config),
            wanted.max_gen_toks,
            facts.max_positions,
        )
    if wanted.max_gen_toks is not None and not generating:
        raise ConfigError(
            f"evaluation.max_gen_toks={wanted.max_gen_toks}: none of evaluation.tasks generates text"
        )
    if not tasks:
        return found
    thinks = CHATS[wanted.chat][1] or (wanted.chat == "template" and THINK_END in template)
    if thinks and generating and wanted.max_gen_toks is None:
        raise ConfigError(
            f"evaluation.chat={wanted.chat} needs evaluation.max_gen_toks=N, the most tokens of a thought and its "
            f"answer: what {', '.join(generating)} allows is for an answer alone"
        )
    optional = {
        "shots": dict(sorted(shots.items())),
        "limits": dict(sorted(limits.items())),
        "chat": None if wanted.chat == PLAIN_CHAT else wanted.chat,
        "include": None if include is None else folder_digest(include),
        "data": known,
        "generates": generating,
        "max_gen_toks": wanted.max_gen_toks,
        # Where a generated answer ends is not in the weights; a hub's revision covers the file that says it.
        "ends": list(end_tokens(folder)) if generating and folder is not None else None,
        "lm_eval": lm_eval_version(),
    }
    return found | {key: value for key, value in optional.items() if value}


@functools.cache
def _data_sets(
    tasks: tuple[str, ...],
    shots: tuple[tuple[str, int], ...],
    limits: tuple[tuple[str, int | None], ...],
    include: Path | None,
    folder: Path | None,
    most: int | None,
    window: int,
) -> tuple[dict[str, str], list[str]]:
    """What each data set of the tasks is: its commit, or the digest of its files; and which tasks generate text."""
    library = Library(folder, settle=True)
    generating = settle(
        tasks,
        library,
        shots=dict(shots),
        limits=dict(limits),
        include=include,
        most=most,
        window=window,
    )
    return dict(sorted(library.identities.items())), generating


@functools.cache
def _chat_template(source: str | None, revision: str | None, folder: Path | None) -> str:
    """The chat template of the model's tokenizer; empty if it has none."""

    def read(name: str) -> str:
        path = fetch_file(str(source), name, revision) if folder is None else folder / name
        try:
            return "" if path is None else path.read_text(encoding="utf-8")
        except OSError:
            return ""

    try:
        inside = json.loads(read("tokenizer_config.json") or "{}").get("chat_template")
    except ValueError:
        inside = None
    return str(inside or read("chat_template.jinja"))


@functools.cache
def _check_tasks(tasks: tuple[str, ...], include: Path | None) -> None:
    """Names of tasks, before hours go by. lm-eval's own list takes seconds to load, and is asked only for them."""
    if include is None and set(tasks) <= set(KNOWN):
        return
    from q3q.evaluate.harness.task_files import refuse_namesakes, tasks_from

    if include is not None:
        refuse_namesakes(include, tasks)
    own = [OWN_TASKS, *([include] if include else [])]
    known = [*KNOWN, *tasks_from(own, [task for task in tasks if task not in KNOWN]).all_tasks]
    for task in tasks:
        if task not in known:
            raise ConfigError(
                f"evaluation.tasks: {task} is no task of lm-eval{nearest(task, known)}".strip()
            )
