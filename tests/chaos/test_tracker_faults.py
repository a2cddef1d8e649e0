"""MLflow down for a while, down for good, back with an empty database: a sweep goes on and loses nothing."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from q3q.config import resolve, schema
from q3q.errors import TrackingError
from q3q.record import TrialRecord
from q3q.sweep import study as study_module
from q3q.sweep.study import Study
from q3q.track.mlflow import MlflowTracker
from q3q.track.tracker import MemoryTracker
from tests.chaos.faults import ROOT, freeze, launch, records, start


def specs(storage, count=3):
    schema.register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return [
            resolve.spec_from(
                compose(
                    "config", [f"storage={storage}", f"bits={2 + k}", "evaluation.baseline=false"]
                )
            )
            for k in range(count)
        ]


def recorded(spec):
    stories = 10.0 / spec.scheme.bits
    record = TrialRecord(
        spec=spec,
        status="COMPLETED",
        metrics={"perplexity/stories": stories, "bits_per_weight": 4.1},
    )
    record.save()
    return record


def study(storage, tracker):
    notes = []
    made = Study(
        name="study",
        command="python launch.py -m method=rtn",
        config="",
        specs=specs(storage),
        storage=storage,
        tracker=tracker,
        note=notes.append,
    )
    return made, notes


def settled(mine):
    """All that the study's own thread had to tell the tracker is told."""
    mine._teller.settle(lambda left: None)


class Moody(MemoryTracker):
    """Down when told to be; what it knows can be lost, and then it takes nothing before it is opened again."""

    down = False

    def check(self):
        if self.down:
            raise TrackingError("it is down.")

    def open(self, sweep):
        self.check()
        super().open(sweep)

    def log(self, record, artifacts):
        self.check()
        if self.sweep is None:
            raise TrackingError("no such run.")
        super().log(record, artifacts)

    def live(self, spec, metrics, step):
        self.check()

    def close(self, artifacts, succeeded):
        self.check()
        if self.sweep is None:
            raise TrackingError("no such run.")
        super().close(artifacts, succeeded)


def test_a_tracker_that_was_down_is_told_what_it_missed_while_the_sweep_runs(tmp_path, monkeypatch):
    tracker = Moody()
    mine, notes = study(tmp_path, tracker)
    mine.open()
    tracker.down = True
    for spec in mine.specs[:2]:
        mine.take(recorded(spec))
        settled(mine)
    mine.tick()  # too early to try again: nobody waits for time-outs at each tick
    settled(mine)
    assert len(notes) == 1
    assert "Records stay on disk" in notes[0]
    monkeypatch.setattr(mine, "_silent_until", 1e-9)  # as if the time had passed
    mine.tick()
    settled(mine)
    assert tracker.records == {}
    tracker.down = False
    monkeypatch.setattr(mine, "_silent_until", 1e-9)
    mine.tick()
    settled(mine)
    assert set(tracker.records) == {spec.id for spec in mine.specs[:2]}
    mine.take(recorded(mine.specs[2]))
    settled(mine)
    assert len(tracker.records) == 3
    assert notes[1:] == ["The tracker is back, and has been told what it missed."]


def test_a_tracker_that_lost_everything_is_told_everything_when_the_sweep_ends(tmp_path):
    tracker = Moody()
    mine, _ = study(tmp_path, tracker)
    mine.open()
    for spec in mine.specs:
        mine.take(recorded(spec))
    settled(mine)
    tracker.sweep, tracker.records = None, {}
    mine.close()
    assert len(tracker.records) == 3
    assert tracker.succeeded
    assert "table.md" in tracker.closing


def test_a_tracker_that_never_comes_back_costs_no_record_and_is_said(tmp_path):
    tracker = Moody()
    mine, notes = study(tmp_path, tracker)
    mine.open()
    tracker.down = True
    for spec in mine.specs:
        mine.take(recorded(spec))
    report = mine.close()
    assert (report.folder / "results.csv").exists()
    assert notes[-1].startswith("3 records and the report are on disk")
    assert "python -m q3q.track sync" in notes[-1]
    assert len(list(tmp_path.glob("trials/*/record.json"))) == 3


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def serve(folder: Path, port: int, *more: str) -> "subprocess.Popen[bytes]":
    """A real MLflow server that has answered once."""
    if not more:
        MlflowTracker(
            f"sqlite:///{folder}/mlflow.db"
        ).check()  # its migrations take the server many seconds
        more = ("--backend-store-uri", f"sqlite:///{folder}/mlflow.db")
    command = [
        sys.executable,
        "-m",
        "mlflow",
        "server",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--workers",
        "1",
    ]
    with (folder / "server.log").open("ab") as log:
        process = subprocess.Popen(
            [
                *command,
                *more,
                "--serve-artifacts",
                "--artifacts-destination",
                str(folder / "served"),
            ],
            cwd=folder,
            env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    asked, deadline = (
        f"http://127.0.0.1:{port}/api/2.0/mlflow/experiments/get?experiment_id=0",
        time.monotonic() + 120,
    )
    while True:
        try:
            with urllib.request.urlopen(asked, timeout=30):
                return process
        except OSError:
            log_text = (folder / "server.log").read_text()
            assert process.poll() is None, log_text
            assert time.monotonic() < deadline, log_text
            time.sleep(0.1)


def kill(process):
    os.killpg(
        process.pid, signal.SIGKILL
    )  # its own session: the server and its workers, nobody else
    process.wait(timeout=10)


def children(uri):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    found = client.search_runs([one.experiment_id for one in client.search_experiments()])
    return sorted(run.data.tags["q3q.trial"] for run in found if "q3q.trial" in run.data.tags)


@pytest.mark.slow
def test_a_real_server_goes_comes_back_loses_its_database_and_goes_for_good(tmp_path, monkeypatch):
    monkeypatch.setattr(study_module, "TRY_AGAIN_SECONDS", 0.0)
    port = free_port()
    uri = f"http://127.0.0.1:{port}"
    mine, notes = study(tmp_path, MlflowTracker(uri))
    server = serve(tmp_path, port)
    try:
        mine.open()
        mine.take(recorded(mine.specs[0]))
        settled(mine)
        kill(server)
        mine.take(recorded(mine.specs[1]))
        settled(mine)
        assert "Connection refused" in notes[0]
        server = serve(tmp_path, port)
        mine.tick()
        settled(mine)
        assert children(uri) == sorted(spec.id for spec in mine.specs[:2])
        kill(server)
        (tmp_path / "mlflow.db").unlink()
        shutil.rmtree(tmp_path / "served")
        server = serve(tmp_path, port)
        mine.take(recorded(mine.specs[2]))
        settled(mine)
        mine.tick()
        settled(mine)
        assert children(uri) == sorted(spec.id for spec in mine.specs), notes
        assert len(list((tmp_path / "served").rglob("record.json"))) == 3
        kill(server)
        began = time.monotonic()
        mine.close()
        assert time.monotonic() - began < 60
        assert "python -m q3q.track sync" in notes[-1]
    finally:
        if server.poll() is None:
            kill(server)


@pytest.mark.slow
def test_a_real_sweep_whose_server_is_killed_ends_and_the_same_command_tells_a_new_one(
    tiny, tmp_path
):
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
        assert "Records stay on disk, and it is tried again" in output
        assert "python -m q3q.track sync or the same command tells it" in output
        found = records(storage)
        kept = {path: path.stat().st_mtime_ns for path in storage.glob("trials/*/record.json")}
        assert len(found) == len(kept) == 2
        (tmp_path / "mlflow.db").unlink()
        server = serve(tmp_path, port)
        code, output = launch(storage, tiny, *sweep)
        assert code == 0, output
        assert children(uri) == sorted(found)
        assert {path: path.stat().st_mtime_ns for path in kept} == kept
    finally:
        if server.poll() is None:
            kill(server)
