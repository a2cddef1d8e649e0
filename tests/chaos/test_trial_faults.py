"""A trial survives being killed anywhere, damaged files, a full disk, and two processes at once.

Each is a real process. It survived if every number is what it would have been, nothing that was on
disk was done again, and running it again completes it.
"""

import json
import os
import signal
import subprocess
import time
from functools import partial

import pytest

from q3q import trial as trial_module
from q3q.record import TrialRecord
from q3q.storage import claim as claim_module
from q3q.trial import attempt_trial
from tests.chaos.faults import (
    SMALL,
    blocks_of,
    end_of,
    fill_disk,
    in_child,
    last_words,
    log_of,
    numbers,
    runs,
    wait_until,
)
from tests.composed import composed_trial
from tests.damage import flipped, gone

TEXTS = ["evaluation.texts=[demo,library]"]
TASKS = ["evaluation.tasks=[stories_who]", "evaluation.task_limit=4", "evaluation.texts=[]"]
STEPS = [
    "load",
    "calibrate",
    "quantize 1 of 3 blocks",
    "quantize 3 of 3 blocks",
    "evaluate stories, 1 of 2",
    "evaluate library, 2 of 2",
    "record",
]


@pytest.fixture(scope="module")
def trial_of(tiny, tmp_path_factory):
    storage = tmp_path_factory.mktemp("reference")
    always = [
        *SMALL,
        f"model.path={tiny}",
        f"storage={storage}",
        "method=gptq",
        "bits=3",
        "keep=blocks",
    ]
    return partial(composed_trial, *always)


@pytest.fixture(scope="module")
def whole_trial(trial_of):
    return trial_of(*TEXTS)


@pytest.fixture(scope="module")
def reference(whole_trial):
    """The undisturbed trial's numbers."""
    record = attempt_trial(whole_trial)
    assert record.completed, record.reason
    return numbers(plain(record))


@pytest.fixture
def trial(whole_trial, reference, tmp_path):
    return whole_trial.placed(trials=tmp_path / "trials")


def plain(record):
    return json.loads(json.dumps(record.to_json()))


def words_of(event_folder):
    return log_of(event_folder)[-1].words


def killed_at(trial, step):
    """A process that kills itself when its log's last line is a certain one; its id."""
    folder = trial.folder

    def report(event):
        if words_of(folder) == step:
            os.kill(os.getpid(), signal.SIGKILL)

    pid = in_child(lambda: attempt_trial(trial, report))
    assert end_of(pid) == -signal.SIGKILL
    assert last_words(folder, pid) == step
    return pid


def written(trial):
    """Return what is on disk of a trial under way, and when it was written."""
    folder, blocks = trial.folder, trial.kept_blocks_folder
    # A block counts once its facts are there, which are written last.
    facts = list(blocks.glob("block_*.json"))
    tensors = [path.with_suffix(".safetensors") for path in facts]
    found = [*facts, *tensors, *(folder / "evaluations").glob("*.json")]
    return {str(path.relative_to(folder.parent)): path.stat().st_mtime_ns for path in found}


def completed(trial, tmp_path):
    """Run to the end in another process; return the record and the files from just before it."""
    folder, seen = trial.folder, tmp_path / "seen.json"

    def report(event):
        if event.phase == "record":
            seen.write_text(json.dumps(written(trial)))

    assert end_of(in_child(lambda: attempt_trial(trial, report))) == 0
    return TrialRecord.load(folder / "record.json"), json.loads(seen.read_text())


@pytest.mark.parametrize("step", STEPS)
def test_killed_in_any_phase_it_goes_on_and_ends_with_the_same_numbers(
    trial, reference, step, tmp_path
):
    killed_at(trial, step)
    before = written(trial)
    record, after = completed(trial, tmp_path)
    assert numbers(plain(record)) == reference
    assert {name: after[name] for name in before} == before  # nothing that was done is done again
    blocks = sum(name.endswith(".json") for name in before if "block_" in name)
    assert record.notes.get("blocks_from_disk", 0) == blocks
    if step.startswith(("evaluate", "record")):
        assert blocks == 3
    elif step.startswith("quantize"):  # two may have been on their way to the disk
        done = int(step.split()[1])
        assert done - 2 <= blocks <= done


def test_killed_in_a_task_it_goes_on_there(trial_of, tmp_path):
    undisturbed = trial_of(*TASKS)
    trial = undisturbed.placed(trials=tmp_path / "trials")
    killed_at(trial, "evaluate stories_who, 1 of 1")
    record, _ = completed(trial, tmp_path)
    assert record.notes["blocks_from_disk"] == 3
    assert "stories_who/acc" in record.metrics
    assert numbers(plain(record)) == numbers(plain(attempt_trial(undisturbed)))


def test_killed_while_the_record_is_written_it_leaves_no_half_of_one(trial, reference, tmp_path):
    folder = trial.folder

    def die_in_the_middle(file):
        if os.readlink(f"/proc/self/fd/{file}").rpartition("/")[2].startswith(".record.json"):
            os.ftruncate(file, 1000)
            os.kill(os.getpid(), signal.SIGKILL)

    def work():
        os.fsync = die_in_the_middle
        attempt_trial(trial)

    pid = in_child(work)
    assert end_of(pid) == -signal.SIGKILL
    assert last_words(folder, pid) == "record"
    assert [path.stat().st_size for path in folder.glob(".record.json*.partial")] == [1000]
    assert not (folder / "record.json").exists()
    record, _ = completed(trial, tmp_path)
    assert numbers(plain(record)) == reference
    assert record.notes["blocks_from_disk"] == 3
    assert not list(folder.glob(".*"))


def test_killed_after_the_record_it_is_not_run_again(trial, reference):
    folder = trial.folder

    def work():
        trial_module.clear = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
        attempt_trial(trial)

    assert end_of(in_child(work)) == -signal.SIGKILL
    before = (folder / "record.json").stat().st_mtime_ns
    assert (folder / "evaluations").exists()
    assert numbers(plain(attempt_trial(trial))) == reference
    assert (folder / "record.json").stat().st_mtime_ns == before
    assert [step.words for step in log_of(folder)].count("start") == 1
    assert not (folder / "evaluations").exists()  # what was left lying is cleared up
    assert not (folder / "blocks").exists()


def nudge(path):
    """A flipped bit that leaves good JSON: another number."""
    text = path.read_text()
    at = text.index("error") + text[text.index("error") :].index("0.") + 3
    path.write_text(text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :])


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("block_001.safetensors", flipped),
        ("block_001.json", nudge),
        ("block_001.json", gone),
    ],
)
def test_a_damaged_block_is_seen_and_only_it_is_done_again(
    trial, reference, name, damage, tmp_path
):
    killed_at(trial, "evaluate stories, 1 of 2")
    damage(trial.kept_blocks_folder / name)
    record, _ = completed(trial, tmp_path)
    assert numbers(plain(record)) == reference
    assert record.notes["blocks_from_disk"] == 2


def test_a_damaged_record_is_nobodys_result(trial, reference, tmp_path):
    whole, _ = completed(trial, tmp_path)
    flipped(trial.folder / "record.json")
    with pytest.raises(
        ValueError, match=r"damaged|Expecting|delimiter|Unterminated|Invalid|control"
    ):
        TrialRecord.load(trial.folder / "record.json")
    again, _ = completed(trial, tmp_path)
    assert numbers(plain(again)) == numbers(plain(whole)) == reference
    assert again.notes["blocks_from_disk"] == 3  # keep=blocks: quantizing was not lost with it


@pytest.mark.parametrize("step", ["quantize 1 of 3 blocks", "record"])
def test_a_full_disk_is_said_and_with_room_it_goes_on(trial, reference, step, small_disk, tmp_path):
    """A real ENOSPC: of a block, and of the record."""
    trial = trial.placed(trials=small_disk / "trials")
    folder = trial.folder

    def fill(event):
        if words_of(folder) == step:
            fill_disk(small_disk)

    def work():
        record = attempt_trial(trial, fill)
        assert record.status == "FAILED"
        assert "the disk is full" in record.reason
        assert "the same command continues from the last block" in record.reason

    pid = in_child(work)
    assert end_of(pid) == 0
    assert step in [one.words for one in log_of(folder) if one.pid == pid]
    assert not (folder / "record.json").exists()
    assert not list(folder.rglob("*.partial"))
    blocks = blocks_of(folder)
    assert len(blocks) <= 1 if step.startswith("quantize") else len(blocks) == 3
    (small_disk / "filler").unlink()
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    record, after = completed(trial, tmp_path)
    assert numbers(plain(record)) == reference
    kept = f"blocks/{trial.spec.quantization_id}"
    assert {f"{kept}/{name}": time for name, time in blocks.items()}.items() <= after.items()


def test_of_two_processes_one_runs_it_and_the_other_takes_its_result(trial, reference, tmp_path):
    def work(number):
        record = attempt_trial(trial)
        (tmp_path / f"{number}.json").write_text(json.dumps(plain(record)))

    children = [in_child(partial(work, number)) for number in range(3)]
    assert [end_of(child) for child in children] == [0, 0, 0]
    found = [json.loads((tmp_path / f"{number}.json").read_text()) for number in range(3)]
    assert found[0] == found[1] == found[2]
    assert numbers(found[0]) == reference
    assert [step.words for step in log_of(trial.folder)].count("start") == 1


@pytest.mark.parametrize("step", ["quantize 1 of 3 blocks", "record"])
def test_one_that_slept_until_another_machine_took_over_writes_nothing_and_takes_its_result(
    trial, reference, tmp_path, step
):
    folder = trial.folder

    def hasty():
        defaults = claim_module.Claim.__init__.__kwdefaults__
        assert defaults is not None
        defaults.update(heartbeat=0.1, silence=0.8)

    def sleepy():
        hasty()

        def report(event):
            if words_of(folder) == step:
                wait_until((tmp_path / "awake").exists, "the other's result")

        (tmp_path / "a.json").write_text(json.dumps(plain(attempt_trial(trial, report))))

    def far():
        hasty()
        claim_module._place = lambda: "another machine"
        (tmp_path / "b.json").write_text(json.dumps(plain(attempt_trial(trial))))

    sleeper = in_child(sleepy)
    wait_until(lambda: log_of(folder) and words_of(folder) == step, step)
    os.kill(sleeper, signal.SIGSTOP)
    other = in_child(far)
    assert end_of(other) == 0
    assert runs(sleeper)
    kept = (folder / "record.json").stat().st_mtime_ns
    (tmp_path / "awake").touch()
    os.kill(sleeper, signal.SIGCONT)
    assert end_of(sleeper) == 0
    assert last_words(folder, sleeper) == "stop ClaimLostError"
    assert (folder / "record.json").stat().st_mtime_ns == kept
    first, second = (json.loads((tmp_path / f"{name}.json").read_text()) for name in "ab")
    assert first == second
    assert numbers(first) == reference


def test_a_clock_that_jumps_back_while_a_trial_runs_changes_no_number(trial, reference):
    folder = trial.folder

    def work():
        really = time.time

        def jump(event):
            if words_of(folder) == "quantize 1 of 3 blocks":
                time.time = lambda: really() - 1e9

        record = attempt_trial(trial, jump)
        assert time.time() < really() - 9e8
        assert record.completed

    assert end_of(in_child(work)) == 0
    assert numbers(plain(TrialRecord.load(folder / "record.json"))) == reference
    assert [step.words for step in log_of(folder)].count("start") == 1


def test_a_clock_that_jumps_back_changes_no_number(trial, reference, tmp_path):
    """The second attempt runs in 1999, on files that were written in 2100."""
    killed_at(trial, "quantize 2 of 3 blocks")
    blocks = len(blocks_of(trial.folder))
    for path in trial.folder.rglob("*"):
        os.utime(path, (4102444800, 4102444800))

    def work():
        from q3q import attempt
        from q3q import trial as trial_module

        long_ago = "1999-01-01T00:00:00.000+00:00"
        attempt.now = trial_module.now = lambda: long_ago  # type: ignore[attr-defined]
        time.time = lambda: 915148800.0
        record = attempt_trial(trial)
        assert record.completed
        assert record.environment["ended"] == long_ago

    assert end_of(in_child(work)) == 0
    record = TrialRecord.load(trial.folder / "record.json")
    assert numbers(plain(record)) == reference
    assert record.notes.get("blocks_from_disk", 0) == blocks
