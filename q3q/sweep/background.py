"""A background thread for work that no trial waits for, such as updating a tracker."""

import threading
from collections.abc import Callable, Hashable
from typing import Any

REMINDER_SECONDS = 10.0  # between two reports of what is left while somebody waits


class BackgroundQueue:
    """A thread that makes calls in order; of waiting calls with one key, only the last is made.

    So the number of keys bounds what waits, however slow the other side is. An error does not end
    the thread: the next `settle` raises it.
    """

    def __init__(self) -> None:
        self._waiting: dict[Hashable, tuple[Callable[..., object], tuple[Any, ...]]] = {}
        self._changed = threading.Condition()
        self._busy = False
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None

    def do(self, key: Hashable, call: Callable[..., object], *arguments: Any) -> None:
        with self._changed:
            self._waiting[key] = call, arguments
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._work, name="q3q-background", daemon=True
                )
                self._thread.start()
            self._changed.notify_all()

    def settle(self, report: Callable[[int], object] = lambda left: None) -> None:
        """Wait until all calls are made; `report` receives every now and then how many are left.

        Raises:
            BaseException: the last one that a call raised.
        """
        with self._changed:
            while self._waiting or self._busy:
                if not self._changed.wait(REMINDER_SECONDS) and self._waiting:
                    report(len(self._waiting))
            error, self._error = self._error, None
        if error is not None:
            raise error

    def _work(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                while not self._waiting:
                    self._changed.wait()
                key = next(iter(self._waiting))
                call, arguments = self._waiting.pop(key)
                self._busy = True
            try:
                call(*arguments)
            except BaseException as error:
                self._error = error
