"""Each sample's scores, as a Parquet file, and comparisons of two trials from them.

The file carries a checksum of its own, and its record has the file's digest, which also tells it
from another trial's.
"""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from q3q.canonical import sha256
from q3q.errors import IntegrityError
from q3q.evaluate.metrics import exp_or_infinity, task_metric
from q3q.record import Comparison
from q3q.spec import Json
from q3q.storage.files import read_file, write_atomically

if TYPE_CHECKING:
    import pyarrow

SAMPLES = "samples.parquet"
KEYS = ["task", "groups", "doc_id", "doc_hash", "scores"]  # columns of every version
SCORED = [*KEYS, "group_scores"]
MAPS = ("scores", "group_scores", "values")
LOSS = "nll"  # a text window's, nats per token
SAMPLE = ("task", "doc_id", "doc_hash", "prompt_hash")
SEAL = b"q3q.sha256="  # comes before a file's own checksum
NO_SEAL = b"0" * 64
MetricScores = dict[str, dict[str, float]]  # metric -> sample -> score


def window_rows(
    metric: str, digest: str, scores: Sequence[float] | Mapping[int, float]
) -> list[Json]:
    """Return a row a window.

    Args:
        metric: of the text: its perplexity, or its KL.
        digest: of all its token ids.
        scores: each window's loss (or KL); a mapping has some windows', by their numbers.
    """
    common = {"task": metric, "doc_hash": digest, "filter": "none"}
    pairs = scores.items() if isinstance(scores, Mapping) else enumerate(scores)
    return [{**common, "doc_id": n, "scores": {LOSS: float(score)}} for n, score in pairs]


def write_samples(path: Path, rows: Sequence[Json]) -> str:
    """Write rows with the columns below; return the file's SHA-256 (hex).

    task (or a perplexity's metric), its groups, doc_id, doc_hash, prompt_hash, filter, target;
    log_likelihood and greedy of each answer offered; generated text; scores, what the sample
    contributes to each metric, by name; group_scores, the same of a group's metrics where it is
    not the task's score; values, a metric's value where that is not its score, as JSON.
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
            ("group_scores", pa.map_(pa.string(), pa.float64())),
            ("values", pa.map_(pa.string(), pa.string())),
        ]
    )
    plain = [
        {
            **row,
            **{name: list((row.get(name) or {}).items()) for name in MAPS},
            "text": _texts(row.get("text")),
        }
        for row in rows
    ]
    buffer = io.BytesIO()
    with parquet.ParquetWriter(buffer, schema) as writer:
        writer.write_table(pa.Table.from_pylist(plain, schema=schema))
        writer.add_key_value_metadata({"seal": (SEAL + NO_SEAL).decode()})
    content = _sealed(buffer.getvalue())
    write_atomically(path, content)
    return sha256(content)


def read_samples(
    path: Path, columns: list[str] | None = None, digest: str | None = None
) -> list[Json]:
    """Read rows that `write_samples` wrote.

    Args:
        columns: those to read (`SCORED` is enough for `measured`); None for all.
        digest: the file's SHA-256 in its record; None where an older version wrote the record.

    Raises:
        IntegrityError: the file is missing, damaged or another trial's.
    """
    content = _content(path, digest)
    try:
        rows: list[Json] = _table(content, columns).to_pylist()
        maps = [name for name in MAPS if columns is None or name in columns]
        rows = [row | {name: dict(row.get(name) or ()) for name in maps} for row in rows]
    except Exception as error:  # of any kind: the reader trusts what it reads
        raise _unreadable(path, error) from error
    return rows


def damaged_files(files: Mapping[str, str | None], folder: Path) -> dict[str, str]:
    """Return those of a record's files that are not as it names them, each with the reason.

    Args:
        files: a record's; each with its SHA-256 (hex).

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
    if digest is not None and sha256(content) != digest:
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
    digest = sha256(before + mark + NO_SEAL + after)
    return before + mark + digest.encode() + after


def _table(content: bytes, columns: list[str] | None) -> "pyarrow.Table":
    """Read a Parquet file; raise whatever its reader raises."""
    import pyarrow as pa
    from pyarrow import parquet

    file = parquet.ParquetFile(pa.BufferReader(content))
    there = file.schema_arrow.names
    if missing := [name for name in KEYS if name not in there]:
        raise KeyError(f"it has no column {missing[0]}")
    # Older files have fewer columns.
    return file.read(columns=[name for name in columns or there if name in there])


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
        of_groups = row.get("group_scores") or {}
        for name, score in row["scores"].items():
            if name == LOSS:
                scores.setdefault(row["task"], {})[sample] = score
                continue
            for owner in (row["task"], *(row.get("groups") or ())):
                full_name = f"{owner}/{name}"
                scores_of_metric = scores.setdefault(task_metric(full_name, quick), {})
                scores_of_metric[sample] = of_groups.get(full_name, score)
    return scores


def comparisons(
    ours: MetricScores,
    baseline: MetricScores,
    numbers: tuple[Mapping[str, float], Mapping[str, float]],
    higher_is_better: Mapping[str, bool] = MappingProxyType({}),
) -> dict[str, Comparison]:
    """Compare the trial with the baseline, sample by sample, on each metric that both have.

    A metric is compared if its numbers follow from its samples on both sides, see `explained`.

    Args:
        numbers: both sides' metrics, nan where they are not finite.
        higher_is_better: of each metric, where that is known.

    Raises:
        IntegrityError: the two were not scored on the same samples.
    """
    from q3q.evaluate.compare import compare

    by_metric: dict[str, Comparison] = {}
    for metric in (name for name in ours if name in baseline):
        sides = [
            explained(scores[metric], own[metric]) if metric in own else {}
            for scores, own in zip((ours, baseline), numbers, strict=True)
        ]
        if ways := [ratio for ratio in sides[0] if ratio in sides[1]]:
            ratio = ways[0]
            by_metric[metric] = compare(
                metric,
                sides[0][ratio],
                sides[1][ratio],
                ratio=ratio,
                higher_is_better=higher_is_better.get(metric),
            )
    return by_metric


def explained(scores: Mapping[str, float], number: float) -> dict[bool, Mapping[str, float]]:
    """Return scores from which a metric's number follows.

    They are under False if the number is their mean, and under True if it is exp of their mean.
    There are none if it is neither, such as F1 in an older file. Older files have log-likelihoods
    for lm-eval's `perplexity`; these are turned into losses.

    Args:
        number: the metric; nan if it is not finite.
    """
    mean = math.fsum(scores.values()) / len(scores)
    if math.isnan(number) and not math.isfinite(mean):
        return {False: scores, True: scores}
    losses = {sample: -score for sample, score in scores.items()}
    ways = (
        (mean, False, scores),
        (exp_or_infinity(mean), True, scores),
        (exp_or_infinity(-mean), True, losses),
    )
    for value, ratio, followed in ways:
        diverged = math.isnan(number) and not math.isfinite(value)
        if diverged or math.isclose(value, number, rel_tol=1e-5, abs_tol=1e-9):
            return {ratio: followed}
    return {}


def _texts(answers: Any) -> list[str] | None:
    return None if answers is None else [str(answer) for answer in answers]
