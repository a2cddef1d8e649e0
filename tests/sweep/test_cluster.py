"""Laws of the cluster, with real Ray and real processes.

Order is forced with files and events, never with sleeps; every time limit is one that only a fault
exceeds, however busy the machine.
"""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from q3q.environment import COMMAND_ID
from q3q.errors import ConfigError, Q3QError
from q3q.sweep.ray import cluster as cluster_module
from q3q.sweep.ray import gpus_aside, scheduler
from q3q.sweep.ray.cluster import Cluster
from q3q.sweep.ray.nodes import kernel_kill_counter
from q3q.sweep.ray.tasks import (
    GpuFailedError,
    Outcome,
    Report,
    Resources,
    Started,
    Task,
    WorkerDiedError,
)
from q3q.sweep.ray.worker import task_entry
from tests.chaos.faults import runs


@pytest.fixture(scope="module")
def cluster():
    with Cluster(cpus=2, gpus=2, env={"Q3Q_TEST_COLOUR": "blue"}) as started:
        yield started


def run(
    cluster: Cluster, *tasks: Task, on_event: Callable[[str, Any], None] = lambda *_: None
) -> dict[str, Outcome]:
    return {outcome.key: outcome for outcome in cluster.run(tasks, on_event)}


def value_of(cluster: Cluster, call: Callable[[Report], Any], **settings: Any) -> Any:
    outcome = run(cluster, Task(key="only", call=call, **settings))["only"]
    if outcome.error is not None:
        raise outcome.error
    return outcome.value


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 300
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.01)


def ends_soon(pid: int, seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while runs(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not runs(pid)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class PickyError(Exception):
    """Pickles, but does not come back: its __init__ needs what `args` does not hold."""

    def __init__(self, what: str, why: str) -> None:
        super().__init__(f"{what} because {why}")


def test_total_is_what_it_was_given(cluster):
    total = cluster.total()
    assert (total.cpus, total.gpus) == (2, 2)
    assert total.memory > 0


def test_each_outcome_comes_as_its_task_ends(cluster, tmp_path):
    gate = tmp_path / "gate"
    tasks = [
        Task(key="slow", call=lambda _: wait_for(gate)),
        Task(key="quick", call=lambda _: "value"),
    ]
    outcomes = cluster.run(tasks, lambda *_: None)
    quick = next(outcomes)
    assert (quick.key, quick.value, quick.error, quick.attempts) == ("quick", "value", None, 1)
    gate.touch()  # only now can the other one end
    assert [outcome.key for outcome in outcomes] == ["slow"]


def test_events_arrive_in_order_and_while_the_task_runs(cluster, tmp_path):
    events = []

    def call(report):
        for number in range(200):  # more than may be under way at a time
            report(number)
        wait_for(tmp_path / "199")  # made by the driver when it receives the last number
        return os.getpid()

    def on_event(key, event):
        events.append(event)
        (tmp_path / str(event)).touch()

    outcome = run(cluster, Task(key="talker", call=call), on_event=on_event)["talker"]
    assert events[0] == Started(key="talker", pid=outcome.value, node=events[0].node, attempt=1)
    assert events[1:] == list(range(200))
    assert outcome.seconds > 0


def test_an_exception_comes_back_as_itself_and_is_not_retried(cluster, tmp_path):
    def fails(report):
        with (tmp_path / "runs").open("a") as file:
            file.write("x")
        raise KeyError("no such block")

    outcome = run(cluster, Task(key="bad", call=fails, retries=5))["bad"]
    assert type(outcome.error) is KeyError
    assert outcome.error.args == ("no such block",)
    assert "in fails" in str(outcome.error.__cause__)  # the worker's traceback
    assert (outcome.attempts, outcome.value) == (1, None)
    assert (tmp_path / "runs").read_text() == "x"


def test_an_exception_that_cannot_travel_still_says_what_it_was(cluster):
    def fails(report):
        raise PickyError("no scale", "all zero")

    with pytest.raises(Q3QError, match="PickyError: no scale because all zero"):
        value_of(cluster, fails)


def test_sys_exit_is_the_tasks_own_error(cluster):
    with pytest.raises(SystemExit, match="3"):
        value_of(cluster, lambda _: sys.exit(3))


def test_what_cannot_be_pickled_is_an_error_not_a_hang(cluster):
    lock = threading.Lock()
    outcomes = run(
        cluster,
        Task(key="result", call=lambda _: threading.Lock()),
        Task(key="event", call=lambda report: report(threading.Lock())),
        Task(key="call", call=lambda _: lock),
        Task(key="fine", call=lambda _: 1),
    )
    assert "result, of type lock, cannot be sent" in str(outcomes["result"].error)
    assert isinstance(outcomes["event"].error, TypeError)
    assert "call cannot be sent to a worker" in str(outcomes["call"].error)
    assert outcomes["fine"].value == 1


def test_a_killed_task_runs_again(cluster, tmp_path):
    def dies_once(report):
        report("working")
        if not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            die()
        return "done"

    attempts, retried = [], []
    [outcome] = cluster.run(
        [Task(key="fragile", call=dies_once)],
        lambda key, event: attempts.append(event.attempt) if isinstance(event, Started) else None,
        lambda key, error: retried.append((key, type(error))),
    )
    assert (outcome.value, outcome.error, outcome.attempts) == ("done", None, 2)
    assert attempts[-1] == 2
    assert retried == [("fragile", WorkerDiedError)]


def test_a_task_that_always_dies_costs_no_other(cluster):
    outcomes = run(
        cluster,
        Task(key="doomed", call=lambda _: die()),
        Task(key="once", call=lambda _: os._exit(7), retries=0),
        *[Task(key=f"fine {i}", call=lambda _, i=i: i) for i in range(6)],
    )
    assert (outcomes["doomed"].attempts, outcomes["once"].attempts) == (2, 1)
    assert all(isinstance(outcomes[key].error, WorkerDiedError) for key in ("doomed", "once"))
    assert "killed or crashed" in str(outcomes["doomed"].error)
    assert [outcomes[f"fine {i}"].value for i in range(6)] == list(range(6))


def test_a_task_too_large_for_every_machine_is_refused(cluster):
    huge = Resources(cpus=1000, memory=2**60)
    outcomes = run(
        cluster,
        Task(key="huge", call=lambda _: 1, resources=huge),
        Task(key="fine", call=lambda _: 1),
    )
    assert isinstance(outcomes["huge"].error, ConfigError)
    assert "huge needs 1000 CPUs" in str(outcomes["huge"].error)
    assert "2 CPUs, 2 GPUs" in str(outcomes["huge"].error)
    assert outcomes["fine"].value == 1


def test_a_cluster_that_may_grow_is_given_time(cluster, monkeypatch):
    monkeypatch.setattr(cluster, "patience", 0.5)
    begin = time.monotonic()
    outcomes = run(cluster, Task(key="huge", call=lambda _: 1, resources=Resources(cpus=1000)))
    assert isinstance(outcomes["huge"].error, ConfigError)
    assert time.monotonic() - begin > 0.5


def test_keys_must_differ(cluster):
    with pytest.raises(ValueError, match="distinct"):
        next(cluster.run([Task(key="a", call=print), Task(key="a", call=print)], lambda *_: None))


def test_tasks_that_wait_for_a_gpu_do_not_hold_up_the_others(cluster, tmp_path):
    gpu = Resources(cpus=0, gpus=1)
    tasks = [
        Task(key=f"gpu {i}", call=lambda _: wait_for(tmp_path / "never"), resources=gpu)
        for i in range(20)
    ]
    outcomes = cluster.run([*tasks, Task(key="cpu", call=lambda _: None)], lambda *_: None)
    assert next(outcomes).key == "cpu"
    outcomes.close()


def test_a_task_sees_the_gpus_that_it_reserved(cluster):
    def visible(report):
        return os.environ["CUDA_VISIBLE_DEVICES"]

    assert value_of(cluster, visible) == ""
    assert value_of(cluster, visible, resources=Resources(gpus=1)) == "0"
    assert value_of(cluster, visible) == ""


def on_broken_gpus(folder, *broken):
    """Return a call that fails on these GPUs, and leaves a file for each GPU that it came to."""

    def call(report):
        gpu = os.environ["CUDA_VISIBLE_DEVICES"]
        (folder / f"{gpu} {os.getpid()}").touch()
        if gpu in broken:
            raise GpuFailedError(f"GPU {gpu} failed")
        return gpu

    return call


def test_a_gpu_that_failed_gets_no_more_tasks_of_the_run(cluster, tmp_path):
    shape, retried = Resources(cpus=0, gpus=1), []
    call = on_broken_gpus(tmp_path, "0")
    tasks = [Task(key=f"task {i}", call=call, resources=shape) for i in range(3)]
    outcomes = {
        outcome.key: outcome
        for outcome in cluster.run(
            tasks, lambda *_: None, lambda key, error: retried.append((key, str(error)))
        )
    }
    assert [outcomes[task.key].value for task in tasks] == ["1"] * 3
    assert len(retried) == 1
    assert retried[0][1] == "GPU 0 failed"
    assert len([*tmp_path.glob("0 *")]) == 1
    assert len([*tmp_path.glob("1 *")]) == 3


@pytest.mark.slow
def test_a_task_that_fails_on_a_second_gpu_takes_neither_from_the_others(cluster, tmp_path):
    shape = Resources(cpus=0, gpus=1)
    wrong = Task(key="wrong", call=on_broken_gpus(tmp_path, "0", "1"), resources=shape)
    fine = [Task(key=f"{i}", call=on_broken_gpus(tmp_path), resources=shape) for i in range(2)]
    outcome = run(cluster, wrong)["wrong"]
    assert isinstance(outcome.error, GpuFailedError)
    assert outcome.attempts == 2
    assert {outcome.value for outcome in run(cluster, *fine).values()} == {"0", "1"}


def test_a_process_that_keeps_a_gpu_and_is_killed_keeps_nothing_any_more(
    cluster, tmp_path, monkeypatch
):
    """The memory monitor may kill it, or it is lost with its machine."""
    made: list[gpus_aside.GpusAside] = []

    def aside(patience):
        made.append(gpus_aside.GpusAside(patience))
        return made[0]

    def call(report):
        gpu = os.environ["CUDA_VISIBLE_DEVICES"]
        if gpu == "0":
            (tmp_path / "pid.tmp").write_text(str(os.getpid()))
            (tmp_path / "pid.tmp").rename(tmp_path / "pid")
            raise GpuFailedError("GPU 0 failed")
        wait_for(tmp_path / "forgotten")
        return gpu

    def on_tick():
        if (tmp_path / "killed").exists() and not made[0]._kept:
            (tmp_path / "forgotten").touch()
        elif made[0]._kept and (pid := tmp_path / "pid").exists():
            os.kill(int(pid.read_text()), signal.SIGKILL)
            pid.rename(tmp_path / "killed")

    monkeypatch.setattr(scheduler, "GpusAside", aside)
    task = Task(key="a", call=call, resources=Resources(cpus=0, gpus=1))
    [outcome] = cluster.run([task], lambda *_: None, on_tick=on_tick)
    assert (outcome.value, outcome.attempts) == ("1", 2)


def test_a_task_that_gets_another_share_of_a_gpu_that_failed_comes_to_another_gpu(
    cluster, tmp_path
):
    """Ray fills one GPU before it begins another one."""
    shape = Resources(cpus=0, gpus=0.5)
    outcome = run(cluster, Task(key="a", call=on_broken_gpus(tmp_path, "0"), resources=shape))["a"]
    assert (outcome.value, outcome.attempts) == ("1", 3)


@pytest.mark.slow
def test_a_task_whose_gpu_failed_ends_where_others_hold_all_other_gpus(
    cluster, tmp_path, monkeypatch
):
    import ray

    def hold(path):
        path.touch()
        threading.Event().wait()

    monkeypatch.setattr(gpus_aside, "IDLE_SECONDS", 0.2)
    shape = Resources(cpus=0, gpus=1)
    holder = ray.remote(num_cpus=0, num_gpus=1, max_retries=0)(hold).remote(tmp_path / "held")
    wait_for(tmp_path / "held")
    try:
        outcome = run(
            cluster, Task(key="a", call=on_broken_gpus(tmp_path, "0", "1"), resources=shape)
        )["a"]
    finally:
        ray.cancel(holder, force=True)
    assert isinstance(outcome.error, GpuFailedError)
    assert outcome.attempts == gpus_aside.MOST_FAILURES + 1


def test_a_task_computes_with_as_many_threads_as_it_reserved_cpus(cluster):
    def threads(report):
        import torch

        return torch.get_num_threads(), os.environ["OMP_NUM_THREADS"]

    for cpus in (1, 2, 1):  # worker processes are used again
        assert value_of(cluster, threads, resources=Resources(cpus=cpus)) == (cpus, str(cpus))


def test_workers_see_the_drivers_modules_folder_and_variables(cluster, tmp_path, monkeypatch):
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "only_the_driver_knows.py").write_text("ANSWER = 42")
    monkeypatch.syspath_prepend(tmp_path / "library")
    monkeypatch.chdir(tmp_path)

    def call(report):
        import only_the_driver_knows

        own = os.environ["Q3Q_TEST_COLOUR"], os.environ["Q3Q_COMMAND_ID"]
        return only_the_driver_knows.ANSWER, os.getcwd(), *own

    assert value_of(cluster, call) == (42, str(tmp_path), "blue", cluster.env[COMMAND_ID])
    assert Cluster().env[COMMAND_ID] != cluster.env[COMMAND_ID]


@pytest.mark.parametrize(
    "function", [lambda: task_entry(Resources())._function, kernel_kill_counter]
)
def test_what_runs_before_q3q_can_be_imported_is_pickled_whole(function):
    from ray import cloudpickle

    code = "import pickle, sys; sys.modules['q3q'] = None; pickle.load(sys.stdin.buffer)"
    packed = cloudpickle.dumps(function())
    subprocess.run([sys.executable, "-c", code], input=packed, check=True)


class CountedCall:
    """Counts, in the driver, how often an instance was sent to Ray."""

    sent = 0

    def __reduce__(self):
        CountedCall.sent += 1
        return (CountedCall, ())

    def __call__(self, report):
        return None


def test_a_large_sweep_waits_in_the_driver_not_in_ray(cluster):
    CountedCall.sent = 0
    begin = time.monotonic()
    ended = excess = 0
    for _ in cluster.run(
        [Task(key=str(i), call=CountedCall()) for i in range(100)], lambda *_: None
    ):
        ended += 1
        excess = max(excess, CountedCall.sent - ended)
    print(f"{(time.monotonic() - begin) / 100 * 1000:.1f} ms per empty task")
    assert ended == CountedCall.sent == 100
    # Silent so far; known to have started, and perhaps ended; running.
    assert excess <= 8 + 8 + 2


def endless(report):
    child = subprocess.Popen(["sleep", "600"])
    report(child.pid)
    while True:
        pass


def test_closing_the_iterator_kills_the_workers(cluster, tmp_path):
    pids = []
    under_way = tmp_path / "under way"

    def on_event(key, event):
        if key == "endless":
            pids.append(event.pid if isinstance(event, Started) else event)
            if len(pids) == 2:
                under_way.touch()

    tasks = [
        Task(key="endless", call=endless),
        Task(key="quick", call=lambda _: wait_for(under_way)),
    ]
    outcomes = cluster.run(tasks, on_event)
    assert next(outcomes).key == "quick"
    assert all(runs(pid) for pid in pids)
    outcomes.close()
    assert len(pids) == 2
    assert all(ends_soon(pid) for pid in pids)
    assert value_of(cluster, lambda _: 1) == 1


def test_ctrl_c_kills_the_workers_and_comes_through(cluster):
    pids = []

    def on_event(key, event):
        pids.append(event.pid if isinstance(event, Started) else event)
        if len(pids) == 4:
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()

    # Whoever starts the tests in a shell's background starts them with this signal ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            run(
                cluster, Task(key="a", call=endless), Task(key="b", call=endless), on_event=on_event
            )
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(pids) == 4
    assert all(ends_soon(pid) for pid in pids)
    assert value_of(cluster, lambda _: 1) == 1


def test_a_second_cluster_in_one_process_is_refused(cluster):
    with (
        Cluster(cpus=1) as second,
        pytest.raises(ConfigError, match="already runs in this process"),
    ):
        second.total()
    assert value_of(cluster, lambda _: 1) == 1


def test_an_address_that_does_not_answer_is_named(monkeypatch):
    monkeypatch.setattr(cluster_module, "ANSWER_SECONDS", 1)
    with (
        Cluster("127.0.0.1:1") as nowhere,
        pytest.raises(ConfigError, match=r"answers at 127\.0\.0\.1:1\."),
    ):
        next(nowhere.run([], lambda *_: None))


def test_settings_that_contradict_are_refused():
    with pytest.raises(ConfigError, match="for a local cluster"):
        Cluster("127.0.0.1:6379", cpus=2)
    with pytest.raises(ConfigError, match="host:port"):
        Cluster("ray://127.0.0.1:10001")


# A program of its own: what `__main__` defines must reach the workers too.
PROGRAM = """
import sys, time
from q3q.sweep.ray import head
from q3q.sweep.ray.cluster import Cluster
from q3q.sweep.ray.tasks import HeadLostError, Started, Task

def sleeps(report):
    import ray
    report([node["NodeManagerAddress"] for node in ray.nodes()])
    time.sleep(600)

def waits(report):
    pass

def hogs(report):
    hog = []
    while True:
        hog.append(b"x" * 20_000_000)
        time.sleep(0.01)

def show(key, event):
    print(event.pid if isinstance(event, Started) else event, flush=True)

head.HEAD_SECONDS = 3.0
try:
    with Cluster(cpus=1) as cluster:
        tasks = [Task(key=name, call=globals()[name], retries=0) for name in sys.argv[1:]]
        for outcome in cluster.run(tasks, show):
            print(type(outcome.error).__name__, outcome.error)
except HeadLostError as error:
    print(error)
"""


@pytest.fixture
def start_program(tmp_path):
    def start(*calls: str, **variables: str) -> "subprocess.Popen[str]":
        (tmp_path / "program.py").write_text(PROGRAM)
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **variables}
        return subprocess.Popen(
            [sys.executable, "program.py", *calls],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            text=True,
            env=env,
        )

    return start


@pytest.mark.slow
def test_a_local_cluster_is_on_loopback_and_its_workers_do_not_outlive_a_killed_driver(
    start_program,
):
    with start_program("sleeps") as driver:
        pid = int(driver.stdout.readline())
        assert driver.stdout.readline() == "['127.0.0.1']\n"
        driver.kill()
        assert ends_soon(pid)


@pytest.mark.slow
@pytest.mark.parametrize("gone", ["gcs_server", "raylet"])
def test_without_ray_the_driver_says_so_before_ray_ends_it(start_program, gone):
    with start_program("sleeps", "waits") as driver:
        pid = int(driver.stdout.readline())
        driver.stdout.readline()
        processes = subprocess.run(
            ["ps", "-eo", "pid=,ppid=,comm="], capture_output=True, text=True, check=True
        ).stdout
        [server] = [
            int(process)
            for process, parent, name in map(str.split, processes.splitlines())
            if parent == str(driver.pid) and name == gone
        ]
        os.kill(server, signal.SIGKILL)
        output = driver.communicate(timeout=300)[0]
        assert driver.returncode == 0  # Ray, which ends its process after 60 s, did not
        assert ends_soon(pid)
    assert re.fullmatch(
        r"(the head of the Ray cluster at \S+ has not|Ray ended on).*the same command continues\n",
        output,
    )


# Its head dies while it is told to end, as where SIGTERM goes to all processes of a job.
TOLD = """
import os, signal, sys, time
import psutil
from q3q.ending import own_exit_code
from q3q.sweep.ray.cluster import Cluster
from q3q.sweep.ray.tasks import Task

def sleeps(report):
    report(os.getpid())
    time.sleep(600)

def end(key, event):
    if not isinstance(event, int):
        return
    print(event, flush=True)
    for child in psutil.Process().children():
        if child.name() in sys.argv[1:]:
            child.kill()
    sys.exit(143)

with own_exit_code(), Cluster(cpus=1) as cluster:
    list(cluster.run([Task(key="sleeps", call=sleeps, retries=0)], end))
"""


@pytest.mark.slow
@pytest.mark.parametrize("gone", [["gcs_server"], ["gcs_server", "raylet"]])
def test_whatever_becomes_of_ray_an_end_has_its_own_exit_code(tmp_path, gone):
    (tmp_path / "told.py").write_text(TOLD)
    with subprocess.Popen(
        [sys.executable, "told.py", *gone],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    ) as driver:
        output = driver.communicate(timeout=300)[0]
    assert driver.returncode == 143
    assert ends_soon(int(output))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="reads Linux's memory use")
def test_a_task_that_fills_the_memory_is_said_to_have_done_so(start_program):
    memory = {
        line.split(":")[0]: int(line.split()[1])
        for line in Path("/proc/meminfo").read_text().splitlines()
    }
    in_use = 1 - memory["MemAvailable"] / memory["MemTotal"]
    with start_program("hogs", RAY_memory_usage_threshold=f"{in_use + 0.03:.3f}") as driver:
        last = driver.communicate(timeout=300)[0].splitlines()[-1]
    assert last.startswith("OutOfMemoryError hogs died")
    assert "out of memory" in last
