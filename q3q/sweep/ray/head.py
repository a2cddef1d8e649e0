"""Watch whether the cluster's head still answers."""

import os
import threading
import time
from contextlib import suppress

from q3q.sweep.ray.nodes import ray_machines
from q3q.sweep.ray.tasks import (
    HeadLostError,
)

# Without an answer of its head for so many seconds a cluster is given up: half of those after which Ray ends this
# process, with no word of ours. Nothing is asked of a head while an answer is overdue.
HEAD_SECONDS = float(os.environ.get("RAY_gcs_rpc_server_reconnect_timeout_s", "60")) / 2  # noqa: SIM112
OVERDUE_SECONDS = 3.0


class Head:
    """The cluster's head, which a thread asks every second what machines there are: gone, it never answers.

    machines: what it said last.
    """

    def __init__(self) -> None:
        import ray

        self.address = str(ray.get_runtime_context().gcs_address)
        self.machines = ray_machines()
        self._asked: float | None = None  # when it was, while the answer is awaited
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._ask, name="q3q-head", daemon=True)
        self._thread.start()

    def answers(self) -> bool:
        """Whether it does, as far as is known."""
        return self._awaited() < OVERDUE_SECONDS

    def check(self) -> None:
        """Raises HeadLostError after HEAD_SECONDS without an answer. One that is there again in time is not missed."""
        if (seconds := self._awaited()) > HEAD_SECONDS:
            raise HeadLostError(
                f"the head of the Ray cluster at {self.address} has not answered for {seconds:.0f} s; when there is a "
                "cluster again, the same command goes on"
            )

    def close(self) -> None:
        self._over.set()
        if self.answers():  # else it may be waited for as long as this process lives
            self._thread.join(OVERDUE_SECONDS)

    def _awaited(self) -> float:
        """Seconds that the last question has waited for its answer."""
        asked = self._asked
        return 0.0 if asked is None else time.monotonic() - asked

    def _ask(self) -> None:
        while not self._over.wait(1.0):
            self._asked = time.monotonic()
            with suppress(
                Exception
            ):  # by which it answers too: what Ray cannot do will be seen where it is needed
                self.machines = ray_machines()
            self._asked = None
