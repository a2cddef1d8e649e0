"""The worker's side: run a task's callable; stream its reports and its result to the driver.

The callable runs in a thread beside the generator that Ray reads, so it cannot install signal
handlers, which only a process's main thread may.
"""

import os
import platform
import queue
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from q3q.errors import Q3QError
from q3q.sweep.ray.messages import (
    ADDRESS,
    EVENT,
    HANDED_BACK,
    PULSE,
    VALUE,
    caused_by,
    pack,
    pack_error,
    unpack,
)
from q3q.sweep.ray.nodes import current_node_id, kernel_kill_counter
from q3q.sweep.ray.tasks import GpuFailedError, HandedBackError, Resources, Started
from q3q.sweep.ray.waiting import wait_as_cores_allow
from q3q.team import LOOPBACK, Rendezvous, own_pulse

# A task that is so many reports ahead of the driver waits, so that nobody's memory fills with them.
REPORTS_AHEAD = 64
# Between two heartbeats of a gang's rank.
PULSE_SECONDS = 1.0
# A process that was asked to end stays so long, so that its last message is heard.
PARTING_SECONDS = 1.0
# Torch's allocator can then grow a piece of a GPU's memory: blocks of very different sizes, as a
# walk asks for, leave no gaps that nothing fits in. The second name is the older one.
ALLOCATOR = "expandable_segments:True"
ALLOCATOR_SETTINGS = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def task_entry(shape: Resources) -> Any:
    """Return the Ray function for tasks of this shape."""
    import ray

    # Ray pickles a nested function whole: this one makes q3q importable before anything of it is
    # needed.
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
        # Imported here: a name of the module's would be looked for before the lines above.
        from q3q.sweep.ray.worker import run_task

        yield from run_task(*work)

    options: dict[str, Any] = {
        "num_cpus": shape.cpus,
        "num_gpus": shape.gpus,
        "memory": shape.memory,
        "resources": shape.kind_request,
        "num_returns": "streaming",
        "max_retries": 0,  # the driver retries, and says so
        "_generator_backpressure_num_objects": REPORTS_AHEAD,
    }
    return ray.remote(**options)(task)


def run_task(
    call: bytes,
    key: str,
    attempt: int,
    cpus: float,
    gpus: float,
    place: tuple[int, int, tuple[str, int] | None] | None = None,
) -> Iterator[bytes]:
    """Run one pickled call in a thread; yield what it reports, then how it ended.

    SIGTERM (a spot machine's notice, a scheduler's) lets the call go on to where it next reports
    something, which a trial does when a block or a measurement is on disk. There it ends and is
    handed back, and its process ends too. A notice that is too short for that ends as any death
    does.

    A process whose GPU failed stays after its last message and keeps the GPU, so that Ray gives it
    to nobody, until the driver kills it (see `gpus_aside`). A gang's ranks end.

    Args:
        place: of a gang's rank: which one, of how many, and where rank 0 listens; None for rank 0,
            whose stream says where.
    """
    outbox: queue.Queue[bytes | None] = queue.Queue(maxsize=REPORTS_AHEAD)
    asked_to_end, gpu_failed = threading.Event(), threading.Event()
    with _sigterm_sets(asked_to_end):
        started = Started(
            key=key,
            pid=os.getpid(),
            node=platform.node(),
            attempt=attempt,
            node_id=current_node_id(),
            gpu_ids=_gpu_ids() if gpus else (),
            kernel_kills=kernel_kill_counter()(),
        )
        yield pack(EVENT, started)
        work: tuple[Any, ...] = (call, cpus, gpus, outbox, asked_to_end, gpu_failed)
        if place is not None:
            rendezvous = _rendezvous(*place)
            work += (rendezvous,)
            if rendezvous.rank == 0:
                yield pack(ADDRESS, (rendezvous.host, rendezvous.port))
        over = threading.Event()
        if place is not None:
            threading.Thread(target=_send_pulses, args=(outbox, over), daemon=True).start()
        threading.Thread(target=_run_call, args=work, name=key, daemon=True).start()
        try:
            while (message := outbox.get()) is not None:
                yield message
        finally:
            over.set()
        if gpu_failed.is_set() and gpus and place is None:
            asked_to_end.wait()
        if asked_to_end.is_set():
            time.sleep(PARTING_SECONDS)
            sys.exit(128 + signal.SIGTERM)


def _gpu_ids() -> tuple[str, ...]:
    import ray

    return tuple(map(str, ray.get_gpu_ids()))


def _send_pulses(outbox: "queue.Queue[bytes | None]", over: threading.Event) -> None:
    """Send this rank's heartbeats. One that finds no room is left out: reports are heartbeats."""
    while not over.wait(PULSE_SECONDS):
        with suppress(queue.Full):
            outbox.put_nowait(pack(PULSE, (own_pulse().exchanges, own_pulse().waits)))


@contextmanager
def _sigterm_sets(event: threading.Event) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    # Ray's processes have it blocked; a stopped orphan must be woken and ended by it.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})
    before = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _rendezvous(rank: int, size: int, address: tuple[str, int] | None) -> Rendezvous:
    """Return a rank's place in its gang; rank 0 listens from here on.

    It listens on loopback if all ranks are on its machine.
    """
    import ray

    table = ray.util.placement_group_table(ray.util.get_current_placement_group())
    on_one_machine = len(set(table["bundles_to_node_id"].values())) == 1
    own_host = LOOPBACK if on_one_machine else ray.util.get_node_ip_address()
    listener = socket.create_server((own_host, 0)) if address is None else None
    host, port = address or (own_host, 0)
    if listener is not None:
        port = listener.getsockname()[1]
    return Rendezvous(
        rank=rank, size=size, host=host, port=port, own_host=own_host, listener=listener
    )


def _run_call(
    call: bytes,
    cpus: float,
    gpus: float,
    outbox: "queue.Queue[bytes | None]",
    asked_to_end: threading.Event,
    gpu_failed: threading.Event,
    *rendezvous: Rendezvous,
) -> None:
    def report(event: Any) -> None:
        if asked_to_end.is_set():
            raise HandedBackError
        outbox.put(pack(EVENT, event))

    try:
        keep_to(cpus, gpus)
        value = unpack(call)(report, *rendezvous)
    except HandedBackError:
        end = pack(HANDED_BACK, os.getpid())
    except BaseException as error:  # sys.exit too: this thread must always say how it ended
        if isinstance(error, GpuFailedError):
            gpu_failed.set()
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
    """Compute with as many threads as CPUs were reserved; see no GPU if none was.

    Threads wait as `waiting` says, and a GPU's memory is allocated as `ALLOCATOR` says, unless the
    environment says otherwise. Call it before torch is imported.
    """
    threads = max(1, int(cpus))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)  # for libraries that are loaded from now on
    # An earlier task imported torch; OpenMP counts threads for each calling thread anew.
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(threads)
    wait_as_cores_allow(threads)
    if gpus and not any(os.environ.get(name) for name in ALLOCATOR_SETTINGS):
        os.environ[ALLOCATOR_SETTINGS[0]] = ALLOCATOR
    if gpus == 0:
        # No GPU task inherits this: Ray gives those processes of their own.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
