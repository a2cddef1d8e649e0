"""Tables of records: method by bits for each model and metric, and a row per trial."""

import csv
import io
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from q3q.record import TrialRecord
from q3q.report.measures import (
    ABSENT,
    FAILED,
    SIZES,
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
from q3q.spec import MEAN_ACCURACY

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
        body = "\n".join(
            "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines
        )
        return f"**{self.title}**\n\n{body}\n" + (f"\n{self.note}\n" if self.note else "")

    def plain(self, width: int = 100) -> str:
        """Return aligned text of at most `width` columns; longer labels move below, by number."""
        rows, below = self.rows, [self.note] if self.note else []
        if _width((self.columns, *rows)) > width:
            rows = tuple((f"[{number}]", *row[1:]) for number, row in enumerate(self.rows, start=1))
            below += [f"[{number}] {row[0]}" for number, row in enumerate(self.rows, start=1)]
        widths = _widths((self.columns, *rows))
        lines = textwrap.wrap(self.title, width)
        for label, *cells in (self.columns, *rows):
            numbers = (cell.rjust(w) for cell, w in zip(cells, widths[1:], strict=True))
            lines.append("  ".join([label.ljust(widths[0]), *numbers]).rstrip())
        for text in below:
            lines += textwrap.wrap(text, width, subsequent_indent="    ")
        return "\n".join(lines)


def result_tables(
    records: Sequence[TrialRecord], *, everything: bool, intervals: bool = False
) -> list[Table]:
    """Return a table per model and metric.

    Args:
        everything: include each task and the sizes; else perplexities and the tasks' mean alone.
        intervals: put 95 % intervals into the cells, `3.50 [3.25, 3.75]`; else say below the
            table how wide the widest is.
    """
    tables, outliers = [], other_versions(records)

    def content(pool: Pool, metric: str) -> str:
        mark = MARK if any(record.spec.id in outliers for record in pool.records) else ""
        return pool.shown(metric, intervals=intervals) + mark

    for model, trials in by_model(in_order(records)).items():
        metrics = headline_metrics(trials)
        if everything:
            metrics += SIZES
        elif MEAN_ACCURACY in metrics:
            metrics = [name for name in metrics if not name.endswith("/acc")]
        for metric in metrics:
            grid = _grid(trials, metric, content)
            if not grid.empty:
                marked = any(MARK in text for row in grid.to_numpy() for text in row)
                notes = [MARKED] if marked else []
                notes += [] if intervals else [_widest_interval(trials, metric)]
                columns = ("method \\ bits", *map(str, grid.columns))
                rows = tuple((str(label), *map(str, row)) for label, *row in grid.itertuples())
                heading, note = f"{model}: {title(metric)}", " ".join(filter(None, notes))
                tables.append(Table(heading, columns, rows, note))
    return tables


def method_by_bits(records: Sequence[TrialRecord], metric: str) -> "DataFrame":
    """Return one metric with a row per label and a column per bit width.

    Cells are numbers as measured (for several seeds their mean), or `diverged`, `failed`, `-` (not
    run or not measured). The unquantized model has column 16. Rows without an outcome are left out.
    """
    return _grid(records, metric, Pool.cell)


def _grid(
    records: Sequence[TrialRecord], metric: str, content: Callable[[Pool, str], Cell]
) -> "DataFrame":
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


def trial_table(records: Sequence[TrialRecord]) -> "DataFrame":
    """Return a row per trial: its settings, its outcome, its metrics and their 95 % intervals."""
    from pandas import DataFrame

    records = in_order(records)
    headline = headline_metrics(records)
    others = sorted(
        {name for record in records for name in record.metrics} - {*headline, *SIZES, "model_bytes"}
    )
    measured = []
    for name in headline:
        bounded = any(name in record.intervals for record in records)
        measured += [name, f"{name}.low", f"{name}.high"] if bounded else [name]
    columns = [
        *("trial", "label", "model", "method", "bits", "group_size", "symmetric", "act_bits"),
        *("seed", "status", "reason", "git_commit", *measured, *SIZES, "model_bytes", "seconds"),
        *others,
    ]
    rows = []
    for record, label in zip(records, labels([record.spec for record in records]), strict=True):
        scheme = record.spec.scheme
        row: dict[str, Any] = {
            "trial": record.spec.id,
            "label": label,
            "model": record.spec.model.label,
            "method": record.spec.method.name,
            "bits": scheme and scheme.bits,
            "group_size": scheme and scheme.group_size,
            "symmetric": scheme and scheme.symmetric,
            "act_bits": scheme and scheme.act_bits,
            "seed": record.spec.seed,
            "status": record.status,
            "reason": record.reason,
            "git_commit": commit_of(record),
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


def sites_csv(record: TrialRecord) -> str:
    """Return a row per quantized linear with its errors."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("block", "site", "linear", "weight_error", "output_error"))
    writer.writerows(
        (s.block, s.site, s.linear, s.weight_error, s.output_error) for s in record.sites
    )
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
    return f"95 % intervals reach at most {100 * max(reach):.1f} points to either side."


def _widths(rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*rows, strict=True)]


def _width(rows: Sequence[Sequence[str]]) -> int:
    return sum(_widths(rows)) + 2 * (len(rows[0]) - 1)
