"""Data sets of questions, from the user's folder, the cache of `datasets` or the Hub.

A data set's identity is its commit on the Hub or the digest of its files in the folder. A trial
gets exactly that data set, or is refused.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from q3q.data.pinned import LOCAL, TaskFiles, files_digest
from q3q.data.question_files import files_of, read_splits
from q3q.data.question_hub import downloaded, from_hub, revision_of
from q3q.data.repositories import REPOSITORIES, DataSet
from q3q.errors import ConfigError

if TYPE_CHECKING:
    from datasets import DatasetDict

# Readers in `datasets` of files that a task names itself, which have no commit to pin.
FILE_READERS = (
    "json",
    "csv",
    "parquet",
    "text",
    "arrow",
    "pandas",
    "xml",
    "webdataset",
    "imagefolder",
    "audiofolder",
)


class Library:
    """Loads data sets, each exactly as identified.

    Args:
        folder: the user's folder; None to read only the Hub and its cache.
        identities: identity by `DataSet.key`, and of files by `pinned.entry_name`.
        settle: identify a data set without identity on first use, instead of refusing it.
        include: the folder with the user's task files, whose digest is known elsewhere.
    """

    def __init__(
        self,
        folder: Path | None,
        identities: dict[str, str] | None = None,
        *,
        settle: bool = False,
        include: Path | None = None,
    ) -> None:
        self.folder = folder
        self.identities = {} if identities is None else dict(identities)
        self.settle = settle
        self.files = TaskFiles(self.identities, settle=settle, include=include)
        self._loaded: dict[DataSet, DatasetDict] = {}

    def identify(self, dataset: DataSet, **options: Any) -> str:
        """Return a data set's identity, after checking that it loads and has its splits.

        Args:
            options: options of `datasets.load_dataset`.

        Raises:
            ConfigError: it is not available, or lacks a split.
        """
        if dataset.key not in self.identities:
            if not self.settle:
                raise ConfigError(f"this trial was not planned with the data set {dataset.key}")
            files = files_of(dataset, self.folder)
            self.identities[dataset.key] = (
                LOCAL + files_digest([path for _, path in files])
                if files
                else revision_of(dataset, self.folder, options)
            )
        loaded = self.load(dataset, **options)
        for split in dataset.splits:
            if split not in loaded or not len(loaded[split]):
                raise ConfigError(
                    f"{self.where(dataset)} has no rows of the split {split}, which its task needs"
                )
        return self.identities[dataset.key]

    def is_here(self, dataset: DataSet) -> bool:
        """Return True if one of the study's data sets needs no download."""
        commit = REPOSITORIES[dataset.repository].commit
        return bool(files_of(dataset, self.folder)) or any(
            folder.name == commit for folder in downloaded(dataset, {})
        )

    def assume(self, dataset: DataSet) -> None:
        """Identify one of the study's data sets as what the Hub has, without looking at it."""
        self.identities[dataset.key] = REPOSITORIES[dataset.repository].commit

    def where(self, dataset: DataSet) -> str:
        """Return an identified data set's folder, or its name on the Hub."""
        if not self.identities[dataset.key].startswith(LOCAL):
            return dataset.key
        return os.path.commonpath([path.parent for _, path in files_of(dataset, self.folder)])

    def load(self, dataset: DataSet, **options: Any) -> DatasetDict:
        """Return a data set's splits.

        Args:
            options: options of `datasets.load_dataset`.

        Raises:
            ConfigError: it is not available, or has another identity.
        """
        configuration = DataSet(dataset.repository, dataset.name)
        if configuration not in self._loaded or options:
            identity = self.identities.get(dataset.key) or self.identify(dataset)
            if identity.startswith(LOCAL):
                splits = self._from_folder(dataset, identity)
            else:
                splits = from_hub(dataset, identity, self.folder, options)
            if options:
                return splits
            self._loaded[configuration] = splits
        return self._loaded[configuration]

    def _from_folder(self, dataset: DataSet, identity: str) -> DatasetDict:
        files = files_of(dataset, self.folder)
        if not files or LOCAL + files_digest([path for _, path in files]) != identity:
            raise ConfigError(
                f"the files of {dataset.key} in {self.folder} changed since the trial was planned"
            )
        return read_splits(dataset, files)


@contextmanager
def serving(
    library: Library, load: Callable[[DataSet, dict[str, Any]], DatasetDict]
) -> Iterator[None]:
    """Make `datasets.load_dataset`, which lm-eval's tasks call, take Hub data sets from `load`.

    The library loads a task's own files.
    """
    import datasets

    plain = datasets.load_dataset

    def serve(path: str, name: str | None = None, **options: Any) -> Any:
        if path in FILE_READERS or Path(path).exists():
            return library.files.load(plain, path, name, options)
        return load(
            DataSet(path, name), {key: value for key, value in options.items() if value is not None}
        )

    datasets.load_dataset = serve
    try:
        yield
    finally:
        datasets.load_dataset = plain
