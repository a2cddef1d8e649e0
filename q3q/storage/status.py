"""What a running sweep tells other terminals: a small file in its storage folder, written anew every other second."""

import json
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from q3q.masking import masked
from q3q.spec import Json
from q3q.storage.claim import Holder
from q3q.storage.files import write_atomically

EVERY_SECONDS = 2.0
LOOK_SECONDS = 0.5  # between two looks at a sweep's file
HEARD_SECONDS = 6.0  # within which a sweep on another machine must write anew, to be seen at work
SILENT_SECONDS = 60.0  # without a new word, after which one that was seen at work counts as gone
KEPT_SECONDS = (
    86_400.0  # what a sweep that is over, or gone, leaves is swept away by the next one after a day
)
LAST_LINES = 40


@dataclass(frozen=True, kw_only=True)
class Work:
    """A trial at work. share: of it that is done, 0 to 1. seconds: so far; left: expected, None if unknown."""

    trial: str
    name: str
    doing: str
    share: float
    seconds: float
    left: float | None


@dataclass(frozen=True, kw_only=True)
class View:
    """A sweep at one moment. total, ended, failed: trials (ended counts the failed). seconds, left: as in `Work`."""

    total: int
    ended: int
    failed: int
    seconds: float
    left: float | None
    running: tuple[Work, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SweepStatus:
    """One sweep's file. holder: the process that drives it. updated: seconds since 1970 by its own clock, for people;
    that it changes is a sign of life. lines: the last that it said, numbered since it began."""

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
        """Whether it goes on; None if that cannot be known from here, of another machine's: see whether it changes."""
        dead = self.over or self.holder.dead()
        return None if dead is None else not dead

    def to_json(self) -> Json:
        return asdict(self)

    @classmethod
    def load(cls, path: Path) -> "SweepStatus":
        data = json.loads(path.read_text(encoding="utf-8"))
        view = data["view"]
        running = tuple(Work(**work) for work in view["running"])
        lines = tuple((int(number), str(line)) for number, line in data["lines"])
        holder = Holder(**data["holder"])
        return cls(
            **{
                **data,
                "holder": holder,
                "view": View(**{**view, "running": running}),
                "lines": lines,
            }
        )


def sweep_statuses(storage: Path) -> list[SweepStatus]:
    """Of all sweeps in a storage folder: those that have not ended first, then the newest."""
    found = []
    for path in (storage / "running").glob("*.json"):
        try:
            found.append(SweepStatus.load(path))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # another version's: it tells nothing that could be understood here
    return sorted(found, key=lambda one: (one.lives() is False, -one.updated))


def at_work(
    storage: Path, fetch: Callable[[], object] = lambda: None, patience: float | None = None
) -> list[SweepStatus]:
    """The sweeps of a storage folder that go on. One on another machine is watched until it is written anew.

    fetch: brings the files, of a storage that is a URL. patience: seconds to watch at most, None for HEARD_SECONDS.
    """
    known = {one.key: one for one in sweep_statuses(storage)}
    silent = {key for key, one in known.items() if one.lives() is None}
    deadline = time.monotonic() + (HEARD_SECONDS if patience is None else patience)
    while silent and time.monotonic() < deadline:
        time.sleep(LOOK_SECONDS)
        fetch()
        for one in sweep_statuses(storage):
            if one.key in silent and one.updated != known[one.key].updated:
                known[one.key] = one
                silent.remove(one.key)
    return [one for key, one in known.items() if one.lives() is not False and key not in silent]


class StatusWriter:
    """Writes the bulletin of this process's sweep, in a thread of its own.

    storage: the sweep's. on_error: told if a bulletin cannot be written; the sweep goes on without.
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
        self._said = 0
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, view: Callable[[], View], on_error: Callable[[Exception], None]) -> None:
        self._view, self._on_error = view, on_error
        self._thread = threading.Thread(
            target=self._publish_until_closed, name="q3q-bulletin", daemon=True
        )
        self._thread.start()

    def say(self, line: str) -> None:
        self._said += 1
        self._lines.append((self._said, line))

    def close(self) -> None:
        """Say that the sweep is over."""
        if self._thread is not None:
            self._closing.set()
            self._thread.join()
            self._publish(over=True)

    def _publish_until_closed(self) -> None:
        self._tidy()
        while True:
            self._publish(over=False)
            if self._closing.wait(EVERY_SECONDS):
                return

    def _publish(self, *, over: bool) -> None:
        try:
            now = replace(
                self._base,
                view=self._view(),
                updated=time.time(),
                over=over,
                lines=tuple(self._lines),
            )
            write_atomically(self.folder / f"{now.key}.json", json.dumps(now.to_json()).encode())
        except Exception as error:
            self._on_error(error)

    def _tidy(self) -> None:
        for old in sweep_statuses(
            self.folder.parent
        ):  # one elsewhere whose clock is wrong writes its own anew
            if not old.lives() and abs(time.time() - old.updated) > KEPT_SECONDS:
                (self.folder / f"{old.key}.json").unlink(missing_ok=True)
