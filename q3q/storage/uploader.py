"""Upload a mirror's changes in the background while work runs."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from q3q.storage.claim import ClaimLostError
from q3q.storage.mirror import Mirror

# Between two rounds of a worker's uploader and of a driver's.
EVERY_SECONDS, DRIVER_SECONDS = 5.0, 10.0


class Uploader:
    """A thread that pushes changes below some prefixes until it is stopped.

    check_claim: see `Mirror.push`. The next round sends what a failed one left.
    """

    def __init__(
        self, mirror: Mirror, *prefixes: str, every: float, check_claim: Callable[[], object]
    ) -> None:
        self.mirror, self.every, self.check_claim = mirror, every, check_claim
        self._prefixes = dict.fromkeys(prefixes)
        self._closing = threading.Event()
        self._thread = threading.Thread(
            target=self._push_until_stopped, name="q3q-uploader", daemon=True
        )
        self._thread.start()

    def add(self, *prefixes: str) -> None:
        # A new dictionary: the thread may be iterating over the old one.
        self._prefixes = {**self._prefixes, **dict.fromkeys(prefixes)}

    def push(self) -> None:
        self.mirror.push(*self._prefixes, check_claim=self.check_claim)

    def stop(self) -> None:
        self._closing.set()
        self._thread.join()

    def _push_until_stopped(self) -> None:
        while not self._closing.wait(self.every):
            with suppress(OSError, ClaimLostError):
                self.push()


@contextmanager
def uploading(
    mirror: Mirror,
    *prefixes: str,
    every: float | None = None,
    check_claim: Callable[[], object] = lambda: None,
) -> Iterator[Uploader]:
    """Upload while some work goes on; at its end, however it ends, send the rest.

    Args:
        every: seconds between two rounds, EVERY_SECONDS if None.

    Raises:
        StoreError: the rest could not be sent.
        Exception: what `check_claim` raises.
    """
    uploader = Uploader(
        mirror, *prefixes, every=EVERY_SECONDS if every is None else every, check_claim=check_claim
    )
    try:
        yield uploader
    except BaseException:
        uploader.stop()
        with suppress(OSError, ClaimLostError):  # raise the first error, not this one
            uploader.push()
        raise
    uploader.stop()
    uploader.push()
