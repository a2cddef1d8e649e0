"""A study's book-keeping: which trials are done, what a new record means to the tracker, the report at the end.

Everything durable is on disk before anybody is told: the tracker may die and be told later.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from q3q.errors import TrackingError
from q3q.record import COMPLETED, TrialRecord, trial_folder
from q3q.spec import TrialSpec
from q3q.track.tracker import Sweep, Tracker

if TYPE_CHECKING:
    from q3q.report.write import Report


@dataclass
class Study:
    """The trials of one command, each once, and what is known of them.

    note: where to say that something went wrong but nothing is lost.
    """

    name: str
    command: str
    config: str
    specs: Sequence[TrialSpec]
    storage: Path
    tracker: Tracker
    note: Callable[[str], None]
    records: dict[str, TrialRecord] = field(default_factory=dict)
    _tracking: bool = True  # no longer, once the tracker has failed

    @property
    def id(self) -> str:
        """Of this set of trials, in whatever order: the same command goes on in the same place."""
        return hashlib.sha256(",".join(sorted(spec.id for spec in self.specs)).encode()).hexdigest()[:10]

    def open(self) -> None:
        """Open the tracker's parent run, and tell it what it missed the last time.

        Raises:
            TrackingError: the store cannot be used. Nothing has started yet then.
        """
        sweep = Sweep(id=self.id, name=self.name, command=self.command, config=self.config, trials=tuple(self.specs))
        self.tracker.open(sweep)
        for record in self.records.values():  # costs nothing where the tracker has it already
            self._track(record)

    def take(self, record: TrialRecord) -> None:
        """A trial has ended; its record is on disk."""
        self.records[record.spec.id] = record
        self._track(record)

    def close(self) -> "Report":
        """Write the report, tell the tracker, and say where it is."""
        from q3q.report.write import write_report

        ordered = [self.records[spec.id] for spec in self.specs if spec.id in self.records]
        report = write_report(ordered, self.storage / "reports" / f"{self.name}_{self.id}", self.command)
        finished = len(ordered) == len(self.specs) and all(record.completed for record in ordered)
        try:
            self.tracker.close(report.artifacts(), finished)
        except TrackingError as error:
            self.note(f"{error} The report is on disk; the same command tells the tracker later.")
        return report

    def _track(self, record: TrialRecord) -> None:
        from q3q.report.write import trial_artifacts

        if not self._tracking:
            return
        try:
            self.tracker.log(record, trial_artifacts(record))
        except TrackingError as error:
            self._tracking = False  # one that is down would cost every trial its time-out
            self.note(f"{error} Records stay on disk; the same command logs them later.")


def finished_record(spec: TrialSpec) -> TrialRecord | None:
    """The record of a trial that is done already, or None: not run, failed, or not readable."""
    path = trial_folder(spec) / "record.json"
    try:
        record = TrialRecord.load(path)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    # The identity of a record is recomputed, not read: a file in the wrong folder is nobody's result.
    return record if record.status == COMPLETED and record.spec.id == spec.id else None
