"""Files that a user's tasks read, and how a trial knows them again.

The digest of the folder that holds the task files (evaluation.include_path) is part of a trial. A
task file may name data, other task files and code that lie elsewhere; each such file has an entry
of its own among the trial's data sets, `files:<path from the folder>`. So a trial is never done
already on other data.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from q3q.errors import ConfigError
from q3q.storage.files import file_digest

FILES = "files:"  # begins such entries' names
LOCAL = "sha256:"  # begins the identity of what is known by its content
# Options of `datasets.load_dataset` that `load_dataset_builder` does not take.
LOADING = ("split", "num_proc", "keep_in_memory", "save_infos", "verification_mode", "streaming")


class TaskFiles:
    """The files that tasks read, each identified when a trial is planned and checked when it runs.

    Args:
        identities: of all the trial's data sets; `settle` adds to them.
        settle: identify a file on first use, instead of checking it.
        include: the folder with task files, whose digest is known elsewhere.
    """

    def __init__(self, identities: dict[str, str], *, settle: bool, include: Path | None) -> None:
        self.identities = identities
        self.settle = settle
        self.include = include
        self.not_pinned: set[str] = set()  # what is read and has no identity

    def pin(self, files: Iterable[Path]) -> None:
        """Identify files, or check that they are those of the plan.

        Raises:
            ConfigError: one changed since, or was not there.
        """
        planned = any(name.startswith(FILES) for name in self.identities)
        for path in _outside(files, self.include):
            name, identity = _entry_name(path, self.include), _file_identity(path)
            if self.settle:
                self.identities[name] = identity
            # A plan of an older version has no files at all.
            elif self.identities.get(name, None if planned else identity) != identity:
                raise ConfigError(
                    f"{path}, which a task reads, is not what it was when the trial was planned; "
                    "start it again"
                )

    def load(
        self, load: Callable[..., Any], path: str, name: str | None, options: dict[str, Any]
    ) -> Any:
        """Load a data set of a task's own files, each pinned.

        Args:
            path: a reader's name (`json`), or a folder.
        """
        import datasets

        plain = {key: value for key, value in options.items() if key not in LOADING}
        builder = datasets.load_dataset_builder(path, name, **plain)
        by_split = builder.config.data_files or {}
        places = [str(file) for files in by_split.values() for file in files]
        self.not_pinned |= {place for place in places if "://" in place}
        files = [Path(place) for place in places if "://" not in place]
        self.pin(files)
        if len(files) == len(places):
            # `datasets` knows a file by its name and time, which may stay when its content changes.
            cache = Path(datasets.config.HF_DATASETS_CACHE) / "q3q" / files_digest(files)[:32]
            options = {"cache_dir": str(cache), **options}
        return load(path, name, **options)


def check_files(identities: Mapping[str, str], include: Path | None) -> None:
    """Check that the files outside the folder are those that the trial was planned with.

    Args:
        identities: of all the trial's data sets.

    Raises:
        ConfigError: one has changed, or is gone.
    """
    for name, identity in identities.items():
        if name.startswith(FILES):
            path = Path(os.path.normpath((include or Path("/")).resolve() / name[len(FILES) :]))
            if _file_identity(path) != identity:
                raise ConfigError(
                    f"{path}, which a task reads, changed since the trial was planned; start it "
                    "again"
                )


def files_digest(files: Sequence[Path]) -> str:
    """Return the SHA-256 (hex) of files' names and contents."""
    sha = hashlib.sha256()
    for path in files:
        content = path.read_bytes()
        sha.update(f"{path.name} {len(content)}\n".encode())
        sha.update(content)
    return sha.hexdigest()


def folder_digest(folder: Path) -> str:
    """Return the SHA-256 (hex) of all files below a folder and their relative paths."""
    sha = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            sha.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode())
            sha.update(path.read_bytes())
    return sha.hexdigest()


def _file_identity(path: Path) -> str:
    """Return the identity of a file's content.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return LOCAL + file_digest(path)
    except OSError as error:
        raise ConfigError(
            f"{path}, which a task reads, cannot be read: {error.strerror}"
        ) from error


def _entry_name(path: Path, include: Path | None) -> str:
    """Return a file's name among a trial's data sets."""
    place = path.as_posix() if include is None else os.path.relpath(path, include.resolve())
    return FILES + place


def _outside(paths: Iterable[Path], include: Path | None) -> list[Path]:
    """Return the files that the digest of the folder with task files does not cover."""
    inside = [] if include is None else include.rglob("*")
    covered = {path.resolve() for path in inside if path.is_file()}
    return [path for path in dict.fromkeys(paths) if path.resolve() not in covered]
