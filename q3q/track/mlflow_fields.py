"""Turn sweeps and records into MLflow's metrics, params, tags and times."""

import json
import math
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import fields
from datetime import datetime
from typing import TYPE_CHECKING, Any

from q3q.evaluate.metrics import mean_metrics
from q3q.evaluation import is_perplexity
from q3q.kv_scheme import KvScheme
from q3q.number_formats import INT
from q3q.record import TrialRecord, block_errors
from q3q.spec import MEAN_ACCURACY, SELDOM_OF_SCHEME, Json, TrialSpec, digest
from q3q.track.mlflow_names import fitted_names
from q3q.track.wording import SIZE, trial_note

if TYPE_CHECKING:
    from mlflow.entities import DatasetInput, Metric

LAYOUT = 4  # raised when runs get other params or metrics: then each run is brought up to date
# Params that a user types by another name than that in the spec's JSON.
TYPED = {
    "model.name": "model",
    "model.dtype": "dtype",
    "method.name": "method",
    "scheme.bits": "bits",
    "scheme.group_size": "group_size",
    "scheme.symmetric": "symmetric",
    "scheme.act_bits": "act_bits",
    **{f"scheme.{key}": key for key in SELDOM_OF_SCHEME},
    **{f"kv.{part.name}": f"kv_{part.name}" for part in fields(KvScheme)},
    "calibration.source": "calibration",
}
ENDS = (".low", ".high", ".difference")
MOST_DATASET_NAME, MOST_DATASET_SOURCE = 500, 65_000  # characters that MLflow takes
METRIC_DIGITS = 7  # of fractions, for the width of a table's column; record.json has all digits


def record_digest(record: TrialRecord) -> str:
    """Return 16 hex digits of the record's JSON, wherever its storage folder lies."""
    facts = record.to_json()
    placed = {key: value for key, value in facts["spec"].items() if key != "places"}
    return digest({**facts, "spec": placed, "layout": LAYOUT}, spaced=True)[:16]


def earlier_digest(record: TrialRecord) -> str:
    """Return the digest in runs of earlier versions, which depends on the storage's place."""
    return digest(record.to_json(), spaced=True)[:16]


def trial_times(record: TrialRecord) -> tuple[int, int]:
    """Return the trial's start and end in milliseconds since 1970; now, where it has none."""
    now = int(time.time() * 1000)
    ended, started = (milliseconds(record.environment.get(key)) for key in ("ended", "started"))
    return started or ended or now, ended or now


def milliseconds(moment: str | None) -> int | None:
    """Return an ISO 8601 moment in milliseconds since 1970."""
    return None if moment is None else int(datetime.fromisoformat(moment).timestamp() * 1000)


def record_metrics(record: TrialRecord) -> dict[str, float]:
    """Return the record's metrics, which may have names that MLflow refuses.

    With them go `<metric>.low` and `<metric>.high` of each 95 % interval, `<metric>.difference`
    from the unquantized model, the tasks' mean accuracy, and what decides once more as
    `answer/...`, for MLflow draws its charts in the order of the alphabet, and by the names of
    `columns`.
    """
    metrics = dict(record.metrics)
    for name, (low, high) in record.intervals.items():
        metrics |= {f"{name}.low": low, f"{name}.high": high}
    for name, comparison in record.comparisons.items():
        if comparison.difference is not None:
            metrics[f"{name}.difference"] = comparison.difference
    names = mean_metrics(record.spec)
    if len(names) > 1 and all(name in record.metrics for name in names):
        metrics[MEAN_ACCURACY] = math.fsum(record.metrics[name] for name in names) / len(names)
    deciding = _deciding(record.spec, metrics)
    sizes = [metrics[name] for name in ("export_bytes", "model_bytes") if name in metrics]
    metrics |= {answer_name(name): metrics[name] for name in deciding}
    metrics |= {column: metrics[name] for name, column in columns(deciding).items()}
    metrics |= {SIZE: sizes[0] / 1e6} if sizes else {}
    return {name: _rounded(value) for name, value in metrics.items() if math.isfinite(value)}


def columns(deciding: Iterable[str]) -> dict[str, str]:
    """Return names for a table's columns of the metrics that trials are judged by.

    Before 3.17, MLflow shows columns in the order of the alphabet, each as wide as thirteen
    letters: `acc`, `ppl library`, `ppl stories`, then `size MB`.
    """
    return {name: _column(name) for name in deciding}


def _column(metric: str) -> str:
    if metric == MEAN_ACCURACY:
        return "acc"
    first, _, last = metric.rpartition("/")
    quick = " quick" if "_quick" in first else ""
    if is_perplexity(metric):
        return f"ppl {last}{quick}"
    return f"{last} {first.removesuffix('_quick')}{quick}"


def deciding_columns(record: TrialRecord) -> dict[str, str]:
    """Return the columns of what a trial is judged by, by metric."""
    return columns(_deciding(record.spec, record_metrics(record)))


def _deciding(spec: TrialSpec, metrics: Mapping[str, float]) -> list[str]:
    """Return the metrics that trials are judged by: perplexities, and the accuracy over tasks."""
    texts = [name for name in metrics if is_perplexity(name) and not name.endswith(ENDS)]
    accuracies = [name for name in mean_metrics(spec) if name in metrics]
    return [*texts, *([MEAN_ACCURACY] if MEAN_ACCURACY in metrics else accuracies)]


def answer_name(metric: str) -> str:
    """Return the name under which charts begin: `answer/perplexity of stories`."""
    first, _, last = metric.rpartition("/")
    if is_perplexity(metric):
        return f"answer/{first} of {last}"
    return f"answer/{last} of {first}" if first else f"answer/mean {metric}"


def metric_entities(metrics: Mapping[str, float], time_ms: int, step: int = 0) -> list["Metric"]:
    """Return metrics under names that MLflow takes; what is not finite is no metric."""
    from mlflow.entities import Metric

    names = fitted_names(metrics)
    return [
        Metric(names[name], value, time_ms, step)
        for name, value in metrics.items()
        if math.isfinite(value)
    ]


def block_metrics(
    record: TrialRecord, logged: set[tuple[str, int]], time_ms: int
) -> list["Metric"]:
    """Return the mean error of each block's linears, one step a block.

    Args:
        logged: metrics and steps to leave out.
    """
    return [
        metric
        for block, errors in block_errors(record.sites).items()
        for metric in metric_entities(
            {name: value for name, value in errors.items() if (name, block) not in logged},
            time_ms,
            block,
        )
    ]


def _rounded(value: float) -> float:
    return value if float(value).is_integer() else float(f"{value:.{METRIC_DIGITS}g}")


def trial_tags(record: TrialRecord) -> dict[str, str]:
    spec, commit = record.spec, str(record.environment.get("git_commit") or "")
    tags = {
        "q3q.quantization": spec.quantization_id,
        "q3q.method": spec.method.name,
        "q3q.model": spec.model.label,
        "q3q.status": record.status,
        "q3q.reason": record.reason,
        "q3q.diverged": ", ".join(record.diverged),
        "q3q.git_commit": commit,
        "mlflow.source.git.commit": commit.partition("+")[0],
        "mlflow.note.content": trial_note(record),
        **_export_tags(record),
        **source_tags(),
    }
    return {name: value for name, value in tags.items() if value}


def _export_tags(record: TrialRecord) -> dict[str, str]:
    """Describe an exported checkpoint: its gigabytes are uploaded only if it is registered."""
    facts = record.notes.get("export", {})
    names = ("format", "path", "sha256", "disk_bytes")
    tags = {name: str(facts[name]) for name in names if name in facts}
    if facts and "export_bytes" in record.metrics:
        tags["bytes"] = f"{record.metrics['export_bytes']:.0f}"
    return {f"q3q.export.{name}": value for name, value in tags.items()}


def source_tags() -> dict[str, str]:
    tags = {"mlflow.source.name": "launch.py", "mlflow.source.type": "LOCAL"}
    user = os.environ.get("USER") or os.environ.get("LOGNAME")
    return tags | ({"mlflow.user": user} if user else {})


def trial_params(spec: TrialSpec) -> dict[str, str]:
    """Return the trial's settings by the names that a user types: `bits`, not `scheme.bits`.

    A setting that the trial does not have is left out, but for the calibration: MLflow compares
    by the params that all runs have, and a method without data says `none`.
    """
    # `scheme` and `calibration` as such are there only where the trial has none.
    settings = {
        TYPED.get(name, name): value
        for name, value in flat(spec).items()
        if name not in ("scheme", "calibration")
    }
    if spec.scheme is not None and spec.scheme.act_bits is None:
        del settings["act_bits"]
    return {"calibration": "none", **settings, "model": spec.model.label}


def flat(spec: TrialSpec) -> dict[str, str]:
    """Return a spec as dotted keys and printable values, as trackers like their params."""
    facts = spec.to_json()
    # A pattern says in a word what it means in each of a hundred blocks.
    facts |= {key: json.dumps(value) for key, value in facts.pop("rules", {}).items()}
    facts["evaluation"] = _with_brief_data(facts["evaluation"])
    return dict(_flatten(facts))


def dataset_inputs(spec: TrialSpec) -> list["DatasetInput"]:
    """Return the trial's texts, and its tasks' questions, as MLflow's data sets."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    texts: list[tuple[str, Json]] = []
    if spec.calibration is not None:
        texts.append(("calibration", spec.calibration.to_json()))
    texts += [("evaluation", text.to_json()) for text in spec.evaluation.texts]
    prefix = "evaluation.data."
    texts += [
        ("evaluation", {"name": key.removeprefix(prefix), "digest": identity})
        for key, identity in flat(spec).items()
        if key.startswith(prefix)
    ]
    return [
        DatasetInput(
            Dataset(
                name=str(text.get("name") or text["source"])[:MOST_DATASET_NAME],
                digest=text["digest"][:36] or "unknown",
                source_type="q3q",
                source=json.dumps({key: text[key] for key in text if key != "digest"})[
                    :MOST_DATASET_SOURCE
                ],
            ),
            [InputTag("mlflow.data.context", context)],
        )
        for context, text in texts
    ]


def sweep_params(specs: list[TrialSpec]) -> dict[str, str]:
    """Return what the sweep varies, as short strings."""
    schemes = [spec.scheme for spec in specs if spec.scheme is not None]
    floats = [scheme for scheme in schemes if scheme.format != INT]
    caches = [spec.kv for spec in specs if spec.kv is not None]
    return {
        "models": _distinct(spec.model.label for spec in specs),
        "methods": _distinct(spec.method.name for spec in specs),
        "bits": _distinct(scheme.bits for scheme in schemes),
        "group_sizes": _distinct(scheme.group_size for scheme in schemes),
        "act_bits": _distinct(scheme.act_bits for scheme in schemes),
        **({"formats": _distinct(scheme.codes for scheme in floats)} if floats else {}),
        **({"caches": _distinct(kv.name for kv in caches)} if caches else {}),
        "seeds": _distinct(spec.seed for spec in specs),
        "trials": str(len(specs)),
    }


def _distinct(values: Iterable[Any]) -> str:
    """List each value once, in order; `-` if there is none."""
    return ", ".join(map(str, sorted({value for value in values if value is not None}))) or "-"


def _with_brief_data(evaluation: Json) -> Json:
    """Give an evaluation one digest for each repository of data sets: MMLU has 57 of them."""
    parts: dict[str, list[str]] = {}
    for name, identity in evaluation.get("data", {}).items():
        parts.setdefault(name.partition(":")[0], []).append(identity)
    brief = {
        name: identities[0] if len(set(identities)) == 1 else digest({"all": identities})[:10]
        for name, identities in parts.items()
    }
    return {**evaluation, "data": brief} if brief else evaluation


def _flatten(facts: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    pairs: list[tuple[str, str]] = []
    for key, value in facts.items():
        if isinstance(value, Mapping):
            pairs += _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            items = {str(number): item for number, item in enumerate(value)}
            pairs += _flatten(items, f"{prefix}{key}.")
        else:
            pairs.append((prefix + key, value if isinstance(value, str) else json.dumps(value)))
    return pairs
