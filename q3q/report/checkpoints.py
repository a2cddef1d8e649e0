"""The checkpoints that trials exported: where each lies, its size, and what a loader took."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from q3q.export.use import Use
from q3q.formatting import bytes_in_words
from q3q.record import TrialRecord
from q3q.report.tables import Table
from q3q.storage.stores import is_url

MOST_LINES = 12  # of checkpoints at the end of a run
NOTE = (
    "Weights: bytes of the tensors. Memory and speed were measured once, in the process that "
    "proves the checkpoint, on the machine that ran the trial; other runtimes may differ."
)


def exported(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Return the completed records of trials that exported a checkpoint."""
    return [record for record in records if record.completed and "export" in record.notes]


def folder_of(record: TrialRecord) -> str:
    """Return the checkpoint's folder on this machine, or its URL."""
    path, placed = str(record.notes["export"]["path"]), record.placement.export
    return path if is_url(path) or placed is None else str(placed)


def checkpoint_lines(records: Sequence[TrialRecord]) -> Iterator[str]:
    """Yield a line for a terminal for each checkpoint, but not for hundreds of them."""
    checkpoints = exported(records)
    for record in checkpoints[:MOST_LINES]:
        yield f"Checkpoint of {record.spec.label}: {folder_of(record)} ({_size(record)})"
    if (more := len(checkpoints) - MOST_LINES) > 0:
        yield f"... and {more} more; python -m q3q.trials lists them all"


def checkpoint_tables(records: Sequence[TrialRecord]) -> list[Table]:
    """Return a table of the checkpoints; none if no trial exported one."""
    rows = tuple(_row(record) for record in exported(records))
    if not rows:
        return []
    columns = ("checkpoint", "on disk", "weights", "memory", "tokens/s", "folder")
    return [Table("Exported checkpoints", columns, rows, NOTE)]


def _row(record: TrialRecord) -> tuple[str, ...]:
    use = Use.of_note(record.notes["export"].get("use"))
    weights = record.metrics.get("export_bytes")
    return (
        record.spec.label,
        _size(record),
        "not recorded" if weights is None else bytes_in_words(weights),
        "not measured" if use is None else use.memory_in_words,
        "not measured" if use is None else use.speed_in_words,
        _place(record),
    )


def _size(record: TrialRecord) -> str:
    """Return the size of all files on disk; of old records, of the tensors."""
    size = record.notes["export"].get("disk_bytes", record.metrics.get("export_bytes"))
    return "size not recorded" if size is None else bytes_in_words(size)


def _place(record: TrialRecord) -> str:
    """Return the folder as it is named from the storage folder, if it lies there."""
    folder, storage = folder_of(record), record.placement.storage
    if not is_url(folder) and Path(folder).is_relative_to(storage):
        return f"{Path(folder).relative_to(storage)} in the storage folder"
    return folder
