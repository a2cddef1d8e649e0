"""Run callables on Ray and yield each result as it ends. The only file that imports ray, and only once it is used.

A task is a Ray *streaming generator*: its first item says that it began, the next ones are what it reported, the last
one is its result or its own exception. One ordered stream per task means that a result cannot overtake an event, that
a dead worker is seen on the stream that it fed, and that there is no mailbox process which could die, or lag, for all.
The callable runs in a thread beside the generator (so it cannot install signal handlers, which only a process's main
thread may).

A gang is a task that runs as several ranks at once, each in a worker of its own, placed together (a Ray placement
group). Rank 0 is the task: what it reports and how it ends counts. When any rank dies or fails, so does the gang: the
others, who wait for it, are killed at once.
"""

import logging
import os
import platform
import queue
import re
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

from q3q.errors import ConfigError, Q3QError
from q3q.masking import masked
from q3q.team import LOOPBACK, PeerLostError, Seat

Report = Callable[[Any], None]

OBJECT_STORE_BYTES = 200_000_000  # only specs, records and events cross
REPORTS_AHEAD = 64  # a task that is so many reports ahead of the driver waits, so nobody's memory fills with them
ANSWER_SECONDS = 12  # how long the cluster at an address may take to answer
CANCEL_SECONDS = 10  # how long cancelled workers are waited for
# Without an answer of its head for so many seconds a cluster is given up: half of those after which Ray ends this
# process, with no word of ours. Nothing is asked of a head while an answer is overdue.
HEAD_SECONDS = float(os.environ.get("RAY_gcs_rpc_server_reconnect_timeout_s", "60")) / 2  # noqa: SIM112
OVERDUE_SECONDS = 3.0
ASK_SECONDS = 20  # how long a machine may take to say whether its kernel killed for memory
# What torch and CUDA say, as errors of some general kind, where memory ran out: on a CPU, and in CUDA's libraries.
MEMORY_WORDS = re.compile(
    r"MemoryError|OutOfMemoryError|enforce fail at alloc_cpu|CUDA (error: )?out of memory"
    r"|(CUBLAS|CUDNN|CUSOLVER|CUSPARSE)_STATUS_(ALLOC_FAILED|INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED)"
)

KIND = "accelerator_type:"  # how Ray's name for the kind of a machine's GPUs begins
AUTH_MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"

_KNOCK = """
import sys, ray
from ray._private.services import canonicalize_bootstrap_address_or_die
ray._raylet.GcsClient(address=canonicalize_bootstrap_address_or_die(sys.argv[1]))
"""


class WorkerDiedError(Q3QError):
    """A task's process or machine died under it; no exception of the task's own says why."""


class HeadLostError(Q3QError):
    """The cluster's head does not answer any more, or Ray ended on this machine: nothing can be started there."""


class OutOfMemoryError(WorkerDiedError):
    """A task ran out of memory: its process was killed for it, by Ray or the kernel, or it said so itself."""


class HandedBackError(BaseException):
    """Raised in a task, when it reports, after its process was asked to end (SIGTERM). Not an Exception, so that a task
    that catches its own errors lets it through."""


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a task reserves, or a cluster has. memory is in bytes; None reserves none. ranks: of a gang, so many times
    the same, perhaps on several machines. kind: of GPUs, as Ray calls it (A100); "": any."""

    cpus: float = 1
    gpus: float = 0
    memory: int | None = None
    ranks: int = 1
    kind: str = ""

    def __str__(self) -> str:
        memory = [] if self.memory is None else [f"{self.memory / 2**30:.1f} GiB of memory"]
        each = ", ".join(
            [f"{self.cpus:g} CPUs", f"{self.gpus:g} {self.kind} GPUs".replace("  ", " "), *memory]
        )
        return each if self.ranks == 1 else f"{self.ranks} ranks of {each}"

    @property
    def pin(self) -> dict[str, float]:
        """What to ask of Ray, besides, to get this kind of GPU: a machine has 1 of the name of its kind."""
        return {f"{KIND}{self.kind}": 0.001} if self.kind else {}


@dataclass(frozen=True, kw_only=True)
class Task:
    """One callable to run in a worker process.

    call: picklable (cloudpickle: lambdas and what `__main__` defines are fine). It is given `report`, which sends a
        small picklable event to the driver and may be called from any thread until the call returns. Each rank of a
        gang is given its `Seat` too; only what rank 0 reports and returns is heard.
    retries: how often it runs again if its process or machine died. An exception of its own is never retried, and what
        its machine hands back (see `_work`) is no death.
    furthers: whether an event says that the task got further than ever before, so that it need not do this again;
        deaths are counted from there on.
    larger: what runs in its place, under the same key, if it runs out of memory: the same work with more of it.
    near: tasks that name the same here had better run where one of them has run; a preference, for which none waits.
    """

    key: str
    call: Callable[..., Any]
    resources: Resources = Resources()
    retries: int = 1
    furthers: Callable[[Any], bool] = lambda event: False
    larger: "Task | None" = None
    near: str = ""


@dataclass(frozen=True, kw_only=True)
class Started:
    """The first event of each attempt: a worker has taken the task. node_id: Ray's. kernel_kills: processes that the
    machine's kernel had killed for memory until then."""

    key: str
    pid: int
    node: str
    attempt: int
    node_id: str = field(default="", compare=False)
    kernel_kills: int = field(default=0, compare=False)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a task ended: with a value, or with an error.

    error: the task's own exception (its `__cause__` shows the worker's traceback), WorkerDiedError if its process or
        machine died, ConfigError if no machine of the cluster can ever run it.
    seconds: of the last attempt, from its start; 0 if it never started.
    """

    key: str
    value: Any = None
    error: BaseException | None = None
    died: bool = False
    attempts: int
    seconds: float = 0.0


class Cluster:
    """Ray on this machine, or the Ray cluster at `address`; a context manager that starts it without waiting.

    Starting takes seconds, so it goes on in the background until the first `total` or `run` needs it. A thread of this
    class starts Ray, keeps it and stops it: Ray's processes die with the *thread* that started them (the kernel's
    parent-death signal is a thread's), which is also what makes workers die with a killed driver.

    Args:
        address: `host:port` or `auto` of a running cluster that this machine is a node of; None starts one here.
        cpus, gpus: what the local cluster may hand out; None lets Ray count.
        env: environment variables that each worker gets before it imports anything for a task.
        patience: seconds to wait for a machine large enough for a task, where a cluster grows on demand; with 0, a
            task that fits on no machine of now is refused at once.
    """

    def __init__(
        self,
        address: str | None = None,
        cpus: int | None = None,
        gpus: int | None = None,
        env: Mapping[str, str] | None = None,
        patience: float = 0.0,
    ) -> None:
        if address is not None and (cpus is not None or gpus is not None):
            raise ConfigError(
                f"cpus and gpus are for a local cluster: the one at {address} has what it has"
            )
        if address is not None and "://" in address:
            raise ConfigError(
                f"cluster address {address}: run on a node of the cluster and give host:port, or auto"
            )
        self.address, self.cpus, self.gpus = address, cpus, gpus
        self.env, self.patience = dict(env or {}), patience
        self._up, self._over = threading.Event(), threading.Event()
        self._failure: BaseException | None = None
        self._keeper: threading.Thread | None = None
        self._sigterm_is_ours = False
        self._headless = False  # its head is gone: there is nobody to take leave of, and the workers end by themselves

    def start(self) -> "Cluster":
        """Start in the background, unless that was done. What goes wrong is raised by `total` and `run`."""
        if self._keeper is None:
            self._keeper = threading.Thread(target=self._keep, name="ray-keeper", daemon=True)
            self._keeper.start()
        return self

    def stop(self) -> None:
        """Stop a local cluster with all its processes; leave one at an address, ending only what we ran there."""
        self._over.set()
        if self._keeper is not None:
            self._keeper.join()
        if self._sigterm_is_ours:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            self._sigterm_is_ours = False

    def __enter__(self) -> "Cluster":
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def total(self) -> Resources:
        """All that the cluster has, taken or free."""
        self._wait_until_up()
        import ray

        return _resources_of(ray.cluster_resources())

    def machines(self) -> list[Resources]:
        """What each of its machines has, taken or free."""
        self._wait_until_up()
        return _machines()

    def run(
        self,
        tasks: Sequence[Task],
        on_event: Callable[[str, Any], None],
        on_retry: Callable[[str, WorkerDiedError], None] | None = None,
        on_tick: Callable[[], None] | None = None,
    ) -> Generator[Outcome, None, None]:
        """Run the tasks, in their order as far as resources allow, and yield one Outcome for each as it ends.

        Closing the iterator, or an exception in the driver (Ctrl-C too), kills the workers of unfinished tasks.

        Args:
            tasks: with distinct keys. Only as many as can help wait in Ray's queue at a time.
            on_event: called in the driver with a task's key and each event, Started first, in order, as they come.
            on_retry: called when a task is about to run again because it died.
            on_tick: called about once a second at least; what it raises ends the run.

        Raises:
            HeadLostError: the cluster's head is gone.
        """
        if len({task.key for task in tasks}) < len(tasks):
            raise ValueError("tasks must have distinct keys")
        run = _Run(self, tasks, on_event, on_retry)
        try:
            yield from run.outcomes(on_tick or (lambda: None))
        except HeadLostError:
            self._headless = True
            raise
        finally:
            self._headless |= not run.head.answers()
            if not self._headless:
                run.cancel()
            run.head.close()

    def _keep(self) -> None:
        """The keeper thread's life."""
        try:
            self._start_here() if self.address is None else self._connect(self.address)
        except BaseException as error:
            self._failure = error
        finally:
            self._up.set()
        self._over.wait()
        if self._failure is None and not self._headless:
            import ray

            ray.shutdown()

    def _start_here(self) -> None:
        if _token_wanted() and not os.environ.get(TOKEN_PATH):
            os.environ.setdefault(TOKEN, _own_token())
        # On any platform this variable decides whether Ray listens on loopback alone; read when ray is first imported.
        with _environment({"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}):
            self._init(
                address="local",  # even if a cluster already runs here or RAY_ADDRESS names one
                num_cpus=self.cpus,
                num_gpus=self.gpus,
                include_dashboard=False,
                object_store_memory=OBJECT_STORE_BYTES,
            )

    def _connect(self, address: str) -> None:
        if _token_wanted() and not _token_known():
            raise ConfigError(
                f"the Ray cluster at {address} is joined with a token, and none is here: put the head's "
                f"(ray get-auth-token) into ~/.ray/auth_token, or set {AUTH_MODE}=disabled for a cluster without one"
            )
        # ray.init takes minutes to give up on an address and cannot be interrupted: let another process knock first.
        try:
            answer = subprocess.run(
                [sys.executable, "-c", _KNOCK, address],
                capture_output=True,
                text=True,
                timeout=ANSWER_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise ConfigError(
                f"no Ray cluster answers at {address}. Give the host:port that `ray start --head` printed"
            ) from None
        if answer.returncode != 0:
            if "InvalidAuthToken" in answer.stderr:
                raise ConfigError(
                    f"the Ray cluster at {address} does not take the token that is here, or wants one and got none: "
                    f"give the head's (ray get-auth-token there) as ~/.ray/auth_token, with {AUTH_MODE}=token"
                )
            reason = (answer.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise ConfigError(f"cannot use the Ray cluster at {address}: {masked(reason)}")
        self._init(address=address)

    def _init(self, **options: Any) -> None:
        import ray

        if ray.is_initialized():
            raise ConfigError(
                "Ray already runs in this process: pass its Cluster on instead of starting a second one"
            )
        try:
            ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
        except Exception as error:
            where = f"the Ray cluster at {self.address}" if self.address else "Ray on this machine"
            raise ConfigError(f"cannot start {where}: {error}") from error
        # Ray prints a paragraph on the driver's stdout for each dead worker, even so; our Outcome says it in a line.
        ray._private.worker._worker_logs_enabled = False
        # Nor is it of interest that a rank which was ended with its gang never said how it ended.
        os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")

    def _wait_until_up(self) -> None:
        if self._keeper is None:
            raise RuntimeError("start the cluster first: `with Cluster() as cluster`")
        self._up.wait()
        if self._failure is not None:
            raise self._failure
        if self._over.is_set():
            raise RuntimeError("this cluster is stopped")
        if (
            threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        ):
            # Ray's core would answer SIGTERM with a stack trace and sudden death; end as Python ends instead.
            signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
            self._sigterm_is_ours = True


def _token_wanted() -> bool:
    """Whether Ray is to check tokens: always, unless the environment says otherwise."""
    return os.environ.setdefault(AUTH_MODE, "token").lower() == "token"


@cache
def _own_token() -> str:
    """One of this process's own, on no disk; for its lifetime, because Ray's core keeps the first that it sees."""
    return secrets.token_hex(32)


def _token_known() -> bool:
    """Whether there is a token where Ray looks for one."""
    return (
        any(os.environ.get(name) for name in (TOKEN, TOKEN_PATH))
        or Path("~/.ray/auth_token").expanduser().is_file()
    )


_EVENT, _VALUE, _ERROR, _DIED, _BACK, _MEET = (
    "event",
    "value",
    "error",
    "died",
    "handed back",
    "meet",
)
ECHO_SECONDS = (
    3.0  # that the ranks of a gang have to end once one has, and to say which of them failed first
)
PARTING_SECONDS = (
    1.0  # that a process which was asked to end stays, so that its last words are heard
)


@dataclass
class _Flight:
    """A task that Ray has, or one rank of it. deaths: since it last got further. clock: monotonic seconds when it was
    submitted, then when it began."""

    task: Task
    attempt: int
    deaths: int = 0
    began: Started | None = None
    clock: float = field(default_factory=time.monotonic)
    rank: int = 0
    gang: "_Gang | None" = None

    def ended(
        self, value: Any = None, error: BaseException | None = None, died: bool = False
    ) -> Outcome:
        seconds = time.monotonic() - self.clock if self.began else 0.0
        key, attempts = self.task.key, self.attempt
        return Outcome(
            key=key, value=value, error=error, died=died, attempts=attempts, seconds=seconds
        )


class _Run:
    """The tasks of one `Cluster.run`: those that still wait here, and those that Ray has."""

    def __init__(
        self,
        cluster: Cluster,
        tasks: Sequence[Task],
        on_event: Callable[[str, Any], None],
        on_retry: Callable[[str, WorkerDiedError], None] | None,
    ) -> None:
        self.on_event, self.on_retry = on_event, on_retry
        self.env, self.patience = cluster.env, cluster.patience
        # So many tasks of a shape may wait in Ray's queue: enough to fill the cluster at once, and to show one that
        # grows on demand that there is demand.
        self.ahead = max(8, int(cluster.total().cpus))
        # Each shape has its own queue, so that tasks that wait for a GPU do not hold up those that need none.
        self.queues: dict[Resources, deque[tuple[Task, int, int]]] = {}
        for task in tasks:
            self.queues.setdefault(task.resources, deque()).append((task, 1, 0))
        self.entries = {shape: _entry(shape) for shape in self.queues}
        self.homes: dict[
            str, str
        ] = {}  # of tasks that had better be near each other, the node where one began last
        self.head = _Head()
        self.judged: list[Resources] | None = (
            None  # what machines there were when tasks were last refused
        )
        self.several = len(self.head.machines) > 1 or self.patience > 0
        self.flights: dict[Any, _Flight] = {}
        self.gangs: list[_Flight] = []  # rank 0 of each

    def outcomes(self, on_tick: Callable[[], None]) -> Iterator[Outcome]:
        while self.flights or any(self.queues.values()):
            on_tick()
            self.head.check()
            if self.head.answers():
                yield from self._submit()
                yield from self._listen()
                yield from self._refuse()
            else:  # what Ray is asked now may never come back
                time.sleep(1.0)

    def cancel(self) -> None:
        _cancel(list(self.flights))
        for flight in list(self.gangs):
            self._disband(flight)

    def _submit(self) -> Iterator[Outcome]:
        """Give Ray as many tasks as may wait there."""
        import ray

        waiting = Counter(
            flight.task.resources
            for flight in self.flights.values()
            if flight.began is None and flight.rank == 0
        )
        path = [os.path.abspath(entry) for entry in sys.path]
        for shape, queue_of_shape in self.queues.items():
            while queue_of_shape and waiting[shape] < self.ahead:
                flight = _Flight(*queue_of_shape.popleft())
                task = flight.task
                try:
                    call = ray.cloudpickle.dumps(task.call)
                except Exception as error:
                    problem = Q3QError(f"{task.key} cannot be sent to a worker: {error}")
                    yield flight.ended(error=_caused_by(problem, error))
                    continue
                work = (
                    path,
                    os.getcwd(),
                    self.env,
                    call,
                    task.key,
                    flight.attempt,
                    shape.cpus,
                    shape.gpus,
                )
                if shape.ranks > 1:
                    flight.gang = _Gang(shape, self.entries[shape], work)
                    self.gangs.append(flight)
                    self.flights[flight.gang.seat(0)] = flight
                else:
                    self.flights[self._entry_near(task).remote(*work)] = flight
                waiting[shape] += 1

    def _entry_near(self, task: Task) -> Any:
        """The Ray function for a task, with a wish where to run. One that would have to wait there runs elsewhere."""
        entry, home = self.entries[task.resources], self.homes.get(task.near)
        if not (self.several and task.near and home):
            return entry
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        there = NodeAffinitySchedulingStrategy(home, soft=True, _spill_on_unavailable=True)
        return entry.options(scheduling_strategy=there)

    def _listen(self) -> Iterator[Outcome]:
        """Take what one stream has to say, if one speaks up within a second."""
        import ray

        ready = ray.wait(list(self.flights), num_returns=1, timeout=1.0)[0] if self.flights else []
        for stream in ready:
            flight = self.flights.pop(stream)
            kind, content = _next_message(stream, flight)
            if kind == _EVENT:
                self.flights[stream] = (
                    flight  # last in line: a talkative task must not keep others from being heard
                )
                self._heard(flight, content)
            elif kind == _MEET and flight.gang is not None:
                self.flights[stream] = flight
                for rank in range(1, flight.task.resources.ranks):
                    self.flights[flight.gang.seat(rank, content)] = replace(
                        flight, rank=rank, began=None
                    )
            elif flight.gang is None:
                yield from self._landed(flight, kind, content)
            else:
                flight.gang.ends[flight.rank] = kind, content
        for flight in list(self.gangs):
            if flight.gang is not None and (end := flight.gang.verdict()) is not None:
                self._disband(flight)
                yield from self._landed(flight, *end)

    def _heard(self, flight: _Flight, event: Any) -> None:
        """What a task reports; of a gang, rank 0 speaks for all."""
        if isinstance(event, Started):
            flight.began, flight.clock = event, time.monotonic()
            self.homes[flight.task.near] = event.node_id
        elif flight.rank == 0 and flight.task.furthers(event):
            flight.deaths = 0
        if flight.rank == 0:
            self.on_event(flight.task.key, event)

    def _landed(self, flight: _Flight, kind: str, content: Any) -> Iterator[Outcome]:
        """A task ended, and perhaps is to run again."""
        task = flight.task
        if kind == _VALUE:
            yield flight.ended(value=content)
        elif task.larger is not None and isinstance(content, OutOfMemoryError):
            shape = task.larger.resources
            self.queues.setdefault(shape, deque()).appendleft((task.larger, flight.attempt + 1, 0))
            self.entries.setdefault(shape, _entry(shape))
            if self.on_retry is not None:
                self.on_retry(task.key, content)
        elif kind == _BACK or (kind == _DIED and flight.deaths < task.retries):
            deaths = flight.deaths + (kind == _DIED)
            self.queues[task.resources].appendleft((task, flight.attempt + 1, deaths))
            if self.on_retry is not None:
                self.on_retry(task.key, content)
        else:
            yield flight.ended(error=content, died=kind == _DIED)

    def _disband(self, flight: _Flight) -> None:
        """End what is left of a gang."""
        import ray

        assert flight.gang is not None
        self.gangs.remove(flight)
        streams = [stream for stream, other in self.flights.items() if other.gang is flight.gang]
        for stream in streams:
            del self.flights[stream]
        _cancel(streams)
        with suppress(ray.exceptions.RayError):
            ray.util.remove_placement_group(flight.gang.group)

    def _refuse(self) -> Iterator[Outcome]:
        """End the tasks that no machine of the cluster has been large enough for, for as long as patience lasts."""
        now, machines = time.monotonic(), self.head.machines
        if machines is self.judged:
            return
        self.judged = machines
        for stream, flight in list(self.flights.items()):
            wanted = flight.task.resources
            if flight.began is not None or flight.rank > 0:
                continue
            if sum(_rooms(wanted, machine) for machine in machines) >= wanted.ranks:
                flight.clock = now
            elif now - flight.clock > self.patience:
                if flight.gang is None:
                    del self.flights[stream]
                    _cancel([stream])
                else:
                    self._disband(flight)
                has = "; ".join(map(str, machines)) or "none"
                who = "no machine has" if wanted.ranks == 1 else "all machines together do not have"
                yield flight.ended(
                    error=ConfigError(
                        f"{flight.task.key} needs {wanted}, and {who} that. Machines: {has}"
                    )
                )


class _Head:
    """The cluster's head, which a thread asks every second what machines there are: gone, it never answers.

    machines: what it said last.
    """

    def __init__(self) -> None:
        import ray

        self.address = str(ray.get_runtime_context().gcs_address)
        self.machines = _machines()
        self._asked: float | None = None  # when it was, while the answer is awaited
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._ask, name="q3q-head", daemon=True)
        self._thread.start()

    def answers(self) -> bool:
        """Whether it does, as far as is known."""
        return self._awaited() < OVERDUE_SECONDS

    def check(self) -> None:
        """Raises HeadLostError after HEAD_SECONDS without an answer. One that is there again in time is not missed."""
        if (seconds := self._awaited()) > HEAD_SECONDS:
            raise HeadLostError(
                f"the head of the Ray cluster at {self.address} has not answered for {seconds:.0f} s; when there is a "
                "cluster again, the same command goes on"
            )

    def close(self) -> None:
        self._over.set()
        if self.answers():  # else it may be waited for as long as this process lives
            self._thread.join(OVERDUE_SECONDS)

    def _awaited(self) -> float:
        """Seconds that the last question has waited for its answer."""
        asked = self._asked
        return 0.0 if asked is None else time.monotonic() - asked

    def _ask(self) -> None:
        while not self._over.wait(1.0):
            self._asked = time.monotonic()
            with suppress(
                Exception
            ):  # by which it answers too: what Ray cannot do will be seen where it is needed
                self.machines = _machines()
            self._asked = None


class _Gang:
    """The ranks of one task. group: Ray's, with room for all. ends: how each rank that ended did."""

    def __init__(self, shape: Resources, entry: Any, work: tuple[Any, ...]) -> None:
        import ray

        amounts = {"CPU": shape.cpus, "GPU": shape.gpus, "memory": shape.memory, **shape.pin}
        bundle = {name: amount for name, amount in amounts.items() if amount}
        # On as few machines as possible, and all at once or not at all, so that no two gangs wait for each other.
        self.group = ray.util.placement_group([bundle] * shape.ranks, strategy="PACK")
        self.ranks, self.ends = shape.ranks, dict[int, tuple[str, Any]]()
        self._entry, self._work = entry, work
        self._failed: float | None = None

    def seat(self, rank: int, address: tuple[str, int] | None = None) -> Any:
        """Have Ray run a rank; its stream. address: where rank 0 waits for it."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        strategy = PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=rank)
        return self._entry.options(scheduling_strategy=strategy).remote(
            *self._work, (rank, self.ranks, address)
        )

    def verdict(self) -> tuple[str, Any] | None:
        """How the gang ended, None if it did not.

        Whoever loses the connection to a rank that failed fails too, and may be heard first. When rank 0 is through,
        the others end by themselves in a moment, and their processes serve others.
        """
        said = [(rank, end) for rank, end in self.ends.items() if rank == 0 or end[0] != _VALUE]
        if not said:
            return None
        weight, rank = min((_weight(rank, *end), rank) for rank, end in said)
        self._failed = self._failed or time.monotonic()
        waited = len(self.ends) == self.ranks or time.monotonic() - self._failed > ECHO_SECONDS
        if weight in (_DONE, _OTHERS_ERROR, _ECHO) and not waited:
            return None
        if weight == _ECHO:
            lost = WorkerDiedError("the ranks of a gang lost each other, and none says why")
            return _DIED, _caused_by(lost, self.ends[rank][1])
        return self.ends[rank]


_DONE, _GONE, _OWN_ERROR, _OTHERS_ERROR, _ECHO = range(5)


def _weight(rank: int, kind: str, content: Any) -> int:
    """What counts first of how the ranks of a gang ended."""
    if kind == _ERROR:
        return (
            _ECHO if isinstance(content, PeerLostError) else _OTHERS_ERROR if rank else _OWN_ERROR
        )
    return _DONE if kind == _VALUE else _GONE


class _RaisedInWorkerError(Exception):
    """Shows, as the cause of a task's exception, where in the worker it was raised."""

    def __str__(self) -> str:
        return f"\n\n{self.args[0]}"


_HOW_IT_DIED = {  # by the name of Ray's exception
    "WorkerCrashedError": "its process was killed or crashed",
    "OutOfMemoryError": "out of memory, so Ray killed it before its machine was full",
    "NodeDiedError": "its machine was lost",
    "ObjectLostError": "its answer was lost with the machine that held it",
    "RaySystemError": "Ray failed",
    "StopIteration": "it ended without an answer",
}


def _next_message(stream: Any, flight: _Flight) -> tuple[str, Any]:
    """What a task's stream says next. Only called when it has something to say."""
    import ray

    key = flight.task.key
    try:
        kind, content, *trace = ray.cloudpickle.loads(ray.get(next(stream)))
    except (
        ray.exceptions.LocalRayletDiedError
    ) as error:  # no task's death: none can be started from here
        raise HeadLostError(
            "Ray ended on this machine; when it runs again, the same command goes on"
        ) from error
    except (ray.exceptions.RayError, StopIteration) as error:
        how = [
            _HOW_IT_DIED[kind.__name__]
            for kind in type(error).__mro__
            if kind.__name__ in _HOW_IT_DIED
        ]
        if how:
            worker = f" (pid {flight.began.pid} on {flight.began.node})" if flight.began else ""
            worker += (
                f", rank {flight.rank} of {flight.task.resources.ranks}" if flight.gang else ""
            )
            short, why = isinstance(error, ray.exceptions.OutOfMemoryError), how[0]
            if isinstance(error, ray.exceptions.WorkerCrashedError) and _kernel_killed_since(
                flight.began
            ):
                short, why = True, "out of memory, so the kernel killed it"
            died = (OutOfMemoryError if short else WorkerDiedError)(f"{key} died{worker}: {why}")
            return _DIED, _caused_by(died, error.with_traceback(None))
        reason = (
            getattr(error, "cause", None) or error
        )  # before our code ran: q3q is not installed there, say
        return _ERROR, _caused_by(Q3QError(f"Ray could not run {key}: {reason}"), error)
    except Exception as error:
        return _ERROR, _caused_by(Q3QError(f"what {key} sent cannot be read here: {error}"), error)
    if kind == _BACK:
        return kind, WorkerDiedError(f"{key} was handed back (pid {content} was asked to end)")
    if kind == _ERROR and ran_out_of_memory(content):
        content = OutOfMemoryError(f"{key}: {content or type(content).__name__}")
    return kind, _caused_by(content, _RaisedInWorkerError(*trace)) if kind == _ERROR else content


def ran_out_of_memory(error: BaseException | str) -> bool:
    """Whether an error, or the reason that a record keeps of one (`Kind: words`), says so."""
    kinds = [] if isinstance(error, str) else [one.__name__ for one in type(error).__mro__]
    return MEMORY_WORDS.search(" ".join([*kinds, str(error)])) is not None


def _kernel_killed_since(began: Started | None) -> bool:
    """Whether the kernel of the machine where a task began has killed a process for memory since; False if the machine
    does not answer. Which process, it does not tell: the task that died is the likeliest."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if began is None:
        return False
    if began.node_id == _node_id():
        return _kernel_kills()() > began.kernel_kills
    there = NodeAffinitySchedulingStrategy(began.node_id, soft=False)
    ask = ray.remote(num_cpus=0, max_retries=0)(_kernel_kills()).options(scheduling_strategy=there)
    found: list[int] = []

    def look() -> None:
        with suppress(ray.exceptions.RayError):
            found.append(ray.get(ask.remote(), timeout=ASK_SECONDS))

    asking = threading.Thread(
        target=look, daemon=True
    )  # without the cluster's head `remote` may never come back
    asking.start()
    asking.join(ASK_SECONDS)
    return bool(found) and found[0] > began.kernel_kills


def _kernel_kills() -> Callable[[], int]:
    """What counts the processes that a machine's kernel killed for memory, of its containers too; 0 if it does not
    say. Nested, and so pickled whole, like `_entry`'s."""

    def count() -> int:
        from pathlib import Path

        try:
            counters = dict(
                line.split()
                for line in Path("/proc/vmstat").read_text(encoding="ascii").splitlines()
            )
        except OSError:
            return 0
        return int(counters.get("oom_kill", 0))

    return count


def _caused_by(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


def _cancel(streams: Sequence[Any]) -> None:
    """Kill the workers that run these tasks, and see them dead: their files may be written by others next."""
    import ray

    with suppress(ray.exceptions.RayError):  # the cluster itself may be gone
        for stream in streams:
            ray.cancel(stream, force=True)
        if streams:
            ends = [stream.completed() for stream in streams]
            ray.wait(ends, num_returns=len(ends), timeout=CANCEL_SECONDS, fetch_local=False)


def _machines() -> list[Resources]:
    import ray

    return [_resources_of(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def _resources_of(amounts: Mapping[str, float]) -> Resources:
    kinds = [name.removeprefix(KIND) for name in amounts if name.startswith(KIND)]
    return Resources(
        cpus=amounts.get("CPU", 0),
        gpus=amounts.get("GPU", 0),
        memory=int(amounts.get("memory", 0)) or None,
        kind=kinds[0] if len(kinds) == 1 else "",
    )


def _rooms(wanted: Resources, machine: Resources) -> int:
    """How many such tasks, or ranks of one, the machine has room for when it is empty."""
    if wanted.kind not in ("", machine.kind):
        return 0
    amounts = [
        (wanted.cpus, machine.cpus),
        (wanted.gpus, machine.gpus),
        (wanted.memory or 0, machine.memory or 0),
    ]
    return min((int(has // needs) for needs, has in amounts if needs), default=wanted.ranks)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Environment variables that child processes inherit, for as long as the block lasts."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _entry(shape: Resources) -> Any:
    """The Ray function for tasks of this shape."""
    import ray

    # Nested, because nested functions are pickled whole: it makes q3q importable before anything of q3q is needed.
    def task(path: list[str], cwd: str, env: dict[str, str], *work: Any) -> Iterator[bytes]:
        import os
        import sys

        sys.path[:] = [
            *filter(os.path.exists, path),
            *(entry for entry in sys.path if entry not in path),
        ]
        os.environ.update(env)
        if os.path.isdir(cwd):  # not on another machine
            os.chdir(cwd)
        from q3q.sweep.cluster import _work

        yield from _work(*work)

    options: dict[str, Any] = {
        "num_cpus": shape.cpus,
        "num_gpus": shape.gpus,
        "memory": shape.memory,
        "resources": shape.pin,
        "num_returns": "streaming",
        "max_retries": 0,  # we retry ourselves, and say so
        "_generator_backpressure_num_objects": REPORTS_AHEAD,
    }
    return ray.remote(**options)(task)


def _work(
    call: bytes,
    key: str,
    attempt: int,
    cpus: float,
    gpus: float,
    place: tuple[int, int, tuple[str, int] | None] | None = None,
) -> Iterator[bytes]:
    """In the worker: run one pickled call in a thread of its own; yield what it reports, then how it ended.

    SIGTERM (a spot machine's notice, a scheduler's) lets the call go on to where it next reports something, which a
    trial does when a block or a measurement is on disk. There it ends and is handed back, and its process ends too. A
    notice that is too short for that ends as any death does.

    place: of a gang's rank: which one, of how many, and where it meets rank 0, who says where.
    """
    outbox: queue.Queue[bytes | None] = queue.Queue(maxsize=REPORTS_AHEAD)
    asked = threading.Event()
    with _heeding_sigterm(asked):
        where, kills = {"node": platform.node(), "node_id": _node_id()}, _kernel_kills()()
        yield _pack(
            _EVENT, Started(key=key, pid=os.getpid(), attempt=attempt, kernel_kills=kills, **where)
        )
        work: tuple[Any, ...] = (call, cpus, gpus, outbox, asked)
        if place is not None:
            seat = _seat(*place)
            work += (seat,)
            if seat.rank == 0:
                yield _pack(_MEET, (seat.host, seat.port))
        threading.Thread(target=_run_call, args=work, name=key, daemon=True).start()
        while (message := outbox.get()) is not None:
            yield message
        if asked.is_set():
            time.sleep(PARTING_SECONDS)
            sys.exit(128 + signal.SIGTERM)


@contextmanager
def _heeding_sigterm(asked: threading.Event) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _seat(rank: int, size: int, address: tuple[str, int] | None) -> Seat:
    """A rank's place in its gang; rank 0 listens from here on, on loopback if all ranks are on its machine."""
    import ray

    table = ray.util.placement_group_table(ray.util.get_current_placement_group())
    together = len(set(table["bundles_to_node_id"].values())) == 1
    own_host = LOOPBACK if together else ray.util.get_node_ip_address()
    listener = socket.create_server((own_host, 0)) if address is None else None
    host, port = address or (own_host, 0)
    if listener is not None:
        port = listener.getsockname()[1]
    return Seat(rank=rank, size=size, host=host, port=port, own_host=own_host, listener=listener)


def _run_call(
    call: bytes,
    cpus: float,
    gpus: float,
    outbox: "queue.Queue[bytes | None]",
    asked: threading.Event,
    *seats: Seat,
) -> None:
    def report(event: Any) -> None:
        if asked.is_set():
            raise HandedBackError
        outbox.put(_pack(_EVENT, event))

    try:
        keep_to(cpus, gpus)
        value = _unpack(call)(report, *seats)
    except HandedBackError:
        end = _pack(_BACK, os.getpid())
    except BaseException as error:  # sys.exit too: this thread must always say how it ended
        end = _pack_error(error)
    else:
        try:
            end = _pack(_VALUE, value)
        except Exception as error:
            problem = Q3QError(
                f"the result, of type {type(value).__name__}, cannot be sent: {error}"
            )
            end = _pack_error(_caused_by(problem, error))
    outbox.put(end)
    outbox.put(None)


def keep_to(cpus: float, gpus: float) -> None:
    """Compute with as many threads as CPUs were reserved; see no GPU if none was."""
    threads = max(1, int(cpus))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)  # for libraries that are loaded from now on
    if (
        "torch" in sys.modules
    ):  # from an earlier task; OpenMP counts threads for each calling thread anew
        sys.modules["torch"].set_num_threads(threads)
    if gpus == 0:
        os.environ["CUDA_VISIBLE_DEVICES"] = (
            ""  # Ray gives GPU tasks processes of their own, so none inherits this
        )


def _node_id() -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())


def _pack(*message: Any) -> bytes:
    from ray import cloudpickle

    return cloudpickle.dumps(message)


def _unpack(packed: bytes) -> Any:
    from ray import cloudpickle

    return cloudpickle.loads(packed)


def _pack_error(error: BaseException) -> bytes:
    trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    try:
        packed = _pack(_ERROR, error, trace)
        _unpack(
            packed
        )  # an exception class with its own __init__ often pickles but does not come back
    except Exception:
        packed = _pack(_ERROR, Q3QError(f"{type(error).__name__}: {error}"), trace)
    return packed
