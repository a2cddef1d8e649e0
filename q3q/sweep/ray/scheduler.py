"""Hand tasks to Ray as resources allow, listen to their streams, and try again what died."""

import os
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from q3q.errors import ConfigError, Q3QError
from q3q.sweep.ray.deaths import next_message
from q3q.sweep.ray.gangs import Gang, InFlight
from q3q.sweep.ray.head import Head
from q3q.sweep.ray.messages import BACK, DIED, EVENT, MEET, VALUE, caused_by
from q3q.sweep.ray.nodes import count_slots
from q3q.sweep.ray.tasks import (
    Outcome,
    OutOfMemoryError,
    Resources,
    Started,
    Task,
    WorkerDiedError,
)
from q3q.sweep.ray.worker import task_entry

CANCEL_SECONDS = 10  # how long cancelled workers are waited for


class TaskRun:
    """The tasks of one `Cluster.run`: those that still wait here, and those that Ray has."""

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
        # So many tasks of a shape may wait in Ray's queue: enough to fill the cluster at once, and to show one that
        # grows on demand that there is demand.
        self.ahead = max(8, int(total.cpus))
        # Each shape has its own queue, so that tasks that wait for a GPU do not hold up those that need none.
        self.queues: dict[Resources, deque[tuple[Task, int, int]]] = {}
        for task in tasks:
            self.queues.setdefault(task.resources, deque()).append((task, 1, 0))
        self.entries = {shape: task_entry(shape) for shape in self.queues}
        self.homes: dict[
            str, str
        ] = {}  # of tasks that had better be near each other, the node where one began last
        self.head = Head()
        self.judged: list[Resources] | None = (
            None  # what machines there were when tasks were last refused
        )
        self.several = len(self.head.machines) > 1 or self.patience > 0
        self.flights: dict[Any, InFlight] = {}
        self.gangs: list[InFlight] = []  # rank 0 of each

    def outcomes(self, on_tick: Callable[[], None]) -> Iterator[Outcome]:
        while self.flights or any(self.queues.values()):
            on_tick()
            self.head.check()
            if self.head.answers():
                yield from self._submit()
                yield from self._listen()
                yield from self._refuse()
            else:  # what Ray is asked now may never come back
                time.sleep(1.0)

    def cancel(self) -> None:
        _cancel(list(self.flights))
        for flight in list(self.gangs):
            self._disband(flight)

    def _submit(self) -> Iterator[Outcome]:
        """Give Ray as many tasks as may wait there."""
        import ray

        waiting = Counter(
            flight.task.resources
            for flight in self.flights.values()
            if flight.began is None and flight.rank == 0
        )
        path = [os.path.abspath(entry) for entry in sys.path]
        for shape, queue_of_shape in self.queues.items():
            while queue_of_shape and waiting[shape] < self.ahead:
                flight = InFlight(*queue_of_shape.popleft())
                task = flight.task
                try:
                    call = ray.cloudpickle.dumps(task.call)
                except Exception as error:
                    problem = Q3QError(f"{task.key} cannot be sent to a worker: {error}")
                    yield flight.ended(error=caused_by(problem, error))
                    continue
                work = (
                    path,
                    os.getcwd(),
                    self.env,
                    call,
                    task.key,
                    flight.attempt,
                    shape.cpus,
                    shape.gpus,
                )
                if shape.ranks > 1:
                    flight.gang = Gang(shape, self.entries[shape], work)
                    self.gangs.append(flight)
                    self.flights[flight.gang.seat(0)] = flight
                else:
                    self.flights[self._entry_near(task).remote(*work)] = flight
                waiting[shape] += 1

    def _entry_near(self, task: Task) -> Any:
        """The Ray function for a task, with a wish where to run. One that would have to wait there runs elsewhere."""
        entry, home = self.entries[task.resources], self.homes.get(task.near)
        if not (self.several and task.near and home):
            return entry
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        there = NodeAffinitySchedulingStrategy(home, soft=True, _spill_on_unavailable=True)
        return entry.options(scheduling_strategy=there)

    def _listen(self) -> Iterator[Outcome]:
        """Take what one stream has to say, if one speaks up within a second."""
        import ray

        ready = ray.wait(list(self.flights), num_returns=1, timeout=1.0)[0] if self.flights else []
        for stream in ready:
            flight = self.flights.pop(stream)
            kind, content = next_message(stream, flight)
            if kind == EVENT:
                self.flights[stream] = (
                    flight  # last in line: a talkative task must not keep others from being heard
                )
                self._heard(flight, content)
            elif kind == MEET and flight.gang is not None:
                self.flights[stream] = flight
                for rank in range(1, flight.task.resources.ranks):
                    self.flights[flight.gang.seat(rank, content)] = replace(
                        flight, rank=rank, began=None
                    )
            elif flight.gang is None:
                yield from self._landed(flight, kind, content)
            else:
                flight.gang.ends[flight.rank] = kind, content
        for flight in list(self.gangs):
            if flight.gang is not None and (end := flight.gang.verdict()) is not None:
                self._disband(flight)
                yield from self._landed(flight, *end)

    def _heard(self, flight: InFlight, event: Any) -> None:
        """What a task reports; of a gang, rank 0 speaks for all."""
        if isinstance(event, Started):
            flight.began, flight.clock = event, time.monotonic()
            self.homes[flight.task.near] = event.node_id
        elif flight.rank == 0 and flight.task.furthers(event):
            flight.deaths = 0
        if flight.rank == 0:
            self.on_event(flight.task.key, event)

    def _landed(self, flight: InFlight, kind: str, content: Any) -> Iterator[Outcome]:
        """A task ended, and perhaps is to run again."""
        task = flight.task
        if kind == VALUE:
            yield flight.ended(value=content)
        elif task.larger is not None and isinstance(content, OutOfMemoryError):
            shape = task.larger.resources
            self.queues.setdefault(shape, deque()).appendleft((task.larger, flight.attempt + 1, 0))
            self.entries.setdefault(shape, task_entry(shape))
            if self.on_retry is not None:
                self.on_retry(task.key, content)
        elif kind == BACK or (kind == DIED and flight.deaths < task.retries):
            deaths = flight.deaths + (kind == DIED)
            self.queues[task.resources].appendleft((task, flight.attempt + 1, deaths))
            if self.on_retry is not None:
                self.on_retry(task.key, content)
        else:
            yield flight.ended(error=content, died=kind == DIED)

    def _disband(self, flight: InFlight) -> None:
        """End what is left of a gang."""
        import ray

        assert flight.gang is not None
        self.gangs.remove(flight)
        streams = [stream for stream, other in self.flights.items() if other.gang is flight.gang]
        for stream in streams:
            del self.flights[stream]
        _cancel(streams)
        with suppress(ray.exceptions.RayError):
            ray.util.remove_placement_group(flight.gang.group)

    def _refuse(self) -> Iterator[Outcome]:
        """End the tasks that no machine of the cluster has been large enough for, for as long as patience lasts."""
        now, machines = time.monotonic(), self.head.machines
        if machines is self.judged:
            return
        self.judged = machines
        for stream, flight in list(self.flights.items()):
            wanted = flight.task.resources
            if flight.began is not None or flight.rank > 0:
                continue
            if sum(count_slots(wanted, machine) for machine in machines) >= wanted.ranks:
                flight.clock = now
            elif now - flight.clock > self.patience:
                if flight.gang is None:
                    del self.flights[stream]
                    _cancel([stream])
                else:
                    self._disband(flight)
                has = "; ".join(map(str, machines)) or "none"
                who = "no machine has" if wanted.ranks == 1 else "all machines together do not have"
                yield flight.ended(
                    error=ConfigError(
                        f"{flight.task.key} needs {wanted}, and {who} that. Machines: {has}"
                    )
                )


def _cancel(streams: Sequence[Any]) -> None:
    """Kill the workers that run these tasks, and see them dead: their files may be written by others next."""
    import ray

    with suppress(ray.exceptions.RayError):  # the cluster itself may be gone
        for stream in streams:
            ray.cancel(stream, force=True)
        if streams:
            ends = [stream.completed() for stream in streams]
            ray.wait(ends, num_returns=len(ends), timeout=CANCEL_SECONDS, fetch_local=False)
