"""A sync that is told to end leaves no run that seems to go on, and the next one completes it."""

import signal
import sqlite3
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from q3q.placement import Placement, Trial
from q3q.record import Sweep, TrialRecord
from q3q.track.__main__ import main
from q3q.track.mlflow import MlflowTracker
from tests.specs import make_spec


def states(storage: Path) -> list[str]:
    with closing(sqlite3.connect(storage / "mlflow.db")) as database:
        return sorted(row[0] for row in database.execute("select status from runs"))


@pytest.fixture(autouse=True)
def _signals():
    before = signal.getsignal(signal.SIGHUP)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("end", "code"), [(SystemExit(129), 129), (KeyboardInterrupt(), 130)], ids=["SIGHUP", "Ctrl-C"]
)
def test_a_sync_that_is_told_to_end_ends_its_runs(end, code, tmp_path, monkeypatch):
    trials = [Trial(make_spec(bits=n), Placement(trials=tmp_path / "trials")) for n in (2, 3, 4)]
    for trial in trials:
        record = TrialRecord(spec=trial.spec, status="COMPLETED", metrics={})
        replace(record, placement=trial.placement).save()
    sweep = Sweep(id="1", name="rtn", command="python launch.py", config="", trials=tuple(trials))
    sweep.save(tmp_path)
    logged: list[TrialRecord] = []
    log = MlflowTracker.log

    def told_to_end(self, record, artifacts):
        if len(logged) == 1:
            raise end
        logged.append(record)
        log(self, record, artifacts)

    with monkeypatch.context() as patch:
        patch.setattr(MlflowTracker, "log", told_to_end)
        with pytest.raises(SystemExit) as stop:  # as the command itself does
            sys.exit(main(["sync", "--storage", str(tmp_path)]))
        assert stop.value.code == code
    assert states(tmp_path) == ["FAILED", "FINISHED"]
    assert main(["sync", "--storage", str(tmp_path)]) == 0
    assert states(tmp_path) == ["FINISHED"] * 4
