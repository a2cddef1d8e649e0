"""A trial's code, packages and hardware, and its phases' seconds and peak memory."""

import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from q3q.spec import Json

PACKAGES = (
    "q3q torch transformers tokenizers safetensors compressed-tensors lm-eval datasets ray "
    "hydra-core mlflow"
).split()

# An environment variable of workers: which command they work for, a word that no other has.
COMMAND_ID = "Q3Q_COMMAND_ID"
MEASURE_SECONDS = 10.0  # between two measurements of what the process takes


@cache
def git_commit() -> str | None:
    """Return the code's commit, with `+changes` if the tree differs; None outside a checkout."""
    root = Path(__file__).parent.parent
    try:
        commit = _git(root, "rev-parse", "HEAD")
        changes = _git(root, "status", "--porcelain", "--untracked-files=no")
        return commit + ("+changes" if changes else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=root, check=True, capture_output=True, text=True, timeout=10
    )
    return done.stdout.strip()


@cache
def packages() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return versions


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
    """Return the model of this machine's processor, as its kernel names it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def now() -> str:
    """Return coordinated universal time, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@contextmanager
def environment_variables(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables for as long as the block lasts, then restore the old ones."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


class Phases:
    """Seconds and peak memory of each named phase, as metrics; a phase may have several parts.

    peak_bytes: the process's resident peak, within the phase on Linux, else the peak so far.
    gpu_peak_bytes: the peak of torch's allocations.

    Args:
        together: returns the seconds so far in which other processes worked with this one; None if
            there are none.
    """

    def __init__(self, together: Callable[[], float] | None = None) -> None:
        self.metrics: dict[str, float] = {}
        self._together = together
        self._alone: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        _reset_peak()
        before = 0.0 if self._together is None else self._together()
        started = time.perf_counter()
        try:
            yield
        finally:
            seconds, own = time.perf_counter() - started, self.metrics
            own[f"seconds/{name}"] = round(own.get(f"seconds/{name}", 0.0) + seconds, 4)
            if self._together is not None:
                alone = seconds - (self._together() - before)
                self._alone[name] = round(self._alone.get(name, 0.0) + alone, 4)
            peaks = {"peak_bytes": _peak_bytes()}
            if (cuda := _cuda()) is not None:
                peaks["gpu_peak_bytes"] = cuda.max_memory_allocated()
            for kind, peak in peaks.items():
                own[f"{kind}/{name}"] = max(own.get(f"{kind}/{name}", 0), peak)

    def notes(self) -> Json:
        """Return the record's note of each phase's seconds in which this process worked alone."""
        return {"rank_0_alone": self._alone} if self._alone else {}


class SystemWatch:
    """This process's load (100 for each busy core) and memory; a GPU's memory and load, the load
    through torch and nvidia-ml-py.
    """

    def __init__(self) -> None:
        self._measured, self._busy = time.monotonic(), time.process_time()

    def due(self) -> dict[str, float]:
        """Return metrics by MLflow's names for them; none if it is too early for the next ones."""
        now_, busy = time.monotonic(), time.process_time()
        if (passed := now_ - self._measured) < MEASURE_SECONDS:
            return {}
        megabytes = round(psutil.Process().memory_info().rss / 1e6, 1)
        metrics = {
            "system/cpu_utilization_percentage": round(100 * (busy - self._busy) / passed, 1),
            "system/process_memory_usage_megabytes": megabytes,
        }
        self._measured, self._busy = now_, busy
        if (cuda := _cuda()) is not None:
            free, total = cuda.mem_get_info()
            metrics["system/gpu_0_memory_usage_megabytes"] = round((total - free) / 1e6, 1)
            with suppress(Exception):  # of NVML: a MIG instance has no load of its own, for example
                metrics["system/gpu_0_utilization_percentage"] = float(cuda.utilization())
        return metrics


def _reset_peak() -> None:
    with suppress(OSError):  # not Linux, or not allowed
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    if (cuda := _cuda()) is not None:
        cuda.reset_peak_memory_stats()


def _peak_bytes() -> int:
    with suppress(OSError):  # psutil does not read VmHWM, the peak that `_reset_peak` can reset
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _cuda() -> Any:
    """Return torch.cuda if torch is imported and finds a GPU, else None."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() else None
