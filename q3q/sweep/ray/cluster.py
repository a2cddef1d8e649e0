"""Ray on this machine, or at an address: start it or join it, run tasks on it, stop it."""

import logging
import os
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

from q3q import ending
from q3q.environment import COMMAND_ID, environment_variables
from q3q.errors import ConfigError
from q3q.limits import cores, memory_for_trials
from q3q.masking import masked
from q3q.sweep.ray.nodes import node_ids, ray_machines, resources_of
from q3q.sweep.ray.scheduler import TaskRun
from q3q.sweep.ray.starting import (
    LOOK_SECONDS,
    Starting,
    kept_handler,
    kill_servers,
    obituary,
    refuse_long_folder,
    witness,
)
from q3q.sweep.ray.tasks import (
    HeadLostError,
    Outcome,
    Resources,
    StartError,
    Task,
    WorkerDiedError,
)

OBJECT_STORE_BYTES = 200_000_000  # only specs, records and events cross
LEAST_OBJECT_STORE_BYTES = 75 * 2**20  # Ray's own bound
# Ray gives its own processes half a minute, which on a busy machine is not always enough.
STARTS, TOO_SLOW = 4, "timed out during startup"
STOP_SECONDS = 20.0  # for a farewell; it takes one or two, or for ever
ANSWER_SECONDS = 12  # how long the cluster at an address may take to answer
AUTH_MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
_TRY_ADDRESS = """
import sys, ray
from ray._private.services import canonicalize_bootstrap_address_or_die
ray._raylet.GcsClient(address=canonicalize_bootstrap_address_or_die(sys.argv[1]))
"""


class Cluster:
    """Ray on this machine, or the Ray cluster at `address`; a context manager.

    Starting takes seconds, so it goes on in the background until the first `total` or `run` needs
    it. A thread of this class starts Ray, keeps it and stops it: Ray's processes die with the
    *thread* that started them (the kernel's parent-death signal is a thread's), which is also why
    workers die with a killed driver.

    Args:
        address: `host:port` or `auto` of a running cluster that this machine is a node of; None
            starts one here.
        cpus, gpus: what the local cluster may hand out; with None, all cores that this process may
            use, and the GPUs that Ray counts.
        env: environment variables that each worker gets before it imports anything for a task.
    """

    def __init__(
        self,
        address: str | None = None,
        cpus: int | None = None,
        gpus: int | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        if address is not None and (cpus, gpus) != (None, None):
            raise ConfigError(
                f"cpus and gpus are for a local cluster: the one at {address} has what it has"
            )
        if address is not None and "://" in address:
            raise ConfigError(
                f"cluster address {address}: run on a node of the cluster and give host:port, or "
                "auto"
            )
        self.address, self.cpus, self.gpus = address, cpus, gpus
        self.env = {COMMAND_ID: secrets.token_hex(16), **(env or {})}
        # Bytes that a local cluster may hand out; None: all free memory that this process may use.
        self.memory: int | None = None
        # Seconds to wait for a machine large enough for a task, where a cluster grows on demand;
        # with 0, a task that fits on none of the present machines is refused at once.
        self.patience = 0.0
        self._up, self._stopped = threading.Event(), threading.Event()
        self._starting = Starting(address)
        self._failure: BaseException | None = None
        self._keeper: threading.Thread | None = None
        self._stop_listening: Callable[[], None] | None = None
        # Its head is gone: nobody answers a farewell, and the workers end by themselves.
        self._headless = False

    def start(self) -> "Cluster":
        """Start in the background, once. `total` and `run` raise what goes wrong."""
        if self._keeper is None:
            self._starting = Starting(self.address)
            self._keeper = threading.Thread(target=self._keep, name="ray-keeper", daemon=True)
            self._keeper.start()
        return self

    def stop(self) -> None:
        """Stop a local cluster with all its processes; of one at an address, only our own.

        Where the head is gone, Ray's core is left as it is, and `end_at_once` is called: the core
        would wait for a minute, and end this process as if it had failed.
        """
        self._stopped.set()
        if self._keeper is not None and not isinstance(self._failure, StartError):
            self._keeper.join(STOP_SECONDS)
            self._headless |= self._keeper.is_alive()
        if self._headless and ending.end_at_once() and self.address is None:
            kill_servers()
        if self._stop_listening is not None:
            self._stop_listening()
            self._stop_listening = None

    def __enter__(self) -> "Cluster":
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        asked_to_end = isinstance(error, (SystemExit, KeyboardInterrupt))
        # Once Ray is gone, its core ends this process with a code of its own, so Ray stays until
        # the report is written. Whoever told this process to end may have told Ray's as well, so
        # nobody waits for their answer.
        if not (asked_to_end and self.address is None and ending.end_at_once(kill_servers)):
            self.stop()

    def total(self) -> Resources:
        """Return all that the cluster has, taken or free."""
        self._wait_until_up()
        import ray

        return resources_of(ray.cluster_resources())

    def machines(self) -> list[Resources]:
        """Return what each of its machines has, taken or free."""
        self._wait_until_up()
        return ray_machines()

    def node_ids(self, *, gpus: bool = False) -> list[str]:
        """Return Ray's ids of its machines where tasks may run; `gpus`: those that need GPUs."""
        self._wait_until_up()
        return node_ids(gpus=gpus)

    def run(
        self,
        tasks: Sequence[Task],
        on_event: Callable[[str, Any], None],
        on_retry: Callable[[str, WorkerDiedError], None] | None = None,
        on_tick: Callable[[], None] | None = None,
    ) -> Generator[Outcome, None, None]:
        """Run tasks, in their order as far as resources allow; yield each Outcome as it comes.

        Closing the iterator, or an exception in the driver (Ctrl-C too), kills the workers of
        unfinished tasks.

        Args:
            tasks: with distinct keys. Only as many as can help wait in Ray's queue at a time.
            on_event: called in the driver with a task's key and each of its events, as they come
                and in their order, Started first.
            on_retry: called when a task is about to run again because it died.
            on_tick: called about once a second at least; what it raises ends the run.

        Raises:
            HeadLostError: the cluster's head is gone.
        """
        if len({task.key for task in tasks}) < len(tasks):
            raise ValueError("tasks must have distinct keys")
        run = TaskRun(self.total(), self.env, self.patience, tasks, on_event, on_retry)
        try:
            yield from run.outcomes(on_tick or (lambda: None))
        except HeadLostError:
            self._headless = True
            raise
        finally:
            self._headless |= not run.head.answers() or not _ends(run.cancel, STOP_SECONDS)
            run.head.close()

    def _keep(self) -> None:
        """Start Ray, wait until `stop` is called, and stop it: the keeper thread's work."""
        # Ray's processes inherit this, as they do for Ctrl-C: when the terminal is closed, this
        # process ends them.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})
        try:
            self._start_here() if self.address is None else self._connect(self.address)
        except BaseException as error:
            self._failure = error
        finally:
            self._up.set()
        self._stopped.wait()
        if self._failure is None and not self._headless:
            import ray

            ray.shutdown()

    def _give_up(self, error: StartError) -> None:
        """Leave Ray alone, whose core may never return; it ends with this process."""
        self._failure = error
        self._up.set()

    def _start_here(self) -> None:
        if _token_wanted() and not os.environ.get(TOKEN_PATH):
            os.environ.setdefault(TOKEN, _own_token())
        memory = memory_for_trials() if self.memory is None else self.memory
        store = OBJECT_STORE_BYTES
        if memory is not None:
            store = min(store, max(LEAST_OBJECT_STORE_BYTES, memory // 10))
        # On any platform this variable decides whether Ray listens on loopback alone. Ray reads it
        # when it is first imported.
        with environment_variables({"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}):
            refuse_long_folder()
            with witness(obituary()):
                self._init(
                    address="local",  # even if a cluster already runs here or RAY_ADDRESS names one
                    num_cpus=cores() if self.cpus is None else self.cpus,
                    num_gpus=self.gpus,
                    include_dashboard=False,
                    object_store_memory=store,
                    _memory=memory,
                )

    def _connect(self, address: str) -> None:
        if _token_wanted() and not _token_known():
            raise ConfigError(
                f"the Ray cluster at {address} is joined with a token, and none is here: put the "
                "head's (ray get-auth-token) into ~/.ray/auth_token, or set "
                f"{AUTH_MODE}=disabled for a cluster without one"
            )
        # ray.init takes minutes to give up on an address and cannot be interrupted, so another
        # process tries the address first.
        try:
            answer = subprocess.run(
                [sys.executable, "-c", _TRY_ADDRESS, address],
                capture_output=True,
                text=True,
                timeout=ANSWER_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise ConfigError(
                f"no Ray cluster answers at {address}. Give the host:port that `ray start --head` "
                "printed"
            ) from None
        if answer.returncode != 0:
            if "InvalidAuthToken" in answer.stderr:
                raise ConfigError(
                    f"the Ray cluster at {address} does not take the token that is here, or wants "
                    "one and got none: give the head's (ray get-auth-token there) as "
                    f"~/.ray/auth_token, with {AUTH_MODE}=token"
                )
            reason = (answer.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise ConfigError(f"cannot use the Ray cluster at {address}: {masked(reason)}")
        self._init(address=address)

    def _init(self, **options: Any) -> None:
        import ray

        if ray.is_initialized():
            raise ConfigError(
                "Ray already runs in this process: pass its Cluster on instead of starting a "
                "second one"
            )
        for left in reversed(range(STARTS)):
            try:
                with kept_handler(signal.SIGTERM):
                    ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
                break
            except Exception as error:
                if self.address is None and left and TOO_SLOW in str(error):
                    with self._starting.again():
                        kill_servers()
                    continue
                to_do = f"join the Ray cluster at {self.address}"
                to_do = to_do if self.address else "start Ray on this machine"
                raise ConfigError(f"cannot {to_do}: {error}") from error
        # Even so, Ray prints a paragraph on the driver's stdout for each dead worker. Our Outcome
        # says it in a line.
        ray._private.worker._worker_logs_enabled = False
        # Nor need Ray report that a rank, killed with its gang, never said how it ended.
        os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")

    def _wait_until_up(self) -> None:
        if self._keeper is None:
            raise RuntimeError("start the cluster first: `with Cluster() as cluster`")
        while not self._up.wait(LOOK_SECONDS):
            ending.raise_again()
            try:
                self._starting.check()
            except StartError as error:
                self._give_up(error)
        if self._failure is not None:
            raise self._failure
        if self._stopped.is_set():
            raise RuntimeError("this cluster is stopped")
        main_thread = threading.current_thread() is threading.main_thread()
        if main_thread and self._stop_listening is None:
            # For a program that did not: Ray's core would answer SIGTERM with a stack trace.
            self._stop_listening = ending.listen()


def _ends(farewell: Callable[[], None], seconds: float) -> bool:
    """Say farewell to Ray; return False if nobody has answered within so many seconds."""

    def say() -> None:
        with suppress(Exception):  # an answer too
            farewell()

    thread = threading.Thread(target=say, name="ray-farewell", daemon=True)
    thread.start()
    thread.join(seconds)
    return not thread.is_alive()


def _token_wanted() -> bool:
    """Return whether Ray checks tokens: always, unless the environment says otherwise."""
    return os.environ.setdefault(AUTH_MODE, "token").lower() == "token"


@cache
def _own_token() -> str:
    """Make this process's own token, which is on no disk.

    There is one for its lifetime, because Ray's core keeps the first that it sees.
    """
    return secrets.token_hex(32)


def _token_known() -> bool:
    """Return whether there is a token where Ray looks for one."""
    return (
        any(os.environ.get(name) for name in (TOKEN, TOKEN_PATH))
        or Path("~/.ray/auth_token").expanduser().is_file()
    )
