"""Whatever a trial or study is called, and however long: it is in MLflow, and holds up nothing."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from q3q.errors import EXIT_FAILED, RefusedByTrackerError, TrackingError
from q3q.placement import Placement, Trial
from q3q.report.__main__ import main as report
from q3q.spec import TaskRef
from q3q.storage.files import unsealed
from q3q.storage.names import file_name
from q3q.track.mlflow import MlflowTracker
from q3q.track.mlflow_names import MAX_NAME, experiment_name, fitted_names
from q3q.track.tracker import sync_command
from tests.specs import changed, evaluation_of
from tests.track.test_mlflow import children, parents, record, runs, saved, spec, sweep, synced

ODD = [
    *("my task (v2)", "a//b", "../up", "/abs", "./x", "x/", "..", ".", "", "é ü", "x" * 400),
    *("tab\there", "new\nline", "quote\"'`", "a/../b", "50 %", "pass@1", "名前", "nul\0", "\udcff"),
]


@pytest.mark.parametrize("name", ODD)
def test_a_fitted_name_is_one_that_mlflow_takes(name: str) -> None:
    from mlflow.utils.validation import _validate_metric_name, _validate_param_name

    word = fitted_names([name])[name]
    _validate_metric_name(word)
    _validate_param_name(word)
    assert 0 < len(word) <= MAX_NAME
    assert fitted_names([word]) == {word: word}


def test_names_that_would_be_alike_stay_apart_and_plain_ones_stay() -> None:
    names = ["a//b", "a/b", "a/./b", "x" * 300, "x" * 301, "task/acc", "t@1", "t_1"]
    fitted = fitted_names(names)
    assert len(set(fitted.values())) == len(names)
    for plain in ("a/b", "task/acc", "t_1"):
        assert fitted[plain] == plain
    assert fitted_names(names[::-1])["a//b"] == fitted["a//b"]


@pytest.mark.parametrize("name", ["", " ", "a/b", "../x", "x" * 900, "nul\0", "\udcff", "é"])
def test_an_experiment_may_be_called_anything(name: str, tmp_path: Path) -> None:
    from mlflow.utils.validation import _validate_experiment_name

    word = experiment_name(name)
    _validate_experiment_name(word)
    word.encode()
    assert experiment_name("x" * 900) != experiment_name("x" * 901)
    assert experiment_name(word) == word


def odd_spec(bits: int, name: str, **more: Any) -> Any:
    asked = evaluation_of("stories", tasks=[name])
    asked = replace(asked, tasks=(TaskRef(name=name, shots=2, limit=5),), **more)
    return spec(bits, evaluation=asked)


def test_every_odd_name_gets_into_mlflow_whole_and_is_said_once(tmp_path: Path) -> None:
    trials = [odd_spec(2, name) for name in ODD]
    tracker = MlflowTracker(f"sqlite:///{tmp_path}/mlflow.db", str(tmp_path))
    tracker.open(replace(sweep(*trials), name="\udcff", question="two\nlines " + "x" * 900))
    said: list[str] = []
    for trial, name in zip(trials, ODD, strict=True):
        found = {f"{name}/acc": 0.5, "perplexity/stories": 3.0}
        tracker.live(trial, found, 0)
        tracker.log(record(spec=trial, metrics=found, intervals={}), {})
        said += tracker.remarks()
    tracker.close({}, succeeded=True)
    logged = children(tracker)
    assert len({run.data.tags["q3q.record"] for run in logged}) == len(ODD)
    assert {run.info.status for run in [*logged, *parents(tracker)]} == {"FINISHED"}
    assert all(0.5 in run.data.metrics.values() for run in logged)
    assert all("5" in run.data.params.values() for run in logged)
    assert any(line.startswith("MLflow does not accept the name ") for line in said)
    assert len(said) == len(set(said))
    tracker.open(sweep(*trials))
    tracker.log(record(spec=trials[-1], metrics=found, intervals={}), {})
    assert tracker.remarks() == []


def test_values_too_long_too_many_or_not_finite_are_made_fit(tmp_path: Path) -> None:
    """A request of 150 long params in a script of three bytes a letter would be too large."""
    knobs = {f"knob_{k}": "字" * 7000 for k in range(150)}
    long = replace(spec(), method=changed(spec().method, knobs=knobs | {"nul": "a\0b\udcff"}))
    tracker = MlflowTracker(f"sqlite:///{tmp_path}/mlflow.db", str(tmp_path))
    tracker.open(sweep(long))
    tracker.live(long, {"speed": float("inf"), "error": float("nan"), "good": 1.0}, 0)
    tracker.log(record(spec=long, intervals={"stories_who/acc": (0.5, float("inf"))}), {})
    [child] = children(tracker)
    assert child.info.status == "FINISHED"
    assert child.data.metrics["good"] == 1.0
    assert not {"speed", "error", "stories_who/acc.high"} & child.data.metrics.keys()
    assert child.data.params["method.knob_149"].endswith("…")
    assert child.data.params["method.nul"].startswith("a�b")
    assert any("cut off there; the record has it in full" in line for line in tracker.remarks())


def refusing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have MLflow refuse runs that say they are of this method's bits, whatever q3q does."""
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
    from mlflow.tracking import MlflowClient

    log_batch = MlflowClient.log_batch

    def strict(self: Any, run: str, metrics: Any = (), params: Any = (), tags: Any = ()) -> Any:
        if any((one.key, one.value) == ("bits", name) for one in params):
            raise MlflowException("no such bits", error_code=INVALID_PARAMETER_VALUE)
        return log_batch(self, run, metrics, params, tags)

    monkeypatch.setattr(MlflowClient, "log_batch", strict)


def test_a_record_that_is_refused_all_the_same_costs_no_other_and_leaves_no_half_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep(*saved(tmp_path, 2, 3, 4)).save(tmp_path)
    with monkeypatch.context() as patch:
        refusing("3", patch)
        for _ in range(2):
            assert synced(tmp_path) == EXIT_FAILED
    assert "did not take trial" in capsys.readouterr().err
    tracker = MlflowTracker(f"sqlite:///{tmp_path}/mlflow.db", str(tmp_path))
    states = sorted(run.info.status for run in runs(tracker))
    assert states == ["FAILED", "FINISHED", "FINISHED", "FINISHED"]
    assert synced(tmp_path) == 0
    assert sorted(run.info.status for run in runs(tracker)) == ["FINISHED"] * 4


def test_a_refusal_is_told_from_a_store_that_does_not_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    tracker = MlflowTracker(f"sqlite:///{tmp_path}/mlflow.db", str(tmp_path))
    tracker.open(sweep())
    with monkeypatch.context() as patch:
        refusing("3", patch)
        with pytest.raises(RefusedByTrackerError):
            tracker.log(record(), {})

    def gone(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(MlflowClient, "log_batch", gone)
    with pytest.raises(TrackingError) as failure:
        tracker.log(record(2), {})
    assert not isinstance(failure.value, RefusedByTrackerError)


SHOWN = [
    *("qwen3/first", "../../x", "/abs", "..", ".hidden", "two words", "größe 名前", "x" * 300),
    *("a\\b", "a:b*?", "tab\there", "", " ", "loose", "-x", "名" * 120, "a/b/c", "records/"),
]


def test_a_study_of_any_name_is_found_by_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    storage = tmp_path / "deep/er/storage"
    [trial] = saved(storage, 2)
    for number, name in enumerate(SHOWN):
        named = sweep(trial, id=f"sweep{number:05}")
        replace(named, name=name, command=f"command {number}").save(storage)
    assert len(list((storage / "sweeps").iterdir())) == len(SHOWN)
    assert [path.name for path in tmp_path.iterdir()] == ["deep"]
    for number, name in enumerate(SHOWN):
        for word in (name, file_name(name), f"{file_name(name)}_sweep{number:05}"):
            assert report([f"--study={word}", "--storage", str(storage), "--format", "md"]) == 0
            shown = capsys.readouterr()
            assert f"command {number}\n" in shown.out
            assert shown.err == ""


@pytest.mark.parametrize("name", ["../../x", "x" * 300])
def test_a_studys_report_stays_in_its_storage(name: str, tmp_path: Path) -> None:
    storage = tmp_path / "deep/er/storage"
    replace(sweep(*saved(storage, 2)), name=name).save(storage)
    files = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert report([f"--study={name}", "--storage", str(storage)]) == 0
    made = {path for path in tmp_path.rglob("*") if path.is_file()} - files
    assert made
    assert all(path.is_relative_to(storage / "reports") for path in made)
    [page] = [path for path in made if path.name == "report.html"]
    assert page.parent.parent == storage / "reports"
    assert len(page.parent.name.encode()) <= 130


def test_file_names_stay_apart_and_plain_names_stay_as_they_are() -> None:
    names = [file_name(name) for name in SHOWN]
    assert len(set(names)) == len(SHOWN)
    for name in ("gptq", "rtn+gptq+awq", "two words", "größe 名前", "a.b-c_d"):
        assert file_name(name) == name
    for name in names:
        assert name == os.path.basename(name)
        assert name not in ("", ".", "..")


def test_sync_knows_sweeps_of_any_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, name in enumerate(("qwen3/first", "x" * 600, "../up")):
        [trial] = saved(tmp_path, 2 + number)
        named = replace(sweep(trial, id=f"sweep{number}"), name=name, experiment=name)
        named.save(tmp_path)
    assert synced(tmp_path) == 0
    output = capsys.readouterr().out
    for shown in ("qwen3/first", "../up"):
        assert f"{shown}: 1 of 1 trials are in experiment {shown}" in output
        assert len(runs(MlflowTracker(f"sqlite:///{tmp_path}/mlflow.db", experiment=shown))) == 2
    assert "The experiment is called xxx" in output
    assert "records without a sweep" not in output


def test_a_sweep_that_an_earlier_version_filed_in_folders_is_found(tmp_path: Path) -> None:
    placement = Placement(trials=tmp_path / "trials")
    trial = Trial(spec(2), placement)
    record(spec=trial.spec, placement=placement).save()
    replace(sweep(trial), name="plain").save(tmp_path)
    [path] = (tmp_path / "sweeps").iterdir()
    (tmp_path / "sweeps/qwen3").mkdir()
    facts = unsealed(path.read_bytes()) | {"name": "qwen3/first"}  # it wrote no checksum
    (tmp_path / "sweeps/qwen3/first_sweep00001.json").write_text(json.dumps(facts))
    path.unlink()
    assert report(["--study", "qwen3/first", "--storage", str(tmp_path)]) == 0
    assert list((tmp_path / "reports").glob("qwen3-first-*_sweep00001/report.html"))


@pytest.mark.parametrize(
    ("storage", "uri", "command"),
    [
        ("mlruns", None, "python -m q3q.track sync --storage mlruns"),
        ("my runs", None, "python -m q3q.track sync --storage 'my runs'"),
        ("s3://b/q", "http://h:1", "python -m q3q.track sync --storage s3://b/q --uri http://h:1"),
        (
            "mlruns",
            "http://ada:secret@h",
            "python -m q3q.track sync --storage mlruns --uri 'http://***@h'",
        ),
    ],
)
def test_the_command_to_sync_names_the_storage_and_a_tracker_elsewhere(
    storage: str, uri: str | None, command: str
) -> None:
    assert sync_command(storage, uri) == command
    if uri is None:
        assert MlflowTracker(f"sqlite:///{storage}/mlflow.db", storage).sync == command
