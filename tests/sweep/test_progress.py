"""Laws of the display: what it prints, how often, and that it cannot harm a sweep."""

import io
import logging
import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TextIO

import pytest

from q3q.formatting import duration
from q3q.placement import Trial
from q3q.record import COMPLETED, Progress, TrialRecord
from q3q.sweep import screen
from q3q.sweep.pace import Pace, Running, phase_in_words, share_done
from q3q.sweep.progress import Display, headline
from tests.specs import evaluation_of, make_trial


def trial_of(method: str = "gptq", bits: int = 3, seed: int = 0, quick: bool = False) -> Trial:
    evaluation = evaluation_of("stories", "library", tasks=("a", "b"), quick=quick)
    return make_trial(method, bits, evaluation=evaluation, seed=seed)


METRICS = {"perplexity/stories": 3.14159, "a/acc": 0.5, "b/acc": 0.75, "bits_per_weight": 3.25}


def record(trial: Trial, **changes: Any) -> TrialRecord:
    return TrialRecord(**{"spec": trial.spec, "status": COMPLETED, "metrics": METRICS, **changes})


def step(trial: Trial, phase: str, done: int = 0, total: int = 0, note: str = "") -> Progress:
    return Progress(trial=trial.id, phase=phase, done=done, total=total, note=note)


@dataclass
class Clock:
    now: float = 1000.0

    def __call__(self) -> float:
        return self.now


def lines(stream: io.StringIO) -> list[str]:
    """Return the printed lines without the time of day."""
    printed = stream.getvalue().splitlines()
    assert all(re.match(r"\d\d:\d\d:\d\d \S", line) for line in printed)
    return [line[9:] for line in printed]


def test_a_log_file_gets_these_lines() -> None:
    stream, clock, one, two = io.StringIO(), Clock(), trial_of(bits=2), trial_of(bits=3)
    with Display(3, stream, clock) as display:
        display.skipped(["rtn w4 g128 · demo"])
        display.started(one.id, "gptq w2 g128 · demo")
        display.event(step(one, "load", 0, 1))
        clock.now += 2
        display.event(step(one, "quantize", 2, 6))
        clock.now += 2
        display.event(step(one, "quantize", 3, 6))
        clock.now += 6
        display.event(step(one, "evaluate", 40, 100, "stories, 1 of 2"))
        display.started(two.id, "gptq w3 g128 · demo")
        clock.now += 10
        display.finished(record(one), 20.0)
        display.retried(two.id, "its worker died (signal 9)")
        display.started(two.id, "gptq w3 g128 · demo")
        clock.now += 4
        display.finished(
            TrialRecord.failed(two, "levels: 9 levels\nin a group of \x1b[31m3 bits"), 4.0
        )
        display.note("MLflow does not answer")
    assert lines(stream) == [
        "1 trial is done already: rtn w4 g128 · demo",
        "gptq w2 g128 · demo: load",
        "gptq w2 g128 · demo: quantize, block 3 of 6",
        "gptq w2 g128 · demo: evaluate stories, 1 of 2, 40 %",
        # The waiting trial takes 20 s; the other is at 0 after 10 s, so takes 10 + 20; two at once.
        "gptq w2 g128 · demo: stories 3.142, accuracy 62.5 %, 3.25 bits per weight, 20 s "
        "(1 of 3 done, 30 s left)",
        "gptq w3 g128 · demo: its worker died (signal 9); it starts again",
        "gptq w3 g128 · demo: FAILED after 4.0 s: levels: 9 levels in a group of [31m3 bits "
        "(2 of 3 done, 1 failed, 10 s left)",
        "MLflow does not answer",
        "2 trials in 24 s: 1 completed, 1 failed",
    ]


def test_a_long_phase_is_printed_again_every_ten_seconds_and_a_short_one_not_at_all() -> None:
    stream, clock, trial = io.StringIO(), Clock(), trial_of()
    with Display(1, stream, clock) as display:
        display.started(trial.id, "gptq")
        display.event(step(trial, "load"))
        clock.now += 0.2
        display.event(step(trial, "calibrate"))
        clock.now += 0.9
        for block in range(60):
            display.event(step(trial, "quantize", block, 60))
            clock.now += 0.5
    assert lines(stream) == [
        "gptq: load",
        "gptq: quantize, block 1 of 60",
        "gptq: quantize, block 21 of 60",
        "gptq: quantize, block 41 of 60",
    ]


def test_a_headline_has_what_was_measured_and_makes_nothing_up() -> None:
    metrics = {"bits_per_weight": 2.25}
    diverged = record(trial_of(), metrics=metrics, diverged=("perplexity/stories",))
    assert headline(diverged) == ["stories diverged", "2.25 bits per weight"]


def test_only_what_was_quantized_has_bits_per_weight() -> None:
    whole = record(trial_of("none", 16), metrics={"bits_per_weight": 16.0})
    given = replace(whole, notes={"stored": {"dtype": "bfloat16", "quantized": "gptq"}})
    assert "bits per weight" not in " ".join(headline(whole))
    assert headline(given)[-1] == "16.00 bits per weight"


def test_a_quick_evaluations_headline_has_its_own_metrics() -> None:
    metrics = {"perplexity_quick/stories": 3.14159, "a_quick/acc": 0.5, "b_quick/acc": 0.75}
    quick = record(trial_of(quick=True), metrics=metrics)
    assert headline(quick) == ["stories 3.142", "accuracy 62.5 %"]


def test_late_progress_of_a_trial_that_has_ended_is_not_shown() -> None:
    stream, trial = io.StringIO(), trial_of()
    with Display(1, stream) as display:
        display.started(trial.id, "gptq")
        display.finished(record(trial), 1.0)
        display.event(step(trial, "evaluate", 1, 1))
        display.event(step(trial_of(bits=8), "load"))
    assert len(lines(stream)) == 2


@pytest.mark.parametrize(
    ("phase", "done", "total", "note", "share", "words"),
    [
        ("load", 0, 1, "", 0.0, "load"),
        ("quantize", 0, 6, "", 0.0, "quantize, block 1 of 6"),
        ("quantize", 3, 6, "", 0.25, "quantize, block 4 of 6"),
        ("quantize", 6, 6, "", 0.5, "quantize, block 6 of 6"),
        ("evaluate", 0, 1, "stories, 1 of 2", 0.5, "evaluate stories, 1 of 2"),
        ("evaluate", 32, 64, "tasks, 2 of 2", 0.875, "evaluate tasks, 2 of 2, 50 %"),
        ("evaluate", 64, 64, "tasks, 2 of 2", 1.0, "evaluate tasks, 2 of 2, 100 %"),
        ("evaluate", 1, 2, "a note of no form", 0.75, "evaluate a note of no form, 50 %"),
        ("export", 0, 0, "", 0.0, "export"),
    ],
)
def test_a_phase_has_words_and_a_share_of_the_work(
    phase: str, done: int, total: int, note: str, share: float, words: str
) -> None:
    event = step(trial_of(), phase, done, total, note)
    assert (share_done(event), phase_in_words(event)) == (share, words)


def test_time_left_is_unknown_then_the_trials_own_pace_then_that_of_its_kind() -> None:
    pace, trial = Pace(), Running("gptq w3 g128 · demo", started=0.0)
    assert pace.trial_left(trial, 5.0) is None
    trial.take(step(trial_of(), "quantize", 3, 6))
    assert pace.trial_left(trial, 5.0) == 15.0  # a quarter took 5 s
    pace.add("awq w3 g128 · demo", 100.0)
    assert pace.trial_left(trial, 5.0) == 0.75 * (5.0 + 0.75 * 100.0)
    pace.add("gptq w2 g128 · demo", 20.0)  # another bit width, the same kind
    assert pace.trial_left(trial, 5.0) == 0.75 * (5.0 + 0.75 * 20.0)
    trial.take(step(trial_of(), "evaluate", 1, 1))
    assert pace.trial_left(trial, 500.0) == 0.0


def test_the_sweeps_time_left_counts_the_waiting_and_is_at_least_the_longest_trials() -> None:
    pace, quick, slow = (
        Pace(),
        Running("rtn w3", 0.0, share=0.5),
        Running("awq w3", 0.0, share=0.25),
    )
    assert pace.sweep_left([], waiting=4, at_once=2, now=10.0) is None
    assert pace.sweep_left([quick, Running("gptq w3", 0.0)], waiting=0, at_once=2, now=10.0) is None
    assert pace.sweep_left([quick, slow], waiting=0, at_once=2, now=10.0) == 30.0
    assert (
        pace.sweep_left([quick, slow], waiting=4, at_once=2, now=10.0)
        == (10 + 30 + 4 * (20 + 40) / 2) / 2
    )
    assert pace.sweep_left([], waiting=0, at_once=0, now=10.0) == 0.0


def test_time_left_never_goes_below_nothing() -> None:
    pace, clock = Pace(), -5.0  # a clock that was set back
    pace.add("gptq w3", 0.0)
    for done in range(7):
        trial = Running("gptq w2", started=0.0)
        trial.take(step(trial_of(), "quantize", done, 6))
        left = pace.sweep_left([trial], waiting=1, at_once=1, now=clock)
        assert left is not None
        assert left >= 0


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (42, "42 s"), (59.7, "1 min 00 s"), (190, "3 min 10 s"), (7500, "2 h 05 min")],
)
def test_durations_in_words(seconds: float, words: str) -> None:
    assert duration(seconds) == words


class Broken(io.StringIO):
    def write(self, text: str) -> int:
        raise OSError("the disk is full")


def test_a_display_that_cannot_write_says_so_once_and_hurts_nobody(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING), Display(2, Broken()) as display:
        for trial in (trial_of(bits=2), trial_of(bits=3)):
            display.started(trial.id, "gptq")
            display.event(step(trial, "load"))
            display.finished(record(trial), 1.0)
    assert [entry.levelname for entry in caplog.records] == ["WARNING"]
    assert "the disk is full" in caplog.text
    assert "the sweep goes on" in caplog.text


def test_an_ascii_log_takes_what_it_can() -> None:
    raw = io.BytesIO()
    with Display(1, io.TextIOWrapper(raw, encoding="ascii", write_through=True)) as display:
        display.note("größer · besser")
        assert raw.getvalue().decode()[9:] == "gr??er ? besser\n"


class Terminal:
    """The person's end of a pseudo-terminal: what a display wrote to the other end."""

    def __init__(self, end: int) -> None:
        self.end = end
        self.seen = b""
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        while True:
            try:
                part = os.read(self.end, 65536)
            except OSError:  # Linux's way to say that the other end was closed
                part = b""
            if not part:
                return
            self.seen += part

    @property
    def raw(self) -> str:
        return self.seen.decode(errors="replace")

    @property
    def shown(self) -> str:
        """Without control sequences."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.raw)

    def wait_for(self, pattern: str) -> None:
        deadline = time.monotonic() + 60
        while not re.search(pattern, self.shown):
            assert time.monotonic() < deadline, f"{pattern} did not appear in: {self.shown}"
            time.sleep(0.02)


@contextmanager
def terminal() -> Iterator[tuple[TextIO, Terminal]]:
    """A pseudo-terminal to write to, and what is seen on it; all of it once the block has ended."""
    outer, inner = os.openpty()
    person = Terminal(outer)
    with open(inner, "w", encoding="utf-8") as stream:
        yield stream, person
    person.reader.join(timeout=60)
    os.close(outer)


@pytest.fixture(autouse=True)
def _colour_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "20"}.items():
        monkeypatch.setenv(
            name, value
        )  # rich asks the standard streams for the size, which are no terminals here
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)


def test_a_terminal_shows_each_running_trial_the_sweep_and_results_as_they_come() -> None:
    one, two, many = (
        trial_of(bits=2),
        trial_of(bits=3),
        [trial_of("rtn", seed=seed) for seed in range(30)],
    )
    with terminal() as (stream, person), Display(33, stream) as display:
        display.started(one.id, "gptq w2 g128 · demo")
        display.event(step(one, "quantize", 2, 6))
        display.started(two.id, "gptq w3 g128 · demo")
        person.wait_for(r"gptq w2 g128 · demo  quantize, block 3 of 6 +\d+ s, \d+ s left  \S+")
        person.wait_for(r"gptq w3 g128 · demo  starting +\d+ s, \? left")
        person.wait_for(r"\n0 of 33 done, \? left, \d+ s so far")
        display.finished(record(one), 20.0)
        display.event(step(two, "evaluate", 40, 100, "stories, 1 of 2"))
        person.wait_for(r"stories 3.142, accuracy 62.5 %, 3.25 bits per weight, 20 s")
        person.wait_for(r"gptq w3 g128 · demo  evaluate stories, 1 of 2, 40 % +\d+ s, \d+ s left")
        person.wait_for(r"\n1 of 33 done, [\w ]+ left, \d+ s so far")
        for trial in many:
            display.started(trial.id, f"rtn {trial.spec.seed}")
        person.wait_for("and 14 more, 1 of 33 done")  # 31 run, and 17 of 20 rows are theirs
        display.finished(TrialRecord.failed(two, "[bold]no markup[/bold] \x1b[2Jhere"), 1.0)
    assert "\x1b[2J" not in person.raw
    # What stays is said once; the last line is how it went, and the cursor is back.
    assert person.shown.count("gptq w2 g128 · demo: stories 3.142") == 1
    assert (
        person.shown.count(
            "gptq w3 g128 · demo: FAILED after 1.0 s: [bold]no markup[/bold] [2Jhere"
        )
        == 1
    )
    assert re.search(r"2 trials in [\d.]+ s: 1 completed, 1 failed\s*$", person.shown)
    assert person.raw.rindex("\x1b[?25h") > person.raw.rindex("\x1b[?25l")


def test_instant_trials_cost_no_picture_each_and_all_are_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(screen, "FRAME_SECONDS", 3600.0)  # no picture is due before the end
    records = [record(trial_of(seed=seed)) for seed in range(200)]
    with terminal() as (stream, person), Display(len(records), stream) as display:
        for number, ended in enumerate(records):
            trial = ended.spec.id
            display.started(trial, f"gptq {number}")
            display.event(Progress(trial=trial, phase="quantize", done=1, total=6))
            display.finished(ended, 0.001)
    assert all(person.shown.count(f"gptq {number}: stories") == 1 for number in range(200))
    assert "of 200 done" not in person.raw  # which a picture says


def test_the_screen_is_given_back_when_the_sweep_is_interrupted() -> None:
    def interrupted(stream: TextIO) -> None:
        with Display(2, stream) as display:
            display.started(trial_of().id, "gptq")
            raise KeyboardInterrupt

    with terminal() as (stream, person):
        before = threading.active_count()
        with pytest.raises(KeyboardInterrupt):
            interrupted(stream)
        assert threading.active_count() == before
    assert person.raw.rindex("\x1b[?25h") > person.raw.rindex("\x1b[?25l")


def test_a_terminal_that_can_do_nothing_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    with terminal() as (stream, person), Display(1, stream) as display:
        display.started(trial_of().id, "gptq")
        display.event(step(trial_of(), "load"))
    assert re.fullmatch(r"\d\d:\d\d:\d\d gptq: load\s+", person.raw)


def test_a_terminal_that_goes_away_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    outer, inner = os.openpty()
    stream = open(inner, "w", encoding="utf-8")  # noqa: SIM115  (closing it fails as well)
    with caplog.at_level(logging.WARNING), Display(1, stream) as display:
        os.close(outer)
        display.started(trial_of().id, "gptq")
        time.sleep(0.7)
        display.finished(record(trial_of()), 1.0)
    assert len(caplog.records) == 1
    assert "the sweep goes on" in caplog.text
    with pytest.raises(OSError, match="Input/output error"):
        stream.close()
