"""The background queue makes its calls in order, bounded, and loses no error."""

import io
import threading

import pytest

from q3q.sweep.background import BackgroundQueue
from q3q.sweep.progress import counted


def test_calls_are_made_in_order_and_nobody_waits_before_settling():
    queue, gate = BackgroundQueue(), threading.Event()
    made: list[str | int] = []

    def first():
        gate.wait(10)
        made.append("first")

    queue.do("first", first)
    for k in range(5):
        queue.do(k, made.append, k)
    assert made == []
    gate.set()
    queue.settle()
    assert made == ["first", 0, 1, 2, 3, 4]


def test_of_the_calls_that_wait_under_one_key_only_the_newest_is_made():
    queue, gate = BackgroundQueue(), threading.Event()
    made: list[str | int] = []
    queue.do("gate", gate.wait, 10)
    for k in range(1000):
        queue.do("progress", made.append, k)
        queue.do("record", made.append, "record")
    gate.set()
    queue.settle()
    assert len(made) <= 4  # the thread may have taken one of each before the gate opened
    assert made[-2:] == [999, "record"]


def test_an_error_ends_nothing_and_is_raised_to_whoever_settles():
    queue = BackgroundQueue()
    made: list[str] = []
    queue.do("wrong", lambda: 1 / 0)
    queue.do("right", made.append, "right")
    with pytest.raises(ZeroDivisionError):
        queue.settle()
    assert made == ["right"]
    queue.settle()  # raised once


def test_a_long_wait_reports_how_many_are_left(monkeypatch):
    monkeypatch.setattr("q3q.sweep.background.REMINDER_SECONDS", 0.01)
    queue, gate, reports = BackgroundQueue(), threading.Event(), []

    def report(left):
        reports.append(left)
        gate.set()

    queue.do("gate", gate.wait, 10)
    queue.do("more", lambda: None)
    queue.do("still", lambda: None)
    queue.settle(report)
    assert reports[0] >= 2


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_long_work_before_the_sweep_shows_its_progress(stream, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    now = iter(range(0, 10_000, 2))  # each reading of the clock is two seconds later
    assert list(
        counted(range(20), 20, "composing", "jobs", stream, lambda: float(next(now)))
    ) == list(range(20))
    text = stream.getvalue()
    assert "composing: 5 of 20 jobs, 36 s left" in text or "composing: 6 of 20 jobs" in text
    assert "composing: 20 jobs in" in text
    assert ("\r" in text) == stream.isatty()


def test_short_work_prints_nothing():
    stream = io.StringIO()
    assert list(counted("abc", 3, "composing", "jobs", stream, lambda: 0.0)) == ["a", "b", "c"]
    assert stream.getvalue() == ""
