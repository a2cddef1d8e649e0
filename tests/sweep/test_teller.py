"""What is told aside is told in order, bounded, and its errors are not lost."""

import io
import threading

import pytest

from q3q.sweep.background import BackgroundQueue
from q3q.sweep.progress import counted


def test_all_is_done_in_order_and_nobody_waits_before_settling():
    teller, gate, heard = BackgroundQueue(), threading.Event(), []
    teller.do("first", lambda: (gate.wait(10), heard.append("first")))
    for k in range(5):
        teller.do(k, heard.append, k)
    assert heard == []
    gate.set()
    teller.settle()
    assert heard == ["first", 0, 1, 2, 3, 4]


def test_of_what_waits_under_one_name_only_the_newest_is_told():
    teller, gate, heard = BackgroundQueue(), threading.Event(), []
    teller.do("gate", gate.wait, 10)
    for k in range(1000):
        teller.do("progress", heard.append, k)
        teller.do("record", heard.append, "record")
    gate.set()
    teller.settle()
    assert len(heard) <= 4  # the thread may have taken one of each before the gate was given
    assert heard[-2:] == [999, "record"]


def test_an_error_ends_nothing_and_is_raised_to_whoever_settles():
    teller, heard = BackgroundQueue(), []
    teller.do("wrong", lambda: 1 / 0)
    teller.do("right", heard.append, "right")
    with pytest.raises(ZeroDivisionError):
        teller.settle()
    assert heard == ["right"]
    teller.settle()  # raised once


def test_whoever_waits_long_is_told_how_much_is_left(monkeypatch):
    monkeypatch.setattr("q3q.sweep.background.SAY_SECONDS", 0.01)
    teller, gate, said = BackgroundQueue(), threading.Event(), []

    def say(left):
        said.append(left)
        gate.set()

    teller.do("gate", gate.wait, 10)
    teller.do("more", lambda: None)
    teller.do("still", lambda: None)
    teller.settle(say)
    assert said[0] >= 2


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_what_takes_long_before_the_sweep_says_how_far_it_is(stream, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    now = iter(range(0, 10_000, 2))  # every look at the clock, two seconds have passed
    assert list(
        counted(range(20), 20, "composing", "jobs", stream, lambda: float(next(now)))
    ) == list(range(20))
    text = stream.getvalue()
    assert "composing: 5 of 20 jobs, 36 s left" in text or "composing: 6 of 20 jobs" in text
    assert "composing: 20 jobs in" in text
    assert ("\r" in text) == stream.isatty()


def test_what_takes_no_time_says_nothing():
    stream = io.StringIO()
    assert list(counted("abc", 3, "composing", "jobs", stream, lambda: 0.0)) == ["a", "b", "c"]
    assert stream.getvalue() == ""
