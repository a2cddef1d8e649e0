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
import json
import re
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from q3q.masking import masked
from q3q.storage.claim import ClaimLostError
from q3q.storage.stores import (
    FolderStore,
    Store,
    StoreError,
    files_below,
    is_url,
    mirror_of,
    one_line,
    open_store,
    refuse_unusable,
    with_retries,
)

KNOWN = ".known"  # in a mirror: of each file, what was last exchanged
EVERY_SECONDS = 5.0  # between two rounds of a worker's courier, and
DRIVER_SECONDS = 10.0  # of a driver's
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
            there = with_retries(self.url, functools.partial(self.store.find, prefix))
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
            with_retries(self.url, functools.partial(self.store.remove, name))
            self._record(name).unlink(missing_ok=True)
        return len(changed) + len(gone)

    def offer(self, prefix: str) -> None:
        """Send what is below a prefix if nothing is there: of a cache, which others would compute likewise."""
        new = any(self._is_changed(name) for name in self._here(prefix))
        if new and not with_retries(self.url, lambda: self.store.find(prefix)):
            self.push(prefix)

    def remove(self, prefix: str) -> None:
        """Delete all below a prefix there, claims excepted; what is here is the caller's."""
        for name in with_retries(self.url, functools.partial(self.store.find, prefix)):
            if not _is_claim(name, True):
                with_retries(self.url, functools.partial(self.store.remove, name))
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
                now = with_retries(self.url, functools.partial(self.store.mark, name))
                if now is None or (known is not None and known.mark == now):
                    return
                mark = now
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
            try:
                with_retries(self.url, functools.partial(self.store.get, name, partial))
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
                with_retries(self.url, functools.partial(self.store.put, name, path))
                mark = with_retries(self.url, functools.partial(self.store.mark, name))
            except FileNotFoundError as error:
                if path.exists():
                    raise StoreError(
                        f"storage={masked(self.url)} is gone ({one_line(error)})"
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
        return [name for name in files_below(self.folder, prefix) if _travels(name)]

    def _known(self, prefix: str) -> list[str]:
        return files_below(self.folder / KNOWN, prefix)

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


class Uploader:
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
def uploading(
    mirror: Mirror,
    *prefixes: str,
    every: float | None = None,
    sure: Callable[[], object] = lambda: None,
) -> Iterator[Uploader]:
    """A courier for the time of some work; at its end, however it ends, all is sent. every: EVERY_SECONDS if None.

    Raises:
        StoreError: it could not be. What `sure` raises.
    """
    courier = Uploader(
        mirror, *prefixes, every=EVERY_SECONDS if every is None else every, sure=sure
    )
    try:
        yield courier
    except BaseException:
        courier.stop()
        with suppress(OSError, ClaimLostError):  # the first error is the one to hear of
            courier.deliver()
        raise
    courier.stop()
    courier.deliver()


class StoreBoard:
    """Claims in a folder of a store: `q3q.storage.claim.Board`."""

    def __init__(self, url: str, store: Store, folder: str) -> None:
        self.url, self.store, self.folder = url, store, folder
        self.beat, self.silent = BEAT_SECONDS, SILENT_SECONDS
        self.look = 0.5 if isinstance(store, FolderStore) else LOOK_SECONDS

    def __str__(self) -> str:
        return f"{masked(self.url)}/{self.folder}"

    def create(self, name: str) -> "StoreSlip | None":
        """It holds nothing yet but a number that no other process draws."""
        content = secrets.token_hex(16).encode()
        made = with_retries(self.url, lambda: self.store.create(f"{self.folder}/{name}", content))
        return StoreSlip(self.store, f"{self.folder}/{name}") if made else None

    def names(self) -> list[str]:
        found: list[str] = with_retries(self.url, lambda: self.store.names(self.folder))
        return found

    def read(self, name: str) -> bytes:
        content: bytes = with_retries(self.url, lambda: self.store.read(f"{self.folder}/{name}"))
        return content

    def remove(self, name: str) -> None:
        with_retries(self.url, lambda: self.store.remove(f"{self.folder}/{name}"))

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
            raise StoreError(f"{self._name}: {one_line(error)}") from None

    def close(self) -> None:
        pass
