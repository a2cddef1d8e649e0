"""Where an export goes: refused before anything is computed if it cannot go there. No torch.

An export is written into `PATH.partial` and renamed to PATH when it is whole and proved, so PATH either is not there or
loads. A marker file in both says whose it is.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from q3q.errors import ExportError
from q3q.export.formats import expected_bytes
from q3q.models.checkpoint import EXPORT_MARKER, ModelFacts
from q3q.spec import TrialSpec

SPARE_SHARE = 0.02  # of the checkpoint's bytes, for headers, tokenizer and the file under way
SPARE_BYTES = 64 << 20
VERSION = 1  # of what is written: another one's unfinished export is started anew


def default_path(spec: TrialSpec, storage: str) -> Path:
    """`STORAGE/exports/` and a name for people that ends in the trial's id."""
    words = re.sub(r"[^A-Za-z0-9.]+", "-", f"{spec.model['name']} {spec.name}").strip("-")
    return Path(storage).absolute() / "exports" / f"{words}-{spec.id}"


def partial_path(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def marker_of(folder: Path) -> dict[str, Any] | None:
    """What an export says of itself, None if the folder is none of ours."""
    try:
        marker = json.loads((folder / EXPORT_MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return marker if isinstance(marker, dict) else None


def is_ours(folder: Path, spec: TrialSpec) -> bool:
    marker = marker_of(folder)
    return marker is not None and marker.get("trial") == spec.id and marker.get("version") == VERSION


def is_finished(spec: TrialSpec) -> bool:
    """Whether the trial's export is there, whole; true of a trial that exports nothing."""
    return spec.export is None or is_ours(Path(spec.places["export"]), spec)


def refuse_shared(specs: Iterable[TrialSpec]) -> None:
    """Raises ExportError if two trials would write to one place."""
    places = [spec.places["export"] for spec in specs if spec.export is not None]
    shared = next((path for path in places if places.count(path) > 1), None)
    if shared is not None:
        raise ExportError(
            f"export.path={shared} is given to {places.count(shared)} trials; leave it out, or put what tells them "
            "apart in it: export.path='out/${method.name}-${bits}'"
        )


def forget_export(spec: TrialSpec) -> None:
    """Remove what an earlier run of this trial exported, finished or not, and nothing else."""
    if spec.export is not None:
        path = Path(spec.places["export"])
        for folder in (path, partial_path(path)):
            if is_ours(folder, spec):
                shutil.rmtree(folder)


def check_destination(spec: TrialSpec, facts: ModelFacts) -> None:
    """Can the trial's export be written where it is to go?

    Raises:
        ExportError: something else is there, it is not writable, or the disk has too little room.
    """
    path = Path(spec.places["export"])
    if is_finished(spec):
        return
    partial = partial_path(path)
    for folder in (path, partial):
        if folder.exists() and not is_ours(folder, spec):
            whose = "another trial's unfinished export" if folder == partial and marker_of(folder) else "there already"
            raise ExportError(f"export.path={path}: {folder} is {whose}; remove it, or give another path")
    parent = next(folder for folder in path.parents if folder.exists())
    if not parent.is_dir():
        raise ExportError(f"export.path={path}: {parent} is not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ExportError(f"export.path={path}: {parent} is not writable")
    needed = expected_bytes(spec, facts)
    needed += int(needed * SPARE_SHARE) + SPARE_BYTES
    written = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file()) if partial.exists() else 0
    free = shutil.disk_usage(parent).free + written
    if free < needed:
        raise ExportError(
            f"export.path={path}: the checkpoint needs {needed / 1e9:.1f} GB and {parent} has {free / 1e9:.1f} GB free"
        )
