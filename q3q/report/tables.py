"""Records as tables: a row per trial, and method by bits for each model and metric.

What differs between trials stands in the row's label, so that two group sizes, seeds or knobs never share a cell.
"""

import csv
import io
import json
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from q3q.record import TrialRecord
from q3q.spec import TrialSpec, text_metric

if TYPE_CHECKING:
    from pandas import DataFrame

DIVERGED, FAILED, ABSENT = "diverged", "failed", "-"  # cells that hold no number
UNQUANTIZED_BITS = 16  # the column of the unquantized model
MEAN_ACCURACY = "accuracy"  # over the tasks that a trial was asked for
FEW_SHOT, WORD_TASK = ("mmlu", "mmlu_paper"), "wikitext"  # tasks that are no part of a mean accuracy
SIZES = ("bits_per_weight", "bits_per_weight_model")

Cell = float | str


@dataclass(frozen=True)
class Table:
    """Text cells under column names; the first column labels the rows."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def markdown(self) -> str:
        lines = [self.columns, ("---", *("---:" for _ in self.columns[1:])), *self.rows]
        body = "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        return f"**{self.title}**\n\n{body}\n" + (f"\n{self.note}\n" if self.note else "")

    def plain(self, width: int = 100) -> str:
        """Aligned text of at most `width` columns; labels too long for it go below, by number."""
        rows, below = self.rows, [self.note] if self.note else []
        if _width((self.columns, *rows)) > width:
            rows = tuple((f"[{number}]", *row[1:]) for number, row in enumerate(self.rows, start=1))
            below += [f"[{number}] {row[0]}" for number, row in enumerate(self.rows, start=1)]
        widths = _widths((self.columns, *rows))
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
            for row in (self.columns, *rows)
        ]
        legend = [line for text in below for line in textwrap.wrap(text, width, subsequent_indent="    ")]
        return "\n".join([*textwrap.wrap(self.title, width), *(line.rstrip() for line in lines), *legend])


def in_order(records: Iterable[TrialRecord]) -> list[TrialRecord]:
    """Each trial once, its latest record: by model, the reference first, then the yardstick, then by name and bits."""
    latest = {record.spec.id: record for record in records}
    places = []
    for trial, label in zip(latest, labels([record.spec for record in latest.values()]), strict=True):
        spec = latest[trial].spec
        first = {"none": 0, "rtn": 1}.get(str(spec.method["name"]), 2)
        places.append((_natural(model_name(spec)), first, _natural(label), bits_of(spec), trial))
    return [latest[trial] for *_, trial in sorted(places)]


def result_tables(records: Sequence[TrialRecord], *, everything: bool, intervals: bool = False) -> list[Table]:
    """For each model, a table per metric.

    everything: also each task by itself, and the sizes; else perplexities and the tasks' mean.
    intervals: 95 % intervals in the cells, `3.50 [3.25, 3.75]`; else how wide the widest is, below the table.
    """
    tables = []
    for model, mine in by_model(in_order(records)).items():
        metrics = headline_metrics(mine)
        if everything:
            metrics += SIZES
        elif MEAN_ACCURACY in metrics:
            metrics = [name for name in metrics if not name.endswith("/acc")]
        for metric in metrics:
            grid = _grid(mine, metric, with_interval if intervals else shown_of)
            if not grid.empty:
                tables.append(_table(grid, model, metric, "" if intervals else _widest_interval(mine, metric)))
    return tables


def method_by_bits(records: Sequence[TrialRecord], metric: str) -> "DataFrame":
    """One metric, rows by method and whatever else differs between the trials, columns by bits of a weight.

    Cells are numbers as measured, or `diverged`, `failed`, `-` (not run, or not measured). The unquantized model stands
    under 16. A row without anything to say is left out.
    """
    return _grid(in_order(records), metric, cell)


def _grid(ordered: Sequence[TrialRecord], metric: str, content: Callable[[TrialRecord, str], Cell]) -> "DataFrame":
    from pandas import DataFrame

    told = [record for record in ordered if cell(record, metric) != ABSENT]
    columns = sorted({bits_of(record.spec) for record in told})
    rows: dict[str, dict[int, Cell]] = {}
    for record, label in zip(told, labels([record.spec for record in told], metric), strict=True):
        row = rows.setdefault(label, dict.fromkeys(columns, ABSENT))
        bits = bits_of(record.spec)
        # Trials that differ in nothing this metric depends on: what was measured counts, not what failed.
        if isinstance(cell(record, metric), float) or row[bits] in (ABSENT, FAILED):
            row[bits] = content(record, metric)
    grid = DataFrame.from_dict(rows, orient="index", columns=columns, dtype=object)
    return grid.rename_axis(index="method", columns="bits")


def trial_table(records: Sequence[TrialRecord]) -> "DataFrame":
    """A row per trial: what it is, how it ended, every metric (with its 95 % interval where there is one)."""
    from pandas import DataFrame

    records = in_order(records)
    headline = headline_metrics(records)
    others = sorted({name for record in records for name in record.metrics} - {*headline, *SIZES, "model_bytes"})
    measured = []
    for name in headline:
        bounded = any(name in record.intervals for record in records)
        measured += [name, f"{name}.low", f"{name}.high"] if bounded else [name]
    columns = [
        *("trial", "label", "model", "method", "bits", "group_size", "symmetric", "act_bits", "seed"),
        *("status", "reason", *measured, *SIZES, "model_bytes", "seconds", *others),
    ]
    rows = []
    for record, label in zip(records, labels([record.spec for record in records]), strict=True):
        scheme = record.spec.scheme
        row: dict[str, Any] = {
            "trial": record.spec.id,
            "label": label,
            "model": model_name(record.spec),
            "method": record.spec.method["name"],
            "bits": scheme and scheme.bits,
            "group_size": scheme and scheme.group_size,
            "symmetric": scheme and scheme.symmetric,
            "act_bits": scheme and scheme.act_bits,
            "seed": record.spec.seed,
            "status": record.status,
            "reason": record.reason,
            "seconds": seconds(record),
            **{name: record.metrics.get(name) for name in (*SIZES, "model_bytes", *others)},
        }
        for name in headline:
            found = cell(record, name)
            row[name] = None if found in (FAILED, ABSENT) else found
            if isinstance(found, float) and name in record.intervals:
                row[f"{name}.low"], row[f"{name}.high"] = record.intervals[name]
        rows.append(row)
    return DataFrame(rows, columns=columns, dtype=object)


def sites_csv(record: TrialRecord) -> str:
    """Error of each quantized linear, a row each."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("block", "site", "linear", "weight_error", "output_error"))
    writer.writerows((s.block, s.site, s.linear, s.weight_error, s.output_error) for s in record.sites)
    return text.getvalue()


def headline_metrics(records: Iterable[TrialRecord]) -> list[str]:
    """What the trials were asked for: the perplexity of each text, the mean accuracy of several tasks, each task's.

    A task that has no accuracy is told by all of its metrics.
    """
    records = list(records)
    seen = {name for record in records for name in (*record.metrics, *record.diverged)}
    texts = [metric for record in records for metric in text_metrics(record.spec)]
    tasks = []
    for spec, task in ((record.spec, task) for record in records for task in record.spec.evaluation.get("tasks", [])):
        accuracy = _task_metric(spec, task)
        start = "word_perplexity" if task == WORD_TASK else accuracy.removesuffix("acc")
        others = sorted(name for name in seen if name.startswith(start))
        tasks += [accuracy] if accuracy in seen or not others else others
    several = any(len(mean_metrics(record.spec)) > 1 for record in records)
    return list(dict.fromkeys([*texts, *([MEAN_ACCURACY] if several else []), *tasks]))


def cell(record: TrialRecord, metric: str) -> Cell:
    """The metric as a number, or `diverged`, `failed`, `-`. A failed trial's numbers are not to be trusted."""
    if metric == MEAN_ACCURACY:
        return _mean_accuracy(record)
    if not record.completed:
        return FAILED if _asked(record.spec, metric) else ABSENT
    if metric in record.diverged:
        return DIVERGED
    return float(record.metrics[metric]) if metric in record.metrics else ABSENT


def text_metrics(spec: TrialSpec) -> list[str]:
    """The perplexities that a trial was asked for."""
    quick = bool(spec.evaluation.get("quick"))
    return [text_metric("perplexity", text["name"], quick) for text in spec.evaluation.get("texts", [])]


def mean_metrics(spec: TrialSpec) -> list[str]:
    """The accuracies that a trial's mean is over; as in the study, not MMLU's, which has five shots."""
    tasks = [task for task in spec.evaluation.get("tasks", []) if task != WORD_TASK]
    zero_shot = [task for task in tasks if task not in FEW_SHOT]
    return [_task_metric(spec, task) for task in zero_shot or tasks]


def is_perplexity(metric: str) -> bool:
    return metric.partition("/")[0] in ("perplexity", "perplexity_quick")


def is_accuracy(metric: str) -> bool:
    return metric == MEAN_ACCURACY or metric.endswith("/acc")


def _task_metric(spec: TrialSpec, task: str) -> str:
    return f"{task}{'_quick' if spec.evaluation.get('quick') else ''}/acc"


def _asked(spec: TrialSpec, metric: str) -> bool:
    tasks = tuple(_task_metric(spec, task).removesuffix("acc") for task in spec.evaluation.get("tasks", []))
    return metric in (*text_metrics(spec), *SIZES) or metric.startswith(tasks)


def _mean_accuracy(record: TrialRecord) -> Cell:
    cells = [cell(record, metric) for metric in mean_metrics(record.spec)]
    words = [found for found in cells if isinstance(found, str)]
    if not cells or ABSENT in words:
        return ABSENT
    return words[0] if words else math.fsum(map(float, cells)) / len(cells)


def shown(found: Cell, metric: str) -> str:
    """A cell for people: perplexity to four digits, accuracy in percent."""
    if isinstance(found, str):
        return found
    if metric == MEAN_ACCURACY or metric.endswith(("/acc", "/acc_norm")):
        return f"{100 * found:.1f}"
    if metric in SIZES:
        return f"{found:.2f}"
    return f"{found:#.4g}".rstrip(".") if 1e-3 <= abs(found) < 1e4 else f"{found:.2e}"


def shown_of(record: TrialRecord, metric: str) -> str:
    return shown(cell(record, metric), metric)


def with_interval(record: TrialRecord, metric: str) -> str:
    """A cell for people, with its 95 % interval if it has one."""
    bounds = interval(record, metric)
    text = shown_of(record, metric)
    return text if bounds is None else f"{text} [{shown(bounds[0], metric)}, {shown(bounds[1], metric)}]"


def interval(record: TrialRecord, metric: str) -> tuple[float, float] | None:
    """The metric's 95 % interval; None for one that has none, or that is not to be trusted.

    Of the tasks' mean: the half widths of the tasks add in squares, as errors of independent questions do.
    """
    if not isinstance(cell(record, metric), float):
        return None
    if metric != MEAN_ACCURACY:
        return record.intervals.get(metric)
    names = mean_metrics(record.spec)
    if not all(name in record.intervals for name in names):
        return None
    below, above = (
        math.sqrt(math.fsum((record.metrics[name] - record.intervals[name][end]) ** 2 for name in names)) / len(names)
        for end in (0, 1)
    )
    mean = float(cell(record, metric))
    return mean - below, mean + above


def seconds(record: TrialRecord) -> float | None:
    """Of all phases together; None if none was timed."""
    phases = [value for name, value in record.metrics.items() if name.startswith("seconds/")]
    return round(math.fsum(phases), 3) if phases else None


def bits_of(spec: TrialSpec) -> int:
    return UNQUANTIZED_BITS if spec.scheme is None else spec.scheme.bits


def model_name(spec: TrialSpec) -> str:
    return str(spec.model.get("name") or spec.model.get("source"))


def by_model(records: Iterable[TrialRecord]) -> dict[str, list[TrialRecord]]:
    """The records of each model, in the order in which they come."""
    found: dict[str, list[TrialRecord]] = {}
    for record in records:
        found.setdefault(model_name(record.spec), []).append(record)
    return found


def labels(specs: Sequence[TrialSpec], metric: str | None = None) -> list[str]:
    """For each trial its method, and of everything but bits what differs between these trials: `gptq g64 damping=0.05`.

    Knobs and calibration are compared within a method (each has defaults of its own), all else between all trials.
    metric: also tell apart how its text or tasks were evaluated.
    """
    methods = [str(spec.method["name"]) for spec in specs]
    traits = [_traits(spec, metric) for spec in specs]
    values: dict[tuple[str, str], set[str]] = {}
    for method, mine in zip(methods, traits, strict=True):
        for key, value in mine.items():
            values.setdefault((_scope(key, method), key), set()).add(value)
    telling = {place for place, found in values.items() if len(found) > 1}

    def rows(telling: set[tuple[str, str]]) -> list[str]:
        return [
            " ".join([method, *(_word(key, mine[key]) for key in mine if (_scope(key, method), key) in telling)])
            for method, mine in zip(methods, traits, strict=True)
        ]

    # A digest tells people nothing where a name beside it differs as well.
    for key in sorted({key for _, key in telling if key.endswith((".digest", ".revision"))}):
        without = {(scope, name) for scope, name in telling if name != key}
        if len(set(rows(without))) == len(set(rows(telling))):
            telling = without
    return rows(telling)


def _traits(spec: TrialSpec, metric: str | None) -> dict[str, str]:
    """All that may tell a trial from others in a label, by dotted key; values as one would type them."""
    stored = () if spec.scheme is None else ("group_size", "symmetric", "act_bits")
    parts: dict[str, Mapping[str, Any]] = {
        "scheme": {key: getattr(spec.scheme, key) for key in stored},
        "model": spec.model,
        "method": {key: value for key, value in spec.method.items() if key != "name"},
        "calibration": spec.calibration or {},
        "trial": {"seed": spec.seed},
        "mixed": {"settings": spec.departures},
        "evaluation": {},
    }
    wanted = spec.evaluation
    if metric == MEAN_ACCURACY:
        parts["evaluation"] = {key: wanted.get(key) for key in ("tasks", "task_limit")}
    elif metric is not None and is_perplexity(metric):
        texts = {text["name"]: text for text in wanted.get("texts", [])}
        parts["evaluation"] = texts.get(metric.partition("/")[2], {})
    elif metric is not None and metric not in SIZES:
        parts["evaluation"] = {"task_limit": wanted.get("task_limit")}
    return {
        f"{part}.{key}": value if isinstance(value, str) else json.dumps(value)
        for part, entries in parts.items()
        for key, value in entries.items()
    }


def _scope(key: str, method: str) -> str:
    return method if key.startswith(("method.", "calibration.")) else ""


def _word(key: str, value: str) -> str:
    """One trait in a label."""
    name = key.rpartition(".")[2]
    if key == "scheme.group_size":
        return "pc" if value == "-1" else f"g{value}"
    if key == "scheme.symmetric":
        return "sym" if value == "true" else "asym"
    if key == "scheme.act_bits":
        return f"a{UNQUANTIZED_BITS if value == 'null' else value}"
    if key == "mixed.settings":
        return value or "uniform"
    if key in ("model.name", "model.dtype"):
        return value
    return f"seed {value}" if key == "trial.seed" else f"{name}={value}"


def _natural(text: str) -> list[tuple[int, int, str]]:
    """A sort key under which g64 comes before g128."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", text) if part]


def _table(grid: "DataFrame", model: str, metric: str, note: str) -> Table:
    rows = tuple((str(label), *map(str, row)) for label, *row in grid.itertuples())
    return Table(f"{model}: {title(metric)}", ("method \\ bits", *map(str, grid.columns)), rows, note)


def title(metric: str) -> str:
    """A metric in words, with its unit and its good direction."""
    if is_perplexity(metric):
        kind, _, text = metric.partition("/")
        return f"perplexity of {text} (lower is better{', a quick look' if kind.endswith('_quick') else ''})"
    if metric == MEAN_ACCURACY:
        return "mean accuracy of the tasks, % (higher is better)"
    if metric.endswith(("/acc", "/acc_norm")):
        task, _, name = metric.rpartition("/")
        return f"{'accuracy' if name == 'acc' else name} on {task}, % (higher is better)"
    return {
        "bits_per_weight": "bits per quantized weight, with scales and zero points",
        "bits_per_weight_model": "bits per weight of the whole model",
    }.get(metric, metric)


def _widest_interval(records: Sequence[TrialRecord], metric: str) -> str:
    """How sure accuracies are; a perplexity's interval is mostly the texts', which all methods share."""
    reach = [
        max(abs(bound - record.metrics[metric]) for bound in record.intervals[metric])
        for record in records
        if record.completed and metric in record.metrics and metric in record.intervals
    ]
    if not metric.endswith("/acc") or not reach:
        return ""
    return f"95 % intervals reach at most {100 * max(reach):.1f} points to either side."


def _widths(rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*rows, strict=True)]


def _width(rows: Sequence[Sequence[str]]) -> int:
    return sum(_widths(rows)) + 2 * (len(rows[0]) - 1)
