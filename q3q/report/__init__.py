"""Reports of studies: tables, plots and pages. `load` gives the same numbers as a DataFrame."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pandas import DataFrame


def load(storage: str = "mlruns", study: str | None = None) -> "DataFrame":
    """Return the trials of a storage folder as a table, for plots and statistics of one's own.

    A row is a trial. Its columns are the trial's settings (`model`, `method`, `bits` ..., and each
    other setting that differs between the rows), what became of it (`status`, `reason`), its
    metrics by the record's names, and the ends of their 95 % intervals (`<metric>.low`, `.high`).

    Args:
        storage: a folder, or an object store's URL.
        study: name or id of a sweep; None for all records.

    Returns:
        Metrics are floats; nan stands for what was not measured or diverged, and the column
        `diverged` names the latter. `accuracy` is a mean over the tasks that `accuracy_of` names.

    Raises:
        ReportError: there are no records, or there is no such sweep.
    """
    from q3q.report.records import find_records, sweeps_of_trials
    from q3q.report.tables import numbers
    from q3q.storage.mirror import refreshed

    folder = refreshed(storage)
    return numbers(find_records(folder, study).records, sweeps_of_trials(folder))
