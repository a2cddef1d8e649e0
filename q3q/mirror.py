"""A storage that is a URL (s3://bucket/prefix, gs://..., file:///...): worked on in a local folder, its mirror.

An object store has neither renames nor locks nor files that grow, and a trial needs all three. So it works in a folder
of its machine, and a *courier* brings what is new or changed to the store every few seconds: whoever goes on elsewhere
pulls it first. Nothing here needs to be right about the moment of a death: blocks, measurements and records vouch for
themselves by checksum, whatever half of a trial's files arrived.

A mirror remembers of each file what it last exchanged: the store's mark (ETag, generation) and the local size and time
of change. So it knows which side has changed. If both have, the store's counts.
"""

import fcntl
import functools
import hashlib
import json
import os
import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from q3q.claim import ClaimLostError
from q3q.errors import ConfigError, Q3QError
from q3q.masking import masked

FOLDER = "Q3Q_MIRRORS"  # the environment variable that says where mirrors lie
KNOWN = ".known"  # in a mirror: of each file, what was last exchanged
EVERY_SECONDS = 5.0  # between two rounds of a worker's courier, and
DRIVER_SECONDS = 10.0  # of a driver's
PATIENCE = 180.0  # seconds for which a store that does not answer is tried again
LONGEST_PAUSE = 30.0  # seconds between two tries
AT_ONCE = 8  # transfers
BEAT_SECONDS, SILENT_SECONDS, LOOK_SECONDS = (
    15.0,
    120.0,
    5.0,
)  # of claims: each beat and look is a request to be paid
LAST = (
    "manifest.json",
    "q3q.json",
    "record.json",
)  # vouch for other files, so they are sent, and fetched, after them
PACKAGES = {
    "s3": "q3q[s3]",
    "s3a": "q3q[s3]",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
}
MARKS = (
    "ETag",
    "etag",
    "generation",
    "md5Hash",
    "mtime",
    "last_modified",
    "LastModified",
    "ino",
)  # the first found
LOCAL = ("file", "local")


class StoreError(Q3QError, OSError):
    """A store that does not take or give files, or not any more."""


# ---------------------------------------------------------------------------------------------- where it lies


def is_url(storage: str) -> bool:
    return "://" in storage


def mirror_of(url: str) -> Path:
    """The folder of this machine in which a URL is worked on."""
    base = Path(os.environ.get(FOLDER) or "~/.cache/q3q/mirrors").expanduser().absolute()
    url = url.rstrip("/")
    words = re.sub(r"[^A-Za-z0-9.]+", "-", url.partition("://")[2]).strip("-.")[-40:]
    return base / f"{words}-{hashlib.sha256(url.encode()).hexdigest()[:12]}"


def folder_of(storage: str) -> Path:
    """The folder in which a storage is worked on: itself, or its mirror."""
    return mirror_of(storage) if is_url(storage) else Path(storage)


def mirror_at(storage: str) -> "Mirror | None":
    return Mirror(storage) if is_url(storage) else None


def mirror_for(places: Mapping[str, Any]) -> "Mirror | None":
    """Of a trial's places; None if they are folders that every node sees."""
    return Mirror(places["store"]) if "store" in places else None


def settled(places: dict[str, Any]) -> dict[str, Any]:
    """A trial's places as they are on this machine, wherever the spec was written: homes differ from node to node."""
    if "store" not in places:
        return places
    folder, there = mirror_of(places["store"]), Path(places["trials"]).parent
    here = {**places, "trials": str(folder / "trials")}
    if "export" in places and Path(places["export"]).is_relative_to(there):
        here["export"] = str(folder / Path(places["export"]).relative_to(there))
    return here


def refreshed(storage: str) -> Path:
    """`folder_of`; of a URL with all that a plan, a list or a report reads: everything but tensors and measurements
    under way, and of exports what they say of themselves.

    Raises:
        ConfigError: the URL cannot be used. StoreError: it does not answer.
    """
    mirror = mirror_at(storage)
    if mirror is None:
        return Path(storage)
    refuse_unusable(storage)
    mirror.folder.mkdir(parents=True, exist_ok=True)
    mirror.pull("sweeps", "running", "trials", "exports", only=is_light, claims=True)
    return mirror.folder


def is_light(name: str) -> bool:
    """Whether a file is one that `refreshed` brings."""
    if name.startswith("exports/"):
        return name.endswith("/q3q.json")
    return not name.endswith(".safetensors") and "/evaluations/" not in name


@functools.cache
def refuse_unusable(url: str) -> None:
    """See that a store can be used as storage, once in a process: it is written to, exclusively, and tidied up.

    Raises:
        ConfigError: it cannot; one line that says what to do.
    """
    shown = f"storage={masked(url)}"
    protocol, _, rest = url.partition("://")
    if re.search(r"[?#]|::", url) or re.match(r"[^/@]*:[^/@]*@", rest):
        raise ConfigError(
            f"{shown}: give no passwords, queries or chains in it; credentials come from the environment"
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
        raise ConfigError(f"{shown} is of no kind that fsspec knows ({_line(error)})") from None
    name, content = f".probe-{secrets.token_hex(8)}", b"q3q sees whether it may write here\n"
    if not store.exclusive:
        raise ConfigError(
            f"{shown}: {protocol} cannot create a file that only one of two processes gets, so trials there could run "
            "twice; give an object store that can (S3, GCS, Azure), or a folder that every node sees"
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
                f"{shown}: not allowed to write there ({_line(error)}); credentials come from the environment or the "
                "machine's role"
            ) from None
        raise ConfigError(f"{shown} cannot be used: {_line(error)}") from None
    if not first or second:
        raise ConfigError(
            f"{shown}: this store lets two processes create the same file, so trials there could run twice; give one "
            "with conditional writes, or a folder that every node sees"
        )


# ---------------------------------------------------------------------------------------------- a store


class Store(Protocol):
    """Files under a URL, by name relative to it. exclusive: whether `create` can be trusted between processes."""

    exclusive: bool

    def find(self, prefix: str) -> dict[str, str]:
        """Each file below a prefix, or the one of that name, with its mark, which changes when it does."""

    def names(self, folder: str) -> list[str]:
        """Of the files in a folder."""

    def mark(self, name: str) -> str | None:
        """None if it is not there."""

    def get(self, name: str, path: Path) -> None: ...

    def put(self, name: str, path: Path) -> None: ...

    def read(self, name: str) -> bytes: ...

    def write(self, name: str, content: bytes) -> None: ...

    def create(self, name: str, content: bytes) -> bool:
        """Write a file unless there is one of that name; whether it was written."""

    def remove(self, name: str) -> None:
        """Whether it is there or not."""


def open_store(url: str) -> Store:
    """Raises ImportError, ValueError: see `refuse_unusable`."""
    protocol, _, rest = url.rstrip("/").partition("://")
    return FolderStore(Path(rest)) if protocol in LOCAL else ObjectStore(url.rstrip("/"))


class FolderStore:
    """file:///folder: a folder that is treated as an object store. Files are put there whole, or not at all."""

    exclusive = True

    def __init__(self, root: Path) -> None:
        self.root = root

    def find(self, prefix: str) -> dict[str, str]:
        found = {name: self._mark(self.root / name) for name in _files(self.root, prefix)}
        return {name: mark for name, mark in found.items() if mark is not None}

    def names(self, folder: str) -> list[str]:
        with suppress(FileNotFoundError):
            return [
                name for name in os.listdir(self.root / folder) if not name.endswith(".partial")
            ]
        return []

    def mark(self, name: str) -> str | None:
        return self._mark(self.root / name)

    def get(self, name: str, path: Path) -> None:
        shutil.copyfile(self.root / name, path)

    def put(self, name: str, path: Path) -> None:
        with self._beside(name) as partial:
            shutil.copyfile(path, partial)
            partial.replace(self.root / name)

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
                (self.root / name).hardlink_to(
                    partial
                )  # fails where something is, and brings the content with it
            except FileExistsError:
                return False
        return True

    def remove(self, name: str) -> None:
        (self.root / name).unlink(missing_ok=True)

    @contextmanager
    def _beside(self, name: str) -> Iterator[Path]:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
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
    """Whatever fsspec opens."""

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs
        from fsspec.spec import AbstractFileSystem

        # Listings must be true at the moment they are asked for: others write there too.
        self.fs, root = url_to_fs(url, use_listings_cache=False)
        self.root = str(root).rstrip("/")
        # fsspec's own way to create a file looks first and writes then, between which another may have come.
        kind = type(self.fs)
        own = getattr(kind, "_pipe_file", None) if self.fs.async_impl else kind.pipe_file
        theirs = (AbstractFileSystem.pipe_file, getattr(_async_filesystem(), "_pipe_file", None))
        self.exclusive = own not in theirs and url.partition("://")[0] != "memory"

    def find(self, prefix: str) -> dict[str, str]:
        try:
            found = self.fs.find(self._at(prefix), detail=True)
        except FileNotFoundError:
            return {}
        infos = {
            name: info
            for name, info in found.items()
            if info.get("type") == "file" and not name.endswith("/")
        }
        return {name[len(self.root) + 1 :]: _mark(info) for name, info in infos.items()}

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
        content: bytes = self.fs.cat_file(self._at(name))
        return content

    def write(self, name: str, content: bytes) -> None:
        self.fs.pipe_file(self._at(name), content)

    def create(self, name: str, content: bytes) -> bool:
        """A request that was answered "exists" may be our own, sent again after its answer was lost: the content tells.
        So give something that nobody else would write."""
        try:
            self.fs.pipe_file(self._at(name), content, mode="create")
        except Exception:  # "exists" has several names
            try:
                found = self.read(name)
            except Exception:
                found = None
            if found is None:
                raise
            return found == content
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


def patiently(url: str, call: Callable[[], Any]) -> Any:
    """What a request to the store comes to, tried again for PATIENCE seconds if it fails for a reason that may pass.

    Raises:
        StoreError: it went on failing, or it is not allowed. FileNotFoundError: what was asked for is not there.
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
                    f"storage={masked(url)} cannot be used any more: {_line(error)}. What was not sent yet lies in "
                    f"{mirror_of(url)} of this machine; the same command goes on"
                ) from None
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)


def _is_refusal(error: Exception) -> bool:
    """Whether trying again is no use."""
    return isinstance(error, PermissionError) or "credentials" in str(error).lower()


def _line(error: Exception) -> str:
    return masked(" ".join(f"{type(error).__name__}: {error}".split()))[:300]


# ---------------------------------------------------------------------------------------------- the mirror


@dataclass(frozen=True)
class Exchanged:
    """A file at its last exchange: the store's mark, and the local state."""

    mark: str
    state: tuple[int, int]


class Mirror:
    """The local folder of a URL, and what brings the two together. Several processes of a machine may share it."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.folder = mirror_of(url)

    @functools.cached_property
    def store(self) -> Store:
        return open_store(self.url)

    def board(self, folder: str) -> "StoreBoard":
        return StoreBoard(self.url, self.store, folder)

    def name_of(self, path: Path) -> str | None:
        """What a file or folder of the mirror is called in the store; None if it lies elsewhere."""
        return str(path.relative_to(self.folder)) if path.is_relative_to(self.folder) else None

    def pull(
        self, *prefixes: str, only: Callable[[str], bool] = lambda name: True, claims: bool = False
    ) -> None:
        """Bring what the store has and this folder lacks or holds otherwise, and delete here what was deleted there.

        What was changed here alone since the last exchange stays as it is. claims: bring them too, to be looked at.
        """
        for prefix in prefixes:
            there = patiently(self.url, functools.partial(self.store.find, prefix))
            there = {
                name: mark
                for name, mark in there.items()
                if only(name) and (_travels(name) or _is_claim(name, claims))
            }
            self._in_order(there, functools.partial(self._fetch, marks=there))
            for name in self._known(prefix):
                if name not in there and only(name):
                    self._forget(name)

    def push(self, *prefixes: str, sure: Callable[[], object] = lambda: None) -> int:
        """Send what is new or changed here since the last exchange, what vouches for other files after those; then
        delete there what was deleted here. sure: asked before each of these; what it raises ends the rest.

        Returns:
            How many files were sent or deleted.
        """
        changed = [
            name for prefix in prefixes for name in self._here(prefix) if self._is_changed(name)
        ]
        self._in_order(changed, self._send, sure)
        gone = [
            name
            for prefix in prefixes
            for name in self._known(prefix)
            if not (self.folder / name).exists()
        ]
        if gone:
            sure()
        for name in gone:
            patiently(self.url, functools.partial(self.store.remove, name))
            self._record(name).unlink(missing_ok=True)
        return len(changed) + len(gone)

    def offer(self, prefix: str) -> None:
        """Send what is below a prefix if nothing is there: of a cache, which others would compute likewise."""
        new = any(self._is_changed(name) for name in self._here(prefix))
        if new and not patiently(self.url, lambda: self.store.find(prefix)):
            self.push(prefix)

    def remove(self, prefix: str) -> None:
        """Delete all below a prefix there, claims excepted; what is here is the caller's."""
        for name in patiently(self.url, functools.partial(self.store.find, prefix)):
            if not _is_claim(name, True):
                patiently(self.url, functools.partial(self.store.remove, name))
            self._record(name).unlink(missing_ok=True)

    def _in_order(
        self, names: Any, work: Callable[[str], object], sure: Callable[[], object] = lambda: None
    ) -> None:
        ranks: dict[int, list[str]] = {}
        for name in dict.fromkeys(names):
            last = name.rpartition("/")[2]
            ranks.setdefault(LAST.index(last) + 1 if last in LAST else 0, []).append(name)
        for _, some in sorted(ranks.items()):
            sure()
            if len(some) == 1:
                work(some[0])
                continue
            with ThreadPoolExecutor(AT_ONCE) as threads:
                list(threads.map(work, some))

    def _fetch(self, name: str, marks: Mapping[str, str]) -> None:
        path, mark = self.folder / name, marks[name]
        with self._turn(name) as known:
            state = _state(path)
            if state is not None and known is not None and known.mark == mark:
                return  # the same, or changed here since
            if (
                state is not None
            ):  # another process may have sent it since the store was asked what it has
                now = patiently(self.url, functools.partial(self.store.mark, name))
                if now is None or (known is not None and known.mark == now):
                    return
                mark = now
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
            try:
                patiently(self.url, functools.partial(self.store.get, name, partial))
                partial.replace(path)
            except FileNotFoundError:  # deleted there meanwhile
                return
            finally:
                partial.unlink(missing_ok=True)
            self._remember(name, mark)

    def _send(self, name: str) -> None:
        path = self.folder / name
        with self._turn(name):
            state = _state(path)
            try:
                patiently(self.url, functools.partial(self.store.put, name, path))
                mark = patiently(self.url, functools.partial(self.store.mark, name))
            except FileNotFoundError as error:
                if path.exists():
                    raise StoreError(
                        f"storage={masked(self.url)} is gone ({_line(error)})"
                    ) from None
                return  # deleted here meanwhile
            if mark is not None and state is not None:
                self._remember(name, mark, state)

    def _forget(self, name: str) -> None:
        """It is gone there: delete it here, unless it was changed since it was known there."""
        with self._turn(name) as known:
            if known is not None and _state(self.folder / name) == known.state:
                (self.folder / name).unlink(missing_ok=True)
            self._record(name).unlink(missing_ok=True)

    def _is_changed(self, name: str) -> bool:
        known, state = _read_exchanged(self._record(name)), _state(self.folder / name)
        return state is not None and (known is None or known.state != state)

    def _here(self, prefix: str) -> list[str]:
        return [name for name in _files(self.folder, prefix) if _travels(name)]

    def _known(self, prefix: str) -> list[str]:
        return _files(self.folder / KNOWN, prefix)

    def _record(self, name: str) -> Path:
        return self.folder / KNOWN / name

    def _remember(self, name: str, mark: str, state: tuple[int, int] | None = None) -> None:
        state = state or _state(self.folder / name)
        self._record(name).write_text(json.dumps([mark, state]), encoding="utf-8")

    @contextmanager
    def _turn(self, name: str) -> Iterator[Exchanged | None]:
        """One process of this machine at a time exchanges a file. The kernel takes the lock from one that dies."""
        record = self._record(name)
        record.parent.mkdir(parents=True, exist_ok=True)
        with record.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                yield _read_exchanged(record)
            finally:
                if record.exists() and not record.stat().st_size:
                    record.unlink(missing_ok=True)


def _travels(name: str) -> bool:
    """Whether a file is for others: not one under way, not a lock, not a claim, which lies in the store alone."""
    parts = name.split("/")
    under_way = any(
        part.startswith(".") or part.endswith(".partial") or ".partial." in part for part in parts
    )
    return not under_way and not name.endswith(".lock") and not _is_claim(name, True)


def _is_claim(name: str, wanted: bool) -> bool:
    return wanted and re.search(r"\.claim\.\d+$", name) is not None


def _files(folder: Path, prefix: str) -> list[str]:
    """Those below a prefix, or the one of that name; some may go away meanwhile."""
    if (folder / prefix).is_file():
        return [prefix]
    found = (Path(top) / name for top, _, names in os.walk(folder / prefix) for name in names)
    return sorted(str(path.relative_to(folder)) for path in found)


def _state(path: Path) -> tuple[int, int] | None:
    with suppress(OSError):
        status = path.stat()
        return status.st_size, status.st_mtime_ns
    return None


def _read_exchanged(record: Path) -> Exchanged | None:
    try:
        mark, (size, changed) = json.loads(record.read_bytes())
    except (OSError, ValueError, TypeError):
        return None
    return Exchanged(mark, (size, changed))


# ---------------------------------------------------------------------------------------------- work under way


class Courier:
    """Pushes what changes below some prefixes, in a thread of its own, until it is closed.

    sure: see `Mirror.push`. A round that fails is no end: the next one sends what it left.
    """

    def __init__(
        self, mirror: Mirror, *prefixes: str, every: float, sure: Callable[[], object]
    ) -> None:
        self.mirror, self.every, self.sure = mirror, every, sure
        self._prefixes = dict.fromkeys(prefixes)
        self._closing = threading.Event()
        self._thread = threading.Thread(
            target=self._deliver_until_closed, name="q3q-courier", daemon=True
        )
        self._thread.start()

    def add(self, *prefixes: str) -> None:
        self._prefixes = {
            **self._prefixes,
            **dict.fromkeys(prefixes),
        }  # anew: the thread may be going through it

    def deliver(self) -> None:
        self.mirror.push(*self._prefixes, sure=self.sure)

    def stop(self) -> None:
        self._closing.set()
        self._thread.join()

    def _deliver_until_closed(self) -> None:
        while not self._closing.wait(self.every):
            with suppress(OSError, ClaimLostError):
                self.deliver()


@contextmanager
def delivering(
    mirror: Mirror,
    *prefixes: str,
    every: float | None = None,
    sure: Callable[[], object] = lambda: None,
) -> Iterator[Courier]:
    """A courier for the time of some work; at its end, however it ends, all is sent. every: EVERY_SECONDS if None.

    Raises:
        StoreError: it could not be. What `sure` raises.
    """
    courier = Courier(mirror, *prefixes, every=EVERY_SECONDS if every is None else every, sure=sure)
    try:
        yield courier
    except BaseException:
        courier.stop()
        with suppress(OSError, ClaimLostError):  # the first error is the one to hear of
            courier.deliver()
        raise
    courier.stop()
    courier.deliver()


# ---------------------------------------------------------------------------------------------- claims


class StoreBoard:
    """Claims in a folder of a store: `q3q.claim.Board`."""

    def __init__(self, url: str, store: Store, folder: str) -> None:
        self.url, self.store, self.folder = url, store, folder
        self.beat, self.silent = BEAT_SECONDS, SILENT_SECONDS
        self.look = 0.5 if isinstance(store, FolderStore) else LOOK_SECONDS

    def __str__(self) -> str:
        return f"{masked(self.url)}/{self.folder}"

    def create(self, name: str) -> "StoreSlip | None":
        """It holds nothing yet but a number that no other process draws."""
        content = secrets.token_hex(16).encode()
        made = patiently(self.url, lambda: self.store.create(f"{self.folder}/{name}", content))
        return StoreSlip(self.store, f"{self.folder}/{name}") if made else None

    def names(self) -> list[str]:
        found: list[str] = patiently(self.url, lambda: self.store.names(self.folder))
        return found

    def read(self, name: str) -> bytes:
        content: bytes = patiently(self.url, lambda: self.store.read(f"{self.folder}/{name}"))
        return content

    def remove(self, name: str) -> None:
        patiently(self.url, lambda: self.store.remove(f"{self.folder}/{name}"))

    def clear(self) -> None:
        """Remove all claims: of a folder that is deleted."""
        for name in self.names():
            if _is_claim(name, True):
                self.remove(name)


class StoreSlip:
    """An object cannot be written in part: what it begins with is replaced, and all of it is written."""

    def __init__(self, store: Store, name: str) -> None:
        self._store, self._name, self._content = store, name, ""

    def write(self, text: str) -> None:
        self._content = text + self._content[len(text) :]
        try:
            self._store.write(self._name, self._content.encode())
        except Exception as error:
            raise StoreError(f"{self._name}: {_line(error)}") from None

    def close(self) -> None:
        pass
