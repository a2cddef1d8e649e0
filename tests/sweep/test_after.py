"""Of tasks that use what one of them leaves, one goes first; the others hold up nobody."""

from collections import deque
from types import SimpleNamespace
from typing import cast

from q3q.sweep.ray.in_flight import InFlight
from q3q.sweep.ray.scheduler import TaskRun, Waiting
from q3q.sweep.ray.tasks import Task


def run_of(*begun, opened=()):
    """The scheduler's state: tasks that Ray has, and names of which one has ended."""
    in_flight = {name: InFlight(task, 1) for name, task in enumerate(begun)}
    return cast(TaskRun, SimpleNamespace(in_flight=in_flight, opened={"", *opened}))


def task(key, after=""):
    return Task(key=key, call=print, after=after)


def next_of(run, *tasks):
    queue = deque(map(Waiting, tasks))
    found = TaskRun._next(run, queue)
    return found and found.task.key, [waiting.task.key for waiting in queue]


def test_a_task_waits_for_the_first_of_its_name_and_others_pass_it():
    second, other = task("second", "q"), task("other", "p")
    assert next_of(run_of(), second, other) == ("second", ["other"])
    assert next_of(run_of(task("first", "q")), second, other) == ("other", ["second"])
    assert next_of(run_of(task("first", "q")), second) == (None, ["second"])


def test_when_the_first_has_ended_all_others_may_begin():
    third = task("third", "q")
    assert next_of(run_of(task("second", "q"), opened=["q"]), third) == ("third", [])


def test_tasks_without_a_name_wait_for_nobody():
    assert next_of(run_of(task("a")), task("b")) == ("b", [])
