"""The machines to plan with, and what the person asked of them."""

import os
import re
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from q3q.errors import ConfigError
from q3q.models.footprint import (
    AUTO,
    bytes_of,
    free_memory,
)

FREE = 0.9  # of the memory that is free on this machine, likewise
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
class ResourceRequest:
    """What the person asked for; None: as the plan sees fit. gpus: a share of one, or how many a gang has. ranks: that
    share a trial. memory: of main memory, bytes that a trial reserves. gpu_memory: of a GPU. patience: seconds to wait
    for machines to come, so that no trial is refused because there are too few."""

    cpus: float | None = None
    gpus: float | None = None
    ranks: int | None = None
    memory: int | None = None
    gpu_memory: int | None = None
    patience: float = 0.0


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


def request_of(cluster: Callable[[str], object]) -> ResourceRequest:
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
    return ResourceRequest(
        cpus=cpus, gpus=gpus, ranks=whole, memory=memory, gpu_memory=gpu_memory, patience=patience
    )


def sized(kind: str, here: Machine) -> int | None:
    """Bytes of a GPU of another machine, by what Ray calls its kind; where Ray does not say, as this machine's."""
    if not kind or re.search(rf"\b{re.escape(kind)}\b", here.name):
        return here.gpu_memory
    return GPU_BYTES.get(kind)


def expected(machines: Sequence[Machine], wishes: ResourceRequest) -> list[Machine]:
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
