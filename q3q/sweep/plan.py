"""Which trials run, on what, in what order, and what they are predicted to take: from config.json and arithmetic alone.

A trial's resources come from the bytes that its model needs (`models/footprint`): a share of a GPU, one, or a gang; of
main memory what it takes, and of the cores the same part as of the memory, at least one. What comes next where that was
too little is the next rung of the same ladder (`rungs`).
"""

import heapq
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from q3q.evaluate.baseline import baseline_bytes, kept_windows
from q3q.models.facts import ModelFacts
from q3q.models.footprint import (
    AUTO,
    in_gb,
)
from q3q.record import TrialRecord
from q3q.spec import Json, TrialSpec
from q3q.sweep.costs import CostModel, Rate, text_windows
from q3q.sweep.machines import Machine, ResourceRequest
from q3q.sweep.shares import Allocation, activation_bytes, allocations_of, rooms


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One trial. share: None of one that is done. larger: what it is tried with once more if it runs out of memory.
    phases: predicted seconds of each. basis: how they are known. disk: bytes that it leaves beside its record, but for
    what trials before it left already."""

    spec: TrialSpec
    share: Allocation | None
    larger: Allocation | None = None
    phases: Mapping[str, float]
    basis: str
    disk: int

    @property
    def done(self) -> bool:
        return self.share is None

    @property
    def seconds(self) -> float:
        return sum(self.phases.values())

    @property
    def gpu_hours(self) -> float:
        return (
            0.0 if self.share is None else self.seconds * self.share.gpus * self.share.ranks / 3600
        )

    def to_json(self, share: Allocation | None = None) -> Json:
        """What a record keeps of it, beside what was measured. share: what the trial had in the end."""
        had = share or self.share
        assert had is not None
        return {
            "seconds": round(self.seconds, 3),
            "phases": {phase: round(seconds, 3) for phase, seconds in self.phases.items()},
            "memory": had.needs,
            "cpus": had.cpus,
            "gpus": had.gpus,
            "ranks": had.ranks,
            "loader": had.loader,
        }


def plan(
    specs: Sequence[TrialSpec],
    finished: Mapping[str, TrialRecord],
    facts: Mapping[str, ModelFacts],
    *,
    machines: Sequence[Machine],
    wishes: ResourceRequest,
    model: CostModel,
) -> list[Planned]:
    """The trials still to run first: the unquantized models, which the others are compared with, then longest first, so
    that the last one to end is a short one. Of those that take as long, a model's are neighbours.

    Raises:
        ConfigError: a trial fits nowhere.
    """
    planned = []
    there: set[tuple[str, ...]] = set()
    chosen: dict[tuple[str, ...], tuple[Allocation, Allocation | None]] = {}
    for spec in specs:
        mine = facts[spec.id]
        if spec.id in finished:
            planned.append(Planned(spec=spec, share=None, phases={}, basis="done", disk=0))
            there |= left_behind(spec, mine).keys()
            continue
        held = (str(spec.places.get(key)) for key in ("loader", "memory"))
        rest = map(str, ("generates" in spec.evaluation, spec.heads, activation_bytes(spec, mine)))
        kind = (model_key(spec), spec.model["dtype"], spec.method["name"], *held, *rest)
        if kind not in chosen:
            chosen[kind] = allocations_of(spec, mine, machines, wishes)
        share, larger = chosen[kind]
        where = rate_of(share, machines)
        phases = model.phases(spec, mine, where, loader=share.loader, ranks=share.ranks)
        basis = "measured" if model.knows(spec, where, share.loader) else "rough"
        planned.append(
            Planned(spec=spec, share=share, larger=larger, phases=phases, basis=basis, disk=0)
        )
    planned.sort(
        key=lambda one: (one.done, one.spec.scheme is not None, -one.seconds, model_key(one.spec))
    )
    for number, one in enumerate(planned):
        if not one.done:
            left = left_behind(one.spec, facts[one.spec.id])
            planned[number] = replace(
                one, disk=sum(size for what, size in left.items() if what not in there)
            )
            there |= left.keys()
    return planned


def model_key(spec: TrialSpec) -> str:
    """The files that a trial reads its model from: machines that have them are preferred."""
    return str(
        spec.model.get("digest") or f"{spec.model.get('source')}@{spec.model.get('revision')}"
    )


def rate_of(share: Allocation, machines: Sequence[Machine]) -> Rate:
    """Where such a trial computes; on which of several kinds of machine nobody knows beforehand."""
    names = {machine.name for machine in machines if rooms(share, machine)}
    name = names.pop() if len(names) == 1 else ""
    return Rate(name, share.gpus > 0, min(1.0, share.gpus) if share.gpus else share.cpus)


def left_behind(spec: TrialSpec, facts: ModelFacts) -> dict[tuple[str, ...], int]:
    """Bytes that a finished trial leaves, by what they are, which several trials may share: what drift is measured
    against, of a model and text; kept blocks, of a quantization; an export."""
    dtype, plain = spec.model["dtype"], facts.weight_bytes(spec.model["dtype"])
    left: dict[tuple[str, ...], int] = {}
    if (drift := spec.evaluation.get("drift")) is not None:
        for text in spec.evaluation["texts"]:
            size = _baseline(text, facts, dtype, drift)
            left[
                "baseline",
                model_key(spec),
                dtype,
                str(text["name"]),
                str(text["window"]),
                str(size),
            ] = size
    if spec.scheme is None:
        return left
    columns = facts.hidden if spec.scheme.group_size == -1 else spec.scheme.group_size
    weights = facts.linear_parameters
    scales = 8 * weights // columns  # float32 scale and zero point
    if spec.places.get("keep") == "blocks":
        left["blocks", spec.quantization_id] = weights + scales  # a byte a code
    if spec.export:
        packed = weights * spec.scheme.bits // 8 + scales // 2
        others = plain // facts.parameters * (facts.parameters - weights)
        left["export", spec.id] = plain if spec.export == "hf" else packed + others
    return left


def disk_of(spec: TrialSpec, facts: ModelFacts) -> int:
    """Bytes that a finished trial leaves if it shares them with none."""
    return sum(left_behind(spec, facts).values())


def _baseline(text: Json, facts: ModelFacts, dtype: str, drift: object) -> int:
    windows, length = text_windows(text), text["window"]
    wanted = None if drift == AUTO else int(str(drift))
    return baseline_bytes(
        kept_windows(windows, length, facts.hidden, dtype, wanted), length, facts.hidden, dtype
    )


def simulate(planned: Sequence[Planned], machines: Sequence[Machine]) -> tuple[float, int]:
    """Seconds from the first trial's start to the last one's end, and how many run at once at most, if each trial in
    the plan's order starts as soon as there is room for it, and later ones pass it where there is none."""
    cores = [machine.cpus for machine in machines]
    memory = [float("inf") if machine.memory is None else machine.memory for machine in machines]
    gpus = [[1.0] * int(machine.gpus) for machine in machines]
    kinds = [machine.kind for machine in machines]
    queues: dict[Allocation, deque[float]] = {}
    for one in planned:
        if one.share is not None:
            queues.setdefault(one.share, deque()).append(one.seconds)
    now, most, ticket = 0.0, 0, 0
    running: list[tuple[float, int, Allocation, list[tuple[int, int]]]] = []
    while running or any(queues.values()):
        for share, waiting in queues.items():
            while waiting:
                places = _place(share, cores, memory, gpus, kinds)
                if len(places) < share.ranks:
                    break
                for node, gpu in places:
                    cores[node] -= share.cpus
                    memory[node] -= share.memory
                    if gpu >= 0:
                        gpus[node][gpu] -= min(1.0, share.gpus)
                heapq.heappush(running, (now + waiting.popleft(), ticket, share, places))
                ticket += 1
        most = max(most, len(running))
        if not running:  # machines that are still to come: one for each that waits
            return now + max(
                (max(waiting) for waiting in queues.values() if waiting), default=0.0
            ), max(1, most)
        now, _, share, places = heapq.heappop(running)
        for node, gpu in places:
            cores[node] += share.cpus
            memory[node] += share.memory
            if gpu >= 0:
                gpus[node][gpu] += min(1.0, share.gpus)
    return now, most


def _place(
    share: Allocation,
    cores: Sequence[float],
    memory: Sequence[float],
    gpus: Sequence[Sequence[float]],
    kinds: Sequence[str],
) -> list[tuple[int, int]]:
    """Machine and GPU (-1: none) for each rank, as far as there is room."""
    found: list[tuple[int, int]] = []
    for node in range(len(cores)):
        free = min(
            int(cores[node] / share.cpus + 1e-9) if share.cpus else share.ranks,
            share.ranks - len(found),
        )
        if share.memory:
            free = min(free, int(memory[node] // share.memory))
        if free <= 0 or share.kind not in ("", kinds[node]):
            continue
        if not share.gpus:
            found += [(node, -1)] * free
        else:
            open_ = [k for k, left in enumerate(gpus[node]) if left + 1e-9 >= min(1.0, share.gpus)]
            open_.sort(key=lambda k: gpus[node][k])  # a GPU that is begun is filled first
            found += [(node, k) for k in open_[:free]]
        if len(found) >= share.ranks:
            return found[: share.ranks]
    return found


def describe(
    planned: Sequence[Planned], *, machines: Sequence[Machine], where: str, storage: Path | str
) -> str:
    """The plan for people: a line a trial, and the total."""
    rows = [
        (
            "trial",
            "what",
            "model",
            "on",
            "loader",
            "predicted",
            "needs",
            "main memory",
            "disk",
            "GPU-hours",
        )
    ]
    for one in planned:
        share = one.share
        head = (one.spec.id, one.spec.name, str(one.spec.model["name"]))
        if share is None:
            rows.append((*head, "done", "", "", "", "", "", ""))
            continue
        busy = f"{one.gpu_hours:.2f}" if share.gpus else "-"
        took = f"{duration(one.seconds)}{'' if one.basis == 'measured' else ' (rough)'}"
        left_on_disk = _bytes(one.disk) if one.disk else "-"
        on = f"{share} + {share.cpus * share.ranks:g} CPUs" if share.gpus else str(share)
        reserved = in_gb(share.memory * share.ranks)
        rows.append(
            (*head, on, share.loader, took, in_gb(share.needs), reserved, left_on_disk, busy)
        )
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    left = [one for one in planned if not one.done]
    wall, at_once = simulate(left, machines)
    disk, hours = sum(one.disk for one in left), sum(one.gpu_hours for one in left)
    total = [
        f"{len(left)} to run on {where}",
        f"{at_once} at a time at most",
        f"about {duration(wall)}",
    ]
    total += [f"{hours:.1f} GPU-hours"] if hours else []
    total += [f"{_bytes(disk)} of disk"] if disk else []
    lines.append(f"{', '.join(total)}. State and records: {storage}")
    if left and any(one.basis != "measured" for one in left):
        lines.append(
            "Rough: arithmetic alone; trials that finish here correct it for the next plan."
        )
    return "\n".join(lines)


def _bytes(count: int) -> str:
    return in_gb(count) if count >= 1e8 else f"{count / 1e6:.0f} MB"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
