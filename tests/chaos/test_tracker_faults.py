"""MLflow down for a while, down for good, or back with an empty database: a sweep loses nothing."""

import os
import shutil
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, SimpleNamespace

import pytest

from q3q.errors import RefusedByTrackerError, SweepFailedError, TrackingError
from q3q.placement import Trial
from q3q.record import Sweep, TrialRecord
from q3q.spec import TrialSpec
from q3q.sweep import study as study_module
from q3q.sweep.study import Study, study_id
from q3q.track.mlflow import MlflowTracker
from q3q.track.tracker import Tracker
from tests.chaos.faults import freeze, launch, records, start
from tests.composed import composed_trial
from tests.mlflow_server import free_port, kill, serve
from tests.trackers import MemoryTracker


def trials(storage: Path) -> list[Trial]:
    common = (f"storage={storage}", "evaluation.baseline=false")
    return [composed_trial(*common, f"bits={bits}") for bits in (2, 3, 4)]


def recorded(trial: Trial) -> TrialRecord:
    assert trial.spec.scheme is not None
    metrics = {"perplexity/stories": 10.0 / trial.spec.scheme.bits, "bits_per_weight": 4.1}
    record = TrialRecord(
        spec=trial.spec, placement=trial.placement, status="COMPLETED", metrics=metrics
    )
    record.save()
    return record


def make_study(storage: Path, tracker: Tracker) -> tuple[Study, list[str]]:
    notes: list[str] = []
    pending = tuple(trials(storage))
    command = "python launch.py -m method=rtn"
    sweep = Sweep(id=study_id(pending), name="study", command=command, config="", trials=pending)
    return Study(sweep, storage, tracker, notes.append), notes


def wait_for(study: Study) -> None:
    """Wait until the study's own thread has sent the tracker all that it had to."""
    study._queue.settle()


class UnreliableTracker(MemoryTracker):
    """A tracker that can be down, or lose its content: then it must be opened again."""

    down = False

    def check(self) -> None:
        if self.down:
            raise TrackingError("it is down.")

    def open(self, sweep: Sweep) -> None:
        self.check()
        super().open(sweep)

    def log(self, record: TrialRecord, artifacts: Mapping[str, bytes]) -> None:
        self._check_open()
        super().log(record, artifacts)

    def live(self, spec: TrialSpec, metrics: Mapping[str, float], step: int) -> None:
        self.check()

    def close(
        self,
        artifacts: Mapping[str, bytes],
        succeeded: bool,
        headline: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        self._check_open()
        super().close(artifacts, succeeded, headline)

    def _check_open(self) -> None:
        self.check()
        if self.sweep is None:
            raise TrackingError("no such run.")


def test_a_tracker_that_was_down_receives_what_it_missed_while_the_sweep_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = [1.0]
    monkeypatch.setattr(study_module, "time", SimpleNamespace(monotonic=lambda: seconds[0]))
    tracker = UnreliableTracker()
    study, notes = make_study(tmp_path, tracker)
    study.open()
    tracker.down = True
    for trial in study.sweep.trials[:2]:
        study.take(recorded(trial))
        wait_for(study)
    tracker.down = False
    study.tick()  # too early to try again: nobody waits for time-outs at each tick
    wait_for(study)
    assert tracker.records == {}
    assert len(notes) == 1
    assert "Records stay on disk" in notes[0]
    tracker.down = True
    seconds[0] += study_module.TRY_AGAIN_SECONDS
    study.tick()
    wait_for(study)
    assert tracker.records == {}
    tracker.down = False
    seconds[0] += study_module.TRY_AGAIN_SECONDS
    study.tick()
    wait_for(study)
    assert set(tracker.records) == {trial.id for trial in study.sweep.trials[:2]}
    study.take(recorded(study.sweep.trials[2]))
    wait_for(study)
    assert len(tracker.records) == 3
    assert notes[1:] == ["The tracker is back, and has received what it missed."]


def test_a_tracker_that_lost_everything_receives_everything_when_the_sweep_ends(
    tmp_path: Path,
) -> None:
    tracker = UnreliableTracker()
    study, _ = make_study(tmp_path, tracker)
    study.open()
    for trial in study.sweep.trials:
        study.take(recorded(trial))
    wait_for(study)
    tracker.sweep, tracker.records = None, {}
    study.close()
    assert len(tracker.records) == 3
    assert tracker.succeeded
    assert "table.md" in tracker.closing


def test_a_tracker_that_never_comes_back_costs_no_record_and_a_line(tmp_path: Path) -> None:
    tracker = UnreliableTracker()
    study, notes = make_study(tmp_path, tracker)
    study.open()
    tracker.down = True
    for trial in study.sweep.trials:
        study.take(recorded(trial))
    report = study.close()
    assert (report.folder / "results.csv").exists()
    assert notes[-1].startswith("3 records and the report are on disk")
    assert "python -m q3q.track sync" in notes[-1]
    assert len(list(tmp_path.glob("trials/*/record.json"))) == 3


def no_folder(*_: object) -> None:
    raise OSError(20, "Not a directory", "reports")


def broken(*_: object) -> None:
    raise KeyError("a column of the samples")


@pytest.mark.parametrize("where", ["folder", "plot", "comparison", "between"])
def test_what_fails_after_the_trials_leaves_no_open_run(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    tracker = MlflowTracker(f"sqlite:///{tmp_path}/mlflow.db", str(tmp_path))
    study, _ = make_study(tmp_path, tracker)
    earlier = recorded(study.sweep.trials[0])
    study.records = {earlier.spec.id: earlier}
    if where == "comparison":
        monkeypatch.setattr("q3q.sweep.study.baseline_record", broken)
    elif where != "between":
        fails = no_folder if where == "folder" else broken
        monkeypatch.setattr("q3q.report.write.write_report", fails)

    def run() -> None:
        with study.tracked():
            study.open()
            if where == "between":
                raise KeyboardInterrupt
            study.close()

    with pytest.raises((SweepFailedError, KeyError, KeyboardInterrupt)) as failure:
        run()
    if where == "folder":
        assert "the report cannot be written" in str(failure.value)
    client = MlflowClient(tracking_uri=tracker.uri)
    experiment = client.get_experiment_by_name("q3q")
    assert experiment is not None
    states = [run.info.status for run in client.search_runs([experiment.experiment_id])]
    trial = [] if where == "comparison" else ["FINISHED"]
    assert sorted(states) == ["FAILED", *trial]


def test_a_record_that_is_refused_is_said_and_holds_up_no_other(tmp_path: Path) -> None:
    class Picky(MemoryTracker):
        def log(self, record: TrialRecord, artifacts: Mapping[str, bytes]) -> None:
            if record.spec.scheme is not None and record.spec.scheme.bits == 2:
                raise RefusedByTrackerError("no such bits")
            super().log(record, artifacts)

    tracker = Picky()
    study, notes = make_study(tmp_path, tracker)
    with study.tracked():
        study.open()
        for trial in study.sweep.trials:
            study.take(recorded(trial))
        study.close()
    assert set(tracker.records) == {trial.id for trial in study.sweep.trials[1:]}
    assert notes == ["no such bits. It stays on disk."]
    assert "table.md" in tracker.closing


def logged_trials(uri: str) -> list[str]:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    tags = [run.data.tags for run in client.search_runs(experiments)]
    return sorted(tag["q3q.trial"] for tag in tags if "q3q.trial" in tag)


@pytest.mark.slow
def test_a_real_server_goes_comes_back_loses_its_database_and_goes_for_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(study_module, "TRY_AGAIN_SECONDS", 0.0)
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    study, notes = make_study(tmp_path, MlflowTracker(uri))
    server = serve(tmp_path, port)
    try:
        study.open()
        study.take(recorded(study.sweep.trials[0]))
        wait_for(study)
        kill(server)
        study.take(recorded(study.sweep.trials[1]))
        wait_for(study)
        assert "Connection refused" in notes[0]
        server = serve(tmp_path, port)
        study.tick()
        wait_for(study)
        assert logged_trials(uri) == sorted(trial.id for trial in study.sweep.trials[:2])
        kill(server)
        (tmp_path / "mlflow.db").unlink()
        shutil.rmtree(tmp_path / "served")
        server = serve(tmp_path, port)
        study.take(recorded(study.sweep.trials[2]))
        wait_for(study)
        study.tick()
        wait_for(study)
        assert logged_trials(uri) == sorted(trial.id for trial in study.sweep.trials), notes
        assert len(list((tmp_path / "served").rglob("record.json"))) == 3
        kill(server)
        began = time.monotonic()
        study.close()
        assert time.monotonic() - began < 60
        assert "python -m q3q.track sync" in notes[-1]
    finally:
        kill(server)


@pytest.mark.slow
def test_a_real_sweep_whose_server_is_killed_ends_and_the_same_command_fills_a_new_one(
    tiny: Path, tmp_path: Path
) -> None:
    storage, port = tmp_path / "storage", free_port()
    uri = f"http://127.0.0.1:{port}"
    sweep = ("method=rtn", "bits=3,4", "evaluation.limit=64", f"track.uri={uri}")
    server = serve(tmp_path, port)
    try:
        process = start(storage, tiny, *sweep)
        hit = freeze(storage, "evaluate", set())
        assert server.poll() is None
        kill(server)
        os.kill(hit.pid, signal.SIGCONT)
        output, _ = process.communicate(timeout=280)
        assert process.returncode == 0, output
        assert "Records stay on disk, and q3q tries again" in output
        command = f"python -m q3q.track sync --storage {storage} --uri {uri}"
        assert f"{command} or the same command sends them" in output
        ended = records(storage)
        times = {path: path.stat().st_mtime_ns for path in storage.glob("trials/*/record.json")}
        assert len(ended) == len(times) == 2
        (tmp_path / "mlflow.db").unlink()
        server = serve(tmp_path, port)
        code, output = launch(storage, tiny, *sweep)
        assert code == 0, output
        assert logged_trials(uri) == sorted(ended)
        assert {path: path.stat().st_mtime_ns for path in times} == times
    finally:
        kill(server)
