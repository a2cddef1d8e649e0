"""A trial that runs out of memory is tried once more with the next larger plan, in real workers."""

import json
import os
import signal
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig

from q3q.placement import Trial
from q3q.record import TrialRecord
from q3q.sweep.allocation import Allocation
from q3q.sweep.launcher import Job
from q3q.sweep.on_ray import TrialPolicy
from q3q.sweep.plan import Planned
from q3q.sweep.ray import deaths, head, scheduler
from q3q.sweep.ray.cluster import Cluster
from q3q.sweep.ray.deaths import next_message
from q3q.sweep.ray.messages import DIED, Message
from q3q.sweep.ray.nodes import ray_machines
from q3q.sweep.ray.tasks import OutOfMemoryError, Resources, Task
from q3q.sweep.ray.worker import task_entry
from q3q.sweep.run import measured
from tests.specs import make_spec, make_trial

SMALL, LARGE = Resources(cpus=0.5, memory=100_000_000), Resources(cpus=1, memory=200_000_000)


@pytest.fixture(scope="module")
def cluster():
    with Cluster(cpus=2, gpus=0) as running:
        yield running


class FakeStudy:
    """A study, its display and its tracker in one; keeps the notes on retries and the records."""

    def __init__(self):
        self.display = self.study = self
        self.notes, self.records = [], []

    def name_of(self, spec):
        return spec.label

    def started(self, trial, name): ...

    def tick(self): ...

    def progressed(self, spec, event): ...

    def fetch(self, trial): ...

    def retried(self, trial, reason):
        self.notes.append(reason)

    def finished(self, record, seconds):
        self.records.append(record)


def run_trial(cluster, folder, work, larger=True):
    """Run a trial through q3q's policy and Ray.

    Returns its record, the study, the loader of each try, and the JobReturn.
    """
    trial = make_trial(storage=folder)
    study: Any = FakeStudy()
    first = Allocation(cpus=1, gpus=0, memory=100_000_000, needs=90_000_000)
    second = Allocation(cpus=2, gpus=0, memory=200_000_000, needs=90_000_000, loader="streamed")
    planned = Planned(
        trial=trial,
        allocation=first,
        larger=second if larger else None,
        phases={"evaluate": 2.0},
        basis="rough",
        disk=0,
    )
    policy = TrialPolicy({3: planned}, study, work)
    job = Job(number=3, overrides=("method=rtn",), config=DictConfig({}))
    task = policy.task(job, Task(key="plain", call=print))
    [outcome] = cluster.run(
        [task],
        on_event=lambda key, event: policy.on_event(job, event),
        on_retry=lambda key, error: policy.on_retry(job, error),
    )
    job_return = policy.on_outcome(job, outcome)
    record = TrialRecord.load(trial.folder / ("record.json" if larger else "failed.json"))
    return record, study, (folder / "tries").read_text().split(), job_return


def fails_unless_streamed(fail):
    """Return a worker's work: a trial that calls `fail` unless it streams."""

    def work(trial, report):
        trial = Trial.from_json(trial)
        loader = trial.placement.grant.loader
        with (trial.placement.storage / "tries").open("a") as file:
            file.write(f"{loader} ")
        if loader != "streamed":
            fail()
        metrics = {"seconds/evaluate": 1.0, "peak_bytes/load": 5.0, "peak_bytes/evaluate": 7.0}
        return TrialRecord(
            spec=trial.spec, placement=trial.placement, status="COMPLETED", metrics=metrics
        ).to_json()

    return work


def raise_memory_error():
    raise MemoryError("not enough")


def raise_as_torch_does():
    raise type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory")


@pytest.mark.parametrize("fail", [raise_memory_error, raise_as_torch_does])
def test_it_is_tried_again_with_the_next_larger_plan(cluster, tmp_path, fail):
    record, study, tries, job_return = run_trial(cluster, tmp_path, fails_unless_streamed(fail))
    assert tries == ["resident", "streamed"]
    assert record.completed
    assert job_return.return_value.metrics["seconds/evaluate"] == 1.0
    [note] = study.notes
    assert "now with 2 CPUs, 0.2 GB of memory, streamed" in note
    planned = record.environment["planned"]
    assert (planned["loader"], planned["cpus"], planned["seconds"]) == ("streamed", 2, 2.0)
    assert planned["first"] == "1 CPU, resident: out of memory"
    assert (planned["took"], planned["peak"]) == (1.0, 7.0)
    assert len(study.records) == 1  # only the final try's result counts


def test_without_a_larger_plan_it_fails_and_says_why(cluster, tmp_path):
    work = fails_unless_streamed(raise_memory_error)
    record, study, tries, _ = run_trial(cluster, tmp_path, work, larger=False)
    assert tries == ["resident"]
    assert study.notes == []
    assert "not enough" in record.reason


def test_another_error_is_not_tried_again(cluster, tmp_path):
    def fail():
        raise ValueError("wrong, with or without memory")

    with pytest.raises(FileNotFoundError):
        run_trial(cluster, tmp_path, fails_unless_streamed(fail))
    assert (tmp_path / "tries").read_text().split() == ["resident"]
    assert json.loads(next(tmp_path.glob("trials/*/failed.json")).read_text())["status"] == "FAILED"


def test_a_worker_that_ray_kills_for_memory_is_tried_larger_and_not_the_same_again(
    cluster, monkeypatch
):
    """The worker dies by SIGKILL, as under Ray's memory monitor; that Ray says so is simulated."""
    errors = []

    def work(report):
        raise MemoryError("the second is out of memory too")

    larger = Task(key="t", call=work, resources=LARGE)
    task = Task(
        key="t",
        call=lambda report: os.kill(os.getpid(), signal.SIGKILL),
        resources=SMALL,
        larger=larger,
    )

    def dies_of_memory(stream, flight):
        message = next_message(stream, flight)
        if message.kind != DIED:
            return message
        return Message(DIED, OutOfMemoryError(str(message.content)))

    monkeypatch.setattr(scheduler, "next_message", dies_of_memory)
    [outcome] = cluster.run(
        [task], on_event=lambda *_: None, on_retry=lambda key, error: errors.append(type(error))
    )
    assert errors == [OutOfMemoryError]
    assert outcome.attempts == 2
    assert isinstance(outcome.error, OutOfMemoryError)  # once is enough


@contextmanager
def little_memory(size):
    """Make a control group that may take `size` bytes; yield the file to join it by."""
    v2 = Path("/sys/fs/cgroup/cgroup.controllers").exists()
    group = Path("/sys/fs/cgroup") / ("" if v2 else "memory") / f"q3q-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.max" if v2 else "memory.limit_in_bytes")).write_text(str(size))
    except OSError as error:
        pytest.skip(f"no control group can be made here: {error}")
    try:
        yield group / "cgroup.procs"
    finally:
        while (group / "cgroup.procs").read_text():
            time.sleep(0.05)
        group.rmdir()


def test_a_worker_that_the_kernel_kills_for_memory_is_tried_larger(cluster):
    with little_memory(600_000_000) as members:

        def work(report):
            members.write_text(str(os.getpid()))
            memory = bytearray(2_000_000_000)
            memory[::4096] = b"x" * len(memory[::4096])

        task = Task(
            key="t",
            call=work,
            resources=SMALL,
            larger=Task(key="t", call=lambda _: "done", resources=LARGE),
        )
        errors = []
        [outcome] = cluster.run(
            [task], on_event=lambda *_: None, on_retry=lambda key, error: errors.append(error)
        )
    assert (outcome.value, outcome.attempts) == ("done", 2)
    assert [type(error) for error in errors] == [OutOfMemoryError]
    assert "the kernel killed it" in str(errors[0])


@pytest.mark.parametrize(
    ("words", "memory"),
    [
        ("MemoryError: not enough", True),
        ("OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB", True),
        (
            "RuntimeError: [enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: "
            "can't allocate memory",
            True,
        ),
        (
            "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling "
            "`cublasCreate(handle)`",
            True,
        ),
        (
            "AcceleratorError: CUDA error: out of memory\nCUDA kernel errors might be "
            "asynchronously reported",
            True,
        ),
        ("RuntimeError: CUDA error: an illegal memory access was encountered", False),
        ("the disk is full (/tmp); free some space", False),
    ],
)
def test_errors_that_say_that_memory_ran_out_are_known(words, memory):
    assert deaths.ran_out_of_memory(words) is memory
    assert deaths.ran_out_of_memory(RuntimeError(words)) is memory


def test_what_was_measured_is_the_gpus_peak_where_there_is_one():
    record = TrialRecord(
        spec=make_spec(),
        status="COMPLETED",
        metrics={
            "seconds/load": 1.0,
            "seconds/evaluate": 2.0,
            "peak_bytes/load": 9.0,
            "gpu_peak_bytes/evaluate": 4.0,
        },
    )
    assert measured(record) == {"took": 3.0, "peak": 4.0}


def test_tasks_near_each_other_prefer_the_machine_where_one_of_them_ran(cluster, monkeypatch):
    """With one machine, Ray is asked nothing; with several, the preference is soft."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as Affinity

    strategies = []

    class WatchedEntry:
        def __init__(self, shape):
            self.entry = task_entry(shape)

        def remote(self, *work):
            return self.entry.remote(*work)

        def options(self, **options):
            strategies.append(options["scheduling_strategy"])
            return self.entry.options(**options)

    monkeypatch.setattr(scheduler, "task_entry", WatchedEntry)
    tasks = [
        Task(key=str(k), call=lambda report: 1, resources=SMALL, near="a model") for k in range(12)
    ]
    assert len(list(cluster.run(tasks, on_event=lambda *_: None))) == 12
    assert strategies == []
    monkeypatch.setattr(head, "ray_machines", lambda: [*ray_machines(), *ray_machines()])
    outcomes = list(cluster.run(tasks, on_event=lambda *_: None))
    assert [outcome.error for outcome in outcomes] == [None] * 12
    assert strategies  # of those that were sent after the first one began
    for strategy in strategies:
        assert isinstance(strategy, Affinity)
        assert strategy.soft
        assert strategy._spill_on_unavailable
    assert len({strategy.node_id for strategy in strategies}) == 1
