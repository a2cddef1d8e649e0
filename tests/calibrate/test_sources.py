import codecs
import csv
import gzip
import io
import json
import os
import time

import huggingface_hub.constants
import pyarrow
import pytest
from pyarrow import parquet

from q3q.data.files import FOREIGN
from q3q.data.texts import _HUB, SOURCES, Text, load_text
from q3q.errors import CalibrationError
from q3q.models.demo.library import (
    CALIBRATION_MODULES,
    HELD_OUT_MODULES,
    calibration_text,
    held_out_text,
)
from q3q.models.demo.stories import stories


def refuse(source, split, *parts, path=None, data=None):
    with pytest.raises(CalibrationError) as refusal:
        load_text(source, split=split, path=path, data=data)
    for part in parts:
        assert part in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("split", "documents", "digest"),
    [
        ("calibration", 1500, "6c8d902590c93ec52fa1ddd5667a96eb62625e877ed479bbba9387fde434646f"),
        ("evaluation", 400, "0e2a51ea86f2b537d3af3b73d742b518d08571407d864dc6245fe611294cfd58"),
    ],
)
def test_the_demo_text_is_the_same_everywhere(split, documents, digest):
    """A change on purpose changes what published numbers mean: say so in the changelog."""
    text = load_text("demo", split=split)
    assert len(text.documents) == documents
    assert text.digest == digest


def test_the_demo_text_is_joined_as_in_training_and_never_evaluated_on_what_was_seen():
    calibration, evaluation = (
        load_text("demo", split="calibration"),
        load_text("demo", split="evaluation"),
    )
    for text, seed, count in ((calibration, 1, 1500), (evaluation, 2, 400)):
        stream = stories(seed, held_out=text is evaluation)
        assert text.joined == "\n".join(next(stream).full_text() for _ in range(count))
    trained_on = stories(0, held_out=False)
    seen = {next(trained_on).full_text() for _ in range(5000)} | set(calibration.documents)
    assert not seen & set(evaluation.documents)


def test_library_text_is_of_other_modules_to_evaluate_than_to_calibrate():
    text = load_text("library", split="evaluation")
    assert text.documents == (held_out_text(),)
    calibrated = load_text("library", split="calibration")
    assert calibrated.documents == (calibration_text(),)
    assert not {*HELD_OUT_MODULES} & {*CALIBRATION_MODULES}
    refuse("pile", "evaluation", "'pile' is not a text for evaluation")


def test_an_unknown_source_gets_the_nearest_name():
    refuse("wikitxt2", "calibration", "did you mean wikitext2?")
    refuse("zzz", "calibration", "give one of demo, library, wikitext2")


def test_a_digest_sees_documents_bounds_and_joiner_but_no_name():
    text = Text("a", ("one", "two"))
    assert text.digest == Text("b", ("one", "two")).digest
    others = [
        Text("a", ("onetwo",)),
        Text("a", ("one", "tw", "o")),
        Text("a", ("two", "one")),
        Text("a", ("one", "two"), joiner=" "),
        Text("a", ("one", "two"), running=True),
        Text("a", ("one\n\ntwo",)),
    ]
    assert len({text.digest, *(other.digest for other in others)}) == 7


@pytest.mark.parametrize(
    ("name", "content", "documents"),
    [
        ("notes.txt", "one\n\ntwo\n", ("one\n\ntwo\n",)),
        ("README.md", "héllo", ("héllo",)),
        (
            "lines.jsonl",
            '{"text": "one\\ntwo", "n": 1}\n\n{"text": "three\u2028four"}\n"five"',
            None,
        ),
        ("list.json", '["one", {"text": "two"}]', ("one", "two")),
    ],
)
def test_a_file_is_read_by_its_suffix(tmp_path, name, content, documents):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    text = load_text("file", split="evaluation", path=path)
    assert text.documents == (documents or ("one\ntwo", "three\u2028four", "five"))
    assert text.name == name.split(".")[0]
    assert text == load_text("file", split="calibration", path=str(path))


ROWS = ["Once.\nThere, was", 'a "cat"\tand', " caf\xe9 \U0001f600", "NA", "7"]


def written_as(suffix):
    """Return ROWS as a file of this kind holds them."""
    lines = "".join(json.dumps({"n": 1, "text": row}) + "\n" for row in ROWS)
    if suffix == ".parquet":
        sink = io.BytesIO()
        parquet.write_table(pyarrow.table({"n": [1] * len(ROWS), "text": ROWS}), sink)
        return sink.getvalue()
    if suffix in (".csv", ".tsv"):
        table = io.StringIO(newline="")
        rows = csv.writer(table, delimiter="," if suffix == ".csv" else "\t", lineterminator="\n")
        rows.writerows([("n", "text"), *((1, row) for row in ROWS)])
        return table.getvalue().encode()
    if suffix == ".json":
        return json.dumps(ROWS).encode()
    return lines.encode()


KINDS = (".jsonl", ".ndjson", ".jsonlines", ".json", ".csv", ".tsv", ".parquet")


@pytest.mark.parametrize("suffix", KINDS)
def test_the_same_rows_are_the_same_text_whatever_kind_of_file_holds_them(tmp_path, suffix):
    content = written_as(suffix)
    files = {f"rows{suffix}": content, f"Rows{suffix.upper()}": content}
    if suffix != ".parquet":
        text = content.decode()
        files |= {
            f"mark{suffix}": codecs.BOM_UTF8 + content,
            f"wide{suffix}": text.encode("utf-16"),
            f"wider{suffix}": text.encode("utf-32"),
            f"windows{suffix}": text.replace("\n", "\r\n").encode(),
        }
    if "json" in suffix and suffix != ".json":
        files[f"spaced{suffix}"] = content.replace(b"\n", b"\n\n")
        files[f"lines{suffix}.json"] = content
    packed = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".lz4": "lz4"}
    for name, codec in packed.items():
        sink = pyarrow.BufferOutputStream()
        with pyarrow.CompressedOutputStream(sink, codec) as stream:
            stream.write(content)
        files[f"packed{suffix}{name}"] = sink.getvalue().to_pybytes()
    for name, stored in files.items():
        (tmp_path / name).write_bytes(stored)
        text = load_text("file", split="evaluation", path=tmp_path / name)
        assert text.documents == tuple(ROWS), name
        assert text.digest == Text("", tuple(ROWS)).digest
    assert load_text("file", split="evaluation", path=tmp_path / f"packed{suffix}.gz").name == (
        "packed"
    )


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_is_no_text(tmp_path, encoding):
    (tmp_path / "notes.txt").write_bytes("caf\xe9\r\n{}\n".encode(encoding))
    text = load_text("file", split="calibration", path=tmp_path / "notes.txt")
    assert text.documents == ("caf\xe9\n{}\n",)


def test_a_users_home_is_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "notes.txt").write_text("one")
    assert load_text("file", split="calibration", path="~/notes.txt").documents == ("one",)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("empty.txt", b"", "holds no text"),
        ("blank.txt", b" \n\t\n", "holds no text"),
        ("empty.jsonl", b"\n", "holds no text"),
        ("empty.json", b"", "holds no text"),
        ("empty_list.json", b"[]", "holds no text"),
        ("blank.json", b'["", {"text": " "}]', "holds no text"),
        (
            "latin.txt",
            "caf\xe9".encode("latin-1"),
            "not UTF-8 text: unexpected end of data at byte 3",
        ),
        ("packed.txt", gzip.compress(b"text", mtime=0), "not UTF-8 text"),
        ("bad.jsonl", b'{"text": "one"}\n{"text": ', "line 2 is not JSON"),
        (
            "other.jsonl",
            b'{"text": "one"}\n{"body": "two"}',
            "line 2: neither a string nor an object",
        ),
        ("number.jsonl", b'{"text": 1}', "line 1: neither a string nor an object"),
        ("half.jsonl", b'{"text": "\\ud800"}', "line 1: its text is not valid Unicode"),
        ("table.json", b'{"text": "one"}', "holds no JSON list"),
        ("bad.json", b"[", "is not JSON"),
        ("rows.txt", b'{"text": "one"}\n\n{"text": "two"}\n', "call it rows.jsonl"),
        ("rows.data", b'{"text": "one"}', "call it rows.jsonl"),
        ("rows", b'{"body": "one"}', "call it rows.jsonl"),
        ("rows.txt.gz", gzip.compress(b'{"text": "one"}', mtime=0), "call it rows.jsonl"),
        ("table.csv", b"id,body\n1,one\n", "one column `text`, which holds the documents; its"),
        ("plain.csv", b"Once, long ago, there was a man.\n", "its columns are: Once,  long ago,"),
        ("ragged.csv", b"id,text\n1,one\n2\n", "is not a table: "),
        ("number.parquet", "PARQUET", "row 1: neither a string nor an object"),
        ("body.parquet", "PARQUET", "its columns are: body"),
        ("torn.parquet", b"PAR1", "is not Parquet"),
        ("torn.jsonl.gz", gzip.compress(b'{"text": "one"}' * 99, mtime=0)[:30], "cannot be read"),
        ("plain.jsonl.gz", b'{"text": "one"}', "cannot be read"),
        ("wide.txt", "one two".encode("utf-16-le"), "holds zero bytes"),
        ("torn.txt", b"\xff\xfeo\x00n", "is not UTF-16 text"),
        *((f"book{suffix}", b"x", "not a kind of text file that is read") for suffix in FOREIGN),
        ("BOOK.PDF", b"%PDF", "give .txt (or any other name: plain text), .jsonl"),
    ],
)
def test_a_file_that_is_no_text_is_refused(tmp_path, name, content, complaint):
    if content == "PARQUET":
        column = "text" if name.startswith("number") else "body"
        parquet.write_table(pyarrow.table({column: [1]}), tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    refuse("file", "calibration", name, complaint, path=tmp_path / name)


def test_a_file_that_is_not_there(tmp_path):
    refuse("file", "calibration", "nothing.txt", "no such file", path=tmp_path / "nothing.txt")
    refuse("file", "calibration", "is a folder", path=tmp_path)
    refuse("file", "calibration", "cannot be read", path=tmp_path / ("n" * 300))
    refuse("file", "evaluation", "evaluation=file needs evaluation.path=FILE")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_a_file_that_may_not_be_read(tmp_path):
    path = tmp_path / "secret.txt"
    path.write_text("text")
    path.chmod(0)
    refuse("file", "calibration", "cannot be read: Permission denied", path=path)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Empty the local cache, cut off the Hub, and return where a data set's file would lie."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")

    def place(source, split):
        hub = _HUB[source]
        folder = (
            tmp_path / f"datasets--{hub.repository.replace('/', '--')}" / "snapshots" / hub.revision
        )
        path = folder / hub.files[split]
        path.parent.mkdir(parents=True)
        return path

    return place


@pytest.mark.parametrize("split", ["calibration", "evaluation"])
def test_wikitext2_is_its_lines_joined_by_empty_ones(cache, split):
    rows = ["", " = Title = \n", "", " A line . \n"]
    parquet.write_table(pyarrow.table({"text": rows}), cache("wikitext2", split))
    text = load_text("wikitext2", split=split)
    assert text.joined == "\n\n".join(rows)
    assert text.running  # its windows cross from line to line


@pytest.mark.parametrize(
    ("source", "split"), [("c4", "calibration"), ("c4", "evaluation"), ("pile", "calibration")]
)
def test_web_pages_are_documents_in_the_order_of_their_file(cache, source, split):
    pages = ["first page", "second\u2028page", "b" * 3000]
    lines = "".join(
        json.dumps({"text": page, "url": "u"}, ensure_ascii=False) + "\n" for page in pages
    ).encode()
    path = cache(source, split)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines[:100]) + gzip.compress(lines[100:]))
    else:
        with pyarrow.output_stream(str(path), compression="zstd") as stream:
            stream.write(lines)
    text = load_text(source, split=split)
    assert text.documents == tuple(pages)
    assert (text.name, text.running) == (source, False)


@pytest.mark.parametrize(
    ("source", "part", "rows"), [("wikitext2", "test", 4358), ("c4", "validation", 45_576)]
)
def test_a_folders_copy_of_a_text_to_evaluate_on_is_the_whole_of_it(tmp_path, source, part, rows):
    """The study draws its windows of C4 among all documents; a part of them gives others."""
    path = tmp_path / source / f"{part}.jsonl"
    path.parent.mkdir()
    line = '{"text": "a row"}\n'
    path.write_text(line * rows)
    text = load_text(source, split="evaluation", data=tmp_path)
    assert text.documents == ("a row",) * rows
    for other in (rows - 1, rows + 1):
        path.write_text(line * other)
        refuse(
            source,
            "evaluation",
            str(path),
            f"has {other} rows",
            f"has {rows}",
            "evaluation=file",
            data=tmp_path,
        )
    path.rename(path.with_name("train.jsonl"))
    assert len(load_text(source, split="calibration", data=tmp_path).documents) == rows + 1


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ('{"text": null}', "line 2: neither a string nor"),
        ('["a row"]', "line 2: neither a string nor"),
        ('{"text": "\\ud800"}', "line 2: its text is not valid Unicode"),
        ('{"text": ', "line 2 is not JSON"),
        ("", "line 2 is not JSON"),
    ],
)
def test_a_folders_copy_with_a_row_that_is_no_text_is_refused_by_its_line(tmp_path, row, complaint):
    (tmp_path / "c4").mkdir()
    (tmp_path / "c4" / "train.jsonl").write_text(
        f'{{"text": "a row"}}\n{row}\n{{"text": "another"}}\n'
    )
    refuse("c4", "calibration", "train.jsonl", complaint, data=tmp_path)


@pytest.mark.parametrize("rows", [["a row", None], [1, 2]])
def test_a_parquet_file_with_a_row_that_is_no_text_is_refused(cache, rows):
    parquet.write_table(pyarrow.table({"text": rows}), cache("wikitext2", "calibration"))
    refuse(
        "wikitext2",
        "calibration",
        f"row {rows.index(None) + 1 if None in rows else 1}: neither a string nor",
    )


def test_the_two_splits_of_a_data_set_are_different_files():
    for hub in _HUB.values():
        assert len(set(hub.files.values())) == len(hub.files)
    assert {source for names in SOURCES.values() for source in names} == {
        *_HUB,
        "demo",
        "library",
        "file",
        "chat",
    }


@pytest.mark.parametrize("source", ["wikitext2", "c4", "pile"])
def test_a_data_set_out_of_reach_is_named_at_once_with_a_way_out(cache, source, monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)  # between the Hub client's retries
    repository = _HUB[source].repository
    refuse(source, "calibration", repository, "calibration=file calibration.path=FILE")
    assert waits == []
