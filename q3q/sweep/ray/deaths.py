"""Read a task's stream in the driver; where a message is missing, tell why its process died."""

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from q3q.errors import MEMORY_WORDS, Q3QError
from q3q.sweep.ray.in_flight import InFlight
from q3q.sweep.ray.messages import DIED, ERROR, HANDED_BACK, Message, caused_by, unpack
from q3q.sweep.ray.nodes import current_node_id, kernel_kill_counter
from q3q.sweep.ray.tasks import HeadLostError, OutOfMemoryError, Started, WorkerDiedError

ANSWER_SECONDS = 20  # that a machine may take to do what is asked of it
CAUSES = {  # by the name of Ray's exception
    "WorkerCrashedError": "its process was killed or crashed",
    "OutOfMemoryError": "out of memory, so Ray killed it before its machine was full",
    "NodeDiedError": "its machine was lost",
    "ObjectLostError": "its answer was lost with the machine that held it",
    "RaySystemError": "Ray failed",
    "StopIteration": "it ended without an answer",
}


class _RaisedInWorkerError(Exception):
    """The cause of a task's exception: shows where in the worker it was raised."""

    def __str__(self) -> str:
        return f"\n\n{self.args[0]}"


def next_message(stream: Any, flight: InFlight) -> Message:
    """Return the next message of a task's stream, which must be ready, or the task's death.

    Raises:
        HeadLostError: Ray ended on this machine.
    """
    import ray

    key = flight.task.key
    try:
        kind, content, *trace = unpack(ray.get(next(stream)))
    except ray.exceptions.LocalRayletDiedError as error:
        raise HeadLostError(
            "Ray ended on this machine; when it runs again, the same command continues"
        ) from error
    except (ray.exceptions.RayError, StopIteration) as error:
        return _ended_by_ray(flight, error)
    except Exception as error:
        problem = Q3QError(f"what {key} sent cannot be read here: {error}")
        return Message(ERROR, caused_by(problem, error))
    if kind == HANDED_BACK:
        content = WorkerDiedError(f"{key} was handed back (pid {content} was asked to end)")
    elif kind == ERROR:
        if ran_out_of_memory(content):
            content = OutOfMemoryError(f"{key}: {str(content) or type(content).__name__}")
        content = caused_by(content, _RaisedInWorkerError(*trace))
    return Message(kind, content)


def ran_out_of_memory(error: BaseException | str) -> bool:
    """Return whether an error, or a record's reason (`Kind: words`), says that memory ran out."""
    kinds = [] if isinstance(error, str) else [kind.__name__ for kind in type(error).__mro__]
    return MEMORY_WORDS.search(" ".join([*kinds, str(error)])) is not None


def _ended_by_ray(flight: InFlight, error: Exception) -> Message:
    """Explain what Ray raised in place of a message: the task's death, or that it cannot run."""
    import ray

    task, began = flight.task, flight.began
    causes = [CAUSES[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in CAUSES]
    if not causes:  # it failed before our code ran: q3q is not installed there, say
        reason = getattr(error, "cause", None) or error
        return Message(ERROR, caused_by(Q3QError(f"Ray could not run {task.key}: {reason}"), error))
    cause, kind = causes[0], WorkerDiedError
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        kind = OutOfMemoryError
    elif isinstance(error, ray.exceptions.WorkerCrashedError) and _kernel_killed_since(began):
        cause, kind = "out of memory, so the kernel killed it", OutOfMemoryError
    death = kind(f"{task.key} died{_worker(flight)}: {cause}")
    return Message(DIED, caused_by(death, error.with_traceback(None)))


def end_hung(flight: InFlight, words: str) -> Message:
    """Kill a rank that hangs, and return its death.

    Ray asks a process to end, which one that is stopped never hears.
    """
    if flight.began is not None:
        _run_near(flight.began, _killer(flight.began.pid))
    rank = f"rank {flight.rank} of {flight.task.resources.ranks}"
    return Message(
        DIED, WorkerDiedError(f"{flight.task.key} hangs{_worker(flight)}: {rank} {words}")
    )


def _worker(flight: InFlight) -> str:
    began = flight.began
    worker = f" (pid {began.pid} on {began.node})" if began else ""
    return worker + (
        f", rank {flight.rank} of {flight.task.resources.ranks}" if flight.gang else ""
    )


def _killer(pid: int) -> Callable[[], None]:
    """Return a function that kills a process; nested, so that Ray pickles it whole."""

    def kill() -> None:
        import os
        import signal
        from contextlib import suppress

        with suppress(OSError):
            os.kill(pid, signal.SIGKILL)

    return kill


def _kernel_killed_since(began: Started | None) -> bool:
    """Return whether a task's machine has killed a process for memory since the task began.

    The kernel does not say which process; the task that died is the likeliest. False if the
    machine does not answer.
    """
    if began is None:
        return False
    count = _run_near(began, kernel_kill_counter())
    return count is not None and count > began.kernel_kills


def _run_near(began: Started, call: Callable[[], Any]) -> Any:
    """Return what a function returns on a task's machine; None if the machine does not answer."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if began.node_id == current_node_id():
        return call()
    remote = ray.remote(num_cpus=0, max_retries=0)(call).options(
        scheduling_strategy=NodeAffinitySchedulingStrategy(began.node_id, soft=False)
    )
    answers: list[Any] = []

    def ask() -> None:
        with suppress(ray.exceptions.RayError):
            answers.append(ray.get(remote.remote(), timeout=ANSWER_SECONDS))

    # In a thread, because without the cluster's head `remote` may never return.
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(ANSWER_SECONDS)
    return answers[0] if answers else None
