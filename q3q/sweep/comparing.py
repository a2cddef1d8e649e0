"""Compare a trial's samples with the unquantized model's, once both are there."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from q3q.record import TrialRecord, trial_folder
from q3q.spec import TrialSpec

if TYPE_CHECKING:
    pass

NOT_COMPARED = (
    "not_compared"  # the note of a record that says why it is not compared with its baseline
)


def baseline_record(spec: TrialSpec, records: Mapping[str, TrialRecord]) -> TrialRecord | None:
    """The finished trial of the unquantized model that this one is compared with: of this study, or on disk."""
    wanted = spec.places.get("baseline")
    if wanted is None:
        return None
    known = records.get(wanted)
    if known is not None:
        return known if known.completed else None
    try:
        found = TrialRecord.load(Path(spec.places["trials"]) / wanted / "record.json")
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if found.completed and found.spec.id == wanted else None


def compared(record: TrialRecord, baseline: TrialRecord) -> TrialRecord:
    """The record with each of its metrics compared with the baseline's, sample by sample.

    Raises:
        IntegrityError: their samples are not the same ones, or a file of them is missing or damaged.
    """
    from q3q.evaluate.samples import SAMPLES, comparisons, measured, read_samples

    ours, theirs = (
        measured(
            read_samples(trial_folder(one.spec) / SAMPLES), bool(one.spec.evaluation.get("quick"))
        )
        for one in (record, baseline)
    )
    return replace(record, comparisons=comparisons(ours, theirs))
