"""Compare a trial's samples with the unquantized model's, once both are there."""

import math
from collections.abc import Mapping
from dataclasses import replace

from q3q.evaluate.metrics import directions
from q3q.placement import Trial
from q3q.record import TrialRecord, finished_baseline

NOT_COMPARED = "not_compared"  # a record's note: why it is not compared with its baseline


def baseline_record(trial: Trial, records: Mapping[str, TrialRecord]) -> TrialRecord | None:
    """Return the finished trial that this one is compared with, of these records or on disk."""
    record = records.get(trial.placement.baseline or "") or finished_baseline(trial)
    return record if record is not None and record.completed else None


def compared(record: TrialRecord, baseline: TrialRecord) -> TrialRecord:
    """Return the record with each of its metrics compared with the baseline's, sample by sample.

    Raises:
        IntegrityError: their samples differ, or a file of them is missing or damaged.
    """
    from q3q.evaluate.samples import SAMPLES, comparisons, measured, read_samples

    ours, theirs = (
        measured(
            read_samples(side.trial.folder / SAMPLES, digest=side.files.get(SAMPLES)),
            side.spec.evaluation.quick,
        )
        for side in (record, baseline)
    )
    numbers = record.numbers, baseline.numbers
    return replace(record, comparisons=comparisons(ours, theirs, numbers, directions(record)))


def is_current(record: TrialRecord, baseline: TrialRecord | None) -> bool:
    """Return False if a record has to be compared (again) with its baseline.

    Older versions took every score's mean for the metric. So a perplexity of lm-eval's had the
    wrong sign, and a group was compared on a metric that it does not have.
    """
    if baseline is None:
        return True
    for metric, comparison in record.comparisons.items():
        if metric not in record.numbers or metric not in baseline.numbers:
            return False
        number, theirs = record.numbers[metric], baseline.numbers[metric]
        finite = math.isfinite(number) and math.isfinite(theirs)
        if finite and not comparison.describes(number, theirs):
            return False
    return bool(record.comparisons)
