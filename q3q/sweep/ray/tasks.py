"""The nouns of the Ray room: tasks, resources, outcomes, and the errors of a cluster."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from q3q.errors import Q3QError

Report = Callable[[Any], None]
KIND = "accelerator_type:"  # how Ray's name for the kind of a machine's GPUs begins


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
