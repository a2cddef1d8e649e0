"""Trials that differ in their evaluation alone make their quantized blocks once."""

import json
import os
import signal
from functools import partial

import pytest

from q3q.record import TrialRecord
from q3q.storage import block_cache
from q3q.trial import attempt_trial
from tests.chaos.faults import SMALL, blocks_of, end_of, in_child, log_of, numbers, wait_until
from tests.composed import composed_trial


@pytest.fixture(scope="module")
def trial_of(tiny, tmp_path_factory):
    def make(storage, *overrides):
        always = [*SMALL, f"model.path={tiny}", f"storage={storage}", "method=gptq", "bits=3"]
        return composed_trial(*always, *overrides)

    return make


@pytest.fixture(scope="module")
def alone(trial_of, tmp_path_factory):
    """Return what two such trials say if each makes its own blocks, by their limits."""
    found = {}
    for limit in (3, 5):
        storage = tmp_path_factory.mktemp("alone")
        asked = [f"evaluation.limit={limit}", "keep=none"]
        trial = trial_of(storage, *asked)
        found[limit] = said(attempt_trial(trial))
        assert not trial.kept_blocks_folder.exists()
        assert not trial.blocks_folder.exists()
    return found


def said(record):
    assert record.completed, record.reason
    return numbers(json.loads(json.dumps(record.to_json())))


def pair(trial_of, storage, *asked):
    trials = {limit: trial_of(storage, f"evaluation.limit={limit}", *asked) for limit in (3, 5)}
    assert len({trial.spec.quantization_id for trial in trials.values()}) == 1
    return trials


def from_disk(trial):
    return TrialRecord.load(trial.folder / "record.json").notes.get("blocks_from_disk", 0)


def test_of_two_processes_at_once_one_makes_the_blocks(trial_of, alone, tmp_path):
    trials = pair(trial_of, tmp_path / "s")

    def work(trial, other):
        def report(event):
            if event.phase == "load":  # both are there before one of them begins
                (tmp_path / trial.id).touch()
                wait_until((tmp_path / other.id).exists, "the other")

        attempt_trial(trial, report)

    children = [in_child(partial(work, trials[a], trials[b])) for a, b in ((3, 5), (5, 3))]
    assert [end_of(child) for child in children] == [0, 0]
    assert sorted(from_disk(trial) for trial in trials.values()) == [0, 3]
    for limit, trial in trials.items():
        assert said(TrialRecord.load(trial.folder / "record.json")) == alone[limit]


def test_one_that_waits_goes_on_at_the_last_block_of_one_that_died(trial_of, alone, tmp_path):
    trials = pair(trial_of, tmp_path / "s")

    def die():
        def report(event):
            if event.phase == "quantize" and event.done == 2:
                wait_until((tmp_path / "waits").exists, "one that waits")
                os.kill(os.getpid(), signal.SIGKILL)

        attempt_trial(trials[3], report)

    def follow():
        def report(event):
            if event.phase == "wait":
                (tmp_path / "waits").touch()

        attempt_trial(trials[5], report)

    first = in_child(die)
    folder = trials[3].folder
    wait_until(
        lambda: any(step.words.startswith("quantize") for step in log_of(folder)), "its blocks"
    )
    second = in_child(follow)
    assert end_of(first) == -signal.SIGKILL
    assert end_of(second) == 0
    assert "for process" in next(
        step.words for step in log_of(trials[5].folder) if step.words.startswith("wait")
    )
    assert said(TrialRecord.load(trials[5].folder / "record.json")) == alone[5]
    assert 0 <= from_disk(trials[5]) <= 2
    made = blocks_of(folder)
    assert len(made) == 3
    assert said(attempt_trial(trials[3])) == alone[3]
    assert from_disk(trials[3]) == 3
    assert blocks_of(folder) == made


def test_a_later_evaluation_quantizes_nothing_and_blocks_beyond_the_budget_go(
    trial_of, alone, tmp_path, monkeypatch
):
    trials = pair(trial_of, tmp_path / "s")
    assert said(attempt_trial(trials[3])) == alone[3]
    kept = trials[3].kept_blocks_folder
    assert {path.name for path in kept.glob("block*.json")} == {f"block_00{k}.json" for k in "012"}
    assert not trials[3].blocks_folder.exists()
    phases = []
    monkeypatch.setattr(block_cache, "SHARE", 0.0)
    record = attempt_trial(trials[5], lambda event: phases.append(event.phase))
    assert said(record) == alone[5]
    assert record.notes["blocks_from_disk"] == 3
    assert "wait" not in phases
    assert not kept.exists()  # once its last user has ended


@pytest.mark.slow
def test_keep_none_reads_what_is_there_and_leaves_nothing(trial_of, alone, tmp_path):
    trials = pair(trial_of, tmp_path / "s")
    attempt_trial(trials[3])
    kept = trials[3].kept_blocks_folder
    (kept / "block_001.json").unlink()
    record = attempt_trial(trials[5].placed(keep="none"))
    assert said(record) == alone[5]
    assert record.notes["blocks_from_disk"] == 2
    assert not trials[5].blocks_folder.exists()
    assert not (kept / "block_001.json").exists()


@pytest.mark.slow
def test_blocks_that_an_attempt_left_in_its_own_folder_are_shared(trial_of, alone, tmp_path):
    trials = pair(trial_of, tmp_path / "s")

    def stop(event):
        if event.phase == "evaluate":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attempt_trial(trials[3].placed(keep="none"), stop)
    assert len(list(trials[3].blocks_folder.glob("*.json"))) == 3
    assert said(attempt_trial(trials[3])) == alone[3]
    assert not trials[3].blocks_folder.exists()
    assert said(attempt_trial(trials[5])) == alone[5]
    assert from_disk(trials[3]) == from_disk(trials[5]) == 3
