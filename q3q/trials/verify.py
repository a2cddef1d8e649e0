"""`python -m q3q.trials verify`: read every record, its files and every export, byte by byte."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from q3q.errors import UNREADABLE
from q3q.evaluate.samples import damaged_files
from q3q.export.destination import export_fault, is_ours
from q3q.export.marker import digest_faults, marker_of, published_files
from q3q.formatting import plural
from q3q.record import TrialRecord
from q3q.report.records import RECORDS
from q3q.storage.mirror import mirror_at
from q3q.trials.stored import StoredTrial


@dataclass(frozen=True)
class Verified:
    """What `verify` found.

    faults: a line for each: what is wrong, and what to do
    notes: a line for each export of which nothing was recorded that could be compared
    records, exports: numbers of those that were checked
    """

    faults: tuple[str, ...]
    notes: tuple[str, ...]
    records: int
    exports: int

    @property
    def text(self) -> str:
        counts = f"{plural(self.records, 'record')} and {plural(self.exports, 'export')} checked"
        faults = plural(len(self.faults), "fault") if self.faults else "no faults"
        return "\n".join([*self.faults, *self.notes, f"{counts}: {faults}."])


def fetch_exports(storage: str) -> None:
    """Fetch the exports of a storage that is a URL, so that their bytes can be read."""
    mirror = mirror_at(storage)
    if mirror is not None:
        mirror.pull("exports")


def verified(trials: Sequence[StoredTrial], storage: Path, *, alone: bool = False) -> Verified:
    """Check these trials' records, the files that the records name, and their exports.

    Args:
        alone: leave out exports in the storage that belong to none of these trials.
    """
    faults, notes = list[str](), list[str]()
    records, exports = 0, set[Path]()
    for entry in trials:
        paths = [storage / "trials" / entry.id / name for name in RECORDS]
        present = [path for path in paths if os.path.lexists(path)]
        records += len(present)
        for path in present:
            faults += record_faults(path, entry.id)
        trial = entry.trial
        export = None if trial is None else trial.placement.export
        if trial is None or export is None or export in exports:
            continue
        if is_ours(export, trial.spec) and marker_of(export) is not None:
            exports.add(export)
            faults += export_faults(export)
            notes += _not_recorded(export)
        elif paths[0].is_file():  # the trial has finished, so its export should be there
            exports.add(export)
            remove = "what is there" if os.path.lexists(export) else ""
            faults.append(f"the export {export_fault(trial)}; {_again(entry.id, remove)}")
    others = [] if alone else sorted(path.parent for path in storage.glob("exports/*/q3q.json"))
    for export in (path.absolute() for path in others):
        if export not in exports and not export.name.endswith((".partial", ".aside")):
            exports.add(export)
            faults += export_faults(export)
            notes += _not_recorded(export)
    return Verified(tuple(faults), tuple(notes), records, len(exports))


def record_faults(path: Path, trial: str) -> Iterator[str]:
    """Yield in a line each what is wrong with a trial's record and the files that it names."""
    again = _again(trial)
    try:
        record = TrialRecord.load(path)
    except UNREADABLE as error:
        yield f"{path} cannot be read ({' '.join(str(error).split())[:200]}); {again}"
        return
    if record.spec.id != trial:
        yield f"{path} belongs to trial {record.spec.id}; {_again(trial, 'that file')}"
    for fault in damaged_files(record.files, path.parent).values():
        yield f"{fault}; {again}"


def export_faults(folder: Path) -> Iterator[str]:
    """Yield in a line each the files of an export that are not as they were published."""
    trial = (marker_of(folder) or {}).get("trial", "")
    for fault in digest_faults(folder):
        yield f"the export {folder}: {fault}; {_again(trial, 'the folder')}"


def _again(trial: str, remove: str = "") -> str:
    """Return instructions for rebuilding a damaged file.

    Args:
        remove: what has to be removed first, if anything has.
    """
    first = f"remove {remove}, then " if remove else ""
    return (
        f"to make it again, {first}run its sweep's command or python -m q3q.trials resume {trial}"
    )


def _not_recorded(folder: Path) -> list[str]:
    if published_files(folder) is not None:
        return []
    return [
        f"the export {folder}: an earlier version wrote it; sizes and digests are not recorded, "
        "so its bytes were not compared"
    ]
