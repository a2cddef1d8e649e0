"""A running sweep's status file, which other terminals read: rewritten every other second."""

import json
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from q3q.errors import UNREADABLE
from q3q.masking import masked
from q3q.spec import Json
from q3q.storage.claim import Holder
from q3q.storage.files import read_file, write_atomically

EVERY_SECONDS = 2.0
POLL_SECONDS = 0.5  # between two reads of a status file
HEARD_SECONDS = 6.0  # a sweep on another machine that writes within this time is running
SILENT_SECONDS = 60.0  # one that was running and writes nothing for this long is gone
KEPT_SECONDS = 86_400.0  # the next sweep deletes status files of ended sweeps after a day
LAST_LINES = 40


@dataclass(frozen=True, kw_only=True)
class RunningTrial:
    """A running trial.

    share: done so far, 0 to 1
    seconds, left: so far, and expected (None if unknown)
    """

    trial: str
    name: str
    doing: str
    share: float
    seconds: float
    left: float | None


@dataclass(frozen=True, kw_only=True)
class View:
    """A sweep at one moment.

    total, ended, failed: numbers of trials; failed ones have ended too
    seconds, left: as in `RunningTrial`
    """

    total: int
    ended: int
    failed: int
    seconds: float
    left: float | None
    running: tuple[RunningTrial, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SweepStatus:
    """One sweep's status file.

    holder: the process that drives the sweep
    updated: seconds since 1970 by its clock; that it changes is a sign of life
    lines: the last lines that it printed, numbered from its start
    """

    name: str
    command: str
    holder: Holder
    view: View
    updated: float
    over: bool = False
    lines: tuple[tuple[int, str], ...] = ()

    @property
    def key(self) -> str:
        return f"{self.holder.host}-{self.holder.pid}"

    def lives(self) -> bool | None:
        """Return None for a sweep on another machine: see whether its file changes."""
        dead = self.over or self.holder.dead()
        return None if dead is None else not dead

    def to_json(self) -> Json:
        return asdict(self)

    @classmethod
    def load(cls, path: Path) -> "SweepStatus":
        data = json.loads(read_file(path))
        running = tuple(RunningTrial(**work) for work in data["view"]["running"])
        return cls(
            **data
            | {
                "holder": Holder(**data["holder"]),
                "view": View(**data["view"] | {"running": running}),
                "lines": tuple((int(number), str(line)) for number, line in data["lines"]),
            }
        )


def sweep_statuses(storage: Path) -> list[SweepStatus]:
    """Return all sweeps of a storage folder: running ones first, then the newest."""
    statuses = []
    for path in (storage / "running").glob("*.json"):
        try:
            statuses.append(SweepStatus.load(path))
        except UNREADABLE:
            continue  # another version wrote it
    return sorted(statuses, key=lambda status: (status.lives() is False, -status.updated))


def at_work(
    storage: Path, fetch: Callable[[], object] = lambda: None, patience: float | None = None
) -> list[SweepStatus]:
    """Return running sweeps; watch the file of one on another machine until it changes.

    Args:
        fetch: pulls the files of a storage that is a URL.
        patience: most seconds to watch, HEARD_SECONDS if None.
    """
    statuses = {status.key: status for status in sweep_statuses(storage)}
    silent = {key for key, status in statuses.items() if status.lives() is None}
    deadline = time.monotonic() + (HEARD_SECONDS if patience is None else patience)
    while silent and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
        fetch()
        for status in sweep_statuses(storage):
            if status.key in silent and status.updated != statuses[status.key].updated:
                statuses[status.key] = status
                silent.remove(status.key)
    silent |= {key for key, status in statuses.items() if status.lives() is False}
    return [status for key, status in statuses.items() if key not in silent]


class StatusWriter:
    """A thread that writes the status file of this process's sweep.

    storage: the sweep's
    on_error: receives an error of writing; the sweep goes on without a file
    """

    def __init__(self, storage: Path, name: str, command: str) -> None:
        self.folder = storage / "running"
        self._base = SweepStatus(
            name=name,
            command=masked(command),
            holder=Holder.here(),
            view=View(total=0, ended=0, failed=0, seconds=0.0, left=None),
            updated=0.0,
        )
        self._lines: deque[tuple[int, str]] = deque(maxlen=LAST_LINES)
        self._count = 0
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, view: Callable[[], View], on_error: Callable[[Exception], None]) -> None:
        self._view, self._on_error = view, on_error
        self._thread = threading.Thread(
            target=self._write_until_closed, name="q3q-status", daemon=True
        )
        self._thread.start()

    def say(self, line: str) -> None:
        self._count += 1
        self._lines.append((self._count, line))

    def close(self) -> None:
        """Write that the sweep is over."""
        if self._thread is not None:
            self._closing.set()
            self._thread.join()
            self._write(over=True)

    def _write_until_closed(self) -> None:
        self._tidy()
        while True:
            self._write(over=False)
            if self._closing.wait(EVERY_SECONDS):
                return

    def _write(self, *, over: bool) -> None:
        try:
            now = replace(
                self._base,
                view=self._view(),
                updated=time.time(),
                over=over,
                lines=tuple(self._lines),
            )
            content = json.dumps(now.to_json()).encode()
            # Nobody needs it after a power cut.
            write_atomically(self.folder / f"{now.key}.json", content, wait=False)
        except Exception as error:
            self._on_error(error)

    def _tidy(self) -> None:
        # A sweep elsewhere whose clock is wrong rewrites its file.
        for old in sweep_statuses(self.folder.parent):
            if not old.lives() and abs(time.time() - old.updated) > KEPT_SECONDS:
                (self.folder / f"{old.key}.json").unlink(missing_ok=True)
