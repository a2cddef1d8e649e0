"""Tables of records: method by bits for each model and metric, and a row per trial."""

import csv
import io
import json
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from q3q.formatting import percent, printable
from q3q.names import SHORT_DIGEST
from q3q.record import TrialRecord
from q3q.report.escapes import csv_cell, markdown_text
from q3q.report.means import by_mean
from q3q.report.measures import (
    ABSENT,
    FAILED,
    Cell,
    by_model,
    cell,
    commit_of,
    headline_metrics,
    in_order,
    labels,
    seconds,
    title,
)
from q3q.report.pools import Pool, pools
from q3q.report.sizes import SIZES, bits_of_weight, bytes_of, number_of, sizes_note
from q3q.spec import MEAN_ACCURACY, SELDOM_OF_SCHEME, digest

if TYPE_CHECKING:
    from pandas import DataFrame

MARK = " *"
MARKED = "* measured by a different version of the code than most: see the trials."


@dataclass(frozen=True)
class Table:
    """Text cells under column names; the first column labels the rows."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def markdown(self) -> str:
        lines = [self.columns, ("---", *("---:" for _ in self.columns[1:])), *self.rows]
        body = "\n".join("| " + " | ".join(map(markdown_text, line)) + " |" for line in lines)
        note = "\n\n".join(markdown_text(part) for part in self.note.split("\n\n"))
        return f"**{markdown_text(self.title)}**\n\n{body}\n" + (f"\n{note}\n" if note else "")

    def plain(self, width: int = 100) -> str:
        """Return aligned text of at most `width` columns; longer labels move below, by number."""
        columns, *rows = (tuple(map(printable, row)) for row in (self.columns, *self.rows))
        below = [self.note] if self.note else []
        if _width((columns, *rows)) > width:
            below += [f"[{number}] {row[0]}" for number, row in enumerate(rows, start=1)]
            rows = [(f"[{number}]", *row[1:]) for number, row in enumerate(rows, start=1)]
        widths = _widths((columns, *rows))
        lines = textwrap.wrap(printable(self.title), width)
        for label, *cells in (columns, *rows):
            numbers = (cell.rjust(w) for cell, w in zip(cells, widths[1:], strict=True))
            lines.append("  ".join([label.ljust(widths[0]), *numbers]).rstrip())
        for text in below:
            lines += textwrap.wrap(text, width, subsequent_indent="    ")
        return "\n".join(lines)


def result_tables(
    records: Sequence[TrialRecord], *, everything: bool, intervals: bool = False
) -> list[Table]:
    """Return a table per model and metric; of a mean accuracy, one for each set of tasks.

    Args:
        everything: include each task and the sizes; else perplexities and the tasks' mean alone.
        intervals: put 95 % intervals into the cells, `3.50 [3.25, 3.75]`; else say below the
            table how wide the widest is.
    """
    tables, outliers = [], other_versions(records)

    def content(pool: Pool, metric: str) -> str:
        marked = any(record.spec.id in outliers for record in pool.records)
        return pool.shown(metric, intervals=intervals) + (MARK if marked else "")

    for model, trials in by_model(in_order(records)).items():
        for metric, heading, group in topics(trials, everything):
            grid = method_by_bits(group, metric, content)
            if not grid.empty:
                marked = any(MARK in text for row in grid.to_numpy() for text in row)
                notes = [MARKED] if marked else []
                notes += [] if intervals else [_widest_interval(group, metric)]
                columns = ("method \\ bits", *map(str, grid.columns))
                rows = tuple((str(label), *map(str, row)) for label, *row in grid.itertuples())
                note = " ".join(filter(None, notes))
                tables.append(Table(f"{model}: {heading}", columns, rows, note))
        tables += [_size_table(model, trials, metric) for metric in SIZES if everything]
    return [table for table in tables if table.rows]


def topics(
    trials: Sequence[TrialRecord], everything: bool
) -> Iterator[tuple[str, str, Sequence[TrialRecord]]]:
    """Yield each table's metric, its heading, and the trials whose numbers may share it."""
    metrics = headline_metrics(trials)
    means = by_mean(trials)
    with_mean = {record.spec.id for group in means.values() for record in group}
    for metric in metrics:
        if metric == MEAN_ACCURACY:
            for over, group in means.items():
                yield metric, title(metric).replace("accuracy", f"accuracy of {over}", 1), group
            continue
        # A task that is in a mean needs no table of its own, for the trials that have the mean.
        single = not everything and metric.endswith("/acc")
        group = [record for record in trials if not (single and record.spec.id in with_mean)]
        yield metric, title(metric), group


def _size_table(model: str, records: Sequence[TrialRecord], metric: str) -> Table:
    """Return a table of sizes that says which are those of files and which are counted."""
    sizes = {record.spec.id: bits_of_weight(record, metric) for record in records}
    rules = {size.rule for size in sizes.values() if size is not None}

    def content(pool: Pool, metric: str) -> str:
        size = sizes[pool.records[0].spec.id]
        mark = "" if size is None else number_of(size.rule, rules)
        return f"{pool.shown(metric)} {mark}".rstrip()

    grid = method_by_bits(records, metric, content)
    columns = ("method \\ bits", *map(str, grid.columns))
    rows = tuple((str(label), *map(str, row)) for label, *row in grid.itertuples())
    return Table(f"{model}: {title(metric)}", columns, rows, sizes_note(rules, metric))


def method_by_bits(
    records: Sequence[TrialRecord], metric: str, content: Callable[[Pool, str], Cell] = Pool.cell
) -> "DataFrame":
    """Return one metric with a row per label and a column per bit width.

    The column of the unquantized model has the bits of its dtype. Rows without an outcome are left
    out.

    Args:
        content: makes a cell; by default a number as measured (for several seeds their mean), or
            `diverged`, `failed`, `-` (not run or not measured).
    """
    from pandas import DataFrame

    tried = pools(records, metric)
    columns = sorted({pool.bits for pool in tried})
    rows: dict[str, dict[int, Cell]] = {}
    for pool in tried:
        row = rows.setdefault(pool.label, dict.fromkeys(columns, ABSENT))
        row[pool.bits] = content(pool, metric)
    grid = DataFrame.from_dict(rows, orient="index", columns=columns, dtype=object)
    return grid.rename_axis(index="method", columns="bits")


def other_versions(records: Sequence[TrialRecord]) -> frozenset[str]:
    """Return the ids of trials measured by a different version of the code than most."""
    commits = Counter(commit_of(record) for record in records)
    usual = max(commits, key=lambda commit: (commits[commit], commit), default="")
    return frozenset(record.spec.id for record in records if commit_of(record) != usual)


def trial_table(
    records: Sequence[TrialRecord], sweeps: Mapping[str, str] | None = None
) -> "DataFrame":
    """Return a row per trial: its settings, its outcome, its metrics and their 95 % intervals.

    Args:
        sweeps: the names of the sweeps that a trial belongs to, by the trial's id.
    """
    from pandas import DataFrame

    records = in_order(records)
    headline = headline_metrics(records)
    own = {*headline, *SIZES, "model_bytes"}
    others = sorted({name for record in records for name in record.metrics} - own)
    measured = []
    for name in headline:
        bounded = any(name in record.intervals for record in records)
        measured += [name, f"{name}.low", f"{name}.high"] if bounded else [name]
    settings = differing_settings(records)
    schemes = [record.spec.scheme for record in records if record.spec.scheme is not None]
    keys = {key for scheme in schemes for key in scheme.to_json()}
    newer = [key for key in SELDOM_OF_SCHEME if key in keys]
    columns = [
        *("trial", "label", "model", "method", "bits", "group_size", "symmetric", "act_bits"),
        *newer,
        *("seed", *(["sweep"] if sweeps else []), *settings),
        *("status", "reason", "git_commit", *measured),
        *(["accuracy_of"] if MEAN_ACCURACY in headline else []),
        *(*SIZES, "model_bytes", "size_bytes", "size_of", "seconds", *others),
    ]
    rows = []
    means = {record.spec.id: over for over, group in by_mean(records).items() for record in group}
    for record, label in zip(records, labels([record.spec for record in records]), strict=True):
        scheme, size = record.spec.scheme, bytes_of(record)
        row: dict[str, Any] = {
            "trial": record.spec.id,
            "label": label,
            "model": record.spec.model.label,
            "method": record.spec.method.name,
            "bits": scheme and scheme.bits,
            "group_size": scheme and scheme.group_size,
            "symmetric": scheme and scheme.symmetric,
            "act_bits": scheme and scheme.act_bits,
            **{key: scheme and getattr(scheme, key) for key in newer},
            "seed": record.spec.seed,
            "sweep": (sweeps or {}).get(record.spec.id, ""),
            **{name: values.get(record.spec.id) for name, values in settings.items()},
            "status": record.status,
            "reason": record.reason,
            "git_commit": commit_of(record),
            "accuracy_of": means.get(record.spec.id),
            "size_bytes": size and size.value,
            "size_of": size and size.rule,
            "seconds": seconds(record),
            **{name: record.metrics.get(name) for name in (*SIZES, "model_bytes", *others)},
        }
        for name in headline:
            content = cell(record, name)
            row[name] = None if content in (FAILED, ABSENT) else content
            if isinstance(content, float) and name in record.intervals:
                row[f"{name}.low"], row[f"{name}.high"] = record.intervals[name]
        rows.append(row)
    return DataFrame(rows, columns=columns, dtype=object)


def numbers(records: Sequence[TrialRecord], sweeps: Mapping[str, str]) -> "DataFrame":
    """Return `trial_table` with floats for metrics; what diverged is nan, and named in a column."""
    from pandas import to_numeric

    table = trial_table(records, sweeps)
    table["diverged"] = [", ".join(record.diverged) for record in in_order(records)]
    measured = {name for record in records for name in (*record.metrics, *record.diverged)}
    measured |= {f"{name}.{end}" for name in measured for end in ("low", "high")}
    own = {MEAN_ACCURACY, "size_bytes", "seconds", "bits", "group_size", "act_bits"}
    for name in [name for name in table.columns if name in measured | own]:
        table[name] = to_numeric(table[name], errors="coerce")
    return table.infer_objects()


def differing_settings(records: Sequence[TrialRecord]) -> dict[str, dict[str, Any]]:
    """Return every setting that differs between these trials, beside those with own columns.

    Returns:
        The value of each trial that has the setting, by the setting's name and the trial's id.
        A text's window and limit are called `texts.<name>.window` and `texts.<name>.limit`.
    """
    settings: dict[str, dict[str, Any]] = {}
    for record in records:
        for key, value in settings_of(record).items():
            settings.setdefault(key, {})[record.spec.id] = value
    trials = {record.spec.id for record in records}
    return {
        key: values
        for key, values in sorted(settings.items())
        if len({json.dumps(values.get(trial), sort_keys=True) for trial in trials}) > 1
    }


def settings_of(record: TrialRecord) -> dict[str, Any]:
    """Return a trial's settings by dotted names, without those that have columns of their own."""
    spec = record.spec
    evaluation = spec.evaluation.to_json()
    texts = evaluation.pop("texts")
    if data := evaluation.pop("data", None):  # MMLU has 57 of them
        evaluation["data"] = digest(data)[:SHORT_DIGEST]
    parts: dict[str, Any] = {
        "model": spec.model.identity,
        "method": {key: value for key, value in spec.method.to_json().items() if key != "name"},
        "scheme": {"scales": spec.scheme.scales} if spec.scheme else {},
        "calibration": spec.calibration.to_json() if spec.calibration else {},
        "evaluation": evaluation,
        "texts": {
            f"{text['name']}.{key}": value
            for text in texts
            for key, value in text.items()
            if key != "name"
        },
    }
    flat = {f"{part}.{key}": value for part, facts in parts.items() for key, value in facts.items()}
    flat["evaluation.texts"] = [text["name"] for text in texts]
    flat |= {"mixed": spec.departures, "export": spec.export}
    flat |= {f"kv.{key}": value for key, value in (spec.kv.to_json() if spec.kv else {}).items()}
    return {
        key: json.dumps(value, sort_keys=True) if isinstance(value, (dict, list)) else value
        for key, value in flat.items()
    }


def sites_csv(record: TrialRecord) -> str:
    """Return a row per quantized linear with its errors."""
    head = ("block", "site", "linear", "weight_error", "output_error")
    rows = [(s.block, s.site, s.linear, s.weight_error, s.output_error) for s in record.sites]
    return csv_text([head, *rows])


def csv_text(rows: Iterable[Sequence[object]]) -> str:
    """Return rows as CSV in which no name is a spreadsheet's formula."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([csv_cell(content) for content in row] for row in rows)
    return text.getvalue()


def _widest_interval(records: Sequence[TrialRecord], metric: str) -> str:
    """Say how wide an accuracy's intervals are at most.

    A perplexity's interval comes mostly from the texts, which all methods share.
    """
    reach = [
        max(abs(bound - record.metrics[metric]) for bound in record.intervals[metric])
        for record in records
        if record.completed and metric in record.metrics and metric in record.intervals
    ]
    if not metric.endswith("/acc") or not reach:
        return ""
    return f"95 % intervals reach at most {percent(max(reach))} points to either side."


def _widths(rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*rows, strict=True)]


def _width(rows: Sequence[Sequence[str]]) -> int:
    return sum(_widths(rows)) + 2 * (len(rows[0]) - 1)
