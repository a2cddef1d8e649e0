"""Read a user's text file: documents as JSON lines, a JSON list, a table, or plain text.

A file is what its name says. Where the content contradicts the name, or the name says nothing and
the content is JSON lines, the file is refused: `{"text": ...}` read as plain text would be measured
braces and all.
"""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from q3q.errors import CalibrationError

if TYPE_CHECKING:
    from pyarrow import Table

LINES = (".jsonl", ".ndjson", ".jsonlines")
TABLES = {".csv": ",", ".tsv": "\t"}
COMPRESSED = (".gz", ".zst", ".bz2", ".lz4")
# Files of text in formats that are not text, and archives.
FOREIGN = tuple(
    ".arrow .feather .orc .avro .pkl .pickle .pt .npy .npz .safetensors .pdf .doc .docx .odt .rtf "
    ".xls .xlsx .ods .epub .zip .tar .tgz .xz .7z .rar .br .sqlite .db".split()
)
KINDS = (
    ".txt (or any other name: plain text), .jsonl (.ndjson, .jsonlines), .json, .csv, .tsv and "
    ".parquet, each also as .gz, .zst, .bz2 or .lz4"
)
COLUMN = "text"
# UTF-32 before UTF-16, whose little-endian mark begins UTF-32's.
MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def name_of_file(path: Path) -> str:
    """Return a file's name without the suffixes that say what it is."""
    return Path(path.stem).stem if path.suffix.lower() in COMPRESSED else path.stem


def file_documents(path: Path) -> tuple[str, ...]:
    """Return the documents of a text file.

    Args:
        path: `.jsonl`, `.ndjson` or `.jsonlines` (a document a line: a string or an object with
            `text`), `.json` (a list of such, or such lines), `.csv`, `.tsv` or `.parquet` (a column
            `text`), or any other name: plain text, one document. Case does not matter, and each
            may be compressed (COMPRESSED).

    Raises:
        CalibrationError: the file cannot be read, is empty, or is not what its name says.
    """
    content, suffix = _content(path), _kind(path)
    try:
        if suffix == ".parquet":
            documents = tuple(_parquet_documents(path, content))
        else:
            documents = tuple(_documents(path, suffix, _decoded(path, content)))
    except RecursionError as error:
        raise CalibrationError(f"{path} is not JSON: {error}") from error
    if not any(document.strip() for document in documents):
        raise CalibrationError(f"{path} holds no text")
    return documents


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield each line of a file of JSON lines that is not empty: its place, and what it spells.

    Raises:
        CalibrationError: the file cannot be read or has another name, or a line is not JSON.
    """
    content, suffix = _content(path), _kind(path)
    if suffix not in LINES:
        raise CalibrationError(f"{path} must be JSON lines: give a file called NAME.jsonl")
    yield from _parsed_lines(path, _decoded(path, content))


def text_of(where: str, item: Any) -> str:
    """Return a document's text.

    Args:
        where: the item's place, for messages.
        item: as read from JSON or a table.

    Raises:
        CalibrationError: it has none.
    """
    text = item.get(COLUMN) if isinstance(item, dict) else item
    if not isinstance(text, str):
        raise CalibrationError(f"{where}: neither a string nor an object with a string `text`")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can spell half a character
        raise CalibrationError(f"{where}: its text is not valid Unicode: {error.reason}") from error
    return text


def parsed(where: str, content: str) -> Any:
    """Return what JSON spells.

    Raises:
        CalibrationError: it is not JSON.
    """
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{where} is not JSON: {error}") from error


def _kind(path: Path) -> str:
    """Return the suffix that says what a file is, in lower case."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    kind = suffixes[-1] if suffixes else ""
    if kind in FOREIGN:
        raise CalibrationError(f"{path} is not a kind of text file that is read: give {KINDS}")
    return kind


def _content(path: Path) -> bytes:
    """Return a file's bytes, decompressed if its name says that they are compressed."""
    _kind(path)
    try:
        if path.suffix.lower() not in COMPRESSED:
            return path.read_bytes()
        if path.is_dir():
            raise IsADirectoryError
        import pyarrow

        codec = {".bz2": "bz2", ".gz": "gzip", ".lz4": "lz4", ".zst": "zstd"}[path.suffix.lower()]
        with path.open("rb") as file, pyarrow.input_stream(file, compression=codec) as stream:
            return stream.read()
    except IsADirectoryError as error:
        raise CalibrationError(f"{path} is a folder. Give a text file") from error
    except FileNotFoundError as error:
        raise CalibrationError(f"{path}: no such file") from error
    except OSError as error:
        reason = error.strerror or (str(error).splitlines() or ["unknown"])[0]
        raise CalibrationError(f"{path} cannot be read: {reason}") from error


def _decoded(path: Path, content: bytes) -> str:
    """Return a file's text: UTF-8, or what its byte order mark says; each line ends in a newline.

    Raises:
        CalibrationError: it is not text.
    """
    encoding = next((name for mark, name in MARKS.items() if content.startswith(mark)), "utf-8")
    try:
        text = io.TextIOWrapper(io.BytesIO(content), encoding=encoding).read()
    except UnicodeError as error:
        place = ""
        if isinstance(error, UnicodeDecodeError):
            place = f": {error.reason} at byte {error.start}"
        name = encoding.removesuffix("-sig").upper()
        raise CalibrationError(f"{path} is not {name} text{place}. Give {KINDS}") from error
    if "\0" in text:
        raise CalibrationError(
            f"{path} holds zero bytes, so it is not UTF-8 text: save it as UTF-8, or as UTF-16 "
            "with a byte order mark"
        )
    return text


def _documents(path: Path, suffix: str, content: str) -> Iterator[str]:
    if suffix in LINES:
        yield from _line_documents(path, content)
    elif suffix == ".json" and content.strip():
        if _is_json_lines(content) and "\n" in content.strip():
            yield from _line_documents(path, content)
            return
        items = parsed(str(path), content)
        if not isinstance(items, list):
            raise CalibrationError(f"{path} holds no JSON list of documents, and no JSON lines")
        yield from (text_of(f"{path}, item {n}", item) for n, item in enumerate(items))
    elif suffix in TABLES and content.strip():
        yield from _table_documents(path, content, TABLES[suffix])
    elif _is_json_lines(content):
        raise CalibrationError(
            f"{path} holds a JSON object on each line, and its name says plain text: call it "
            f"{name_of_file(path)}.jsonl, and each object's `text` is a document"
        )
    else:
        yield content


def _line_documents(path: Path, content: str) -> Iterator[str]:
    yield from (text_of(where, item) for where, item in _parsed_lines(path, content))


def _parsed_lines(path: Path, content: str) -> Iterator[tuple[str, Any]]:
    for n, line in enumerate(content.split("\n"), 1):
        if line.strip():
            where = f"{path}, line {n}"
            yield where, parsed(where, line)


def _is_json_lines(content: str) -> bool:
    """Return True if every line that is not empty is a JSON object."""
    lines = 0
    for line in content.split("\n"):
        if not line.strip():
            continue
        try:
            if not line.lstrip().startswith("{") or not isinstance(json.loads(line), dict):
                return False
        except (ValueError, RecursionError):
            return False
        lines += 1
    return lines > 0


def _table_documents(path: Path, content: str, delimiter: str) -> Iterator[str]:
    import pyarrow as pa
    from pyarrow import csv

    encoded = content.encode()
    try:
        table = csv.read_csv(
            io.BytesIO(encoded),
            read_options=csv.ReadOptions(block_size=len(encoded) + 1),  # a document may be long
            parse_options=csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            convert_options=csv.ConvertOptions(
                column_types={COLUMN: pa.string()}, strings_can_be_null=False
            ),
        )
    except pa.ArrowException as error:
        raise CalibrationError(f"{path} is not a table: {str(error).splitlines()[0]}") from error
    yield from _column(path, table)


def _parquet_documents(path: Path, content: bytes) -> Iterator[str]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        table = parquet.read_table(pa.BufferReader(content))
    except (OSError, pa.ArrowException) as error:
        raise CalibrationError(f"{path} is not Parquet: {str(error).splitlines()[0]}") from error
    yield from _column(path, table)


def _column(path: Path, table: Table) -> Iterator[str]:
    if table.column_names.count(COLUMN) != 1:
        named = ", ".join(table.column_names[:10]) or "none"
        raise CalibrationError(
            f"{path} must have one column `{COLUMN}`, which holds the documents; its columns are: "
            f"{named}"
        )
    try:
        rows = table[COLUMN].to_pylist()
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path}: a `{COLUMN}` is not UTF-8: {error.reason}") from error
    yield from (text_of(f"{path}, row {n}", row) for n, row in enumerate(rows, 1))
