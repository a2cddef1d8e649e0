"""A study's book-keeping: which trials are done, what a new record means to the tracker, the report at the end.

Everything durable is on disk before anybody is told: the tracker may die and be told later.
"""

import functools
import hashlib
import heapq
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from q3q.errors import ConfigError, IntegrityError, Q3QError, TrackingError
from q3q.models.facts import ModelFacts, read_facts
from q3q.models.hub import fetch_facts
from q3q.record import Progress, Sweep, TrialRecord
from q3q.spec import TrialSpec
from q3q.storage.claim import Claim, Holder, claim_or_refuse
from q3q.storage.mirror import Uploader, is_light, mirror_at
from q3q.sweep.background import BackgroundQueue
from q3q.sweep.comparing import NOT_COMPARED, baseline_record, compared
from q3q.track.tracker import Tracker

if TYPE_CHECKING:
    from q3q.report.write import Report


def study_id(specs: Iterable[TrialSpec]) -> str:
    """Ten hex digits; of this set of trials, in whatever order."""
    return hashlib.sha256(",".join(sorted(spec.id for spec in specs)).encode()).hexdigest()[:10]


@contextmanager
def sole_driver(
    specs: Sequence[TrialSpec], storage: str | Path, say: Callable[[str], object]
) -> Iterator[None]:
    """Be the only process that drives this set of trials in this storage, a folder or a URL.

    Raises:
        ConfigError: another one does.
    """

    def refuse(holder: Holder) -> ConfigError:
        return ConfigError(
            f"this sweep is at work already: {holder}. Watch it with python -m q3q.trials --storage {storage} attach; "
            "when it has ended, or died, the same command goes on"
        )

    mirror = mirror_at(str(storage))
    claim = Claim(
        Path(storage) / "running" if mirror is None else mirror.board("running"), study_id(specs)
    )
    claim_or_refuse(claim, refuse, say)
    try:
        yield
    finally:
        claim.release()


RECENT_RECORDS = 200  # that correct the cost model
TRY_AGAIN_SECONDS = 30.0  # after which a tracker that failed is asked again


@dataclass
class Study:
    """The trials of one command, each once, and what is known of them.

    note: where to say that something went wrong but nothing is lost. question, expectation: of a saved study.
    predicted: seconds of each trial still to run, by its id.
    courier: what brings records to a storage that is a URL. takes_exports: whether the tracker wants their files.

    Once it is open, the tracker is told in a thread of its own: a slow one holds up no trial.
    """

    name: str
    command: str
    config: str
    specs: Sequence[TrialSpec]
    storage: Path
    tracker: Tracker
    note: Callable[[str], None]
    records: dict[str, TrialRecord] = field(default_factory=dict)
    question: str = ""
    expectation: str = ""
    predicted: Mapping[str, float] = field(default_factory=dict)
    experiment: str = "q3q"
    courier: Uploader | None = None
    takes_exports: bool = False
    _sweep: Sweep | None = None
    _teller: BackgroundQueue = field(default_factory=BackgroundQueue)
    # Of trials at work, what is still to be told: steps, and what was measured there.
    _live: dict[str, list[tuple[int, dict[str, float]]]] = field(default_factory=dict)
    _owed: set[str] = field(default_factory=set)  # trials whose records the tracker did not take
    _silent_until: float = 0.0  # monotonic seconds; a tracker that failed is left alone until then

    @property
    def id(self) -> str:
        """Of this set of trials, in whatever order: the same command goes on in the same place."""
        return study_id(self.specs)

    def open(self) -> None:
        """Open the tracker's parent run, and tell it what it missed the last time.

        Raises:
            TrackingError: the store cannot be used. Nothing has started yet then.
        """
        from q3q.report.measures import trial_names

        self._sweep = Sweep(
            id=self.id,
            name=self.name,
            command=self.command,
            config=self.config,
            trials=tuple(self.specs),
            question=self.question,
            expectation=self.expectation,
            predicted=self._earlier_predictions() | dict(self.predicted),
            experiment=self.experiment,
            names=trial_names(self.specs),
        )
        self._sweep.save(self.storage)
        self.tracker.open(self._sweep)
        for record in list(self.records.values()):  # costs nothing where the tracker has it already
            self._tell_of(record if record.comparisons else self._compared(record))

    def progressed(self, spec: TrialSpec, event: Progress) -> None:
        """A trial is at work: its metrics so far go to the tracker at once."""
        metrics = {**event.metrics, **event.system}
        if self._silent or not metrics:
            return
        step = max(0, event.done - 1) if event.phase == "quantize" else 0  # blocks count from 0
        self._live.setdefault(spec.id, []).append((step, metrics))
        self._teller.do(("live", spec.id), self._tell_live, spec)

    def _tell_live(self, spec: TrialSpec) -> None:
        for step, metrics in self._live.pop(spec.id, []):
            if self._silent:
                return
            try:
                self.tracker.live(spec, metrics, step)
            except TrackingError as error:
                self._fail(error)

    def tick(self) -> None:
        """Called now and then: a tracker that failed is tried again after a while."""
        if self._silent and time.monotonic() >= self._silent_until:
            self._teller.do("reconcile", self._try_again)

    def _try_again(self) -> None:
        if self._silent and time.monotonic() >= self._silent_until:
            self._reconcile()

    @property
    def _silent(self) -> bool:
        """Whether the tracker is left alone: one that is down would cost every trial its time-out."""
        return self._silent_until > 0

    def _fail(self, error: TrackingError) -> None:
        if not self._silent:
            self.note(
                f"{error} Records stay on disk, and it is tried again every {TRY_AGAIN_SECONDS:g} s."
            )
        self._silent_until = time.monotonic() + TRY_AGAIN_SECONDS

    def _reconcile(self) -> bool:
        """Tell a tracker that failed all that it should know: it may have missed records, or come back empty."""
        assert self._sweep is not None
        try:
            self.tracker.check()
            self.tracker.open(self._sweep)
        except TrackingError as error:
            self._fail(error)
            return False
        self._silent_until = 0.0
        for record in list(self.records.values()):  # what it has already costs nothing
            self._track(record)
        if not self._silent:
            self.note("The tracker is back, and has been told what it missed.")
        return not self._silent

    def _earlier_predictions(self) -> dict[str, float]:
        """Of the same study when it was started before: what is done by now is not predicted again."""
        from q3q.report.records import predictions

        known = predictions(self.storage)
        return {spec.id: known[spec.id] for spec in self.specs if spec.id in known}

    def fetch(self, spec: TrialSpec) -> None:
        """Have here what a trial that has ended elsewhere left in the store; of a folder that is shared, nothing."""
        if self.courier is not None:
            self.courier.mirror.pull(f"trials/{spec.id}", only=is_light)
            if spec.export is not None and (
                name := self.courier.mirror.name_of(Path(spec.places["export"]))
            ):
                self.courier.mirror.pull(
                    name, only=(lambda one: True) if self.takes_exports else is_light
                )

    def _send(self, record: TrialRecord) -> None:
        if self.courier is not None:
            self.courier.add(
                *(f"trials/{record.spec.id}/{name}" for name in ("record.json", "failed.json"))
            )

    def take(self, record: TrialRecord) -> None:
        """A trial has ended; its record is on disk. One that has its baseline by now is compared with it."""
        self.records[record.spec.id] = record
        self._send(record)
        self._tell_of(self._compared(record))
        if not record.completed or record.spec.scheme is not None:
            return  # no other is compared with it
        for other in list(self.records.values()):
            if other.spec.places.get("baseline") == record.spec.id:
                before = other.comparisons
                if (now := self._compared(other)).comparisons != before:
                    self._tell_of(now)

    def _compared(self, record: TrialRecord) -> TrialRecord:
        """The record with its comparisons, saved, if its baseline is there; else as it is."""
        baseline = baseline_record(record.spec, self.records)
        if baseline is None or not record.completed or not record.files:
            return record
        notes = {key: value for key, value in record.notes.items() if key != NOT_COMPARED}
        try:
            found = compared(replace(record, notes=notes), baseline)
        except IntegrityError as error:
            self.note(f"{record.spec.name} cannot be compared with the unquantized model: {error}")
            found = replace(record, notes=notes | {NOT_COMPARED: str(error)})
        if found != record:
            found.save()
            self._send(found)
            self.records[record.spec.id] = found
        return found

    def close(self) -> "Report":
        """Write the report, tell the tracker, and say where it is."""
        from q3q.report.records import predictions
        from q3q.report.write import About, write_report

        ordered = [self.records[spec.id] for spec in self.specs if spec.id in self.records]
        missing = len(self.specs) - len(ordered)
        about = About(
            name=self.name,
            command=self.command,
            question=self.question,
            expectation=self.expectation,
            predicted=predictions(self.storage),
            warnings=[f"{missing} of the study's {len(self.specs)} trials have no record yet."]
            if missing
            else [],
        )
        report = write_report(ordered, self.storage / "reports" / f"{self.name}_{self.id}", about)
        finished = len(ordered) == len(self.specs) and all(record.completed for record in ordered)
        self._teller.settle(
            lambda left: self.note(f"the tracker is still to be told of {left} more")
        )
        if not self._close_tracker(report, finished):
            owed = (
                f"{len(self._owed)} records and the report are" if self._owed else "The report is"
            )
            self.note(
                f"{owed} on disk, not with the tracker; python -m q3q.track sync or the same command tells it."
            )
        return report

    def _close_tracker(self, report: "Report", finished: bool) -> bool:
        """Whether the tracker took it: at once, or after it was told everything anew (its store may be another)."""
        for known in (not self._silent, False):
            if not known and not self._reconcile():
                return False
            try:
                self.tracker.close(report.artifacts(), finished)
            except TrackingError as error:
                self._fail(error)
            else:
                return True
        return False

    def _tell_of(self, record: TrialRecord) -> None:
        self._teller.do(("record", record.spec.id), self._track, record)

    def _track(self, record: TrialRecord) -> None:
        from q3q.report.write import trial_artifacts

        self._owed.add(record.spec.id)
        if self._silent:
            return
        try:
            self.tracker.log(record, trial_artifacts(record))
        except TrackingError as error:
            self._fail(error)
        else:
            self._owed.discard(record.spec.id)


def recent_records(storage: Path, most: int = RECENT_RECORDS) -> Iterator[TrialRecord]:
    """The records of trials that finished last in a storage folder; those that cannot be read are passed over."""
    found = [(path.stat().st_mtime_ns, path) for path in (storage / "trials").glob("*/record.json")]
    for _, path in heapq.nlargest(most, found):
        with suppress(OSError, ValueError, KeyError, TypeError, Q3QError):
            yield TrialRecord.load(path)


def facts_of_spec(spec: TrialSpec) -> ModelFacts | None:
    """Facts of the model that a trial was of, None where nothing here tells them any more."""
    return _facts(spec.places.get("model"), spec.model.get("source"), spec.model.get("revision"))


@functools.cache
def _facts(folder: str | None, source: str | None, revision: str | None) -> ModelFacts | None:
    try:
        return (
            read_facts(Path(folder)) if folder is not None else fetch_facts(str(source), revision)
        )
    except (OSError, Q3QError):
        return None
