"""Tidy tables of a study's numbers and samples, under MLflow's names, for `q3q.results`."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from q3q.errors import IntegrityError, ReportError
from q3q.evaluate.samples import SAMPLES, read_samples
from q3q.record import Comparison, TrialRecord
from q3q.report.measures import in_order
from q3q.report.records import find_records
from q3q.spec import MEAN_ACCURACY
from q3q.storage.mirror import refreshed
from q3q.storage.stores import is_url
from q3q.track.mlflow_fields import record_metrics, trial_params
from q3q.track.mlflow_names import fitted_names

if TYPE_CHECKING:
    from pandas import DataFrame

DIFFERENCES = ("difference", "difference_low", "difference_high")
MEASURED = ("trial", "metric", "value", "low", "high", *DIFFERENCES)
SCORED = ("trial", "task", "sample", "score", "value")


def results(storage: str | Path, study: str | None) -> "DataFrame":
    """See `q3q.results`."""
    rows = [row for record in _records(storage, study) for row in measured(record)]
    return _table(rows, MEASURED)


def samples(storage: str | Path, study: str | None) -> "DataFrame":
    """See `q3q.samples`."""
    records = [record for record in _records(storage, study) if SAMPLES in record.files]
    rows = [row for record in records for row in _scored(record)]
    if not rows:
        raise ReportError(f"no trial of {study or storage} kept the scores of its samples")
    return _table(rows, SCORED)


def measured(record: TrialRecord) -> list[dict[str, Any]]:
    """Return a row for each metric of a completed trial, with its params."""
    if not record.completed:
        return []
    numbers = dict(record.metrics) | dict.fromkeys(record.diverged, math.nan)
    everything = record_metrics(record)
    if MEAN_ACCURACY in everything:
        numbers[MEAN_ACCURACY] = everything[MEAN_ACCURACY]
    names, rows = fitted_names(numbers), []
    params = params_of(record)
    for metric, value in numbers.items():
        low, high = record.intervals.get(metric, (math.nan, math.nan))
        rows.append(
            {
                "trial": record.spec.id,
                "metric": names[metric],
                "value": value,
                "low": low,
                "high": high,
                **_differences(record.comparisons.get(metric)),
                **params,
            }
        )
    return rows


def _differences(comparison: Comparison | None) -> dict[str, float]:
    """Return a difference and the ends of its interval; nan for what is not known."""
    values = (
        (None,) * 3
        if comparison is None
        else (comparison.difference, comparison.low, comparison.high)
    )
    numbers = (math.nan if number is None else number for number in values)
    return dict(zip(DIFFERENCES, numbers, strict=True))


def params_of(record: TrialRecord) -> dict[str, Any]:
    """Return a trial's params by their names in MLflow, numbers and truth values as such."""
    params = trial_params(record.spec)
    names = fitted_names(params)
    return {names[name]: _value(text) for name, text in params.items()}


def _scored(record: TrialRecord) -> list[dict[str, Any]]:
    path = record.trial.folder / SAMPLES
    params = params_of(record)
    try:
        rows = read_samples(path, digest=record.files[SAMPLES])
    except IntegrityError as error:
        raise ReportError(str(error)) from error
    return [
        {
            "trial": record.spec.id,
            "task": row["task"],
            "sample": row["doc_id"],
            "score": name,
            "value": score,
            **params,
        }
        for row in rows
        for name, score in row["scores"].items()
    ]


def _records(storage: str | Path, study: str | None) -> Sequence[TrialRecord]:
    if not is_url(str(storage)) and not Path(storage).expanduser().is_dir():
        raise ReportError(f"storage {storage}: no such folder; give one that a sweep wrote to")
    return in_order(find_records(refreshed(str(storage)), study).records)


def _table(rows: Sequence[Mapping[str, Any]], first: Sequence[str]) -> "DataFrame":
    from pandas import DataFrame

    params = dict.fromkeys(name for row in rows for name in row if name not in first)
    return DataFrame(list(rows), columns=[*first, *params])


def _value(text: str) -> Any:
    """Return the number or truth value that a param spells; any other text as it is."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return value if isinstance(value, bool | int | float) else text
