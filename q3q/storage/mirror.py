"""The local mirror of a storage that is a URL (s3://bucket/prefix, gs://..., file:///...).

An object store has neither renames nor locks nor files that grow, and a trial needs all three. So
a trial works in a folder of its machine, and an uploader sends new and changed files to the store
every few seconds; a process that goes on elsewhere pulls them first. A machine may die at any
moment: blocks, measurements and records carry checksums, so that whichever of a trial's files
arrived can be trusted.

A mirror remembers each file's last exchange: the store's mark (ETag, generation), and the local
size and time of change. So it knows which side has changed. If both have, the store's file wins.
"""

import fcntl
import functools
import json
import secrets
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from q3q.errors import UNREADABLE
from q3q.masking import masked
from q3q.storage.aside import clear_for_file, is_aside
from q3q.storage.files import install, make_folder, read_file
from q3q.storage.leases import lease_of, unless_leased
from q3q.storage.object_claims import ObjectClaimStore, is_claim
from q3q.storage.stores import (
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
AT_ONCE = 8  # transfers
# These vouch for other files, and so are sent and fetched after them.
LAST = ("manifest.json", "q3q.json", "record.json")


def mirror_at(storage: str) -> "Mirror | None":
    return Mirror(storage) if is_url(storage) else None


def mirror_for(store: str | None) -> "Mirror | None":
    """Return the mirror of a trial's store; None for folders that every node sees."""
    return None if store is None else Mirror(store)


def refreshed(storage: str) -> Path:
    """Return the storage's folder here; of a URL, after pulling what plans and reports read.

    That is everything but tensors and unfinished measurements; of exports, markers and cards.

    Raises:
        ConfigError: the URL cannot be used.
        StoreError: the store does not answer.
    """
    mirror = mirror_at(storage)
    if mirror is None:
        return Path(storage)
    refuse_unusable(storage)
    mirror.folder.mkdir(parents=True, exist_ok=True)
    mirror.pull("sweeps", "running", "trials", "exports", only=is_light, claims=True)
    return mirror.folder


def is_light(name: str) -> bool:
    """Return True for a file that `refreshed` pulls."""
    if name.startswith("exports/"):
        return name.endswith(("/q3q.json", "/README.md"))
    return not name.endswith(".safetensors") and "/evaluations/" not in name


@dataclass(frozen=True)
class Exchanged:
    """A file at its last exchange: the store's mark, and the local size and time of change."""

    mark: str
    state: tuple[int, int]


class Mirror:
    """The local folder of a URL. Several processes of a machine may share it."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self.folder = mirror_of(url)

    @functools.cached_property
    def store(self) -> Store:
        return open_store(self.url)

    def claim_store(self, folder: str) -> "ObjectClaimStore":
        return ObjectClaimStore(self.url, self.store, folder)

    def name_of(self, path: Path) -> str | None:
        """Return the name in the store of a file or folder; None if it lies outside the mirror."""
        return str(path.relative_to(self.folder)) if path.is_relative_to(self.folder) else None

    def pull(
        self, *prefixes: str, only: Callable[[str], bool] = lambda name: True, claims: bool = False
    ) -> None:
        """Fetch what is new or changed in the store; delete here what was deleted there.

        Files changed here alone since the last exchange stay as they are. Those in a folder that
        somebody here has a lease on go with a later pull.

        Args:
            claims: fetch claims too, to be looked at.
        """
        for prefix in prefixes:
            # Read before the store is listed: what another process sends meanwhile is no old file.
            known = {name: _read_exchanged(self._record(name)) for name in self._known(prefix)}
            marks = with_retries(self.url, functools.partial(self.store.find, prefix))
            marks = {
                name: mark
                for name, mark in marks.items()
                if only(name) and (_travels(name) or (claims and is_claim(name)))
            }
            self._in_order(marks, functools.partial(self._fetch, marks=marks))
            for name, exchanged in known.items():
                if name not in marks and only(name) and exchanged is not None:
                    lease = lease_of((self.folder / name).parent)
                    with unless_leased(*[lease] if lease.exists() else []) as free:
                        if free:
                            self._forget(name, exchanged)

    def push(self, *prefixes: str, check_claim: Callable[[], object] = lambda: None) -> int:
        """Send what is new or changed here; then delete in the store what was deleted here.

        Files that vouch for others are sent after them.

        Args:
            check_claim: called before each group of files; if it raises, nothing more is sent.

        Returns:
            The number of files that were sent or deleted.
        """
        changed = [
            name for prefix in prefixes for name in self._here(prefix) if self._is_changed(name)
        ]
        self._in_order(changed, self._send, check_claim)
        gone = [
            name
            for prefix in prefixes
            for name in self._known(prefix)
            # An empty record is of a file that is being fetched, or whose fetch was cut off.
            if not (self.folder / name).exists() and _read_exchanged(self._record(name))
        ]
        if gone:
            check_claim()
        for name in gone:
            with_retries(self.url, functools.partial(self.store.remove, name))
            self._record(name).unlink(missing_ok=True)
        return len(changed) + len(gone)

    def push_if_absent(self, prefix: str) -> None:
        """Upload a cache that other machines would compute too, if the store does not have it."""
        new = any(self._is_changed(name) for name in self._here(prefix))
        if new and not with_retries(self.url, lambda: self.store.find(prefix)):
            self.push(prefix)

    def remove(self, prefix: str, *, last: str = "", later: bool = False) -> None:
        """Delete all below a prefix in the store, but for claims; local files stay.

        Args:
            last: the name of the file that goes last.
            later: local files go with a later pull.
        """
        names = with_retries(self.url, functools.partial(self.store.find, prefix))
        for name in sorted(names, key=lambda name: name.rpartition("/")[2] == last):
            if not is_claim(name):
                with_retries(self.url, functools.partial(self.store.remove, name))
            if not later:
                self._record(name).unlink(missing_ok=True)

    def drop(self, prefix: str) -> None:
        """Delete here what the store has too; no push deletes it there."""
        for name in self._known(prefix):
            self._forget(name)

    def _in_order(
        self,
        names: Any,
        work: Callable[[str], object],
        check_claim: Callable[[], object] = lambda: None,
    ) -> None:
        ranks: dict[int, list[str]] = {}
        for name in dict.fromkeys(names):
            last = name.rpartition("/")[2]
            ranks.setdefault(LAST.index(last) + 1 if last in LAST else 0, []).append(name)
        for _, group in sorted(ranks.items()):
            check_claim()
            if len(group) == 1:
                work(group[0])
                continue
            with ThreadPoolExecutor(AT_ONCE) as threads:
                list(threads.map(work, group))

    def _fetch(self, name: str, marks: Mapping[str, str]) -> None:
        path, mark = self.folder / name, marks[name]
        with self._turn(name) as exchanged:
            state = _state(path)
            if state is not None and exchanged is not None and exchanged.mark == mark:
                return  # the same, or changed here since
            if state is not None:  # another process may have sent it since the store was listed
                now = with_retries(self.url, functools.partial(self.store.mark, name))
                if now is None or (exchanged is not None and exchanged.mark == now):
                    return
                mark = now
            make_folder(path.parent)
            partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
            try:
                with_retries(self.url, functools.partial(self.store.get, name, partial))
                install(partial, path)
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

    def _forget(self, name: str, known: Exchanged | None = None) -> None:
        """Delete a file here that the store has, or had, unless it has changed since.

        Args:
            known: its last exchange; if another one followed, the file stays.
        """
        with self._turn(name) as exchanged:
            if known not in (None, exchanged):
                return
            if exchanged is not None and _state(self.folder / name) == exchanged.state:
                (self.folder / name).unlink(missing_ok=True)
            self._record(name).unlink(missing_ok=True)

    def _is_changed(self, name: str) -> bool:
        exchanged, state = _read_exchanged(self._record(name)), _state(self.folder / name)
        return state is not None and (exchanged is None or exchanged.state != state)

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
        """Let one process of this machine at a time exchange a file.

        A mutex, not a claim: nobody waits for it longer than for one transfer, and the kernel
        releases it when its process dies.
        """
        record = self._record(name)
        record.parent.mkdir(parents=True, exist_ok=True)
        clear_for_file(record)
        with record.open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                yield _read_exchanged(record)
            finally:
                if record.exists() and not record.stat().st_size:
                    record.unlink(missing_ok=True)


def _travels(name: str) -> bool:
    """Return True for files that are exchanged: finished ones, but neither locks nor claims."""
    parts = name.split("/")
    unfinished = any(
        part.startswith(".") or part.endswith(".partial") or ".partial." in part or is_aside(part)
        for part in parts
    )
    return not unfinished and not name.endswith(".lock") and not is_claim(name)


def _state(path: Path) -> tuple[int, int] | None:
    with suppress(OSError):
        status = path.stat()
        return status.st_size, status.st_mtime_ns
    return None


def _read_exchanged(record: Path) -> Exchanged | None:
    try:
        mark, (size, changed) = json.loads(read_file(record))
    except UNREADABLE:
        return None
    return Exchanged(mark, (size, changed))
