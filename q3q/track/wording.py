"""Write what people read in MLflow: names of runs, notes, and the columns of a sweep's table."""

import json
import re

from q3q.record import Sweep, TrialRecord
from q3q.spec import MEAN_ACCURACY, TrialSpec
from q3q.storage.files import in_words

MAX_TAG = 5000  # characters that servers before 3.0 accept; a note is a tag
MAX_COMMAND = 1500  # characters in a sweep's note; a tag has the command in full
MAX_RUN_NAME = 120  # characters, for the width of a table's column
MAX_COLUMNS = 8  # metrics in a sweep's table
SECONDARY_METRICS = ("top1_agreement/", "kl_p")  # prefixes; they get no column beside others


def truncated(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def sweep_run_name(sweep: Sweep) -> str:
    """Return the study's question, or its name if it has none."""
    return truncated(sweep.question or sweep.name, MAX_RUN_NAME)


def trial_run_name(sweep: Sweep, spec: TrialSpec) -> str:
    return truncated(sweep.names.get(spec.id, f"{spec.name} · {spec.model.label}"), MAX_RUN_NAME)


def sweep_note(sweep: Sweep, answer: str = "") -> str:
    """Write the question, the command, and as many tables of the answer as there is room for."""
    texts = (("Question", sweep.question), ("Expectation", sweep.expectation))
    parts = [f"**{word}.** {text}" for word, text in texts if text]
    note = "\n\n".join([*parts, f"```\n{truncated(sweep.command, MAX_COMMAND)}\n```"])
    if not answer:
        return truncated(note, MAX_TAG)
    pointer = "The full report is `report.html` among the artifacts of this run."
    for table in re.split(r"\n\n(?=\*\*)", answer.strip()):
        if len(note) + len(table) + len(pointer) + 4 > MAX_TAG:
            break
        note += f"\n\n{table}"
    return truncated(f"{note}\n\n{pointer}", MAX_TAG)


def trial_note(record: TrialRecord) -> str:
    lines = [f"{record.spec.name} · {record.spec.model.label}: **{record.status}**"]
    if record.reason:
        lines.append(f"Reason: {record.reason}")
    if record.diverged:
        lines.append(f"Not a finite number: {', '.join(record.diverged)}")
    if record.comparisons:
        differing = [name for name, row in record.comparisons.items() if row.distinguishable]
        lines.append(
            f"Significantly different from the unquantized model: {', '.join(differing)}"
            if differing
            else "No significant difference from the unquantized model"
        )
    if (export := record.notes.get("export")) is not None:
        size = export.get("disk_bytes", record.metrics.get("export_bytes"))
        taken = "" if size is None else f", {in_words(size)} on disk"
        lines.append(f"Checkpoint: `{export['path']}` ({export['format']}{taken})")
    lines += [
        f"Check {check.name} failed: {check.detail}" for check in record.checks if not check.passed
    ]
    return "\n\n".join(lines)


def shared_view(parent_run: str, metrics: list[str]) -> str:
    """Return the state of a view that MLflow's UI shows as a sweep's table.

    It lists the trials alone, the best first, with their bits and metrics. This is the UI's own
    format for a view that somebody shares; a UI that does not know it says so and shows all runs.

    Args:
        metrics: that the sweep's trials have, by MLflow's names.
    """
    primary = [name for name in metrics if not name.startswith(SECONDARY_METRICS)] or metrics
    shown = sorted(primary, key=_column_rank)[:MAX_COLUMNS]
    columns = [f"metrics.`{name}`" for name in [*shown, "bits_per_weight_model"]]
    return json.dumps(
        {
            "searchFilter": f"tags.mlflow.parentRunId = '{parent_run}'",
            "orderByKey": columns[0],
            "orderByAsc": "accuracy" not in columns[0] and "/acc" not in columns[0],
            "startTime": "ALL",
            "lifecycleFilter": "Active",
            "datasetsFilter": [],
            "modelVersionFilter": "All Runs",
            "selectedColumns": ["params.`scheme.bits`", "params.`scheme.group_size`", *columns],
        }
    )


def _column_rank(name: str) -> int:
    """Rank perplexities first, then the mean accuracy, then single tasks and tokens."""
    return 0 if name.startswith("perplexity") else 1 if name == MEAN_ACCURACY else 2
