"""How long OpenMP's threads wait for each other before they sleep.

A thread that has done its part of an operation looks for its partners some 300,000 times, which
takes milliseconds, before it sleeps; so on a quiet machine none sleeps between two operations. But
if another process has a partner's core, the one that looks keeps the partner from its own, and a
trial takes up to ten times as long (benchmarks/busy.py).

libgomp looks only 100 times while a process has more OpenMP threads than there are cores. So a
`_Watch` measures how long this process's threads wait for cores, and while they do, it has idle
threads beside them. As many threads as before compute, so no bit of a result depends on it.
libgomp ends the process if it cannot start a thread, so this is done only where few are needed and
nothing limits their number (`may_start`); elsewhere threads always look 1,000 times.
"""

import ctypes
import os
import resource
import threading
import time
from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc")
SETTINGS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")  # by which a user decides it
SPINS = "1000"  # where threads' waits are not told, or idle threads are not safe
MOST_IDLE = 32
AMPLE = 10_000  # processes and threads that a user or container may have left
EVERY_SECONDS = 0.25
# Parts of the time, summed over threads. With two threads and a neighbor on two cores it is 0.6; on
# a quiet machine, 0.01.
BUSY, QUIET = 0.2, 0.05
CALM_ROUNDS = 8  # after which a machine is quiet again


def wait_as_cores_allow(threads: int) -> None:
    """Have OpenMP's threads wait long for each other, but not while others take their cores.

    The environment may say otherwise. Call it before torch is imported.

    Args:
        threads: that compute.
    """
    global _watch
    if any(os.environ.get(name) for name in SETTINGS) or threads < 2:
        return
    # A kernel that does not count says 0.
    if not any(core_waits().values()) or not may_start(idle_beside(threads)):
        os.environ[SETTINGS[0]] = SPINS
    elif _watch is None or not _watch.is_alive():  # not after a fork
        _watch = _Watch(threads)
        _watch.start()
    else:
        _watch.threads = threads


def idle_beside(threads: int) -> int:
    """Return how many idle threads make more threads than cores."""
    return max(1, len(os.sched_getaffinity(0)) - threads + 1)


def may_start(count: int, proc: Path = PROC, groups: Path = Path("/sys/fs/cgroup")) -> bool:
    """Return whether so many threads can be started without fear of a limit."""
    memory, _ = resource.getrlimit(resource.RLIMIT_AS)
    processes, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if count > MOST_IDLE or memory != resource.RLIM_INFINITY:
        return False
    if processes != resource.RLIM_INFINITY and processes < AMPLE:
        return False
    return all(left >= AMPLE for left in _left_in_groups(proc, groups))


def _left_in_groups(proc: Path, groups: Path) -> Iterator[int]:
    """Yield how many threads each control group above this process may still start."""
    try:
        lines = (proc / "self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for _, controllers, path in (line.split(":", 2) for line in lines):
        if controllers and "pids" not in controllers.split(","):
            continue
        root = groups / controllers
        folder = root / path.lstrip("/")
        for group in (folder, *folder.parents):
            if not group.is_relative_to(root):
                break
            try:
                most = (group / "pids.max").read_text(encoding="ascii").strip()
                if most != "max":
                    yield int(most) - int((group / "pids.current").read_text(encoding="ascii"))
            except (OSError, ValueError):  # no limit here
                continue


def core_waits(proc: Path = PROC) -> dict[str, int]:
    """Return how long each thread of this process has waited for a core, in nanoseconds.

    Empty if the system does not tell.
    """
    waits = {}
    for path in (proc / "self/task").glob("*/schedstat"):
        try:
            waits[path.parent.name] = int(path.read_text(encoding="ascii").split()[1])
        except (OSError, ValueError, IndexError):  # the thread ended
            continue
    return waits


class Gauge:
    """Decides whether a machine is busy.

    busy: as it was decided last
    """

    def __init__(self) -> None:
        self.busy = False
        self._calm = 0

    def note(self, part: float) -> bool:
        """Return whether the machine is busy now.

        Args:
            part: of the time since the last call in which threads waited for cores.
        """
        self._calm = self._calm + 1 if part < QUIET else 0
        if part > BUSY:
            self.busy = True
        elif self._calm >= CALM_ROUNDS:
            self.busy = False
        return self.busy


class IdleThreads:
    """OpenMP threads that sleep until `end`.

    Args:
        library: libgomp's file, which this process has loaded.
    """

    def __init__(self, library: str, count: int) -> None:
        self._library, self._count = ctypes.CDLL(library), count
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._hold, name="q3q-idle", daemon=True)
        self._thread.start()

    def end(self) -> None:
        self._ending.set()
        self._thread.join()

    def _hold(self) -> None:
        # A parallel region gives this thread a pool, which lives as long as it does. All of its
        # threads call free(NULL), which does nothing.
        nothing = ctypes.cast(ctypes.CDLL(None).free, ctypes.c_void_p)
        self._library.GOMP_parallel(nothing, None, self._count + 1, 0)
        self._ending.wait()


def loaded_libraries() -> list[str]:
    """Return the files of libgomp that this process has loaded."""
    lines = (PROC / "self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    return sorted({line.split(maxsplit=5)[5] for line in lines if "/libgomp" in line})


class _Watch(threading.Thread):
    """threads: that compute."""

    def __init__(self, threads: int) -> None:
        super().__init__(name="q3q-waiting", daemon=True)
        self.threads = threads

    def run(self) -> None:
        gauge, idle = Gauge(), list[IdleThreads]()
        before, since = core_waits(), time.monotonic()
        while True:
            time.sleep(EVERY_SECONDS)
            waits, now = core_waits(), time.monotonic()
            waited = sum(waits[name] - before[name] for name in waits.keys() & before.keys())
            busy = gauge.note(waited / 1e9 / (now - since))
            before, since = waits, now
            if busy and not idle:
                more = idle_beside(self.threads)
                idle = [IdleThreads(library, more) for library in loaded_libraries()]
            elif idle and not busy:
                for threads in idle:
                    threads.end()
                idle = []


_watch: _Watch | None = None
