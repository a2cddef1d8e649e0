"""Watch Ray while it starts: say what is too long, what died, and what hangs.

While Ray's core joins its own processes, it neither raises an exception where one of them is dead
nor can be interrupted: it waits for a minute and ends this process, or waits for ever. So the
thread that waits for Ray looks after those processes itself, and where Ray's core is quicker, a
process that outlives this one says what the end means.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

from q3q.errors import ConfigError
from q3q.sweep.ray.tasks import StartError

LOOK_SECONDS = 0.2  # between two looks at Ray's processes
START_SECONDS = float(os.environ.get("Q3Q_RAY_START_SECONDS", "300"))  # a busy machine takes 30
KILLED_SECONDS = 10.0  # until the kernel has ended a process that was killed
SERVERS = ("gcs_server", "raylet")  # without which Ray cannot start
SOCKET_BYTES = 103 if sys.platform == "darwin" else 107  # longest path of a socket
AGAIN = "Run the same command to try again"


class Starting:
    """Ray's start, of which at most START_SECONDS may pass.

    address: of a cluster that is joined; None for one that is started here
    """

    def __init__(self, address: str | None) -> None:
        self.address = address
        self._since = time.monotonic()
        self._again = False

    @contextmanager
    def again(self) -> Iterator[None]:
        """Allow Ray's processes to be dead inside the block: they are about to start again."""
        self._again = True
        try:
            yield
        finally:
            self._again = False

    def check(self) -> None:
        """Check that Ray can still start.

        Raises:
            StartError: one of its processes is dead, or it takes too long.
        """
        servers = [] if self.address or self._again else _servers()
        for server, state in servers:
            if state == psutil.STATUS_ZOMBIE:
                raise StartError(
                    f"Ray's {server} died while Ray was starting. {AGAIN}. Ray's logs: {logs()}"
                )
        if (seconds := time.monotonic() - self._since) < START_SECONDS:
            return
        if self.address:
            raise StartError(
                f"the Ray cluster at {self.address} answers, but this process did not join it "
                f"within {seconds:.0f} s. {AGAIN}"
            )
        states = ", ".join(f"its {server} is {state}" for server, state in servers)
        raise StartError(
            f"Ray did not start within {seconds:.0f} s ({states or 'it has no process yet'}). "
            f"{AGAIN}; Q3Q_RAY_START_SECONDS=600 gives Ray more time. Ray's logs: {logs()}"
        )


def refuse_long_folder() -> None:
    """Refuse a folder for Ray's files whose name is too long for the sockets in it.

    Raises:
        ConfigError: it is.
    """
    socket = os.path.join(_session("2000-01-01_00-00-00_000000"), "sockets", "plasma_store")
    excess = len(os.fsencode(socket)) - SOCKET_BYTES
    if excess > 0:
        name = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
        raise ConfigError(
            f"{name}={os.environ.get(name)} is {excess} bytes too long for Ray, which puts its "
            f"sockets there (the path of a socket has at most {SOCKET_BYTES} bytes). Set "
            "RAY_TMPDIR to a folder with a shorter path, such as RAY_TMPDIR=/tmp; other files "
            "still go to TMPDIR"
        )


def logs() -> str:
    """Return where the logs of this process's Ray lie, as a pattern for a shell."""
    return os.path.join(_session("*"), "logs")


def _session(when: str) -> str:
    from ray._common.utils import get_default_ray_temp_dir

    folder = str(get_default_ray_temp_dir())
    return os.path.join(folder, f"session_{when}_{os.getpid()}")


def _servers() -> list[tuple[str, str]]:
    """Return the names and states of this process's children that are Ray's servers."""
    servers = []
    for child in psutil.Process().children():
        try:
            name, state = child.name(), child.status()
        except psutil.NoSuchProcess:
            continue
        if name in SERVERS:
            servers.append((name, str(state)))
    return servers


def kill_servers() -> None:
    """Kill the Ray that this process started, without asking Ray's core, which may wait for it.

    The kernel kills the servers with the thread that started them, but not the raylet's workers and
    agents, which look for their parent once a minute.
    """
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if child.name() in SERVERS:
                below = child.children(recursive=True)
                for process in (child, *below):
                    with suppress(psutil.NoSuchProcess):
                        process.kill()
                with suppress(psutil.Error):
                    child.wait(KILLED_SECONDS)  # no zombie is left


@contextmanager
def witness(words: str) -> Iterator[None]:
    """Print `words` on stderr if this process ends inside the block, however suddenly."""
    speak = 'read -r end || printf "%s\\n" "$0" >&2'
    process = subprocess.Popen(
        ["/bin/sh", "-c", speak, words],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # what ends this process's group does not end it
    )
    try:
        yield
    finally:
        process.communicate(b"well\n")


def obituary() -> str:
    """Return what the end of this process means while Ray's core joins its processes."""
    return (
        "q3q: this process ended while Ray was starting: it was killed, or Ray itself ended it. "
        f"Nothing is lost. {AGAIN}. Ray's logs: {logs()}"
    )


@contextmanager
def kept_handler(number: signal.Signals) -> Iterator[None]:
    """Keep a signal's handler, which Ray's core replaces by a stack trace and sudden death.

    It is kept in C, since Python sets handlers in its main thread alone, and put back every few
    milliseconds, since Ray's core goes on for long after it has replaced it.
    """
    libc, kept = ctypes.CDLL(None), ctypes.create_string_buffer(512)  # more than any sigaction
    libc.sigaction(int(number), None, kept)
    over = threading.Event()

    def put_back() -> None:
        while not over.wait(0.005):
            libc.sigaction(int(number), kept, None)

    keeping = threading.Thread(target=put_back, daemon=True)
    keeping.start()
    try:
        yield
    finally:
        over.set()
        keeping.join()
        libc.sigaction(int(number), kept, None)
