"""Which records a report is about: those of a study, or all that lie in a storage folder."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from q3q.config.schema import nearest
from q3q.errors import Q3QError, ReportError
from q3q.record import Sweep, TrialRecord
from q3q.spec import TrialSpec

# What reading a file raises that is torn, or that another program wrote.
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, Q3QError)
LONGEST_REASON = 200
RECORDS = (
    "record.json",
    "failed.json",
)  # the first that can be read counts: a failure never hides a result


@dataclass(frozen=True)
class Found:
    """What a storage folder holds.

    sweep: the study that was asked for, with the trials of all sweeps of its name; None for all records. merged: the
    ids of these sweeps, if there are several. damaged: a line for each file that could not be read. missing: the
    study's trials that left no record.
    """

    records: tuple[TrialRecord, ...]
    sweep: Sweep | None = None
    damaged: tuple[str, ...] = ()
    missing: int = 0
    merged: tuple[str, ...] = ()


def find_records(storage: Path, study: str | None = None) -> Found:
    """The records of a study, by its name or id, or all of them.

    Raises:
        ReportError: the folder holds no records, or no study of that name.
    """
    if study is None:
        records, damaged = _read(sorted((storage / "trials").glob("*/")))
        if not records:
            raise ReportError(_nothing(storage, damaged))
        return Found(tuple(records.values()), None, tuple(damaged))
    sweeps, lost = find_sweeps(storage, study)
    trials = {spec.id: spec for sweep in sweeps for spec in sweep.trials}
    sweep = replace(sweeps[-1], trials=tuple(trials.values()))
    records, damaged = _read([storage / "trials" / trial for trial in trials])
    if not records:
        raise ReportError(
            f"none of the {len(trials)} trials of study {study} has a record yet: run it first"
        )
    merged = tuple(one.id for one in sweeps) if len(sweeps) > 1 else ()
    return Found(
        tuple(records.values()), sweep, (*lost, *damaged), len(trials) - len(records), merged
    )


def find_sweeps(storage: Path, study: str) -> tuple[list[Sweep], list[str]]:
    """All sweeps of that name, the newest last, or the one of that id; and a line for each file that is damaged.

    Raises:
        ReportError: there is none.
    """
    sweeps, damaged = all_sweeps(storage)
    fitting = [sweep for sweep in sweeps if study == sweep.id] or [
        sweep for sweep in sweeps if study == sweep.name
    ]
    if not fitting:
        names = list(dict.fromkeys(sweep.name for sweep in sweeps))
        known = (
            f"Known in {storage}: {', '.join(names)}"
            if names
            else f"No sweep was run with storage={storage}"
        )
        unread = f". {damaged[0]}" if damaged else ""
        raise ReportError(f"--study {study} is not known{nearest(study, names)}{known}{unread}")
    return fitting, damaged


def all_sweeps(storage: Path) -> tuple[list[Sweep], list[str]]:
    """Every sweep that was started in this storage folder, the newest last, and a line for each damaged file."""
    sweeps, damaged = [], []
    paths = sorted(
        (storage / "sweeps").glob("*.json"), key=lambda path: (path.stat().st_mtime_ns, path.name)
    )
    for path in paths:
        try:
            sweep = Sweep.load(path)
            for spec in sweep.trials:
                _refuse_strange(spec)
            _be(sweep.name, str, "name")
            _be(sweep.predicted, dict, "predicted")
        except UNREADABLE as error:
            damaged.append(_damage(path, error))
        else:
            sweeps.append(sweep)
    return sweeps, damaged


def predictions(storage: Path) -> Mapping[str, float]:
    """Seconds that each trial was predicted to take, by its id; of the newest sweep that had it still to run."""
    found: dict[str, float] = {}
    for sweep in all_sweeps(storage)[0]:
        found |= sweep.predicted
    return found


def _read(folders: Sequence[Path]) -> tuple[dict[str, TrialRecord], list[str]]:
    records: dict[str, TrialRecord] = {}
    damaged = []
    for folder in folders:
        for path in (folder / name for name in RECORDS):
            if not path.exists():
                continue
            try:
                record = TrialRecord.load(path)
                if record.spec.id != folder.name:
                    # An older q3q wrote other specs: what it measured is no result of the trial that it seems to be.
                    raise ValueError(f"it belongs to trial {record.spec.id}")
                _refuse_strange_record(record)
            except UNREADABLE as error:
                damaged.append(_damage(path, error))
                continue
            # Where it was found counts: a storage may have been copied.
            places = record.spec.places | {"trials": str(folder.parent.absolute())}
            records[record.spec.id] = replace(record, spec=record.spec.with_places(places))
            break
    return records, damaged


def _refuse_strange_record(record: TrialRecord) -> None:
    """See that a record is made as q3q makes them: one without a checksum may hold anything.

    Raises:
        ValueError: it is not.
    """
    _refuse_strange(record.spec)
    for part in ("metrics", "intervals", "environment", "results", "notes", "comparisons"):
        _be(getattr(record, part), dict, part)
    for name, value in record.metrics.items():
        _be(value, (int, float), name)
    for name, ends in record.intervals.items():
        for end in ends:
            _be(end, (int, float), f"the interval of {name}")
    for part in ("status", "reason"):
        _be(getattr(record, part), str, part)
    for name in (*record.diverged, *record.files):
        _be(name, str, "diverged or files")
    for site in record.sites:
        for error in (site.weight_error, site.output_error or 0.0, *(site.experts or ())):
            _be(error, (int, float), f"an error of block {site.block}")
    for row in record.comparisons.values():
        for number in (row.difference, row.low, row.high):
            _be(
                number if number is not None else 0.0,
                (int, float),
                f"the comparison of {row.metric}",
            )
    _be(record.environment.get("planned", {}), dict, "planned")


def _refuse_strange(spec: TrialSpec) -> None:
    """See `_refuse_strange_record`."""
    for part in ("model", "method", "evaluation", "places", "rules"):
        _be(getattr(spec, part), dict, part)
    _be(spec.calibration or {}, dict, "calibration")
    _be(spec.method["name"], str, "the method's name")
    for text in spec.evaluation.get("texts", ()):
        _be(text["name"], str, "a text's name")
    for task in spec.evaluation.get("tasks", ()):
        _be(task, str, "a task")
    for part in ("shots", "limits", "data"):
        _be(spec.evaluation.get(part, {}), dict, part)


def _be(value: object, kind: type | tuple[type, ...], what: str) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"{what} is {type(value).__name__}")


def _damage(path: Path, error: Exception) -> str:
    what = (
        "not JSON"
        if isinstance(error, json.JSONDecodeError)
        else f"{type(error).__name__}: {error}"
    )
    return f"{path} cannot be read and is left out ({' '.join(what.split())[:LONGEST_REASON]})"


def _nothing(storage: Path, damaged: Sequence[str]) -> str:
    if damaged:
        return f"{storage}/trials holds no record that can be read: {damaged[0]}" + (
            f", and {len(damaged) - 1} more" if len(damaged) > 1 else ""
        )
    return f"{storage}/trials holds no records: run a sweep first, or give its storage folder as --storage DIR"
