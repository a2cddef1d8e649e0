"""Write what people read in MLflow: names of runs, notes, and the columns of a sweep's table."""

import json
from collections.abc import Iterable

from q3q.evaluate.correction import holm
from q3q.evaluate.power import LEVEL
from q3q.formatting import bytes_in_words, plural
from q3q.record import Sweep, TrialRecord
from q3q.spec import TrialSpec
from q3q.track.mlflow_names import fitted_text

ABOUT_EXPERIMENT = """\
**Post-training quantization of language models, measured by q3q.**

Each run with children is a sweep. Its note begins with the answer, its metrics are the best values
at each bit-width, and `report.html` among its artifacts has every table and plot. Each child run is
a trial: one model, one method, one bit-width. Search trials by what was asked for, for example
`params.method = "gptq" and params.bits = "4"`, and compare them by `perplexity/...` (lower is
better) and `accuracy` or `.../acc` (higher is better). A table's columns have the same numbers
under short names: `ppl TEXT`, `acc` and `size MB`. `.low` and `.high` are the ends of a 95 %
interval, and `.difference` is the distance from the unquantized model.
"""
NOTE = "mlflow.note.content"  # the tag that MLflow shows as a description
MAX_TAG = 5000  # characters that servers before 3.0 accept; a note is a tag
MAX_COMMAND = 1500  # characters in a sweep's note; a tag has the command in full
MAX_RUN_NAME = 120  # characters, for the width of a table's column
SHOWN_PARAMS = ("method", "bits", "group_size")  # in a sweep's table
MAX_COLUMNS = 8  # metrics in a sweep's table
SIZE = "size MB"  # the last of them
RUN_NAME, CREATED, DURATION = "attributes.`Run Name`", "runDateAndNestInfo", "duration"
LETTER, AROUND = 7, 28  # pixels: of a bold letter, and of a column's margins
ARROW = 16  # pixels, of the column that is sorted by
NUMBER, NARROWEST = 84, 56  # pixels: of `11.54253`, and of any column
NAME_LETTER, AROUND_NAME = 7, 46  # pixels: of a run's name, and of its column's margins and dot
NARROWEST_NAME, WIDEST_NAME = 120, 320  # pixels
CREATED_WIDTH = 140  # pixels, enough for `10 minutes ago`


def sweep_run_name(sweep: Sweep) -> str:
    """Return the study's question, or its name if it has none."""
    return _one_line(sweep.question or sweep.name)


def trial_run_name(sweep: Sweep, spec: TrialSpec) -> str:
    return _one_line(sweep.names.get(spec.id, f"{spec.name} · {spec.model.label}"))


def _one_line(text: str) -> str:
    return fitted_text(" ".join(text.split()) or "unnamed", MAX_RUN_NAME)


def sweep_note(sweep: Sweep, answer: str = "") -> str:
    """Write the answer in words, the question, the command, and the answer's tables.

    MLflow shows the first lines of a note and folds the rest, so the words come first. There are
    as many tables as there is room for.
    """
    words, tables = _words_and_tables(answer)
    texts = (("Question", sweep.question), ("Expectation", sweep.expectation))
    parts = [words] if words else []
    parts += [f"**{word}.** {text}" for word, text in texts if text]
    command = f"```\n{fitted_text(sweep.command, MAX_COMMAND)}\n```"
    note = "\n\n".join([*parts, command])
    if not answer:
        return fitted_text(note, MAX_TAG)
    pointer = "The full report is `report.html` among the artifacts of this run."
    for table in tables:
        if len(note) + len(table) + len(pointer) + 4 > MAX_TAG:
            break
        note += f"\n\n{table}"
    return fitted_text(f"{note}\n\n{pointer}", MAX_TAG)


def _words_and_tables(answer: str) -> tuple[str, list[str]]:
    """Split an answer in Markdown into what precedes its first table, and its tables.

    A table has a title before it, and may have a remark after it.
    """
    paragraphs = [part for part in answer.strip().split("\n\n") if part.strip()]
    titles = [number - 1 for number, part in enumerate(paragraphs) if part.startswith("|")]
    starts = [max(0, number) for number in titles] or [len(paragraphs)]
    ends = [*starts[1:], len(paragraphs)]
    tables = ["\n\n".join(paragraphs[a:b]) for a, b in zip(starts, ends, strict=True)]
    return "\n\n".join(paragraphs[: starts[0]]), [table for table in tables if table]


def trial_note(record: TrialRecord) -> str:
    lines = [f"{record.spec.name} · {record.spec.model.label}: **{record.status}**"]
    if record.reason:
        lines.append(f"Reason: {record.reason}")
    if record.diverged:
        lines.append(f"Not a finite number: {', '.join(record.diverged)}")
    if record.comparisons:
        differing = _differing(record)
        tests = f"of {plural(len(record.comparisons), 'test')}, by Holm's method"
        lines.append(
            f"Significantly different from the unquantized model ({tests}): {', '.join(differing)}"
            if differing
            else f"No significant difference from the unquantized model ({tests})"
        )
    if (export := record.notes.get("export")) is not None:
        size = export.get("disk_bytes", record.metrics.get("export_bytes"))
        taken = "" if size is None else f", {bytes_in_words(size)} on disk"
        lines.append(f"Checkpoint: `{export['path']}` ({export['format']}{taken})")
    lines += [
        f"Check {check.name} failed: {check.detail}" for check in record.checks if not check.passed
    ]
    return "\n\n".join(lines)


def _differing(record: TrialRecord) -> list[str]:
    """Return the metrics that differ from the unquantized model's, corrected over all of them."""
    alone = {
        name: float(not row.distinguishable) if row.p_value is None else row.p_value
        for name, row in record.comparisons.items()
    }
    return [name for name, p in holm(alone).items() if p < LEVEL]


def shared_view(parent_run: str, metrics: list[str], names: Iterable[str] = ()) -> str:
    """Return the state of a view that MLflow's UI shows as a sweep's table.

    It lists the trials alone, the best first: what decides, then what was asked for. Each column
    is as wide as its name needs, so that what decides is read in full without scrolling. This is
    the UI's own format for a view that somebody shares; a UI that does not know it says so and
    shows all runs, and one from before 3.17 orders and sizes the columns itself.

    Args:
        metrics: the columns of what trials are judged by, the one that ranks them first.
        names: the trials' names.
    """
    shown = [f"metrics.`{name}`" for name in [*metrics[:MAX_COLUMNS], SIZE]]
    asked = [f"params.`{name}`" for name in SHOWN_PARAMS]
    longest = max(map(len, names), default=0)
    named = min(max(NARROWEST_NAME, NAME_LETTER * longest + AROUND_NAME), WIDEST_NAME)
    widths = {key: max(NUMBER, _width(key)) for key in shown}
    widths |= {key: max(NARROWEST, _width(key) + LETTER) for key in asked}  # `m` is a wide letter
    widths[shown[0]] += ARROW
    return json.dumps(
        {
            "searchFilter": f"tags.mlflow.parentRunId = '{parent_run}'",
            "orderByKey": shown[0],
            "orderByAsc": not metrics or not metrics[0].startswith("acc"),
            "startTime": "ALL",
            "lifecycleFilter": "Active",
            "datasetsFilter": [],
            "modelVersionFilter": "All Runs",
            "selectedColumns": [*shown, *asked],
            "columnOrder": [RUN_NAME, CREATED, *shown, *asked, DURATION],
            "columnWidths": {RUN_NAME: named, CREATED: CREATED_WIDTH, **widths},
        }
    )


def _width(column: str) -> int:
    """Return the pixels in which a column's name is read in full."""
    name = column.partition("`")[2].removesuffix("`")
    return LETTER * len(name) + AROUND
