"""A GPU that disappears: one clear line, and nothing lost."""

import pytest
import torch

import q3q.trial
from q3q.errors import GPU_LOST_WORDS, MEMORY_WORDS, ConfigError
from q3q.models.loading import device_of
from q3q.placement import Grant
from q3q.record import TrialRecord
from tests.specs import make_trial

LOST = [
    "CUDA error: no CUDA-capable device is detected",
    "CUDA error: unspecified launch failure\nCUDA kernel errors might be asynchronously reported",
    "CUDA error: uncorrectable ECC error encountered",
    "No CUDA GPUs are available",
]


@pytest.mark.parametrize("words", LOST)
def test_a_gpu_that_is_lost_during_a_trial_is_named_in_one_line(monkeypatch, tmp_path, words):
    def lost(*_):
        raise RuntimeError(words)

    monkeypatch.setattr(q3q.trial, "run_trial", lost)
    trial = make_trial(storage=tmp_path)
    record = q3q.trial.attempt_trial(trial)
    assert record.status == "FAILED"
    assert f"failed, or is gone ({words.splitlines()[0]})" in record.reason
    assert "the same command goes on" in record.reason
    assert "\n" not in record.reason
    assert TrialRecord.load(trial.folder / "failed.json").reason == record.reason


@pytest.mark.parametrize(
    "words",
    ["CUDA error: an illegal memory access was encountered", "CUDA out of memory. Tried 20 MiB"],
)
def test_a_fault_of_the_code_and_a_full_memory_are_not_taken_for_a_lost_gpu(words):
    assert not GPU_LOST_WORDS.search(words)
    assert not any(MEMORY_WORDS.search(lost) for lost in LOST)


def test_a_node_with_fewer_gpus_than_planned_says_which_one_is_missing(monkeypatch, tmp_path):
    """Ray hands a worker the number of a GPU that its machine has no longer."""
    trial = make_trial(storage=tmp_path).placed(grant=Grant(gpus=1, loader="resident"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(ConfigError, match=r"finds no GPU \(CUDA_VISIBLE_DEVICES=7\)") as refused:
        device_of(trial)
    assert "nvidia-smi" in str(refused.value)
    assert "\n" not in str(refused.value)
