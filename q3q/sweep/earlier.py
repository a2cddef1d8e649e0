"""Find what earlier runs left: finished trials, failed ones, and work that is to be done again."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress

from q3q.attempt import finished_record
from q3q.errors import UNREADABLE
from q3q.export.destination import export_fault
from q3q.placement import Trial
from q3q.record import TrialRecord
from q3q.storage.block_cache import stored_blocks


def finished_records(trials: Iterable[Trial]) -> dict[str, TrialRecord]:
    """Return the records of trials that have finished, by their ids."""
    records = {trial.id: finished_record(trial) for trial in trials}
    return {key: record for key, record in records.items() if record is not None}


def failed_records(trials: Iterable[Trial]) -> dict[str, TrialRecord]:
    """Return the records of trials whose last attempt failed."""
    records = {}
    for trial in trials:
        with suppress(*UNREADABLE):
            records[trial.id] = TrialRecord.load(trial.folder / "failed.json")
    return records


def damaged_exports(trials: Iterable[Trial]) -> Iterator[str]:
    """Yield a line for each trial that runs again because its finished export is damaged."""
    for trial in trials:
        if trial.spec.export is None or not (trial.folder / "record.json").is_file():
            continue
        if (fault := export_fault(trial)) is not None:
            yield f"The export of {trial.spec.label} is made again: {fault}."


def quantized_again(trials: Sequence[Trial], recent: Iterable[TrialRecord]) -> list[Trial]:
    """Return trials that quantize what a finished trial has, because its blocks were not kept."""
    done = {record.spec.quantization_id for record in recent if record.completed}
    return [
        trial
        for trial in trials
        if trial.spec.scheme and trial.spec.quantization_id in done
        if not stored_blocks(*trial.block_folders)
    ]
