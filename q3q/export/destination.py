"""An export's destination, checked before anything is computed. Imports no torch.

An export is written to `PATH.partial` and renamed to PATH once it is complete and proved, so PATH
either does not exist or loads. A marker file in both names the trial, and in PATH each file's size
and digest: an export that was damaged since counts as not finished, and the next one replaces it.
Folders are made and removed under a temporary name beside theirs: a killed process leaves no folder
of ours without a marker.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from q3q.errors import ExportError
from q3q.export.formats import FORMATS
from q3q.export.marker import marker_of, owner_of, size_fault
from q3q.export.tensors import expected_bytes
from q3q.formatting import bytes_in_words
from q3q.models.checkpoint import EXPORT_MARKER
from q3q.models.facts import ModelFacts
from q3q.placement import Trial
from q3q.spec import Json, TrialSpec
from q3q.storage.files import bytes_below, write_atomically

SPARE_SHARE = 0.02  # of the checkpoint's bytes, for headers, tokenizer and the file being written
SPARE_BYTES = 64 << 20
WORDS = 200  # characters of a name, which with the id, `.partial` and `.aside` has at most 255
VERSION = 1  # of the files' content; an unfinished export of another version is started anew


def default_path(spec: TrialSpec, storage: str) -> Path:
    """Return `STORAGE/exports/` with a readable name, cut if long, that ends in the trial's id."""
    words = re.sub(r"[^A-Za-z0-9.]+", "-", f"{spec.model.name} {spec.name}").strip("-")
    return Path(storage).absolute() / "exports" / f"{words[:WORDS].rstrip('-')}-{spec.id}"


def partial_path(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def is_ours(folder: Path, spec: TrialSpec) -> bool:
    """Return True if the folder is this trial's export, finished or not, whole or damaged."""
    owner = owner_of(folder) or {}
    return owner.get("trial") == spec.id and owner.get("version") == VERSION


def path_of(trial: Trial) -> Path:
    """Return the folder that the trial exports to."""
    assert trial.placement.export is not None
    return trial.placement.export


def export_fault(trial: Trial) -> str | None:
    """Return in words why the trial's export is not finished, or no longer; None if it is whole.

    Every file's size is compared with what was published. Of an export in an object store, files
    may be missing here.
    """
    path = path_of(trial)
    marker = marker_of(path)
    if marker is None or not is_ours(path, trial.spec):
        return f"{path} is missing" if not path.exists() else f"{path} has no marker of this trial"
    elsewhere = trial.placement.store is not None and path.is_relative_to(trial.placement.storage)
    fault = size_fault(path, partly_elsewhere=elsewhere)
    return None if fault is None else f"{path}: {fault}"


def is_finished(trial: Trial) -> bool:
    """Return True if the trial's export is complete, or the trial exports nothing."""
    return trial.spec.export is None or export_fault(trial) is None


def refuse_shared(trials: Iterable[Trial]) -> None:
    """Raise ExportError if two trials would write to one path."""
    paths = [path_of(trial) for trial in trials if trial.spec.export is not None]
    shared = next((path for path in paths if paths.count(path) > 1), None)
    if shared is not None:
        raise ExportError(
            f"export.path={shared} is given to {paths.count(shared)} trials; leave it out, or "
            "include what distinguishes them: export.path='out/${method.name}-${bits}'"
        )


def forget_export(trial: Trial) -> None:
    """Remove this trial's earlier export, finished or not, and nothing else."""
    if trial.spec.export is not None:
        for folder in (path_of(trial), partial_path(path_of(trial))):
            if is_ours(folder, trial.spec):
                aside = _aside(folder)
                folder.replace(aside)  # so that a half-removed export never loads
                shutil.rmtree(aside)


def begin_export(folder: Path, marker: Json) -> None:
    """Make the folder and its marker in one step."""
    aside = _aside(folder)
    write_atomically(aside / EXPORT_MARKER, json.dumps(marker).encode())
    aside.replace(folder)


def give_final_name(partial: Path, path: Path) -> None:
    """Rename a proved export; it replaces one of the same trial that was damaged.

    Files in the damaged folder that q3q did not write move along.
    """
    if path.is_symlink():
        path.unlink()
    if path.exists():
        for entry in path.iterdir():
            if not (partial / entry.name).exists():
                entry.replace(partial / entry.name)
        path.replace(_aside(path))
    partial.replace(path)
    _aside(path)


def _aside(folder: Path) -> Path:
    """Return a free path beside the folder, after removing what was put there."""
    aside = folder.with_name(f".{folder.name}.aside")
    shutil.rmtree(aside, ignore_errors=True)
    return aside


def check_destination(trial: Trial, facts: ModelFacts) -> None:
    """Check that the trial's export can be written to its path.

    Raises:
        ExportError: another file is there, it is not writable, or the disk has too little room.
    """
    path = path_of(trial)
    if is_finished(trial):
        return
    for folder in (path, partial_path(path)):
        if os.path.lexists(folder) and not is_ours(folder, trial.spec):
            unfinished = folder != path and marker_of(folder)
            owner = "another trial's unfinished export" if unfinished else "there already"
            raise ExportError(
                f"export.path={path}: {folder} is {owner}; remove it, or give another path"
            )
    parent = _parent(path)
    if not parent.is_dir():
        raise ExportError(f"export.path={path}: {parent} is not a folder")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ExportError(f"export.path={path}: {parent} is not writable")
    needed, free = _needed_bytes(trial, facts), shutil.disk_usage(parent).free
    if free < needed:
        raise ExportError(
            f"export.path={path}: the checkpoint needs {bytes_in_words(needed)} and {parent} has "
            f"{bytes_in_words(free)} free"
        )


def check_room(trials: Iterable[tuple[Trial, ModelFacts]]) -> None:
    """Check that the disks have room for the exports of all these trials.

    Raises:
        ExportError: a disk has too little room.
    """
    disks: dict[int, list[tuple[Path, int]]] = {}
    for trial, facts in trials:
        if not is_finished(trial):
            parent, needed = _parent(path_of(trial)), _needed_bytes(trial, facts)
            disks.setdefault(parent.stat().st_dev, []).append((parent, needed))
    for exports in disks.values():
        parent, needed = exports[0][0], sum(count for _, count in exports)
        free = shutil.disk_usage(parent).free
        if free < needed:
            raise ExportError(
                f"the sweep's {len(exports)} exports need {bytes_in_words(needed)} together and "
                f"{parent} has {bytes_in_words(free)} free; export fewer of them, or somewhere else"
            )


def _parent(path: Path) -> Path:
    """Return the nearest parent that exists."""
    return next(folder for folder in path.parents if folder.exists())


def _needed_bytes(trial: Trial, facts: ModelFacts) -> int:
    """Return the bytes that are still to be written, with some to spare."""
    partial = partial_path(path_of(trial))
    written = bytes_below(partial)
    needed = expected_bytes(trial.spec, facts) + facts.carried_bytes
    if trial.spec.export is not None and FORMATS[trial.spec.export].own_server:
        needed *= 2  # its one file is made of shards, which are removed after that
    return max(0, needed + int(needed * SPARE_SHARE) + SPARE_BYTES - written)
