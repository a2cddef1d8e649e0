"""Does what need not be waited for, such as telling a tracker, in a thread of its own: one thing after the other."""

import threading
from collections.abc import Callable, Hashable
from typing import Any

SAY_SECONDS = 10.0  # between two words to whoever waits for it


class BackgroundQueue:
    """A thread that does what it is given, in order. Of calls with one key that still wait, only the last is done.

    So what waits is bounded by the number of keys, however slow the other side is. An error ends nothing here: it is
    raised to whoever next asks for `settle`.
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
                self._thread = threading.Thread(target=self._work, name="q3q-teller", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def settle(self, say: Callable[[int], object] = lambda left: None) -> None:
        """Wait until all is done. say: told every now and then how much is left.

        Raises:
            what a call raised.
        """
        with self._changed:
            while self._waiting or self._busy:
                if not self._changed.wait(SAY_SECONDS) and self._waiting:
                    say(len(self._waiting))
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
