"""Whether Triton can compile kernels here: tried once, in a process of its own.

Triton is installed with torch, and compiles C at run time: it fails where there is no C compiler,
no header of Python's, or no folder to write to. Each fused kernel has a plain twin, which computes
in its place. A process of its own, because a broken compiler may hang or crash.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

import torch

from q3q.environment import COMMAND_ID
from q3q.spec import Json, digest
from q3q.storage.files import write_atomically

TRY = Path(__file__).with_name("first_kernel.py")
SECONDS = 180.0  # that a first compilation may take, on a busy machine with a cold disk
# What the words of a failure mean, and what helps.
CAUSES = {
    "C compiler": "there is no C compiler: install gcc, or name one in CC",
    "Python.h": "Python's headers are missing: install python3-dev (python3-devel)",
    "No space left": "the disk of Triton's cache is full: free some space, or set TRITON_CACHE_DIR",
    "ermission denied": "Triton's cache cannot be written: set TRITON_CACHE_DIR to another folder",
}


def has_fused(device: torch.device) -> bool:
    """Return True if fused kernels run on the device: on CUDA, if Triton compiles there."""
    return device.type == "cuda" and compiler_fault() is None


@cache
def compiler_fault() -> str | None:
    """Return why fused kernels cannot run on this process's GPU; None if they can.

    Success is remembered beside Triton's cache, for this GPU, these packages and this compiler. A
    failure is remembered for the other processes of the same command: the next command tries again.
    """
    if find_spec("triton") is None:
        return "Triton is not installed"
    success, failure = _memos()
    if success.is_file():
        return None
    if failure is not None:
        with suppress(OSError):
            return failure.read_text(errors="replace")
    fault = fault_of([sys.executable, "-P", str(TRY)])
    with suppress(OSError):
        if fault is None:
            write_atomically(success, b"")
        elif failure is not None:
            write_atomically(failure, fault.encode())
    return fault


def fault_of(command: list[str], seconds: float = SECONDS) -> str | None:
    """Run a command that tries a kernel; return in a line why it failed, None if it did not."""
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"a first kernel was not compiled within {seconds:g} s"
    except OSError as error:
        return f"no process could be started to try it: {error.strerror}"
    if done.returncode == 0:
        return None
    for words, cause in CAUSES.items():
        if words in done.stderr:
            return cause
    lines = done.stderr.strip().splitlines()
    ending = f"signal {-done.returncode}" if done.returncode < 0 else f"code {done.returncode}"
    return (lines[-1] if lines else f"its process ended with {ending}")[:200]


def _memos() -> tuple[Path, Path | None]:
    """Return the files that stand for success, and for failure in this process's command, if any.

    Their names hold all that a compilation depends on. The failure's lies in the folder of
    temporary files: Triton's cache may be what fails.
    """
    cache_folder = os.environ.get("TRITON_CACHE_DIR") or Path.home() / ".triton" / "cache"
    facts: Json = {
        "gpu": torch.cuda.get_device_name(),
        "python": sys.executable,
        "compiler": os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"),
        "headers": Path(sysconfig.get_path("include"), "Python.h").is_file(),
    }
    for package in ("torch", "triton"):
        with suppress(PackageNotFoundError):
            facts[package] = version(package)
    success = Path(cache_folder) / "q3q" / digest(facts)[:32]
    if (command := os.environ.get(COMMAND_ID)) is None:
        return success, None
    name = digest(facts | {"cache": str(cache_folder), "command": command})[:32]
    return success, Path(tempfile.gettempdir(), f"q3q-no-kernels-{name}")
