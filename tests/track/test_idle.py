"""Laws of a study with nothing left to run: MLflow is left alone while it holds just that study."""

import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from q3q.track.idle import IdleTracker
from q3q.track.mlflow import MlflowTracker
from tests.track.test_mlflow import COMMAND, children, parents, record, spec, sweep, tracker_in

STUDY = replace(sweep(spec(2), spec(3)), id="idle")
RECORDS = [record(2), record(3)]
FILES = {"answer.md": b"**gptq**\n\n| gptq | 3.5 |", "plots/bits.png": b"png"}
HEADLINE = {"best perplexity": 3.5}


def log_all(tracker: MlflowTracker | IdleTracker, study: Any = STUDY, **changes: Any) -> None:
    tracker.open(study)
    for one in changes.get("records", RECORDS):
        tracker.log(one, {"record.json": b"{}"})
    tracker.close(changes.get("files", FILES), changes.get("succeeded", True), HEADLINE)


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, sqlite3.Connection]:
    """A storage folder whose MLflow holds the whole study, and a copy of its database."""
    folder = tmp_path_factory.mktemp("logged") / "storage"
    log_all(tracker_in(folder))
    copy = sqlite3.connect(":memory:", check_same_thread=False)
    with closing(sqlite3.connect(folder / "mlflow.db")) as database:
        database.backup(copy)
    return folder, copy


@pytest.fixture
def storage(logged: tuple[Path, sqlite3.Connection]) -> Path:
    """The same folder as it was at first; MLflow keeps the database's file open."""
    folder, copy = logged
    with closing(sqlite3.connect(folder / "mlflow.db")) as database:
        copy.backup(database)
    files = place_of_files(folder)
    for name, content in {**FILES, "config.yaml": STUDY.config.encode()}.items():
        (files / name).write_bytes(content)
    return folder


def sql(storage: Path, statement: str) -> None:
    with closing(sqlite3.connect(storage / "mlflow.db")) as connection, connection:
        assert connection.execute(statement).rowcount > 0


def place_of_files(storage: Path) -> Path:
    [parent] = parents(tracker_in(storage))
    return storage / "artifacts" / parent.info.run_id / "artifacts"


def test_where_nothing_differs_mlflow_is_not_loaded(
    storage: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tracker_in(storage)
    first.open(STUDY)
    page = first.page
    first.close(FILES, True, HEADLINE)
    monkeypatch.setattr(MlflowTracker, "open", lambda *_: pytest.fail("MLflow was opened"))
    before = (storage / "mlflow.db").read_bytes()
    idle = IdleTracker(tracker_in(storage))
    log_all(idle)
    assert (storage / "mlflow.db").read_bytes() == before
    assert idle.page == page


OF_SWEEP = "run_uuid IN (SELECT run_uuid FROM tags WHERE key = 'q3q.sweep')"
OF_TRIAL = f"run_uuid IN (SELECT run_uuid FROM tags WHERE value = '{spec(3).id}')"
DAMAGES: dict[str, str | Callable[[Path], object]] = {
    "a trial's run is deleted": f"UPDATE runs SET lifecycle_stage = 'deleted' WHERE {OF_TRIAL}",
    "a trial's run holds another record": (
        f"UPDATE tags SET value = 'f00' WHERE {OF_TRIAL} AND key = 'q3q.record'"
    ),
    "a trial's run is incomplete": f"DELETE FROM tags WHERE {OF_TRIAL} AND key = 'q3q.record'",
    "the sweep's run is deleted": f"UPDATE runs SET lifecycle_stage = 'deleted' WHERE {OF_SWEEP}",
    "the sweep's run goes on": f"UPDATE runs SET status = 'RUNNING' WHERE {OF_SWEEP}",
    "the sweep's run failed": f"UPDATE runs SET status = 'FAILED' WHERE {OF_SWEEP}",
    "the note is another": (
        f"UPDATE tags SET value = 'x' WHERE {OF_SWEEP} AND key = 'mlflow.note.content'"
    ),
    "the command is another": (
        f"UPDATE tags SET value = 'x' WHERE {OF_SWEEP} AND key = 'q3q.command'"
    ),
    "the headline is another": f"UPDATE latest_metrics SET value = 9 WHERE {OF_SWEEP}",
    "a plot is gone": lambda storage: (place_of_files(storage) / "plots/bits.png").unlink(),
    "the config is cut off": lambda storage: (place_of_files(storage) / "config.yaml").write_text(
        ""
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_whatever_differs_is_mended(storage: Path, damage: str) -> None:
    do = DAMAGES[damage]
    sql(storage, do) if isinstance(do, str) else do(storage)
    log_all(IdleTracker(tracker_in(storage)))
    assert_whole(storage)


@pytest.mark.parametrize("content", [None, b"", b"no database"])
def test_a_database_that_is_none_is_made_again(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "mlflow.db").write_bytes(content)
    log_all(IdleTracker(tracker_in(tmp_path)))
    assert_whole(tmp_path)


def assert_whole(storage: Path) -> None:
    tracker = tracker_in(storage)
    [parent] = parents(tracker)
    assert parent.info.status == "FINISHED"
    assert parent.data.metrics == HEADLINE
    assert parent.data.tags["q3q.command"] == COMMAND
    assert "| gptq | 3.5 |" in parent.data.tags["mlflow.note.content"]
    files = place_of_files(storage)
    assert (files / "plots/bits.png").read_bytes() == b"png"
    assert (files / "config.yaml").read_text() == STUDY.config
    tags = [run.data.tags for run in children(tracker)]
    own = [one for one in tags if one["mlflow.parentRunId"] == parent.info.run_id]
    assert sorted(one["q3q.trial"] for one in own) == sorted([spec(2).id, spec(3).id])
    assert all(one["q3q.record"] not in ("", "f00") for one in own)


@pytest.mark.parametrize(
    "change",
    [
        {"records": [record(2), record(3, metrics={"perplexity/stories": 9.0})]},
        {"files": {**FILES, "plots/bits.png": b"gnp"}},
        {"succeeded": False},
        {"records": [record(2)]},
    ],
)
def test_what_the_study_has_more_is_written(storage: Path, change: dict[str, Any]) -> None:
    log_all(IdleTracker(tracker_in(storage)), **change)
    tracker = tracker_in(storage)
    [parent] = parents(tracker)
    assert (parent.info.status == "FINISHED") == change.get("succeeded", True)
    files = change.get("files", FILES)
    assert (place_of_files(storage) / "plots/bits.png").read_bytes() == files["plots/bits.png"]
    measured = {run.data.metrics["perplexity/stories"] for run in children(tracker)}
    assert measured == ({3.5, 9.0} if len(change.get("records", [])) == 2 else {3.5})


def test_another_storage_or_experiment_is_not_taken_for_this_one(storage: Path) -> None:
    sql(storage, "UPDATE tags SET value = 'other' WHERE key = 'q3q.storage'")
    assert tracker_in(storage).held(STUDY) is None
    other = MlflowTracker(f"sqlite:///{storage}/mlflow.db", str(storage), "another")
    assert other.held(STUDY) is None
    assert MlflowTracker("http://127.0.0.1:9", str(storage)).held(STUDY) is None
