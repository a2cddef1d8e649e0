"""What the person at the terminal sees while a sweep runs; plain lines where nobody sits at one."""

import functools
import logging
import math
import os
import re
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TextIO, TypeVar

from q3q.masking import masked
from q3q.record import Progress, TrialRecord
from q3q.storage.status import StatusWriter, View, Work

if TYPE_CHECKING:
    from rich.console import RenderableType

P = ParamSpec("P")
T = TypeVar("T")

FRAME_SECONDS = 0.2  # between two pictures on a terminal
QUIET_SECONDS = 10.0  # after which a plain line says that a phase still goes on
PATIENCE_SECONDS = 3.0  # after which something that comes before the sweep says how far it is
BRIEF_SECONDS = 1.0  # a trial says nothing more so soon after its last plain line: phases shorter than that go unsaid
WIDE = 100  # columns of a terminal with room for bars
MOST_NAMES = 5  # of trials in one line
LONGEST_REASON = 300  # characters of a failure that are shown; its record holds the whole


@dataclass
class Running:
    """A trial at work. share: of its work that is done, 0 to 1."""

    name: str
    started: float
    event: Progress | None = None
    share: float = 0.0
    said: tuple[str, float] = ("", -math.inf)  # phase of its last plain line, and when

    def take(self, event: Progress) -> None:
        self.event = event
        self.share = max(self.share, share_done(event))

    @property
    def doing(self) -> str:
        return "starting" if self.event is None else describe(self.event)


@dataclass
class Pace:
    """How long trials take, and so what is left.

    A running trial's time left is (1 - s) (e + (1 - s) t): s the share of its work that is done, e its seconds so far,
    t the mean of the completed trials of its kind (name without bits), or of all completed ones while its kind has
    none. So the trial's own pace e / s counts the more, the further it is. Without any completed trial it is
    e (1 - s) / s, unknown at s = 0. A waiting trial takes t, or what the running ones are expected to take in all.
    The sweep's time left is the sum of these, divided by the most trials that were ever seen at once, and at least the
    longest running one's.
    """

    # Of completed trials by kind, under "" of all.
    count: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, name: str, seconds: float) -> None:
        for key in (kind(name), ""):
            self.count[key] += 1
            self.seconds[key] += seconds

    def typical(self, name: str = "") -> float | None:
        """Seconds of a completed trial: of the same kind as `name`, if there is one, else of any."""
        key = kind(name) if self.count[kind(name)] else ""
        return self.seconds[key] / self.count[key] if self.count[key] else None

    def trial_left(self, trial: Running, now: float) -> float | None:
        elapsed, rest, typical = (
            max(0.0, now - trial.started),
            1 - trial.share,
            self.typical(trial.name),
        )
        if typical is not None:
            return rest * (elapsed + rest * typical)
        return elapsed * rest / trial.share if trial.share > 0 else None

    def sweep_left(
        self, running: Sequence[Running], waiting: int, at_once: int, now: float
    ) -> float | None:
        lefts = [self.trial_left(trial, now) for trial in running]
        known = [left for left in lefts if left is not None]
        if len(known) < len(lefts):
            return None
        typical = self.typical()
        if typical is None and known:
            typical = sum(
                left + now - trial.started for left, trial in zip(known, running, strict=True)
            ) / len(known)
        if waiting and typical is None:
            return None
        return max([0.0, *known, (sum(known) + waiting * (typical or 0.0)) / max(1, at_once)])


def counted(
    items: Iterable[T],
    total: int,
    what: str,
    units: str,
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[T]:
    """Pass items on, and say how far that is and how long it takes still, once it turns out to take a while.

    One line that is written over on a terminal, else a line every now and then.
    """
    stream = sys.stderr if stream is None else stream
    live = stream.isatty() and os.environ.get("TERM") != "dumb"
    began = said = clock()
    for done, item in enumerate(items):
        now = clock()
        if (
            done
            and now - began > PATIENCE_SECONDS
            and now - said > (FRAME_SECONDS if live else QUIET_SECONDS)
        ):
            said = now
            left = duration((now - began) / done * (total - done))
            line = f"{what}: {done} of {total} {units}, {left} left"
            print(
                f"\r\x1b[K{line}" if live else line,
                end="" if live else "\n",
                file=stream,
                flush=True,
            )
        yield item
    if clock() - began > PATIENCE_SECONDS:
        line = f"{what}: {total} {units} in {duration(clock() - began)}"
        print(f"\r\x1b[K{line}" if live else line, file=stream, flush=True)


def _harmless(
    method: "Callable[Concatenate[Display, P], None]",
) -> "Callable[Concatenate[Display, P], None]":
    """One at a time; a display that cannot show something says so once, and the sweep goes on."""

    @functools.wraps(method)
    def guarded(self: "Display", /, *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            with self._lock:
                method(self, *args, **kwargs)
        except Exception as error:
            self._confess(error)

    return guarded


class Display:
    """Shows a sweep of `total` trials while it is entered: a live picture on a terminal, else lines in `stream`.

    publisher: tells other terminals the same.
    """

    def __init__(
        self,
        total: int,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        publisher: StatusWriter | None = None,
    ) -> None:
        self.total = total
        self.publisher = publisher
        self.stream = sys.stderr if stream is None else stream
        self.pace = Pace()
        self._clock = clock
        self._began = clock()
        self._lock = threading.RLock()
        self._running: dict[str, Running] = {}
        self._ended: set[str] = set()
        self._failed = 0
        self._at_once = 0
        self._confessed = False
        self._screen: Screen | None = None

    def __enter__(self) -> "Display":
        self._enter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._summarize()
        # Outside the lock: the screen's thread may be waiting for it, and has to end.
        screen, self._screen = self._screen, None
        if screen is not None:
            screen.close()
        if self.publisher is not None:
            self.publisher.close()

    @_harmless
    def _enter(self) -> None:
        self._began = self._clock()
        if self.stream.isatty() and os.environ.get("TERM") != "dumb":
            self._screen = Screen(
                self.stream, lambda *size: picture(self.view(), *size), self._confess
            )
        if self.publisher is not None:
            self.publisher.start(self.view, self._confess)

    @_harmless
    def _summarize(self) -> None:
        if self._ended:
            took = duration(self._clock() - self._began, tenths=True)
            completed = len(self._ended) - self._failed
            self._say(
                f"{_trials(len(self._ended))} in {took}: {completed} completed, {self._failed} failed"
            )

    @_harmless
    def started(self, trial: str, name: str) -> None:
        self._running[trial] = Running(name, self._clock())
        self._at_once = max(self._at_once, len(self._running))

    @_harmless
    def event(self, event: Progress) -> None:
        """What a trial says of itself; late words of one that has ended are not shown."""
        trial = self._running.get(event.trial)
        if trial is None:
            return
        trial.take(event)
        if self._screen is None:
            (phase, when), now = trial.said, self._clock()
            if now - when >= (QUIET_SECONDS if phase == event.phase else BRIEF_SECONDS):
                trial.said = (event.phase, now)
                self._say(f"{trial.name}: {trial.doing}")

    @_harmless
    def retried(self, trial: str, why: str) -> None:
        gone = self._running.pop(trial, None)
        self._say(f"{gone.name if gone else trial}: {why}; it starts again")

    @_harmless
    def finished(self, record: TrialRecord, seconds: float) -> None:
        """seconds: that it took; 0 if the caller did not look at the clock."""
        trial = record.spec.id
        gone = self._running.pop(trial, None)
        name = gone.name if gone else f"{record.spec.name} · {record.spec.model.get('name')}"
        seconds = seconds or (self._clock() - gone.started if gone else 0.0)
        took = duration(seconds, tenths=True)
        self._ended.add(trial)
        if record.completed:
            self.pace.add(name, seconds)
            self._say(f"{name}: {', '.join([*headline(record), took])}", f" ({self._count()})")
        else:
            self._failed += 1
            self._say(
                f"{name}: FAILED after {took}: {record.reason[:LONGEST_REASON]}",
                f" ({self._count()})",
            )

    @_harmless
    def skipped(self, names: Sequence[str]) -> None:
        if names:
            more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
            verb = "is" if len(names) == 1 else "are"
            self._say(
                f"{_trials(len(names))} {verb} done already: {', '.join(names[:MOST_NAMES])}{more}"
            )

    @_harmless
    def note(self, text: str) -> None:
        self._say(text)

    def _say(self, text: str, where: str = "") -> None:
        """A line that stays. where: how far the sweep is, which a live picture shows anyway."""
        line = f"{time.strftime('%H:%M:%S')} {_printable(masked(text + where))}"
        if self.publisher is not None:
            self.publisher.say(line)
        if self._screen is not None:
            self._screen.say(_printable(masked(text)))
        else:
            encoding = (
                self.stream.encoding or "utf-8"
            )  # a log in plain ASCII gets a ? for a letter it cannot hold
            print(line.encode(encoding, "replace").decode(encoding), file=self.stream, flush=True)

    def _count(self) -> str:
        return count(self.view())

    def view(self) -> View:
        """The sweep as it stands."""
        with self._lock:
            now, trials = self._clock(), list(self._running.items())
            waiting = max(0, self.total - len(self._ended) - len(trials))
            return View(
                total=self.total,
                ended=len(self._ended),
                failed=self._failed,
                seconds=now - self._began,
                left=self.pace.sweep_left(
                    [trial for _, trial in trials], waiting, self._at_once, now
                ),
                running=tuple(
                    Work(
                        trial=key,
                        name=_printable(trial.name),
                        doing=_printable(trial.doing),
                        share=trial.share,
                        seconds=now - trial.started,
                        left=self.pace.trial_left(trial, now),
                    )
                    for key, trial in trials
                ),
            )

    def _confess(self, error: Exception) -> None:
        if not self._confessed:
            self._confessed = True
            logging.getLogger(__name__).warning(
                "the progress display has failed and may be wrong from here on; the sweep goes on (%s: %s)",
                type(error).__name__,
                error,
            )


def count(view: View) -> str:
    """How far a sweep is: `3 of 6 done, 1 failed, 40 s left`."""
    failed = f", {view.failed} failed" if view.failed else ""
    going = f", {_left(view.left)}" if view.ended < view.total or view.running else ""
    return f"{view.ended} of {view.total} done{failed}{going}"


def picture(view: View, width: int, height: int) -> "RenderableType":
    """A line per running trial, as many as fit, and one for the sweep."""
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    shown = view.running[: max(1, height - 3)]
    times = [f"{duration(work.seconds)}, {_left(work.left)}" for work in shown]
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, overflow="ellipsis")
    table.add_column(no_wrap=True, overflow="ellipsis")
    table.add_column(no_wrap=True, justify="right", min_width=max(map(len, times), default=0))
    for work, passed in zip(shown, times, strict=True):
        bar = [ProgressBar(total=1.0, completed=work.share, width=12)] if width >= WIDE else []
        table.add_row(Text(work.name), Text(work.doing), Text(passed), *bar)
    more = f"and {len(view.running) - len(shown)} more, " if len(view.running) > len(shown) else ""
    return Group(table, Text(f"{more}{count(view)}, {duration(view.seconds)} so far", style="bold"))


class Screen:
    """A live picture at the bottom of a terminal, and lines that scroll away above it.

    One thread draws, a few times a second, whatever has come in: so a thousand quick trials cost a few pictures.
    """

    def __init__(
        self,
        stream: TextIO,
        picture: "Callable[[int, int], RenderableType]",
        confess: Callable[[Exception], None],
    ) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console = Console(file=stream, highlight=False, emoji=False, markup=False)
        # Other people's prints go above the picture, but not from a pipe into the terminal.
        ours = stream in (sys.stdout, sys.stderr)
        self._live = Live(
            console=self._console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=ours and sys.stdout.isatty(),
            redirect_stderr=ours and sys.stderr.isatty(),
        )
        self._picture = picture
        self._confess = confess
        self._lines: list[str] = []
        self._closing = threading.Event()
        self._live.start()
        self._thread = threading.Thread(
            target=self._draw_until_closed, name="q3q-display", daemon=True
        )
        self._thread.start()

    def say(self, line: str) -> None:
        self._lines.append(line)

    def close(self) -> None:
        """Show what is still to be shown, and leave the terminal as it was."""
        self._closing.set()
        self._thread.join()
        try:
            self._live.stop()
            self._scroll()
        except Exception as error:
            self._confess(error)

    def _draw_until_closed(self) -> None:
        while not self._closing.wait(FRAME_SECONDS):
            try:
                self._scroll()
                self._live.update(self._picture(*self._console.size), refresh=True)
            except Exception as error:
                self._confess(error)

    def _scroll(self) -> None:
        lines, self._lines = self._lines, []
        if lines:
            self._console.print("\n".join(lines))


def share_done(event: Progress) -> float:
    """The share of a trial's work, 0 to 1: quantizing counts as one half, evaluating as the other, all else as none."""
    share = min(1.0, max(0.0, event.done / event.total)) if event.total else 0.0
    if event.phase == "quantize":
        return share / 2
    if event.phase == "evaluate":
        number, count = _part(event.note)
        return 0.5 + (number - 1 + share) / count / 2
    return 0.0


def describe(event: Progress) -> str:
    """What a trial is doing: `quantize, block 3 of 6`; `evaluate stories, 1 of 3, 40 %`."""
    if event.phase == "quantize" and event.total:
        return f"quantize, block {min(event.done + 1, event.total)} of {event.total}"
    words = f"{event.phase} {event.note}".rstrip()
    return f"{words}, {100 * event.done // event.total} %" if event.total > 1 else words


def headline(record: TrialRecord) -> list[str]:
    """A completed trial's result in a few words: perplexity of its first text, mean accuracy, bits per weight."""
    words = []
    texts, tasks = (record.spec.evaluation.get(key) or [] for key in ("texts", "tasks"))
    if texts:
        name = texts[0]["name"]
        found = record.metrics.get(f"perplexity/{name}")
        words.append(f"{name} diverged" if found is None else f"{name} {found:.4g}")
    scores = [record.metrics.get(f"{task}/acc") for task in tasks]
    known = [score for score in scores if score is not None]
    if known and len(known) == len(scores):
        words.append(f"accuracy {100 * sum(known) / len(known):.1f} %")
    if "bits_per_weight" in record.metrics:
        words.append(f"{record.metrics['bits_per_weight']:.2f} bits per weight")
    return words


def kind(name: str) -> str:
    """A trial's name without its bits, which hardly change how long it takes."""
    return re.sub(r"\bw\d+", "w", name)


def duration(seconds: float, tenths: bool = False) -> str:
    """`4 s` (`4.2 s` if tenths of a few seconds matter), `42 s`, `3 min 10 s`, `2 h 05 min`."""
    if tenths and seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def _left(seconds: float | None) -> str:
    return "? left" if seconds is None else f"{duration(seconds)} left"


def _part(note: str) -> tuple[int, int]:
    """Which part of how many, from a note such as `stories, 1 of 3`; the only one if it does not say."""
    found: Any = re.search(r"(\d+) of (\d+)$", note)
    number, count = (int(found[1]), int(found[2])) if found else (1, 1)
    return (number, count) if 1 <= number <= count else (1, 1)


def _trials(count: int) -> str:
    return f"{count} trial{'' if count == 1 else 's'}"


def _printable(text: str) -> str:
    """One line without control characters, which a trial's error may hold."""
    return " ".join("".join(one if one.isprintable() else " " for one in text).split())
