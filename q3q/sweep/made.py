"""What trials of a storage folder make once: quantized blocks, sensitivities, traces, windows of
tokens, requests.

A plan asks what of it is there already, and lets each trial make only what none before it makes.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from q3q.data.calibration import calibration_identity, drawing
from q3q.data.prepared import FOLDER, kept_identities
from q3q.data.traces import FOLDER as TRACES
from q3q.data.traces import part_identity
from q3q.data.windows import evaluation_identity
from q3q.evaluate.batches import batches
from q3q.evaluate.identities import requests_identity, says_all_of
from q3q.models.facts import ModelFacts
from q3q.placement import Trial
from q3q.quantize.budget.sensitivities import (
    SENSING,
    file_of,
    identity_of,
    kept_units,
    sharers_of,
)
from q3q.quantize.budget.units import units_of
from q3q.record import Progress
from q3q.spec import Json, TrialSpec, digest
from q3q.storage.block_cache import stored_blocks
from q3q.sweep.costs import Todo, questions_of, text_windows
from q3q.sweep.writing import parts_of, written_tokens

QUANTIZING = "quantize"  # the phase
# All phases of a trial, in their order.
ORDER = ("load", "baseline", SENSING, "calibrate", QUANTIZING, "evaluate", "export", "record")
TOKEN_BYTES = 4  # of a window's token on disk
QUESTION_BYTES = 1100  # of a question's requests; benchmarks/preparation.py, the study's suite


def made_for_others(trial: Trial) -> dict[str, str]:
    """Name what a trial makes that others of its sweep may use, with the phase that makes it.

    The first of them makes it, and the others wait for that phase's end.
    """
    spec, made = trial.spec, dict[str, str]()
    if spec.budget is not None:
        made[sharers_of(spec)] = SENSING
    if spec.schemes is not None and trial.placement.shares_blocks:
        made[spec.quantization_id] = QUANTIZING
    return made


def until(phase: str) -> tuple[str, ...]:
    """Return the phases from a trial's start to this one's end."""
    return ORDER[: ORDER.index(phase) + 1]


def is_over(phase: str, event: Progress) -> bool:
    """Tell from what a trial reports whether this phase of it has ended.

    By then, what it made is on the disk, in the store if there is one, and claimed by nobody.
    """
    return event.phase in ORDER and event.phase not in until(phase)


@dataclass(frozen=True)
class PreparedFile:
    """One file of prepared input.

    calibration: it holds windows that only a quantization reads: calibration's, or a budget's
    questions: whose requests it holds
    """

    identity: Json
    size: int
    calibration: bool = False
    questions: int = 0


def inputs_of(spec: TrialSpec) -> Iterator[PreparedFile]:
    """Yield all prepared input that a trial reads."""
    evaluation = spec.evaluation
    for drawn_spec in drawing(spec):
        if (calibration := drawn_spec.calibration) is not None and not calibration.writes:
            identity = calibration_identity(calibration, drawn_spec.seed)
            yield PreparedFile(identity, TOKEN_BYTES * calibration.tokens, calibration=True)
    for text in evaluation.texts:
        identity = evaluation_identity(text, evaluation.quick)
        yield PreparedFile(identity, TOKEN_BYTES * text_windows(text) * text.window)
    for batch in batches(evaluation):
        tasks = [task for task in evaluation.tasks if task.name in batch.tasks]
        count = sum(questions_of(task, evaluation) for task in tasks)
        identity = requests_identity(evaluation, batch, spec.seed)
        yield PreparedFile(identity, QUESTION_BYTES * count, questions=count)


@dataclass
class Made:
    """What storage folders hold, and what the trials of a plan so far will add.

    fresh: no blocks that are there count, because the study deletes them (fresh=true)
    """

    fresh: bool = False
    _identities: dict[Path, list[Json]] = field(default_factory=dict)
    _inputs: set[tuple[str, str]] = field(default_factory=set)
    _quantizations: set[str] = field(default_factory=set)
    _sensitivities: set[Path] = field(default_factory=set)

    def add(self, trial: Trial, facts: ModelFacts) -> tuple[Todo, int]:
        """Add what a trial will make; return it, and the bytes of its prepared input."""
        blocks = self._blocks_to_make(trial, facts)
        # Without a block to make it reads no calibration windows, so a later trial may draw them.
        read = [
            prepared for prepared in inputs_of(trial.spec) if blocks > 0 or not prepared.calibration
        ]
        missing = [prepared for prepared in read if self._is_new(trial, prepared.identity)]
        drawn = any(prepared.calibration for prepared in missing)
        todo = Todo(
            blocks=blocks,
            draws=drawn,
            questions=sum(prepared.questions for prepared in missing),
            units=self._units_to_measure(trial, facts, blocks),
            writes=self._part_to_write(trial, facts, blocks),
        )
        written = round(todo.writes * TOKEN_BYTES * written_tokens(trial.spec))
        return todo, written + sum(prepared.size for prepared in missing)

    def _blocks_to_make(self, trial: Trial, facts: ModelFacts) -> float:
        """Return the part of a trial's blocks that it quantizes itself."""
        if trial.spec.schemes is None:
            return 1.0
        name = trial.spec.quantization_id
        if name in self._quantizations:
            return 0.0
        if trial.placement.shares_blocks:
            self._quantizations.add(name)
        if self.fresh:
            return 1.0
        there = stored_blocks(*trial.block_folders)
        return max(0.0, 1.0 - there / facts.layers)

    def _units_to_measure(self, trial: Trial, facts: ModelFacts, blocks: float) -> float:
        """Return the part of a budget's units whose sensitivities a trial measures itself.

        Blocks that are there have their widths beside them.
        """
        if trial.spec.budget is None:
            return 1.0
        if not blocks:
            return 0.0
        units = units_of(trial.spec, facts)
        identity = identity_of(trial.spec, units)
        path = file_of(trial.placement.storage, identity)
        if path in self._sensitivities:
            return 0.0
        self._sensitivities.add(path)
        return 1.0 - kept_units(path, identity) / len(units)

    def _part_to_write(self, trial: Trial, facts: ModelFacts, blocks: float) -> float:
        """Return the part of a trial's windows of traces that its model writes."""
        parts = parts_of(trial.spec, facts)
        if not parts:
            return 1.0
        if not blocks:
            return 0.0
        new = [
            len(numbers)
            for traces, numbers in parts
            if self._is_new(trial, part_identity(trial.spec, traces, numbers), TRACES)
        ]
        return sum(new) / sum(len(numbers) for _, numbers in parts)

    def _is_new(self, trial: Trial, identity: Json, name: str = FOLDER) -> bool:
        """Note that a trial reads prepared input or traces; return True if it has to make it.

        A plan loads no tokenizer: models with the same files have the same one, and what lies there
        of an equal identity is taken for theirs.
        """
        folder = trial.placement.storage / name
        if folder not in self._identities:
            self._identities[folder] = list(kept_identities(folder).values())
        key = (trial.spec.model.files, digest(identity))
        seen = key in self._inputs
        self._inputs.add(key)
        lying = self._identities[folder]
        return not seen and not any(says_all_of(whole, [identity]) for whole in lying)
