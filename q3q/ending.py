"""How a command ends on a signal, or when the terminal that it writes to is gone.

A scheduler and a spot machine send SIGTERM; a terminal that is closed, or an ssh that breaks, sends
SIGHUP. Both raise SystemExit, as Ctrl-C raises KeyboardInterrupt, so that what is open is closed
and what is finished is reported. Under nohup SIGHUP is ignored, and stays so.
"""

import errno
import io
import os
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

ENDINGS = (signal.SIGTERM, signal.SIGHUP)
GONE = (errno.EIO, errno.EPIPE)  # of a terminal, and of a pipe that nobody reads any more
_told = 0  # the signal that raised SystemExit, until somebody has heard of it
_decides = False  # `own_exit_code` will end this process
_at_once = False  # and will do so without cleaning up
_last_acts: list[Callable[[], None]] = []  # but for these


def end_well() -> None:
    """Let this process, which runs one command, end well. Call it before any work."""
    listen()
    sys.unraisablehook = _show_unraisable
    for name in ("stdout", "stderr"):
        setattr(sys, name, _lasting(getattr(sys, name)))


@contextmanager
def own_exit_code() -> Iterator[None]:
    """End this process with the exit code of the block, where `end_at_once` was called in it."""
    global _decides
    _decides = True
    code: object = 0
    try:
        yield
    except SystemExit as end:
        code = end.code
        if not _at_once:
            raise
    finally:
        _decides = False
    if _at_once:
        if isinstance(code, str):  # as Python does
            print(code, file=sys.stderr)
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        for act in _last_acts:
            act()
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def end_at_once(last_act: Callable[[], None] | None = None) -> bool:
    """Let `own_exit_code` end this process without Python's own cleaning up.

    For a library whose core may wait for what is gone: it would end the process by itself, without
    a word and with a code that says nothing.

    Args:
        last_act: what this process still does, right before it ends.

    Returns:
        whether there is such a block, which ends this process.
    """
    global _at_once
    _at_once = _decides
    if _at_once and last_act is not None:
        _last_acts.append(last_act)
    return _decides


def listen() -> Callable[[], None]:
    """Raise SystemExit(128 + number) at a signal of ENDINGS, unless it is ignored or handled.

    Returns:
        what undoes it.
    """
    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    ours = [number for number in ENDINGS if signal.getsignal(number) == signal.SIG_DFL]
    for number in ours:
        signal.signal(number, _exit)

    def undo() -> None:
        for number in ours:
            if signal.getsignal(number) is _exit:
                signal.signal(number, signal.SIG_DFL)

    return undo


def raise_again() -> None:
    """Raise SystemExit again if a signal raised it and it was swallowed.

    Python swallows what a handler raises in a callback of the garbage collector, and libraries
    swallow it elsewhere.
    """
    if _told:
        sys.exit(128 + _told)


def begin_farewell() -> None:
    """Note that the signal was heard; ignore SIGHUP from now on.

    One that closes a terminal often comes twice, from the kernel and from the shell, and systemd
    sends it after SIGTERM: the second must not cut short what the first one began.
    """
    global _told
    _told = 0
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)


def _exit(number: int, frame: object) -> NoReturn:
    global _told
    begin_farewell()
    _told = number
    sys.exit(128 + number)


def _show_unraisable(unraisable: "sys.UnraisableHookArgs") -> None:
    """Show an exception that Python swallowed, but not one that `raise_again` raises again."""
    if not (_told and issubclass(unraisable.exc_type, SystemExit)):
        sys.__unraisablehook__(unraisable)


class _Lasting(io.FileIO):
    """A terminal or pipe. Once it is gone, what is written goes nowhere and raises nothing."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in GONE or stat.S_ISREG(os.fstat(self.fileno()).st_mode):
                raise
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self.fileno())
            return memoryview(data).nbytes


def _lasting(stream: Any) -> Any:
    """Return a text stream that outlasts its terminal or pipe; a test's double as it is."""
    buffer = getattr(stream, "buffer", None)
    raw = getattr(buffer, "raw", buffer)  # with python -u there is no buffer
    if type(raw) is not io.FileIO:
        return stream
    stream.flush()
    lasting: Any = _Lasting(raw.fileno(), "wb", closefd=False)
    return io.TextIOWrapper(
        lasting if buffer is raw else io.BufferedWriter(lasting),
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )
