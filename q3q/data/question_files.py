"""Data sets of questions in the user's folder: which files make one, and their rows."""

from __future__ import annotations

import csv
import json
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from q3q.data.repositories import MMLU, REPOSITORIES, DataSet
from q3q.errors import ConfigError, first_line

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

Row = dict[str, Any]
SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".csv")


def files_of(dataset: DataSet, folder: Path | None) -> list[tuple[str, Path]]:
    """Return a data set's (split, file) pairs in the user's folder, in order."""
    if folder is None:
        return []
    splits = (split_files(folder / name) for name in dataset.folders)
    return _study_mmlu(folder, dataset) or next(filter(None, splits), [])


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


def read_splits(dataset: DataSet, files: Sequence[tuple[str, Path]]) -> DatasetDict:
    """Read (split, file) pairs of a data set."""
    from datasets import DatasetDict

    rows: dict[str, list[tuple[str, Row]]] = {}
    for split, path in files:
        rows.setdefault(split, []).extend(_rows(dataset, path))
    splits = DatasetDict({split: _table(split_rows) for split, split_rows in rows.items()})
    # lm-eval looks for a task's training split even if it draws no example from it.
    for split in sorted({"train", "validation", "test", "dev"} - set(splits)):
        splits[split] = next(iter(splits.values())).select([])
    return splits


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
        raise ValueError(f"line {number} is not a JSON object")
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
