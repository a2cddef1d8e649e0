"""Put aside what is damaged, or stands where a file or folder of q3q's belongs, and say so.

Nothing is deleted: what was there is renamed (`record.json.damaged`), so that a person may look at
it, and q3q makes its own file again.
"""

import itertools
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from q3q.errors import ConfigError

# What follows a name: `.damaged`, `.damaged2`. Earlier versions put a point before the number;
# SQLite's files (`-wal`) keep their ending.
DAMAGED, MOVED = ".damaged", ".moved"
_ASIDE = re.compile(rf"(?:{re.escape(DAMAGED)}|{re.escape(MOVED)})\d*(?:$|[.-])")


def _print(line: str) -> None:
    print(f"Note: {line}", file=sys.stderr, flush=True)


_teller: ContextVar[Callable[[str], object]] = ContextVar("teller", default=_print)


@contextmanager
def telling(teller: Callable[[str], object]) -> Iterator[None]:
    """Let `tell` give its lines to `teller` inside, in this thread; else they go to stderr."""
    token = _teller.set(teller)
    try:
        yield
    finally:
        _teller.reset(token)


def tell(line: str) -> None:
    """Say something that a person should know, and that stops nothing."""
    _teller.get()(line)


def place_aside(path: Path, ending: str = DAMAGED) -> Path:
    """Return the first free name for what is put aside: `NAME.damaged`, then `NAME.damaged2`."""
    numbers = itertools.chain([""], itertools.count(2))
    places = (path.with_name(f"{path.name}{ending}{number}") for number in numbers)
    return next(place for place in places if not os.path.lexists(place))


def is_aside(name: str) -> bool:
    """Return True for the name of a file or folder that was put aside."""
    return _ASIDE.search(name) is not None


def put_aside(path: Path, problem: str) -> None:
    """Rename a file or folder of q3q's, and say so.

    Args:
        problem: completes a sentence that begins with the path: `is a folder`.

    Raises:
        OSError: it cannot be renamed.
    """
    place = place_aside(path)
    try:
        path.rename(place)
    except FileNotFoundError:  # another process was faster
        return
    made = f"q3q will make a new {path.name}"
    tell(f"{path} {problem}. It has been renamed to {place.name}, and {made}")


def clear_for_file(path: Path) -> None:
    """Put aside whatever is at a file's place and is no file.

    Raises:
        OSError: it cannot be renamed.
    """
    if os.path.lexists(path) and not path.is_file():
        put_aside(path, "is a folder" if path.is_dir() else _what(path, "file"))


def clear_for_folder(path: Path) -> None:
    """Put aside whatever is at a folder's place and is no folder.

    Raises:
        ConfigError: it is a link that leads nowhere, as where a disk is not mounted.
        OSError: it cannot be renamed.
    """
    if not os.path.lexists(path) or path.is_dir():
        return
    if path.is_symlink() and not path.exists():
        raise ConfigError(
            f"{path} is a link to {os.readlink(path)}, which does not exist: mount or create that "
            "folder, or remove the link"
        )
    put_aside(path, "is a file, not a folder" if path.is_file() else _what(path, "folder"))


# The folders of a storage folder, the outer ones first.
FOLDERS = (
    "trials",
    "trials/blocks",
    "trials/digests",
    "sweeps",
    "running",
    "reports",
    "baselines",
    "prepared",
    "traces",
    "sensitivities",
)


def clear_storage(storage: Path) -> None:
    """Put aside whatever is at the place of a storage folder's own folders and is no folder.

    Raises:
        ConfigError: it is a link that leads nowhere.
        OSError: it cannot be renamed.
    """
    for name in FOLDERS:
        clear_for_folder(storage / name)


def _what(path: Path, wanted: str) -> str:
    return "is a link that leads nowhere" if path.is_symlink() else f"is not a {wanted}"
