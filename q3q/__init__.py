"""q3q runs studies of post-training quantization, and gives their numbers as tables.

`results` and `samples` are for notebooks. Nothing is imported before one of them is called.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["results", "samples"]
# By name: this module is below all others, and imports of it must not form a circle.
_TIDY = "q3q.report.tidy"


def results(storage: str | Path = "mlruns", study: str | None = None) -> "DataFrame":
    """Return a table with a row for each trial and metric.

    Its columns are `trial`, `metric`, `value`, `low` and `high` (the 95 % interval of `value`),
    `difference` (from the unquantized model; differences of perplexities are in nats, so that the
    exp of one is the ratio of the two perplexities), `difference_low` and `difference_high` (the
    95 % interval of `difference`; an end that the samples leave open is nan), and the trial's
    params by their names in MLflow (`method`, `bits`, `calibration` ...). Metrics have their names
    in MLflow too.

    Args:
        storage: a storage folder, or an object store's URL.
        study: name or id of a sweep; None for all trials.

    Returns:
        Rows of completed trials, in the order of reports. A value that diverged is nan. A param
        that a trial does not have is nan or None.

    Raises:
        ReportError: there is no such folder or study, or it has no records.
    """
    return import_module(_TIDY).results(storage, study)


def samples(storage: str | Path = "mlruns", study: str | None = None) -> "DataFrame":
    """Return a table with a row for each trial, sample and score.

    A sample is a question of a task or a window of a text. The columns are `trial`, `task` (of a
    window, the text's perplexity as a metric), `sample` (its number), `score` (the score's name;
    `nll` of a window, in nats per token), `value`, and the trial's params as in `results`.

    Args:
        storage: a storage folder, or an object store's URL.
        study: name or id of a sweep; None for all trials.

    Raises:
        ReportError: there is no such folder or study, or none of its trials kept samples.
    """
    return import_module(_TIDY).samples(storage, study)
