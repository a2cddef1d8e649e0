"""Run a study (a trial, a sweep, trials to resume): plan, track, show, and report at the end."""

import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from q3q.attempt import afresh
from q3q.data.needs import fetch_weights
from q3q.ending import ENDINGS, begin_farewell, raise_again
from q3q.environment import now
from q3q.errors import SweepFailedError
from q3q.masking import masked
from q3q.models.facts import ModelFacts
from q3q.models.hub import facts_of_trial
from q3q.placement import KEEP_AUTO, Trial
from q3q.quantize.methods.source import code_changes
from q3q.record import Progress, Sweep, TrialRecord
from q3q.spec import Json, TrialSpec
from q3q.storage.aside import clear_storage, telling
from q3q.storage.mirror import mirror_at, refreshed
from q3q.storage.stores import folder_of, is_url
from q3q.storage.uploader import DRIVER_SECONDS, Uploader, uploading
from q3q.sweep.allocation import Allocation
from q3q.sweep.comparing import baseline_record
from q3q.sweep.costs import CostModel
from q3q.sweep.earlier import damaged_exports, failed_records, finished_records, quantized_again
from q3q.sweep.machines import Machine, ResourceRequest, refuse_old_cards
from q3q.sweep.plan import (
    Planned,
    describe,
    plan,
    refuse_what_fills_the_disk,
    unlike_methods,
)
from q3q.sweep.settings import StudySettings
from q3q.sweep.study import Study, recent_records, sole_driver, study_id
from q3q.track.mlflow_sqlite import own_uri, read_uri
from q3q.track.tracker import DEFAULT_STORAGE

if TYPE_CHECKING:
    from q3q.report.about import Report
    from q3q.sweep.progress import Display
    from q3q.track.idle import IdleTracker
    from q3q.track.mlflow import MlflowTracker


class Host(Protocol):
    """Where a study's trials run."""

    where: str = "this machine"  # for people; or a cluster's address

    def machines(self, request: ResourceRequest) -> tuple[list[Machine], ResourceRequest]:
        """Return the machines to plan with, and the request as it is meant here."""

    def running(self) -> AbstractContextManager[None]:
        """Start what trials need in the background, and stop it at the end."""
        return nullcontext()

    def wait_until_ready(self) -> None:
        """Raise ConfigError if trials cannot run here; nothing has been tracked yet."""
        return

    def run(self, planned: Sequence[Planned], study: "RunningStudy") -> None:
        """Run trials; `study` receives their events and records."""


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


def run_study(
    trials: Sequence[Trial],
    facts: Mapping[str, ModelFacts],
    settings: StudySettings,
    command: str,
    host: Host,
    only: Collection[str] | None = None,
) -> dict[str, TrialRecord] | None:
    """Run the trials that are not done; show, track and report all of them.

    Args:
        facts: of each trial's model, by the trial's id.
        command: what a person types to get this study again.
        only: ids of the trials to run now; None for all.

    Returns:
        Records by trial id; None if the plan alone was asked for.

    Raises:
        ConfigError: the study cannot start, and nothing has started.
        SweepFailedError: it ended, and some trials failed.
    """
    storage = refreshed(settings.storage)
    finished = {} if settings.fresh else finished_records(trials)
    if not settings.fresh:
        for line in damaged_exports(t for t in trials if only is None or t.id in only):
            print(line)
    for line in code_changes(finished.values()):
        print(f"q3q: {line}", file=sys.stderr)
    failed = failed_records(trial for trial in trials if only is not None and trial.id not in only)
    machines, request = host.machines(settings.request)
    planned = plan(
        trials if only is None else [trial for trial in trials if trial.id in only],
        finished,
        facts,
        machines=machines,
        request=request,
        model=CostModel().learned(recent_records(storage), facts_of_trial),
        fresh=settings.fresh,
    )
    left = [entry for entry in planned if not entry.done]
    on_gpus = [entry for entry in left if entry.allocation and entry.allocation.gpus]
    refuse_old_cards((entry.spec.model.dtype for entry in on_gpus), machines)
    if len(trials) > 1 and not settings.fresh:
        _say_what_repeats(left, storage)
    if settings.plan_only:
        _show_plan(planned, machines, host.where, settings)
    if not (settings.address and is_url(settings.storage)):  # there each machine has its own mirror
        refuse_what_fills_the_disk(planned, machines, storage)
    if settings.plan_only:
        return None
    if unlike := unlike_methods([trial.spec for trial in trials]):
        print(unlike)
    if settings.address is None:
        say = partial(print, file=sys.stderr, flush=True)
        fetch_weights([entry.spec for entry in left], say)
    clear_storage(storage)
    if settings.fresh:
        since = now()
        left = [replace(entry, trial=afresh(entry.trial, since)) for entry in left]
        trials = [afresh(trial, since) for trial in trials]
    with (
        sole_driver(trials, settings.storage, partial(print, file=sys.stderr)),
        host.running() if left else nullcontext(),
        _tracked(trials, left, finished, failed, settings, command, host) as study,
    ):
        ids = [trial.id for trial in trials]
        outside = [trial for trial in trials if trial.placement.baseline not in (None, *ids)]
        if any(baseline_record(trial, {}) is None for trial in outside):
            study.display.note(
                "Nothing to compare with yet: run the same command with method=none once, then "
                "this one again, which then only compares"
            )
        if left:
            host.run(left, study)
    return study.study.records


def _show_plan(
    planned: Sequence[Planned],
    machines: Sequence[Machine],
    where: str,
    settings: StudySettings,
) -> None:
    _show_notes(settings)
    print(describe(planned, machines=machines, where=where, storage=settings.storage))
    if settings.absent:
        print(settings.absent)
    left = [entry for entry in planned if not entry.done]
    places = [entry.trial.placement for entry in left if entry.spec.schemes]
    if places and places[0].keep == KEEP_AUTO:
        print(places[0].block_cache.promise())


def _say_what_repeats(left: Sequence[Planned], storage: Path) -> None:
    if again := quantized_again([entry.trial for entry in left], recent_records(storage)):
        print(
            f"{len(again)} trials repeat the quantization of finished trials, whose blocks were "
            "deleted; keep=blocks keeps them, and a new evaluation then only evaluates"
        )


def with_plan(
    record: TrialRecord, planned: Planned, allocation: Allocation | None = None
) -> TrialRecord:
    """Return the record with what was planned beside what it took.

    Args:
        allocation: what the trial had in the end, if it is known.
    """
    facts = planned.to_json(allocation) | measured(record)
    first = planned.allocation
    if allocation is not None and first is not None and allocation != first:
        facts["first"] = f"{first}, {first.loader}: out of memory"
    return replace(record, environment={**record.environment, "planned": facts})


def measured(record: TrialRecord) -> Json:
    """Return seconds of all phases, and the peak of the memory where the model lay."""
    metrics = record.metrics
    gpu = any(name.startswith("gpu_peak_bytes/") for name in metrics)
    kind = "gpu_peak_bytes/" if gpu else "peak_bytes/"
    peaks = [value for name, value in metrics.items() if name.startswith(kind)]
    seconds = sum(value for name, value in metrics.items() if name.startswith("seconds/"))
    return {"took": round(seconds, 3), "peak": max(peaks)} if peaks else {}


@contextmanager
def _tracked(
    trials: Sequence[Trial],
    left: Sequence[Planned],
    finished: Mapping[str, TrialRecord],
    failed: Mapping[str, TrialRecord],
    settings: StudySettings,
    command: str,
    host: Host,
) -> Iterator[RunningStudy]:
    """Track and show what runs inside; at the end, however it ends, write and print the report.

    Raises:
        TrackingError: the tracker cannot be used; nothing has started.
        SweepFailedError: some trials failed.
    """
    from q3q.storage.status import StatusWriter
    from q3q.sweep.progress import Display
    from q3q.track.idle import IdleTracker
    from q3q.track.mlflow import MlflowTracker

    storage = folder_of(settings.storage)
    experiment = settings.experiment or settings.name or "q3q"
    mlflow = MlflowTracker(settings.tracking_uri, settings.storage, experiment, settings.register)
    tracker = mlflow if left else IdleTracker(mlflow)
    if left:
        tracker.check()
        for line in tracker.remarks():
            print(line, file=sys.stderr)
        host.wait_until_ready()  # a cluster that does not answer must not leave an open run behind
    _show_notes(settings)
    if settings.fresh:
        _forget_kept_blocks(trials, settings.storage)
    sweep = Sweep(
        id=study_id(trials),
        name=settings.name or _name_of(trials),
        command=masked(command),
        config=settings.config,
        trials=tuple(trials),
        question=settings.question,
        expectation=settings.expectation,
        predicted={entry.trial.id: entry.seconds for entry in left},
        experiment=experiment,
    )
    publisher = StatusWriter(storage, sweep.name, sweep.command)
    with (
        _uploader(settings.storage, finished) as uploader,
        Display(total=len(left), publisher=publisher) as display,
    ):
        takes_exports = settings.register is not None
        records = {**failed, **finished}
        study = Study(sweep, storage, tracker, display.note, records, uploader, takes_exports)
        interruption: BaseException | None = None
        with study.tracked():
            study.open()
            if finished:
                display.skipped([study.sweep.names[key] for key in finished])
            if unchecked := sum(record.unchecked for record in finished.values()):
                display.note(
                    f"{unchecked} of the finished trials are from an older version, which kept no "
                    "checksum of their samples: damage to the samples may go unnoticed. "
                    "fresh=true measures them again"
                )
            try:
                with telling(display.note):
                    yield RunningStudy(study, display)
            except (KeyboardInterrupt, SystemExit) as error:  # SystemExit: SIGTERM or SIGHUP
                interruption = error
                begin_farewell()
            except BaseException:
                study.close()  # what is finished is reported, however this ends
                raise
            report = study.close()
    _print_report(report, study, tracker, settings.storage)
    if interruption is not None:
        print(
            f"Interrupted: {len(study.records)} of {len(trials)} trials are recorded; the same "
            "command continues."
        )
        raise interruption
    ran = [study.records.get(entry.trial.id) for entry in left]
    failures = [record for record in ran if record is not None and not record.completed]
    if failures:
        for record in failures:
            name = study.sweep.names[record.spec.id]
            print(f"FAILED {name}: {record.reason}", file=sys.stderr)
        raise SweepFailedError(
            f"{len(failures)} of {len(trials)} trials failed; the same command tries them again"
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


def _show_notes(settings: StudySettings) -> None:
    for line in settings.notes:
        print(f"q3q: {line}", file=sys.stderr)


def _name_of(trials: Sequence[Trial]) -> str:
    methods = list(dict.fromkeys(trial.spec.method.name for trial in trials))
    return "+".join([method for method in methods if method != "none"] or methods)


def _forget_kept_blocks(trials: Iterable[Trial], storage: str) -> None:
    mirror = mirror_at(storage)
    for trial in trials:
        for folder in (trial.kept_blocks_folder, trial.cached_blocks_folder):
            shutil.rmtree(folder, ignore_errors=True)
        if mirror is not None:
            mirror.remove(f"trials/blocks/{trial.spec.quantization_id}")


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
