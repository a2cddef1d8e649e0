"""Ray on this machine or at an address: start it, join it, stop it."""

import logging
import os
import secrets
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

from q3q.errors import ConfigError
from q3q.masking import masked
from q3q.sweep.ray.nodes import ray_machines, resources_of
from q3q.sweep.ray.scheduler import TaskRun
from q3q.sweep.ray.tasks import HeadLostError, Outcome, Resources, Task, WorkerDiedError

OBJECT_STORE_BYTES = 200_000_000  # only specs, records and events cross
ANSWER_SECONDS = 12  # how long the cluster at an address may take to answer
AUTH_MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
_KNOCK = """
import sys, ray
from ray._private.services import canonicalize_bootstrap_address_or_die
ray._raylet.GcsClient(address=canonicalize_bootstrap_address_or_die(sys.argv[1]))
"""


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

        return resources_of(ray.cluster_resources())

    def machines(self) -> list[Resources]:
        """What each of its machines has, taken or free."""
        self._wait_until_up()
        return ray_machines()

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
        run = TaskRun(self.total(), self.env, self.patience, tasks, on_event, on_retry)
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
