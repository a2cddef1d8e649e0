"""A trial that runs out of memory is tried once more with the next larger plan: real Ray, real workers."""

import json
import os
import signal
import time
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from q3q.record import TrialRecord
from q3q.spec import Scheme, TrialSpec
from q3q.sweep.launcher import Job
from q3q.sweep.on_ray import TrialPolicy, measured
from q3q.sweep.plan import Planned
from q3q.sweep.ray import deaths, head, scheduler
from q3q.sweep.ray.cluster import Cluster
from q3q.sweep.ray.tasks import OutOfMemoryError, Resources, Task
from q3q.sweep.shares import Allocation

SMALL, LARGE = Resources(cpus=0.5, memory=100_000_000), Resources(cpus=1, memory=200_000_000)


@pytest.fixture(scope="module")
def cluster():
    with Cluster(cpus=2, gpus=0) as running:
        yield running


class Told:
    """What the sweeper's policy tells: a study and a display in one."""

    def __init__(self):
        self.display, self.lines, self.records = self, [], []
        self.interruption = None

    def started(self, trial, name): ...

    def tick(self): ...

    def heard(self, spec, event): ...

    def fetch(self, spec): ...

    def retried(self, trial, why):
        self.lines.append(why)

    def finished(self, record, seconds):
        self.records.append(record)


def spec_in(folder: Path) -> TrialSpec:
    return TrialSpec(
        model={"name": "demo", "digest": "x", "dtype": "float32"},
        method={"name": "rtn", "version": 1},
        scheme=Scheme(bits=4, group_size=128, symmetric=False),
        calibration=None,
        evaluation={"texts": [], "tasks": []},
        seed=0,
        places={"trials": str(folder / "trials")},
    )


def run_trial(cluster, folder, work, larger=True):
    """One trial through the sweeper's policy and Ray; its record, what was told, and what each try was given."""
    spec, told = spec_in(folder), Told()
    first = Allocation(cpus=1, gpus=0, memory=100_000_000, needs=90_000_000)
    second = Allocation(cpus=2, gpus=0, memory=200_000_000, needs=90_000_000, loader="streamed")
    planned = Planned(
        spec=spec,
        share=first,
        larger=second if larger else None,
        phases={"evaluate": 2.0},
        basis="rough",
        disk=0,
    )
    policy = TrialPolicy({3: (spec, planned)}, told, work)
    job = Job(number=3, overrides=("method=rtn",), config=SimpleNamespace())
    task = policy.task(job, Task(key="plain", call=print))
    [outcome] = cluster.run(
        [task],
        on_event=lambda key, event: policy.on_event(job, event),
        on_retry=lambda key, error: policy.on_retry(job, error),
    )
    done = policy.on_outcome(job, outcome)
    tries = (folder / "tries").read_text().split()
    return (
        TrialRecord.load(
            folder / "trials" / spec.id / ("record.json" if larger else "failed.json")
        ),
        told,
        tries,
        done,
    )


def working(how):
    """A trial that fails in some way unless it streams."""

    def work(spec, report):
        spec = TrialSpec.from_json(spec)
        folder = Path(spec.places["trials"]).parent
        with (folder / "tries").open("a") as file:
            file.write(f"{spec.places['share']['loader']} ")
        if spec.places["share"]["loader"] != "streamed":
            how()
        metrics = {"seconds/evaluate": 1.0, "peak_bytes/load": 5.0, "peak_bytes/evaluate": 7.0}
        return TrialRecord(spec=spec, status="COMPLETED", metrics=metrics).to_json()

    return work


def raise_memory_error():
    raise MemoryError("not enough")


def raise_as_torch_does():
    raise type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory")


@pytest.mark.parametrize("how", [raise_memory_error, raise_as_torch_does])
def test_it_is_tried_again_with_the_next_larger_plan(cluster, tmp_path, how):
    record, told, tries, done = run_trial(cluster, tmp_path, working(how))
    assert tries == ["resident", "streamed"]
    assert record.completed
    assert done.return_value.metrics["seconds/evaluate"] == 1.0
    [line] = told.lines
    assert "now with 2 CPUs, 0.2 GB of memory, streamed" in line
    planned = record.environment["planned"]
    assert (planned["loader"], planned["cpus"], planned["seconds"]) == ("streamed", 2, 2.0)
    assert planned["first"] == "1 CPU, resident: out of memory"
    assert (planned["took"], planned["peak"]) == (1.0, 7.0)
    assert len(told.records) == 1  # only the final try's result counts


def test_without_a_larger_plan_it_fails_and_says_why(cluster, tmp_path):
    record, told, tries, _ = run_trial(cluster, tmp_path, working(raise_memory_error), larger=False)
    assert tries == ["resident"]
    assert told.lines == []
    assert "not enough" in record.reason


def test_another_error_is_not_tried_again(cluster, tmp_path):
    def fail():
        raise ValueError("wrong, with or without memory")

    with pytest.raises(FileNotFoundError):
        run_trial(cluster, tmp_path, working(fail))
    assert (tmp_path / "tries").read_text().split() == ["resident"]
    assert json.loads(next(tmp_path.glob("trials/*/failed.json")).read_text())["status"] == "FAILED"


def test_a_worker_that_ray_kills_for_memory_is_tried_larger_and_not_the_same_again(
    cluster, monkeypatch
):
    """The worker dies by SIGKILL, as one dies that Ray's watch picks; that it was picked is put in Ray's mouth."""
    seen = []

    def work(report):
        raise MemoryError("the second is out of memory too")

    larger = Task(key="t", call=work, resources=LARGE)
    task = Task(
        key="t",
        call=lambda report: os.kill(os.getpid(), signal.SIGKILL),
        resources=SMALL,
        larger=larger,
    )

    def dies_of_memory(stream, flight, really=scheduler.next_message):
        kind, content = really(stream, flight)
        return (kind, OutOfMemoryError(str(content))) if kind == "died" else (kind, content)

    monkeypatch.setattr(scheduler, "next_message", dies_of_memory)
    [outcome] = cluster.run(
        [task], on_event=lambda *_: None, on_retry=lambda key, error: seen.append(type(error))
    )
    assert seen == [OutOfMemoryError]
    assert outcome.attempts == 2
    assert isinstance(outcome.error, OutOfMemoryError)  # once is enough


@contextmanager
def little_memory(size):
    """A control group that may take so many bytes, to which a process adds itself."""
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
            held = bytearray(2_000_000_000)
            held[::4096] = b"x" * len(held[::4096])

        task = Task(
            key="t",
            call=work,
            resources=SMALL,
            larger=Task(key="t", call=lambda _: "done", resources=LARGE),
        )
        seen = []
        [outcome] = cluster.run(
            [task], on_event=lambda *_: None, on_retry=lambda key, error: seen.append(error)
        )
    assert (outcome.value, outcome.attempts) == ("done", 2)
    assert [type(error) for error in seen] == [OutOfMemoryError]
    assert "the kernel killed it" in str(seen[0])


@pytest.mark.parametrize(
    ("words", "memory"),
    [
        ("MemoryError: not enough", True),
        ("OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB", True),
        (
            "RuntimeError: [enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory",
            True,
        ),
        (
            "RuntimeError: CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
            True,
        ),
        (
            "AcceleratorError: CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
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
        spec=spec_in(Path("/nowhere")),
        status="COMPLETED",
        metrics={
            "seconds/load": 1.0,
            "seconds/evaluate": 2.0,
            "peak_bytes/load": 9.0,
            "gpu_peak_bytes/evaluate": 4.0,
        },
    )
    assert measured(record) == {"took": 3.0, "peak": 4.0}


def test_tasks_that_name_the_same_prefer_the_machine_where_one_of_them_ran(cluster, monkeypatch):
    """On one machine nothing is asked of Ray; of several, the preference is soft and lets a task run elsewhere."""
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as Affinity

    asked = []
    entry = scheduler.task_entry

    class Watched:
        def __init__(self, shape):
            self.real = entry(shape)

        def remote(self, *work):
            return self.real.remote(*work)

        def options(self, **wanted):
            asked.append(wanted["scheduling_strategy"])
            return self.real.options(**wanted)

    monkeypatch.setattr(scheduler, "task_entry", Watched)
    tasks = [
        Task(key=str(k), call=lambda report: 1, resources=SMALL, near="a model") for k in range(12)
    ]
    assert len(list(cluster.run(tasks, on_event=lambda *_: None))) == 12
    assert asked == []
    machines = head.ray_machines
    monkeypatch.setattr(head, "ray_machines", lambda: [*machines(), *machines()])
    assert [one.error for one in cluster.run(tasks, on_event=lambda *_: None)] == [None] * 12
    assert asked  # those that were sent after the first one began
    assert all(
        isinstance(one, Affinity) and one.soft and one._spill_on_unavailable for one in asked
    )
    assert len({one.node_id for one in asked}) == 1
