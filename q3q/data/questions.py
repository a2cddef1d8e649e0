"""Data sets of questions, from the user's folder, the cache of `datasets` or the Hub.

A data set's identity is its commit on the Hub or the digest of its files in the folder. A trial
gets exactly that data set, or is refused.
"""

from __future__ import annotations

import csv
import glob
import json
import os
import re
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from q3q.data.pinned import LOCAL, TaskFiles, files_digest
from q3q.errors import ConfigError, UnavailableError, first_line
from q3q.models.hub import COMMIT, HUB_SECONDS, ask

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

Row = dict[str, Any]
MMLU, WIKITEXT = "cais/mmlu", "EleutherAI/wikitext_document_level"
SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".csv")
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


@dataclass(frozen=True)
class Repository:
    """One of the study's repositories on the Hub, at a fixed commit.

    columns: those that each row must have
    text_columns: those that are text although they look like numbers
    """

    name: str
    commit: str
    columns: tuple[str, ...]
    text_columns: tuple[str, ...] = ()


# Of all other repositories, the commit of `main` when the sweep is planned counts.
REPOSITORIES = {
    repository.name: repository
    for repository in (
        Repository(
            "baber/piqa",
            commit="142f6d7367fd9877f0fb3b5734ea6a545f54cdd1",
            columns=("goal", "sol1", "sol2", "label"),
        ),
        Repository(
            "allenai/ai2_arc",
            commit="210d026faf9955653af8916fad021475a3f00453",
            columns=("question", "choices", "answerKey"),
        ),
        Repository(
            "Rowan/hellaswag",
            commit="218ec52e09a7e7462a5400043bb9a69a41d06b76",
            columns=("activity_label", "ctx_a", "ctx_b", "endings", "label"),
            text_columns=("label",),
        ),
        Repository(
            "allenai/winogrande",
            commit="01e74176c63542e6b0bcb004dcdea22d94fb67b5",
            columns=("sentence", "option1", "option2", "answer"),
            text_columns=("option1", "option2", "answer"),
        ),
        Repository(
            "aps/super_glue",
            commit="3de24cf8022e94f4ee4b9d55a6f539891524d646",
            columns=("passage", "question", "label"),
        ),
        Repository(
            MMLU,
            commit="c30699e8356da336a370243923dbaf21066bb9fe",
            columns=("question", "choices", "answer"),
        ),
        Repository(
            WIKITEXT,
            commit="647234772b9554e208af6c826f23b99e3cac88c8",
            columns=("page",),
        ),
    )
}


@dataclass(frozen=True, order=True)
class DataSet:
    """One configuration of a repository of the Hub: `cais/mmlu`, `anatomy`."""

    repository: str
    name: str | None
    splits: tuple[str, ...] = ()  # the required ones

    @property
    def key(self) -> str:
        """The name in specs and messages."""
        return self.repository + (f":{self.name}" if self.name else "")

    @property
    def folders(self) -> tuple[str, ...]:
        """Possible folders in the user's folder; the last may hold other configurations too.

        Messages name the first.
        """
        base = self.repository.rpartition("/")[2]
        if not self.name:
            return (base,)
        short = {
            "ai2_arc": self.name.lower().replace("-", "_"),
            "super_glue": self.name,
            "wikitext_document_level": "wikitext",
        }.get(base)
        return tuple(filter(None, [short, f"{base}/{self.name}", base]))


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
            dataset: the data set.
            options: options of `datasets.load_dataset`.

        Raises:
            ConfigError: it is not available, or lacks a split.
        """
        if dataset.key not in self.identities:
            if not self.settle:
                raise ConfigError(f"this trial was not planned with the data set {dataset.key}")
            files = self._files(dataset)
            self.identities[dataset.key] = (
                LOCAL + files_digest([path for _, path in files])
                if files
                else _revision(dataset, self.folder, options)
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
        return bool(self._files(dataset)) or any(
            folder.name == commit for folder in _downloaded(dataset, {})
        )

    def assume(self, dataset: DataSet) -> None:
        """Identify one of the study's data sets as what the Hub has, without looking at it."""
        self.identities[dataset.key] = REPOSITORIES[dataset.repository].commit

    def where(self, dataset: DataSet) -> str:
        """Return an identified data set's folder, or its name on the Hub."""
        if not self.identities[dataset.key].startswith(LOCAL):
            return dataset.key
        return os.path.commonpath([path.parent for _, path in self._files(dataset)])

    def load(self, dataset: DataSet, **options: Any) -> DatasetDict:
        """Return a data set's splits.

        Args:
            dataset: the data set.
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
                splits = _from_hub(dataset, identity, self.folder, options)
            if options:
                return splits
            self._loaded[configuration] = splits
        return self._loaded[configuration]

    def _files(self, dataset: DataSet) -> list[tuple[str, Path]]:
        """Return the data set's (split, file) pairs in the user's folder, in order."""
        if self.folder is None:
            return []
        folders = (split_files(self.folder / name) for name in dataset.folders)
        return _study_mmlu(self.folder, dataset) or next(filter(None, folders), [])

    def _from_folder(self, dataset: DataSet, identity: str) -> DatasetDict:
        from datasets import DatasetDict

        files = self._files(dataset)
        if not files or LOCAL + files_digest([path for _, path in files]) != identity:
            raise ConfigError(
                f"the files of {dataset.key} in {self.folder} changed since the trial was planned"
            )
        rows: dict[str, list[tuple[str, Row]]] = {}
        for split, path in files:
            rows.setdefault(split, []).extend(_rows(dataset, path))
        splits = DatasetDict({split: _table(split_rows) for split, split_rows in rows.items()})
        # lm-eval looks for a task's training split even if it draws no example from it.
        for split in sorted({"train", "validation", "test", "dev"} - set(splits)):
            splits[split] = next(iter(splits.values())).select([])
        return splits


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


def split_files(folder: Path) -> list[tuple[str, Path]]:
    """Return a folder's data files with their splits, by name: `test.jsonl`,
    `data/test-0-of-2.csv`.

    They lie in the folder itself, or all in its `data`: any other folder in it may be another
    configuration's. A split's files are in the order of their names.
    """
    for parent in (folder, folder / "data"):
        files = []
        for path in sorted(parent.iterdir()) if parent.is_dir() else ():
            split = re.match(r"(train|validation|test|dev)(?![A-Za-z0-9])", path.name)
            if split and path.suffix.lower() in SUFFIXES and path.is_file():
                files.append((split[1], path))
        if files:
            return files
    return []


def _study_mmlu(folder: Path, dataset: DataSet) -> list[tuple[str, Path]]:
    """Return an MMLU subject's files as its authors distribute them: `test/anatomy_test.csv`.

    They have no header, and answers as letters.
    """
    if dataset.repository != MMLU or not dataset.name:
        return []
    for root in (folder / "mmlu", folder):
        files = [(split, root / split / f"{dataset.name}_{split}.csv") for split in ("dev", "test")]
        if all(path.is_file() for _, path in files):
            return files
    return []


def _table(rows: Sequence[tuple[str, Row]]) -> Dataset:
    """Make a table of rows, each paired with its place in a file."""
    from datasets import Dataset

    def table(count: int) -> Dataset:
        return Dataset.from_list([row for _, row in rows[:count]])

    def fails(count: int) -> bool:
        try:
            table(count)
        except Exception:
            return True
        return False

    try:
        return table(len(rows))
    except Exception as error:  # Arrow's, or Python's for half a character
        first = bisect_left(range(1, len(rows)), True, key=fails)
        raise ConfigError(
            f"{rows[first][0]} makes no table with the rows before it: {first_line(error)}"
        ) from error


def _rows(dataset: DataSet, path: Path) -> Iterator[tuple[str, Row]]:
    """Yield each row with its place."""
    try:
        if dataset.repository == MMLU and path.suffix.lower() == ".csv":
            yield from ((str(path), row) for row in _mmlu_rows(path, str(dataset.name)))
            return
        repository = REPOSITORIES.get(dataset.repository)
        columns = repository.columns if repository else ()
        text_columns = repository.text_columns if repository else ()
        for number, row in _plain_rows(path):
            where = f"{path}, row {number}"
            for name in columns:
                if row.get(name) is None:
                    raise ConfigError(f"{where}: {dataset.key} has a column {name}, this has none")
            for name in text_columns:
                row[name] = str(row[name])
            yield where, row
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def _plain_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Yield each row with its number, of `.jsonl` with its line's."""
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
            if line.strip():
                yield number, _object(number, line)
    elif path.suffix.lower() == ".parquet":
        from pyarrow import parquet

        yield from enumerate(parquet.read_table(path).to_pylist(), start=1)
    else:
        from pyarrow import csv as arrow_csv

        yield from enumerate(arrow_csv.read_csv(path).to_pylist(), start=1)


def _object(number: int, line: str) -> Row:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"line {number} is not JSON: {error}") from error
    if not isinstance(row, dict):
        raise ValueError(f"line {number} is no JSON object")
    return row


def _mmlu_rows(path: Path, subject: str) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        for number, cells in enumerate(csv.reader(file), start=1):
            if len(cells) != 6 or cells[5] not in ("A", "B", "C", "D"):
                raise ValueError(
                    f"row {number} is not: question, four answers, and one of A, B, C, D"
                )
            answer = "ABCD".index(cells[5])
            question, choices = cells[0], cells[1:5]
            yield {"question": question, "subject": subject, "choices": choices, "answer": answer}


def _revision(dataset: DataSet, folder: Path | None, options: dict[str, Any]) -> str:
    """Return the commit to take: the pinned one, else that of `main`.

    If the Hub does not answer, it is the commit in the cache.
    """
    if dataset.repository in REPOSITORIES:
        return REPOSITORIES[dataset.repository].commit
    from huggingface_hub import HfApi

    def newest() -> str | None:
        return HfApi().dataset_info(dataset.repository, expand=["sha"], timeout=HUB_SECONDS).sha

    try:
        sha = ask(newest)
    except Exception as error:  # the Hub client's or its HTTP library's
        commits = sorted({folder.name for folder in _downloaded(dataset, options)})
        if len(commits) == 1:
            return commits[0]
        if commits:
            raise ConfigError(
                f"the Hub does not say which commit of {dataset.key} to take: {first_line(error)}. "
                f"The cache of `datasets` has {len(commits)}, remove all but one there: "
                f"{', '.join(commits)}"
            ) from error
        raise UnavailableError(unavailable(dataset, folder, error)) from error
    if not sha or not COMMIT.fullmatch(sha):
        raise ConfigError(f"the Hub does not say which commit {dataset.repository} has")
    return sha


def _from_hub(
    dataset: DataSet, revision: str, folder: Path | None, options: dict[str, Any]
) -> DatasetDict:
    """Load from the cache of `datasets` if it has exactly this commit, else from the Hub."""
    import datasets

    if (cached := _from_cache(dataset, revision, options)) is not None:
        return cached
    try:
        from huggingface_hub import HfApi

        repository = dataset.repository
        # Fails within seconds; `datasets` alone retries for minutes if the Hub does not answer.
        ask(
            lambda: HfApi().dataset_info(
                repository, revision=revision, expand=["sha"], timeout=HUB_SECONDS
            )
        )
        builder = datasets.load_dataset_builder(
            repository, dataset.name, revision=revision, **options
        )
        if builder.hash != revision and not options:
            raise ConfigError(
                f"{dataset.key}: the Hub gave {builder.hash} where {revision} was asked for"
            )
        builder.download_and_prepare()
        return builder.as_dataset()
    except ConfigError:
        raise
    except Exception as error:
        raise UnavailableError(unavailable(dataset, folder, error)) from error


def _from_cache(dataset: DataSet, revision: str, options: dict[str, Any]) -> DatasetDict | None:
    """Return what `datasets` downloaded of this commit with these options; no network."""
    import datasets

    for folder in _downloaded(dataset, options):
        if folder.name != revision:
            continue
        try:
            info = datasets.DatasetInfo.from_directory(str(folder))
            splits = datasets.DatasetDict()
            for split, entry in (info.splits or {}).items():
                shards = sorted(folder.glob(f"*-{split}.arrow"))
                shards = shards or sorted(folder.glob(f"*-{split}-*-of-*.arrow"))
                parts = [datasets.Dataset.from_file(str(shard)) for shard in shards]
                splits[split] = datasets.concatenate_datasets(parts)
                if len(splits[split]) != entry.num_examples:
                    raise ValueError("incomplete")
        except (OSError, ValueError):
            continue
        if splits:
            return splits
    return None


def _downloaded(dataset: DataSet, options: dict[str, Any]) -> list[Path]:
    """Return the data set's folders in the cache of `datasets`, one a version and commit."""
    import datasets
    from datasets.naming import camelcase_to_snakecase

    namespace, _, base = dataset.repository.rpartition("/")
    name = "___".join(filter(None, [namespace, camelcase_to_snakecase(base)]))
    configuration = datasets.BuilderConfig(dataset.name or "default").create_config_id(options)
    cache = Path(datasets.config.HF_DATASETS_CACHE) / name
    folders = cache.glob(f"{glob.escape(configuration)}/*/*")
    return sorted(folder for folder in folders if COMMIT.fullmatch(folder.name))


def unavailable(dataset: DataSet, folder: Path | None, error: Exception) -> str:
    """Return the message for a data set that is nowhere, with a way to provide it."""
    path = folder or "DIR"
    base, files = dataset.folders[0], "SPLIT.parquet, SPLIT.jsonl or SPLIT.csv"
    if dataset.repository == MMLU:
        base, files = "mmlu", "test/SUBJECT_test.csv and dev/SUBJECT_dev.csv"
    return (
        f"the data set {dataset.key} is neither in the cache of `datasets` nor to be had from the "
        f"Hub: {first_line(error)}. To provide it: data.path={path} with {path}/{base}/ holding "
        f"{files}"
    )
