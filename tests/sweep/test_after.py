"""Of tasks that use what one of them makes, one goes first; the others hold up nobody."""

from collections import deque
from types import SimpleNamespace
from typing import cast

from omegaconf import OmegaConf

from q3q.record import Progress
from q3q.sweep.launcher import Job
from q3q.sweep.on_ray import TrialPolicy, work
from q3q.sweep.ray.in_flight import InFlight
from q3q.sweep.ray.messages import DIED, VALUE, Message
from q3q.sweep.ray.scheduler import TaskRun, Waiting
from q3q.sweep.ray.tasks import Started, Task
from q3q.sweep.running import RunningStudy
from tests.specs import text_of
from tests.sweep.test_made import budgeted
from tests.sweep.test_plan import NODE, planned_for, trial


def run_of(*begun):
    """Return the scheduler's state: tasks that Ray has."""
    in_flight = {name: InFlight(task, 1) for name, task in enumerate(begun)}
    return cast(
        TaskRun,
        SimpleNamespace(
            in_flight=in_flight, made=set(), nodes={}, on_event=lambda *_: None, on_retry=None
        ),
    )


def task(key, *makes, **more):
    return Task(key=key, call=print, makes=makes, **more)


def next_of(run, *tasks):
    queue = deque(map(Waiting, tasks))
    found = TaskRun._next(run, queue)
    return found and found.task.key, [waiting.task.key for waiting in queue]


def test_a_task_waits_for_the_first_of_its_name_and_others_pass_it():
    second, other = task("second", "q"), task("other", "p")
    assert next_of(run_of(), second, other) == ("second", ["other"])
    assert next_of(run_of(task("first", "q")), second, other) == ("other", ["second"])
    assert next_of(run_of(task("first", "q")), second) == (None, ["second"])
    assert next_of(run_of(task("first", "q")), task("both", "p", "q")) == (None, ["both"])


def test_when_the_first_has_ended_even_without_success_all_others_may_begin():
    for end in (Message(VALUE, None), Message(DIED, "killed")):
        run = run_of(task("first", "q", retries=0), task("second", "q"))
        assert next_of(run, task("third", "q")) == (None, ["third"])
        list(TaskRun._finish(run, run.in_flight.pop(0), end))
        assert next_of(run, task("third", "q")) == ("third", [])


def test_tasks_without_a_name_wait_for_nobody():
    assert next_of(run_of(task("a")), task("b")) == ("b", [])


def begun_after(trials, *phases):
    """Return how many others may begin once the first in the plan has reported these phases."""
    planned = planned_for(trials, [NODE])
    policy = TrialPolicy(dict(enumerate(planned)), cast(RunningStudy, None), work)
    jobs = [Job(number=n, overrides=(), config=OmegaConf.create()) for n in range(len(planned))]
    first, *others = (policy.task(job, task("")) for job in jobs)
    run = run_of(first)
    TaskRun._take_event(run, run.in_flight[0], Started(key="", pid=1, node="", attempt=1))
    for phase in phases:
        TaskRun._take_event(run, run.in_flight[0], Progress(trial="", phase=phase, total=1))
    return sum(next_of(run, other)[0] is not None for other in others)


TEXTS = [text_of("wikitext2", window=2048, limit=limit) for limit in (30, 20, 10)]
MAKING = ("load", "baseline", "calibrate", "wait", "quantize", "note")


def test_trials_of_one_quantization_wait_for_its_blocks_and_not_for_the_first_evaluation():
    trials = [trial(keep="auto", text=text) for text in TEXTS]
    assert begun_after(trials, *MAKING) == 0
    assert begun_after(trials, *MAKING, "evaluate") == 2
    assert begun_after(trials, *MAKING, "record") == 2  # with nothing to evaluate
    # Where none finds the other's blocks, or there are none, nobody waits.
    assert begun_after([trial(keep="none", text=text) for text in TEXTS]) == 2
    assert begun_after([trial(method="none", keep="auto", text=text) for text in TEXTS]) == 2


def test_budgets_wait_for_their_sensitivities_and_one_of_the_same_widths_for_its_blocks():
    others = [budgeted(bits) for bits in (3.5, 4.5)]
    trials = [budgeted(3.5, text=TEXTS[0]), *others]
    assert begun_after(trials, "load", "sensitivities") == 0
    assert begun_after(trials, "load", "sensitivities", "calibrate", "quantize") == 1
    assert begun_after(trials, "load", "sensitivities", "quantize", "evaluate") == 2
