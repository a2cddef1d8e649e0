"""Claims: at most one live process runs a trial or drives a sweep of a storage folder.

A claim is a lease with a heartbeat. It is a file that only one process can create (O_EXCL, which
NFS keeps too); its holder increments a counter in it while it lives. Claims have generation numbers
that are never used again, so nobody mistakes a new claim for the dead one that it saw before. No
wall clock decides whether a holder is dead:

- The kernel is asked about a process in the same place (machine, boot, and container).
- For any other holder, whoever wants the claim watches the counter. If the counter stands still for
  `SILENT_SECONDS` of the watcher's monotonic clock, the watcher takes the claim over. A holder that
  only slept sees at its next heartbeat that it has lost the claim.

A `ClaimStore` is where claims lie: a folder, or an object store (`q3q.storage.object_claims`),
whose heartbeats and polls are slower.
"""

import json
import os
import platform
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import psutil

from q3q.errors import Q3QError
from q3q.storage.aside import clear_for_file, clear_for_folder
from q3q.storage.files import NoFileError, make_folder, read_file

HEARTBEAT_SECONDS = 5.0
# Silence after which a holder elsewhere is dead; NFS may keep a change back for 30 seconds.
SILENT_SECONDS = 60.0
POLL_SECONDS = 0.5
WIDTH = 20  # bytes of the counter
FREE = "free".ljust(WIDTH)  # replaces the counter of a released claim


class ClaimLostError(Q3QError):
    """Another process took this one for dead, and continues in its place."""


@dataclass(frozen=True, kw_only=True)
class Holder:
    """A process that has a claim. The fields are the keys of the claim file."""

    host: str
    pid: int
    place: str  # machine, boot and container
    born: str  # when the process started, see `_start_time`
    since: str  # when it took the claim by its own wall clock, for people to read

    def __str__(self) -> str:
        if self == UNKNOWN_HOLDER:
            return "a process whose claim cannot be read"
        return f"process {self.pid} on {self.host}, since {self.since}"

    @classmethod
    def here(cls) -> "Holder":
        since = datetime.now(UTC).isoformat(sep=" ", timespec="seconds").replace("+00:00", " UTC")
        pid = os.getpid()
        return cls(
            host=platform.node(), pid=pid, place=_place(), born=_start_time(pid), since=since
        )

    def dead(self) -> bool | None:
        """Return True if the process is certainly dead, None if this process cannot know."""
        if self.place != _place():
            return None
        if not runs(self.pid):
            return True
        started = _start_time(self.pid)
        return started != self.born if started and self.born else None


# Stands for the holder of a claim file that is being written, or was torn.
UNKNOWN_HOLDER = Holder(host="?", pid=0, place="", born="", since="?")


class ClaimFile(Protocol):
    """A file that this process created, written in place even if its name is now another file's."""

    def write(self, text: str) -> None:
        """Write at the file's start. Raises OSError."""

    def close(self) -> None: ...


class ClaimStore(Protocol):
    """A place for claim files. heartbeat, silence, poll: this place's seconds."""

    heartbeat: float
    silence: float
    poll: float

    def create(self, name: str) -> ClaimFile | None:
        """Create a file, empty or with a first content; return None if the name exists."""

    def names(self) -> list[str]: ...

    def read(self, name: str) -> bytes:
        """Return a file's content. Raises FileNotFoundError."""

    def remove(self, name: str) -> None:
        """Remove a file if it exists."""


class FolderClaimStore:
    """A folder on a local disk or a file server."""

    heartbeat, silence, poll = HEARTBEAT_SECONDS, SILENT_SECONDS, POLL_SECONDS

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __str__(self) -> str:
        return str(self.folder)

    def create(self, name: str) -> "_LocalClaimFile | None":
        clear_for_folder(self.folder)
        make_folder(self.folder)
        try:
            file = os.open(self.folder / name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return None
        return _LocalClaimFile(self.folder / name, file)

    def names(self) -> list[str]:
        try:
            return os.listdir(self.folder)
        except (FileNotFoundError, NotADirectoryError):
            return []

    def read(self, name: str) -> bytes:
        try:
            return read_file(self.folder / name)  # opening it anew makes NFS ask its server
        except NoFileError as error:  # nobody can hold it
            raise FileNotFoundError(str(error)) from error

    def remove(self, name: str) -> None:
        path = self.folder / name
        clear_for_file(path)
        path.unlink(missing_ok=True)


class _LocalClaimFile:
    def __init__(self, path: Path, file: int) -> None:
        self._path, self._file = path, file

    def write(self, text: str) -> None:
        content = text.encode()
        if os.pwrite(self._file, content, 0) != len(content):
            raise OSError(f"{self._path} could not be written completely")
        os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)


class Claim:
    """A claim on `name`, not taken yet.

    Args:
        where: a folder, or another store of claims.
        heartbeat: seconds between two heartbeats; the store's own if None.
        silence: seconds after which a silent holder is dead; the store's own if None.
    """

    def __init__(
        self,
        where: Path | ClaimStore,
        name: str,
        *,
        heartbeat: float | None = None,
        silence: float | None = None,
    ) -> None:
        self.store: ClaimStore = FolderClaimStore(where) if isinstance(where, Path) else where
        self.name = name
        self.heartbeat = self.store.heartbeat if heartbeat is None else heartbeat
        self.silence = self.store.silence if silence is None else silence
        self.lost = False
        self.holder_lives = False  # the holder that `take` returned is certainly alive
        self._number = 0  # our generation
        self._file: ClaimFile | None = None
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._watched: tuple[int, str] = (0, "")  # generation and counter at the last poll, and
        self._since = 0.0  # monotonic seconds when they were first seen

    def take(self) -> Holder | None:
        """Try once to take the claim. Return None if it is ours, else its holder.

        Call it again to wait: only repeated calls notice that a holder elsewhere died.
        """
        while True:
            newest = self._newest()
            holder = self._living(newest) if newest else None
            if holder is not None:
                return holder
            if self._create(newest + 1):
                break
        self._thread = threading.Thread(
            target=self._send_heartbeats, name=f"q3q-claim-{self.name}", daemon=True
        )
        self._thread.start()
        return None

    def release(self) -> None:
        """Give the claim up; the next process may take it at once."""
        if self._file is None:
            return
        self._closing.set()
        if self._thread is not None:
            self._thread.join()
        with suppress(OSError):  # nothing can be written: others will see that this process ended
            self._file.write(FREE)
        self._file.close()
        self._file = None

    def check(self) -> None:
        """Raise ClaimLostError if the last heartbeat found that another process has the claim."""
        if self.lost:
            raise ClaimLostError(
                f"{self.store}/{self.name}: this process was silent too long, and another took over"
            )

    def confirm(self) -> None:
        """`check` after asking the store, as a process that slept has sent no heartbeat yet.

        Raises:
            ClaimLostError: another process has the claim. Also what the store raises.
        """
        self.lost = self.lost or self._newest() != self._number
        self.check()

    def _file_name(self, number: int) -> str:
        return f"{self.name}.claim.{number}"

    def _newest(self) -> int:
        return max(_generations(self.store, self.name), default=0)

    def _living(self, number: int) -> Holder | None:
        """Return a generation's holder; None if it is free, removed, or its holder is dead."""
        try:
            counter, holder = _parsed(self.store.read(self._file_name(number)))
        except FileNotFoundError:
            return None
        dead = counter == FREE or holder.dead()
        if dead is not None:
            self.holder_lives = not dead
            return None if dead else holder
        if self._watched != (number, counter):
            self.holder_lives = self._watched[0] == number
            self._watched, self._since = (number, counter), time.monotonic()
        return holder if time.monotonic() - self._since < self.silence else None

    def _create(self, number: int) -> bool:
        """Take a generation; return False if another process was faster."""
        file = self.store.create(self._file_name(number))
        if file is None:
            return False
        self._file, self._number = file, number
        self._closing.clear()
        self.lost = False
        try:
            file.write(f"{1:0{WIDTH}d}\n{json.dumps(asdict(Holder.here()))}\n")
        except OSError:
            self._withdraw()
            raise
        if self._newest() != number:  # this process slept meanwhile, and others took newer ones
            self._withdraw()
            return False
        for older in _generations(self.store, self.name):
            if older < number:
                self.store.remove(self._file_name(older))
        return True

    def _withdraw(self) -> None:
        assert self._file is not None
        self._file.close()
        self._file = None
        self.store.remove(self._file_name(self._number))

    def _send_heartbeats(self) -> None:
        count, file = 1, self._file
        assert file is not None
        while not self._closing.wait(self.heartbeat):
            count += 1
            with suppress(OSError):  # a full disk or a lost server: if it lasts, others see silence
                file.write(f"{count:0{WIDTH}d}")
            with suppress(OSError):
                self.lost = self._newest() != self._number


@contextmanager
def claimed(
    where: Path | ClaimStore, name: str, on_wait: Callable[[Holder], object] = lambda holder: None
) -> Iterator[Claim]:
    """Hold a claim, after waiting for its present holder.

    Args:
        on_wait: receives the holder at every poll; may raise to stop waiting.
    """
    claim = Claim(where, name)
    while (holder := claim.take()) is not None:
        on_wait(holder)
        time.sleep(claim.store.poll)
    try:
        yield claim
    finally:
        claim.release()


def claim_or_refuse(
    claim: Claim, refuse: Callable[[Holder], Exception], say: Callable[[str], object]
) -> None:
    """Take a claim unless its holder lives. For a holder elsewhere this may take `claim.silence`.

    Raises:
        the exception that `refuse` makes from the living holder.
    """
    announced = False
    while (holder := claim.take()) is not None:
        if claim.holder_lives:
            raise refuse(holder)
        if not announced:
            say(
                f"{holder} began this and did not report its end: "
                f"checking for {claim.silence:g} s whether it still runs"
            )
            announced = True
        time.sleep(claim.store.poll)


# By place and name: what this process last saw of a holder elsewhere, and when it first saw that.
_remembered: dict[tuple[str, str], tuple[tuple[int, str], float]] = {}


@contextmanager
def remembered(where: Path | ClaimStore, name: str) -> Iterator[Claim]:
    """Yield a claim that remembers this process's earlier observations.

    Occasional checks then detect a dead holder on another machine.
    """
    claim = Claim(where, name)
    key = str(claim.store), name
    claim._watched, claim._since = _remembered.get(key, (claim._watched, claim._since))
    try:
        yield claim
    finally:
        _remembered[key] = claim._watched, claim._since


def seen_holder_of(where: Path | ClaimStore, name: str) -> Holder | None:
    """Return a claim's holder, None if it is free or this process saw a long silence.

    Raises:
        OSError: the claim cannot be read.
    """
    with remembered(where, name) as claim:
        newest = claim._newest()
        return claim._living(newest) if newest else None


def holder_of(where: Path | ClaimStore, name: str) -> Holder | None:
    """Return a claim's holder, None if it is free. A holder elsewhere may be dead all the same."""
    claim = Claim(where, name)
    try:
        newest = claim._newest()
        return claim._living(newest) if newest else None
    except OSError:
        return None


def _generations(store: ClaimStore, name: str) -> list[int]:
    pattern = re.compile(rf"{re.escape(name)}\.claim\.(\d+)")
    return [int(match[1]) for match in map(pattern.fullmatch, store.names()) if match]


def _parsed(content: bytes) -> tuple[str, Holder]:
    """Return counter and holder; UNKNOWN_HOLDER if the content is incomplete."""
    text = content.decode(errors="replace")
    try:
        return text[:WIDTH], Holder(**json.loads(text[WIDTH + 1 :]))
    except (ValueError, TypeError):
        return text[:WIDTH], UNKNOWN_HOLDER


def _place() -> str:
    """Return what two processes have in common if they can see each other's ids."""
    parts = [platform.node()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _start_time(pid: int) -> str:
    """Return when a process started, to tell it from a later one with its id; "" if unknown.

    Linux: clock ticks since boot. psutil adds the boot time to them, which moves whenever the wall
    clock is set. Elsewhere: psutil's seconds since 1970.
    """
    try:
        if sys.platform == "linux":
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
            return stat.rpartition(")")[2].split()[19]
        return str(psutil.Process(pid).create_time())
    except (OSError, psutil.Error):
        return ""


def runs(pid: int) -> bool:
    """Return whether the process exists on this machine and is no zombie."""
    try:
        os.kill(pid, 0)  # asked first: /proc may hide another user's process from psutil
        return psutil.Process(pid).status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False
    except (PermissionError, psutil.AccessDenied):
        return True
