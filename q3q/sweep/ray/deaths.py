"""Tell why a task's process died: its own error, its machine, or memory."""

import re
import threading
from contextlib import suppress
from typing import Any

from q3q.errors import Q3QError
from q3q.sweep.ray.gangs import InFlight
from q3q.sweep.ray.messages import BACK, DIED, ERROR, caused_by
from q3q.sweep.ray.nodes import count_kernel_kills, node_id_here
from q3q.sweep.ray.tasks import HeadLostError, OutOfMemoryError, Started, WorkerDiedError

ASK_SECONDS = 20  # how long a machine may take to say whether its kernel killed for memory
# What torch and CUDA say, as errors of some general kind, where memory ran out: on a CPU, and in CUDA's libraries.
MEMORY_WORDS = re.compile(
    r"MemoryError|OutOfMemoryError|enforce fail at alloc_cpu|CUDA (error: )?out of memory"
    r"|(CUBLAS|CUDNN|CUSOLVER|CUSPARSE)_STATUS_(ALLOC_FAILED|INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED)"
)


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


def next_message(stream: Any, flight: InFlight) -> tuple[str, Any]:
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
            return DIED, caused_by(died, error.with_traceback(None))
        reason = (
            getattr(error, "cause", None) or error
        )  # before our code ran: q3q is not installed there, say
        return ERROR, caused_by(Q3QError(f"Ray could not run {key}: {reason}"), error)
    except Exception as error:
        return ERROR, caused_by(Q3QError(f"what {key} sent cannot be read here: {error}"), error)
    if kind == BACK:
        return kind, WorkerDiedError(f"{key} was handed back (pid {content} was asked to end)")
    if kind == ERROR and ran_out_of_memory(content):
        content = OutOfMemoryError(f"{key}: {content or type(content).__name__}")
    return kind, caused_by(content, _RaisedInWorkerError(*trace)) if kind == ERROR else content


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
    if began.node_id == node_id_here():
        return count_kernel_kills()() > began.kernel_kills
    there = NodeAffinitySchedulingStrategy(began.node_id, soft=False)
    ask = ray.remote(num_cpus=0, max_retries=0)(count_kernel_kills()).options(
        scheduling_strategy=there
    )
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
