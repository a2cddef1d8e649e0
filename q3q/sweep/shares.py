"""What a trial can be given: cores, memory, a share of a GPU or a gang of them."""

import functools
import math
from collections.abc import Iterator, Sequence

from q3q.errors import ConfigError
from q3q.formatting import enough_gb, in_gb
from q3q.models.facts import ModelFacts
from q3q.models.footprint import AUTO, LOADERS, Device, MethodMemory, ahead_bytes, need
from q3q.placement import Trial
from q3q.quantize.methods.registry import settings_or_default
from q3q.spec import OWN_TEXT, TrialSpec
from q3q.sweep.allocation import Allocation, Choices
from q3q.sweep.costs import text_windows
from q3q.sweep.machines import CORES_TO_COME, Machine, ResourceRequest

FRACTIONS = (0.25, 0.5, 1.0)  # of a GPU; with smaller ones trials would only wait for each other
# The memory for activations that keeps all hidden states of a block's inputs on a GPU, in their
# bytes: the rest is for runs that halt inside the block (`quantize.activations.HIDDEN_SHARE`).
HALTED = 3
PINNED_MARGIN = 1.25  # pinned memory is taken in powers of two, which do not end where tensors do
ROOM = 0.92  # of a GPU's memory that trials may plan with: the rest fragments, or is its driver's
MOST_ACTIVATIONS = 8_000_000_000  # bytes of hidden states that a trial reserves memory for
HOST_BYTES = 4_000_000_000  # main memory of a trial on a GPU, beside two blocks on their way there
MOST_THREADS = 16  # of a trial on a GPU, which hardly computes on its cores
GANG_SIZES = (2, 4, 8, 16, 32, 64)  # that a refusal suggests


def memory_of(spec: TrialSpec) -> MethodMemory | None:
    """Return what the trial's method holds in memory; None if it quantizes nothing."""
    return settings_or_default(spec.method).memory()


def activation_bytes(spec: TrialSpec, facts: ModelFacts) -> int:
    """Return the bytes of all windows' hidden states between two blocks.

    Inputs that the method holds inside a block are included. What finds no memory goes to disk.
    """
    if spec.calibration is None:
        return 0
    item = facts.weight_bytes(spec.model.dtype) // facts.parameters
    copies = settings_or_default(spec.method).inputs_held
    return copies * spec.calibration.tokens * facts.hidden * item


def state_bytes(spec: TrialSpec, facts: ModelFacts) -> int:
    """Return the bytes of the final hidden states of the longest text that is measured.

    A model that is not resident runs all its windows through each block; of a gang, rank 0 gets
    them all.
    """
    item = facts.weight_bytes(spec.model.dtype) // facts.parameters
    tokens = (text_windows(text) * text.window for text in spec.evaluation.texts)
    return max(tokens, default=0) * facts.hidden * item


def choices_of(
    trial: Trial, facts: ModelFacts, machines: Sequence[Machine], request: ResourceRequest
) -> Choices:
    """Return all that the trial can be given.

    Raises:
        ConfigError: nothing fits; the message says what would.
    """
    options, bound = list(_options(trial, facts, machines, request)), trial.placement.memory
    fitting = [option for option in options if fits(option, machines, bound)]
    if not fitting and request.patience:
        fitting = [option for option in options if fits(option, machines, bound, request.patience)]
    requested = [option for option in fitting if request.gpus in (None, option.gpus * option.ranks)]
    if not requested:
        raise ConfigError(_refusal(trial, facts, machines, options, request))
    return Choices(tuple(fitting), tuple(requested))


def _options(
    trial: Trial, facts: ModelFacts, machines: Sequence[Machine], request: ResourceRequest
) -> Iterator[Allocation]:
    """Yield what the trial could be given, the least first, whether or not it fits anywhere.

    On cores: what it needs, twice that, and the same streamed. On GPUs: shares of one with its
    model resident, gangs that divide the model, then one GPU that streams it; where the machines'
    GPUs differ, each option is tried for any GPU first, then for the largest kind alone.
    """
    spec, loader = trial.spec, trial.placement.loader or AUTO
    if loader not in (AUTO, *LOADERS):
        raise ConfigError(
            f"loader={loader} is not known. Choose from: {AUTO}, {', '.join(LOADERS)}"
        )
    gpus = request.gpus
    if gpus is None:
        gpus = max((machine.gpus for machine in machines), default=0)
    for option in (_on_gpus if gpus > 0 else _on_cores)(spec, facts, machines, request):
        # A model that is not resident would be read again for each generated token.
        able = option.loader == "resident" or not spec.generates
        able = able and (option.ranks == 1 or spec.budget is None)  # one process allots its bits
        if able and loader in (AUTO, option.loader) and request.ranks in (None, option.ranks):
            yield option


def _on_cores(
    spec: TrialSpec, facts: ModelFacts, machines: Sequence[Machine], request: ResourceRequest
) -> Iterator[Allocation]:
    roomiest = max(machines, key=lambda machine: (machine.cpus > 0, machine.memory or 0))
    ranks = request.ranks or 1  # a gang on cores only on request: streaming takes less memory
    for loader in ("resident", "streamed") if ranks == 1 else ("sharded",):
        needs = _need(spec, facts, loader, ranks, "cpu")
        if request.memory is not None and request.memory < needs:
            continue
        more = min(activation_bytes(spec, facts), MOST_ACTIVATIONS)
        more += ahead_bytes(facts, spec.model.dtype) if loader == "streamed" else 0
        for times in (1, 2):
            memory = times * (request.memory or needs + more)
            if request.memory is None and roomiest.memory is not None:
                memory = max(times * needs, min(memory, roomiest.memory))
            part = min(1.0, memory / roomiest.memory) if roomiest.memory else 0.0
            yield Allocation(
                cpus=max(1, int(roomiest.cpus * part)) if request.cpus is None else request.cpus,
                gpus=0,
                memory=memory,
                needs=needs,
                room=memory,
                loader=loader,
                ranks=ranks,
            )


def _on_gpus(
    spec: TrialSpec, facts: ModelFacts, machines: Sequence[Machine], request: ResourceRequest
) -> Iterator[Allocation]:
    gang = request.gpus is None and (request.ranks or 1) > 1
    gpus = request.ranks if gang else request.gpus
    with_gpus = [machine for machine in machines if machine.gpus]
    pools = {"": with_gpus}
    if with_gpus:
        largest = max(with_gpus, key=lambda machine: machine.gpu_memory or 0)
        if largest.kind and any(machine.gpu_memory != largest.gpu_memory for machine in with_gpus):
            pools[largest.kind] = [machine for machine in with_gpus if machine.kind == largest.kind]

    def on_each_pool(loader: str, ranks: int = 1) -> Iterator[Allocation]:
        for kind, pool in pools.items():
            size_known = bool(pool) and all(machine.gpu_memory is not None for machine in pool)
            fractions: Sequence[float] = (1.0,)
            if ranks == 1 and gpus is not None:
                fractions = sorted({gpus, 1.0})
            elif ranks == 1 and size_known and loader == "resident":
                fractions = FRACTIONS
            for fraction in fractions:
                option = _on_pool(
                    spec, facts, pool, request, loader=loader, gpus=fraction, ranks=ranks, kind=kind
                )
                if gpus is None and option.is_share and option.pinned:
                    continue  # a larger share holds its activations too
                yield option

    if gpus is None or gpus <= 1:
        yield from on_each_pool("resident")
    if gpus is None or gpus > 1:
        count, ranks = sum(int(machine.gpus) for machine in with_gpus), int(gpus or 2)
        while ranks <= max(count, gpus or 0):
            yield from on_each_pool("sharded", ranks)
            ranks *= 2
    if gpus is None or gpus <= 1:
        yield from on_each_pool("streamed")


def _on_pool(
    spec: TrialSpec,
    facts: ModelFacts,
    pool: Sequence[Machine],
    request: ResourceRequest,
    *,
    loader: str,
    gpus: float,
    ranks: int,
    kind: str,
) -> Allocation:
    """Return a share of these machines' GPUs, on whichever of them the trial runs.

    Activations that find no room on the GPU go to main memory, which is reserved for them.
    """
    dtype = spec.model.dtype
    unseen = Machine(cpus=CORES_TO_COME, gpus=1)
    best = max(pool, key=lambda machine: (machine.gpus, machine.cpus), default=unseen)
    sizes = [machine.gpu_memory for machine in pool if machine.gpu_memory is not None]
    needs = _need(spec, facts, loader, ranks, "cuda")
    room, pinned = round(ROOM * gpus * min(sizes)) if sizes else None, 0
    if room is not None:
        spare = max(0, room - needs)
        pinned = max(0, activation_bytes(spec, facts) // ranks - spare // HALTED)
        if loader != "resident":
            pinned = max(pinned, state_bytes(spec, facts) - spare)
        pinned = min(int(PINNED_MARGIN * pinned), MOST_ACTIVATIONS)
    return Allocation(
        cpus=_threads(best.cpus / best.gpus * gpus) if request.cpus is None else request.cpus,
        gpus=gpus,
        memory=request.memory or HOST_BYTES + 2 * facts.block_bytes(0, dtype) + pinned,
        needs=needs,
        room=room,
        pinned=pinned,
        loader=loader,
        ranks=ranks,
        kind=kind,
    )


def _threads(cores: float) -> float:
    """Return the cores of a trial on a GPU; a part of one where there are fewer than trials."""
    if cores < 1:
        return max(0.01, math.floor(100 * cores) / 100)
    return min(MOST_THREADS, int(cores))


_cached_need = functools.cache(need)


def _need(spec: TrialSpec, facts: ModelFacts, loader: str, ranks: int, device: Device) -> int:
    method, heads, dtype = memory_of(spec), spec.heads, spec.model.dtype
    return _cached_need(
        facts, dtype, method=method, loader=loader, ranks=ranks, device=device, heads=heads
    )


def fits(
    allocation: Allocation,
    machines: Sequence[Machine],
    bound: int | None = None,
    patience: float = 0.0,
) -> bool:
    """Return True if the machines can hold it, on whichever of them it runs.

    Args:
        bound: bytes that the user allows the model.
        patience: more machines, with as large GPUs, may come: their number and their main memory do
            not count.
    """
    if bound is not None and allocation.needs > bound:
        return False
    if not allocation.gpus and allocation.needs > allocation.memory:
        return False  # the requested memory is less than it takes
    hosts = [machine for machine in machines if patience or _slots(allocation, machine)]
    if not all(_is_large_enough(machine, allocation) for machine in hosts):
        return False
    slots = sum(_slots(allocation, machine) for machine in machines)
    return bool(patience) or slots >= allocation.ranks


def capacity(allocation: Allocation, machine: Machine) -> int:
    """Count the trials (or a gang's ranks) that an idle machine holds side by side."""
    return _slots(allocation, machine) if _is_large_enough(machine, allocation) else 0


def _slots(allocation: Allocation, machine: Machine) -> int:
    """Count as many as Ray, which does not know a GPU's memory, would place on the machine."""
    limits = [machine.cpus / allocation.cpus if allocation.cpus else 1e9]
    if machine.memory is not None and allocation.memory:
        limits.append(machine.memory / allocation.memory)
    if allocation.gpus:
        per_machine = (
            machine.gpus // allocation.gpus
            if allocation.gpus >= 1
            else machine.gpus * (1 // allocation.gpus)
        )
        limits.append(per_machine if allocation.kind in ("", machine.kind) else 0)
    return int(min(limits) + 1e-9)


def _is_large_enough(machine: Machine, allocation: Allocation) -> bool:
    """Return False if the allocation's part of one of its GPUs is known to be too small."""
    if not allocation.gpus or not machine.gpus or machine.gpu_memory is None:
        return True
    if allocation.kind not in ("", machine.kind):
        return True
    return allocation.needs <= ROOM * machine.gpu_memory * min(1.0, allocation.gpus)


def _refusal(
    trial: Trial,
    facts: ModelFacts,
    machines: Sequence[Machine],
    options: Sequence[Allocation],
    request: ResourceRequest,
) -> str:
    """Return one line: what the trial needs, what the machines have, and what would make it fit."""
    spec = trial.spec
    largest = max(
        machines,
        key=lambda host: (host.gpus > 0, host.gpu_memory or 0, host.gpus, host.memory or 0),
    )
    on_gpu = any(option.gpus for option in options) or (
        not options and largest.gpus > 0 and request.gpus != 0
    )
    device: Device = "cuda" if on_gpu else "cpu"
    memory = largest.gpu_memory if on_gpu else largest.memory
    needs = {
        loader: _need(spec, facts, loader, 1, device)
        for loader in (("resident",) if spec.generates else ("resident", "streamed"))
    }
    count, unit = (largest.gpus, "GPU") if on_gpu else (largest.cpus, "CPU")
    size = f", {in_gb(memory)} of memory" if memory else ""
    has = f"the largest machine has {count:g} {unit}{'' if count == 1 else 's'}{size}"
    if on_gpu and memory and request.gpus and request.gpus < 1:
        part = in_gb(ROOM * request.gpus * memory)
        has = f"{request.gpus:g} of a GPU of {in_gb(memory)} has {part} for it"
    advice = _advice(trial, request, largest, memory, needs)
    if on_gpu:
        advice += _gpu_advice(spec, facts, machines, request, memory)
    least = enough_gb(min(needs.values()))
    advice.append(f"a cluster whose machines have {least} or more (cluster=existing)")
    takes = ", ".join(f"{enough_gb(needed)} {loader}" for loader, needed in needs.items())
    return (
        f"{spec.label} fits nowhere: it needs {takes}, and {has}. "
        f"What would make it fit: {'; '.join(advice)}"
    )


def _advice(
    trial: Trial,
    request: ResourceRequest,
    largest: Machine,
    memory: int | None,
    needs: dict[str, int],
) -> list[str]:
    """Return the settings that would help; `memory`: of the largest machine, or of its GPU."""
    loader, bound = trial.placement.loader or AUTO, trial.placement.memory
    least = min(needs.values())
    enough, advice = enough_gb(least).replace(" ", ""), []
    if loader not in (AUTO, "streamed") and memory and needs.get("streamed", memory + 1) <= memory:
        advice.append("loader=streamed")
    if request.memory is not None and memory and least <= memory:
        advice.append(f"cluster.memory_per_trial=auto (or at least {enough})")
    if bound is not None and least > bound:
        advice.append(f"memory={enough} or more")
    if trial.spec.evaluation.generates:
        generating = ", ".join(trial.spec.evaluation.generates)
        advice.append(
            f"evaluation.tasks without {generating}, which generates text and so needs a "
            "resident model"
        )
    if OWN_TEXT in trial.spec.generates:
        advice.append(f"another text than {OWN_TEXT}, which needs a resident model")
    if request.cpus is not None and request.cpus > largest.cpus:
        advice.append(f"cluster.cpus_per_trial={largest.cpus:g} or fewer")
    return advice


def _gpu_advice(
    spec: TrialSpec,
    facts: ModelFacts,
    machines: Sequence[Machine],
    request: ResourceRequest,
    gpu_memory: int | None,
) -> list[str]:
    advice, count = [], sum(int(machine.gpus) for machine in machines)
    if not any(machine.gpus for machine in machines):
        advice.append("cluster.gpus_per_trial=0, which computes on cores")
    if request.gpus and request.gpus < 1:
        advice.append("cluster.gpus_per_trial=1")
    if gpu_memory and not spec.generates:
        for ranks in GANG_SIZES:
            needs = _need(spec, facts, "sharded", ranks, "cuda")
            if needs <= ROOM * gpu_memory:
                if request.gpus or ranks > count:
                    advice.append(f"{ranks} such GPUs (cluster.gpus_per_trial={ranks})")
                break
    return advice
