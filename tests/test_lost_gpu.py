"""A GPU that disappears: one clear line, and nothing lost."""

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import DictConfig

import q3q.trial
from q3q.errors import GPU_LOST_WORDS, MEMORY_WORDS, ConfigError, Q3QError
from q3q.models import loading
from q3q.models.loading import device_of
from q3q.placement import Grant
from q3q.record import TrialRecord
from q3q.storage.aside import telling
from q3q.sweep.allocation import Allocation
from q3q.sweep.launcher import Job
from q3q.sweep.on_ray import TrialPolicy, work
from q3q.sweep.plan import Planned
from q3q.sweep.ray import gpus_aside
from q3q.sweep.ray.in_flight import InFlight
from q3q.sweep.ray.tasks import GpuFailedError, Resources, Started, Task
from q3q.team import Rendezvous
from tests.specs import make_trial

LOST = [
    "CUDA error: no CUDA-capable device is detected",
    "CUDA error: unspecified launch failure\nCUDA kernel errors might be asynchronously reported",
    "CUDA error: uncorrectable ECC error encountered",
    "No CUDA GPUs are available",
    "NCCL error: cudaErrorNoDevice",
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
    assert "the same command continues" in record.reason
    assert "\n" not in record.reason
    assert TrialRecord.load(trial.folder / "failed.json").reason == record.reason


SUSPECT = ["CUDA error: device-side assert triggered", "CUDA error: an illegal memory access"]


@pytest.mark.parametrize("words", [*LOST, *SUSPECT])
def test_a_worker_tells_its_driver_that_the_gpu_may_be_to_blame(monkeypatch, tmp_path, words):
    def lost(*_):
        raise RuntimeError(words)

    monkeypatch.setattr(q3q.trial, "run_trial", lost)
    monkeypatch.setattr(loading, "_known_gpu", ["NVIDIA H100 80GB HBM3", "GPU-0a1b"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    trial = make_trial(storage=tmp_path).placed(grant=Grant(gpus=1, loader="resident"))
    with pytest.raises(GpuFailedError) as told:
        work(trial.to_json(), lambda event: None)
    assert "GPU 3 (NVIDIA H100 80GB HBM3, GPU-0a1b) of " in str(told.value)
    assert "\n" not in str(told.value)
    on_cores = trial.placed(grant=Grant(gpus=0, loader="resident"))
    record = work(on_cores.to_json(), lambda event: None)
    assert record is not None
    assert record["status"] == "FAILED"


def test_a_rank_of_a_gang_names_its_gpu(monkeypatch, tmp_path):
    def follow(check):
        raise RuntimeError(LOST[0])

    team = SimpleNamespace(rank=2, size=4, follow=follow)
    monkeypatch.setattr(q3q.trial, "join_gang", lambda seat: nullcontext(team))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5")
    seat = Rendezvous(rank=2, size=4, host="", port=0, own_host="")
    with pytest.raises(Q3QError, match=r"rank 2: GPU 5 of .* failed, or is gone"):
        q3q.trial.share_trial(make_trial(storage=tmp_path), lambda event: None, seat)


OTHER = ("node", ("1",))


def on_gpu(number):
    """Return a task `a` that runs on a GPU of one machine."""
    began = Started(key="a", pid=1, node="n", attempt=1, node_id="node", gpu_ids=(number,))
    return InFlight(Task(key="a", call=print), 1, began=began)


def test_gpus_that_failed_are_tried_again_when_nothing_else_can_run(monkeypatch):
    told: list[str] = []
    monkeypatch.setattr(gpus_aside, "IDLE_SECONDS", -1.0)
    aside, flight = gpus_aside.GpusAside(), on_gpu("0")
    assert aside.released_if_idle(runs=False) == []
    aside.keep("stream", flight)
    assert aside.has_failed_before("a", OTHER)
    assert not aside.another(Resources(gpus=1), [Resources(gpus=1), Resources(cpus=8)])
    assert aside.another(Resources(gpus=1), [Resources(gpus=1), Resources(gpus=1)])
    assert not aside.another(Resources(gpus=1, kind="A100"), [Resources(gpus=4, kind="T4")])
    with telling(told.append):
        assert aside.released_if_idle(runs=True) == []
        assert aside.released_if_idle(runs=False) == ["stream"]
    assert len(told) == 1
    # If the task fails on another GPU now, it is over: it could fail for ever otherwise.
    assert aside.has_failed_before("a", OTHER)


@pytest.mark.parametrize("patience", [0.0, 600.0])
def test_gpus_that_failed_wait_while_machines_may_come(monkeypatch, patience):
    now = [0.0]
    monkeypatch.setattr(gpus_aside, "time", SimpleNamespace(monotonic=lambda: now[0]))
    aside = gpus_aside.GpusAside(patience)
    aside.keep("stream", on_gpu("0"))
    now[0] = max(60.0, patience)
    assert aside.released_if_idle(runs=False) == []
    now[0] += 1
    with telling(lambda line: None):
        assert aside.released_if_idle(runs=False) == ["stream"]


@pytest.mark.parametrize("released", [False, True])
def test_a_task_that_gets_the_same_gpu_again_and_again_fails_at_last(released):
    """Another share of it, which is kept too; or all of it, where no other one is ever free."""
    aside, flight = gpus_aside.GpusAside(), on_gpu("0")
    for count in range(4):
        assert not aside.has_failed_before("a", gpus_aside.gpu_of(flight))
        aside.keep(f"stream {count}", flight)
        if released:
            assert aside.released() == [f"stream {count}"]
    assert aside.has_failed_before("a", gpus_aside.gpu_of(flight))
    assert not aside.has_failed_before("b", gpus_aside.gpu_of(flight))
    # The shares are one GPU's.
    assert aside.another(Resources(gpus=0.25), [Resources(gpus=1), Resources(gpus=1)])
    assert len(aside.released("a")) == (0 if released else 4)


@pytest.mark.parametrize(
    ("gpus", "words"),
    [
        (1, "That GPU gets no more trials of this sweep; this one runs again on another"),
        (0.25, "That part of the GPU gets no more trials of this sweep; this one runs again"),
    ],
)
def test_a_line_says_what_of_a_gpu_gets_no_more_trials(tmp_path, gpus, words):
    told: list[str] = []
    study: Any = SimpleNamespace(
        display=SimpleNamespace(retried=lambda trial, reason: told.append(reason))
    )
    planned = Planned(
        trial=make_trial(storage=tmp_path),
        allocation=Allocation(cpus=1, gpus=gpus, memory=1, needs=1),
        phases={},
        basis="rough",
    )
    policy = TrialPolicy({3: planned}, study, work)
    job = Job(number=3, overrides=(), config=DictConfig({}))
    policy.on_retry(job, GpuFailedError("GPU 0 failed"))
    assert told == [f"GPU 0 failed. {words}"]


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


@pytest.mark.parametrize(("cuda", "lost"), [("13.0", True), (None, False)])
def test_a_gpu_that_is_gone_before_a_trial_begins_gets_no_more_of_them(
    monkeypatch, tmp_path, cuda, lost
):
    """But a torch without CUDA is no GPU's fault: it has none on the whole machine."""
    trial = make_trial(storage=tmp_path).placed(grant=Grant(gpus=1, loader="resident"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(q3q.trial, "run_trial", lambda trial, *_: device_of(trial))
    told = pytest.raises(GpuFailedError, match=r"finds no GPU \(CUDA_VISIBLE_DEVICES=7\)")
    with told if lost else nullcontext():
        record = work(trial.to_json(), lambda event: None)
        assert record is not None
        assert "was built without CUDA" in record["reason"]
