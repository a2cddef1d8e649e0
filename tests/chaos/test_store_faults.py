"""Trials and sweeps in a URL's storage, continued by a machine that has its own mirror."""

import csv
import json
import os
import re
import signal
from dataclasses import replace

import pytest

from q3q.placement import Placement
from q3q.record import Progress
from q3q.storage import claim as claim_module
from q3q.storage import object_claims, uploader
from q3q.storage.stores import open_store
from q3q.sweep.made import QUANTIZING, is_over
from q3q.trial import attempt_trial
from tests.chaos.faults import (
    SMALL,
    end_of,
    in_child,
    launch,
    log_of,
    numbers,
    start,
    wait_until,
)
from tests.commands import python
from tests.composed import composed_trial
from tests.stores import make_bucket, s3_server

SWEEP = (
    "method=rtn,gptq",
    "bits=3",
    "calibration.samples=32",
    "evaluation.limit=64",
    "keep=blocks",
)


@pytest.fixture(params=["file", pytest.param("s3", marks=pytest.mark.slow)])
def url(request, tmp_path):
    if request.param == "file":
        yield f"file://{tmp_path}/store"
        return
    with s3_server():
        yield make_bucket("faults") + "/study"


@pytest.fixture
def trial(url, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("Q3Q_MIRRORS", str(tmp_path / "driver"))
    settings = [
        *SMALL,
        "evaluation.drift=true",
        f"model.path={tiny}",
        f"storage={url}",
        "method=gptq",
        "bits=3",
    ]
    return composed_trial(*settings)


def on(node, trial, work):
    """Call work(trial) in a process, as on a machine of that name; return the exit code."""

    def there():
        os.environ["Q3Q_MIRRORS"] = str(node)
        uploader.EVERY_SECONDS = 0.05
        work(replace(trial, placement=trial.placement.here()))

    return end_of(in_child(there))


def in_store(url, name):
    return json.loads(open_store(url).read(name))


def test_a_node_that_is_killed_costs_what_it_had_not_sent_and_another_goes_on(trial, url, tmp_path):
    plain = replace(
        trial, placement=Placement(trials=tmp_path / "plain/trials", model=trial.placement.model)
    )
    reference = attempt_trial(plain)
    assert reference.completed, reference.reason
    blocks = [
        f"trials/blocks/{trial.spec.quantization_id}/block_00{k}.{kind}"
        for k in (0, 1)
        for kind in ("json", "safetensors")
    ]

    def killed(trial):
        store = open_store(url)

        def report(event):
            if event.phase == "quantize" and event.done == 2:
                wait_until(
                    lambda: all(map(store.mark, blocks)), "two blocks"
                )  # they are sent in any order
                os.kill(os.getpid(), signal.SIGKILL)

        attempt_trial(trial, report)

    assert on(tmp_path / "a", trial, killed) == -signal.SIGKILL
    assert not open_store(url).mark(f"trials/{trial.id}/record.json")

    def resumed(trial):
        computed = []
        record = attempt_trial(
            trial, lambda event: computed.append(event) if event.phase == "baseline" else None
        )
        assert record.completed, record.reason
        assert not computed  # the drift's baseline was fetched
        assert record.notes["blocks_from_disk"] == 2

    assert on(tmp_path / "b", trial, resumed) == 0
    left = sorted(name.partition("/")[2] for name in open_store(url).find(f"trials/{trial.id}"))
    names = {name.rpartition("/")[2] for name in left}
    assert names == {"record.json", "samples.parquet", "spec.json", "trial.claim.2", "trial.log"}
    assert numbers(in_store(url, f"trials/{trial.id}/record.json")) == numbers(
        json.loads(json.dumps(reference.to_json()))
    )

    def finds_it_done(trial):
        record = attempt_trial(trial)
        assert record.completed
        assert record.placement.trials == trial.placement.trials
        assert [step.words for step in log_of(trial.folder)].count("start") == 2

    assert on(tmp_path / "c", trial, finds_it_done) == 0


def test_one_that_slept_sends_nothing_over_the_result_of_another(trial, url, tmp_path):
    folder = f"trials/{trial.id}"

    def hasty():
        (
            object_claims.HEARTBEAT_SECONDS,
            object_claims.SILENT_SECONDS,
            uploader.EVERY_SECONDS,
        ) = (
            0.1,
            0.8,
            0.05,
        )

    def sleeper():
        os.environ["Q3Q_MIRRORS"] = str(tmp_path / "a")
        hasty()
        here = replace(trial, placement=trial.placement.here())

        def report(event):
            if event.phase == "quantize" and event.done == 1:
                (tmp_path / "there").touch()
                wait_until((tmp_path / "awake").exists, "the other's result")

        record = attempt_trial(here, report)
        assert record.completed
        assert [step.words for step in log_of(here.folder)].count("stop ClaimLostError") <= 1

    def far(trial):
        hasty()
        claim_module._place = lambda: "another machine"
        assert attempt_trial(trial).completed

    child = in_child(sleeper)
    wait_until((tmp_path / "there").exists, "a block")
    os.kill(child, signal.SIGSTOP)
    assert on(tmp_path / "b", trial, far) == 0
    mark = open_store(url).mark(f"{folder}/record.json")
    before = in_store(url, f"{folder}/record.json")
    (tmp_path / "awake").touch()
    os.kill(child, signal.SIGCONT)
    assert end_of(child) == 0
    assert open_store(url).mark(f"{folder}/record.json") == mark
    assert in_store(url, f"{folder}/record.json") == before
    assert not [name for name in open_store(url).find(folder) if "/blocks/" in name]


def with_limit(trial, limit):
    texts = tuple(replace(text, limit=limit) for text in trial.spec.evaluation.texts)
    evaluation = replace(trial.spec.evaluation, texts=texts, drift=None)
    return replace(trial, spec=replace(trial.spec, evaluation=evaluation))


def reused(trial, url):
    record = in_store(url, f"trials/{trial.id}/record.json")
    assert record["status"] == "COMPLETED", record["reason"]
    return record.get("notes", {}).get("blocks_from_disk", 0)


def elsewhere(node, trial, report, *, silence=120.0):
    """Start a trial in a process, as on another machine of that name; return its id."""

    def work():
        os.environ["Q3Q_MIRRORS"] = str(node)
        claim_module._place = lambda: node.name
        uploader.EVERY_SECONDS = object_claims.HEARTBEAT_SECONDS = 0.05
        object_claims.POLL_SECONDS, object_claims.SILENT_SECONDS = 0.1, silence
        attempt_trial(replace(trial, placement=trial.placement.here()), report)

    return in_child(work)


def test_of_two_machines_at_once_one_makes_the_blocks_and_a_third_finds_them(trial, url, tmp_path):
    trials = [with_limit(trial, limit) for limit in (3, 4)]

    def start(node, own, other):
        def report(event):
            if event.phase == "load":  # both are there before one of them begins
                (tmp_path / own.id).touch()
                wait_until((tmp_path / other.id).exists, "the other")

        return elsewhere(tmp_path / node, own, report)

    children = [start("a", *trials), start("b", *trials[::-1])]
    assert [end_of(child) for child in children] == [0, 0]
    assert sorted(reused(one, url) for one in trials) == [0, 3]
    third = with_limit(trial, 5)
    phases: list[Progress] = []
    os.environ["Q3Q_MIRRORS"] = str(tmp_path / "c")
    assert attempt_trial(replace(third, placement=third.placement.here()), phases.append).completed
    assert reused(third, url) == 3
    assert not [event for event in phases if event.phase == "calibrate" and event.note]


def test_a_sweep_may_start_the_next_trial_on_any_machine_once_the_first_begins_to_evaluate(
    trial, url, tmp_path
):
    first, second = (with_limit(trial, limit) for limit in (3, 4))

    def evaluate_last(event):
        if is_over(QUANTIZING, event):
            (tmp_path / "made").touch()
            wait_until((tmp_path / "evaluated").exists, "the other's evaluation")

    def wait_for_nobody(event):
        assert event.phase != "wait", event.note

    child = elsewhere(tmp_path / "a", first, evaluate_last)
    wait_until((tmp_path / "made").exists, "the blocks")
    assert end_of(elsewhere(tmp_path / "b", second, wait_for_nobody)) == 0
    (tmp_path / "evaluated").touch()
    assert end_of(child) == 0
    assert [reused(one, url) for one in (first, second)] == [0, 3]


def test_a_machine_that_waits_goes_on_at_the_last_block_of_one_that_died(trial, url, tmp_path):
    first, second = (with_limit(trial, limit) for limit in (3, 4))
    blocks = f"trials/blocks/{trial.spec.quantization_id}"

    def die(event):
        if event.phase == "quantize" and event.done == 2:
            sent = [
                f"{blocks}/block_00{k}.{kind}" for k in "01" for kind in ("json", "safetensors")
            ]
            wait_until(lambda: all(map(open_store(url).mark, sent)), "two blocks")
            wait_until((tmp_path / "waits").exists, "one that waits")
            os.kill(os.getpid(), signal.SIGKILL)

    def follow(event):
        if event.phase == "wait":
            (tmp_path / "waits").touch()

    dies = elsewhere(tmp_path / "a", first, die)
    wait_until(lambda: open_store(url).find(blocks), "its blocks")
    follows = elsewhere(tmp_path / "b", second, follow, silence=1.0)
    assert end_of(dies) == -signal.SIGKILL
    assert end_of(follows) == 0
    assert (tmp_path / "waits").exists()
    assert reused(second, url) == 2
    assert len(open_store(url).find(blocks)) == 7  # three blocks of two files, and the mark


def command(module, url, *arguments, **environment):
    return python("-m", f"q3q.{module}", "--storage", url, *arguments, **environment)


def test_a_plan_on_a_url_starts_nothing_and_leaves_nothing_there(tiny, tmp_path):
    url = f"file://{tmp_path}/store"
    code, said = launch(
        url, tiny, *SWEEP, "keep=auto", "plan=true", Q3Q_MIRRORS=str(tmp_path / "a")
    )
    assert code == 0, said
    assert f"State and records: {url}" in said
    assert f"Quantized blocks stay in {url}/trials/blocks for later evaluations: at most" in said
    assert open_store(url).find("") == {}


@pytest.mark.slow
def test_a_sweep_on_a_url_whose_driver_is_killed_and_that_another_machine_completes(
    url, tiny, tmp_path
):
    """A second driver is refused meanwhile; a third machine lists, reports and deletes later."""
    here, there, third = ({"Q3Q_MIRRORS": str(tmp_path / name)} for name in "abc")
    process, store = start(url, tiny, *SWEEP, **here), open_store(url)

    def sent(name):
        return [one for one in store.find("trials") if one.endswith(name)]

    wait_until(
        lambda: sent("trial.log") or process.poll() is not None, "a trial's log in the store"
    )
    code, said = launch(url, tiny, *SWEEP, **there)
    assert code == 2, said
    assert re.search(
        rf"this sweep is running already: process {process.pid} on .* --storage {re.escape(url)} ",
        said,
    )
    wait_until(lambda: sent("record.json") or process.poll() is not None, "a record in the store")
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    done = {name: store.mark(name) for name in sent("record.json")}
    code, said = launch(url, tiny, *SWEEP, **there)
    assert code == 0, said
    assert "Records and report are in" in said
    records = {name: json.loads(store.read(name)) for name in sent("record.json")}
    assert len(records) == 2
    assert {record["status"] for record in records.values()} == {"COMPLETED"}
    for name in done:
        log = store.read(name.replace("record.json", "trial.log")).decode()
        assert log.count(" end COMPLETED") == 1
    assert sent("block_000.safetensors")  # keep=blocks
    assert any(name.endswith("report.html") for name in store.find("reports"))

    listed = command("trials", url, **third)
    assert "2 completed" in listed.stdout, listed.stderr
    report = command("report", url, "--format", "csv", **third)
    rows = list(csv.DictReader(report.stdout.splitlines()))
    assert {(row["trial"], row["method"], row["status"]) for row in rows} == {
        (name.split("/")[1], record["spec"]["method"]["name"], "COMPLETED")
        for name, record in records.items()
    }, report.stdout + report.stderr
    assert len(rows) == 2
    trial = next(iter(records)).split("/")[1]
    deleted = command("trials", url, "delete", trial, **third)
    assert deleted.returncode == 0, deleted.stderr
    assert not store.find(f"trials/{trial}")
    assert "1 completed" in command("trials", url, **there).stdout  # gone from its mirror as well
