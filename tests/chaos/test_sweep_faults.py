"""A whole sweep, Ray and MLflow included, survives what befalls its workers and its driver."""

import json
import os
import platform
import re
import signal
import subprocess
import sys
import time

import pytest

from q3q.storage.status import SweepStatus
from tests.chaos.faults import (
    ROOT,
    Hit,
    blocks_of,
    end_of,
    freeze,
    in_child,
    last_words,
    launch,
    log_of,
    numbers,
    records,
    runs,
    start,
    wait_until,
)
from tests.specs import make_trial

# So many that some are left to be stopped in the phases that are looked for last.
METHODS = ("method=rtn,gptq", "bits=2,3,4,5,6,8")
# Long enough phases to be stopped in; a phase takes a tiny trial some milliseconds.
LONGER = ("calibration.samples=32", "evaluation.limit=64")
PHASES = ["load", "calibrate", "quantize 1 of 3", "evaluate stories", "record"]


@pytest.fixture(scope="module")
def undisturbed(tiny, tmp_path_factory):
    """The numbers of a sweep that nothing befell, by trial."""
    storage = tmp_path_factory.mktemp("undisturbed")
    code, output = launch(storage, tiny, *METHODS, *LONGER)
    assert code == 0, output
    found = {trial: numbers(record) for trial, record in records(storage).items()}
    assert len(found) == 12
    return found


@pytest.fixture(scope="module")
def killed(tiny, undisturbed, tmp_path_factory):
    """A sweep that loses a worker in each phase, each another trial's, and one by SIGTERM."""
    storage = tmp_path_factory.mktemp("killed")
    process = start(storage, tiny, *METHODS, *LONGER)
    hits: dict[str, Hit] = {}
    for phase in PHASES:
        hits[phase] = freeze(storage, phase, {hit.folder.name for hit in hits.values()})
        os.kill(hits[phase].pid, signal.SIGKILL)
    hits["told"] = told = freeze(storage, "quantize", {hit.folder.name for hit in hits.values()})
    os.kill(told.pid, signal.SIGTERM)
    os.kill(told.pid, signal.SIGCONT)
    output, _ = process.communicate(timeout=240)
    return storage, hits, process.returncode, output


@pytest.mark.slow
def test_the_sweep_with_its_dead_workers_ends_as_if_nothing_had_been(killed, undisturbed):
    storage, _, code, output = killed
    assert code == 0, output
    assert {trial: numbers(record) for trial, record in records(storage).items()} == undisturbed
    assert not list(storage.glob("trials/*/failed.json"))
    assert not list(storage.glob("trials/*/blocks"))


@pytest.mark.slow
@pytest.mark.parametrize("phase", PHASES)
def test_a_worker_killed_in_any_phase_was_there_and_its_trial_goes_on_from_its_blocks(
    killed, phase
):
    storage, hits, _, output = killed
    hit = hits[phase]
    assert last_words(hit.folder, hit.pid).startswith(phase)
    assert f"(pid {hit.pid} on " in output
    assert records(storage)[hit.folder.name]["notes"].get("blocks_from_disk", 0) == len(hit.whole)
    assert len({step.pid for step in log_of(hit.folder)}) == 2
    assert [step.words for step in log_of(hit.folder)].count("end COMPLETED") == 1


@pytest.mark.slow
def test_a_worker_that_is_told_to_go_hands_its_trial_back(killed):
    storage, hits, _, output = killed
    told = hits["told"]
    assert last_words(told.folder, told.pid) == "stop HandedBackError"
    assert f"was handed back (pid {told.pid} was asked to end)" in output
    assert not runs(told.pid)
    assert records(storage)[told.folder.name]["notes"]["blocks_from_disk"] >= max(
        1, len(told.whole)
    )


@pytest.mark.slow
def test_mlflow_has_each_trial_once(killed, undisturbed):
    from mlflow import MlflowClient

    storage, *_ = killed
    client = MlflowClient(f"sqlite:///{storage}/mlflow.db")
    found = [
        run
        for one in client.search_experiments()
        for run in client.search_runs([one.experiment_id])
    ]
    trials = [run.data.tags["q3q.trial"] for run in found if "q3q.trial" in run.data.tags]
    assert sorted(trials) == sorted(undisturbed)
    assert {run.info.status for run in found} == {"FINISHED"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143)]
)
def test_a_driver_that_is_killed_or_told_to_go_is_resumed_by_the_same_command(
    tiny, undisturbed, tmp_path, number, code
):
    """Before that a second driver of the same sweep is refused."""
    process = start(tmp_path, tiny, *METHODS, *LONGER)
    wait_until(lambda: records(tmp_path), "a record")
    hit = freeze(tmp_path, "quantize 1 of 3", set())
    if number == signal.SIGKILL:
        refused, said = launch(tmp_path, tiny, *METHODS, *LONGER)
        assert refused == 2, said
        assert re.search(
            rf"this sweep is running already: process {process.pid} on \S+, since .* UTC", said
        )
        assert "q3q.trials --storage" in said
    before = {trial: record["environment"]["ended"] for trial, record in records(tmp_path).items()}
    wait_until(
        lambda: hit.folder.name in at_work_by(tmp_path, process.pid),
        "the driver's word that it is there",
        30,
    )
    os.kill(process.pid, number)
    if number == signal.SIGTERM:
        os.kill(hit.pid, signal.SIGCONT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == code, output
    if number == signal.SIGTERM:
        assert "the same command continues" in output
    workers = {
        step.pid for path in tmp_path.glob("trials/*/trial.log") for step in log_of(path.parent)
    }
    wait_until(lambda: not any(map(runs, workers)), "the end of its workers", 30)
    begun = {path.parent for path in tmp_path.glob("trials/*/spec.json")}
    left = {
        folder.name: blocks_of(folder) for folder in begun if not (folder / "record.json").exists()
    }
    if number == signal.SIGKILL:  # it stood still when its driver died, and so it died there
        assert left[hit.folder.name] == hit.whole
    resumed, said = launch(tmp_path, tiny, *METHODS, *LONGER)
    assert resumed == 0, said
    found = records(tmp_path)
    assert {trial: numbers(record) for trial, record in found.items()} == undisturbed
    assert {
        trial: found[trial]["environment"]["ended"] for trial in before
    } == before  # none of them ran again
    for trial, blocks in left.items():
        # A block is written behind the walk: none may have been there yet.
        assert found[trial]["notes"].get("blocks_from_disk", 0) == len(blocks)
    for folder in tmp_path.glob("trials/*/trial.log"):
        # A worker may die between the record, which is what counts, and the log's last line.
        assert [step.words for step in log_of(folder.parent)].count("end COMPLETED") <= 1


def at_work_by(storage, driver):
    """The trials that a driver's own bulletin says are at work."""
    try:
        bulletin = SweepStatus.load(storage / "running" / f"{platform.node()}-{driver}.json")
    except (OSError, ValueError):
        return []
    return [] if bulletin.over else [work.trial for work in bulletin.view.running]


@pytest.mark.slow
def test_of_two_drivers_that_start_at_the_same_moment_one_runs_the_sweep(
    tiny, undisturbed, tmp_path
):
    both = [start(tmp_path, tiny, *METHODS, *LONGER) for _ in range(2)]
    ended = {process.communicate(timeout=240)[0]: process.returncode for process in both}
    assert sorted(ended.values()) == [0, 2], ended
    [refused] = [output for output, code in ended.items() if code == 2]
    assert "this sweep is running already: process " in refused
    assert {trial: numbers(record) for trial, record in records(tmp_path).items()} == undisturbed
    for path in tmp_path.glob("trials/*/trial.log"):
        assert [step.words for step in log_of(path.parent)].count("start") == 1


@pytest.mark.slow
def test_a_rank_of_a_gang_that_is_killed_costs_nothing_and_the_same_command_runs_nothing_more(
    tiny, undisturbed, tmp_path
):
    sweep = (
        "method=gptq",
        "bits=3",
        *LONGER,
        "cluster.ranks_per_trial=2",
        "cluster.cpus_per_trial=1",
    )
    process = start(tmp_path, tiny, *sweep)
    hit = freeze(tmp_path, "quantize 1 of 3", set())
    [rank] = [step for step in log_of(hit.folder) if step.words == "rank 1 of 2"]
    os.kill(rank.pid, signal.SIGKILL)
    os.kill(hit.pid, signal.SIGCONT)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert (
        last_words(hit.folder, rank.pid) == "rank 1 of 2"
    )  # it was in step with rank 0, which stood still there
    assert f"(pid {rank.pid} on " in output
    assert ", rank 1 of 2: its process was killed" in output
    found = records(tmp_path)
    assert {trial: undisturbed[trial] for trial in found} == {
        trial: numbers(one) for trial, one in found.items()
    }
    assert found[hit.folder.name]["notes"].get("blocks_from_disk", 0) >= len(hit.whole)
    assert [step.words for step in log_of(hit.folder)].count("rank 1 of 2") == 2
    kept = (hit.folder / "record.json").stat().st_mtime_ns
    code, output = launch(tmp_path, tiny, *sweep)
    assert code == 0, output
    assert (hit.folder / "record.json").stat().st_mtime_ns == kept
    (hit.folder / "record.json").unlink()
    resume = [
        sys.executable,
        "-m",
        "q3q.trials",
        "--storage",
        str(tmp_path),
        "resume",
        hit.folder.name,
    ]
    subprocess.run(resume, cwd=ROOT, check=True)
    again = records(tmp_path)[hit.folder.name]
    assert again["environment"]["loading"]["loader"] == "resident"  # by one process alone
    assert numbers(again) == undisturbed[hit.folder.name]


@pytest.mark.slow
def test_a_second_terminal_follows_a_real_sweep_which_listens_on_loopback_alone(tiny, tmp_path):
    process = start(tmp_path, tiny, "method=rtn", "bits=3,4", *LONGER)
    wait_until(lambda: list(tmp_path.glob("running/*.json")), "its bulletin")
    attach = [sys.executable, "-m", "q3q.trials", "--storage", str(tmp_path), "attach"]
    terminal = subprocess.Popen(
        attach, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    hit = freeze(tmp_path, "quantize", set())
    listening = listening_of(process.pid)
    os.kill(hit.pid, signal.SIGCONT)
    output, _ = process.communicate(timeout=240)
    shown, _ = terminal.communicate(timeout=60)
    assert (process.returncode, terminal.returncode) == (0, 0), output + shown
    assert shown.startswith(f"rtn on {platform.node()}, process {process.pid}: ")
    assert "2 of 2 done; it has ended" in shown
    assert all(f"({number} of 2 done" in shown for number in (1, 2))
    assert listening
    assert all(address.removeprefix("::ffff:") in ("127.0.0.1", "::1") for address in listening), (
        listening
    )


def listening_of(ancestor):
    """Addresses where a process, or one that it started, listens."""
    processes = subprocess.run(
        ["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True
    ).stdout
    family, parents = {ancestor}, [tuple(map(int, line.split())) for line in processes.splitlines()]
    while more := {pid for pid, parent in parents if parent in family} - family:
        family |= more
    told = subprocess.run(["ss", "-Hltnp"], capture_output=True, text=True, check=True).stdout
    found = set()
    for line in told.splitlines():
        if family & set(map(int, re.findall(r"pid=(\d+)", line))):
            found.add(line.split()[3].rpartition(":")[0].strip("[]"))
    return found


@pytest.mark.slow
def test_two_sweeps_that_share_trials_run_each_once(tiny, undisturbed, tmp_path):
    both = [
        start(tmp_path, tiny, *LONGER, *more) for more in (METHODS, ("method=gptq", "bits=4,3,2"))
    ]
    for process in both:
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output
    assert {trial: numbers(record) for trial, record in records(tmp_path).items()} == undisturbed
    for path in tmp_path.glob("trials/*/trial.log"):
        assert [step.words for step in log_of(path.parent)].count("start") == 1


@pytest.mark.slow
def test_of_two_sweeps_that_evaluate_differently_one_quantizes_and_the_other_waits(tiny, tmp_path):
    longer = ("calibration.samples=512", "calibration.length=256")  # a block takes half a second
    same = ("method=gptq", "bits=3", *longer)
    first = start(tmp_path, tiny, *same, "evaluation.limit=3")
    maker = freeze(tmp_path, "quantize", set())
    second = start(tmp_path, tiny, *same, "evaluation.limit=5")

    def waiter():
        folders = {path.parent for path in tmp_path.glob("trials/*/trial.log")} - {maker.folder}
        return [
            one for one in folders if any(step.words.startswith("wait") for step in log_of(one))
        ]

    wait_until(waiter, "a trial that waits for the other's blocks")
    os.kill(maker.pid, signal.SIGCONT)
    for process in (first, second):
        output, _ = process.communicate(timeout=240)
        assert process.returncode == 0, output
    found = records(tmp_path)
    made, read = found.pop(maker.folder.name), *found.values()
    assert [record["notes"].get("blocks_from_disk", 0) for record in (made, read)] == [0, 3]
    assert made["sites"] == read["sites"]
    assert made["metrics"]["perplexity/stories"] != read["metrics"]["perplexity/stories"]


@pytest.mark.slow
def test_a_disk_that_is_full_stops_the_sweep_in_a_line_and_with_room_it_goes_on(
    tiny, undisturbed, small_disk
):
    subprocess.run(["mount", "-o", "remount,size=3m", str(small_disk)], check=True)
    with (small_disk / "filler").open("wb") as file:
        file.write(bytes(2_400_000))
    database = small_disk.parent / "mlflow.db"
    arguments = (*METHODS, *LONGER, f"track.uri=sqlite:///{database}")
    code, output = launch(small_disk, tiny, *arguments)
    assert code == 1, output
    assert "the disk is full" in output
    assert "Traceback" not in output
    (small_disk / "filler").unlink()
    subprocess.run(["mount", "-o", "remount,size=50m", str(small_disk)], check=True)
    code, output = launch(small_disk, tiny, *arguments)
    assert code == 0, output
    assert {trial: numbers(record) for trial, record in records(small_disk).items()} == undisturbed


def test_a_second_terminal_lists_what_runs_by_its_claim(tiny, tmp_path):
    """The claim alone shows that a trial is at work, also under `python -m q3q.trials resume`."""
    from q3q.storage.claim import claimed
    from q3q.trials.__main__ import main
    from q3q.trials.stored import find_trials

    spec = make_trial(storage=tmp_path)
    folder = tmp_path / "trials" / spec.id
    folder.mkdir(parents=True)
    (folder / "spec.json").write_text(json.dumps(spec.to_json()))

    def hold():
        with claimed(folder, "trial"):
            (tmp_path / "held").touch()
            time.sleep(60)

    child = in_child(hold)
    wait_until((tmp_path / "held").exists, "the holder")
    [found] = find_trials(tmp_path)
    assert (found.state, found.waits.partition(" on ")[0]) == ("running", f"process {child}")
    for verb in ("resume", "delete"):
        assert main(["--storage", str(tmp_path), verb, spec.id]) == 2
    os.kill(child, signal.SIGKILL)
    assert end_of(child) == -signal.SIGKILL
    assert find_trials(tmp_path)[0].state == "stopped"
    assert main(["--storage", str(tmp_path), "delete", spec.id]) == 0
