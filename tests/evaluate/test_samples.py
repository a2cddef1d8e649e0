"""Samples come back as they were written, or the file is named; no damage gives other samples."""

import random
from contextlib import suppress
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from q3q.errors import IntegrityError
from q3q.evaluate.samples import (
    SCORED,
    comparisons,
    damaged_files,
    measured,
    read_samples,
    window_rows,
    write_samples,
)

ROWS = [
    *window_rows("perplexity/x", "d" * 8, [1.5, 2.25, float("inf")]),
    {
        "task": "t",
        "groups": ["g"],
        "doc_id": 7,
        "doc_hash": "h",
        "prompt_hash": "p",
        "filter": "none",
        "target": "0",
        "log_likelihood": [-1.0, -2.5],
        "greedy": [True, False],
        "text": None,
        "scores": {"acc": 1.0, "acc_norm": 0.0},
    },
]


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "samples.parquet"


def as_an_older_version_wrote(path: Path) -> None:
    """Write the file without its seal, as q3q once did."""
    write_samples(path, ROWS)
    table = parquet.read_table(path)
    parquet.write_table(pa.table(table.to_pydict(), schema=table.schema.remove_metadata()), path)
    assert b"q3q.sha256" not in path.read_bytes()


def test_samples_come_back_as_they_went(path):
    digest = write_samples(path, ROWS)
    rows = read_samples(path, digest=digest)
    assert [{key: row[key] for key in given} for row, given in zip(rows, ROWS, strict=True)] == ROWS
    assert read_samples(path) == rows
    assert [set(row) for row in read_samples(path, SCORED)] == [set(SCORED)] * 4
    assert damaged_files({path.name: digest}, path.parent) == {}
    assert write_samples(path.with_name("again"), ROWS) == digest


@pytest.mark.slow
def test_no_flipped_bit_anywhere_gives_other_samples(path):
    digest = write_samples(path, ROWS)
    good, rows, unnoticed = path.read_bytes(), read_samples(path), 0
    for at in range(8 * len(good)):
        flipped = bytearray(good)
        flipped[at // 8] ^= 1 << at % 8
        path.write_bytes(flipped)
        with suppress(IntegrityError):
            assert read_samples(path) == rows
            unnoticed += 1
        if at % 100 == 0:
            assert damaged_files({path.name: digest}, path.parent)
    assert unnoticed <= 8 * len(b"q3q.sha256=")  # in the words that announce the checksum


@pytest.mark.parametrize("content", [b"", b"PAR1", bytes(2000), b"{}", None])
def test_what_is_no_file_of_samples_is_named(path, content):
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    for digest in (None, "0" * 64):
        with pytest.raises(IntegrityError, match=f"{path} cannot be read: "):
            read_samples(path, digest=digest)
        assert set(damaged_files({path.name: digest}, path.parent)) == {path.name}


def test_another_trials_samples_are_named(path):
    digest = write_samples(path, ROWS)
    write_samples(path, ROWS[:2])
    assert len(read_samples(path)) == 2
    with pytest.raises(IntegrityError, match="damaged or another trial's"):
        read_samples(path, digest=digest)


def test_an_older_versions_file_is_read_and_its_damage_raises_nothing_else(path):
    as_an_older_version_wrote(path)
    good, whole = path.read_bytes(), measured(read_samples(path), quick=False)
    assert damaged_files({path.name: None}, path.parent) == {}
    chance, named = random.Random(0), 0
    for _ in range(1500):
        flipped = bytearray(good)
        flipped[chance.randrange(len(good))] ^= 1 << chance.randrange(8)
        path.write_bytes(flipped)
        damaged_files({path.name: None}, path.parent)
        try:
            comparisons(measured(read_samples(path), quick=False), whole, ({}, {}))
        except IntegrityError:
            named += 1
    assert named > 100
