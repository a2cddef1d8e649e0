"""Rows of the unquantized model for trials that were run without it.

A single trial is compared with the unquantized model's trial if that was run by another command.
Without one, a trial that measures drift has computed the unquantized model's perplexities anyway,
and its record notes them. Both stand in tables, plots and the answer like a trial with
`method=none` of the same sweep.
"""

from collections.abc import Sequence
from dataclasses import replace

from q3q.errors import UNREADABLE
from q3q.evaluate.identities import conditions_of
from q3q.placement import Trial
from q3q.record import COMPLETED, UNQUANTIZED, TrialRecord, finished_baseline
from q3q.report.measures import is_reference
from q3q.report.records import check_record
from q3q.spec import MethodRef


def with_baselines(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Return the records, and one of the unquantized model wherever they lack it and it is known.

    The added records are no trials of the study: no list of its trials should have them.
    """
    measured = {conditions_of(r.spec) for r in records if is_reference(r) and r.completed}
    added = []
    for record in records:
        conditions = conditions_of(record.spec)
        if conditions in measured or not record.completed or record.spec.rounds_nothing:
            continue
        for baseline in (_on_disk(record.trial), _noted(record)):
            if baseline is not None and conditions_of(baseline.spec) == conditions:
                measured.add(conditions)
                added.append(baseline)
                break
    return [*records, *added]


def _on_disk(trial: Trial) -> TrialRecord | None:
    """Return the finished trial of the unquantized model that a trial is compared with."""
    try:
        if (record := finished_baseline(trial)) is not None:
            check_record(record)
    except UNREADABLE:  # damaged: the report speaks of this study's own files
        return None
    return record


def _noted(record: TrialRecord) -> TrialRecord | None:
    noted = record.notes.get(UNQUANTIZED)
    if not isinstance(noted, dict) or not noted:
        return None
    spec = replace(
        record.spec,
        method=MethodRef(name="none", version=None),
        scheme=None,
        calibration=None,
        overrides={},
        skip=(),
        head_bits=None,
        embedding_bits=None,
        export=None,
        rules={},
        seed=0,
    )
    return TrialRecord(
        spec=spec,
        placement=record.placement,
        status=COMPLETED,
        metrics={metric: float(value) for metric, (value, *_) in noted.items()},
        intervals={
            metric: (numbers[1], numbers[2]) for metric, numbers in noted.items() if numbers[2:]
        },
        environment=record.environment,
    )
