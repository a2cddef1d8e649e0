"""A sweep in simulation: who runs when and on which GPU, and which shares of GPUs end it soonest.

Trials on one GPU take turns, so two of them take as long as one after the other, unless one
computes while the other's processor prepares its work. Shares of a GPU are therefore of use where
trials outnumber GPUs, and nowhere else. Ray puts a share on the GPU that is fullest and still has
room for it; only whole GPUs, and shares that fill all GPUs, leave none idle.
"""

import heapq
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from q3q.sweep.allocation import Allocation, Choices
from q3q.sweep.machines import Machine

LEVELS = (0.5, 0.25)  # shares of a GPU that are tried as the smallest ones
TOGETHER = 0.95  # of a GPU's speed, for all trials on it together if there are several; a guess
WORTH = 0.98  # of the time with whole GPUs: shares that save less are not worth their narrow memory


@dataclass(frozen=True, kw_only=True)
class Load:
    """A trial as the simulation sees it.

    idle: seconds in which its GPU waits for the processor
    busy: seconds in which it computes, on a GPU that it has for itself or on its cores
    blocks: bytes on disk while it runs
    makes: by name, what several trials use: the busy seconds after which it is made; those of the
        name wait until the first of them has made it
    """

    allocation: Allocation
    idle: float = 0.0
    busy: float
    blocks: int = 0
    makes: Mapping[str, float] = field(default_factory=dict)


@dataclass
class SimulatedRun:
    """When a trial runs in the simulated sweep, and on which GPUs, as (machine, GPU)."""

    start: float = 0.0
    end: float = 0.0
    gpus: tuple[tuple[int, int], ...] = ()

    @property
    def seconds(self) -> float:
        return self.end - self.start


@dataclass(frozen=True)
class Simulation:
    """A simulated sweep.

    runs: of each trial, in the trials' order
    at_once: most trials that run at the same time
    blocks: most bytes of running trials' blocks at the same time
    """

    runs: list[SimulatedRun]
    at_once: int
    blocks: int

    @property
    def seconds(self) -> float:
        return max((run.end for run in self.runs), default=0.0)


@dataclass(eq=False)
class _Gpu:
    """A GPU; of the trials that share it, the seconds that they have yet to compute.

    since: when `left` was true
    version: of `left`; an end that was foreseen for an older one does not come
    """

    free: float = 1.0
    since: float = 0.0
    left: dict[int, float] = field(default_factory=dict)
    version: int = 0

    def advance(self, now: float) -> None:
        for trial in self.left:
            self.left[trial] -= (now - self.since) * self.speed
        self.since, self.version = now, self.version + 1

    @property
    def speed(self) -> float:
        return (1.0 if len(self.left) == 1 else TOGETHER) / max(1, len(self.left))


@dataclass(eq=False)
class _Host:
    """What a machine has free."""

    number: int
    cpus: float
    memory: float
    gpus: list[_Gpu]
    kind: str


@dataclass(frozen=True)
class _Part:
    """A part of what a trial computes; name: of what it has made then, for others too."""

    seconds: float
    name: str = ""


BEGINS = -1  # in place of a version
_Place = tuple[_Host, int]  # a rank's machine and GPU, -1 for none


def simulate(trials: Sequence[Load], machines: Sequence[Machine]) -> Simulation:
    """Return the sweep in which each trial, in their order, starts as soon as there is room for it.

    Later ones pass it where there is none, or while it waits for what another trial makes.
    """
    return _SimulatedSweep(trials, machines).run()


class _SimulatedSweep:
    """The state of a simulated sweep.

    events: (time, ticket, trial, version of its GPU): the trial begins to compute on a GPU that it
        shares (BEGINS), or ends a part of that there, or elsewhere (None)
    makers: of what several trials use and nobody has made yet, the trial that makes it
    parts: of the trials that run, what they have yet to compute
    """

    def __init__(self, trials: Sequence[Load], machines: Sequence[Machine]) -> None:
        self.trials = trials
        self.hosts = [
            _Host(
                number,
                machine.cpus,
                float("inf") if machine.memory is None else machine.memory,
                [_Gpu() for _ in range(int(machine.gpus))],
                machine.kind,
            )
            for number, machine in enumerate(machines)
        ]
        self.queues: dict[Allocation, deque[int]] = {}
        for trial, load in enumerate(trials):
            self.queues.setdefault(load.allocation, deque()).append(trial)
        self.runs = [SimulatedRun() for _ in trials]
        uses = Counter(name for load in trials for name in load.makes)
        self.makers: dict[str, int] = {}
        for trial, load in enumerate(trials):
            for name in load.makes:
                if uses[name] > 1:
                    self.makers.setdefault(name, trial)
        self.parts: dict[int, list[_Part]] = {}
        self.places: dict[int, list[_Place]] = {}
        self.events: list[tuple[float, int, int, int | None]] = []
        self.ticket, self.blocks = 0, 0

    def run(self) -> Simulation:
        now, at_once, most_blocks = 0.0, 0, 0
        self._start(now, self.hosts)
        while self.places:
            at_once, most_blocks = max(at_once, len(self.places)), max(most_blocks, self.blocks)
            now, _, trial, version = heapq.heappop(self.events)
            if version is None:
                self._end_part(trial, now)
            elif trial in self.places:
                host, number = self.places[trial][0]
                self._compute(trial, host.gpus[number], version, now)
        for trial in (trial for queue in self.queues.values() for trial in queue):
            # On machines that are still to come: one for each trial that waits.
            load, at_once = self.trials[trial], max(1, at_once)
            self.runs[trial] = SimulatedRun(now, now + load.idle + load.busy)
            most_blocks = max(most_blocks, load.blocks)
        return Simulation(self.runs, at_once, most_blocks)

    def _start(self, now: float, freed: Sequence[_Host]) -> None:
        """Start all trials that find room, if these machines are those that have more than before.

        Only the ranks of a gang may need the others too.
        """
        for allocation, waiting in self.queues.items():
            hosts = freed if allocation.ranks == 1 else self.hosts
            while waiting and (places := _places(allocation, hosts)) is not None:
                trial = next((one for one in waiting if self._may_start(one)), None)
                if trial is None:
                    break
                waiting.remove(trial)
                load, self.parts[trial] = self.trials[trial], self._parts(trial)
                _take(allocation, places, 1)
                self.places[trial] = places
                self.blocks += load.blocks
                gpus = tuple((host.number, gpu) for host, gpu in places if gpu >= 0)
                self.runs[trial] = SimulatedRun(now, now, gpus)
                if allocation.is_share:
                    self._expect(now + load.idle, trial, BEGINS)
                else:
                    self._expect(now + load.idle + self.parts[trial][0].seconds, trial, None)

    def _may_start(self, trial: int) -> bool:
        return all(self.makers.get(name, trial) == trial for name in self.trials[trial].makes)

    def _parts(self, trial: int) -> list[_Part]:
        """Return what a trial computes: up to each thing that others wait for, then the rest."""
        load, parts, done = self.trials[trial], list[_Part](), 0.0
        for name, seconds in sorted(load.makes.items(), key=lambda item: item[1]):
            if self.makers.get(name) == trial:
                parts.append(_Part(min(seconds, load.busy) - done, name))
                done += parts[-1].seconds
        return [*parts, _Part(load.busy - done)]

    def _compute(self, trial: int, gpu: _Gpu, version: int, now: float) -> None:
        """Let a trial begin to compute on a GPU that it shares, or end a part of that."""
        if version not in (BEGINS, gpu.version):
            return  # another trial came or went since this end was foreseen
        gpu.advance(now)
        gpu.left.pop(trial, None)
        following = self.parts[trial][0 if version == BEGINS else 1 :]
        if following:
            gpu.left[trial] = following[0].seconds
        if gpu.left:
            first = min(gpu.left, key=gpu.left.__getitem__)
            self._expect(now + max(0.0, gpu.left[first]) / gpu.speed, first, gpu.version)
        if version != BEGINS:
            self._end_part(trial, now)

    def _end_part(self, trial: int, now: float) -> None:
        """End a part of a trial: those that wait for what it made may start, or the trial ends."""
        made, *following = self.parts[trial]
        self.parts[trial] = following
        if not following:
            self._end(trial, now)
            return
        if not self.trials[trial].allocation.is_share:
            self._expect(now + following[0].seconds, trial, None)
        del self.makers[made.name]
        self._start(now, self.hosts)

    def _end(self, trial: int, now: float) -> None:
        places, load = self.places.pop(trial), self.trials[trial]
        _take(load.allocation, places, -1)
        self.blocks -= load.blocks
        self.runs[trial].end = now
        self._start(now, [host for host, _ in places])

    def _expect(self, time: float, trial: int, version: int | None) -> None:
        heapq.heappush(self.events, (time, self.ticket, trial, version))
        self.ticket += 1


def _take(allocation: Allocation, places: Sequence[_Place], sign: int) -> None:
    """Take each rank's resources (`sign` 1), or give them back (-1)."""
    for host, gpu in places:
        host.cpus -= sign * allocation.cpus
        host.memory -= sign * allocation.memory
        if gpu >= 0:
            host.gpus[gpu].free -= sign * min(1.0, allocation.gpus)


def _places(allocation: Allocation, hosts: Sequence[_Host]) -> list[_Place] | None:
    """Return a place for each rank, or None if there is no room for all of them."""
    places: list[_Place] = []
    for host in hosts:
        room = allocation.ranks - len(places)
        if allocation.cpus:
            room = min(room, int(host.cpus / allocation.cpus + 1e-9))
        if allocation.memory:
            room = int(min(room, host.memory / allocation.memory))
        if room <= 0 or allocation.kind not in ("", host.kind):
            continue
        gpus = [-1] * room
        if allocation.gpus:
            part = min(1.0, allocation.gpus)
            gpus = [number for number, gpu in enumerate(host.gpus) if gpu.free + 1e-9 >= part]
            gpus.sort(key=lambda number: host.gpus[number].free)  # as Ray does: the fullest first
        places += [(host, gpu) for gpu in gpus[:room]]
        if len(places) == allocation.ranks:
            return places
    return None


def share_out(
    choices: Sequence[Choices], loads: Sequence[Load], machines: Sequence[Machine]
) -> list[Allocation]:
    """Return each trial's allocation: whole GPUs, or the shares that end the sweep sooner.

    Args:
        choices: of each trial, in the order in which they start.
        loads: of the same trials; their allocations do not count.
    """
    count = sum(int(machine.gpus) for machine in machines)
    best = [choice.at_least(1.0) for choice in choices]
    if not count or len(choices) <= count or not any(choice.least.is_share for choice in choices):
        return best
    shortest = WORTH * _seconds(best, loads, machines)
    for allocations in _shared(choices, count):
        if (seconds := _seconds(allocations, loads, machines)) < shortest:
            best, shortest = allocations, seconds
    return best


def _seconds(
    allocations: Sequence[Allocation], loads: Sequence[Load], machines: Sequence[Machine]
) -> float:
    given = zip(loads, allocations, strict=True)
    return simulate([replace(load, allocation=one) for load, one in given], machines).seconds


def _shared(choices: Sequence[Choices], count: int) -> Iterator[list[Allocation]]:
    """Yield ways to share `count` GPUs.

    The first trials get whole GPUs as long as the others' shares fill the rest. The last ones may
    get whole GPUs too, because two of them on one would compute beside idle GPUs at the end.
    """
    for level in LEVELS:
        shares = [choice.at_least(level) for choice in choices]
        taken = sum(share.gpus * share.ranks for share in shares)
        first = 0
        while first < len(shares) and taken + 1 - min(1.0, shares[first].gpus) <= count:
            taken += 1 - min(1.0, shares[first].gpus)
            first += 1
        rest = round(len(shares) % (count / level))
        for last in dict.fromkeys((0, min(rest, count), count)):
            yield [
                choice.at_least(1.0) if i < first or i >= len(choices) - last else shares[i]
                for i, choice in enumerate(choices)
            ]
