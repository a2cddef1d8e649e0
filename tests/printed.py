"""Packages that guides print: their files as printed, and where pip installed them."""

import re
import subprocess
import sys
from pathlib import Path


def write_printed(guide: Path, folder: Path) -> None:
    """Write the files that a guide prints, each after a line that begins with its name."""
    page = guide.read_text(encoding="utf-8")
    printed = r"(?ms)^`([\w/]+\.(?:py|toml))`:.*?^```\w+\n(.*?)^```"
    for name, body in re.findall(printed, page):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(body, encoding="utf-8")


def pip_install(source: Path, target: Path) -> None:
    """Install a package into a folder of its own, without the network."""
    install = "pip install --quiet --no-deps --no-build-isolation --no-index --target"
    command = [sys.executable, "-m", *install.split(), str(target), str(source)]
    subprocess.run(command, check=True, timeout=120)
