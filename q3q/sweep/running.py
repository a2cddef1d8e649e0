"""A study while its trials run: tracked, shown to the person at the terminal, and reported."""

import shlex
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from q3q.ending import ENDINGS, begin_farewell, raise_again
from q3q.errors import SweepFailedError
from q3q.masking import masked
from q3q.placement import Trial
from q3q.record import Progress, Sweep, TrialRecord
from q3q.spec import TrialSpec
from q3q.storage.aside import telling
from q3q.storage.mirror import mirror_at
from q3q.storage.stores import folder_of, is_url
from q3q.storage.uploader import DRIVER_SECONDS, Uploader, uploading
from q3q.sweep.plan import Planned
from q3q.sweep.settings import StudySettings
from q3q.sweep.study import Study, study_id
from q3q.track.mlflow_sqlite import own_uri, read_uri
from q3q.track.tracker import DEFAULT_STORAGE

if TYPE_CHECKING:
    from q3q.report.about import Report
    from q3q.sweep.progress import Display
    from q3q.track.idle import IdleTracker
    from q3q.track.mlflow import MlflowTracker


class RunningStudy:
    """A study while its trials run, and what the person at the terminal sees of it."""

    def __init__(self, study: Study, display: "Display") -> None:
        self.study = study
        self.display = display
        self.interruption: BaseException | None = None

    @contextmanager
    def deferring_interrupts(self) -> Iterator[None]:
        """Defer the first Ctrl-C, SIGTERM or SIGHUP to the next tick, within a second.

        Python swallows what a signal's handler raises inside a callback of the garbage collector.
        A second signal is raised at once, except SIGHUP, which often comes twice.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def defer(number: int, frame: Any) -> None:
            if self.interruption is not None:
                raise self.interruption
            self.interruption = (
                KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
            )
            begin_farewell()

        before = {number: signal.getsignal(number) for number in (signal.SIGINT, *ENDINGS)}
        if before[signal.SIGHUP] == signal.SIG_IGN:  # under nohup
            del before[signal.SIGHUP]
        for number in before:
            signal.signal(number, defer)
        try:
            yield
        finally:
            for number, handler in before.items():
                if signal.getsignal(number) is defer:
                    signal.signal(number, handler)

    def tick(self) -> None:
        """Give the tracker its turn; raise a deferred interrupt."""
        raise_again()
        self.study.tick()
        if self.interruption is not None:
            raise self.interruption

    def name_of(self, spec: TrialSpec) -> str:
        """Return the name of one of the study's trials, which no other one has."""
        return self.study.sweep.names.get(spec.id, spec.label)

    def progressed(self, spec: TrialSpec, event: Progress) -> None:
        raise_again()
        self.display.event(event)
        self.study.progressed(spec, event)

    def finished(self, record: TrialRecord, seconds: float = 0.0) -> None:
        self.study.take(record)
        self.display.finished(record, seconds)


@contextmanager
def tracked(
    trials: Sequence[Trial],
    left: Sequence[Planned],
    finished: Mapping[str, TrialRecord],
    failed: Mapping[str, TrialRecord],
    settings: StudySettings,
    command: str,
    wait_until_ready: Callable[[], None],
) -> Iterator[RunningStudy]:
    """Track and show what runs inside; at the end, however it ends, write and print the report.

    Args:
        left: trials that are to run.
        finished, failed: records of the others, by trial id.
        wait_until_ready: called before the tracker opens a run; raises if trials cannot run.

    Raises:
        TrackingError: the tracker cannot be used; nothing has started.
        SweepFailedError: some trials failed.
    """
    from q3q.storage.status import StatusWriter
    from q3q.sweep.progress import Display

    sweep = _sweep_of(trials, left, settings, command)
    tracker = _tracker_of(sweep, settings, wait_until_ready if left else None)
    show_notes(settings)
    if settings.fresh:
        _forget_kept_blocks(trials)
    storage, records = folder_of(settings.storage), {**failed, **finished}
    with (
        _uploader(settings.storage, finished) as uploader,
        Display(
            total=len(left), publisher=StatusWriter(storage, sweep.name, sweep.command)
        ) as display,
    ):
        study = Study(
            sweep, storage, tracker, display.note, records, uploader, settings.register is not None
        )
        with study.tracked():
            study.open()
            _say_what_is_finished(finished, study, display)
            with _closing(study) as ending, telling(display.note):
                yield RunningStudy(study, display)
    _print_report(ending.report, study, tracker, settings.storage)
    if ending.interruption is not None:
        print(
            f"Interrupted: {len(study.records)} of {len(trials)} trials are recorded; the same "
            "command continues."
        )
        raise ending.interruption
    _raise_failures(study, left)


def _sweep_of(
    trials: Sequence[Trial], left: Sequence[Planned], settings: StudySettings, command: str
) -> Sweep:
    name = settings.name or _name_of(trials)
    return Sweep(
        id=study_id(trials),
        name=name,
        command=masked(command),
        config=settings.config,
        trials=tuple(trials),
        question=settings.question,
        expectation=settings.expectation,
        predicted={entry.trial.id: entry.seconds for entry in left},
        experiment=settings.experiment or settings.name or "q3q",
    )


def _tracker_of(
    sweep: Sweep, settings: StudySettings, wait_until_ready: Callable[[], None] | None
) -> "MlflowTracker | IdleTracker":
    """Return the tracker.

    Args:
        wait_until_ready: see `tracked`; None if nothing is to run.
    """
    from q3q.track.idle import IdleTracker
    from q3q.track.mlflow import MlflowTracker

    mlflow = MlflowTracker(
        settings.tracking_uri, settings.storage, sweep.experiment, settings.register
    )
    if wait_until_ready is None:
        return IdleTracker(mlflow)
    mlflow.check()
    for line in mlflow.remarks():
        print(line, file=sys.stderr)
    wait_until_ready()  # a cluster that does not answer must not leave an open run behind
    return mlflow


def _say_what_is_finished(
    finished: Mapping[str, TrialRecord], study: Study, display: "Display"
) -> None:
    if finished:
        display.skipped([study.sweep.names[key] for key in finished])
    if unchecked := sum(record.unchecked for record in finished.values()):
        display.note(
            f"{unchecked} of the finished trials are from an older version, which kept no "
            "checksum of their samples: damage to the samples may go unnoticed. "
            "fresh=true measures them again"
        )


@dataclass
class _Ending:
    """How a study ended.

    interruption: what asked it to end early; None if nothing did
    """

    report: "Report" = field(init=False)
    interruption: BaseException | None = None


@contextmanager
def _closing(study: Study) -> Iterator[_Ending]:
    """Close a study, however it ends, so that what is finished is reported.

    An interruption is kept, to be raised again after the report.
    """
    ending = _Ending()
    try:
        yield ending
    except (KeyboardInterrupt, SystemExit) as error:  # SystemExit: SIGTERM or SIGHUP
        ending.interruption = error
        begin_farewell()
    except BaseException:
        study.close()
        raise
    ending.report = study.close()


def _raise_failures(study: Study, left: Sequence[Planned]) -> None:
    """Name the trials that ran and failed.

    Raises:
        SweepFailedError: there are some.
    """
    ran = [study.records.get(entry.trial.id) for entry in left]
    failures = [record for record in ran if record is not None and not record.completed]
    for record in failures:
        name = study.sweep.names[record.spec.id]
        print(f"FAILED {name}: {record.reason}", file=sys.stderr)
    if failures:
        raise SweepFailedError(
            f"{len(failures)} of {len(study.sweep.trials)} trials failed; the same command tries "
            "them again"
        )


def _print_report(
    report: "Report", study: Study, tracker: "MlflowTracker | IdleTracker", storage: str
) -> None:
    from q3q.report.checkpoints import checkpoint_lines

    print(report.text)
    print("", *checkpoint_lines(list(study.records.values())), sep="\n")
    print(f"Report and plots: {report.folder}")
    print(_where_to_browse(tracker))
    if is_url(storage):
        print(_where_records_are(tracker, masked(storage)))


def show_notes(settings: StudySettings) -> None:
    for line in settings.notes:
        print(f"q3q: {line}", file=sys.stderr)


def _name_of(trials: Sequence[Trial]) -> str:
    methods = list(dict.fromkeys(trial.spec.method.name for trial in trials))
    return "+".join([method for method in methods if method != "none"] or methods)


def _forget_kept_blocks(trials: Iterable[Trial]) -> None:
    for trial in trials:
        trial.placement.block_cache.delete(trial.spec.quantization_id)


def _where_to_browse(tracker: "MlflowTracker | IdleTracker") -> str:
    uri, page = masked(tracker.uri), tracker.page
    if not uri.startswith("sqlite"):
        return f"MLflow: {uri}/{page}"
    command = shlex.join(["mlflow", "ui", "--backend-store-uri", uri])
    if uri == read_uri(own_uri(folder_of(DEFAULT_STORAGE)))[0]:  # what the Makefile serves
        command = f"make ui (or: {command})"
    return f"MLflow: {command}, then http://127.0.0.1:5000/{page}"


def _where_records_are(tracker: "MlflowTracker | IdleTracker", storage: str) -> str:
    note = "; MLflow's database is on this machine alone, track.uri= names a shared one"
    return f"Records and report are in {storage}{note if tracker.uri.startswith('sqlite') else ''}."


@contextmanager
def _uploader(storage: str, finished: Mapping[str, TrialRecord]) -> Iterator[Uploader | None]:
    """Upload a driver's files to a storage that is a URL; yield None for a folder."""
    mirror = mirror_at(storage)
    if mirror is None:
        yield None
        return
    with uploading(mirror, "sweeps", "reports", "running", every=DRIVER_SECONDS) as uploader:
        # Files that a worker of this machine wrote, but died before it uploaded them.
        uploader.add(*(f"trials/{trial}" for trial in finished))
        yield uploader
