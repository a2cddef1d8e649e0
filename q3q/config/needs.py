"""What a config needs from the Hub, read off it without resolving it to a trial."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from q3q.config.budget import asks_for_budget
from q3q.config.judged import as_candidate, as_reference, is_judged
from q3q.config.schemes import asks_for_factors
from q3q.config.texts import absolute, data_folder, evaluated_texts
from q3q.data.needs import ModelNeed, Need, QuestionsNeed, TextNeed
from q3q.data.questions import Library
from q3q.data.repositories import DataSet
from q3q.data.texts import is_from_hub
from q3q.errors import Q3QError, UnavailableError
from q3q.evaluate.catalogue import TASKS
from q3q.evaluate.data_sets import resolve_data_sets
from q3q.formatting import bytes_in_words
from q3q.quantize.methods.settings import MethodSettings
from q3q.quoting import module
from q3q.reporter import Steps, no_steps
from q3q.spec import MIX


@dataclass(frozen=True)
class TaskNeed:
    """The data sets of a task that only lm-eval knows, which has to load them to name them."""

    task: str
    include: Path | None
    folder: Path | None

    @property
    def name(self) -> str:
        return f"data of task {self.task}"

    def missing(self) -> int | None:
        """Return None: nobody knows before it is loaded."""
        return None

    def fetch(self, steps: Steps) -> None:
        """Load the task, which downloads what it reads.

        Raises:
            ConfigError: something is not available, or the task cannot be loaded.
        """
        library = Library(self.folder, settle=True, include=self.include)
        resolve_data_sets([self.task], library, include=self.include, most=1)


AnyNeed = Need | TaskNeed


def needs_of(config: DictConfig) -> list[AnyNeed]:
    """Return what trials of a composed config need from the Hub, with no repeats."""
    evaluation, folder = config.evaluation, data_folder(config)
    needs: list[AnyNeed] = []
    both = (as_candidate(config), as_reference(config)) if is_judged(config) else (config,)
    needs += [
        ModelNeed(trial_config.model.source, trial_config.model.revision)
        for trial_config in both
        if trial_config.model.path is None and trial_config.model.source is not None
    ]
    settings: MethodSettings = OmegaConf.to_object(config.method)  # type: ignore[assignment]
    if settings.quantizes and (
        settings.observes() or asks_for_budget(config) or asks_for_factors(config)
    ):
        mixed = config.calibration.source == MIX
        sources = config.calibration.mix if mixed else [config.calibration.source]
        needs += [
            TextNeed(str(source), "calibration", folder)
            for source in sources
            if is_from_hub(source)
        ]
    needs += [
        TextNeed(text.source, "evaluation", folder)
        for text in evaluated_texts(evaluation)
        if is_from_hub(text.source)
    ]
    by_repository: dict[str, dict[DataSet, None]] = {}
    for task in evaluation.tasks:
        for data in TASKS[task].data if task in TASKS else ():
            by_repository.setdefault(data.repository, {})[data] = None
    needs += [
        QuestionsNeed(repository, tuple(sorted(files, key=str)), folder)
        for repository, files in by_repository.items()
    ]
    own = absolute(evaluation.include_path)
    needs += [TaskNeed(task, own, folder) for task in evaluation.tasks if task not in TASKS]
    return list(dict.fromkeys(needs))


def union(needs: Iterable[AnyNeed]) -> list[AnyNeed]:
    """Return needs of several configs: configurations of one repository are one need."""
    merged: dict[object, AnyNeed] = {}
    for need in needs:
        if not isinstance(need, QuestionsNeed):
            merged[need] = need
            continue
        key = (need.repository, need.folder)
        before = merged.get(key)
        already = before.configurations if isinstance(before, QuestionsNeed) else ()
        both = tuple(dict.fromkeys((*already, *need.configurations)))
        merged[key] = QuestionsNeed(need.repository, both, need.folder)
    return list(merged.values())


def to_download(needs: Iterable[AnyNeed], command: str) -> str:
    """Return lines about what is not here: its size, or why it is not available; else nothing."""
    lines, total, lost, texts = [], 0, [], False
    for need in needs:
        try:
            missing = need.missing()
        except Q3QError as error:
            lost.append(str(error))
            texts |= isinstance(need, TextNeed)
            continue
        if missing:
            total += missing
            lines.append(f"{need.name} ({bytes_in_words(missing)})")
            texts |= isinstance(need, TextNeed)
    said = []
    if lines:
        fetched = f"{command} downloads it and starts nothing"
        said.append(f"To download: {', '.join(lines)}; {bytes_in_words(total)} in all. {fetched}.")
    if texts:
        said.append("A trial's id is known once its texts are here.")
    return "\n".join([*said, *(f"Missing: {line}" for line in lost)])


def everything_unavailable(
    needs: Iterable[AnyNeed], first: UnavailableError, command: str
) -> UnavailableError:
    """Return an error that names everything that is neither here nor available.

    Args:
        first: what was found missing first.
    """
    lines: dict[str, None] = {}
    for need in needs:
        try:
            if need.missing() is None:
                need.fetch(no_steps)
        except Q3QError as error:
            lines[str(error)] = None
    if len(lines) < 2:
        return first
    return UnavailableError(
        f"{len(lines)} things are missing. Where there is a network, {command} fetches them all:\n"
        + "\n".join(f"  {line}" for line in lines)
    )


def fetching(words: Iterable[str], sweep: bool) -> str:
    """Return the command that fetches what a command line needs."""
    needed = (word for word in words if not word.startswith("plan="))
    return module("q3q.fetch", *(["-m"] if sweep else []), *needed)
