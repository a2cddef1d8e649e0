"""Show a running sweep: a live picture on a terminal, plain lines in a log."""

import functools
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Concatenate, ParamSpec, TextIO, TypeVar

from q3q.evaluate.metrics import mean_accuracy
from q3q.formatting import duration, fixed, percent, plural, printable, significant
from q3q.masking import masked
from q3q.record import Progress, TrialRecord
from q3q.spec import text_metric
from q3q.storage.status import RunningTrial, StatusWriter, View
from q3q.sweep.pace import Pace, Running
from q3q.sweep.screen import FRAME_SECONDS, Screen, count, picture

P = ParamSpec("P")
T = TypeVar("T")

QUIET_SECONDS = 10.0  # after which a plain line says that a phase still goes on
PATIENCE_SECONDS = 3.0  # after which work before the sweep says how far it is
BRIEF_SECONDS = 1.0  # at least, between a trial's plain lines: shorter phases get none
MOST_NAMES = 5  # of trials in one line
LONGEST_REASON = 300  # characters of a failure that are shown; its record holds the whole


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
                    RunningTrial(
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
