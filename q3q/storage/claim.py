"""Who is at work on what in a storage folder: whoever runs a trial, or a sweep, claims it first.

A claim is a file that its holder creates, in a way that only one can (O_EXCL, which NFS keeps too), and in which it
counts up while it lives. Generations of claims are numbered and a number is never used again, so nobody can take a new
claim for the dead one that it saw before. Whether a holder is dead is never asked of a wall clock:

- of a process in the same place (machine, boot, and container), the kernel knows;
- of any other, whoever wants the claim watches the counter, and takes over what stood still for `SILENT_SECONDS` of its
  own monotonic clock. A holder that only slept sees at its next beat that it has lost the claim.

Where claims lie is a *board*: a folder, or (`q3q.storage.mirror`) an object store, which beats and looks more slowly.
"""

import json
import os
import platform
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from q3q.errors import Q3QError

BEAT_SECONDS = 5.0  # between two beats of a holder
SILENT_SECONDS = 60.0  # without a beat, after which a holder elsewhere is dead: NFS may keep a file's end back for 30
LOOK_SECONDS = 0.5  # between two looks at a claim that another has
WIDTH = 20  # bytes of the counter
FREE = "free".ljust(WIDTH)  # in the counter's place: its holder is through


class ClaimLostError(Q3QError):
    """Another process took this one for dead, and goes on in its place."""


@dataclass(frozen=True, kw_only=True)
class Holder:
    """A process that has a claim. place: machine, boot and container. born: when the process began, as its kernel
    counts. since: when it took the claim by its own clock, for people."""

    host: str
    pid: int
    place: str
    born: str
    since: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"

    @classmethod
    def here(cls) -> "Holder":
        since = datetime.now(UTC).isoformat(sep=" ", timespec="seconds").replace("+00:00", " UTC")
        return cls(
            host=platform.node(),
            pid=os.getpid(),
            place=_place(),
            born=_born(os.getpid()),
            since=since,
        )

    def dead(self) -> bool | None:
        """Whether it certainly is; None if that cannot be known from here."""
        if self.place != _place():
            return None
        return not runs(self.pid) or _born(self.pid) != self.born


NOBODY = Holder(
    host="?", pid=0, place="", born="", since="?"
)  # of a claim that is being written, or was torn


class Slip(Protocol):
    """A file that this process put on a board, and which is written in place, whatever lies under its name by now."""

    def write(self, text: str) -> None:
        """At the file's start. Raises OSError."""

    def close(self) -> None: ...


class Board(Protocol):
    """A place for claims. beat, silent, look: seconds, see the constants; of this place."""

    beat: float
    silent: float
    look: float

    def create(self, name: str) -> Slip | None:
        """A new file, with nothing in it or its first content; None if there is one of that name."""

    def names(self) -> list[str]: ...

    def read(self, name: str) -> bytes:
        """Raises FileNotFoundError."""

    def remove(self, name: str) -> None:
        """Whether it is there or not."""


class FolderBoard:
    """A folder on a disk, or of a file server."""

    beat, silent, look = BEAT_SECONDS, SILENT_SECONDS, LOOK_SECONDS

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __str__(self) -> str:
        return str(self.folder)

    def create(self, name: str) -> "_OpenFile | None":
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            file = os.open(self.folder / name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return None
        return _OpenFile(self.folder / name, file)

    def names(self) -> list[str]:
        try:
            return os.listdir(self.folder)
        except FileNotFoundError:
            return []

    def read(self, name: str) -> bytes:
        """Opened anew each time: NFS then asks its server."""
        return (self.folder / name).read_bytes()

    def remove(self, name: str) -> None:
        (self.folder / name).unlink(missing_ok=True)


class _OpenFile:
    def __init__(self, path: Path, file: int) -> None:
        self._path, self._file = path, file

    def write(self, text: str) -> None:
        content = text.encode()
        if os.pwrite(self._file, content, 0) != len(content):
            raise OSError(f"{self._path} could not be written whole")
        os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)


class Claim:
    """A claim on `name` in a folder or on another board, not taken yet. beat, silent: None for the board's own."""

    def __init__(
        self,
        where: Path | Board,
        name: str,
        *,
        beat: float | None = None,
        silent: float | None = None,
    ) -> None:
        self.board: Board = FolderBoard(where) if isinstance(where, Path) else where
        self.name = name
        self.beat = self.board.beat if beat is None else beat
        self.silent = self.board.silent if silent is None else silent
        self.lost = False
        self.heard = False  # whether the holder that `take` named certainly lives
        self._number = 0  # of the generation that is ours
        self._slip: Slip | None = None
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None
        self._watched: tuple[int, str] = (0, "")  # generation and counter at the last look, and
        self._since = 0.0  # monotonic seconds when they were first seen

    def take(self) -> Holder | None:
        """Try once. None: it is ours. Else who has it; ask again, for it is by asking that a death is noticed."""
        while True:
            newest = self._newest()
            holder = self._living(newest) if newest else None
            if holder is not None:
                return holder
            if self._create(newest + 1):
                break
        self._thread = threading.Thread(
            target=self._keep_beating, name=f"q3q-claim-{self.name}", daemon=True
        )
        self._thread.start()
        return None

    def release(self) -> None:
        """Give it up. Whoever comes next may take it at once."""
        if self._slip is None:
            return
        self._closing.set()
        if self._thread is not None:
            self._thread.join()
        with suppress(
            OSError
        ):  # a disk or server that takes nothing: it will be seen that this process is gone
            self._slip.write(FREE)
        self._slip.close()
        self._slip = None

    def check(self) -> None:
        """Raises ClaimLostError if somebody else has it by now."""
        if self.lost:
            raise ClaimLostError(
                f"{self.board}/{self.name}: this process was silent too long, and another took over"
            )

    def confirm(self) -> None:
        """`check`, after a look at the board: a process that slept has not beaten yet. Raises what the board raises."""
        self.lost = self.lost or self._newest() != self._number
        self.check()

    def _file(self, number: int) -> str:
        return f"{self.name}.claim.{number}"

    def _newest(self) -> int:
        return max(_generations(self.board, self.name), default=0)

    def _living(self, number: int) -> Holder | None:
        """Who holds a generation; None if it is free, gone, or its holder is dead."""
        try:
            counter, holder = _parsed(self.board.read(self._file(number)))
        except FileNotFoundError:
            return None
        dead = counter == FREE or holder.dead()
        if dead is not None:
            self.heard = not dead
            return None if dead else holder
        if self._watched != (number, counter):
            self.heard = self._watched[0] == number
            self._watched, self._since = (number, counter), time.monotonic()
        return holder if time.monotonic() - self._since < self.silent else None

    def _create(self, number: int) -> bool:
        """Take a generation, unless somebody else is faster."""
        slip = self.board.create(self._file(number))
        if slip is None:
            return False
        self._slip, self._number = slip, number
        self._closing.clear()
        self.lost = False
        try:
            slip.write(f"{1:0{WIDTH}d}\n{json.dumps(asdict(Holder.here()))}\n")
        except OSError:
            self._withdraw()
            raise
        if self._newest() != number:  # what was seen was long ago: others came and went since
            self._withdraw()
            return False
        for older in _generations(self.board, self.name):
            if older < number:
                self.board.remove(self._file(older))
        return True

    def _withdraw(self) -> None:
        assert self._slip is not None
        self._slip.close()
        self._slip = None
        self.board.remove(self._file(self._number))

    def _keep_beating(self) -> None:
        beats, slip = 1, self._slip
        assert slip is not None
        while not self._closing.wait(self.beat):
            beats += 1
            with suppress(
                OSError
            ):  # a full disk or a lost server: if it lasts, the silence says so to others
                slip.write(f"{beats:0{WIDTH}d}")
            with suppress(OSError):
                self.lost = self._newest() != self._number


@contextmanager
def claimed(
    where: Path | Board, name: str, on_wait: Callable[[Holder], object] = lambda holder: None
) -> Iterator[Claim]:
    """Hold a claim; wait for whoever has it. on_wait: told at every look, and may raise."""
    claim = Claim(where, name)
    while (holder := claim.take()) is not None:
        on_wait(holder)
        time.sleep(claim.board.look)
    try:
        yield claim
    finally:
        claim.release()


def claim_or_refuse(
    claim: Claim, refuse: Callable[[Holder], Exception], say: Callable[[str], object]
) -> None:
    """Take a claim, unless its holder lives. Of one elsewhere that takes as long as its silence can last.

    Raises:
        what `refuse` makes of the holder.
    """
    told = False
    while (holder := claim.take()) is not None:
        if claim.heard:
            raise refuse(holder)
        if not told:
            say(
                f"{holder} began this and has not said that it ended: seeing whether it lives, for {claim.silent:g} s"
            )
            told = True
        time.sleep(claim.board.look)


def holder_of(folder: Path, name: str) -> Holder | None:
    """Who has a claim, as far as one look can tell: one elsewhere may be dead. None if nobody has it."""
    try:
        numbers = _generations(FolderBoard(folder), name)
        return Claim(folder, name)._living(max(numbers)) if numbers else None
    except OSError:
        return None


def _generations(board: Board, name: str) -> list[int]:
    found = (re.fullmatch(rf"{re.escape(name)}\.claim\.(\d+)", one) for one in board.names())
    return [int(one[1]) for one in found if one]


def _parsed(content: bytes) -> tuple[str, Holder]:
    """Counter and holder; NOBODY where they are not whole."""
    text = content.decode(errors="replace")
    try:
        return text[:WIDTH], Holder(**json.loads(text[WIDTH + 1 :]))
    except (ValueError, TypeError):
        return text[:WIDTH], NOBODY


def _place() -> str:
    """What two processes share that can see each other's ids."""
    parts = [platform.node()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _born(pid: int) -> str:
    """When a process began, in ticks since boot, so that a number that was given anew is told from the old one."""
    return "".join(_stat(pid)[19:20])


def runs(pid: int) -> bool:
    """Whether there is such a process on this machine, and it is not dead."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return _stat(pid)[:1] not in (["Z"], ["X"])  # dead, and not yet buried by its parent


def _stat(pid: int) -> list[str]:
    """What Linux tells of a process, from its state on; nothing elsewhere."""
    try:
        return (
            Path(f"/proc/{pid}/stat")
            .read_text(encoding="utf-8", errors="replace")
            .rpartition(")")[2]
            .split()
        )
    except OSError:
        return []
