"""A study's books: its trials and records, what the tracker receives, the report at the end.

A record is on disk before the tracker receives it: a tracker that is down learns it later.
"""

import errno
import heapq
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from q3q.canonical import sha256
from q3q.errors import (
    UNREADABLE,
    ConfigError,
    IntegrityError,
    NotRegisteredError,
    RefusedByTrackerError,
    SweepFailedError,
    TrackingError,
)
from q3q.export.marker import CARD
from q3q.export.measured import Measured, update_card
from q3q.names import trial_names
from q3q.placement import Trial
from q3q.quoting import module
from q3q.record import Progress, Sweep, TrialRecord
from q3q.spec import TrialSpec
from q3q.storage.aside import clear_for_folder
from q3q.storage.claim import Claim, Holder, claim_or_refuse
from q3q.storage.files import flush_folder
from q3q.storage.mirror import is_light, mirror_at
from q3q.storage.uploader import Uploader
from q3q.sweep.background import BackgroundQueue
from q3q.sweep.comparing import NOT_COMPARED, baseline_record, compared, is_current
from q3q.track.tracker import Tracker

if TYPE_CHECKING:
    from q3q.report.about import Report

RECENT_RECORDS = 200  # that correct the cost model
TRY_AGAIN_SECONDS = 30.0  # between two tries of a tracker that failed


def study_id(trials: Iterable[Trial]) -> str:
    """Return ten hex digits for this set of trials, in whatever order."""
    return sha256(",".join(sorted(trial.id for trial in trials)))[:10]


@contextmanager
def sole_driver(
    trials: Sequence[Trial], storage: str | Path, say: Callable[[str], object]
) -> Iterator[None]:
    """Be the only process that drives this set of trials in this storage, a folder or a URL.

    Raises:
        ConfigError: another process does.
    """

    def refuse(holder: Holder) -> ConfigError:
        return ConfigError(
            f"this sweep is running already: {holder}. Watch it with "
            f"{module('q3q.trials', '--storage', str(storage), 'attach')}; when it has ended, or "
            "died, the same command continues"
        )

    mirror = mirror_at(str(storage))
    folder = Path(storage) / "running" if mirror is None else mirror.claim_store("running")
    claim = Claim(folder, study_id(trials))
    claim_or_refuse(claim, refuse, say)
    try:
        yield
    finally:
        claim.release()


@dataclass
class Study:
    """The trials of one command, each once, and their records so far.

    sweep: what is filed; `open` adds the trials' names and earlier predictions
    note: shows a line to the user where something went wrong but nothing is lost
    uploader: uploads records to a storage that is a URL
    takes_exports: the tracker wants the files of exports

    Once the study is open, a thread of its own tells the tracker: a slow one holds up no trial.
    """

    sweep: Sweep
    storage: Path
    tracker: Tracker
    note: Callable[[str], None]
    records: dict[str, TrialRecord] = field(default_factory=dict)
    uploader: Uploader | None = None
    takes_exports: bool = False
    _queue: BackgroundQueue = field(default_factory=BackgroundQueue)
    # Metrics of running trials that the tracker has not received, with their steps.
    _live: dict[str, list[tuple[int, dict[str, float]]]] = field(default_factory=dict)
    _owed: set[str] = field(default_factory=set)  # trials whose records the tracker did not take
    _silent_until: float = 0.0  # monotonic seconds; a tracker that failed is left alone until then
    _opened: bool = False  # the tracker's run is open

    @contextmanager
    def tracked(self) -> Iterator[None]:
        """End the tracker's run at the end, also if `close` is never called, or fails."""
        try:
            yield
        finally:
            if self._opened:
                with suppress(Exception):  # the one that ends the study is what people must see
                    self._queue.settle()
                with suppress(TrackingError):
                    self.tracker.close({}, succeeded=False)

    def open(self) -> None:
        """Open the tracker's parent run, and send it what it missed the last time.

        Raises:
            TrackingError: the store cannot be used. Nothing has started yet.
        """
        from q3q.report.records import predictions

        trials, earlier = self.sweep.trials, predictions(self.storage)
        predicted = {trial.id: earlier[trial.id] for trial in trials if trial.id in earlier}
        self.sweep = replace(
            self.sweep,
            predicted=predicted | self.sweep.predicted,
            names=trial_names([trial.spec for trial in trials]),
        )
        flush_folder(self.storage.absolute().parent)  # whoever made the storage folder
        self.sweep.save(self.storage)
        self._opened = True  # opening may fail half-way
        self.tracker.open(self.sweep)
        self._relay()
        for record in list(self.records.values()):  # costs nothing where the tracker has it
            current = is_current(record, baseline_record(record.trial, self.records))
            self._enqueue(record if current else self._compared(record))

    def progressed(self, spec: TrialSpec, event: Progress) -> None:
        """Send a running trial's metrics to the tracker at once."""
        metrics = {**event.metrics, **event.system}
        if self._silent or not metrics:
            return
        step = max(0, event.done - 1) if event.phase == "quantize" else 0  # blocks count from 0
        self._live.setdefault(spec.id, []).append((step, metrics))
        self._queue.do(("live", spec.id), self._send_live, spec)

    def _send_live(self, spec: TrialSpec) -> None:
        for step, metrics in self._live.pop(spec.id, []):
            if self._silent:
                return
            try:
                self.tracker.live(spec, metrics, step)
            except RefusedByTrackerError:
                continue  # the record will be taken, or refused with a line
            except TrackingError as error:
                self._fail(error)

    def tick(self) -> None:
        """Try a tracker that failed again after a while; called about once a second."""
        if self._silent and time.monotonic() >= self._silent_until:
            self._queue.do("reconcile", self._try_again)

    def _try_again(self) -> None:
        if self._silent and time.monotonic() >= self._silent_until:
            self._reconcile()

    @property
    def _silent(self) -> bool:
        """Leave the tracker alone: one that is down would cost every trial its time-out."""
        return self._silent_until > 0

    def _relay(self) -> None:
        """Show what the tracker has to say."""
        for line in self.tracker.remarks():
            self.note(line)

    def _fail(self, error: TrackingError) -> None:
        if not self._silent:
            self.note(
                f"{error} Records stay on disk, and q3q tries again every {TRY_AGAIN_SECONDS:g} s."
            )
        self._silent_until = time.monotonic() + TRY_AGAIN_SECONDS

    def _reconcile(self) -> bool:
        """Send a tracker that failed all records: it may have missed some, or come back empty."""
        try:
            self.tracker.check()
            self.tracker.open(self.sweep)
        except TrackingError as error:
            self._fail(error)
            return False
        self._silent_until = 0.0
        for record in list(self.records.values()):  # costs nothing where the tracker has it
            self._track(record)
        if not self._silent:
            self.note("The tracker is back, and has received what it missed.")
        return not self._silent

    def fetch(self, trial: Trial) -> None:
        """Fetch what a trial that ended elsewhere left in the store."""
        if self.uploader is None:
            return
        mirror, export = self.uploader.mirror, trial.placement.export
        mirror.pull(f"trials/{trial.id}", only=is_light)
        if trial.spec.export and export is not None and (name := mirror.name_of(export)):
            mirror.pull(name, only=(lambda _: True) if self.takes_exports else is_light)

    def _upload(self, record: TrialRecord) -> None:
        if self.uploader is not None:
            folder = f"trials/{record.spec.id}"
            self.uploader.add(f"{folder}/record.json", f"{folder}/failed.json")

    def take(self, record: TrialRecord) -> None:
        """Take the record of a trial that ended, which is on disk; compare it with its baseline.

        A baseline's record makes comparisons possible for trials that ended before it.
        """
        self.records[record.spec.id] = record
        self._upload(record)
        self._enqueue(self._compared(record))
        if not record.completed or not record.spec.rounds_nothing:
            return  # no other trial is compared with it
        for other in list(self.records.values()):
            if other.placement.baseline == record.spec.id:
                now = self._compared(other)
                if now.comparisons != other.comparisons:
                    self._enqueue(now)

    def _compared(self, record: TrialRecord) -> TrialRecord:
        """Return the record with its comparisons, saved, if its baseline has finished."""
        baseline = baseline_record(record.trial, self.records)
        if baseline is None or not record.completed or not record.files:
            return record
        notes = {key: value for key, value in record.notes.items() if key != NOT_COMPARED}
        try:
            updated = compared(replace(record, notes=notes), baseline)
        except IntegrityError as error:
            name = self.sweep.names.get(record.spec.id, record.spec.label)
            self.note(f"{name} cannot be compared with the unquantized model: {error}")
            updated = replace(record, notes=notes | {NOT_COMPARED: str(error)})
        if updated != record:
            updated.save()
            self._upload(updated)
            self.records[record.spec.id] = updated
        self._complete_card(updated, baseline)
        return updated

    def _complete_card(self, record: TrialRecord, baseline: TrialRecord) -> None:
        """Put the unquantized model's numbers into the card of what the trial exported."""
        folder = record.placement.export
        if folder is None or "export" not in record.notes:
            return
        measured = Measured(
            metrics=record.metrics,
            intervals=record.intervals,
            diverged=record.diverged,
            unquantized=baseline.metrics,
            weights=record.metrics.get("export_bytes"),
            original=record.notes["export"].get("original_bytes"),
        )
        try:
            changed = update_card(folder, measured)
        except OSError as error:
            self.note(f"the card in {folder} keeps its numbers: {error.strerror}")
            return
        if changed and self.uploader and (name := self.uploader.mirror.name_of(folder)):
            self.uploader.add(f"{name}/{CARD}")

    def close(self) -> "Report":
        """Write the report, send it to the tracker, and return it."""
        from q3q.report.about import PLOTS
        from q3q.report.drawn import sweep_report

        sweep, ids = self.sweep, [trial.id for trial in self.sweep.trials]
        records = [self.records[key] for key in ids if key in self.records]
        folder = self.storage / "reports" / sweep.file_name
        try:
            for path in (folder.parent, folder, folder / PLOTS):
                clear_for_folder(path)
            report = sweep_report(sweep, records, self.storage)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise SweepFailedError(
                f"the report cannot be written to {folder} ({error}). Records are on disk; the "
                "same command writes it once that is fixed"
            ) from error
        finished = len(records) == len(ids) and all(record.completed for record in records)
        self._queue.settle(
            lambda left: self.note(f"the tracker has not received {left} records yet")
        )
        closed = self._close_tracker(report, finished)
        self._opened = False
        if not closed:
            owed = (
                f"{len(self._owed)} records and the report are" if self._owed else "The report is"
            )
            self.note(
                f"{owed} on disk, but not in the tracker yet; {self.tracker.sync} or the same "
                "command sends them."
            )
        return report

    def _close_tracker(self, report: "Report", finished: bool) -> bool:
        """Close the tracker's run; if that fails, send everything again (it may be a new store)."""
        for up_to_date in (not self._silent, False):
            if not up_to_date and not self._reconcile():
                return False
            try:
                self.tracker.close(report.artifacts(), finished, report.headline)
                self._relay()
            except TrackingError as error:
                self._fail(error)
            else:
                return True
        return False

    def _enqueue(self, record: TrialRecord) -> None:
        self._queue.do(("record", record.spec.id), self._track, record)

    def _track(self, record: TrialRecord) -> None:
        from q3q.report.drawn import TrialFiles

        self._owed.add(record.spec.id)
        if self._silent:
            return
        try:
            self.tracker.log(record, TrialFiles(record))
            self._relay()
        except RefusedByTrackerError as error:  # of this record alone: the next may be taken
            self.note(f"{error}. It stays on disk.")
        except TrackingError as error:
            self._fail(error)
        except NotRegisteredError as error:  # all else was taken
            self.note(str(error))
            self._owed.discard(record.spec.id)
        else:
            self._owed.discard(record.spec.id)


def recent_records(storage: Path) -> Iterator[TrialRecord]:
    """Yield the records of trials that finished last in a storage folder, if they can be read."""
    records = [
        (path.lstat().st_mtime_ns, path) for path in (storage / "trials").glob("*/record.json")
    ]
    for _, path in heapq.nlargest(RECENT_RECORDS, records):
        with suppress(*UNREADABLE):
            yield TrialRecord.load(path)
