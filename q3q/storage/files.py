"""Write files that neither a crash nor a power cut tears, and read and seal what they hold."""

import errno
import hashlib
import json
import os
import platform
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import takewhile
from pathlib import Path

from q3q.spec import Json, digest
from q3q.storage.aside import clear_for_file

SEAL = "sha256"  # of all else in a file, as canonical JSON
# Errors of file systems that cannot flush a folder.
NO_FOLDER_FLUSH = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES)
# Errors of opening what is no file: a folder, a circular link, a socket.
NO_FILE = (errno.EISDIR, errno.ELOOP, errno.ENXIO)

# Size, times of change of the content and of the entry, number on its disk.
FileState = tuple[int, int, int, int]


class NoFileError(OSError):
    """Something else than a file is where a file should be."""


def write_atomically(path: Path, content: bytes | Iterable[bytes], *, wait: bool = True) -> None:
    """Write a file, or its parts one by one; a crash leaves the old content or the new.

    What is at its place and is no file is put aside.

    Args:
        wait: wait until the disk has it, and its name. Without, a power cut may leave half a file,
            which is for content that carries a checksum and is checked later.

    Raises:
        OSError: it cannot be written; the old content is still there.
    """
    make_folder(path.parent)
    clear_for_file(path)
    partial = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            for part in [content] if isinstance(content, bytes) else content:
                file.write(part)
            file.flush()
            if wait:
                os.fsync(file.fileno())
        partial.replace(path)
        if wait:
            flush_folder(path.parent)
    except OSError as error:
        partial.unlink(missing_ok=True)  # it would take a full disk's last room
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def install(partial: Path, path: Path) -> None:
    """Rename a file that is written completely to its place, once the disk has all of it."""
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    clear_for_file(path)
    partial.replace(path)
    flush_folder(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder and its parents, and wait until the disk has their names."""
    missing = list(takewhile(lambda path: not path.exists(), (folder, *folder.parents)))
    folder.mkdir(parents=True, exist_ok=True)
    for made in reversed(missing):
        flush_folder(made.parent)


def flush_folder(folder: Path) -> None:
    """Wait until the disk has a folder's names: a new or renamed file has none before that."""
    try:
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in NO_FOLDER_FLUSH:
            raise


def read_file(path: Path) -> bytes:
    """Read a stored file; do not wait for a FIFO, nor read a device without end.

    Raises:
        FileNotFoundError: there is none.
        NoFileError: a folder, or something else that is no file, is there.
        OSError: it cannot be read.
    """
    try:
        with open(path, "rb", opener=_open_at_once) as file:
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return file.read()
    except OSError as error:
        if error.errno not in NO_FILE:
            raise
    raise NoFileError(errno.EISDIR, "not a file", str(path))


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


def file_state(path: Path) -> FileState:
    """Return what changes whenever a file does.

    A copy may keep the size and the time of its content, but not the time of its entry, which no
    program can set, nor the number.

    Raises:
        OSError: there is no such file.
    """
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def file_digest(path: Path) -> str:
    """Return a file's SHA-256 (hex).

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class FileDigests:
    """The SHA-256 (hex) of files, each read again only when its state has changed."""

    def __init__(self) -> None:
        self.known: dict[Path, tuple[FileState, str]] = {}

    def write(self, path: Path, parts: Iterable[bytes], *, wait: bool = True) -> str:
        """Write a file in parts, as `write_atomically` does, and return its digest."""
        sha = hashlib.sha256()

        def hashed() -> Iterator[bytes]:
            for part in parts:
                sha.update(part)
                yield part

        write_atomically(path, hashed(), wait=wait)
        self.known[path] = file_state(path), sha.hexdigest()
        return sha.hexdigest()

    def of(self, path: Path) -> str:
        """Return a file's digest.

        Raises:
            OSError: it cannot be read.
        """
        state = file_state(path)
        if path not in self.known or self.known[path][0] != state:
            self.known[path] = state, file_digest(path)
        return self.known[path][1]


def bytes_below(folder: Path) -> int:
    """Return the bytes of all files below a folder; those that come or go meanwhile may count."""
    total = 0
    for top, _, names in os.walk(folder):  # unlike rglob, it bears that a folder goes away
        for path in (Path(top, name) for name in names):
            with suppress(OSError):
                total += 0 if path.is_symlink() else path.stat().st_size
    return total


def sealed(facts: Json, *, finite: bool = False) -> bytes:
    """Return JSON that carries its own checksum, so that a flipped bit cannot pass for a number.

    Raises:
        ValueError: a number is not finite although `finite` asks for it.
    """
    # As it will be read: tuples are lists.
    plain: Json = json.loads(json.dumps(facts, allow_nan=not finite))
    return json.dumps({**plain, SEAL: digest(plain, spaced=True)}, indent=1).encode()


def unsealed(content: bytes, *, strict: bool = False) -> Json:
    """Return what `sealed` received.

    Args:
        strict: refuse content without a checksum, which some files of older versions lack.

    Raises:
        ValueError: the content is torn, or not what was written.
    """
    try:
        facts = json.loads(content)
    except RecursionError as error:
        raise ValueError("not what q3q writes") from error
    if not isinstance(facts, dict):
        raise ValueError("not what q3q writes")
    seal = facts.pop(SEAL, None)
    if (seal is None and strict) or (seal is not None and seal != digest(facts, spaced=True)):
        raise ValueError("damaged: its checksum does not fit")
    return facts
