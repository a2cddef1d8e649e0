"""Where a trial ran: code, packages, hardware; and what each of its phases took."""

import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path

from q3q.spec import Json

PACKAGES = (
    "q3q",
    "torch",
    "transformers",
    "tokenizers",
    "safetensors",
    "compressed-tensors",
    "lm-eval",
    "datasets",
    "ray",
    "hydra-core",
    "mlflow",
)


@cache
def git_commit() -> str | None:
    """The commit of the code that runs, with `+changes` if the tree differs from it; None outside a checkout."""
    root = Path(__file__).parent.parent
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + (
            "+changes" if _git(root, "status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=root, check=True, capture_output=True, text=True, timeout=10
    )
    return done.stdout.strip()


@cache
def packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {"python": platform.python_version(), **found}


def hardware() -> Json:
    import torch

    facts: Json = {
        "machine": platform.machine(),
        "system": platform.system(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


@cache
def processor() -> str:
    """The model of this machine's processor, as its kernel names it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(
            line.partition(":")[2].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor()


def cores() -> int:
    """Cores that this process may use: those of the machine, less what its affinity or container leaves out."""
    count = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    with suppress(OSError, ValueError):  # no container of that kind, or one without a limit
        of_two = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        count = min(count, int(of_two[0]) // int(of_two[1]))
    with suppress(OSError, ValueError):
        control = Path("/sys/fs/cgroup/cpu")
        quota, period = (
            int((control / f"cpu.cfs_{one}_us").read_text()) for one in ("quota", "period")
        )
        count = min(count, quota // period) if quota > 0 else count
    return max(1, count)


def now() -> str:
    """Coordinated universal time, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


class Phases:
    """Seconds and peak memory of each named phase, as metrics.

    peak_bytes is the process's resident peak within the phase where the kernel can reset it (Linux), else the peak so
    far; gpu_peak_bytes is what torch allocated at most.
    """

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        _reset_peak()
        started = time.perf_counter()
        try:
            yield
        finally:
            self.metrics[f"seconds/{name}"] = round(time.perf_counter() - started, 4)
            self.metrics[f"peak_bytes/{name}"] = _peak_bytes()
            gpu = _gpu_peak_bytes()
            if gpu is not None:
                self.metrics[f"gpu_peak_bytes/{name}"] = gpu


class SystemWatch:
    """What this process takes, at most every so many seconds: how many cores are at work (100 each), its memory, and a
    GPU's memory in use and, where the driver's library is there, its load."""

    def __init__(self, every: float = 10.0) -> None:
        self._every, self._looked, self._busy = every, time.monotonic(), time.process_time()

    def due(self) -> dict[str, float]:
        """Metrics by MLflow's names for them; none if the last ones are too fresh."""
        now_, busy = time.monotonic(), time.process_time()
        if (passed := now_ - self._looked) < self._every:
            return {}
        found = {"system/cpu_utilization_percentage": round(100 * (busy - self._busy) / passed, 1)}
        self._looked, self._busy = now_, busy
        with suppress(OSError, IndexError):  # not Linux
            pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
            found["system/process_memory_usage_megabytes"] = round(
                pages * os.sysconf("SC_PAGE_SIZE") / 1e6, 1
            )
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            found["system/gpu_0_memory_usage_megabytes"] = round((total - free) / 1e6, 1)
            with suppress(
                Exception
            ):  # torch asks a library that need not be installed, each with errors of its own
                found["system/gpu_0_utilization_percentage"] = float(torch.cuda.utilization())
        return found


def _reset_peak() -> None:
    with suppress(
        OSError
    ):  # not Linux, or not allowed: the peak is then the process's so far, as the docstring says
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def _peak_bytes() -> int:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        kib = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kib


def _gpu_peak_bytes() -> int | None:
    torch = sys.modules.get("torch")
    return (
        torch.cuda.max_memory_allocated()
        if torch is not None and torch.cuda.is_available()
        else None
    )
