"""Each sample's scores, as a Parquet file, and comparisons of two trials from them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from q3q.errors import IntegrityError
from q3q.evaluate.compare import compare
from q3q.evaluate.metrics import task_metric
from q3q.record import Comparison
from q3q.spec import Json

SAMPLES = "samples.parquet"
SCORED = ["task", "groups", "doc_id", "doc_hash", "scores"]
LOSS = "nll"  # a text window's, nats per token
SAMPLE = ("task", "doc_id", "doc_hash", "prompt_hash")
MetricScores = dict[str, dict[str, float]]  # metric -> sample -> score


def window_rows(metric: str, digest: str, nll_N: Sequence[float]) -> list[Json]:
    """Return a row a window. metric: of the text's perplexity. digest: of all its token ids."""
    common = {"task": metric, "doc_hash": digest, "filter": "none"}
    return [{**common, "doc_id": n, "scores": {LOSS: float(nll)}} for n, nll in enumerate(nll_N)]


def write_samples(path: Path, rows: Sequence[Json]) -> None:
    """Write rows with the columns below.

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
    partial = path.with_name(f".{path.name}.partial")
    parquet.write_table(pa.Table.from_pylist(plain, schema=schema), partial)
    partial.replace(path)


def read_samples(path: Path, columns: list[str] | None = None) -> list[Json]:
    """Read rows that `write_samples` wrote; `columns` alone (`SCORED` is enough for `measured`).

    Raises:
        IntegrityError: the file is missing or damaged.
    """
    import pyarrow as pa
    from pyarrow import parquet

    try:
        rows: list[Json] = parquet.read_table(path, columns=columns).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise IntegrityError(f"{path} cannot be read: {error}") from error
    return [{**row, "scores": dict(row["scores"])} for row in rows]


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
    both = [metric for metric in ours if metric in baseline]
    return {metric: compare(metric, ours[metric], baseline[metric]) for metric in both}


def _texts(answers: Any) -> list[str] | None:
    return None if answers is None else [str(answer) for answer in answers]
