"""Which trials run, on what, in what order, and what they are predicted to take: from config.json and arithmetic alone.

A trial's resources come from the bytes that its model needs (`models/footprint`): a share of a GPU, one, or a gang; of
main memory what it takes, and of the cores the same part as of the memory, at least one. What comes next where that was
too little is the next rung of the same ladder (`rungs`).
"""

import functools
import heapq
import os
import re
import subprocess
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from q3q.errors import ConfigError
from q3q.evaluate.baseline import baseline_bytes, kept_windows
from q3q.models.checkpoint import ModelFacts
from q3q.models.footprint import (
    AUTO,
    LOADERS,
    Device,
    ahead_bytes,
    bytes_of,
    free_memory,
    in_gb,
    need,
)
from q3q.record import TrialRecord
from q3q.spec import Json, TrialSpec
from q3q.sweep.costs import CostModel, Rate, text_windows

FRACTIONS = (
    0.25,
    0.5,
    1.0,
)  # of a GPU: smaller shares would only make trials wait for each other on it
ROOM = 0.92  # of a GPU's memory that trials may plan with: the rest fragments, and belongs to its driver
FREE = 0.9  # of the memory that is free on this machine, likewise
MOST_ACTIVATIONS = 8_000_000_000  # bytes of hidden states that a trial reserves memory for
KEEPS_INPUTS = {
    "awq": 5
}  # so many times the hidden states are held in memory at once, in the walk's shares of it
HOST_BYTES = 4_000_000_000  # of main memory that a trial on a GPU takes, beside two blocks on their way to it
MOST_THREADS = 16  # of a trial on a GPU, which hardly computes on its cores
CORES_TO_COME = (
    4  # for each GPU of a machine that nobody has seen yet, or of a machine without GPUs
)
# Bytes of a GPU, by the name that Ray has for its kind; of kinds that come in several sizes the smallest.
GPU_BYTES = {
    kind: gib * 2**30
    for gib, kinds in {
        12: ("K80",),
        15: ("T4",),
        16: ("V100", "P100"),
        22: ("A10G", "L4"),
        40: ("A100", "A100-40G"),
        44: ("L40S",),
        79: ("A100-80G", "H100"),
        94: ("H20", "RTX-PRO-6000"),
        140: ("H200",),
        178: ("B200", "GB200"),
        260: ("B300", "GB300"),
    }.items()
    for kind in kinds
}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What one machine has. memory: bytes that trials may take; gpu_memory: of one of its GPUs; each None if unknown.
    kind: of its GPUs, as Ray calls it, or "". name: of its GPU or processor, as records have it, or ""."""

    cpus: float
    gpus: float = 0
    memory: int | None = None
    gpu_memory: int | None = None
    kind: str = ""
    name: str = ""


@dataclass(frozen=True, kw_only=True)
class Wishes:
    """What the person asked for; None: as the plan sees fit. gpus: a share of one, or how many a gang has. ranks: that
    share a trial. memory: of main memory, bytes that a trial reserves. gpu_memory: of a GPU. patience: seconds to wait
    for machines to come, so that no trial is refused because there are too few."""

    cpus: float | None = None
    gpus: float | None = None
    ranks: int | None = None
    memory: int | None = None
    gpu_memory: int | None = None
    patience: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Share:
    """What a trial gets; of a gang, what each of its ranks gets.

    memory: of main memory, bytes that it reserves. needs: bytes that it is predicted to take where its model lies, in
    main memory or a GPU's. room: bytes that it may take there, more than needed for activations; None if unknown.
    kind: of GPU that it must land on, because it does not fit on the others; "": on any.
    """

    cpus: float
    gpus: float
    memory: int
    needs: int
    room: int | None = None
    loader: str = "resident"
    ranks: int = 1
    kind: str = ""

    def __str__(self) -> str:
        if self.gpus:
            count = self.gpus * self.ranks
            return f"{count:g} {self.kind or 'GPU'}{'s' if count > 1 and not self.kind else ''}"
        gang = f"{self.ranks} x " if self.ranks > 1 else ""
        return f"{gang}{self.cpus:g} CPU{'s' if self.cpus > 1 else ''}"

    def to_places(self) -> Json:
        """What a trial is told of it (`places["share"]`): on what, how, and within which memory it runs."""
        bound = {} if self.room is None else {"memory": self.room}
        return {"gpus": self.gpus, "loader": self.loader, **bound}


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One trial. share: None of one that is done. larger: what it is tried with once more if it runs out of memory.
    phases: predicted seconds of each. basis: how they are known. disk: bytes that it leaves beside its record, but for
    what trials before it left already."""

    spec: TrialSpec
    share: Share | None
    larger: Share | None = None
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

    def to_json(self, share: Share | None = None) -> Json:
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


# ---------------------------------------------------------------------------------------------- resources


def rungs(
    spec: TrialSpec, facts: ModelFacts, machines: Sequence[Machine], wishes: Wishes
) -> Iterator[Share]:
    """What the trial could be given, from the least on; whether it is enough or there is as much is not asked.

    On cores: what it needs, twice that, and the same streamed. On GPUs: shares of one with its model resident, gangs
    that share the model out, then one GPU that streams it; where the machines' GPUs differ, each on any of them first,
    then on the largest alone.
    """
    loader = spec.places.get("loader", AUTO)
    if loader not in (AUTO, *LOADERS):
        raise ConfigError(
            f"loader={loader} is not known. Choose from: {AUTO}, {', '.join(LOADERS)}"
        )
    on_gpu = (
        wishes.gpus if wishes.gpus is not None else max((one.gpus for one in machines), default=0)
    ) > 0
    whole = bool(
        spec.evaluation.get("generates")
    )  # token by token: no model that is read anew for each
    for share in (_on_gpus if on_gpu else _on_cores)(spec, facts, machines, wishes):
        held = share.loader == "resident" or not whole
        if held and loader in (AUTO, share.loader) and wishes.ranks in (None, share.ranks):
            yield share


def _on_cores(
    spec: TrialSpec, facts: ModelFacts, machines: Sequence[Machine], wishes: Wishes
) -> Iterator[Share]:
    roomiest = max(machines, key=lambda one: (one.cpus > 0, one.memory or 0))
    ranks = (
        wishes.ranks or 1
    )  # cores alone never make a gang of their own accord: streaming takes less memory
    for loader in ("resident", "streamed") if ranks == 1 else ("sharded",):
        needs = _need(
            facts, spec.model["dtype"], str(spec.method["name"]), loader, ranks, "cpu", spec.heads
        )
        if wishes.memory is not None and wishes.memory < needs:
            continue
        more = min(_activations(spec, facts), MOST_ACTIVATIONS)
        more += ahead_bytes(facts, spec.model["dtype"]) if loader == "streamed" else 0
        for times in (1, 2):
            memory = times * (wishes.memory or needs + more)
            if wishes.memory is None and roomiest.memory is not None:
                memory = max(times * needs, min(memory, roomiest.memory))
            part = min(1.0, memory / roomiest.memory) if roomiest.memory else 0.0
            cpus = max(1, int(roomiest.cpus * part)) if wishes.cpus is None else wishes.cpus
            yield Share(
                cpus=cpus,
                gpus=0,
                memory=memory,
                needs=needs,
                room=memory,
                loader=loader,
                ranks=ranks,
            )


def _activations(spec: TrialSpec, facts: ModelFacts) -> int:
    """Bytes of the hidden states of all calibration windows between two blocks, and of inputs that the method keeps
    inside one; what has no room goes to disk."""
    if spec.calibration is None:
        return 0
    item = facts.weight_bytes(spec.model["dtype"]) // facts.parameters
    times = KEEPS_INPUTS.get(str(spec.method["name"]), 1)
    return int(
        times * spec.calibration["samples"] * spec.calibration["length"] * facts.hidden * item
    )


def _on_gpus(
    spec: TrialSpec, facts: ModelFacts, machines: Sequence[Machine], wishes: Wishes
) -> Iterator[Share]:
    asked = wishes.ranks if wishes.gpus is None and (wishes.ranks or 1) > 1 else wishes.gpus
    having = [one for one in machines if one.gpus]
    largest = max(having, key=lambda one: one.gpu_memory or 0, default=None)
    pools = {"": having}
    if (
        largest is not None
        and largest.kind
        and any(one.gpu_memory != largest.gpu_memory for one in having)
    ):
        pools[largest.kind] = [one for one in having if one.kind == largest.kind]

    def shares(loader: str, ranks: int = 1) -> Iterator[Share]:
        for kind, pool in pools.items():
            known = all(one.gpu_memory is not None for one in pool) and bool(pool)
            for gpus in (1.0,) if ranks > 1 else _fractions(asked, known and loader == "resident"):
                yield _on_pool(
                    spec, facts, pool, wishes, loader=loader, gpus=gpus, ranks=ranks, kind=kind
                )

    if asked is None or asked <= 1:
        yield from shares("resident")
    if asked is None or asked > 1:
        count, ranks = sum(int(one.gpus) for one in having), int(asked or 2)
        while ranks <= max(count, asked or 0):
            yield from shares("sharded", ranks)
            ranks *= 2
    if asked is None or asked <= 1:
        yield from shares("streamed")


def _fractions(asked: float | None, packs: bool) -> Sequence[float]:
    """Shares of one GPU, the least first: what was asked for, and a whole one. packs: whether less would do."""
    if asked is not None:
        return sorted({asked, 1.0})
    return FRACTIONS if packs else FRACTIONS[-1:]


def _on_pool(
    spec: TrialSpec,
    facts: ModelFacts,
    pool: Sequence[Machine],
    wishes: Wishes,
    *,
    loader: str,
    gpus: float,
    ranks: int,
    kind: str,
) -> Share:
    """A share of these machines' GPUs, on whichever of them it lands."""
    method, dtype = str(spec.method["name"]), spec.model["dtype"]
    best = max(
        pool, key=lambda one: (one.gpus, one.cpus), default=Machine(cpus=CORES_TO_COME, gpus=1)
    )
    threads = min(MOST_THREADS, max(1, int(best.cpus / best.gpus * gpus)))
    sizes = [one.gpu_memory for one in pool if one.gpu_memory is not None]
    return Share(
        cpus=threads if wishes.cpus is None else wishes.cpus,
        gpus=gpus,
        memory=wishes.memory or HOST_BYTES + 2 * facts.block_bytes(0, dtype),
        needs=_need(facts, dtype, method, loader, ranks, "cuda", spec.heads),
        room=round(ROOM * gpus * min(sizes)) if sizes else None,
        loader=loader,
        ranks=ranks,
        kind=kind,
    )


@functools.cache
def _need(
    facts: ModelFacts, dtype: str, name: str, loader: str, ranks: int, device: Device, heads: int
) -> int:
    method = None if name == "none" else name
    return need(facts, dtype, method=method, loader=loader, ranks=ranks, device=device, heads=heads)


def fits(
    share: Share, machines: Sequence[Machine], bound: int | None = None, patience: float = 0.0
) -> bool:
    """Whether the machines can ever hold it, on whichever of them it lands. bound: bytes that the person allows the
    model. patience: more machines like these, and with more main memory, are to come: their number is not asked."""
    if bound is not None and share.needs > bound:
        return False
    if not share.gpus and share.needs > share.memory:
        return False  # less was asked for than it takes
    if not all(
        _holds(share, machine) for machine in machines if patience or _seats(share, machine)
    ):
        return False
    return bool(patience) or sum(_seats(share, machine) for machine in machines) >= share.ranks


def rooms(share: Share, machine: Machine) -> int:
    """How many trials of this share (or ranks of such a gang) an idle machine holds side by side."""
    return _seats(share, machine) if _holds(share, machine) else 0


def _seats(share: Share, machine: Machine) -> int:
    """As many as Ray, which does not know what a GPU holds, would place there."""
    limits = [machine.cpus / share.cpus if share.cpus else 1e9]
    if machine.memory is not None and share.memory:
        limits.append(machine.memory / share.memory)
    if share.gpus:
        allowed = share.kind in ("", machine.kind)
        per_gpu = (
            machine.gpus // share.gpus if share.gpus >= 1 else machine.gpus * (1 // share.gpus)
        )
        limits.append(per_gpu if allowed else 0)
    return int(min(limits) + 1e-9)


def _holds(share: Share, machine: Machine) -> bool:
    """Whether the share of one of its GPUs is large enough, as far as is known; of cores there is nothing to hold."""
    if (
        not share.gpus
        or not machine.gpus
        or machine.gpu_memory is None
        or share.kind not in ("", machine.kind)
    ):
        return True
    return share.needs <= ROOM * machine.gpu_memory * min(1.0, share.gpus)


def shares_of(
    spec: TrialSpec, facts: ModelFacts, machines: Sequence[Machine], wishes: Wishes
) -> tuple[Share, Share | None]:
    """What the trial gets, and what it gets once more if that was too little: the first rung that fits and is what was
    asked for, and the next one that fits.

    Raises:
        ConfigError: none fits; it says what would.
    """
    bound = spec.places.get("memory")
    ladder = list(rungs(spec, facts, machines, wishes))
    fitting = [share for share in ladder if fits(share, machines, bound)]
    if not fitting and wishes.patience:
        fitting = [share for share in ladder if fits(share, machines, bound, wishes.patience)]
    asked = [share for share in fitting if wishes.gpus in (None, share.gpus * share.ranks)]
    if not asked:
        raise ConfigError(_too_large(spec, facts, machines, ladder, wishes))
    first = asked[0]
    return first, next(
        (share for share in fitting[fitting.index(first) :] if _has_more(share, first)), None
    )


def _has_more(share: Share, first: Share) -> bool:
    """Whether a later rung is worth a second try: more memory for each rank, more ranks, or less to hold."""
    more = (share.room or share.gpus) > (first.room or first.gpus)
    return more or share.ranks > first.ranks or share.loader != first.loader


def _too_large(
    spec: TrialSpec,
    facts: ModelFacts,
    machines: Sequence[Machine],
    ladder: Sequence[Share],
    wishes: Wishes,
) -> str:
    """One line: what it takes, what there is, and what would make it fit."""
    dtype, method = spec.model["dtype"], str(spec.method["name"])
    largest = max(
        machines, key=lambda one: (one.gpus > 0, one.gpu_memory or 0, one.gpus, one.memory or 0)
    )
    on_gpu = any(share.gpus for share in ladder) or (
        not ladder and largest.gpus > 0 and wishes.gpus != 0
    )
    device: Device = "cuda" if on_gpu else "cpu"
    generates = ", ".join(spec.evaluation.get("generates", ()))
    ways = ("resident",) if generates else ("resident", "streamed")
    needs = {loader: _need(facts, dtype, method, loader, 1, device, spec.heads) for loader in ways}
    least = min(needs.values())
    has = largest.gpu_memory if device == "cuda" else largest.memory
    count, unit = (largest.gpus, "GPU") if device == "cuda" else (largest.cpus, "CPU")
    where = f"{count:g} {unit}{'' if count == 1 else 's'}"
    held = f"the largest machine has {where}{f', {in_gb(has)} of memory' if has else ''}"
    if device == "cuda" and has and wishes.gpus and wishes.gpus < 1:
        held = (
            f"{wishes.gpus:g} of a GPU of {in_gb(has)} has {in_gb(ROOM * wishes.gpus * has)} for it"
        )
    wanted = spec.places.get("loader", AUTO)
    advice = []
    if wanted not in (AUTO, "streamed") and has and needs.get("streamed", has + 1) <= has:
        advice.append("loader=streamed")
    if wishes.memory is not None and has and least <= has:
        advice.append(
            f"cluster.memory_per_trial=auto (or at least {in_gb(least).replace(' ', '')})"
        )
    bound = spec.places.get("memory")
    if bound is not None and least > bound:
        advice.append(f"memory={in_gb(least).replace(' ', '')} or more")
    if generates:
        advice.append(
            f"evaluation.tasks without {generates}, which generates text and so needs a resident model"
        )
    if wishes.cpus is not None and wishes.cpus > largest.cpus:
        advice.append(f"cluster.cpus_per_trial={largest.cpus:g} or fewer")
    if device == "cuda" and not largest.gpus:
        advice.append("cluster.gpus_per_trial=0, which computes on cores")
    if device == "cuda":
        if wishes.gpus and wishes.gpus < 1:
            advice.append("cluster.gpus_per_trial=1")
        sizes = () if generates else (2, 4, 8, 16, 32, 64)
        ranks = next((n for n in sizes if has and _fits_gang(spec, facts, n, has)), None)
        if ranks is not None and (wishes.gpus or ranks > sum(int(one.gpus) for one in machines)):
            advice.append(f"{ranks} such GPUs (cluster.gpus_per_trial={ranks})")
    advice.append(f"a cluster whose machines have {in_gb(least)} or more (cluster=existing)")
    takes = ", ".join(f"{in_gb(size)} {loader}" for loader, size in needs.items())
    return (
        f"{spec.name} · {spec.model['name']} fits nowhere: it needs {takes}, and {held}. "
        f"What would make it fit: {'; '.join(advice)}"
    )


def _fits_gang(spec: TrialSpec, facts: ModelFacts, ranks: int, gpu_memory: int) -> bool:
    method = str(spec.method["name"])
    return (
        _need(facts, spec.model["dtype"], method, "sharded", ranks, "cuda", spec.heads)
        <= ROOM * gpu_memory
    )


# ---------------------------------------------------------------------------------------------- the plan


def plan(
    specs: Sequence[TrialSpec],
    finished: Mapping[str, TrialRecord],
    facts: Mapping[str, ModelFacts],
    *,
    machines: Sequence[Machine],
    wishes: Wishes,
    model: CostModel,
) -> list[Planned]:
    """The trials still to run first: the unquantized models, which the others are compared with, then longest first, so
    that the last one to end is a short one. Of those that take as long, a model's are neighbours.

    Raises:
        ConfigError: a trial fits nowhere.
    """
    planned = []
    there: set[tuple[str, ...]] = set()
    chosen: dict[tuple[str, ...], tuple[Share, Share | None]] = {}
    for spec in specs:
        mine = facts[spec.id]
        if spec.id in finished:
            planned.append(Planned(spec=spec, share=None, phases={}, basis="done", disk=0))
            there |= left_behind(spec, mine).keys()
            continue
        held = (str(spec.places.get(key)) for key in ("loader", "memory"))
        rest = map(str, ("generates" in spec.evaluation, spec.heads, _activations(spec, mine)))
        kind = (model_key(spec), spec.model["dtype"], spec.method["name"], *held, *rest)
        if kind not in chosen:
            chosen[kind] = shares_of(spec, mine, machines, wishes)
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


def rate_of(share: Share, machines: Sequence[Machine]) -> Rate:
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
    queues: dict[Share, deque[float]] = {}
    for one in planned:
        if one.share is not None:
            queues.setdefault(one.share, deque()).append(one.seconds)
    now, most, ticket = 0.0, 0, 0
    running: list[tuple[float, int, Share, list[tuple[int, int]]]] = []
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
    share: Share,
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


# ---------------------------------------------------------------------------------------------- for people


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


# ---------------------------------------------------------------------------------------------- machines


def machine_here() -> Machine:
    """This machine, as far as this process may use it."""
    gpus = gpus_here()
    gpu_memory, name = _gpu_here() if gpus else (None, "")
    from q3q.environment import cores, processor

    return Machine(
        cpus=cores(),
        gpus=gpus,
        memory=_free_here(),
        gpu_memory=gpu_memory,
        name=name if gpus else processor(),
    )


def gpus_here() -> int:
    """GPUs of this machine, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([one for one in visible.split(",") if one.strip() and one.strip() != "-1"])
    return (
        len(list(Path("/proc/driver/nvidia/gpus").glob("*")))
        if Path("/proc/driver/nvidia/gpus").is_dir()
        else 0
    )


def _gpu_here() -> tuple[int | None, str]:
    """Bytes of the smallest GPU, and the first one's name, as the driver's own tool tells them."""
    query = ["nvidia-smi", "--query-gpu=memory.total,name", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None, ""
    rows = [line.split(",", 1) for line in told.splitlines() if "," in line]
    sizes = [int(size) * 2**20 for size, _ in rows if size.strip().isdigit()]
    return (min(sizes), rows[0][1].strip()) if sizes else (None, "")


def _free_here() -> int | None:
    try:
        return round(FREE * free_memory())
    except ConfigError:  # not Linux; Ray will count
        return None


def amount(key: str, given: object) -> float | None:
    """A knob that is a number, or auto (or null): None."""
    if given is None or given == AUTO:
        return None
    try:
        number = float(str(given))
    except ValueError:
        raise ConfigError(f"{key}={given}: give a number, or {AUTO}") from None
    if not 0 <= number < float("inf"):
        raise ConfigError(f"{key}={given}: give 0 or more, or {AUTO}")
    return number


def size(key: str, given: object) -> int | None:
    """A knob that is bytes (`16GB`, `512MiB`, or a plain number), or auto (or null): None."""
    return None if given is None or given == AUTO else bytes_of(str(given), key)


def wishes_of(cluster: Callable[[str], object]) -> Wishes:
    """The cluster's knobs, read by name.

    Raises:
        ConfigError: one of them cannot be meant.
    """
    cpus, gpus = (
        amount(f"cluster.{key}_per_trial", cluster(f"{key}_per_trial")) for key in ("cpus", "gpus")
    )
    if cpus == 0:
        raise ConfigError("cluster.cpus_per_trial=0: give at least a part of one, or auto")
    if gpus is not None and gpus > 1 and gpus != int(gpus):
        raise ConfigError(
            f"cluster.gpus_per_trial={gpus:g}: give a part of one GPU, 1, or a whole number for a gang"
        )
    ranks = amount("cluster.ranks_per_trial", cluster("ranks_per_trial"))
    if ranks is not None and (ranks != int(ranks) or ranks < 1):
        raise ConfigError(
            f"cluster.ranks_per_trial={ranks:g}: give 1, a whole number for a gang, or auto"
        )
    if gpus and ranks and ranks != max(1, gpus):
        raise ConfigError(
            f"cluster.ranks_per_trial={ranks:g} and cluster.gpus_per_trial={gpus:g} contradict each other: each rank "
            "has one GPU"
        )
    memory, gpu_memory = (
        size(f"cluster.{key}", cluster(key)) for key in ("memory_per_trial", "gpu_memory")
    )
    patience = amount("cluster.patience", cluster("patience")) or 0.0
    whole = None if ranks is None else int(ranks)
    return Wishes(
        cpus=cpus, gpus=gpus, ranks=whole, memory=memory, gpu_memory=gpu_memory, patience=patience
    )


def sized(kind: str, here: Machine) -> int | None:
    """Bytes of a GPU of another machine, by what Ray calls its kind; where Ray does not say, as this machine's."""
    if not kind or re.search(rf"\b{re.escape(kind)}\b", here.name):
        return here.gpu_memory
    return GPU_BYTES.get(kind)


def expected(machines: Sequence[Machine], wishes: Wishes) -> list[Machine]:
    """The machines that there are, with GPUs as large as the person says; and of a cluster that grows, while no trial
    could run on any of them, one such as will come."""
    known = [
        replace(one, gpu_memory=wishes.gpu_memory or one.gpu_memory) if one.gpus else one
        for one in machines
    ]
    on_gpu = bool(wishes.gpu_memory if wishes.gpus is None else wishes.gpus)
    if wishes.patience and not any(one.gpus if on_gpu else one.cpus for one in known):
        gpus = max(1, int(wishes.gpus or 1)) if on_gpu else 0
        cpus = max(CORES_TO_COME * max(1, gpus), (wishes.cpus or 0) * max(1, gpus))
        known.append(
            Machine(cpus=cpus, gpus=gpus, gpu_memory=wishes.gpu_memory if on_gpu else None)
        )
    return known
