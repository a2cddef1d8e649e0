"""Hand tasks to Ray as resources allow, listen to their streams, and run again what died."""

import os
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

from q3q.errors import ConfigError, Q3QError
from q3q.sweep.ray.deaths import end_hung, next_message
from q3q.sweep.ray.gangs import Gang
from q3q.sweep.ray.gpus_aside import GpusAside, gpu_of
from q3q.sweep.ray.head import Head
from q3q.sweep.ray.in_flight import InFlight
from q3q.sweep.ray.messages import (
    ADDRESS,
    DIED,
    EVENT,
    HANDED_BACK,
    PULSE,
    VALUE,
    Message,
    caused_by,
)
from q3q.sweep.ray.nodes import count_slots
from q3q.sweep.ray.tasks import (
    GpuFailedError,
    Outcome,
    OutOfMemoryError,
    Resources,
    Started,
    Task,
    WorkerDiedError,
)
from q3q.sweep.ray.worker import task_entry

CANCEL_SECONDS = 10  # that cancelled workers are waited for
# Most seconds between two looks at the gangs that count: a driver that was itself stopped, or its
# machine asleep, has heard nothing meanwhile.
LOOK_SECONDS = 2.0


class Waiting(NamedTuple):
    """A task that waits in the driver for its first or next attempt.

    deaths: since it last got further
    """

    task: Task
    attempt: int = 1
    deaths: int = 0


class TaskRun:
    """The tasks of one `Cluster.run`: those that wait in the driver, and those that Ray has.

    queues: waiting tasks by shape, so that tasks that wait for a GPU do not hold up those that need
        none
    entries: the Ray function of each shape
    most_waiting: tasks of a shape that may wait in Ray's queue: enough to fill the cluster at once,
        and to show one that grows on demand that there is demand
    in_flight: by stream
    gangs: rank 0 of each
    nodes: by the name that tasks are `near`, the node where one of them began last
    made: names of what tasks make for others that is made, or whose first task has ended
    """

    def __init__(
        self,
        total: Resources,
        env: Mapping[str, str],
        patience: float,
        tasks: Sequence[Task],
        on_event: Callable[[str, Any], None],
        on_retry: Callable[[str, WorkerDiedError], None] | None,
    ) -> None:
        self.on_event, self.on_retry = on_event, on_retry
        self.env, self.patience = dict(env), patience
        self.most_waiting = max(8, int(total.cpus))
        self.queues: dict[Resources, deque[Waiting]] = {}
        for task in tasks:
            self.queues.setdefault(task.resources, deque()).append(Waiting(task))
        self.entries = {shape: task_entry(shape) for shape in self.queues}
        self.in_flight: dict[Any, InFlight] = {}
        self.gangs: list[InFlight] = []
        self.nodes: dict[str, str] = {}
        self.made: set[str] = set()
        self.head, self.aside = Head(), GpusAside(patience)
        self.several_machines = len(self.head.machines) > 1 or patience > 0
        self._judged: list[Resources] | None = None  # the machines at the last `_refuse`
        self._looked = time.monotonic()  # at the gangs

    def outcomes(self, on_tick: Callable[[], None]) -> Iterator[Outcome]:
        while self.in_flight or any(self.queues.values()):
            on_tick()
            self.head.check()
            if self.head.answers():
                yield from self._submit()
                ready = self._ready()
                # A signal to all processes of a terminal or job: heard before its victims are.
                on_tick()
                self._look_at_gangs()
                runs = any(flight.began is not None for flight in self.in_flight.values())
                self.aside.forget_ended()
                _kill(self.aside.released_if_idle(runs))
                yield from self._listen(ready)
                yield from self._refuse()
            else:  # a call to Ray might never return now
                time.sleep(1.0)

    def cancel(self) -> None:
        _kill([*self.in_flight, *self.aside.released()])
        for flight in list(self.gangs):
            self._disband(flight)

    def _submit(self) -> Iterator[Outcome]:
        """Give Ray as many tasks as may wait there; yield the ends of those that cannot be sent."""
        import ray

        waiting = Counter(
            flight.task.resources
            for flight in self.in_flight.values()
            if flight.began is None and flight.rank == 0
        )
        path = [os.path.abspath(entry) for entry in sys.path]
        for shape, queue in self.queues.items():
            while waiting[shape] < self.most_waiting and (next_one := self._next(queue)):
                flight = InFlight(*next_one)
                task = flight.task
                try:
                    call = ray.cloudpickle.dumps(task.call)
                except Exception as error:
                    problem = Q3QError(f"{task.key} cannot be sent to a worker: {error}")
                    yield flight.outcome(error=caused_by(problem, error))
                    continue
                work = (call, task.key, flight.attempt, shape.cpus, shape.gpus)
                arguments = (path, os.getcwd(), self.env, *work)
                if shape.ranks > 1:
                    flight.gang = Gang(shape, self.entries[shape], arguments)
                    self.gangs.append(flight)
                    self.in_flight[flight.gang.start(0)] = flight
                else:
                    self.in_flight[self._entry_near(task).remote(*arguments)] = flight
                waiting[shape] += 1

    def _next(self, queue: deque[Waiting]) -> Waiting | None:
        """Take the first task of a queue that need not wait for what another one makes."""
        flights = self.in_flight.values()
        in_making = {name for flight in flights for name in flight.task.makes} - self.made
        for waiting in queue:
            if in_making.isdisjoint(waiting.task.makes):
                queue.remove(waiting)
                return waiting
        return None

    def _entry_near(self, task: Task) -> Any:
        """Return the Ray function for a task, on its only node, or its preferred one.

        The preferred one counts if that has room at once.
        """
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        entry, node = self.entries[task.resources], self.nodes.get(task.near)
        if task.node:
            there = NodeAffinitySchedulingStrategy(task.node, soft=False)
            return entry.options(scheduling_strategy=there)
        if not (self.several_machines and task.near and node):
            return entry
        preference = NodeAffinitySchedulingStrategy(node, soft=True, _spill_on_unavailable=True)
        return entry.options(scheduling_strategy=preference)

    def _ready(self) -> list[Any]:
        """Return one stream that has a message, if one comes within a second."""
        import ray

        streams = list(self.in_flight)
        return list(ray.wait(streams, num_returns=1, timeout=1.0)[0]) if streams else []

    def _listen(self, ready: Sequence[Any]) -> Iterator[Outcome]:
        """Take the next message of each of these streams."""
        for stream in ready:
            flight = self.in_flight.pop(stream)
            message = next_message(stream, flight)
            if flight.gang is not None:
                flight.gang.hear(flight.rank, message.content if message.kind == PULSE else None)
            if message.kind in (EVENT, ADDRESS, PULSE):
                # Last in line: a talkative task must not keep others from being heard.
                self.in_flight[stream] = flight
            if message.kind == EVENT:
                self._take_event(flight, message.content)
            elif message.kind == ADDRESS and flight.gang is not None:
                for rank in range(1, flight.task.resources.ranks):
                    other = flight.gang.start(rank, message.content)
                    self.in_flight[other] = replace(flight, rank=rank, began=None)
            elif message.kind == PULSE:
                continue
            elif flight.gang is None:
                yield from self._finish_alone(stream, flight, message)
            else:
                flight.gang.ends[flight.rank] = message
        for flight in list(self.gangs):
            if flight.gang is not None and (end := flight.gang.verdict()) is not None:
                self._disband(flight)
                yield from self._finish(flight, end)

    def _look_at_gangs(self) -> None:
        """Let time pass for the gangs' ranks; end those that hang, which their gangs hear of."""
        now = time.monotonic()
        seconds, self._looked = min(now - self._looked, LOOK_SECONDS), now
        for gang in {id(flight.gang): flight.gang for flight in self.gangs}.values():
            assert gang is not None
            gang.pass_time(seconds)
            for rank, words in gang.hung().items():
                for flight in self.in_flight.values():
                    if flight.gang is gang and flight.rank == rank:
                        gang.ends[rank] = end_hung(flight, words)

    def _take_event(self, flight: InFlight, event: Any) -> None:
        """Note what a task reports and pass it on; of a gang, only what rank 0 reports."""
        if isinstance(event, Started):
            flight.began, flight.running_since = event, time.monotonic()
            self.nodes[flight.task.near] = event.node_id
        elif flight.rank == 0:
            flight.deaths = 0 if flight.task.furthers(event) else flight.deaths
            self.made |= flight.task.made(event)
        if flight.rank == 0:
            self.on_event(flight.task.key, event)

    def _finish(self, flight: InFlight, end: Message) -> Iterator[Outcome]:
        """Yield a task's outcome, unless it runs again."""
        task, attempt, deaths = flight.task, flight.attempt, flight.deaths
        kind, content = end
        if kind == VALUE:
            self.made.update(task.makes)
            yield flight.outcome(value=content)
            return
        if task.larger is not None and isinstance(content, OutOfMemoryError):
            again = Waiting(task.larger, attempt + 1)
        elif kind == HANDED_BACK:
            again = Waiting(task, attempt + 1, deaths)
        elif kind == DIED and deaths < task.retries:
            again = Waiting(task, attempt + 1, deaths + 1)
        else:
            self.made.update(task.makes)
            yield flight.outcome(error=content)
            return
        self._run_again(again, content)

    def _finish_alone(self, stream: Any, flight: InFlight, end: Message) -> Iterator[Outcome]:
        """Finish a task that is no gang's; if its GPU failed, run it on another one."""
        if not isinstance(end.content, GpuFailedError):
            yield from self._finish(flight, end)
            return
        task, over = flight.task, self.aside.has_failed_before(flight.task.key, gpu_of(flight))
        self.aside.keep(stream, flight)
        if not over and self.aside.another(task.resources, self.head.machines):
            self._run_again(Waiting(task, flight.attempt + 1, flight.deaths), end.content)
            return
        _kill(self.aside.released(task.key))
        yield from self._finish(flight, end)

    def _run_again(self, again: Waiting, reason: Any) -> None:
        """Put a task in front of its queue."""
        shape = again.task.resources
        if shape not in self.queues:
            self.queues[shape], self.entries[shape] = deque(), task_entry(shape)
        self.queues[shape].appendleft(again)
        if self.on_retry is not None:
            self.on_retry(again.task.key, reason)

    def _disband(self, flight: InFlight) -> None:
        """End what is left of a gang."""
        import ray

        assert flight.gang is not None
        self.gangs.remove(flight)
        ranks = [stream for stream, rank in self.in_flight.items() if rank.gang is flight.gang]
        for stream in ranks:
            del self.in_flight[stream]
        _kill(ranks)
        with suppress(ray.exceptions.RayError):
            ray.util.remove_placement_group(flight.gang.group)

    def _refuse(self) -> Iterator[Outcome]:
        """End tasks for which no machine has been large enough for `patience` seconds."""
        now, machines = time.monotonic(), self.head.machines
        if machines is self._judged:  # the head has said nothing since
            return
        self._judged = machines
        for stream, flight in list(self.in_flight.items()):
            request = flight.task.resources
            if flight.began is not None or flight.rank > 0:
                continue
            if sum(count_slots(request, machine) for machine in machines) >= request.ranks:
                flight.waiting_since = now
            elif now - flight.waiting_since > self.patience:
                if flight.gang is None:
                    del self.in_flight[stream]
                    _kill([stream])
                else:
                    self._disband(flight)
                has = "; ".join(map(str, machines)) or "none"
                who = (
                    "no machine has" if request.ranks == 1 else "all machines together do not have"
                )
                problem = f"{flight.task.key} needs {request}, and {who} that. Machines: {has}"
                yield flight.outcome(error=ConfigError(problem))


def _kill(streams: Sequence[Any]) -> None:
    """Kill the workers of these tasks and see them dead: others may write their files next."""
    import ray

    with suppress(ray.exceptions.RayError):  # the cluster itself may be gone
        for stream in streams:
            ray.cancel(stream, force=True)
        if streams:
            ends = [stream.completed() for stream in streams]
            ray.wait(ends, num_returns=len(ends), timeout=CANCEL_SECONDS, fetch_local=False)
