"""Say where an unexpected error was raised, in a line for people and in a file of the trial."""

import os
import sys
import sysconfig
import traceback
from collections.abc import Iterable
from pathlib import Path
from types import FrameType, TracebackType

from q3q.masking import masked
from q3q.storage.files import write_atomically

TRACEBACK_AT = "; traceback: "  # in a reason, before the file's name
TRACEBACK = "traceback.txt"  # in the folder of a trial that ended in an unexpected error


def crash_reason(error: BaseException, folder: Path, own: Iterable[str] = ()) -> str:
    """Write an error's traceback into a trial's folder; return a line that says where it lies.

    `KeyError at q3q_hqq/method.py:16: 'oops'; traceback: mlruns/trials/ID/traceback.txt`

    Args:
        own: top-level names of the packages whose code is meant first: that of the method.

    Returns:
        The line; without the file's name if the file cannot be written.
    """
    message = " ".join(str(error).split())
    words = f"{type(error).__name__} at {place_of(error, own)}: {message}".rstrip(": ")
    path = folder / TRACEBACK
    try:
        lines = "".join(traceback.format_exception(error))
        write_atomically(path, masked(lines).encode(errors="backslashreplace"))
    except OSError:
        return words
    return f"{words}{TRACEBACK_AT}{_shortened(path)}"


def forget_crash(folder: Path) -> None:
    """Delete what `crash_reason` wrote: the trial's next attempt begins."""
    (folder / TRACEBACK).unlink(missing_ok=True)


def place_of(error: BaseException, own: Iterable[str] = ()) -> str:
    """Return the file and line where an error was raised, as `package/module.py:7`.

    It is the last line of q3q's or the method's code, because the caller of a library says more
    than the library's own line. If none of their code was running, it is the library's line.
    """
    own = {"q3q", *own}
    frames = list(_frames(error.__traceback__))
    if not frames:
        return "an unknown place"
    ours = [place for place in frames if not _foreign(place[0], own)]
    frame, line = (ours or frames)[-1]
    return f"{_file_of(frame)}:{line}"


def _frames(trace: TracebackType | None) -> Iterable[tuple[FrameType, int]]:
    while trace is not None:
        yield trace.tb_frame, trace.tb_lineno
        trace = trace.tb_next


def _foreign(frame: FrameType, own: set[str]) -> bool:
    """Return True for the code of Python and of installed packages but `own`."""
    top = str(frame.f_globals.get("__name__", "")).partition(".")[0]
    if top in own:
        return False
    file = frame.f_code.co_filename
    libraries = {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}
    installed = any(file.startswith(f"{library}{os.sep}") for library in libraries)
    return installed or top in sys.stdlib_module_names or file.startswith("<")


def _file_of(frame: FrameType) -> str:
    """Return a frame's file from its top-level package on: `q3q_hqq/method.py`."""
    path = Path(frame.f_code.co_filename)
    name = str(frame.f_globals.get("__name__", ""))
    depth = name.count(".") + (2 if path.name == "__init__.py" else 1)
    return "/".join(path.parts[-depth:])


def _shortened(path: Path) -> Path:
    """Return a path from the current folder on if it lies below that."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path
