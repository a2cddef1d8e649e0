"""What MLflow shows: names, tags, notes and the columns of a sweep's table."""

import hashlib
import json
import math
import os
import re
import time
from collections.abc import Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

from q3q.record import Sweep, TrialRecord, block_errors
from q3q.spec import MEAN_ACCURACY, TrialSpec, mean_metrics

if TYPE_CHECKING:
    from mlflow.entities import Metric

# What MLflow takes, in characters (tags: servers before 3.0). Longer texts are cut and stand whole in artifacts.
LONGEST_PARAM, LONGEST_TAG = 6000, 5000
LONGEST_COMMAND = 1500  # in the note of a sweep; whole in a tag, as far as that takes it
ASIDE = ("top1_agreement/", "kl_p")  # of what a trial measured; no columns of the table of a sweep
LONGEST_NAME = 120  # of a run, which stands in a table's column
MOST_COLUMNS = 8  # metrics in the UI's table of a sweep
DIGITS = (
    7  # of a metric that is no whole number: a table has no room for more, record.json has them all
)


def shortened(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def fitting_params(tags: Mapping[str, str]) -> dict[str, str]:
    return {name: shortened(value, LONGEST_TAG) for name, value in tags.items()}


def content_digest(record: TrialRecord) -> str:
    return hashlib.sha256(json.dumps(record.to_json(), sort_keys=True).encode()).hexdigest()[:16]


def run_times(record: TrialRecord) -> tuple[int, int]:
    """When the trial started and ended, in milliseconds since 1970; now, for one that died before it could say."""
    now = int(time.time() * 1000)
    ended, started = (milliseconds(record.environment.get(key)) for key in ("ended", "started"))
    return started or ended or now, ended or now


def milliseconds(moment: str | None) -> int | None:
    return None if moment is None else int(datetime.fromisoformat(moment).timestamp() * 1000)


def metric_entities(record: TrialRecord) -> dict[str, float]:
    """The record's metrics under names that MLflow takes, `<metric>.low` and `<metric>.high` of each 95 % interval,
    `<metric>.difference` from the unquantized model, and the mean accuracy of the tasks."""
    named = dict(record.metrics)
    for name, (low, high) in record.intervals.items():
        named |= {f"{name}.low": low, f"{name}.high": high}
    for name, compared in record.comparisons.items():
        if compared.difference is not None:
            named[f"{name}.difference"] = compared.difference
    accuracies = mean_metrics(record.spec)
    if len(accuracies) > 1 and all(name in record.metrics for name in accuracies):
        named[MEAN_ACCURACY] = math.fsum(record.metrics[name] for name in accuracies) / len(
            accuracies
        )
    return {_metric_name(name): _brief(value) for name, value in named.items()}


def named_metrics(metrics: Mapping[str, float], at: int, step: int = 0) -> list["Metric"]:
    """As MLflow takes them. at: milliseconds since 1970."""
    from mlflow.entities import Metric

    return [Metric(_metric_name(name), value, at, step) for name, value in metrics.items()]


def block_metrics(record: TrialRecord, drawn: set[tuple[str, int]], at: int) -> list["Metric"]:
    """Mean error of each block's linears, a step a block, so that the UI draws it: those that are not drawn yet."""
    return [
        metric
        for block, errors in block_errors(record.sites).items()
        for metric in named_metrics(
            {name: value for name, value in errors.items() if (name, block) not in drawn}, at, block
        )
    ]


def _brief(value: float) -> float:
    return value if float(value).is_integer() else float(f"{value:.{DIGITS}g}")


def _metric_name(name: str) -> str:
    return re.sub(r"[^\w/.\- ]", "_", name)


def trial_tags(record: TrialRecord) -> dict[str, str]:
    spec, commit = record.spec, str(record.environment.get("git_commit") or "")
    tags = {
        "q3q.quantization": spec.quantization_id,
        "q3q.method": str(spec.method["name"]),
        "q3q.model": model_label(spec),
        "q3q.status": record.status,
        "q3q.reason": record.reason,
        "q3q.diverged": ", ".join(record.diverged),
        "q3q.git_commit": commit,
        "mlflow.source.git.commit": commit.partition("+")[0],
        "mlflow.note.content": _story(record),
        **_exported(record),
        **origin_of(),
    }
    return {name: value for name, value in tags.items() if value}


def _exported(record: TrialRecord) -> dict[str, str]:
    """Where an exported checkpoint is and what: gigabytes are not copied unless somebody registers them."""
    facts = record.notes.get("export", {})
    size = (
        {"bytes": f"{record.metrics['export_bytes']:.0f}"}
        if facts and "export_bytes" in record.metrics
        else {}
    )
    named = {name: str(facts[name]) for name in ("format", "path", "sha256") if name in facts}
    return {f"q3q.export.{name}": value for name, value in {**named, **size}.items()}


def _story(record: TrialRecord) -> str:
    """What a person should know of the trial, in Markdown."""
    lines = [f"{record.spec.name} · {model_label(record.spec)}: **{record.status}**"]
    if record.reason:
        lines.append(f"Reason: {record.reason}")
    if record.diverged:
        lines.append(f"Not a finite number: {', '.join(record.diverged)}")
    if record.comparisons:
        told = [name for name, compared in record.comparisons.items() if compared.distinguishable]
        lines.append(f"Distinguishable from the unquantized model: {', '.join(told) or 'nothing'}")
    lines += [
        f"Check {check.name} failed: {check.detail}" for check in record.checks if not check.passed
    ]
    return "\n\n".join(lines)


def origin_of() -> dict[str, str]:
    user = os.environ.get("USER") or os.environ.get("LOGNAME")
    return {"mlflow.source.name": "launch.py", "mlflow.source.type": "LOCAL"} | (
        {"mlflow.user": user} if user else {}
    )


def sweep_summary(trials: tuple[TrialSpec, ...]) -> dict[str, str]:
    """What the sweep varies, as short strings."""
    schemes = [spec.scheme for spec in trials if spec.scheme is not None]
    return {
        "models": _listed(model_label(spec) for spec in trials),
        "methods": _listed(spec.method["name"] for spec in trials),
        "bits": _listed(scheme.bits for scheme in schemes),
        "group_sizes": _listed(scheme.group_size for scheme in schemes),
        "act_bits": _listed(scheme.act_bits for scheme in schemes),
        "seeds": _listed(spec.seed for spec in trials),
        "trials": str(len(trials)),
    }


def _listed(values: Any) -> str:
    """Each value once, in order; `-` if there is none."""
    return ", ".join(map(str, sorted({value for value in values if value is not None}))) or "-"


def model_label(spec: TrialSpec) -> str:
    return str(spec.model.get("name") or spec.model.get("source"))


def table_view(parent: str, measured: list[str]) -> str:
    """What the UI's table of a sweep shows, as the UI itself keeps a view that somebody shares: the trials alone, what
    they measured beside their bits, the best first. A UI that does not know it says so and shows all runs."""
    main = sorted((name for name in measured if not name.startswith(ASIDE)), key=_rank) or measured
    columns = [
        f"metrics.`{_metric_name(name)}`"
        for name in [*main[:MOST_COLUMNS], "bits_per_weight_model"]
    ]
    return json.dumps(
        {
            "searchFilter": f"tags.mlflow.parentRunId = '{parent}'",
            "orderByKey": columns[0],
            "orderByAsc": "accuracy" not in columns[0] and "/acc" not in columns[0],
            "startTime": "ALL",
            "lifecycleFilter": "Active",
            "datasetsFilter": [],
            "modelVersionFilter": "All Runs",
            "selectedColumns": ["params.`scheme.bits`", "params.`scheme.group_size`", *columns],
        }
    )


def _rank(name: str) -> int:
    """Perplexities first, then the mean accuracy, then what is about single tasks and tokens."""
    return 0 if name.startswith("perplexity") else 1 if name == MEAN_ACCURACY else 2


def headline_of(sweep: Sweep) -> str:
    """What the sweep's own run is called: its question, if it has one."""
    return shortened(sweep.question or sweep.name, LONGEST_NAME)


def sweep_note(sweep: Sweep, answer: str = "") -> str:
    """What was asked, how to ask it again, and as many tables of the answer as there is room for."""
    asked = [
        f"**{word}.** {text}"
        for word, text in (("Question", sweep.question), ("Expectation", sweep.expectation))
        if text
    ]
    note = "\n\n".join([*asked, f"```\n{shortened(sweep.command, LONGEST_COMMAND)}\n```"])
    if not answer:
        return note
    pointer = "The whole report is `report.html` among the artifacts of this run."
    for table in re.split(r"\n\n(?=\*\*)", answer.strip()):
        if len(note) + len(table) + len(pointer) + 4 > LONGEST_TAG:
            break
        note += f"\n\n{table}"
    return f"{note}\n\n{pointer}"
