"""Run a study: plan it, track it, show it, and report at the end however it ends."""

import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from q3q.attempt import finished_record
from q3q.config.schema import tracking_uri
from q3q.errors import SweepFailedError
from q3q.masking import masked
from q3q.record import Progress, TrialRecord, kept_blocks_folder
from q3q.spec import TrialSpec
from q3q.storage.mirror import DRIVER_SECONDS, Uploader, mirror_at, uploading
from q3q.storage.stores import folder_of, is_url
from q3q.sweep.grid import SweepTrial
from q3q.sweep.study import Study

if TYPE_CHECKING:
    from q3q.sweep.progress import Display
    from q3q.track.mlflow import MlflowTracker


class RunningStudy:
    """A study and what the person at the terminal sees of it."""

    def __init__(self, study: Study, display: "Display") -> None:
        self.study = study
        self.display = display
        self.interruption: BaseException | None = None

    @contextmanager
    def heeding_interrupts(self) -> Iterator[None]:
        """Let the first Ctrl-C or SIGTERM wait, for a second at most, until `on_tick` is asked.

        Python drops what a signal's handler raises if it happens to land in a callback of the garbage collector. The
        next one lands where it lands.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def notice(number: int, frame: Any) -> None:
            if self.interruption is not None:
                raise self.interruption
            self.interruption = (
                KeyboardInterrupt() if number == signal.SIGINT else SystemExit(128 + number)
            )

        before = {
            number: signal.signal(number, notice) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @property
    def records(self) -> dict[str, TrialRecord]:
        return self.study.records

    def heard(self, spec: TrialSpec, event: Progress) -> None:
        self.display.event(event)
        self.study.progressed(spec, event)

    def tick(self) -> None:
        self.study.tick()

    def fetch(self, spec: TrialSpec) -> None:
        self.study.fetch(spec)

    def finished(self, record: TrialRecord, seconds: float = 0.0) -> None:
        self.study.take(record)
        self.display.finished(record, seconds)


@contextmanager
def running_study(
    settings: DictConfig,
    specs: Sequence[TrialSpec],
    command: str,
    finished: dict[str, TrialRecord],
    ready: Callable[[], object] | None = None,
    predicted: Mapping[str, float] | None = None,
) -> Iterator[RunningStudy]:
    """Track and show what runs inside; at the end, however it ends, write and print the report.

    Raises:
        TrackingError: the tracker cannot be used; nothing has started. SweepFailedError: some trials failed.
    """
    from q3q.storage.status import StatusWriter
    from q3q.sweep.progress import Display
    from q3q.track.mlflow import MlflowTracker

    experiment = settings.track.experiment or settings.name or "q3q"
    storage, mirror = folder_of(settings.storage), mirror_at(settings.storage)
    artifacts = f"{storage}/artifacts"
    tracker = MlflowTracker(tracking_uri(settings), artifacts, experiment, settings.track.register)
    tracker.check()
    if ready is not None:
        ready()  # a cluster that does not answer must not leave an open run behind
    if settings.fresh:
        for spec in specs:
            shutil.rmtree(kept_blocks_folder(spec), ignore_errors=True)
            if mirror is not None:
                mirror.remove(f"trials/blocks/{spec.quantization_id}")
    shown = OmegaConf.masked_copy(settings, [str(key) for key in settings if key != "hydra"])
    methods = list(dict.fromkeys(str(spec.method["name"]) for spec in specs))
    name = settings.name or "+".join([method for method in methods if method != "none"] or methods)
    command = masked(command)
    publisher = StatusWriter(storage, name, command)
    with (
        _courier(settings.storage, finished) as courier,
        Display(total=len(specs) - len(finished), publisher=publisher) as display,
    ):
        study = Study(
            name=name,
            command=command,
            config=masked(OmegaConf.to_yaml(shown)),
            specs=specs,
            storage=storage,
            tracker=tracker,
            note=display.note,
            records=dict(finished),
            question=settings.question or "",
            expectation=settings.expectation or "",
            predicted=predicted or {},
            experiment=experiment,
            courier=courier,
            takes_exports=settings.track.register is not None,
        )
        study.open()
        if finished:
            display.skipped(
                [
                    f"{record.spec.name} · {record.spec.model['name']}"
                    for record in finished.values()
                ]
            )
        interruption: BaseException | None = None
        running = RunningStudy(study, display)
        try:
            yield running
        except (
            KeyboardInterrupt,
            SystemExit,
        ) as asked:  # SystemExit: SIGTERM, of a spot machine or a scheduler
            interruption = asked
        except BaseException:
            study.close()  # what is finished is reported, however this ends
            raise
        report = study.close()
    print(report.text)
    print(f"\nReport and plots: {report.folder}")
    print(_where_to_browse(tracker))
    if is_url(settings.storage):
        print(_what_is_here_alone(tracker, masked(settings.storage)))
    if interruption is not None:
        print(
            f"Interrupted: {len(study.records)} of {len(specs)} trials are recorded; the same command goes on."
        )
        raise interruption
    failed = [record for record in study.records.values() if not record.completed]
    if failed:
        for record in failed:
            print(
                f"FAILED {record.spec.name} · {record.spec.model['name']}: {record.reason}",
                file=sys.stderr,
            )
        raise SweepFailedError(
            f"{len(failed)} of {len(specs)} trials failed; the same command tries them again"
        )


def _where_to_browse(tracker: "MlflowTracker") -> str:
    uri, page = masked(tracker.uri), tracker.page
    if not uri.startswith("sqlite:"):
        return f"MLflow: {uri}/{page}"
    return f"MLflow: make ui (or: mlflow ui --backend-store-uri {uri}), then http://127.0.0.1:5000/{page}"


@contextmanager
def _courier(storage: str, finished: Mapping[str, TrialRecord]) -> Iterator[Uploader | None]:
    """What brings a driver's files to a storage that is a URL; None for a folder, which needs nothing of the kind."""
    mirror = mirror_at(storage)
    if mirror is None:
        yield None
        return
    with uploading(mirror, "sweeps", "reports", "running", every=DRIVER_SECONDS) as courier:
        courier.add(
            *(f"trials/{trial}" for trial in finished)
        )  # what a worker of this machine could not send any more
        yield courier


def _what_is_here_alone(tracker: "MlflowTracker", storage: str) -> str:
    database = "; MLflow's database is on this machine alone, track.uri= names a shared one"
    return f"Records and report are in {storage}{database if tracker.uri.startswith('sqlite:') else ''}."


def quantized_again(left: Sequence[TrialSpec], recent: Iterable[TrialRecord]) -> list[TrialSpec]:
    """Those of the trials to run that have to quantize what a finished trial has, since its blocks were not kept."""
    done = {record.spec.quantization_id for record in recent if record.completed}
    return [
        spec
        for spec in left
        if spec.scheme is not None
        and spec.quantization_id in done
        and not kept_blocks_folder(spec).exists()
    ]


def finished_records(trials: dict[str, SweepTrial]) -> dict[str, TrialRecord]:
    found = {key: finished_record(mine.spec) for key, mine in trials.items()}
    return {key: record for key, record in found.items() if record is not None}
