"""Commands in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def python(
    *words: str | Path, cwd: Path = ROOT, timeout: float = 300, **environment: str
) -> "subprocess.CompletedProcess[str]":
    """Run Python with these words, and return what it said and its exit code.

    Args:
        cwd: by default the project's folder, where `launch.py` and `-m q3q.trials` are found.
        environment: variables in addition to this process's.
    """
    return output_of(
        sys.executable, *words, cwd=cwd, timeout=timeout, env={**os.environ, **environment}
    )


def output_of(
    *words: str | Path, check: bool = False, **how: Any
) -> "subprocess.CompletedProcess[str]":
    """Run a program, and return what it said and its exit code."""
    return subprocess.run(words, capture_output=True, text=True, check=check, **how)
