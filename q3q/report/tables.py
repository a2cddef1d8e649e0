"""Records as tables: method by bits for each model and metric, and a row per trial."""

import csv
import io
import textwrap
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
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
    model_name,
    seconds,
    title,
)
from q3q.report.pools import Pool, pools
from q3q.spec import MEAN_ACCURACY

if TYPE_CHECKING:
    from pandas import DataFrame

MARK = " *"
MARKED = "* measured by another version of the code than most: see the trials."


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
        """Aligned text of at most `width` columns; labels too long for it go below, by number."""
        rows, below = self.rows, [self.note] if self.note else []
        if _width((self.columns, *rows)) > width:
            rows = tuple((f"[{number}]", *row[1:]) for number, row in enumerate(self.rows, start=1))
            below += [f"[{number}] {row[0]}" for number, row in enumerate(self.rows, start=1)]
        widths = _widths((self.columns, *rows))
        lines = [
            "  ".join(
                [
                    row[0].ljust(widths[0]),
                    *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)),
                ]
            )
            for row in (self.columns, *rows)
        ]
        legend = [
            line for text in below for line in textwrap.wrap(text, width, subsequent_indent="    ")
        ]
        return "\n".join(
            [*textwrap.wrap(self.title, width), *(line.rstrip() for line in lines), *legend]
        )


def result_tables(
    records: Sequence[TrialRecord], *, everything: bool, intervals: bool = False
) -> list[Table]:
    """For each model, a table per metric.

    everything: also each task by itself, and the sizes; else perplexities and the tasks' mean.
    intervals: 95 % intervals in the cells, `3.50 [3.25, 3.75]`; else how wide the widest is, below the table.
    """
    tables, strangers = [], other_versions(records)
    for model, mine in by_model(in_order(records)).items():
        metrics = headline_metrics(mine)
        if everything:
            metrics += SIZES
        elif MEAN_ACCURACY in metrics:
            metrics = [name for name in metrics if not name.endswith("/acc")]
        for metric in metrics:
            grid = _grid(mine, metric, partial(_told, intervals=intervals, strangers=strangers))
            if not grid.empty:
                marked = any(MARK in text for row in grid.to_numpy() for text in row)
                notes = [MARKED] if marked else []
                notes += [_widest_interval(mine, metric)] if not intervals else []
                tables.append(_table(grid, model, metric, " ".join(filter(None, notes))))
    return tables


def method_by_bits(records: Sequence[TrialRecord], metric: str) -> "DataFrame":
    """One metric, rows by method and whatever else differs between the trials, columns by bits of a weight.

    Cells are numbers as measured, of several seeds their mean, or `diverged`, `failed`, `-` (not run, or not measured).
    The unquantized model stands under 16. A row without anything to say is left out.
    """
    return _grid(records, metric, Pool.cell)


def _grid(
    records: Sequence[TrialRecord], metric: str, content: Callable[[Pool, str], Cell]
) -> "DataFrame":
    from pandas import DataFrame

    found = pools(records, metric)
    columns = sorted({pool.bits for pool in found})
    rows: dict[str, dict[int, Cell]] = {}
    for pool in found:
        rows.setdefault(pool.label, dict.fromkeys(columns, ABSENT))[pool.bits] = content(
            pool, metric
        )
    grid = DataFrame.from_dict(rows, orient="index", columns=columns, dtype=object)
    return grid.rename_axis(index="method", columns="bits")


def _told(pool: Pool, metric: str, *, intervals: bool, strangers: Collection[str]) -> str:
    mark = MARK if any(record.spec.id in strangers for record in pool.records) else ""
    return pool.shown(metric, intervals=intervals) + mark


def other_versions(records: Sequence[TrialRecord]) -> frozenset[str]:
    """The trials that another version of the code measured than most."""
    commits = Counter(commit_of(record) for record in records)
    usual = max(commits, key=lambda commit: (commits[commit], commit), default="")
    return frozenset(record.spec.id for record in records if commit_of(record) != usual)


def trial_table(records: Sequence[TrialRecord]) -> "DataFrame":
    """A row per trial: what it is, how it ended, every metric (with its 95 % interval where there is one)."""
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
        *(
            "trial",
            "label",
            "model",
            "method",
            "bits",
            "group_size",
            "symmetric",
            "act_bits",
            "seed",
        ),
        *("status", "reason", "git_commit", *measured, *SIZES, "model_bytes", "seconds", *others),
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
            "git_commit": commit_of(record),
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
    writer.writerows(
        (s.block, s.site, s.linear, s.weight_error, s.output_error) for s in record.sites
    )
    return text.getvalue()


def _table(grid: "DataFrame", model: str, metric: str, note: str) -> Table:
    rows = tuple((str(label), *map(str, row)) for label, *row in grid.itertuples())
    return Table(
        f"{model}: {title(metric)}", ("method \\ bits", *map(str, grid.columns)), rows, note
    )


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
