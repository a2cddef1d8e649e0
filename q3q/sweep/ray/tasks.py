"""The nouns of this package: a task, what it reserves, how it ended, and what goes wrong."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from q3q.errors import Q3QError

Report = Callable[[Any], None]
KIND = "accelerator_type:"  # prefix of Ray's resource for the kind of a machine's GPUs


class WorkerDiedError(Q3QError):
    """A task's process or machine died under it; no exception of the task's own says why."""


class HeadLostError(Q3QError):
    """The cluster's head no longer answers, or Ray ended on this machine: nothing can start."""


class StartError(Q3QError):
    """Ray died or hung before it was up: nothing has started."""


class OutOfMemoryError(WorkerDiedError):
    """A task ran out of memory: Ray or the kernel killed its process, or it said so itself."""


class GpuFailedError(WorkerDiedError):
    """A task's GPU failed, or is gone; the task has to say so, as Ray does not notice."""


class HandedBackError(BaseException):
    """Raised in a task, when it reports, after its process was asked to end (SIGTERM).

    Not an Exception, so that a task that catches its own errors lets it through.
    """


@dataclass(frozen=True, kw_only=True)
class Resources:
    """What a task reserves, or what a machine or cluster has.

    memory: bytes; None reserves none
    ranks: of a gang, each of which reserves as much, perhaps on several machines
    kind: of GPUs, by Ray's name (A100); "" for any
    """

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
    def kind_request(self) -> dict[str, float]:
        """The custom resource that pins a task to this kind of GPU; each such machine has 1."""
        return {f"{KIND}{self.kind}": 0.001} if self.kind else {}


@dataclass(frozen=True, kw_only=True)
class Task:
    """One callable to run in a worker process.

    call: picklable (cloudpickle: lambdas and what `__main__` defines are fine). It receives
        `report`, which sends a small picklable event to the driver and may be called from any
        thread until the call returns. Each rank of a gang receives its `Rendezvous` too; only what
        rank 0 reports and returns counts.
    retries: how often it runs again if its process or machine died. An exception of its own is
        never retried, but for GpuFailedError (see `gpus_aside`) and for want of memory (`larger`);
        being handed back (see `worker`) is no death.
    furthers: tells from an event whether the task got further than ever before, so that it need
        not do this again; deaths are counted from there on
    larger: what runs in its place, under the same key, if it runs out of memory: the same work
        with more of it
    near: tasks that give the same name preferably run where one of them has run; none waits for it
    node: Ray's id of the only machine where it may run; "" for any
    makes: names of what it uses with other tasks: of those that give the same name, the first makes
        it, and the others wait until it is made, or that task has ended; tasks behind them pass
    made: returns which of these names an event shows to be made
    """

    key: str
    call: Callable[..., Any]
    resources: Resources = Resources()
    retries: int = 1
    furthers: Callable[[Any], bool] = lambda event: False
    larger: "Task | None" = None
    near: str = ""
    node: str = ""
    makes: tuple[str, ...] = ()
    made: Callable[[Any], set[str]] = lambda event: set()


@dataclass(frozen=True, kw_only=True)
class Started:
    """The first event of each attempt: a worker has taken the task.

    node: the machine's name
    node_id: Ray's
    gpu_ids: Ray's numbers of its GPUs on that machine
    kernel_kills: processes that the machine's kernel had killed for memory until then
    """

    key: str
    pid: int
    node: str
    attempt: int
    node_id: str = field(default="", compare=False)
    gpu_ids: tuple[str, ...] = field(default=(), compare=False)
    kernel_kills: int = field(default=0, compare=False)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a task ended: with a value, or with an error.

    error: the task's own exception (its `__cause__` shows the worker's traceback), WorkerDiedError
        if its process or machine died, ConfigError if no machine of the cluster can ever run it
    seconds: of the last attempt, from its start; 0 if it never started
    """

    key: str
    value: Any = None
    error: BaseException | None = None
    attempts: int
    seconds: float = 0.0
