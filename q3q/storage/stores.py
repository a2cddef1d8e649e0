"""The stores that a URL names (a folder or an object store), and retries of requests to them."""

import functools
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from q3q.canonical import sha256
from q3q.errors import ConfigError, Q3QError
from q3q.masking import masked
from q3q.storage.files import install, make_folder

PATIENCE = 180.0  # seconds of retries of a store that does not answer
LONGEST_PAUSE = 30.0  # seconds between two tries
PACKAGES = dict(s3="q3q[s3]", s3a="q3q[s3]", gs="gcsfs", gcs="gcsfs", az="adlfs", abfs="adlfs")
# The first of these that a store knows is a file's mark.
MARKS = ("ETag", "etag", "generation", "md5Hash", "mtime", "last_modified", "LastModified", "ino")
LOCAL = ("file", "local")
FOLDER = "Q3Q_MIRRORS"  # environment variable: where mirrors lie


class StoreError(Q3QError, OSError):
    """A store that does not take or give files."""


def is_url(storage: str) -> bool:
    return "://" in storage


@functools.cache
def refuse_unusable(url: str) -> None:
    """Check, once in a process, that a store can be used: create a file exclusively, remove it.

    Raises:
        ConfigError: it cannot be used; one line says what to do.
    """
    shown = f"storage={masked(url)}"
    protocol, _, rest = url.partition("://")
    if re.search(r"[?#]|::", url) or re.match(r"[^/@]*:[^/@]*@", rest):
        raise ConfigError(
            f"{shown}: give no passwords, queries or chains in it; credentials come from the "
            "environment"
        )
    if protocol in LOCAL and not rest.startswith("/"):
        raise ConfigError(f"{shown}: a folder's URL has three slashes, file:///folder")
    try:
        store = open_store(url)
    except ImportError:
        package = PACKAGES.get(protocol, f"the fsspec filesystem for {protocol}")
        raise ConfigError(
            f"{shown} needs a package that is not installed: pip install '{package}'"
        ) from None
    except ValueError as error:
        raise ConfigError(f"{shown} is of no kind that fsspec knows ({one_line(error)})") from None
    name, content = f".probe-{secrets.token_hex(8)}", b"q3q sees whether it may write here\n"
    if not store.exclusive:
        raise ConfigError(
            f"{shown}: {protocol} cannot create a file that only one of two processes gets, so "
            "trials there could run twice; give an object store that can (S3, GCS, Azure), or a "
            "folder that every node sees"
        )
    try:
        first = store.create(name, content)
        second = store.create(name, b"another")
        store.remove(name)
    except FileNotFoundError:
        raise ConfigError(f"{shown}: there is no such bucket or folder; make it first") from None
    except Exception as error:
        if _is_refusal(error):
            raise ConfigError(
                f"{shown}: not allowed to write there ({one_line(error)}); credentials come from "
                "the environment or the machine's role"
            ) from None
        raise ConfigError(f"{shown} cannot be used: {one_line(error)}") from None
    if not first or second:
        raise ConfigError(
            f"{shown}: this store lets two processes create the same file, so trials there could "
            "run twice; give one with conditional writes, or a folder that every node sees"
        )


class Store(Protocol):
    """Files under a URL, by name relative to it.

    exclusive: of two processes that `create` the same file, one fails
    """

    exclusive: bool

    def find(self, prefix: str) -> dict[str, str]:
        """Return each file below a prefix, or of that name, with a mark that changes with it."""

    def sizes(self, prefix: str) -> dict[str, int]:
        """Return the bytes of each file below a prefix."""

    def names(self, folder: str) -> list[str]:
        """Return the names of the files in a folder."""

    def mark(self, name: str) -> str | None:
        """Return a file's mark; None if there is no such file."""

    def get(self, name: str, path: Path) -> None: ...

    def put(self, name: str, path: Path) -> None: ...

    def read(self, name: str) -> bytes: ...

    def write(self, name: str, content: bytes) -> None: ...

    def create(self, name: str, content: bytes) -> bool:
        """Write a file; return False if there is one of that name."""

    def remove(self, name: str) -> None:
        """Remove a file, if there is one."""


def open_store(url: str) -> Store:
    """Open the store of a URL; raise ImportError or ValueError as `refuse_unusable` explains."""
    protocol, _, rest = url.rstrip("/").partition("://")
    return FolderStore(Path(rest)) if protocol in LOCAL else ObjectStore(url.rstrip("/"))


class FolderStore:
    """file:///folder, treated as an object store: a file is put there completely or not at all."""

    exclusive = True

    def __init__(self, root: Path) -> None:
        self.root = root

    def find(self, prefix: str) -> dict[str, str]:
        whole = (name for name in files_below(self.root, prefix) if not is_partial(name))
        marks = {name: self._mark(self.root / name) for name in whole}
        return {name: mark for name, mark in marks.items() if mark is not None}

    def sizes(self, prefix: str) -> dict[str, int]:
        sizes = {}
        for name in self.find(prefix):
            with suppress(FileNotFoundError):  # it goes away at this moment
                sizes[name] = (self.root / name).stat().st_size
        return sizes

    def names(self, folder: str) -> list[str]:
        with suppress(FileNotFoundError):
            return [name for name in os.listdir(self.root / folder) if not is_partial(name)]
        return []

    def mark(self, name: str) -> str | None:
        return self._mark(self.root / name)

    def get(self, name: str, path: Path) -> None:
        shutil.copyfile(self.root / name, path)

    def put(self, name: str, path: Path) -> None:
        with self._beside(name) as partial:
            shutil.copyfile(path, partial)
            install(partial, self.root / name)

    def read(self, name: str) -> bytes:
        return (self.root / name).read_bytes()

    def write(self, name: str, content: bytes) -> None:
        with self._beside(name) as partial:
            partial.write_bytes(content)
            partial.replace(self.root / name)

    def create(self, name: str, content: bytes) -> bool:
        with self._beside(name) as partial:
            partial.write_bytes(content)
            try:
                # Fails where a file is, and brings the content with it.
                (self.root / name).hardlink_to(partial)
            except FileExistsError:
                return False
        return True

    def remove(self, name: str) -> None:
        (self.root / name).unlink(missing_ok=True)

    @contextmanager
    def _beside(self, name: str) -> Iterator[Path]:
        path = self.root / name
        make_folder(path.parent)
        partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
        try:
            yield partial
        finally:
            partial.unlink(missing_ok=True)

    @staticmethod
    def _mark(path: Path) -> str | None:
        with suppress(FileNotFoundError):
            status = path.stat()
            return f"{status.st_mtime_ns} {status.st_size} {status.st_ino}"
        return None


class ObjectStore:
    """A store that fsspec opens."""

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs
        from fsspec.spec import AbstractFileSystem

        # No cached listings: other processes write there too.
        self.fs, root = url_to_fs(url, use_listings_cache=False)
        self.root = str(root).rstrip("/")
        # fsspec's default looks first and writes then, and another process may come between.
        kind = type(self.fs)
        own = getattr(kind, "_pipe_file", None) if self.fs.async_impl else kind.pipe_file
        theirs = (AbstractFileSystem.pipe_file, getattr(_async_filesystem(), "_pipe_file", None))
        self.exclusive = own not in theirs and url.partition("://")[0] != "memory"

    def find(self, prefix: str) -> dict[str, str]:
        return {name: _mark(info) for name, info in self._files(prefix).items()}

    def sizes(self, prefix: str) -> dict[str, int]:
        return {name: int(info["size"]) for name, info in self._files(prefix).items()}

    def _files(self, prefix: str) -> dict[str, Any]:
        try:
            infos = self.fs.find(self._at(prefix), detail=True)
        except FileNotFoundError:
            return {}
        return {
            name[len(self.root) + 1 :]: info
            for name, info in infos.items()
            if info.get("type") == "file" and not name.endswith("/")
        }

    def names(self, folder: str) -> list[str]:
        self.fs.invalidate_cache(self._at(folder))
        try:
            return [name.rpartition("/")[2] for name in self.fs.ls(self._at(folder), detail=False)]
        except FileNotFoundError:
            return []

    def mark(self, name: str) -> str | None:
        self.fs.invalidate_cache(self._at(name))
        try:
            return _mark(self.fs.info(self._at(name)))
        except FileNotFoundError:
            return None

    def get(self, name: str, path: Path) -> None:
        self.fs.get_file(self._at(name), str(path))

    def put(self, name: str, path: Path) -> None:
        self.fs.put_file(str(path), self._at(name))

    def read(self, name: str) -> bytes:
        return self.fs.cat_file(self._at(name))

    def write(self, name: str, content: bytes) -> None:
        self.fs.pipe_file(self._at(name), content)

    def create(self, name: str, content: bytes) -> bool:
        """Create a file whose content no other process would write.

        The store may answer "exists" to a retry whose first answer was lost: the content tells.
        """
        try:
            self.fs.pipe_file(self._at(name), content, mode="create")
        except Exception:  # "exists" has several names
            try:
                present = self.read(name)
            except Exception:
                present = None
            if present is None:
                raise
            return present == content
        return True

    def remove(self, name: str) -> None:
        with suppress(FileNotFoundError):
            self.fs.rm_file(self._at(name))

    def _at(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root


def _async_filesystem() -> Any:
    from fsspec.asyn import AsyncFileSystem

    return AsyncFileSystem


def _mark(info: Mapping[str, Any]) -> str:
    mark = next((info[key] for key in MARKS if info.get(key) is not None), "")
    return f"{mark} {info.get('size')}"


def with_retries(url: str, call: Callable[[], Any]) -> Any:
    """Return a request's result; retry for PATIENCE seconds what may succeed later.

    Raises:
        StoreError: it went on failing, or is not allowed.
        FileNotFoundError: the file is not there.
    """
    pause, deadline = 0.5, time.monotonic() + PATIENCE
    while True:
        try:
            return call()
        except FileNotFoundError:
            raise
        except Exception as error:  # each filesystem has errors of its own
            if _is_refusal(error) or time.monotonic() + pause > deadline:
                raise StoreError(
                    f"storage={masked(url)} cannot be used any more: {one_line(error)}. Files that "
                    f"were not sent are in {mirror_of(url)} on this machine; the same command goes "
                    "on"
                ) from None
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)


def _is_refusal(error: Exception) -> bool:
    """Return True if retrying is of no use."""
    return isinstance(error, PermissionError) or "credentials" in str(error).lower()


def one_line(error: Exception) -> str:
    return masked(" ".join(f"{type(error).__name__}: {error}".split()))[:300]


def is_partial(name: str) -> bool:
    """Return True for a file that is being written, or that a killed process began to write."""
    return name.endswith(".partial")


def files_below(folder: Path, prefix: str) -> list[str]:
    """Return the files below a prefix, or of that name; some may go away meanwhile."""
    if (folder / prefix).is_file():
        return [prefix]
    paths = (Path(top) / name for top, _, names in os.walk(folder / prefix) for name in names)
    return sorted(str(path.relative_to(folder)) for path in paths)


def mirror_of(url: str) -> Path:
    """Return the folder of this machine that mirrors a URL."""
    base = Path(os.environ.get(FOLDER) or "~/.cache/q3q/mirrors").expanduser().absolute()
    url = url.rstrip("/")
    words = re.sub(r"[^A-Za-z0-9.]+", "-", url.partition("://")[2]).strip("-.")[-40:]
    return base / f"{words}-{sha256(url)[:12]}"


def folder_of(storage: str) -> Path:
    """Return the folder to work in: the storage itself, or its mirror."""
    return mirror_of(storage) if is_url(storage) else Path(storage)
