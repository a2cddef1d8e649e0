"""The GPUs that this machine's driver lists, and whether the installed torch can use them.

The driver's tool, nvidia-smi, is asked. The kernel's /proc/driver/nvidia/gpus shows a container
the GPUs of its host, and shows none under WSL2.
"""

import importlib.util
import os
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from q3q.errors import ConfigError
from q3q.models.cards import Capability

# The oldest driver for each CUDA, and the oldest and newest cards that its build of torch has code
# for: https://docs.nvidia.com/deploy/cuda-compatibility/minor-version-compatibility.html, and
# PyTorch's RELEASE.md (2.12 to 2.14).
LEAST_DRIVER = {11: 450, 12: 525, 13: 580}
CARDS: dict[str, tuple[Capability, Capability]] = {
    "12.6": ((5, 0), (9, 0)),
    "13.0": ((7, 5), (99, 9)),  # with PTX, for cards to come
}
TOOLS = ("nvidia-smi", "/usr/lib/wsl/lib/nvidia-smi")  # the latter is not always on WSL2's PATH
DEVICES = ("/dev/nvidiactl", "/dev/dxg")  # a driver is here, even if its tool is not
TOOL_SECONDS = 60.0  # without a persistence daemon, eight GPUs take half a minute to wake up
NUMBER = re.compile(r"\d+")


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU, or an instance of a divided one (MIG).

    memory: bytes; None if unknown
    driver: the driver's version, or ""
    instances: of a divided GPU
    """

    uuid: str = ""
    name: str = ""
    memory: int | None = None
    capability: Capability | None = None
    driver: str = ""
    instances: tuple["Gpu", ...] = ()


def visible_gpus() -> list[Gpu]:
    """Return the GPUs that a process started here can use, as CUDA counts them.

    CUDA_VISIBLE_DEVICES names them by number or by the beginning of their UUID; a name of no GPU
    hides those behind it. Without it, CUDA shows whole GPUs, else one instance of a divided one.
    """
    gpus, visible = _listed(), os.environ.get("CUDA_VISIBLE_DEVICES")
    if gpus is None:
        return _as_torch_counts() if any(Path(device).exists() for device in DEVICES) else []
    if visible is None:
        whole = [gpu for gpu in gpus if not gpu.instances]
        instances = [instance for gpu in gpus for instance in gpu.instances]
        if len(instances) > 1:
            names = ",".join(instance.uuid for instance in instances)
            note_once(
                "a GPU here is divided (MIG), and CUDA shows a process one instance alone: "
                f"CUDA_VISIBLE_DEVICES={names} lets a sweep use each"
            )
        return whole or instances[:1]
    chosen: list[Gpu] = []
    for word in visible.split(","):
        gpu = _named(word.strip(), gpus)
        if gpu is None:
            break
        chosen.append(gpu)
    return chosen if len({gpu.uuid for gpu in chosen}) == len(chosen) else []  # CUDA shows none


def usable_gpus() -> list[Gpu]:
    """Return the visible GPUs that the installed torch can use; a note says why there are none.

    Raises:
        ConfigError: torch was built for a newer driver, or for other cards.
    """
    gpus = visible_gpus()
    if not gpus:
        return []
    cuda = torch_cuda()
    if cuda is None:
        count = "a GPU" if len(gpus) == 1 else f"{len(gpus)} GPUs"
        note_once(
            f"this machine has {count}, and the installed torch computes on the processor alone. "
            f"{_remedy(gpus)}"
        )
        return []
    fault = _fault(gpus, cuda)
    # A data-center GPU may run newer CUDA on an old driver (cuda-compat): torch has the last word.
    if fault is not None and not _torch_finds_gpus():
        raise ConfigError(
            f"{fault}. {_remedy(gpus)}; or give cluster.gpus_per_trial=0 to compute on the "
            "processor"
        )
    return gpus


def torch_cuda() -> str | None:
    """Return the CUDA version that the installed torch was built for, without importing torch.

    Returns:
        None for a build without CUDA.
    """
    package = importlib.util.find_spec("torch")
    folders = list(package.submodule_search_locations or ()) if package is not None else []
    for file in (Path(folder, "version.py") for folder in folders):
        spec = importlib.util.spec_from_file_location("q3q_torch_version", file)
        if spec is not None and spec.loader is not None and file.is_file():
            version = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(version)
            return getattr(version, "cuda", None)
    return None


def install_line(cuda: str) -> str:
    """Return the command that installs torch for this CUDA in place of another build."""
    return (
        "pip install --force-reinstall --constraint constraints.txt --extra-index-url "
        f"https://download.pytorch.org/whl/cu{cuda.replace('.', '')} torch"
    )


@cache
def note_once(words: str) -> None:
    """Print a note that stops nothing."""
    print(f"Note: {words}", file=sys.stderr)


def _fault(gpus: list[Gpu], cuda: str) -> str | None:
    """Return why a torch built for this CUDA cannot use the GPUs; None if it can, or may."""
    gpu, least = gpus[0], LEAST_DRIVER.get(int(cuda.partition(".")[0]))
    if least is not None and (branch := _branch(gpu)) is not None and branch < least:
        return (
            f"the NVIDIA driver here, {gpu.driver}, is too old for the installed torch, which was "
            f"built for CUDA {cuda} and needs driver {least} or newer"
        )
    for gpu in gpus:
        if cuda in CARDS and gpu.capability is not None and not _has_code(cuda, gpu.capability):
            version = ".".join(map(str, gpu.capability))
            return (
                f"the installed torch, which was built for CUDA {cuda}, has no code for {gpu.name} "
                f"(compute capability {version})"
            )
    return None


def _remedy(gpus: list[Gpu]) -> str:
    """Return what to do, so that torch can use these GPUs with this driver."""
    branch = _branch(gpus[0])
    for cuda in sorted(CARDS, key=float, reverse=True):
        runs = branch is None or branch >= LEAST_DRIVER[int(cuda.partition(".")[0])]
        if runs and all(gpu.capability is None or _has_code(cuda, gpu.capability) for gpu in gpus):
            return f"Install one for them (CUDA {cuda}): {install_line(cuda)}"
    newest = max(LEAST_DRIVER.values())
    return f"Update the driver to {newest} or newer"


def _has_code(cuda: str, capability: Capability) -> bool:
    oldest, newest = CARDS[cuda]
    return oldest <= capability <= newest


def _branch(gpu: Gpu) -> int | None:
    """Return the number that a driver's version begins with: of 570.86.15, 570."""
    number = NUMBER.match(gpu.driver)
    return int(number[0]) if number else None


def _torch_finds_gpus() -> bool:
    """Ask torch itself, in another process: this one must not take memory of a GPU."""
    asks = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    try:
        done = subprocess.run(
            [sys.executable, "-c", asks], capture_output=True, timeout=TOOL_SECONDS, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return False
    return done.returncode == 0


def _named(word: str, gpus: list[Gpu]) -> Gpu | None:
    """Return the GPU or instance that a word of CUDA_VISIBLE_DEVICES names."""
    if NUMBER.fullmatch(word):
        # CUDA may number unlike cards in another order than the driver (CUDA_DEVICE_ORDER).
        gpu = gpus[int(word)] if int(word) < len(gpus) else None
        return gpu.instances[0] if gpu is not None and gpu.instances else gpu
    if word.startswith("MIG-GPU-"):  # drivers before 470: the GPU, and numbers of its parts
        parents = [gpu for gpu in gpus if word.startswith(f"MIG-{gpu.uuid}/")]
        return replace(parents[0], uuid=word, memory=None) if parents and parents[0].uuid else None
    listed = [*gpus, *(instance for gpu in gpus for instance in gpu.instances)]
    like = [gpu for gpu in listed if word[:4] in ("GPU-", "MIG-") and gpu.uuid.startswith(word)]
    return like[0] if len(like) == 1 else None


def _listed() -> list[Gpu] | None:
    """Return all GPUs of this machine, in the driver's order; None without the driver's tool."""
    listing = _ask("-L")
    if listing is None:
        return None
    gpus: list[Gpu] = []
    for line in listing.splitlines():
        if match := re.match(r"GPU \d+: (.+) \(UUID: (GPU-[^)]+)\)", line):
            gpus.append(Gpu(uuid=match[2], name=match[1]))
        elif gpus and (match := re.match(r"\s+MIG (\S+)\s+Device\s+\d+: \(UUID: ([^)]+)\)", line)):
            instance = Gpu(uuid=match[2], name=f"{gpus[-1].name} MIG {match[1]}")
            gpus[-1] = replace(gpus[-1], instances=(*gpus[-1].instances, instance))
    facts = _facts() if gpus else {}
    return [_with_facts(gpu, facts.get(gpu.uuid)) for gpu in gpus]


def _facts() -> dict[str, Gpu]:
    """Return what the driver says of each GPU, by UUID; old drivers do not know the capability."""
    columns, rows = ("uuid", "memory.total", "driver_version"), None
    for fields in ((*columns, "compute_cap"), columns):
        answer = _ask(f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits")
        if answer is not None:
            rows = [[cell.strip() for cell in line.split(",")] for line in answer.splitlines()]
            break
    facts = {}
    for uuid, memory, driver, *rest in (row for row in rows or () if len(row) >= len(columns)):
        version = re.fullmatch(r"(\d+)\.(\d+)", rest[0]) if rest else None
        facts[uuid] = Gpu(
            memory=int(memory) * 2**20 if NUMBER.fullmatch(memory) else None,
            driver=driver,
            capability=(int(version[1]), int(version[2])) if version else None,
        )
    return facts


def _with_facts(gpu: Gpu, facts: Gpu | None) -> Gpu:
    """Return the GPU, and its instances, with what the driver says of it."""
    if facts is None:
        return gpu
    described = replace(gpu, memory=facts.memory, driver=facts.driver, capability=facts.capability)
    instances = tuple(
        replace(described, uuid=own.uuid, name=own.name, memory=_memory_of(own.name), instances=())
        for own in gpu.instances
    )
    return replace(described, instances=instances)


def _memory_of(profile: str) -> int | None:
    """Return the bytes of an instance by its profile: 1g.10gb has a little less than 10 GiB."""
    match = re.search(r"\.(\d+)gb", profile)
    return int(match[1]) * 2**30 * 95 // 100 if match else None


def _as_torch_counts() -> list[Gpu]:
    """Return the visible GPUs without their facts, where there is a driver but not its tool."""
    import torch

    return [Gpu(uuid=f"GPU-{number}") for number in range(torch.cuda.device_count())]


def _ask(*arguments: str) -> str | None:
    """Return what the driver's tool prints; None if it is not here or finds no driver."""
    for tool in TOOLS:
        try:
            done = subprocess.run(
                [tool, *arguments],
                capture_output=True,
                text=True,
                timeout=TOOL_SECONDS,
                check=False,
            )
        except (OSError, subprocess.SubprocessError):
            continue
        if done.returncode == 0:
            return done.stdout
        if arguments == ("-L",):
            first = (done.stdout + done.stderr).strip().partition("\n")[0]
            note_once(f"{tool} lists no GPU: {first or f'exit code {done.returncode}'}")
            return ""
        return None
    return None
