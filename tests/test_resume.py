"""`python -m q3q.trials resume` continues a sweep: its tracker and report receive the trial."""

import csv
import shutil
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from q3q import trial as trial_module
from q3q.config.resolve import trial_from
from q3q.errors import SweepFailedError
from q3q.models.hub import facts_of_trial
from q3q.placement import Trial
from q3q.record import TrialRecord
from q3q.report.records import all_sweeps
from q3q.sweep.in_process import InProcess
from q3q.sweep.run import run_study
from q3q.sweep.settings import StudySettings
from q3q.sweep.study import Study
from q3q.trials.__main__ import main
from tests.chaos.faults import SMALL
from tests.composed import compose

pytestmark = pytest.mark.usefixtures("undrawn")


@pytest.fixture
def run_sweep(tiny, monkeypatch):
    """Return run(storage, error), which runs RTN at 4 and 3 bits, the latter until its error."""
    attempt = trial_module.attempt_trial

    def run(storage: Path, error: BaseException) -> tuple[Trial, Trial]:
        always = [*SMALL, "method=rtn", f"model.path={tiny}", f"storage={storage}"]
        configs = [compose("config", [*always, f"bits={bits}"]) for bits in (4, 3)]
        trials = [trial_from(config) for config in configs]
        facts = {trial.id: found for trial in trials if (found := facts_of_trial(trial))}

        def failing(trial, report):
            if trial.id != trials[1].id:
                return attempt(trial, report)
            record = TrialRecord.failed(trial, "a test's error")
            trial.folder.mkdir(parents=True)
            if not isinstance(error, Exception):
                raise error
            record.save()
            return record

        settings = StudySettings.of(configs[0])
        with monkeypatch.context() as patch:
            patch.setattr(trial_module, "attempt_trial", failing)
            with pytest.raises((SweepFailedError, KeyboardInterrupt)):
                run_study(trials, facts, settings, "the command", InProcess())
        return trials[0], trials[1]

    return run


def statuses(storage: Path) -> dict[str, str]:
    """Return MLflow's status of each run, by the trial's id; the sweep's by its name."""
    client = MlflowClient(tracking_uri=f"sqlite:///{storage}/mlflow.db")
    experiments = [one.experiment_id for one in client.search_experiments()]
    runs = client.search_runs(experiments)
    return {
        run.data.tags.get("q3q.trial", run.data.tags["mlflow.runName"]): run.info.status
        for run in runs
    }


def reported(storage: Path) -> list[list[str]]:
    """Return each report's trials, by their bits."""
    reports = sorted((storage / "reports").glob("*/results.csv"))
    tables = [csv.DictReader(path.read_text().splitlines()) for path in reports]
    return [sorted(row["bits"] for row in table) for table in tables]


@pytest.mark.parametrize("error", [ValueError("fails"), KeyboardInterrupt()])
def test_the_sweeps_tracker_and_report_receive_a_resumed_trial(run_sweep, tmp_path, error):
    done, other = run_sweep(tmp_path, error)
    before = statuses(tmp_path)
    assert before[done.id] == "FINISHED"
    assert before.get(other.id) != "FINISHED"
    state = "failed" if isinstance(error, ValueError) else "stopped"
    assert main(["--storage", str(tmp_path), "resume", state]) == 0
    after = statuses(tmp_path)
    assert set(after.values()) == {"FINISHED"}
    assert len(after) == 3
    assert {done.id, other.id} <= set(after)
    assert reported(tmp_path) == [["3", "4"]]
    assert not (other.folder / "failed.json").exists()


@pytest.mark.slow
def test_a_trial_whose_sweep_is_lost_gets_a_sweep_of_its_own(run_sweep, tmp_path):
    _, other = run_sweep(tmp_path / "first", ValueError("fails"))
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "first" / "trials", copy / "trials")
    assert main(["--storage", str(copy), "resume", other.id]) == 0
    assert reported(copy) == [["3"]]
    assert statuses(copy) == {other.id: "FINISHED", "rtn": "FINISHED"}
    assert [sweep.trials for sweep in all_sweeps(copy)[0]] == [(other,)]


def test_a_failure_that_is_not_resumed_stays_in_the_report(run_sweep, tmp_path):
    _, other = run_sweep(tmp_path, ValueError("fails"))
    [sweep], _ = all_sweeps(tmp_path)
    facts = {trial.id: found for trial in sweep.trials if (found := facts_of_trial(trial))}
    settings = StudySettings.of_sweep(sweep, str(tmp_path))
    run_study(sweep.trials, facts, settings, sweep.command, InProcess(), only=())
    assert reported(tmp_path) == [["3", "4"]]
    assert statuses(tmp_path)[other.id] == "FAILED"


@pytest.mark.parametrize("where", ["comparing", "the report"])
def test_an_error_in_the_driver_leaves_no_run_running(run_sweep, tmp_path, monkeypatch, where):
    run_sweep(tmp_path, ValueError("fails"))

    def fail(*_):
        raise ZeroDivisionError("a bug")

    if where == "comparing":  # when the study opens
        monkeypatch.setattr(Study, "_compared", fail)
    else:
        monkeypatch.setattr("q3q.report.write.write_report", fail)
    with pytest.raises(ZeroDivisionError):
        main(["--storage", str(tmp_path), "resume", "failed"])
    assert "RUNNING" not in statuses(tmp_path).values()
