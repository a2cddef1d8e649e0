"""Data sets of questions: from a folder of the user's, from the cache of `datasets`, or from the Hub at a fixed commit.

What a data set is, is its identity: the commit on the Hub, or the digest of the files in the folder. A trial is given
exactly that, or is refused.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import json
import os
import re
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from q3q.errors import ConfigError

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

Row = dict[str, Any]
MMLU, WIKITEXT = "cais/mmlu", "EleutherAI/wikitext_document_level"
# The commit of each data set that the study's suite asks for; of any other, what `main` means when a sweep is planned.
REVISIONS = {
    "baber/piqa": "142f6d7367fd9877f0fb3b5734ea6a545f54cdd1",
    "allenai/ai2_arc": "210d026faf9955653af8916fad021475a3f00453",
    "Rowan/hellaswag": "218ec52e09a7e7462a5400043bb9a69a41d06b76",
    "allenai/winogrande": "01e74176c63542e6b0bcb004dcdea22d94fb67b5",
    "aps/super_glue": "3de24cf8022e94f4ee4b9d55a6f539891524d646",
    MMLU: "c30699e8356da336a370243923dbaf21066bb9fe",
    WIKITEXT: "647234772b9554e208af6c826f23b99e3cac88c8",
}
# What a row must have, and the columns that are text though they look like numbers.
COLUMNS = {
    "baber/piqa": ("goal", "sol1", "sol2", "label"),
    "allenai/ai2_arc": ("question", "choices", "answerKey"),
    "Rowan/hellaswag": ("activity_label", "ctx_a", "ctx_b", "endings", "label"),
    "allenai/winogrande": ("sentence", "option1", "option2", "answer"),
    "aps/super_glue": ("passage", "question", "label"),
    MMLU: ("question", "choices", "answer"),
    WIKITEXT: ("page",),
}
TEXT_COLUMNS = {
    "Rowan/hellaswag": ("label",),
    "allenai/winogrande": ("option1", "option2", "answer"),
}
SUFFIXES = (".parquet", ".jsonl", ".csv")
LOCAL = "sha256:"
# What `datasets` reads from files that the task names itself: not ours to pin.
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
_HUB_SECONDS = 5.0
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, order=True)
class DataSet:
    """One configuration of a repository of the Hub: `cais/mmlu`, `anatomy`. splits: those that must be there."""

    repository: str
    name: str | None
    splits: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """How it is called in a spec and in messages."""
        return self.repository + (f":{self.name}" if self.name else "")

    @property
    def folders(self) -> tuple[str, ...]:
        """Where it may lie in the user's folder, the first of these being what messages tell: a folder of its own
        before the one that other configurations may lie in too."""
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
    """Where data sets come from.

    folder: the user's, None for the Hub and its cache alone. identities: what each is known to be (by `DataSet.key`);
    one that is not in it is identified when it is first asked for, if `settle` allows.
    """

    def __init__(
        self, folder: Path | None, identities: dict[str, str] | None = None, *, settle: bool = False
    ) -> None:
        self.folder = folder
        self.identities = {} if identities is None else dict(identities)
        self.settle = settle
        self._loaded: dict[DataSet, DatasetDict] = {}

    def identify(self, wanted: DataSet, **options: Any) -> str:
        """What it is, which is checked to be there. options: of `datasets.load_dataset`.

        Raises:
            ConfigError: it is nowhere to be had, or lacks a split.
        """
        if wanted.key not in self.identities:
            if not self.settle:
                raise ConfigError(
                    f"the data set {wanted.key} is not one that this trial was planned with"
                )
            files = self._files(wanted)
            self.identities[wanted.key] = (
                LOCAL + _digest([path for _, path in files])
                if files
                else _revision(wanted, self.folder, options)
            )
        loaded = self.load(wanted, **options)
        for split in wanted.splits:
            if split not in loaded or not len(loaded[split]):
                raise ConfigError(
                    f"{self.where(wanted)} has no rows of the split {split}, which its task needs"
                )
        return self.identities[wanted.key]

    def where(self, wanted: DataSet) -> str:
        """Its folder, or its name on the Hub, once it is identified."""
        if not self.identities[wanted.key].startswith(LOCAL):
            return wanted.key
        return os.path.commonpath([path.parent for _, path in self._files(wanted)])

    def load(self, wanted: DataSet, **options: Any) -> DatasetDict:
        """Its splits. options: of `datasets.load_dataset`.

        Raises:
            ConfigError: it is not to be had, or not what it is known to be.
        """
        place = DataSet(wanted.repository, wanted.name)
        if place not in self._loaded or options:
            identity = self.identities.get(wanted.key) or self.identify(wanted)
            if identity.startswith(LOCAL):
                found = self._from_folder(wanted, identity)
            else:
                found = _from_hub(wanted, identity, self.folder, options)
            if options:
                return found
            self._loaded[place] = found
        return self._loaded[place]

    def _files(self, wanted: DataSet) -> list[tuple[str, Path]]:
        """(split, file) of those in the user's folder, in order; none if it has no folder for this data set."""
        if self.folder is None:
            return []
        if (
            wanted.repository == MMLU
            and wanted.name
            and (files := _study_mmlu(self.folder, wanted.name))
        ):
            return files
        for name in wanted.folders:
            if files := split_files(self.folder / name):
                return files
        return []

    def _from_folder(self, wanted: DataSet, identity: str) -> DatasetDict:
        from datasets import DatasetDict

        files = self._files(wanted)
        if not files or LOCAL + _digest([path for _, path in files]) != identity:
            raise ConfigError(
                f"the files of {wanted.key} in {self.folder} changed since the trial was planned"
            )
        rows: dict[str, list[tuple[str, Row]]] = {}
        for split, path in files:
            rows.setdefault(split, []).extend(_rows(wanted, path))
        found = DatasetDict({split: _table(some) for split, some in rows.items()})
        # lm-eval looks for the training split of a task even where no example is drawn from it.
        for split in sorted({"train", "validation", "test", "dev"} - set(found)):
            found[split] = next(iter(found.values())).select([])
        return found


@contextmanager
def serving(load: Callable[[DataSet, dict[str, Any]], DatasetDict]) -> Iterator[None]:
    """Within, whoever asks `datasets` for a data set of the Hub by name gets it from `load`: lm-eval's tasks do."""
    import datasets

    plain = datasets.load_dataset

    def serve(path: str, name: str | None = None, **options: Any) -> Any:
        if path in FILE_READERS or Path(path).exists():
            return plain(path, name, **options)
        return load(
            DataSet(path, name), {key: value for key, value in options.items() if value is not None}
        )

    datasets.load_dataset = serve
    try:
        yield
    finally:
        datasets.load_dataset = plain


def split_files(folder: Path) -> list[tuple[str, Path]]:
    """The data files of a folder with the split that each belongs to, by name: `test.jsonl`, `data/test-0-of-2.csv`.

    They lie in the folder itself, or all in its `data`: any other folder in it may be another configuration's. A
    split's files are read in the order of their names.
    """
    for place in (folder, folder / "data"):
        found = []
        for path in sorted(place.iterdir()) if place.is_dir() else ():
            split = re.match(r"(train|validation|test|dev)(?![A-Za-z0-9])", path.name)
            if split and path.suffix in SUFFIXES and path.is_file():
                found.append((split[1], path))
        if found:
            return found
    return []


def _study_mmlu(folder: Path, subject: str) -> list[tuple[str, Path]]:
    """MMLU as its authors distribute it: `test/anatomy_test.csv` without a header, answers as letters."""
    for root in (folder / "mmlu", folder):
        files = [(split, root / split / f"{subject}_{split}.csv") for split in ("dev", "test")]
        if all(path.is_file() for _, path in files):
            return files
    return []


def _table(rows: Sequence[tuple[str, Row]]) -> Dataset:
    """Rows, each given with where it stands, as `datasets` has them."""
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
    except (
        Exception
    ) as error:  # Arrow's own, or Python's for half a character: to the user all mean the same
        first = bisect_left(range(1, len(rows)), True, key=fails)
        raise ConfigError(
            f"{rows[first][0]} makes no table with the rows before it: {_reason(error)}"
        ) from error


def _rows(wanted: DataSet, path: Path) -> Iterator[tuple[str, Row]]:
    """Each row with where it stands."""
    try:
        if wanted.repository == MMLU and path.suffix == ".csv":
            yield from ((str(path), row) for row in _mmlu_rows(path, str(wanted.name)))
            return
        for number, row in _plain_rows(path):
            where = f"{path}, row {number}"
            missing = [name for name in COLUMNS.get(wanted.repository, ()) if row.get(name) is None]
            if missing:
                raise ConfigError(f"{where}: {wanted.key} has a column {missing[0]}, this has none")
            for name in TEXT_COLUMNS.get(wanted.repository, ()):
                row[name] = str(row[name])
            yield where, row
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def _plain_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Each row with its number, of `.jsonl` its line's."""
    if path.suffix == ".jsonl":
        for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
            if line.strip():
                yield number, _object(number, line)
    elif path.suffix == ".parquet":
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
    with path.open(encoding="utf-8", newline="") as file:
        for number, cells in enumerate(csv.reader(file), start=1):
            if len(cells) != 6 or cells[5] not in ("A", "B", "C", "D"):
                raise ValueError(
                    f"row {number} is not: question, four answers, and one of A, B, C, D"
                )
            yield {
                "question": cells[0],
                "subject": subject,
                "choices": cells[1:5],
                "answer": "ABCD".index(cells[5]),
            }


def _revision(wanted: DataSet, folder: Path | None, options: dict[str, Any]) -> str:
    """The commit to take: the one that is pinned here, else what `main` is now; where the Hub cannot be asked, the one
    that was downloaded earlier."""
    if wanted.repository in REVISIONS:
        return REVISIONS[wanted.repository]
    from huggingface_hub import HfApi

    try:
        sha = HfApi().dataset_info(wanted.repository, expand=["sha"], timeout=_HUB_SECONDS).sha
    except (
        Exception
    ) as error:  # the client's own, its HTTP library's: to the user all mean the same
        downloaded = {place.name for place in _downloaded(wanted, options)}
        if len(downloaded) == 1:
            return downloaded.pop()
        if downloaded:
            raise ConfigError(
                f"the Hub does not say which commit of {wanted.key} to take: {_reason(error)}. The cache of "
                f"`datasets` has {len(downloaded)}, remove all but one there: {', '.join(sorted(downloaded))}"
            ) from error
        raise ConfigError(_nowhere(wanted, folder, error)) from error
    if not sha or not _COMMIT.fullmatch(sha):
        raise ConfigError(f"the Hub does not say which commit {wanted.repository} has")
    return sha


def _from_hub(
    wanted: DataSet, revision: str, folder: Path | None, options: dict[str, Any]
) -> DatasetDict:
    """From the cache of `datasets` if this very commit is there, else from the Hub."""
    import datasets

    if (cached := _from_cache(wanted, revision, options)) is not None:
        return cached
    try:
        from huggingface_hub import HfApi

        # Asked once, for seconds; `datasets` alone would try for minutes to reach a Hub that does not answer.
        HfApi().dataset_info(
            wanted.repository, revision=revision, expand=["sha"], timeout=_HUB_SECONDS
        )
        builder = datasets.load_dataset_builder(
            wanted.repository, wanted.name, revision=revision, **options
        )
        if builder.hash != revision and not options:
            raise ConfigError(
                f"{wanted.key}: the Hub gave {builder.hash} where {revision} was asked for"
            )
        builder.download_and_prepare()
        return builder.as_dataset()
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(_nowhere(wanted, folder, error)) from error


def _from_cache(wanted: DataSet, revision: str, options: dict[str, Any]) -> DatasetDict | None:
    """What `datasets` downloaded earlier, of this commit and no other and with these options; no network."""
    import datasets

    for place in _downloaded(wanted, options):
        if place.name != revision:
            continue
        try:
            info = datasets.DatasetInfo.from_directory(str(place))
            found = datasets.DatasetDict()
            for split, entry in (info.splits or {}).items():
                shards = sorted(place.glob(f"*-{split}.arrow")) or sorted(
                    place.glob(f"*-{split}-*-of-*.arrow")
                )
                found[split] = datasets.concatenate_datasets(
                    [datasets.Dataset.from_file(str(s)) for s in shards]
                )
                if len(found[split]) != entry.num_examples:
                    raise ValueError("incomplete")
        except (OSError, ValueError):
            continue
        if found:
            return found
    return None


def _downloaded(wanted: DataSet, options: dict[str, Any]) -> list[Path]:
    """Where the cache of `datasets` has it with these options: a folder for each version and commit."""
    import datasets
    from datasets.naming import camelcase_to_snakecase

    namespace, _, base = wanted.repository.rpartition("/")
    folder = "___".join(filter(None, [namespace, camelcase_to_snakecase(base)]))
    configuration = datasets.BuilderConfig(wanted.name or "default").create_config_id(options)
    places = (Path(datasets.config.HF_DATASETS_CACHE) / folder).glob(
        f"{glob.escape(configuration)}/*/*"
    )
    return sorted(place for place in places if _COMMIT.fullmatch(place.name))


def _nowhere(wanted: DataSet, folder: Path | None, error: Exception) -> str:
    base = "mmlu" if wanted.repository == MMLU else wanted.folders[0]
    place = f"{folder or 'DIR'}/{base}/"
    own = f"data.path={folder}" if folder else "data.path=DIR"
    study = "test/SUBJECT_test.csv and dev/SUBJECT_dev.csv"
    files = study if wanted.repository == MMLU else "SPLIT.parquet, SPLIT.jsonl or SPLIT.csv"
    return (
        f"the data set {wanted.key} is neither in the cache of `datasets` nor to be had from the Hub: "
        f"{_reason(error)}. To provide it: {own} with {place} holding {files}"
    )


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(". ")


def _digest(files: Sequence[Path]) -> str:
    sha = hashlib.sha256()
    for path in files:
        content = path.read_bytes()
        sha.update(f"{path.name} {len(content)}\n".encode())
        sha.update(content)
    return sha.hexdigest()


def folder_digest(folder: Path, suffixes: Collection[str] | None = None) -> str:
    """SHA-256 (hex) of all files below a folder and their places in it."""
    sha = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if (
            path.is_file()
            and "__pycache__" not in path.parts
            and (suffixes is None or path.suffix in suffixes)
        ):
            sha.update(f"{path.relative_to(folder)} {path.stat().st_size}\n".encode())
            sha.update(path.read_bytes())
    return sha.hexdigest()
