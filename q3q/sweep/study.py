"""A study's book-keeping: which trials are done, what a new record means to the tracker, the report at the end.

Everything durable is on disk before anybody is told: the tracker may die and be told later.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from q3q.errors import IntegrityError, TrackingError
from q3q.export.destination import is_finished
from q3q.record import COMPLETED, Progress, TrialRecord, trial_folder
from q3q.spec import TrialSpec
from q3q.track.tracker import Sweep, Tracker

if TYPE_CHECKING:
    from q3q.report.write import Report


@dataclass
class Study:
    """The trials of one command, each once, and what is known of them.

    note: where to say that something went wrong but nothing is lost. question, expectation: of a saved study.
    predicted: seconds of each trial still to run, by its id.
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
        sweep = Sweep(
            id=self.id,
            name=self.name,
            command=self.command,
            config=self.config,
            trials=tuple(self.specs),
            question=self.question,
            expectation=self.expectation,
            predicted=self._earlier_predictions() | dict(self.predicted),
            experiment=self.experiment,
        )
        sweep.save(self.storage)
        self.tracker.open(sweep)
        for record in list(self.records.values()):  # costs nothing where the tracker has it already
            self._track(record if record.comparisons else self._compared(record))

    def progressed(self, spec: TrialSpec, event: Progress) -> None:
        """A trial is at work: its metrics so far go to the tracker at once."""
        if not self._tracking or not (event.metrics or (event.phase == "quantize" and event.done)):
            return
        metrics = dict(event.metrics) or {"progress/blocks": float(event.done)}
        try:
            self.tracker.live(spec, metrics, event.done if event.phase == "quantize" else 0)
        except TrackingError as error:
            self._tracking = False
            self.note(f"{error} Records stay on disk; the same command logs them later.")

    def _earlier_predictions(self) -> dict[str, float]:
        """Of the same study when it was started before: what is done by now is not predicted again."""
        from q3q.report.records import predictions

        known = predictions(self.storage)
        return {spec.id: known[spec.id] for spec in self.specs if spec.id in known}

    def take(self, record: TrialRecord) -> None:
        """A trial has ended; its record is on disk. One that has its baseline by now is compared with it."""
        self.records[record.spec.id] = record
        self._track(self._compared(record))
        for other in list(self.records.values()):
            if record.completed and other.spec.places.get("baseline") == record.spec.id:
                before = other.comparisons
                if (now := self._compared(other)).comparisons != before:
                    self._track(now)

    def _compared(self, record: TrialRecord) -> TrialRecord:
        """The record with its comparisons, saved, if its baseline is there; else as it is."""
        baseline = baseline_record(record.spec, self.records)
        if baseline is None or not record.completed or not record.files:
            return record
        try:
            found = compared(record, baseline)
        except IntegrityError as error:
            self.note(f"{record.spec.name} cannot be compared with the unquantized model: {error}")
            return record
        if found != record:
            found.save()
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
            warnings=[f"{missing} of the study's {len(self.specs)} trials have no record yet."] if missing else [],
        )
        report = write_report(ordered, self.storage / "reports" / f"{self.name}_{self.id}", about)
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


def baseline_record(spec: TrialSpec, records: Mapping[str, TrialRecord]) -> TrialRecord | None:
    """The finished trial of the unquantized model that this one is compared with: of this study, or on disk."""
    wanted = spec.places.get("baseline")
    if wanted is None:
        return None
    known = records.get(wanted)
    if known is not None:
        return known if known.completed else None
    try:
        found = TrialRecord.load(Path(spec.places["trials"]) / wanted / "record.json")
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if found.completed and found.spec.id == wanted else None


def compared(record: TrialRecord, baseline: TrialRecord) -> TrialRecord:
    """The record with each of its metrics compared with the baseline's, sample by sample.

    Raises:
        IntegrityError: their samples are not the same ones, or a file of them is missing or damaged.
    """
    from q3q.evaluate.samples import SAMPLES, comparisons, measured, read_samples

    ours, theirs = (
        measured(read_samples(trial_folder(one.spec) / SAMPLES), bool(one.spec.evaluation.get("quick")))
        for one in (record, baseline)
    )
    return replace(record, comparisons=comparisons(ours, theirs))


def finished_record(spec: TrialSpec) -> TrialRecord | None:
    """The record of a trial that is done already, or None: not run, failed, not readable, or its export is gone."""
    path = trial_folder(spec) / "record.json"
    try:
        record = TrialRecord.load(path)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    # The identity of a record is recomputed, not read: a file in the wrong folder is nobody's result.
    done = record.status == COMPLETED and record.spec.id == spec.id and is_finished(spec)
    return record if done else None
