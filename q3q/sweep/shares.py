"""What a trial gets of a machine: cores, memory, a share of a GPU or a gang of them."""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from q3q.errors import ConfigError
from q3q.models.facts import ModelFacts
from q3q.models.footprint import (
    AUTO,
    LOADERS,
    Device,
    ahead_bytes,
    in_gb,
    need,
)
from q3q.spec import Json, TrialSpec
from q3q.sweep.machines import CORES_TO_COME, Machine, ResourceRequest

FRACTIONS = (
    0.25,
    0.5,
    1.0,
)  # of a GPU: smaller shares would only make trials wait for each other on it
ROOM = 0.92  # of a GPU's memory that trials may plan with: the rest fragments, and belongs to its driver
MOST_ACTIVATIONS = 8_000_000_000  # bytes of hidden states that a trial reserves memory for
KEEPS_INPUTS = {
    "awq": 5
}  # so many times the hidden states are held in memory at once, in the walk's shares of it
HOST_BYTES = 4_000_000_000  # of main memory that a trial on a GPU takes, beside two blocks on their way to it
MOST_THREADS = 16  # of a trial on a GPU, which hardly computes on its cores


@dataclass(frozen=True, kw_only=True)
class Allocation:
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


def rungs(
    spec: TrialSpec, facts: ModelFacts, machines: Sequence[Machine], wishes: ResourceRequest
) -> Iterator[Allocation]:
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
    spec: TrialSpec, facts: ModelFacts, machines: Sequence[Machine], wishes: ResourceRequest
) -> Iterator[Allocation]:
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
        more = min(activation_bytes(spec, facts), MOST_ACTIVATIONS)
        more += ahead_bytes(facts, spec.model["dtype"]) if loader == "streamed" else 0
        for times in (1, 2):
            memory = times * (wishes.memory or needs + more)
            if wishes.memory is None and roomiest.memory is not None:
                memory = max(times * needs, min(memory, roomiest.memory))
            part = min(1.0, memory / roomiest.memory) if roomiest.memory else 0.0
            cpus = max(1, int(roomiest.cpus * part)) if wishes.cpus is None else wishes.cpus
            yield Allocation(
                cpus=cpus,
                gpus=0,
                memory=memory,
                needs=needs,
                room=memory,
                loader=loader,
                ranks=ranks,
            )


def activation_bytes(spec: TrialSpec, facts: ModelFacts) -> int:
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
    spec: TrialSpec, facts: ModelFacts, machines: Sequence[Machine], wishes: ResourceRequest
) -> Iterator[Allocation]:
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

    def shares(loader: str, ranks: int = 1) -> Iterator[Allocation]:
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
    wishes: ResourceRequest,
    *,
    loader: str,
    gpus: float,
    ranks: int,
    kind: str,
) -> Allocation:
    """A share of these machines' GPUs, on whichever of them it lands."""
    method, dtype = str(spec.method["name"]), spec.model["dtype"]
    best = max(
        pool, key=lambda one: (one.gpus, one.cpus), default=Machine(cpus=CORES_TO_COME, gpus=1)
    )
    threads = min(MOST_THREADS, max(1, int(best.cpus / best.gpus * gpus)))
    sizes = [one.gpu_memory for one in pool if one.gpu_memory is not None]
    return Allocation(
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
    share: Allocation, machines: Sequence[Machine], bound: int | None = None, patience: float = 0.0
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


def rooms(share: Allocation, machine: Machine) -> int:
    """How many trials of this share (or ranks of such a gang) an idle machine holds side by side."""
    return _seats(share, machine) if _holds(share, machine) else 0


def _seats(share: Allocation, machine: Machine) -> int:
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


def _holds(share: Allocation, machine: Machine) -> bool:
    """Whether the share of one of its GPUs is large enough, as far as is known; of cores there is nothing to hold."""
    if (
        not share.gpus
        or not machine.gpus
        or machine.gpu_memory is None
        or share.kind not in ("", machine.kind)
    ):
        return True
    return share.needs <= ROOM * machine.gpu_memory * min(1.0, share.gpus)


def allocations_of(
    spec: TrialSpec, facts: ModelFacts, machines: Sequence[Machine], wishes: ResourceRequest
) -> tuple[Allocation, Allocation | None]:
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


def _has_more(share: Allocation, first: Allocation) -> bool:
    """Whether a later rung is worth a second try: more memory for each rank, more ranks, or less to hold."""
    more = (share.room or share.gpus) > (first.room or first.gpus)
    return more or share.ranks > first.ranks or share.loader != first.loader


def _too_large(
    spec: TrialSpec,
    facts: ModelFacts,
    machines: Sequence[Machine],
    ladder: Sequence[Allocation],
    wishes: ResourceRequest,
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
