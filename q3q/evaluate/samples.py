"""What each sample scored, as a Parquet file beside the record, and what follows from it for pairs of trials."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from q3q.errors import IntegrityError
from q3q.evaluate.compare import compare
from q3q.record import Comparison
from q3q.spec import Json, task_metric

SAMPLES = "samples.parquet"
SCORED = ["task", "groups", "doc_id", "doc_hash", "scores"]
LOSS = "nll"  # of a window of text, nats per token
SAMPLE = ("task", "doc_id", "doc_hash", "prompt_hash")
Measured = dict[str, dict[str, float]]  # metric -> sample -> score


def window_rows(metric: str, digest: str, nll_N: Sequence[float]) -> list[Json]:
    """A row a window. metric: of the text's perplexity. digest: of all its token ids."""
    return [
        {
            "task": metric,
            "doc_id": number,
            "doc_hash": digest,
            "filter": "none",
            "scores": {LOSS: float(nll)},
        }
        for number, nll in enumerate(nll_N)
    ]


def write_samples(path: Path, rows: Sequence[Json]) -> None:
    """Write rows: task (or a perplexity's metric) and the groups it belongs to, doc_id, doc_hash, prompt_hash, filter,
    target, log_likelihood and greedy (of each answer offered), text (generated), scores (by name)."""
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
    partial = path.with_name(f".{path.name}.partial")
    parquet.write_table(pa.Table.from_pylist(plain, schema=schema), partial)
    partial.replace(path)


def read_samples(path: Path, columns: list[str] | None = None) -> list[Json]:
    """What `write_samples` wrote. columns: those alone; `SCORED` are enough for `measured`.

    Raises:
        IntegrityError: the file is not there or damaged.
    """
    import pyarrow as pa
    from pyarrow import parquet

    try:
        rows: list[Json] = parquet.read_table(path, columns=columns).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise IntegrityError(f"{path} cannot be read: {error}") from error
    return [{**row, "scores": dict(row["scores"])} for row in rows]


def measured(rows: Sequence[Json], quick: bool) -> Measured:
    """Scores by metric, as `compare` takes them; a group has the samples of all its tasks.

    A sample is a document as it was put to the model: an answer to another prompt is to another question.
    """
    found: Measured = {}
    for row in rows:
        sample = "/".join(str(row[key]) for key in SAMPLE if row.get(key) is not None)
        for name, score in row["scores"].items():
            if name == LOSS:
                found.setdefault(row["task"], {})[sample] = score
                continue
            for owner in (row["task"], *(row.get("groups") or ())):
                found.setdefault(task_metric(f"{owner}/{name}", quick), {})[sample] = score
    return found


def comparisons(ours: Measured, baseline: Measured) -> dict[str, Comparison]:
    """Each metric that both have, the trial's less the baseline's, sample by sample.

    Raises:
        IntegrityError: the two were not scored on the same samples.
    """
    return {
        metric: compare(metric, ours[metric], baseline[metric])
        for metric in ours
        if metric in baseline
    }


def _texts(answers: Any) -> list[str] | None:
    return None if answers is None else [str(answer) for answer in answers]
