"""How far a running trial is, and how long it and the sweep still take."""

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from q3q.quantize.budget.sensitivities import SENSING
from q3q.record import Progress


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


def share_done(event: Progress) -> float:
    """Return the share of a trial's work that is done, 0 to 1.

    Quantizing is one half, evaluating the other; of a trial with a budget, measuring its
    sensitivities is the first quarter of all. Other phases do not count.
    """
    share = min(1.0, max(0.0, event.done / event.total)) if event.total else 0.0
    if event.phase == "quantize":
        return share / 2
    if event.phase == SENSING:
        return share / 4
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


def _kind(name: str) -> str:
    """Return a trial's name without bits and seed, which hardly change how long it takes."""
    return re.sub(r"\bseed \d+", "", re.sub(r"\bw\d+", "w", name))


def _part(note: str) -> tuple[int, int]:
    """Return (1, 3) for a note such as `stories, 1 of 3`; (1, 1) if it names no part."""
    match = re.search(r"(\d+) of (\d+)$", note)
    number, count = (int(match[1]), int(match[2])) if match else (1, 1)
    return (number, count) if 1 <= number <= count else (1, 1)
