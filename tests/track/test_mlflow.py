"""Laws of the tracker, on real MLflow stores: a SQLite file, and a server in its own process."""

import json
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from q3q.errors import EXIT_FAILED, EXIT_MISUSED, NotRegisteredError, TrackingError
from q3q.export.marker import write_marker
from q3q.placement import Placement, Trial
from q3q.record import COMPLETED, FAILED, Check, SiteError, Sweep, TrialRecord
from q3q.spec import TrialSpec
from q3q.track.mlflow import MlflowTracker
from q3q.track.mlflow_fields import flat
from q3q.track.mlflow_sqlite import read_uri
from q3q.track.tracker import Tracker
from tests.mlflow_server import free_port, kill, serve
from tests.specs import changed, evaluation_of, make_spec
from tests.trackers import MemoryTracker

COMMAND = "python launch.py -m method=gptq bits=2,3"


def spec(bits: int = 3, **changes: Any) -> TrialSpec:
    asked = evaluation_of("stories", tasks=["stories_who"])
    return make_spec("gptq", bits, **{"evaluation": asked, **changes})


def record(bits: int = 3, **changes: Any) -> TrialRecord:
    whole = TrialRecord(
        spec=spec(bits),
        status=COMPLETED,
        metrics={
            "perplexity/stories": 3.5,
            "stories_who/acc": 0.75,
            "seconds/quantize": 1.25,
            "model_bytes": 9e6,
        },
        intervals={"perplexity/stories": (3.25, 3.75)},
        environment={
            "git_commit": "0123abc+changes",
            "started": "2026-01-02T03:04:05.500+00:00",
            "ended": "2026-01-02T03:04:15.750+00:00",
        },
    )
    return replace(whole, **changes)


def sweep(*trials: Trial | TrialSpec, id: str = "sweep00001") -> Sweep:
    placed = [one if isinstance(one, Trial) else Trial(one) for one in trials or (spec(2), spec(3))]
    return Sweep(id=id, name="gptq", command=COMMAND, config="bits: 3\n", trials=tuple(placed))


def tracker_in(folder: Path) -> MlflowTracker:
    return MlflowTracker(f"sqlite:///{folder}/mlflow.db", str(folder))


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store, shared by tests with experiments of their own; its name is odd."""
    folder = tmp_path_factory.mktemp("größer als 1 %")
    tracker_in(folder).check()
    return folder


@pytest.fixture
def tracker(store: Path, request: pytest.FixtureRequest) -> MlflowTracker:
    return MlflowTracker(f"sqlite:///{store}/mlflow.db", experiment=request.node.name)


def client_of(tracker: MlflowTracker) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=tracker.uri)


def reopened(tracker: MlflowTracker) -> MlflowTracker:
    """Return a tracker of the same experiment with the sweep open, as a later process has it."""
    later = MlflowTracker(tracker.uri, experiment=tracker.experiment)
    later.open(sweep())
    return later


def runs(tracker: MlflowTracker, query: str = "") -> list[Any]:
    """Return the active runs of the tracker's experiment, as another client sees them."""
    client = client_of(tracker)
    experiment = client.get_experiment_by_name(tracker.experiment)
    return [] if experiment is None else list(client.search_runs([experiment.experiment_id], query))


def children(tracker: MlflowTracker) -> list[Any]:
    return [run for run in runs(tracker) if "mlflow.parentRunId" in run.data.tags]


def parents(tracker: MlflowTracker) -> list[Any]:
    return runs(tracker, "tags.`q3q.sweep` LIKE '%'")


def artifact(run: Any, tracker: MlflowTracker, name: str, tmp_path: Path) -> bytes:
    client = client_of(tracker)
    return Path(client.download_artifacts(run.info.run_id, name, str(tmp_path))).read_bytes()


def disk_full(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def test_both_trackers_have_the_interface(tracker: MlflowTracker) -> None:
    memory = MemoryTracker()
    trackers: list[Tracker] = [memory, tracker]
    for one in trackers:
        one.check()
        one.open(sweep())
        one.live(spec(), {"block/weight_error": 0.5}, 0)
        one.log(record(), {"a": b"1"})
        one.close({"table.md": b"t"}, succeeded=True)
    assert [run.data.tags["q3q.trial"] for run in children(tracker)] == list(memory.records)
    assert memory.records == {spec().id: record()}
    assert memory.artifacts[spec().id] == {"a": b"1"}
    assert memory.steps == {spec().id: [(0, {"block/weight_error": 0.5})]}
    assert (memory.sweep, memory.succeeded, memory.closing) == (sweep(), True, {"table.md": b"t"})


def test_a_trial_is_read_back_whole(tracker: MlflowTracker, tmp_path: Path) -> None:
    tracker.open(sweep())
    tracker.log(record(), {"record.json": b"{}", "figures/heatmap.png": b"png"})
    tracker.close(
        {"answer.md": b"**demo**\n\n| gptq | 3.5 |", "perplexity.png": b"p"}, succeeded=True
    )

    [parent] = parents(tracker)
    assert parent.info.run_name == "gptq"
    assert parent.info.status == "FINISHED"
    assert parent.data.params == {
        "models": "demo",
        "methods": "gptq",
        "bits": "2, 3",
        "group_sizes": "128",
        "act_bits": "-",
        "seeds": "0",
        "trials": "2",
    }
    assert COMMAND in parent.data.tags["mlflow.note.content"]
    assert "| gptq | 3.5 |" in parent.data.tags["mlflow.note.content"]
    assert artifact(parent, tracker, "config.yaml", tmp_path) == b"bits: 3\n"
    assert artifact(parent, tracker, "perplexity.png", tmp_path) == b"p"

    [child] = children(tracker)
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert child.info.run_name == "gptq w3 g128 · demo"
    assert child.info.status == "FINISHED"
    assert child.info.end_time - child.info.start_time == 10_250
    asked, params = flat(spec()), child.data.params
    assert {name: params[name] for name in ("method", "bits", "group_size", "model", "dtype")} == {
        "method": "gptq",
        "bits": "3",
        "group_size": "128",
        "model": "demo",
        "dtype": "float32",
    }
    assert params["calibration"] == asked["calibration.source"]
    assert not [name for name in params if name.startswith(("scheme.", "method.name"))]
    assert len(params) == len(asked) - ("scheme.act_bits" in asked)
    assert child.data.metrics == {
        "answer/perplexity of stories": 3.5,
        "answer/acc of stories_who": 0.75,
        "ppl stories": 3.5,
        "acc stories_who": 0.75,
        "size MB": 9.0,
        "perplexity/stories": 3.5,
        "perplexity/stories.low": 3.25,
        "perplexity/stories.high": 3.75,
        "stories_who/acc": 0.75,
        "seconds/quantize": 1.25,
        "model_bytes": 9e6,
    }
    tags = child.data.tags
    assert tags["q3q.trial"] == spec().id
    assert tags["q3q.quantization"] == spec().quantization_id
    assert [tags[f"q3q.{key}"] for key in ("method", "model", "status", "git_commit")] == [
        "gptq",
        "demo",
        "COMPLETED",
        "0123abc+changes",
    ]
    assert tags["mlflow.source.git.commit"] == "0123abc"
    assert "q3q.reason" not in tags
    assert artifact(child, tracker, "record.json", tmp_path) == b"{}"
    assert artifact(child, tracker, "figures/heatmap.png", tmp_path) == b"png"


def test_what_is_not_a_number_is_said_in_words(tracker: MlflowTracker) -> None:
    tracker.open(sweep())
    tracker.log(
        record(
            2, metrics={"bits_per_weight": 2.25}, intervals={}, diverged=("perplexity/stories",)
        ),
        {},
    )
    failed = Check(name="levels", passed=False, detail="9 levels in a group of 3 bits")
    tracker.log(
        record(
            3, status=FAILED, reason="levels: 9 levels", checks=(failed,), metrics={}, intervals={}
        ),
        {},
    )
    tracker.close({}, succeeded=False)
    diverged, broken = sorted(children(tracker), key=lambda run: run.info.run_name)
    assert diverged.data.tags["q3q.diverged"] == "perplexity/stories"
    assert diverged.data.metrics == {"bits_per_weight": 2.25}
    assert diverged.info.status == "FINISHED"
    assert broken.info.status == "FAILED"
    assert broken.data.tags["q3q.reason"] == "levels: 9 levels"
    assert "9 levels in a group of 3 bits" in broken.data.tags["mlflow.note.content"]
    assert parents(tracker)[0].info.status == "FAILED"


def test_texts_longer_than_mlflow_takes_are_cut(tracker: MlflowTracker) -> None:
    tasks = [f"a_task_with_a_long_name_{number}" for number in range(400)]
    long = spec(evaluation=evaluation_of(tasks=tasks))
    many = {f"task_{number}/acc": number / 2000 for number in range(2000)}
    tracker.open(replace(sweep(long), command="python launch.py " + "x" * 9000))
    tracker.log(
        record(spec=long, status=FAILED, reason="boom " * 5000, metrics=many, intervals={}), {}
    )
    [child] = children(tracker)
    assert child.data.params["evaluation.tasks"].startswith('["a_task_with_a_long_name_0"')
    assert child.data.params["evaluation.tasks"].endswith("…")
    assert child.data.tags["q3q.reason"].startswith("boom boom")
    assert {name: value for name, value in child.data.metrics.items() if name in many} == many


def test_a_rerun_replaces_the_failed_trial(tracker: MlflowTracker) -> None:
    tracker.open(sweep())
    tracker.log(TrialRecord.failed(Trial(spec()), "the worker died"), {})
    tracker.log(record(2), {})
    tracker.close({}, succeeded=False)
    again = reopened(tracker)
    again.log(record(), {"record.json": b"1"})
    again.close({}, succeeded=True)
    found = {run.data.tags["q3q.trial"]: run for run in children(tracker)}
    assert len(children(tracker)) == 2
    assert found[spec().id].info.status == "FINISHED"
    assert "q3q.reason" not in found[spec().id].data.tags


def test_the_same_sweep_goes_on_in_its_parent_and_another_gets_its_own(
    tracker: MlflowTracker,
) -> None:
    tracker.open(sweep())
    tracker.close({}, succeeded=False)
    again = MlflowTracker(tracker.uri, experiment=tracker.experiment)
    again.open(replace(sweep(), command="python launch.py -m bits=2,3 method=gptq"))
    [parent] = parents(tracker)
    assert parent.info.status == "RUNNING"
    assert "bits=2,3 method=gptq" in parent.data.tags["q3q.command"]
    again.close({}, succeeded=True)
    other = MlflowTracker(tracker.uri, experiment=tracker.experiment)
    other.open(sweep(id="sweep00002"))
    assert {run.data.tags["q3q.sweep"]: run.info.status for run in parents(tracker)} == {
        "sweep00001": "FINISHED",
        "sweep00002": "RUNNING",
    }


def test_a_child_left_half_written_is_replaced(
    tracker: MlflowTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    tracker.open(sweep())
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_artifacts", disk_full)
        with pytest.raises(
            TrackingError, match=f"did not take trial {spec().id}.*No space left on device"
        ):
            tracker.log(record(), {"record.json": b"1"})
    assert [run.info.status for run in children(tracker)] == ["RUNNING"]
    tracker.log(record(), {"record.json": b"1"})
    assert [run.info.status for run in children(tracker)] == ["FINISHED"]


def test_what_was_charted_live_is_charted_again_if_its_run_is_replaced(
    tracker: MlflowTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    sites = tuple(
        SiteError(block=k, site="o", linear="a", weight_error=0.25, output_error=None)
        for k in range(3)
    )
    tracker.open(sweep())
    tracker.live(spec(), {"block/weight_error": 0.25}, 0)
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_artifacts", disk_full)
        with pytest.raises(TrackingError):
            tracker.log(record(sites=sites), {"a": b"1"})
    tracker.open(sweep())
    tracker.log(record(sites=sites), {"a": b"1"})
    [child] = children(tracker)
    drawn = client_of(tracker).get_metric_history(child.info.run_id, "block/weight_error")
    assert sorted(point.step for point in drawn) == [0, 1, 2]


def test_runs_that_a_dead_driver_left_are_ended_and_go(
    tracker: MlflowTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It died before it deleted the run that a record replaces, and while another trial ran."""
    from mlflow.tracking import MlflowClient

    tracker.open(sweep())
    tracker.log(record(status=FAILED, reason="once"), {})
    tracker.live(spec(2), {"block/weight_error": 0.5}, 0)
    with monkeypatch.context() as patch:
        patch.setattr(
            MlflowClient,
            "delete_run",
            lambda *_: (_ for _ in ()).throw(OSError("the server is gone")),
        )
        with pytest.raises(TrackingError):
            tracker.log(record(environment={"started": "2026-01-02T05:00:00+00:00"}), {})
    again = reopened(tracker)
    assert sorted(run.info.status for run in children(tracker)) == ["FAILED", "FINISHED", "KILLED"]
    again.log(record(environment={"started": "2026-01-02T05:00:00+00:00"}), {})
    again.log(record(2), {})
    assert [run.info.status for run in children(tracker)] == ["FINISHED", "FINISHED"]


def test_a_hundred_params_and_more_are_all_there_before_the_digest_is(
    tracker: MlflowTracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's client sends a hundred at a time, and all tags with the first."""
    from mlflow.tracking._tracking_service.client import TrackingServiceClient

    knobs = {f"knob_{i}": i for i in range(250)}
    many = replace(spec(), method=changed(spec().method, knobs=knobs))
    tracker.open(sweep(many))
    requests = []
    log_batch = TrackingServiceClient.log_batch

    def noted(
        self: Any, run: str, metrics: Any = (), params: Any = (), tags: Any = (), **how: Any
    ) -> Any:
        requests.append((len(params), [tag.key for tag in tags]))
        return log_batch(self, run, metrics, params, tags, **how)

    monkeypatch.setattr(TrackingServiceClient, "log_batch", noted)
    tracker.log(replace(record(), spec=many), {})
    [child] = children(tracker)
    assert len([name for name in child.data.params if "knob_" in name]) == 250
    assert all(count <= 100 for count, _ in requests)
    assert [index for index, (_, tags) in enumerate(requests) if "q3q.record" in tags] == [
        len(requests) - 1
    ]


def test_our_own_mistakes_are_not_called_tracking_errors(tracker: MlflowTracker) -> None:
    tracker.open(sweep())
    with pytest.raises(TypeError):
        tracker.log(record(), {"record.json": "text, not bytes"})  # type: ignore[dict-item]
    with pytest.raises(TrackingError, match=r"open\(\) comes before"):
        MlflowTracker(tracker.uri).log(record(), {})


def test_a_fresh_store_is_what_mlflow_itself_would_make(store: Path, tmp_path: Path) -> None:
    """Same tables, same migration: ours is only quicker."""
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    SqlAlchemyStore(f"sqlite:///{tmp_path}/theirs.db", str(tmp_path)).engine.dispose()
    ours, theirs = (sqlite3.connect(path) for path in (store / "mlflow.db", tmp_path / "theirs.db"))
    tables, version = (
        "SELECT name, sql FROM sqlite_master",
        "SELECT version_num FROM alembic_version",
    )
    assert ours.execute(version).fetchall() == theirs.execute(version).fetchall()
    # Migrations write a table's constraints in any order.
    ours_by_name, theirs_by_name = (
        {name: sorted(re.split(r"[\s,]+", sql or "")) for name, sql in one.execute(tables)}
        for one in (ours, theirs)
    )
    assert len(theirs_by_name) > 50
    assert ours_by_name == theirs_by_name


def test_a_check_leaves_a_store_and_nothing_else(tmp_path: Path) -> None:
    tracker = MlflowTracker(f"sqlite:///{tmp_path}/new/mlflow.db")
    tracker.check()
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "mlflow.db"]
    assert runs(tracker) == []


def test_a_relative_file_lies_in_the_working_directory_whatever_comes_later(
    store: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(store)
    tracker = MlflowTracker("sqlite:///mlflow.db", experiment="relative")
    monkeypatch.chdir(tmp_path)
    tracker.open(sweep())
    assert read_uri(tracker.uri)[1] == store / "mlflow.db"
    assert Path(artifact(parents(tracker)[0], tracker, "config.yaml", tmp_path).decode()) == Path(
        "bits: 3\n"
    )
    assert not list(tmp_path.glob("mlflow.db"))


@pytest.mark.parametrize(
    "uri",
    ["mlruns", "file:///tmp/mlruns", "postgresql://user:secret@host/db", "sqlite:///:memory:"],
)
def test_a_uri_that_cannot_be_meant_is_refused_at_once(uri: str) -> None:
    with pytest.raises(
        TrackingError, match="give sqlite:///FILE, or the address of an MLflow server"
    ) as refusal:
        MlflowTracker(uri)
    assert "secret" not in str(refusal.value)


def test_files_that_are_no_store_are_refused_and_left_as_they_are(tmp_path: Path) -> None:
    text = tmp_path / "notes.txt"
    text.write_text("these are notes, and by no means a database\n" * 20)
    for path, why in (
        (text, "not a database"),
        (tmp_path, "unable to open"),
        (text / "deeper.db", "File exists"),
    ):
        with pytest.raises(TrackingError, match=why) as refusal:
            MlflowTracker(f"sqlite:///{path}").check()
        assert str(path) in str(refusal.value)
        assert "\n" not in str(refusal.value)
    assert list(tmp_path.iterdir()) == [text]


def test_a_deleted_experiment_is_said_to_be_deleted(tracker: MlflowTracker) -> None:
    tracker.open(sweep())
    client = client_of(tracker)
    client.delete_experiment(parents(tracker)[0].info.experiment_id)
    with pytest.raises(TrackingError, match="was deleted there; restore it"):
        MlflowTracker(tracker.uri, experiment=tracker.experiment).check()


def test_an_address_that_refuses_or_keeps_silent_is_an_error_after_one_request() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        port = silent.getsockname()[1]
        with pytest.raises(
            TrackingError, match=rf"track.uri=http://127.0.0.1:{port} .*Connection refused"
        ):
            MlflowTracker(f"http://127.0.0.1:{port}").check()
        silent.listen()
        with pytest.raises(
            TrackingError, match=r"timed out.*see that an MLflow server answers"
        ) as refusal:
            MlflowTracker(f"http://user:secret@127.0.0.1:{port}").check()
        assert "secret" not in str(refusal.value)
        silent.setblocking(False)
        requests = []
        with suppress(BlockingIOError):
            while True:
                requests.append(silent.accept()[0])
        for request in requests:
            request.close()
        assert len(requests) == 1
    assert "MLFLOW_HTTP_REQUEST_TIMEOUT" not in os.environ


@contextmanager
def server(folder: Path, *artifacts: str) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """Run an MLflow server with a store of its own, on a free port."""
    port = free_port()
    process = serve(folder, port, *artifacts)
    try:
        yield f"http://127.0.0.1:{port}", process
    finally:
        kill(process)


@pytest.mark.slow
def test_a_server_takes_the_same_and_its_death_is_an_error_in_bounded_time(tmp_path: Path) -> None:
    with server(tmp_path) as (uri, process):
        tracker = MlflowTracker(uri, str(tmp_path / "storage"))
        tracker.check()
        tracker.open(sweep())
        tracker.log(record(3), {"record.json": b"{}"})
        [child] = children(tracker)
        assert child.data.params["bits"] == "3"
        assert child.data.metrics["perplexity/stories.low"] == 3.25
        assert artifact(child, tracker, "record.json", tmp_path) == b"{}"
        assert list((tmp_path / "served").rglob("record.json"))
        kill(process)
        for end in (lambda: tracker.log(record(2), {}), lambda: tracker.close({}, succeeded=True)):
            started = time.monotonic()
            with pytest.raises(
                TrackingError, match=f"track.uri={uri} did not take .*Connection refused"
            ):
                end()
            assert time.monotonic() - started < 60
    assert not (tmp_path / "storage/artifacts").exists()
    # What the server took before it died is there.
    assert [run.info.run_name for run in children(tracker_in(tmp_path))] == ["gptq w3 g128 · demo"]


def test_a_saved_study_reads_well_without_knowing_q3q(tracker: MlflowTracker) -> None:
    asked = replace(sweep(), question="Which method is best at 2 bits?", expectation="GPTQ.")
    tracker.open(asked)
    answer = b"At 2 bits it is gptq.\n\n**demo**\n\n| gptq | 3.5 |"
    best = {"best at 2 bits/perplexity of stories": 3.5}
    for _ in range(2):
        tracker.close({"answer.md": answer}, succeeded=True, headline=best)
    [parent] = parents(tracker)
    assert parent.data.metrics == best
    assert parent.info.run_name == "Which method is best at 2 bits?"
    note = parent.data.tags["mlflow.note.content"]
    assert note.startswith(
        "At 2 bits it is gptq.\n\n"
        "**Question.** Which method is best at 2 bits?\n\n**Expectation.** GPTQ.\n\n```\n" + COMMAND
    )
    assert note.endswith(
        "| gptq | 3.5 |\n\nThe full report is `report.html` among the artifacts of this run."
    )


def test_an_answer_longer_than_a_note_ends_with_a_whole_table(tracker: MlflowTracker) -> None:
    tables = [f"**model {k}**\n\n" + "| gptq | 3.5 |\n" * 60 for k in range(9)]
    tracker.open(sweep())
    tracker.close({"answer.md": "\n".join(tables).encode()}, succeeded=True)
    note = parents(tracker)[0].data.tags["mlflow.note.content"]
    assert 3000 < len(note) < 5000
    assert note.endswith(
        "| gptq | 3.5 |\n\nThe full report is `report.html` among the artifacts of this run."
    )
    assert note.count("| gptq | 3.5 |") % 60 == 0


def test_trials_that_would_be_called_alike_are_told_apart(tracker: MlflowTracker) -> None:
    from q3q.names import trial_names

    trials = [spec(seed=seed) for seed in (0, 1)] + [spec(2)]
    names = trial_names(trials)
    assert list(names.values()) == [
        "gptq w3 g128 seed 0 · demo",
        "gptq w3 g128 seed 1 · demo",
        "gptq w2 g128 · demo",
    ]
    other = spec(evaluation=evaluation_of())
    assert len(set(trial_names([spec(), other]).values())) == 2
    tracker.open(replace(sweep(*trials), names=names))
    tracker.log(record(spec=trials[1]), {})
    assert children(tracker)[0].info.run_name == "gptq w3 g128 seed 1 · demo"


def test_what_is_known_later_of_an_attempt_joins_its_run(tracker: MlflowTracker) -> None:
    """A comparison comes when the unquantized model's trial has ended; live charts stay."""
    from q3q.record import Comparison

    paired: dict[str, Any] = {
        "low": 0.1,
        "high": 0.3,
        "distinguishable": True,
        "p_value": 0.01,
        "n": 8,
        "test": "t",
    }
    found = Comparison(metric="perplexity/stories", difference=0.2, **paired)
    tracker.open(sweep())
    tracker.live(spec(), {"system/cpu_utilization_percentage": 97.0}, 0)
    tracker.log(record(), {"record.json": b"1"})
    [before] = children(tracker)
    tracker.log(record(comparisons={"perplexity/stories": found}), {"record.json": b"2"})
    again = reopened(tracker)
    again.log(record(comparisons={"perplexity/stories": found}), {"record.json": b"2"})
    [after] = children(tracker)
    assert after.info.run_id == before.info.run_id
    assert after.info.end_time == before.info.end_time
    assert after.data.metrics["perplexity/stories.difference"] == 0.2
    assert "Significantly different" in after.data.tags["mlflow.note.content"]
    client = client_of(tracker)
    for name in ("system/cpu_utilization_percentage", "perplexity/stories"):
        assert len(client.get_metric_history(after.info.run_id, name)) == 1


def test_metrics_have_a_mean_and_digits_that_a_table_has_room_for(tracker: MlflowTracker) -> None:
    asked = evaluation_of(tasks=["a", "b", "mmlu"])
    measured = {
        "a/acc": 0.5,
        "b/acc": 0.25,
        "mmlu/acc": 0.9,
        "perplexity/stories": 1.23456789012,
        "model_bytes": 4212345678.0,
    }
    tracker.open(sweep())
    tracker.log(record(spec=spec(evaluation=asked), metrics=measured, intervals={}), {})
    found = children(tracker)[0].data.metrics
    assert found["accuracy"] == 0.375  # MMLU has five shots
    assert (found["perplexity/stories"], found["model_bytes"]) == (1.234568, 4212345678.0)


def test_metrics_arrive_while_a_trial_runs_and_stay_in_its_one_run(tracker: MlflowTracker) -> None:
    tracker.open(sweep())
    tracker.live(spec(), {"block/weight_error": 0.2, "system/cpu_utilization_percentage": 97.0}, 0)
    [child] = children(tracker)
    assert child.info.status == "RUNNING"
    assert child.info.run_name == "gptq w3 g128 · demo"
    sites = tuple(
        SiteError(block=k, site="o", linear=name, weight_error=error, output_error=None)
        for k in range(2)
        for name, error in (("a", 0.1 + k), ("b", 0.3 + k))
    )
    tracker.log(record(sites=sites), {})
    [ended] = children(tracker)
    assert (ended.info.run_id, ended.info.status) == (child.info.run_id, "FINISHED")
    client = client_of(tracker)
    history = {
        name: sorted(
            (one.step, one.value) for one in client.get_metric_history(child.info.run_id, name)
        )
        for name in ("system/cpu_utilization_percentage", "block/weight_error")
    }
    assert history["system/cpu_utilization_percentage"] == [(0, 97.0)]
    assert [step for step, _ in history["block/weight_error"]] == [0, 1]  # each block once
    assert [error for _, error in history["block/weight_error"]] == pytest.approx([0.2, 1.2])


def test_an_exported_checkpoint_is_a_pointer_with_size_and_hash(tracker: MlflowTracker) -> None:
    tracker.open(sweep())
    facts = {
        "format": "gptq",
        "path": "/served/q3",
        "sha256": "ab12",
        "reloaded_by": "transformers",
    }
    tracker.log(
        record(
            notes={"export": facts}, metrics={"export_bytes": 4200000.0, "model_bytes": 1100000.0}
        ),
        {},
    )
    [child] = children(tracker)
    assert {
        name: child.data.tags[f"q3q.export.{name}"]
        for name in ("format", "path", "sha256", "bytes")
    } == {
        "format": "gptq",
        "path": "/served/q3",
        "sha256": "ab12",
        "bytes": "4200000",
    }


def test_the_sweeps_page_is_a_view_of_its_trials(tracker: MlflowTracker) -> None:
    tracker.open(sweep())
    tracker.log(
        record(
            metrics={"perplexity/stories": 3.0, "seconds/load": 1.0},
            intervals={"perplexity/stories": (2.0, 4.0)},
        ),
        {},
    )
    client = client_of(tracker)
    experiment = client.get_experiment_by_name(tracker.experiment)
    assert experiment is not None
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    assert "Post-training quantization" in experiment.tags["mlflow.note.content"]
    view = json.loads(experiment.tags[f"mlflow.sharedViewState.{sweep().id}"])
    [parent] = parents(tracker)
    assert view["searchFilter"] == f"tags.mlflow.parentRunId = '{parent.info.run_id}'"
    assert (view["orderByKey"], view["orderByAsc"]) == ("metrics.`ppl stories`", True)
    decide = ["metrics.`ppl stories`", "metrics.`size MB`"]
    asked = ["params.`method`", "params.`bits`", "params.`group_size`"]
    assert view["selectedColumns"] == [*decide, *asked]
    always = ["attributes.`Run Name`", "runDateAndNestInfo"]  # MLflow's own: name and time
    assert view["columnOrder"] == [*always, *decide, *asked, "duration"]
    assert set(view["columnWidths"]) == {*always, *decide, *asked}
    assert tracker.page == (
        f"#/experiments/{experiment.experiment_id}/runs?workflowType=machine_learning&viewStateShareKey={sweep().id}"
    )


def test_texts_and_questions_are_data_sets_with_their_digests(tracker: MlflowTracker) -> None:
    asked = evaluation_of("stories", tasks=["piqa"], data={"org/piqa:validation": "abc"})
    tracker.open(sweep())
    tracker.log(record(spec=spec(evaluation=asked)), {})
    [child] = children(tracker)
    found = [
        (one.tags[0].value, one.dataset.name, one.dataset.digest)
        for one in child.inputs.dataset_inputs
    ]
    assert sorted(found) == [
        ("calibration", "demo", "demo-digest"),
        ("evaluation", "org/piqa", "abc"),
        ("evaluation", "stories", "stories-digest"),
    ]


def exported(folder: Path) -> TrialRecord:
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "model.safetensors").write_bytes(b"weights")
    facts = {"format": "gptq", "path": str(checkpoint), "sha256": "ab12"}
    placement = Placement(export=checkpoint)
    return record(spec=spec(export="gptq"), placement=placement, notes={"export": facts})


@pytest.mark.slow
def test_a_server_registers_an_exported_checkpoint_once(tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    with server(tmp_path) as (uri, _):
        one = exported(tmp_path)
        for more in ({}, {"later": 1}):
            tracker = MlflowTracker(uri, register="mine")
            tracker.check()
            tracker.open(sweep())
            tracker.log(replace(one, notes=one.notes | more), {})
        client = MlflowClient(tracking_uri=uri)
        [version] = client.search_model_versions("name = 'mine'")
        [child] = children(tracker)
        assert (version.run_id, version.status) == (child.info.run_id, "READY")
        assert version.tags["q3q.trial"] == one.spec.id
        fetched = client.download_artifacts(
            child.info.run_id, "checkpoint/model.safetensors", str(tmp_path)
        )
        assert Path(fetched).read_bytes() == b"weights"

        # One whose bytes are not those that were published: its run has all else.
        write_marker(tmp_path / "checkpoint", {"trial": one.spec.id}, {})
        (tmp_path / "checkpoint" / "model.safetensors").write_bytes(b"weighty")
        damaged = MlflowTracker(uri, experiment="other", register="yours")
        damaged.open(sweep())
        with pytest.raises(NotRegisteredError, match=r"damaged \(model\.safetensors has another"):
            damaged.log(one, {})
        [child] = children(damaged)
        assert child.info.status == "FINISHED"
        assert child.data.tags["q3q.record"]
        assert not list(client.search_model_versions("name = 'yours'"))


@pytest.mark.slow
def test_a_server_whose_files_are_a_folder_is_refused_before_the_sweep(tmp_path: Path) -> None:
    local = ("--no-serve-artifacts", "--default-artifact-root", str(tmp_path / "files"))
    needs = pytest.raises(
        TrackingError, match=r"track\.register=mine needs a remote artifact store.*/files"
    )
    with server(tmp_path, *local) as (uri, _), needs:
        MlflowTracker(uri, experiment="new", register="mine").check()


def test_registering_needs_a_server_and_says_so(tmp_path: Path) -> None:
    with pytest.raises(
        TrackingError, match=r"track\.register=mine needs a remote artifact store"
    ) as refusal:
        MlflowTracker(f"sqlite:///{tmp_path}/mlflow.db", register="mine").check()
    assert "\n" not in str(refusal.value)


def synced(folder: Path, *options: str) -> int:
    from q3q.track.__main__ import main

    return main(["sync", "--storage", str(folder), *options])


def saved(folder: Path, *bits: int) -> list[Trial]:
    placement = Placement(trials=folder / "trials")
    trials = [Trial(spec(one), placement) for one in bits]
    for trial in trials:
        record(spec=trial.spec, placement=placement).save()
    return trials


def test_an_emptied_store_is_rebuilt_from_the_records_and_again_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    filed, loose = saved(tmp_path, 2, 3)
    replace(sweep(filed), question="Why?", experiment="study").save(tmp_path)
    seen = []
    for _ in range(2):
        assert synced(tmp_path) == 0
        output = capsys.readouterr().out
        for name in ("study", "q3q"):
            tracker = MlflowTracker(f"sqlite:///{tmp_path}/mlflow.db", str(tmp_path), name)
            seen.append(sorted((run.info.run_id, run.info.run_name) for run in runs(tracker)))
        assert "1 of 1 trials are in experiment study" in output
    assert seen[:2] == seen[2:]
    assert sorted(name for _, name in seen[0]) == ["Why?", f"{filed.spec.name} · demo"]
    assert f"{loose.spec.name} · demo" in {name for _, name in seen[1]}


@pytest.mark.parametrize("how", ["moved", "copied"])
def test_a_moved_or_copied_storage_gets_a_new_database_which_its_records_fill(
    how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """MLflow keeps each experiment's address: it would write to the old place."""
    old, new = tmp_path / "old", tmp_path / "new"
    sweep(*saved(old, 2, 3)).save(old)
    assert synced(old) == 0
    if how == "moved":
        old.rename(new)
    else:
        shutil.copytree(old, new, ignore=shutil.ignore_patterns("artifacts"))
    before = sorted(old.rglob("*"))
    capsys.readouterr()
    assert synced(new) == 0
    said = capsys.readouterr()
    line = f"{new}/mlflow.db belongs to the storage {old}, so it is now {new}/mlflow.db.moved."
    assert line in said.out + said.err
    assert (new / "mlflow.db.moved").is_file()
    assert len(children(tracker_in(new))) == 2
    assert sorted(old.rglob("*")) == before
    assert synced(new) == 0
    assert not (new / "mlflow.db.moved2").exists()


def test_a_database_of_its_own_place_serves_several_storages_while_its_files_are_there(
    tmp_path: Path,
) -> None:
    def open_from(storage: str) -> None:
        uri = f"sqlite:///{tmp_path}/shared/mlflow.db"
        MlflowTracker(uri, str(tmp_path / storage)).open(sweep())

    open_from("first")
    open_from("second")
    assert not (tmp_path / "second/artifacts").exists()
    (tmp_path / "first").rename(tmp_path / "third")
    with pytest.raises(TrackingError, match=r"keeps its files in .*/first/artifacts, not in"):
        open_from("third")
    assert not (tmp_path / "first").exists()


def test_a_storage_by_another_of_its_names_was_not_moved(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    tracker_in(tmp_path / "real").open(sweep())
    (tmp_path / "link").symlink_to(tmp_path / "real")
    tracker_in(tmp_path / "link").open(sweep())
    assert len(parents(tracker_in(tmp_path / "real"))) == 1


def test_more_records_without_a_sweep_join_the_others(tmp_path: Path) -> None:
    tracker = tracker_in(tmp_path)
    for bits in (2, 3):
        saved(tmp_path, bits)
        assert synced(tmp_path) == 0
    assert [run.info.run_name for run in parents(tracker)] == ["records without a sweep"]
    assert len(children(tracker)) == 2


def test_a_rebuilt_sweep_has_the_times_when_it_ran(tmp_path: Path) -> None:
    sweep(*saved(tmp_path, 2, 3)).save(tmp_path)
    for _ in range(2):
        assert synced(tmp_path) == 0
        [parent] = parents(tracker_in(tmp_path))
        assert parent.info.start_time == children(tracker_in(tmp_path))[0].info.start_time
        assert parent.info.end_time - parent.info.start_time == 10_250
        assert parent.info.status == "FINISHED"


def test_a_store_that_breaks_half_way_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow.tracking import MlflowClient

    sweep(*saved(tmp_path, 2, 3)).save(tmp_path)
    upload, uploaded = MlflowClient.log_artifacts, []

    def breaks(self: MlflowClient, run: str, folder: str) -> None:
        uploaded.append(run)
        if len(uploaded) > 2:  # the sweep's own, and the first trial's
            disk_full()
        upload(self, run, folder)

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_artifacts", breaks)
        assert synced(tmp_path) == EXIT_FAILED
    told = capsys.readouterr()
    assert "gptq: 1 of 2 records are logged, then: track.uri=" in told.err
    assert "trials are in" not in told.out
    assert synced(tmp_path) == 0
    assert "2 of 2 trials are in experiment q3q" in capsys.readouterr().out
    assert len(children(tracker_in(tmp_path))) == 2


def test_a_sweep_at_work_is_left_to_its_driver(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from q3q.storage.status import StatusWriter
    from q3q.sweep.progress import Display

    sweep(*saved(tmp_path, 2, 3)).save(tmp_path)
    publisher = StatusWriter(tmp_path, "gptq", COMMAND)
    with (tmp_path / "said").open("w") as said, Display(total=2, stream=said, publisher=publisher):
        until = time.monotonic() + 30
        while not list((tmp_path / "running").glob("*.json")) and time.monotonic() < until:
            time.sleep(0.05)
        assert synced(tmp_path) == 0
    assert "gptq: is running, and logs its trials itself" in capsys.readouterr().out
    assert parents(tracker_in(tmp_path)) == []
    assert synced(tmp_path) == 0
    assert len(parents(tracker_in(tmp_path))) == 1


def test_syncing_nothing_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert synced(tmp_path) == EXIT_MISUSED
    assert "holds no records" in capsys.readouterr().err


def test_a_trial_that_was_interrupted_does_not_run_for_ever(tracker: MlflowTracker) -> None:
    tracker.open(sweep())
    tracker.live(spec(), {"block/weight_error": 1.0}, 1)
    tracker.close({}, succeeded=False)
    assert [run.info.status for run in children(tracker)] == ["KILLED"]
    again = reopened(tracker)
    again.log(record(), {})
    assert [run.info.status for run in children(tracker)] == ["FINISHED"]
