"""The machines to plan with, and the resources that the user requests."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from q3q.errors import ConfigError
from q3q.limits import cores, memory_for_trials
from q3q.models.cards import Capability, refuse_card
from q3q.models.footprint import AUTO, bytes_of
from q3q.sweep.gpus import usable_gpus, visible_gpus

CORES_TO_COME = 4  # of a machine that is still to come: for each GPU, or in all if it has none
# Bytes of a GPU, by Ray's name for its kind; of kinds with several sizes, the smallest.
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
# Of the kinds that are too old for bfloat16.
CAPABILITIES = {"K80": (3, 7), "P100": (6, 0), "V100": (7, 0), "T4": (7, 5)}


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A machine's resources.

    memory: bytes that trials may take; None if unknown
    gpu_memory: bytes of one of its GPUs; None if unknown
    kind: of its GPUs, in Ray's words, or ""
    name: of its GPU or processor, as records have it, or ""
    capability: of its oldest GPU; None if unknown
    """

    cpus: float
    gpus: float = 0
    memory: int | None = None
    gpu_memory: int | None = None
    kind: str = ""
    name: str = ""
    capability: Capability | None = None


@dataclass(frozen=True, kw_only=True)
class ResourceRequest:
    """The resources that the user requests for each trial; None leaves them to the plan.

    gpus: a share of one GPU, or a gang's number of GPUs
    ranks: that share a trial
    memory: bytes of main memory that a trial reserves
    gpu_memory: bytes of a GPU
    patience: seconds to wait for machines to come: no trial is refused because there are too few
    """

    cpus: float | None = None
    gpus: float | None = None
    ranks: int | None = None
    memory: int | None = None
    gpu_memory: int | None = None
    patience: float = 0.0


def machine_here(request: ResourceRequest | None = None) -> Machine:
    """Return this machine, as far as this process may use it.

    Args:
        request: of the trials that are to run here; None if they run elsewhere.

    Raises:
        ConfigError: they are to run on GPUs that the installed torch cannot use.
    """
    from q3q.environment import processor

    runs_on_gpus = request is not None and request.gpus != 0
    gpus = usable_gpus() if runs_on_gpus else visible_gpus()
    sizes = [gpu.memory for gpu in gpus if gpu.memory is not None]
    capabilities = [gpu.capability for gpu in gpus if gpu.capability is not None]
    return Machine(
        cpus=cores(),
        gpus=len(gpus),
        memory=memory_for_trials(),
        gpu_memory=min(sizes, default=None),
        name=gpus[0].name if gpus else processor(),
        capability=min(capabilities, default=None),
    )


def refuse_old_cards(dtypes: Iterable[str], machines: Iterable[Machine]) -> None:
    """Refuse GPUs that do not compute in the types of the trials that may land on them.

    Raises:
        ConfigError: one does not.
    """
    with_gpus = [machine for machine in machines if machine.gpus]
    for dtype in dict.fromkeys(dtypes):
        for machine in with_gpus:
            capability = CAPABILITIES.get(machine.kind, machine.capability)
            refuse_card(dtype, machine.kind or machine.name, capability)


def amount(key: str, value: object) -> float | None:
    """Read a knob that is a number; auto and null are None."""
    if value is None or value == AUTO:
        return None
    try:
        number = float(str(value))
    except ValueError:
        raise ConfigError(f"{key}={value}: give a number, or {AUTO}") from None
    if not 0 <= number < float("inf"):
        raise ConfigError(f"{key}={value}: give 0 or more, or {AUTO}")
    return number


def size(key: str, value: object) -> int | None:
    """Read a knob that is bytes (`16GB`, `512MiB`, or a plain number); auto and null are None."""
    return None if value is None or value == AUTO else bytes_of(str(value), key)


def request_of(cluster: Callable[[str], object]) -> ResourceRequest:
    """Read the cluster's knobs; `cluster` returns one by its name.

    Raises:
        ConfigError: one of them makes no sense.
    """
    cpus, gpus = (
        amount(f"cluster.{key}_per_trial", cluster(f"{key}_per_trial")) for key in ("cpus", "gpus")
    )
    if cpus == 0:
        raise ConfigError("cluster.cpus_per_trial=0: give at least a part of one, or auto")
    if gpus is not None and gpus > 1 and gpus != int(gpus):
        raise ConfigError(
            f"cluster.gpus_per_trial={gpus:g}: give a part of one GPU, 1, or a whole number for a "
            "gang"
        )
    ranks = amount("cluster.ranks_per_trial", cluster("ranks_per_trial"))
    if ranks is not None and (ranks != int(ranks) or ranks < 1):
        raise ConfigError(
            f"cluster.ranks_per_trial={ranks:g}: give 1, a whole number for a gang, or auto"
        )
    if gpus and ranks and ranks != max(1, gpus):
        raise ConfigError(
            f"cluster.ranks_per_trial={ranks:g} and cluster.gpus_per_trial={gpus:g} contradict "
            "each other: each rank has one GPU"
        )
    memory, gpu_memory = (
        size(f"cluster.{key}", cluster(key)) for key in ("memory_per_trial", "gpu_memory")
    )
    return ResourceRequest(
        cpus=cpus,
        gpus=gpus,
        ranks=None if ranks is None else int(ranks),
        memory=memory,
        gpu_memory=gpu_memory,
        patience=amount("cluster.patience", cluster("patience")) or 0.0,
    )


def sized(kind: str, here: Machine) -> int | None:
    """Return the bytes of another machine's GPU by Ray's name for its kind, None if unknown.

    Where Ray does not say, it is as large as this machine's.
    """
    if not kind or re.search(rf"\b{re.escape(kind)}\b", here.name):
        return here.gpu_memory
    return GPU_BYTES.get(kind)


def expected(machines: Sequence[Machine], request: ResourceRequest) -> list[Machine]:
    """Return the machines to plan with, whose GPUs are as large as the user says.

    While none of a growing cluster's machines could run a trial, one that will come is among them.
    """
    gpu_memory = request.gpu_memory
    ready = [
        replace(machine, gpu_memory=gpu_memory) if gpu_memory and machine.gpus else machine
        for machine in machines
    ]
    on_gpu = bool(request.gpu_memory if request.gpus is None else request.gpus)
    if request.patience and not any(machine.gpus if on_gpu else machine.cpus for machine in ready):
        gpus = max(1, int(request.gpus or 1)) if on_gpu else 0
        cpus = max(CORES_TO_COME * max(1, gpus), (request.cpus or 0) * max(1, gpus))
        ready.append(
            Machine(cpus=cpus, gpus=gpus, gpu_memory=request.gpu_memory if on_gpu else None)
        )
    return ready
