"""Resolve what is evaluated: texts, tasks, shots, limits and chat templates."""

import difflib
import functools
import sys
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig

from q3q.config.schema import nearest, refuse_unknown
from q3q.config.texts import (
    RANDOM_TEXTS,
    EvaluatedText,
    absolute,
    chat_template,
    check_long_enough,
    check_path_is_read,
    data_folder,
    evaluated_texts,
    name_of_text,
    opened,
)
from q3q.data.pinned import folder_digest
from q3q.data.questions import Library
from q3q.data.windows import EVALUATION
from q3q.errors import ConfigError
from q3q.evaluate.batches import draws_shots
from q3q.evaluate.catalogue import OWN_TASKS, STUDY_MMLU, TASKS
from q3q.evaluate.chat import CHATS, PLAIN_CHAT, THINK_END
from q3q.evaluate.data_sets import resolve_data_sets
from q3q.evaluate.mmlu_paper import SHOTS as MMLU_SHOTS
from q3q.evaluate.names import is_mentioned, task_names
from q3q.evaluate.version import EVALUATION_VERSION, lm_eval_version
from q3q.models.checkpoint import end_tokens
from q3q.models.facts import ModelFacts
from q3q.spec import AUTO_DRIFT, Evaluation, TaskRef, TextRef


def seed_of_shots(evaluation: Evaluation, seed: int) -> int:
    """Return the seed where it decides which examples a prompt shows, else 0."""
    return seed if draws_shots(evaluation.tasks) else 0


def resolve_evaluation(config: DictConfig, facts: ModelFacts, folder: Path | None) -> Evaluation:
    """Return what is measured.

    Args:
        folder: of a local model, for its tokenizer.
    """
    settings = config.evaluation
    least = {
        "window": 2,
        "limit": 1,
        "task_limit": 1,
        "drift_windows": 1,
        "num_fewshot": 0,
        "max_gen_toks": 1,
    }
    for key, lowest in least.items():
        value = settings[key]
        if value is not None and value < lowest:
            raise ConfigError(f"evaluation.{key}={value}: give {lowest} or more")
    if settings.window > facts.max_positions:
        raise ConfigError(
            f"evaluation.window={settings.window}: this model takes at most {facts.max_positions} "
            "tokens"
        )
    asked = evaluated_texts(settings)
    check_path_is_read(
        settings.path, "evaluation", [text.source for text in asked if text.name is None]
    )
    if settings.quick and settings.limit is None:
        raise ConfigError(
            "evaluation.quick=true draws evaluation.limit windows and questions: give "
            "evaluation.limit"
        )
    texts = tuple(_text_ref(config, text, folder) for text in asked)
    names = [text.name for text in texts]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(
            f"evaluation.texts: {', '.join(twice)} is given more than once; leave out the second"
        )
    drift = AUTO_DRIFT if settings.drift_windows is None else settings.drift_windows
    return replace(
        _resolve_tasks(config, facts, folder),
        texts=texts,
        version=EVALUATION_VERSION if texts or settings.tasks else None,
        quick=bool(settings.quick),
        drift=drift if settings.drift and texts else None,
    )


def _text_ref(config: DictConfig, asked: EvaluatedText, folder: Path | None) -> TextRef:
    settings, source = config.evaluation, asked.source
    text = opened(config, source, "evaluation", asked.path or settings.path)
    samples = RANDOM_TEXTS.get(source)
    draw = "random" if samples else "first"
    check_long_enough(text, folder, 1, settings.window, draw, EVALUATION)
    return TextRef(
        name=asked.name or name_of_text(source, text),
        source=source,
        digest=text.digest,
        window=settings.window,
        limit=settings.limit,
        draw=draw,
        samples=samples,
    )


def _shots_and_limits(
    settings: DictConfig, tasks: list[str]
) -> tuple[dict[str, int], dict[str, int]]:
    """Return examples in the prompt and most questions, of the tasks with settings of their own."""
    shots, limits = (
        {str(task): value for task, value in settings[key].items()} for key in ("shots", "limits")
    )
    for key, by_task, lowest in (("shots", shots, 0), ("limits", limits, 1)):
        for task, value in by_task.items():
            if task not in tasks:
                raise ConfigError(f"evaluation.{key}: {task} is not one of evaluation.tasks")
            if value < lowest:
                raise ConfigError(
                    f"evaluation.{key}: {task}: {value} is too few, give {lowest} or more"
                )
    study_shots = shots.get(STUDY_MMLU, settings.num_fewshot)
    if STUDY_MMLU in tasks and study_shots not in (None, MMLU_SHOTS):
        raise ConfigError(
            f"{STUDY_MMLU} shows {MMLU_SHOTS} examples, not {study_shots}; mmlu takes any number"
        )
    if settings.num_fewshot is not None:
        shots = {task: shots.get(task, settings.num_fewshot) for task in tasks}
    shots.pop(STUDY_MMLU, None)
    return shots, limits


def _resolve_tasks(config: DictConfig, facts: ModelFacts, folder: Path | None) -> Evaluation:
    """Return the tasks, their settings and their data sets, which are all available here."""
    settings = config.evaluation
    tasks = list(dict.fromkeys(settings.tasks))
    refuse_unknown("evaluation.chat", settings.chat, tuple(CHATS))
    shots, limits = _shots_and_limits(settings, tasks)
    include = absolute(settings.include_path)
    if include is not None and not include.is_dir():
        raise ConfigError(
            f"evaluation.include_path={settings.include_path} is not a folder with task files"
        )
    _check_tasks(tuple(tasks), include)
    if not tasks:
        if settings.name == "tasks":
            raise ConfigError("evaluation=tasks needs a list: evaluation.tasks=[piqa,mmlu]")
        _refuse_unread_length(settings)
        return Evaluation()
    template = ""
    if settings.chat != PLAIN_CHAT:
        template = chat_template(config.model.source, config.model.revision, folder)
        if not template:
            where = folder or config.model.source
            raise ConfigError(
                f"evaluation.chat={settings.chat}: the tokenizer in {where} has no chat template"
            )
    task_limit = settings.limit if settings.task_limit is None else settings.task_limit
    identities, generating = _data_sets(
        tuple(tasks),
        tuple(sorted(shots.items())),
        tuple((task, limits.get(task, task_limit)) for task in tasks),
        include,
        data_folder(config),
        settings.max_gen_toks,
        facts.max_positions,
        bool(config.plan),
    )
    if not generating:
        _refuse_unread_length(settings)
    thinks = CHATS[settings.chat].thinking or (
        settings.chat == "template" and THINK_END in template
    )
    if thinks and generating and settings.max_gen_toks is None:
        raise ConfigError(
            f"evaluation.chat={settings.chat} needs evaluation.max_gen_toks=N, the most tokens of "
            f"a thought and its answer: the limit of {', '.join(generating)} is for an answer alone"
        )
    return Evaluation(
        tasks=tuple(
            TaskRef(name=task, shots=shots.get(task), limit=limits.get(task)) for task in tasks
        ),
        task_limit=task_limit,
        chat=None if settings.chat == PLAIN_CHAT else settings.chat,
        include=None if include is None else folder_digest(include),
        data=identities,
        generates=tuple(generating),
        max_gen_toks=settings.max_gen_toks,
        # Where a generated answer ends is not in the weights; a Hub revision covers that file.
        ends=end_tokens(folder) if generating and folder is not None else (),
        lm_eval=lm_eval_version(),
    )


def _refuse_unread_length(settings: DictConfig) -> None:
    if settings.max_gen_toks is not None:
        raise ConfigError(
            f"evaluation.max_gen_toks={settings.max_gen_toks}: none of evaluation.tasks generates "
            "text"
        )


@functools.cache
def _data_sets(
    tasks: tuple[str, ...],
    shots: tuple[tuple[str, int], ...],
    limits: tuple[tuple[str, int | None], ...],
    include: Path | None,
    folder: Path | None,
    most: int | None,
    window: int,
    plan: bool,
) -> tuple[dict[str, str], list[str]]:
    """Return each data set's commit or digest, and the tasks that generate text."""
    library = Library(folder, settle=True, include=include)
    generating = resolve_data_sets(
        tasks,
        library,
        shots=dict(shots),
        limits=dict(limits),
        include=include,
        most=most,
        window=window,
        downloads=not plan,
    )
    for source in sorted(library.files.not_pinned):
        print(
            f"q3q: {source} is not pinned: if it changes, finished trials still count as done; "
            "fresh=true runs them again",
            file=sys.stderr,
        )
    return dict(sorted(library.identities.items())), generating


@functools.cache
def _check_tasks(tasks: tuple[str, ...], include: Path | None) -> None:
    """Refuse unknown tasks at once; lm-eval's list takes seconds to load, so ask it last."""
    if include is None and TASKS.keys() >= set(tasks):
        return
    folders = [OWN_TASKS, *([include] if include else [])]
    for task in tasks:
        if task not in TASKS and not is_mentioned(task, folders):
            raise ConfigError(_no_task(task, [*TASKS, *task_names(folders)]))
    from q3q.evaluate.harness.task_files import refuse_namesakes, tasks_from

    if include is not None:
        refuse_namesakes(include, tasks)
    others = [task for task in tasks if task not in TASKS]
    names = [*TASKS, *tasks_from(folders, others).all_tasks]
    for task in tasks:
        if task not in names:
            raise ConfigError(_no_task(task, names))


def _no_task(task: str, names: list[str]) -> str:
    """Say what a name of no task may have meant: one of q3q's own table, if it is like one."""
    own = difflib.get_close_matches(task, TASKS, n=1, cutoff=0.75)
    return f"evaluation.tasks: {task} is not a task of lm-eval{nearest(task, own or names)}".strip()
