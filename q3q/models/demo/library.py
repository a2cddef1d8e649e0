"""Text of Python's own standard library, read from the running interpreter.

It differs between Python versions, so a trial's spec contains the text's digest.
"""

import sysconfig
from collections.abc import Iterable
from pathlib import Path

# Pure-Python modules that every supported Python has; kept from training.
HELD_OUT_MODULES = "argparse calendar difflib fractions heapq pprint shelve textwrap".split()
# Modules to calibrate on; models were trained on them.
CALIBRATION_MODULES = (
    "bdb cmd configparser csv doctest mailbox optparse pickle plistlib random shlex smtplib "
    "statistics tarfile tokenize uuid"
).split()
# Tests, generated tables and vendored packages teach a small model little.
_LEFT_OUT = {"test", "tests", "site-packages", "lib2to3", "idlelib", "ensurepip", "__pycache__"}
_LEFT_OUT |= {"pydoc_data", "encodings"}


def held_out_text() -> str:
    """Return the held-out modules' source as one text."""
    return _joined(_folder() / f"{name}.py" for name in HELD_OUT_MODULES)


def calibration_text() -> str:
    """Return the source of modules that the demo models were trained on as one text."""
    return _joined(_folder() / f"{name}.py" for name in CALIBRATION_MODULES)


def training_text() -> str:
    """Return the other modules' source as one text, in a fixed order."""
    held_out = {_folder() / f"{name}.py" for name in HELD_OUT_MODULES}
    return _joined(
        path
        for path in sorted(_folder().rglob("*.py"))
        if path not in held_out and not _LEFT_OUT & set(path.relative_to(_folder()).parts)
    )


def _folder() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _joined(paths: Iterable[Path]) -> str:
    texts = (path.read_text(encoding="utf-8", errors="replace").strip() for path in paths)
    return "\n\n".join(texts) + "\n"
