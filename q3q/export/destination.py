"""Where an export goes: refused before anything is computed if it cannot go there. No torch.

An export is written into `PATH.partial` and renamed to PATH when it is whole and proved, so PATH either is not there or
loads. A marker file in both says whose it is. Folders come and go in one step, under a name beside theirs: a process
that is killed leaves none of ours that does not say so.
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
from q3q.models.checkpoint import EXPORT_MARKER
from q3q.models.facts import ModelFacts
from q3q.spec import Json, TrialSpec
from q3q.storage.files import write_atomically

SPARE_SHARE = 0.02  # of the checkpoint's bytes, for headers, tokenizer and the file under way
SPARE_BYTES = 64 << 20
WORDS = 200  # letters of a folder's name: it may have 255, and gets the trial's id, `.partial` and `.aside` too
VERSION = 1  # of what is written: another one's unfinished export is started anew


def default_path(spec: TrialSpec, storage: str) -> Path:
    """`STORAGE/exports/` and a name for people, cut where there are many words, that ends in the trial's id."""
    words = re.sub(r"[^A-Za-z0-9.]+", "-", f"{spec.model['name']} {spec.name}").strip("-")
    return Path(storage).absolute() / "exports" / f"{words[:WORDS].rstrip('-')}-{spec.id}"


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
    return (
        marker is not None and marker.get("trial") == spec.id and marker.get("version") == VERSION
    )


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
                aside = _aside(folder)
                folder.replace(aside)  # from here on nothing that loads bears its name
                shutil.rmtree(aside)


def begin_export(folder: Path, marker: Json) -> None:
    """Make the folder with its marker in it, or none."""
    aside = _aside(folder)
    write_atomically(aside / EXPORT_MARKER, json.dumps(marker).encode())
    aside.replace(folder)


def _aside(folder: Path) -> Path:
    """A name beside the folder's, free: what a killed process left there is removed."""
    aside = folder.with_name(f".{folder.name}.aside")
    shutil.rmtree(aside, ignore_errors=True)
    return aside


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
            whose = (
                "another trial's unfinished export"
                if folder == partial and marker_of(folder)
                else "there already"
            )
            raise ExportError(
                f"export.path={path}: {folder} is {whose}; remove it, or give another path"
            )
    parent = _parent(path)
    if not parent.is_dir():
        raise ExportError(f"export.path={path}: {parent} is not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ExportError(f"export.path={path}: {parent} is not writable")
    needed, free = _needed_bytes(spec, facts), shutil.disk_usage(parent).free
    if free < needed:
        raise ExportError(
            f"export.path={path}: the checkpoint needs {needed / 1e9:.1f} GB and {parent} has {free / 1e9:.1f} GB free"
        )


def check_room(trials: Iterable[tuple[TrialSpec, ModelFacts]]) -> None:
    """Is there room for what all these trials export?

    Raises:
        ExportError: not on some disk.
    """
    wanted: dict[int, list[tuple[Path, int]]] = {}
    for spec, facts in trials:
        if not is_finished(spec):
            parent = _parent(Path(spec.places["export"]))
            wanted.setdefault(parent.stat().st_dev, []).append((parent, _needed_bytes(spec, facts)))
    for those in wanted.values():
        parent, needed, free = (
            those[0][0],
            sum(count for _, count in those),
            shutil.disk_usage(those[0][0]).free,
        )
        if free < needed:
            raise ExportError(
                f"the sweep's {len(those)} exports need {needed / 1e9:.1f} GB together and {parent} has "
                f"{free / 1e9:.1f} GB free; export fewer of them, or somewhere else"
            )


def _parent(path: Path) -> Path:
    """The nearest that is there."""
    return next(folder for folder in path.parents if folder.exists())


def _needed_bytes(spec: TrialSpec, facts: ModelFacts) -> int:
    """That are still to be written."""
    partial = partial_path(Path(spec.places["export"]))
    written = (
        sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
        if partial.exists()
        else 0
    )
    needed = expected_bytes(spec, facts)
    return max(0, needed + int(needed * SPARE_SHARE) + SPARE_BYTES - written)
