"""An export's marker, q3q.json: whose export the folder is, and the size and digest of each file.

The card (README.md) is not among the files: people edit it. Exports of earlier versions record no
files; that is reported, not guessed. Imports no torch.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from q3q.models.checkpoint import EXPORT_MARKER
from q3q.models.facts import EXPORT_KEY
from q3q.spec import Json
from q3q.storage.files import file_digest, write_atomically

CARD = "README.md"
FILES = "files"  # the marker's table of files; an unfinished export has none


@dataclass(frozen=True)
class StoredFile:
    """A file as it was published.

    size: bytes
    sha256: hex digits
    """

    size: int
    sha256: str


def marker_of(folder: Path) -> dict[str, Any] | None:
    """Return the content of an export's marker; None if there is none that can be read."""
    return _table(folder / EXPORT_MARKER)


def owner_of(folder: Path) -> dict[str, Any] | None:
    """Return what the folder says about whose export it is: its marker, else its config.json."""
    marker = marker_of(folder)
    if marker is not None:
        return marker
    section = (_table(folder / "config.json") or {}).get(EXPORT_KEY)
    return section if isinstance(section, dict) else None


def published_files(folder: Path) -> dict[str, StoredFile] | None:
    """Return the files that the marker records, by name; None if it records none."""
    table = (marker_of(folder) or {}).get(FILES)
    if not isinstance(table, dict):
        return None
    try:
        return {
            str(name): StoredFile(int(facts["bytes"]), str(facts["sha256"]))
            for name, facts in table.items()
        }
    except (KeyError, TypeError, ValueError):
        return None


def write_marker(folder: Path, marker: Json, digests: Mapping[str, str]) -> None:
    """Write the marker of a complete export, with the size and digest of each file in it.

    Args:
        digests: SHA-256 of files that are known already, by name.
    """
    names = sorted(
        path.name
        for path in folder.iterdir()
        if path.is_file() and path.name not in (CARD, EXPORT_MARKER)
    )
    files = {
        name: {
            "bytes": (folder / name).stat().st_size,
            "sha256": digests.get(name) or file_digest(folder / name),
        }
        for name in names
        if not name.startswith(".")
    }
    write_atomically(folder / EXPORT_MARKER, json.dumps(marker | {FILES: files}).encode())


def size_fault(folder: Path, *, partly_elsewhere: bool = False) -> str | None:
    """Return in words the first file that is not as it was published; None if all sizes fit.

    An export that records no files has no such fault.

    Args:
        partly_elsewhere: files may be missing here because an object store holds them.
    """
    for name, expected in (published_files(folder) or {}).items():
        path = folder / name
        if not path.exists():
            if not partly_elsewhere:
                return f"{name} is missing"
        elif not path.is_file():
            return f"{name} is not a file"
        elif (size := path.stat().st_size) != expected.size:
            return f"{name} has {size} bytes instead of {expected.size}"
    return None


def digest_faults(folder: Path) -> Iterator[str]:
    """Yield in words each file that is missing or whose content is not as it was published."""
    for name, expected in (published_files(folder) or {}).items():
        path = folder / name
        if not path.is_file():
            yield f"{name} {'is not a file' if path.exists() else 'is missing'}"
        elif (size := path.stat().st_size) != expected.size:
            yield f"{name} has {size} bytes instead of {expected.size}"
        elif file_digest(path) != expected.sha256:
            yield f"{name} has another content than was published (its SHA-256 differs)"


def disk_bytes(folder: Path) -> int:
    """Return the bytes of all files in the folder, and of those that an object store has alone."""
    sizes = {name: file.size for name, file in (published_files(folder) or {}).items()}
    sizes |= {path.name: path.stat().st_size for path in folder.iterdir() if path.is_file()}
    return sum(sizes.values())


def _table(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None
