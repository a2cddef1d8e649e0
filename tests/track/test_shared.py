"""Several storages with one MLflow: each keeps runs of its own, and touches no other's."""

import multiprocessing
import shutil
import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine
from sqlalchemy.event import listen, remove

from q3q.placement import Placement, Trial
from q3q.record import FAILED, TrialRecord
from q3q.storage.identity import NAME, storage_id
from q3q.storage.stores import open_store
from q3q.track.mlflow import MlflowTracker
from q3q.track.mlflow_fields import earlier_digest, flat
from q3q.track.wording import NOTE
from tests.mlflow_server import free_port, kill, serve
from tests.track.test_mlflow import children, parents, record, spec, sweep, synced


def shared(folder: Path, storage: str) -> MlflowTracker:
    return MlflowTracker(f"sqlite:///{folder}/shared.db", str(folder / storage))


def of_storage(storage: str, bits: int, attempt: int = 0) -> TrialRecord:
    """Return a record as it would come from its own run of the trial, at its own time."""
    hour = 4 + 3 * attempt + "abc".index(storage[0])
    times = {
        key: f"2026-01-02T{hour:02}:00:0{k}+00:00" for k, key in enumerate(("started", "ended"))
    }
    return record(bits, environment=times)


def run_sweep(tracker: MlflowTracker, storage: str, attempt: int = 0, live: bool = True) -> None:
    tracker.check()
    tracker.open(sweep())
    for bits in (2, 3):
        if live:
            tracker.live(spec(bits), {"block/weight_error": 0.5}, 0)
        tracker.log(of_storage(storage, bits, attempt), {"record.json": b"{}"})
    tracker.close({}, succeeded=True)


def held(tracker: MlflowTracker) -> dict[str, list[tuple[str, str, str]]]:
    """Return trial, status and run of the active children, by the storage that logged them."""
    found: dict[str, list[tuple[str, str, str]]] = {}
    for run in children(tracker):
        facts = (run.data.tags["q3q.trial"], run.info.status, run.info.run_id)
        found.setdefault(run.data.tags["q3q.storage"], []).append(facts)
    return {owner: sorted(runs) for owner, runs in found.items()}


def test_storages_in_turns_keep_one_run_a_trial_each(tmp_path: Path) -> None:
    for storage, attempt in (("a", 0), ("b", 0), ("a", 0), ("b", 1), ("a", 1), ("a", 1), ("b", 1)):
        before = held(shared(tmp_path, "a")) if (tmp_path / "a").exists() else {}
        run_sweep(shared(tmp_path, storage), storage, attempt)
        after = held(shared(tmp_path, "a"))
        own = storage_id(str(tmp_path / storage))
        assert {key: runs for key, runs in before.items() if key != own}.items() <= after.items()
        assert [(trial, status) for trial, status, _ in after[own]] == sorted(
            (spec(bits).id, "FINISHED") for bits in (2, 3)
        )
    assert len(held(shared(tmp_path, "a"))) == len(parents(shared(tmp_path, "a"))) == 2
    pages = set()
    for storage in "ab":
        one = shared(tmp_path, storage)
        one.open(sweep())
        pages.add(one.page)
    assert len(pages) == 2


@pytest.mark.parametrize(
    ("table", "value"), [("experiments", "q3q"), ("experiment_tags", NOTE)], ids=["itself", "note"]
)
def test_a_row_that_another_process_inserts_first_is_no_failure(
    tmp_path: Path, table: str, value: str
) -> None:
    """MLflow inserts what it did not find, and another storage's sweep may do so before it."""
    database = tmp_path / "shared.db"
    shared(tmp_path, "a").check()
    inserted: list[Any] = []

    def insert_first(_: Any, cursor: Any, statement: str, values: Any, *__: Any) -> None:
        if not inserted and statement.startswith(f"INSERT INTO {table} ") and value in values:
            inserted.append(values)
            with closing(sqlite3.connect(database)) as other:
                other.execute(statement, values)
                other.commit()

    listen(Engine, "before_cursor_execute", insert_first)
    try:
        run_sweep(shared(tmp_path, "a"), "a")
    finally:
        remove(Engine, "before_cursor_execute", insert_first)
    assert inserted
    assert [len(runs) for runs in held(shared(tmp_path, "a")).values()] == [2]


def _run(folder: Path, storage: str, gate: Any) -> None:
    gate.wait()
    run_sweep(shared(folder, storage), storage)


@pytest.mark.slow
def test_storages_at_once_keep_one_run_a_trial_each(tmp_path: Path) -> None:
    shared(tmp_path, "a").check()  # else its migrations are most of the test
    spawn = multiprocessing.get_context("spawn")
    gate = spawn.Barrier(2)
    both = [spawn.Process(target=_run, args=(tmp_path, storage, gate)) for storage in "ab"]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
    assert [process.exitcode for process in both] == [0, 0]
    expected = sorted((spec(bits).id, "FINISHED") for bits in (2, 3))
    found = held(shared(tmp_path, "a"))
    assert [[(trial, status) for trial, status, _ in runs] for runs in found.values()] == [
        expected,
        expected,
    ]


@pytest.mark.slow
def test_on_a_server_too(tmp_path: Path) -> None:
    port = free_port()
    server = serve(tmp_path, port)
    try:
        uri = f"http://127.0.0.1:{port}"
        for storage in ("a", "b", "a"):
            run_sweep(MlflowTracker(uri, str(tmp_path / storage)), storage, live=False)
        assert [len(found) for found in held(MlflowTracker(uri)).values()] == [2, 2]
    finally:
        kill(server)


def store_records(folder: Path, *records: TrialRecord) -> None:
    placement = Placement(trials=folder / "trials")
    trials = [Trial(one.spec, placement) for one in records]
    for one in records:
        replace(one, placement=placement).save()
    sweep(*trials).save(folder)


def test_a_copy_takes_the_runs_that_are_there_and_goes_its_own_way_from_then_on(
    tmp_path: Path,
) -> None:
    uri = f"sqlite:///{tmp_path}/shared.db"
    store_records(tmp_path / "a", record(2), record(3))
    assert synced(tmp_path / "a", "--uri", uri) == 0
    tracker = shared(tmp_path, "a")
    before = held(tracker)
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for storage in ("b", "a", "b"):
        assert synced(tmp_path / storage, "--uri", uri) == 0
        assert held(tracker) == before
    assert len(parents(tracker)) == 1
    copy = shared(tmp_path, "b")
    copy.open(sweep())
    owner = storage_id(str(tmp_path / "a"))
    assert copy.page.endswith(f"={sweep().id}-{owner}")  # its table is the one that is there
    assert owner != storage_id(str(tmp_path / "b"))
    store_records(tmp_path / "b", of_storage("c", 2), record(3))
    for storage in ("b", "a", "b"):
        assert synced(tmp_path / storage, "--uri", uri) == 0
        after = held(tracker)
        assert after.pop(owner) == before[owner]
        [[(trial, status, _)]] = after.values()
        assert (trial, status) == (spec(2).id, "FINISHED")


@pytest.mark.parametrize("beside", [True, False])
def test_runs_of_earlier_versions_are_brought_up_to_date_and_not_logged_again(
    beside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They have no storage's id, the digest of their time, and params by other names."""
    from q3q.track import mlflow

    uri = f"sqlite:///{tmp_path}/{'a' if beside else 'elsewhere'}/mlflow.db"
    store_records(tmp_path / "a", record(2), record(3, environment={}))
    with monkeypatch.context() as old:
        old.setattr(mlflow, "storage_id", lambda storage: "")
        old.setattr(mlflow, "record_digest", earlier_digest)
        old.setattr(mlflow, "trial_params", flat)
        assert synced(tmp_path / "a", "--uri", uri) == 0
    tracker = MlflowTracker(uri, str(tmp_path / "a"))
    logged = {run.info.run_id: run.data.params for run in children(tracker)}
    for _ in range(2):
        assert synced(tmp_path / "a", "--uri", uri) == 0
        now = {run.info.run_id: run for run in children(tracker)}
        assert now.keys() == logged.keys()
        for run, params in logged.items():
            assert now[run].data.params.items() >= params.items()
            assert now[run].data.params["bits"] == params["scheme.bits"]
            assert now[run].data.tags["q3q.storage"] == storage_id(str(tmp_path / "a"))
    assert len(parents(tracker)) == 1


def test_runs_of_nobody_known_are_left_alone_in_a_shared_store(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path}/shared.db"
    earlier = MlflowTracker(uri)  # gives no storage's id, as earlier versions did not
    run_sweep(earlier, "a")
    [old] = {run.info.run_id for run in children(earlier) if run.data.params["bits"] == "2"}
    tracker = shared(tmp_path, "b")
    tracker.open(sweep())
    tracker.log(of_storage("b", 2), {})
    tracker.log(record(2, status=FAILED, reason="again", environment={}), {})
    assert old in {run.info.run_id for run in children(tracker)}


def test_an_id_stays_when_the_folder_moves_and_differs_in_a_copy(tmp_path: Path) -> None:
    first = storage_id(str(tmp_path / "a"))
    (tmp_path / "a").rename(tmp_path / "b")
    assert storage_id(str(tmp_path / "b")) == storage_id(str(tmp_path / "b/")) == first
    (tmp_path / "link").symlink_to(tmp_path / "b")
    assert storage_id(str(tmp_path / "link")) == storage_id(str(tmp_path / "b")) == first
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    second = storage_id(str(tmp_path / "c"))
    assert first != second == storage_id(str(tmp_path / "c"))
    assert storage_id(str(tmp_path / "b")) == first
    assert storage_id(str(tmp_path / "new")) not in (first, second)


@pytest.mark.parametrize("damage", [b"", b'{"id": "12', b"\0" * 80, None])
def test_a_damaged_id_is_put_aside(damage: bytes | None, tmp_path: Path) -> None:
    first, path = storage_id(str(tmp_path)), tmp_path / NAME
    path.unlink()
    if damage is None:
        path.mkdir()
    else:
        path.write_bytes(damage)
    assert storage_id(str(tmp_path)) == storage_id(str(tmp_path)) != first
    assert len(list(tmp_path.glob(f"{NAME}.damaged*"))) == 1


def test_a_store_has_an_id_for_all_machines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"file://{tmp_path}/store"
    (tmp_path / "store").mkdir()
    ids = set()
    for machine in "ab":
        monkeypatch.setenv("Q3Q_MIRRORS", str(tmp_path / machine))
        ids.add(storage_id(url))
    assert len(ids) == 1
    assert open_store(url).read(NAME)
