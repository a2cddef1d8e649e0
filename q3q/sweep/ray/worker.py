"""The worker's side: run a task's callable, stream its reports and its result to the driver."""

import os
import platform
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from q3q.errors import Q3QError
from q3q.sweep.ray.messages import BACK, EVENT, MEET, VALUE, caused_by, pack, pack_error, unpack
from q3q.sweep.ray.nodes import count_kernel_kills, node_id_here
from q3q.sweep.ray.tasks import HandedBackError, Resources, Started
from q3q.team import LOOPBACK, Seat

REPORTS_AHEAD = 64  # a task that is so many reports ahead of the driver waits, so nobody's memory fills with them
PARTING_SECONDS = (
    1.0  # that a process which was asked to end stays, so that its last words are heard
)


def task_entry(shape: Resources) -> Any:
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
        where, kills = {"node": platform.node(), "node_id": node_id_here()}, count_kernel_kills()()
        yield pack(
            EVENT, Started(key=key, pid=os.getpid(), attempt=attempt, kernel_kills=kills, **where)
        )
        work: tuple[Any, ...] = (call, cpus, gpus, outbox, asked)
        if place is not None:
            seat = _seat(*place)
            work += (seat,)
            if seat.rank == 0:
                yield pack(MEET, (seat.host, seat.port))
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
        outbox.put(pack(EVENT, event))

    try:
        keep_to(cpus, gpus)
        value = unpack(call)(report, *seats)
    except HandedBackError:
        end = pack(BACK, os.getpid())
    except BaseException as error:  # sys.exit too: this thread must always say how it ended
        end = pack_error(error)
    else:
        try:
            end = pack(VALUE, value)
        except Exception as error:
            problem = Q3QError(
                f"the result, of type {type(value).__name__}, cannot be sent: {error}"
            )
            end = pack_error(caused_by(problem, error))
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
