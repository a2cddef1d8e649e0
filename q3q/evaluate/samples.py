"""Each sample's scores, as a Parquet file, and comparisons of two trials from them.

The file carries a checksum of its own, and its record has the file's digest, which also tells it
from another trial's.
"""

import hashlib
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from q3q.errors import IntegrityError
from q3q.evaluate.metrics import task_metric
from q3q.record import Comparison
from q3q.spec import Json
from q3q.storage.files import read_file, write_atomically

if TYPE_CHECKING:
    import pyarrow

SAMPLES = "samples.parquet"
SCORED = ["task", "groups", "doc_id", "doc_hash", "scores"]
LOSS = "nll"  # a text window's, nats per token
SAMPLE = ("task", "doc_id", "doc_hash", "prompt_hash")
SEAL = b"q3q.sha256="  # comes before a file's own checksum
NO_SEAL = b"0" * 64
MetricScores = dict[str, dict[str, float]]  # metric -> sample -> score


def window_rows(metric: str, digest: str, nll_N: Sequence[float]) -> list[Json]:
    """Return a row a window. metric: of the text's perplexity. digest: of all its token ids."""
    common = {"task": metric, "doc_hash": digest, "filter": "none"}
    return [{**common, "doc_id": n, "scores": {LOSS: float(nll)}} for n, nll in enumerate(nll_N)]


def write_samples(path: Path, rows: Sequence[Json]) -> str:
    """Write rows with the columns below; return the file's SHA-256 (hex).

    task (or a perplexity's metric), its groups, doc_id, doc_hash, prompt_hash, filter, target;
    log_likelihood and greedy of each answer offered; generated text; scores by name.
    """
    import pyarrow as pa
    from pyarrow import parquet

    schema = pa.schema(
        [
            ("task", pa.string()),
            ("groups", pa.list_(pa.string())),
            ("doc_id", pa.int64()),
            ("doc_hash", pa.string()),
            ("prompt_hash", pa.string()),
            ("filter", pa.string()),
            ("target", pa.string()),
            ("log_likelihood", pa.list_(pa.float64())),
            ("greedy", pa.list_(pa.bool_())),
            ("text", pa.list_(pa.string())),
            ("scores", pa.map_(pa.string(), pa.float64())),
        ]
    )
    plain = [
        {**row, "scores": list(row["scores"].items()), "text": _texts(row.get("text"))}
        for row in rows
    ]
    buffer = io.BytesIO()
    with parquet.ParquetWriter(buffer, schema) as writer:
        writer.write_table(pa.Table.from_pylist(plain, schema=schema))
        writer.add_key_value_metadata({"seal": (SEAL + NO_SEAL).decode()})
    content = _sealed(buffer.getvalue())
    write_atomically(path, content)
    return hashlib.sha256(content).hexdigest()


def read_samples(
    path: Path, columns: list[str] | None = None, digest: str | None = None
) -> list[Json]:
    """Read rows that `write_samples` wrote.

    Args:
        columns: read these alone (`SCORED` is enough for `measured`).
        digest: the file's SHA-256 in its record; None where an older version wrote the record.

    Raises:
        IntegrityError: the file is missing, damaged or another trial's.
    """
    content = _content(path, digest)
    try:
        rows: list[Json] = _table(content, columns).to_pylist()
        rows = [{**row, "scores": dict(row["scores"])} for row in rows]
    except Exception as error:  # of any kind: the reader trusts what it reads
        raise _unreadable(path, error) from error
    return rows


def damaged_files(files: Mapping[str, str | None], folder: Path) -> dict[str, str]:
    """Return those of a record's files that are not as it names them, each with the reason.

    Args:
        files: a record's; each with its SHA-256 (hex).
        folder: where they lie.

    Of a file whose digest an older version did not note, only what no reader can read is found.
    """
    damaged = {}
    for name, digest in files.items():
        path = folder / name
        try:
            content = _content(path, digest)
            if digest is None:
                _table(content, None).validate(full=True)
        except IntegrityError as error:
            damaged[name] = str(error)
        except Exception as error:
            damaged[name] = str(_unreadable(path, error))
    return damaged


def _content(path: Path, digest: str | None) -> bytes:
    """Return a file's bytes if nothing says that they are not what was written.

    Raises:
        IntegrityError: the file is missing, damaged or another trial's.
    """
    try:
        content = read_file(path)
    except OSError as error:
        raise _unreadable(path, error) from error
    if digest is not None and hashlib.sha256(content).hexdigest() != digest:
        raise IntegrityError(
            f"{path} cannot be read: it is damaged or another trial's, by its checksum in the "
            "trial's record"
        )
    if _sealed(content) != content:
        raise IntegrityError(f"{path} cannot be read: it is damaged, by its own checksum")
    return content


def _sealed(content: bytes) -> bytes:
    """Return a file with the checksum of the rest of it in the place for that, if it has one."""
    before, mark, after = content.rpartition(SEAL)  # its place is in the footer, after all samples
    if not mark:
        return content  # an older version's
    after = after[len(NO_SEAL) :]
    digest = hashlib.sha256(before + mark + NO_SEAL + after).hexdigest()
    return before + mark + digest.encode() + after


def _table(content: bytes, columns: list[str] | None) -> "pyarrow.Table":
    """Read a Parquet file; raise whatever its reader raises."""
    import pyarrow as pa
    from pyarrow import parquet

    table = parquet.read_table(pa.BufferReader(content), columns=columns)
    for name in columns or SCORED:
        table.schema.field(name)  # KeyError: it is not ours
    return table


def _unreadable(path: Path, error: Exception) -> IntegrityError:
    words = " ".join(str(error).split()) or type(error).__name__
    return IntegrityError(f"{path} cannot be read: {words}")


def measured(rows: Sequence[Json], quick: bool) -> MetricScores:
    """Return scores by metric, as `compare` takes them; a group has the samples of all its tasks.

    A sample is a document with its prompt: answers to different prompts are not compared.
    """
    scores: MetricScores = {}
    for row in rows:
        sample = "/".join(str(row[key]) for key in SAMPLE if row.get(key) is not None)
        for name, score in row["scores"].items():
            if name == LOSS:
                scores.setdefault(row["task"], {})[sample] = score
                continue
            for owner in (row["task"], *(row.get("groups") or ())):
                scores.setdefault(task_metric(f"{owner}/{name}", quick), {})[sample] = score
    return scores


def comparisons(ours: MetricScores, baseline: MetricScores) -> dict[str, Comparison]:
    """Compare the trial with the baseline, sample by sample, on each metric that both have.

    Raises:
        IntegrityError: the two were not scored on the same samples.
    """
    from q3q.evaluate.compare import compare

    both = [metric for metric in ours if metric in baseline]
    return {metric: compare(metric, ours[metric], baseline[metric]) for metric in both}


def _texts(answers: Any) -> list[str] | None:
    return None if answers is None else [str(answer) for answer in answers]
