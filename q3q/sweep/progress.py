"""Show a running sweep: a live picture on a terminal, plain lines in a log."""

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
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TextIO, TypeVar

from q3q.evaluate.metrics import mean_accuracy
from q3q.formatting import fixed, percent, plural, printable, significant
from q3q.masking import masked
from q3q.record import Progress, TrialRecord
from q3q.spec import text_metric
from q3q.storage.status import StatusWriter, View, Work

if TYPE_CHECKING:
    from rich.console import RenderableType

P = ParamSpec("P")
T = TypeVar("T")

FRAME_SECONDS = 0.2  # between two pictures on a terminal
QUIET_SECONDS = 10.0  # after which a plain line says that a phase still goes on
PATIENCE_SECONDS = 3.0  # after which work before the sweep says how far it is
BRIEF_SECONDS = 1.0  # at least, between a trial's plain lines: shorter phases get none
WIDE = 100  # columns of a terminal with room for bars
MOST_NAMES = 5  # of trials in one line
LONGEST_REASON = 300  # characters of a failure that are shown; its record holds the whole


@dataclass
class Running:
    """A running trial.

    share: of its work that is done, 0 to 1
    last_line: the phase of its last plain line, and when it was printed
    """

    name: str
    started: float
    event: Progress | None = None
    share: float = 0.0
    last_line: tuple[str, float] = ("", -math.inf)

    def take(self, event: Progress) -> None:
        self.event = event
        self.share = max(self.share, share_done(event))

    @property
    def doing(self) -> str:
        return "starting" if self.event is None else phase_in_words(self.event)


@dataclass
class Pace:
    """How long completed trials took, from which the time left follows.

    A running trial's time left is (1 - s) (e + (1 - s) t): s is the share of its work that is done,
    e its seconds so far, t the mean of the completed trials of its kind (name without bits), or of
    all completed ones while its kind has none. So the further a trial is, the more its own pace
    e / s counts. Without any completed trial it is e (1 - s) / s, unknown at s = 0. A waiting trial
    takes t, or what the running ones are expected to take in all. The sweep's time left is the sum
    of these, divided by the most trials that ever ran at once, and at least the longest running
    trial's.

    count, seconds: of completed trials by kind; of all under ""
    """

    count: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, name: str, seconds: float) -> None:
        for key in (_kind(name), ""):
            self.count[key] += 1
            self.seconds[key] += seconds

    def typical(self, name: str = "") -> float | None:
        """Return the mean seconds of completed trials of `name`'s kind; without any, of all."""
        key = _kind(name) if self.count[_kind(name)] else ""
        return self.seconds[key] / self.count[key] if self.count[key] else None

    def trial_left(self, trial: Running, now: float) -> float | None:
        elapsed, rest = max(0.0, now - trial.started), 1 - trial.share
        typical = self.typical(trial.name)
        if typical is not None:
            return rest * (elapsed + rest * typical)
        return elapsed * rest / trial.share if trial.share > 0 else None

    def sweep_left(
        self, running: Sequence[Running], waiting: int, at_once: int, now: float
    ) -> float | None:
        lefts = [self.trial_left(trial, now) for trial in running]
        seconds = [left for left in lefts if left is not None]
        if len(seconds) < len(lefts):
            return None
        typical = self.typical()
        if typical is None and seconds:
            totals = (
                left + now - trial.started for left, trial in zip(seconds, running, strict=True)
            )
            typical = sum(totals) / len(seconds)
        if waiting and typical is None:
            return None
        return max([0.0, *seconds, (sum(seconds) + waiting * (typical or 0.0)) / max(1, at_once)])


def counted(
    items: Iterable[T],
    total: int,
    what: str,
    units: str,
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[T]:
    """Pass items on; if that takes a while, say how far it is and how long it still takes.

    On a terminal one line is overwritten; elsewhere a line is printed every now and then.
    """
    stream = sys.stderr if stream is None else stream
    live = _is_live(stream)
    start = "\r\x1b[K" if live else ""
    began = last_line = clock()
    for done, item in enumerate(items):
        now = clock()
        pause = FRAME_SECONDS if live else QUIET_SECONDS
        if done and now - began > PATIENCE_SECONDS and now - last_line > pause:
            last_line = now
            left = duration((now - began) / done * (total - done))
            line = f"{start}{what}: {done} of {total} {units}, {left} left"
            print(line, end="" if live else "\n", file=stream, flush=True)
        yield item
    if clock() - began > PATIENCE_SECONDS:
        took = duration(clock() - began)
        print(f"{start}{what}: {total} {units} in {took}", file=stream, flush=True)


def _is_live(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"


def _harmless(
    method: "Callable[Concatenate[Display, P], None]",
) -> "Callable[Concatenate[Display, P], None]":
    """Call a method under the lock; log the display's first error, and let the sweep go on."""

    @functools.wraps(method)
    def guarded(self: "Display", /, *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            with self._lock:
                method(self, *args, **kwargs)
        except Exception as error:
            self._log_once(error)

    return guarded


class Display:
    """A context that shows a sweep of `total` trials in `stream`.

    publisher: writes the same for other terminals
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
        self._logged = False
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
        # Outside the lock: the screen's thread may be waiting for the lock, and has to end.
        screen, self._screen = self._screen, None
        if screen is not None:
            screen.close()
        if self.publisher is not None:
            self.publisher.close()

    @_harmless
    def _enter(self) -> None:
        self._began = self._clock()
        if _is_live(self.stream):
            self._screen = Screen(
                self.stream, lambda *size: picture(self.view(), *size), self._log_once
            )
        if self.publisher is not None:
            self.publisher.start(self.view, self._log_once)

    @_harmless
    def _summarize(self) -> None:
        if self._ended:
            took = duration(self._clock() - self._began, tenths=True)
            trials, completed = plural(len(self._ended), "trial"), len(self._ended) - self._failed
            self._say(f"{trials} in {took}: {completed} completed, {self._failed} failed")

    @_harmless
    def started(self, trial: str, name: str) -> None:
        self._running[trial] = Running(name, self._clock())
        self._at_once = max(self._at_once, len(self._running))

    @_harmless
    def event(self, event: Progress) -> None:
        """Show a trial's progress; that of a trial that has ended is late, and not shown."""
        trial = self._running.get(event.trial)
        if trial is None:
            return
        if event.remark:
            self._say(f"{trial.name}: {event.remark}")
            return
        trial.take(event)
        if self._screen is None:
            (phase, when), now = trial.last_line, self._clock()
            if now - when >= (QUIET_SECONDS if phase == event.phase else BRIEF_SECONDS):
                trial.last_line = (event.phase, now)
                self._say(f"{trial.name}: {trial.doing}")

    @_harmless
    def retried(self, trial: str, why: str) -> None:
        running = self._running.pop(trial, None)
        self._say(f"{running.name if running else trial}: {why}; it starts again")

    @_harmless
    def finished(self, record: TrialRecord, seconds: float) -> None:
        """Show a trial's outcome; `seconds` that it took, 0 if the caller does not know."""
        running = self._running.pop(record.spec.id, None)
        name = running.name if running else record.spec.label
        seconds = seconds or (self._clock() - running.started if running else 0.0)
        took = duration(seconds, tenths=True)
        self._ended.add(record.spec.id)
        if record.completed:
            self.pace.add(name, seconds)
            self._say(f"{name}: {', '.join([*headline(record), took])}", f" ({self._count()})")
        else:
            self._failed += 1
            reason = record.reason[:LONGEST_REASON]
            self._say(f"{name}: FAILED after {took}: {reason}", f" ({self._count()})")

    @_harmless
    def skipped(self, names: Sequence[str]) -> None:
        if names:
            more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
            verb = "is" if len(names) == 1 else "are"
            named = f"{', '.join(names[:MOST_NAMES])}{more}"
            self._say(f"{plural(len(names), 'trial')} {verb} done already: {named}")

    @_harmless
    def note(self, text: str) -> None:
        self._say(text)

    def _say(self, text: str, where: str = "") -> None:
        """Print a line that stays; `where` the sweep is, which a live picture shows anyway."""
        line = f"{time.strftime('%H:%M:%S')} {printable(masked(text + where))}"
        if self.publisher is not None:
            self.publisher.say(line)
        if self._screen is not None:
            self._screen.say(printable(masked(text)))
        else:
            encoding = self.stream.encoding or "utf-8"
            writable = line.encode(encoding, "replace").decode(encoding)  # ? where ASCII has none
            print(writable, file=self.stream, flush=True)

    def _count(self) -> str:
        return count(self.view())

    def view(self) -> View:
        """Return the sweep's state."""
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
                        name=printable(trial.name),
                        doing=printable(trial.doing),
                        share=trial.share,
                        seconds=now - trial.started,
                        left=self.pace.trial_left(trial, now),
                    )
                    for key, trial in trials
                ),
            )

    def _log_once(self, error: Exception) -> None:
        if not self._logged:
            self._logged = True
            logging.getLogger(__name__).warning(
                "the progress display has failed and may be wrong from here on; "
                "the sweep goes on (%s: %s)",
                type(error).__name__,
                error,
            )


def count(view: View) -> str:
    """Return how far a sweep is: `3 of 6 done, 1 failed, 40 s left`."""
    failed = f", {view.failed} failed" if view.failed else ""
    going = f", {_left(view.left)}" if view.ended < view.total or view.running else ""
    return f"{view.ended} of {view.total} done{failed}{going}"


def picture(view: View, width: int, height: int) -> "RenderableType":
    """Return a line for each running trial, as many as fit, and one for the sweep."""
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

    One thread draws a few times a second, so a thousand quick trials cost a few pictures.
    """

    def __init__(
        self,
        stream: TextIO,
        picture: "Callable[[int, int], RenderableType]",
        on_error: Callable[[Exception], None],
    ) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console = Console(file=stream, highlight=False, emoji=False, markup=False)
        # Other code's prints go above the picture, but not from a pipe into the terminal.
        ours = stream in (sys.stdout, sys.stderr)
        self._live = Live(
            console=self._console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=ours and sys.stdout.isatty(),
            redirect_stderr=ours and sys.stderr.isatty(),
        )
        self._picture = picture
        self._on_error = on_error
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
        """Print the lines that still wait, and restore the terminal."""
        self._closing.set()
        self._thread.join()
        try:
            self._live.stop()
            self._scroll()
        except Exception as error:
            self._on_error(error)

    def _draw_until_closed(self) -> None:
        while not self._closing.wait(FRAME_SECONDS):
            try:
                self._scroll()
                self._live.update(self._picture(*self._console.size), refresh=True)
            except Exception as error:
                self._on_error(error)

    def _scroll(self) -> None:
        lines, self._lines = self._lines, []
        if lines:
            self._console.print("\n".join(lines))


def share_done(event: Progress) -> float:
    """Return the share of a trial's work that is done, 0 to 1.

    Quantizing is one half, evaluating the other; other phases do not count.
    """
    share = min(1.0, max(0.0, event.done / event.total)) if event.total else 0.0
    if event.phase == "quantize":
        return share / 2
    if event.phase == "evaluate":
        number, count = _part(event.note)
        return 0.5 + (number - 1 + share) / count / 2
    return 0.0


def phase_in_words(event: Progress) -> str:
    """Return `quantize, block 3 of 6` or `evaluate stories, 1 of 3, 40 %`."""
    if event.phase == "quantize" and event.total:
        return f"quantize, block {min(event.done + 1, event.total)} of {event.total}"
    words = f"{event.phase} {event.note}".rstrip()
    return f"{words}, {100 * event.done // event.total} %" if event.total > 1 else words


def headline(record: TrialRecord) -> list[str]:
    """Return a completed trial's perplexity of its first text, mean accuracy, bits per weight.

    An unquantized model's bits are left out: it may compute in another type than its files have.
    """
    words = []
    evaluation = record.spec.evaluation
    for text in evaluation.texts[:1]:
        perplexity = record.metrics.get(text_metric("perplexity", text.name, evaluation.quick))
        value = "diverged" if perplexity is None else significant(perplexity)
        words.append(f"{text.name} {value}")
    accuracy = mean_accuracy(record.spec, record.metrics)
    if accuracy is not None:
        words.append(f"accuracy {percent(accuracy)} %")
    quantized = record.spec.scheme is not None or record.notes.get("stored", {}).get("quantized")
    if quantized and "bits_per_weight" in record.metrics:
        words.append(f"{fixed(record.metrics['bits_per_weight'], 2)} bits per weight")
    return words


def _kind(name: str) -> str:
    """Return a trial's name without bits and seed, which hardly change how long it takes."""
    return re.sub(r"\bseed \d+", "", re.sub(r"\bw\d+", "w", name))


def duration(seconds: float, tenths: bool = False) -> str:
    """Return `4 s` (with tenths `4.2 s`), `42 s`, `3 min 10 s` or `2 h 05 min`."""
    if tenths and seconds < 10:
        return f"{seconds:.1f} s"
    rounded = round(seconds)
    if rounded < 60:
        return f"{rounded} s"
    if rounded < 3600:
        return f"{rounded // 60} min {rounded % 60:02} s"
    return f"{rounded // 3600} h {rounded % 3600 // 60:02} min"


def _left(seconds: float | None) -> str:
    return "? left" if seconds is None else f"{duration(seconds)} left"


def _part(note: str) -> tuple[int, int]:
    """Return (1, 3) for a note such as `stories, 1 of 3`; (1, 1) if it names no part."""
    match = re.search(r"(\d+) of (\d+)$", note)
    number, count = (int(match[1]), int(match[2])) if match else (1, 1)
    return (number, count) if 1 <= number <= count else (1, 1)
