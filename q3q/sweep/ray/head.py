"""Watch whether the cluster's head still answers."""

import os
import threading
import time
from contextlib import suppress

from q3q.sweep.ray.nodes import ray_machines
from q3q.sweep.ray.tasks import HeadLostError

# A cluster whose head has not answered for so long is given up. Ray itself would end this process,
# without a word of ours, after twice as long.
HEAD_SECONDS = float(os.environ.get("RAY_gcs_rpc_server_reconnect_timeout_s", "60")) / 2  # noqa: SIM112
OVERDUE_SECONDS = 3.0  # while an answer is this late, Ray is asked nothing


class Head:
    """The cluster's head, which a thread asks every second what machines there are.

    A head that is gone never answers, so only a thread can wait for it.

    machines: its last answer
    """

    def __init__(self) -> None:
        import ray

        self.address = str(ray.get_runtime_context().gcs_address)
        self.machines = ray_machines()
        self._asked: float | None = None  # monotonic seconds, while an answer is awaited
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._ask, name="q3q-head", daemon=True)
        self._thread.start()

    def answers(self) -> bool:
        """Return False while an answer is overdue."""
        return self._waited() < OVERDUE_SECONDS

    def check(self) -> None:
        """Check that the head has answered within HEAD_SECONDS; shorter silences are forgiven.

        Raises:
            HeadLostError: it has not.
        """
        if (seconds := self._waited()) > HEAD_SECONDS:
            raise HeadLostError(
                f"the head of the Ray cluster at {self.address} has not answered for "
                f"{seconds:.0f} s; when there is a cluster again, the same command continues"
            )

    def close(self) -> None:
        self._closed.set()
        if self.answers():  # otherwise the thread may wait as long as this process lives
            self._thread.join(OVERDUE_SECONDS)

    def _waited(self) -> float:
        """Return the seconds for which the last question has waited for its answer."""
        asked = self._asked
        return 0.0 if asked is None else time.monotonic() - asked

    def _ask(self) -> None:
        while not self._closed.wait(1.0):
            self._asked = time.monotonic()
            # An exception is an answer too; what Ray cannot do shows where it is needed.
            with suppress(Exception):
                self.machines = ray_machines()
            self._asked = None
