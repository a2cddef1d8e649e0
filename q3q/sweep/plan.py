"""Plan a study: which trials run, on what, in what order, and what they are predicted to take.

The plan comes from config.json and arithmetic alone. A trial's resources follow from the bytes that
its model needs (`models/footprint`): a share of a GPU, one GPU, or a gang; main memory, and the
same part of the cores as of the memory, at least one. If that was too little, the trial gets the
next larger allocation (`shares`).
"""

import heapq
from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from q3q.evaluate.baseline import baseline_bytes, kept_windows
from q3q.models.facts import ModelFacts
from q3q.models.footprint import in_gb
from q3q.names import own_names
from q3q.placement import Trial
from q3q.record import TrialRecord
from q3q.spec import AUTO_DRIFT, Json, TrialSpec
from q3q.sweep.costs import CostModel, Rate, text_windows
from q3q.sweep.machines import Machine, ResourceRequest
from q3q.sweep.shares import Allocation, activation_bytes, allocations_of, capacity, memory_of

HEADINGS = tuple("trial,what,model,on,loader,predicted,needs,main memory,disk,GPU-hours".split(","))


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A trial and its plan.

    allocation: None for a trial that is done
    larger: what it gets on a second try if it runs out of memory
    phases: predicted seconds of each
    basis: of the prediction: `measured`, `rough` or `done`
    disk: bytes that it leaves beside its record, without what trials before it left already
    """

    trial: Trial
    allocation: Allocation | None
    larger: Allocation | None = None
    phases: Mapping[str, float]
    basis: str
    disk: int = 0

    @property
    def spec(self) -> TrialSpec:
        return self.trial.spec

    @property
    def done(self) -> bool:
        return self.allocation is None

    @property
    def seconds(self) -> float:
        return sum(self.phases.values())

    @property
    def gpu_hours(self) -> float:
        if self.allocation is None:
            return 0.0
        return self.seconds * self.allocation.gpus * self.allocation.ranks / 3600

    def to_json(self, allocation: Allocation | None = None) -> Json:
        """Return what a record keeps of the plan; `allocation`: what the trial had in the end."""
        final = allocation or self.allocation
        assert final is not None
        return {
            "seconds": round(self.seconds, 3),
            "phases": {phase: round(seconds, 3) for phase, seconds in self.phases.items()},
            "memory": final.needs,
            "cpus": final.cpus,
            "gpus": final.gpus,
            "ranks": final.ranks,
            "loader": final.loader,
        }


def plan(
    trials: Sequence[Trial],
    finished: Mapping[str, TrialRecord],
    facts: Mapping[str, ModelFacts],
    *,
    machines: Sequence[Machine],
    request: ResourceRequest,
    model: CostModel,
) -> list[Planned]:
    """Return the plan in the order in which trials start, with those that are done last.

    Unquantized models come first, because the others are compared with them; then the longest, so
    that the last trial to end is a short one. Trials that take equally long are ordered by model.

    Raises:
        ConfigError: a trial fits nowhere.
    """
    planned = []
    allocations: dict[Hashable, tuple[Allocation, Allocation | None]] = {}
    for trial in trials:
        if trial.id in finished:
            planned.append(Planned(trial=trial, allocation=None, phases={}, basis="done"))
            continue
        key = _allocation_key(trial, facts[trial.id])
        if key not in allocations:
            allocations[key] = allocations_of(trial, facts[trial.id], machines, request)
        allocation, larger = allocations[key]
        where, loader = rate_of(allocation, machines), allocation.loader
        phases = model.phases(
            trial.spec, facts[trial.id], where, loader=loader, ranks=allocation.ranks
        )
        basis = "measured" if model.knows(trial.spec, where, loader) else "rough"
        planned.append(
            Planned(trial=trial, allocation=allocation, larger=larger, phases=phases, basis=basis)
        )
    planned.sort(
        key=lambda entry: (
            entry.done,
            entry.spec.scheme is not None,
            -entry.seconds,
            entry.spec.model.files,
        )
    )
    return _with_disk(planned, facts)


def _allocation_key(trial: Trial, facts: ModelFacts) -> Hashable:
    """Return all that a trial's allocation depends on, beside machines and request."""
    spec, placement = trial.spec, trial.placement
    return (
        (spec.model.files, spec.model.dtype, spec.heads, bool(spec.evaluation.generates)),
        (memory_of(spec), activation_bytes(spec, facts), placement.loader, placement.memory),
    )


def _with_disk(planned: Sequence[Planned], facts: Mapping[str, ModelFacts]) -> list[Planned]:
    """Count what several trials share on disk for the first of them alone."""
    present: set[tuple[str, ...]] = set()
    for entry in planned:
        if entry.done:
            present |= left_behind(entry.trial, facts[entry.trial.id]).keys()
    counted = []
    for entry in planned:
        left = {} if entry.done else left_behind(entry.trial, facts[entry.trial.id])
        disk = sum(size for name, size in left.items() if name not in present)
        counted.append(replace(entry, disk=disk))
        present |= left.keys()
    return counted


def rate_of(allocation: Allocation, machines: Sequence[Machine]) -> Rate:
    """Return where such a trial computes; no name if several kinds of machine could run it."""
    names = {machine.name for machine in machines if capacity(allocation, machine)}
    name = names.pop() if len(names) == 1 else ""
    if allocation.gpus:
        return Rate(name, True, min(1.0, allocation.gpus))
    return Rate(name, False, allocation.cpus)


def left_behind(trial: Trial, facts: ModelFacts) -> dict[tuple[str, ...], int]:
    """Return the bytes that a finished trial leaves, by what they are; several trials may share it.

    What drift is measured against belongs to a model and a text, kept blocks to a quantization, an
    export to the trial.
    """
    spec, dtype = trial.spec, trial.spec.model.dtype
    left: dict[tuple[str, ...], int] = {}
    if (drift := spec.evaluation.drift) is not None:
        most = None if drift == AUTO_DRIFT else int(drift)
        for text in spec.evaluation.texts:
            windows = kept_windows(text_windows(text), text.window, facts.hidden, dtype, most)
            size = baseline_bytes(windows, text.window, facts.hidden, dtype)
            name = ("baseline", spec.model.files, dtype, text.name, str(text.window), str(size))
            left[name] = size
    if spec.scheme is None:
        return left
    columns = facts.hidden if spec.scheme.group_size == -1 else spec.scheme.group_size
    weights = facts.linear_parameters
    scales = 8 * weights // columns  # float32 scale and zero point
    if trial.placement.keeps_blocks:
        left["blocks", spec.quantization_id] = weights + scales  # a byte a code
    if spec.export:
        plain = facts.weight_bytes(dtype)
        packed = weights * spec.scheme.bits // 8 + scales // 2
        others = plain // facts.parameters * (facts.parameters - weights)
        left["export", spec.id] = plain if spec.export == "hf" else packed + others
    return left


@dataclass
class _Free:
    """What a machine has free at a moment of the simulated sweep; of each GPU, a part."""

    cpus: float
    memory: float
    gpus: list[float]
    kind: str


_Place = tuple[_Free, int]  # a rank's machine and GPU, -1 for none


def simulate(planned: Sequence[Planned], machines: Sequence[Machine]) -> tuple[float, int]:
    """Return the seconds that the sweep takes, and the most trials that run at once.

    Each trial in the plan's order starts as soon as there is room for it; later ones pass it where
    there is none.
    """
    free = [
        _Free(
            machine.cpus,
            float("inf") if machine.memory is None else machine.memory,
            [1.0] * int(machine.gpus),
            machine.kind,
        )
        for machine in machines
    ]
    queues: dict[Allocation, deque[float]] = {}
    for entry in planned:
        if entry.allocation is not None:
            queues.setdefault(entry.allocation, deque()).append(entry.seconds)
    now, most, ticket = 0.0, 0, 0
    running: list[tuple[float, int, Allocation, list[_Place]]] = []
    while running or any(queues.values()):
        for allocation, waiting in queues.items():
            while waiting and (places := _places(allocation, free)) is not None:
                _take(allocation, places, 1)
                heapq.heappush(running, (now + waiting.popleft(), ticket, allocation, places))
                ticket += 1
        most = max(most, len(running))
        if not running:  # on machines that are still to come: one for each trial that waits
            return now + max(max(waiting) for waiting in queues.values() if waiting), max(1, most)
        now, _, allocation, places = heapq.heappop(running)
        _take(allocation, places, -1)
    return now, most


def _take(allocation: Allocation, places: Sequence[_Place], sign: int) -> None:
    """Take each rank's resources (`sign` 1), or give them back (-1)."""
    for machine, gpu in places:
        machine.cpus -= sign * allocation.cpus
        machine.memory -= sign * allocation.memory
        if gpu >= 0:
            machine.gpus[gpu] -= sign * min(1.0, allocation.gpus)


def _places(allocation: Allocation, machines: Sequence[_Free]) -> list[_Place] | None:
    """Return a place for each rank, or None if there is no room for all of them."""
    places: list[_Place] = []
    for machine in machines:
        room = allocation.ranks - len(places)
        if allocation.cpus:
            room = min(room, int(machine.cpus / allocation.cpus + 1e-9))
        if allocation.memory:
            room = int(min(room, machine.memory / allocation.memory))
        if room <= 0 or allocation.kind not in ("", machine.kind):
            continue
        gpus = [-1] * room
        if allocation.gpus:
            part = min(1.0, allocation.gpus)
            gpus = [gpu for gpu, left in enumerate(machine.gpus) if left + 1e-9 >= part]
            gpus.sort(key=machine.gpus.__getitem__)  # GPUs in use are filled first
        places += [(machine, gpu) for gpu in gpus[:room]]
        if len(places) == allocation.ranks:
            return places
    return None


def describe(
    planned: Sequence[Planned], *, machines: Sequence[Machine], where: str, storage: Path | str
) -> str:
    """Return the plan for people: a line a trial, and the total."""
    names = own_names([entry.spec for entry in planned])
    rows = [HEADINGS, *map(_row, planned, names)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(HEADINGS))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    left = [entry for entry in planned if not entry.done]
    wall, at_once = simulate(left, machines)
    disk, hours = sum(entry.disk for entry in left), sum(entry.gpu_hours for entry in left)
    total = [
        f"{len(left)} to run on {where}",
        f"{at_once} at a time at most",
        f"about {_rounded(wall)}",
    ]
    total += [f"{hours:.1f} GPU-hours"] if hours else []
    total += [f"{_bytes(disk)} of disk"] if disk else []
    lines.append(f"{', '.join(total)}. State and records: {storage}")
    if unlike := unlike_methods([entry.spec for entry in planned]):
        lines.append(unlike)
    if any(entry.basis != "measured" for entry in left):
        lines.append(
            "Rough: arithmetic alone; trials that finish here correct it for the next plan."
        )
    return "\n".join(lines)


def unlike_methods(specs: Sequence[TrialSpec]) -> str:
    """Say in a line where methods have other activations or groups; nothing if all have the same.

    Each method has its own defaults, so `method=gptq,smoothquant bits=4` asks for two schemes.
    """
    schemes: dict[str, dict[str, None]] = {}
    for spec in specs:
        if (scheme := spec.scheme) is not None:
            group = "a scale a row" if scheme.group_size == -1 else f"groups of {scheme.group_size}"
            words = f"{scheme.act_bits or 16}-bit activations, {group}"
            schemes.setdefault(spec.method.name, {})[words] = None
    if len({frozenset(words) for words in schemes.values()}) < 2:
        return ""
    alike: dict[str, list[str]] = {}
    for method, all_words in schemes.items():
        alike.setdefault(" or ".join(all_words), []).append(method)
    each = "; ".join(f"{', '.join(methods)}: {words}" for words, methods in alike.items())
    return f"Not the same scheme: {each}. act_bits= and group_size= give all methods the same."


def _row(planned: Planned, name: str) -> tuple[str, ...]:
    spec, allocation = planned.spec, planned.allocation
    head = (spec.id, name, spec.model.label)
    if allocation is None:
        return (*head, "done", *[""] * (len(HEADINGS) - 4))
    cores = f" + {allocation.cpus * allocation.ranks:g} CPUs" if allocation.gpus else ""
    return (
        *head,
        f"{allocation}{cores}",
        allocation.loader,
        f"{_rounded(planned.seconds)}{'' if planned.basis == 'measured' else ' (rough)'}",
        in_gb(allocation.needs),
        in_gb(allocation.memory * allocation.ranks),
        _bytes(planned.disk) if planned.disk else "-",
        f"{planned.gpu_hours:.2f}" if allocation.gpus else "-",
    )


def _bytes(count: int) -> str:
    return in_gb(count) if count >= 1e8 else f"{count / 1e6:.0f} MB"


def _rounded(seconds: float) -> str:
    """Return a predicted duration in one unit: `42 s`, `12 min`, `2.1 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
