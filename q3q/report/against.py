"""Comparison with published numbers of one's own: each cell of a CSV file beside what was measured.

A row is a printed number. `model`, `metric` and `value` say which; every other column is a param by
its name in MLflow (`method`, `bits`, `method.mse`, `calibration.samples` ...), which a trial must
have as the row says it. An empty cell asks for nothing. A row with `bits` is about trials of that
one width, unless it has `overrides` or a setting of a budget too. `source` says where the number is
printed, and is asked of nobody. Numbers are in the metric's own unit: an accuracy is a fraction.
"""

import csv
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from q3q.config.known import type_of
from q3q.errors import ReportError
from q3q.evaluation import is_share
from q3q.formatting import plural, signed
from q3q.record import TrialRecord
from q3q.report.measures import DIVERGED, cell, in_order, shown
from q3q.report.paper import (
    ACCURACY_TOLERANCE,
    CLOSE,
    COLLAPSED,
    PERPLEXITY_TOLERANCE,
    is_misnamed,
    of_verdicts,
    verdict,
)
from q3q.report.published import plain_name
from q3q.report.tables import Table
from q3q.spec import ModelRef, TrialSpec
from q3q.track.mlflow_fields import trial_params

NEEDED = ("model", "metric", "value")
SOURCE = "source"
# Params that choose a page, which no setting's type tells.
CHOICES = ("method", "calibration", "model")
# Sets that ship with q3q, beside the paper's: `--against NAME`.
SETS = {"onecomp": Path(__file__).with_name("onecomp_results.csv")}
PRINTED_IN = {
    "onecomp": "GPTQ on Qwen3-8B and 14B, the benchmark pages of Fujitsu's OneComp, v0.3.7+jointq"
}


@dataclass(frozen=True)
class PublishedNumber:
    """A printed number.

    value: nan where NaN is printed.
    half: half a unit of its last digit.
    asked: the params that a trial must have, as text.
    """

    model: str
    metric: str
    value: float
    half: float
    asked: Mapping[str, str]
    source: str


@dataclass(frozen=True)
class PublishedSet:
    """Published numbers from a file.

    printed_in: what they are.
    """

    name: str
    printed_in: str
    cells: tuple[PublishedNumber, ...]


@dataclass(frozen=True)
class ComparedNumber:
    """A printed number beside a trial's; ours is nan if it diverged."""

    cell: PublishedNumber
    record: TrialRecord
    ours: float
    verdict: str


@dataclass(frozen=True)
class Against:
    """A comparison with a set of published numbers, for a report."""

    published: PublishedSet
    compared: tuple[ComparedNumber, ...]

    @property
    def title(self) -> str:
        return f"Against {self.published.name}"

    def sentence(self) -> str:
        """Say how many of the set's cells were run, and how many are reproduced."""
        total = plural(len(self.published.cells), "cell")
        verdicts: dict[int, set[str]] = {}
        for item in self.compared:
            verdicts.setdefault(id(item.cell), set()).add(item.verdict)
        if not verdicts:
            return (
                f"None of the {total} of {self.published.name} was run: no trial has the model, "
                "the metric and all the settings of a row."
            )
        has = f"{self.published.name} has {len(self.published.cells)}"
        return f"{of_verdicts(verdicts.values())}; {has}."

    def table(self) -> Table:
        """Return a row for each printed number and each trial that has it."""
        rows = tuple(
            (
                item.record.spec.label,
                item.cell.metric,
                _shown(item.cell.value, item.cell.metric),
                "diverged" if math.isnan(item.ours) else _shown(item.ours, item.cell.metric),
                _difference(item),
                item.verdict,
                item.cell.source or "-",
            )
            for item in self.compared
        )
        note = (
            f"Reproduced: a share within {ACCURACY_TOLERANCE} points or with the published value "
            f"in our 95 % interval, any other number within {100 * PERPLEXITY_TOLERANCE:g} %; two "
            f"perplexities above {COLLAPSED:g} have both collapsed. Close: within {CLOSE} times "
            f"that tolerance.\n\nPublished numbers: {self.published.printed_in}."
        )
        columns = ("trial", "metric", "published", "ours", "difference", "verdict", "printed in")
        return Table(self.title, columns, rows, note)


def published_set(name: str) -> PublishedSet:
    """Return one of `SETS`, or a user's CSV file.

    Raises:
        ReportError: there is no such set or file, or the file is not such a table.
    """
    if name in SETS:
        return PublishedSet(name, PRINTED_IN[name], read_cells(SETS[name]))
    path = Path(name).expanduser()
    if not path.is_file():
        sets = ", ".join(("paper", *SETS))
        raise ReportError(f"--against {name}: neither one of {sets}, nor a CSV file")
    return PublishedSet(path.stem, str(path.name), read_cells(path))


def read_cells(path: Path) -> tuple[PublishedNumber, ...]:
    """Return the cells of a CSV file.

    Raises:
        ReportError: it cannot be read, has other columns or no rows, or a value is no number.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restkey="", restval="")
            columns = list(reader.fieldnames or ())
            _check_columns(path, columns)
            cells = tuple(_cell(path, reader.line_num, row) for row in reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ReportError(f"{path} cannot be read as CSV: {error}") from error
    if not cells:
        raise ReportError(f"{path} has no rows below its columns")
    return cells


def compare(records: Sequence[TrialRecord], published: PublishedSet) -> Against:
    """Compare every published number with each completed trial that has its settings."""
    compared = []
    for record in in_order(records):
        if not record.completed or is_misnamed(record):
            continue
        params = trial_params(record.spec)
        for number in published.cells:
            value = cell(record, number.metric)
            if not isinstance(value, float) and value != DIVERGED:
                continue
            if not _is_model(number.model, record.spec.model) or not _has(params, number.asked):
                continue
            if _has_more_widths(record.spec) and _asks_for_one_width(number.asked):
                continue
            ours = value if isinstance(value, float) else math.nan
            compared.append(ComparedNumber(number, record, ours, _verdict(number, record, ours)))
    return Against(published, tuple(compared))


def _check_columns(path: Path, columns: Sequence[str]) -> None:
    missing = [name for name in NEEDED if name not in columns]
    if missing:
        raise ReportError(
            f"{path} lacks the column {', '.join(missing)}: it needs {', '.join(NEEDED)}, and a "
            "column for each setting that a trial must have, such as method and bits"
        )
    twice = sorted({name for name in columns if columns.count(name) > 1})
    expected = (*NEEDED, *CHOICES, SOURCE)
    unknown = [name for name in columns if name not in expected and type_of(name) is None]
    if unknown or twice:
        what = "not a setting of a trial" if unknown else "given more than once"
        raise ReportError(
            f"{path}: column {', '.join(map(repr, unknown or twice))} is {what}: columns are "
            f"{', '.join(NEEDED)}, {SOURCE}, and settings as MLflow's params name them, such as "
            "bits, group_size or method.mse"
        )


def _cell(path: Path, line: int, row: Mapping[str, str]) -> PublishedNumber:
    where = f"{path}, line {line}"
    texts = {name: (text or "").strip() for name, text in row.items() if name}
    if row.get(""):
        raise ReportError(f"{where}: it has more cells than there are columns")
    printed = texts["value"]
    try:
        value = float(printed)
    except ValueError:
        raise ReportError(f"{where}: the value {printed!r} is not a number") from None
    for name in ("model", "metric"):
        if not texts[name]:
            raise ReportError(f"{where}: it names no {name}")
    asked = {name: text for name, text in texts.items() if text and name not in (*NEEDED, SOURCE)}
    half = 0.5 * 10.0 ** _last_digit(printed)
    return PublishedNumber(
        texts["model"], texts["metric"], value, half, asked, texts.get(SOURCE, "")
    )


def _last_digit(printed: str) -> int:
    """Return the power of ten of a number's last digit: -2 of `-0.50`, 0 of nan."""
    power = Decimal(printed).as_tuple().exponent
    return power if isinstance(power, int) else 0


def _is_model(written: str, model: ModelRef) -> bool:
    """Return True if a row's model is this one.

    A name with its organization is the Hub's, and another organization's model is another; in a
    folder, a model is what its name says.
    """
    maker, _, title = written.rpartition("/")
    if model.source is not None and maker:
        return plain_name(written) == plain_name(model.source)
    return plain_name(title) == plain_name(model.name or model.source or "")


def _has(params: Mapping[str, str], asked: Mapping[str, str]) -> bool:
    pairs = ((params.get(name), text) for name, text in asked.items())
    return all(
        own is not None and (own == text or _value(own) == _value(text)) for own, text in pairs
    )


def _has_more_widths(spec: TrialSpec) -> bool:
    """Return True if not all quantized linears have the trial's `bits`."""
    return spec.budget is not None or any("bits" in own for own in spec.overrides.values())


def _asks_for_one_width(asked: Mapping[str, str]) -> bool:
    """Return True if a row gives `bits`, and nothing says that they are those of some linears."""
    mixing = any(name == "overrides" or name.startswith("budget.") for name in asked)
    return "bits" in asked and not mixing


def _value(text: str) -> object:
    """Return what a param spells: 128 and 128.0 are one number, true and True one value."""
    try:
        value = json.loads(text.lower() if text.lower() in ("true", "false") else text)
    except ValueError:
        return text
    return (type(value) is bool, value)


def _verdict(number: PublishedNumber, record: TrialRecord, ours: float) -> str:
    interval = record.intervals.get(number.metric)
    unit = 100 if is_share(number.metric) else 1
    return verdict(number.metric, ours, unit * number.value, interval, half=unit * number.half)


def _difference(item: ComparedNumber) -> str:
    ours, theirs = item.ours, item.cell.value
    if not math.isfinite(ours) or not math.isfinite(theirs):
        return "-"
    if is_share(item.cell.metric):
        return f"{signed(100 * (ours - theirs))} points"
    return "-" if theirs == 0 else f"{signed(100 * (ours - theirs) / abs(theirs))} %"


def _shown(value: float, metric: str) -> str:
    return shown(value, metric) if math.isfinite(value) else "NaN"
