"""Read the records of a study, or all records in a storage folder."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from q3q.config.schema import nearest
from q3q.errors import UNREADABLE, ReportError
from q3q.evaluate.samples import damaged_files
from q3q.record import Sweep, TrialRecord
from q3q.storage.names import file_name

LONGEST_REASON = 200
RECORDS = ("record.json", "failed.json")  # the first readable one: no failure hides a result


@dataclass(frozen=True)
class StoredRecords:
    """Records in a storage folder.

    sweep: the requested study, with the trials of all sweeps of its name; None for all records.
    damaged: a line for each file that could not be read.
    missing: how many of the study's trials have no record.
    merged: the ids of the sweeps, if several have the study's name.
    """

    records: tuple[TrialRecord, ...]
    sweep: Sweep | None = None
    damaged: tuple[str, ...] = ()
    missing: int = 0
    merged: tuple[str, ...] = ()


def find_records(storage: Path, study: str | None = None) -> StoredRecords:
    """Return the records of a study, given by name or id, or all records.

    Raises:
        ReportError: the folder has no records, or no study of that name.
    """
    if study is None:
        records, damaged = _read(sorted((storage / "trials").glob("*/")))
        if not records:
            raise ReportError(_nothing(storage, damaged))
        return StoredRecords(tuple(records.values()), None, tuple(damaged))
    sweeps, lost = find_sweeps(storage, study)
    trials = {trial.id: trial for sweep in sweeps for trial in sweep.trials}
    sweep = replace(sweeps[-1], trials=tuple(trials.values()))
    records, damaged = _read([storage / "trials" / trial for trial in trials])
    if not records:
        raise ReportError(
            f"none of the {len(trials)} trials of study {study} has a record yet: run it first"
        )
    merged = tuple(sweep.id for sweep in sweeps) if len(sweeps) > 1 else ()
    return StoredRecords(
        tuple(records.values()), sweep, (*lost, *damaged), len(trials) - len(records), merged
    )


def find_sweeps(storage: Path, study: str) -> tuple[list[Sweep], list[str]]:
    """Return the sweep of that id, or all sweeps of that name, the newest last.

    A name counts as it is shown, and as its files are called.

    Returns:
        the sweeps, and a line for each damaged file.

    Raises:
        ReportError: there is no such sweep.
    """
    sweeps, damaged = all_sweeps(storage)
    matches = [sweep for sweep in sweeps if study == sweep.id]
    matches = matches or [sweep for sweep in sweeps if study == sweep.name]
    matches = matches or [
        sweep for sweep in sweeps if study in (file_name(sweep.name), sweep.file_name)
    ]
    if not matches:
        names = list(dict.fromkeys(sweep.name for sweep in sweeps))
        hint = f"Known in {storage}: {', '.join(names)}"
        hint = hint if names else f"No sweep was run with storage={storage}"
        damage = f". {damaged[0]}" if damaged else ""
        raise ReportError(f"--study {study} is not known{nearest(study, names)}{hint}{damage}")
    return matches, damaged


def all_sweeps(storage: Path) -> tuple[list[Sweep], list[str]]:
    """Return every sweep of a storage folder, the newest last, and a line for each damaged file."""
    sweeps, damaged = [], []
    paths = sorted(
        (storage / "sweeps").rglob("*.json"), key=lambda path: (path.lstat().st_mtime_ns, path.name)
    )
    for path in paths:
        try:
            sweep = Sweep.load(path)
            _check_type(sweep.name, str, "name")
            _check_type(sweep.predicted, dict, "predicted")
        except UNREADABLE as error:
            damaged.append(_damage(path, error))
        else:
            sweeps.append(sweep)
    # A name may have had another file name once: then the newest file counts.
    newest = {(sweep.id, sweep.name): sweep for sweep in sweeps}
    return [sweep for sweep in sweeps if newest[sweep.id, sweep.name] is sweep], damaged


def sweeps_of_trials(storage: Path) -> dict[str, str]:
    """Return the names of the sweeps that each trial belongs to, by the trial's id."""
    names: dict[str, dict[str, None]] = {}
    for sweep in all_sweeps(storage)[0]:
        for trial in sweep.trials:
            names.setdefault(trial.id, {})[sweep.name] = None
    return {trial: ", ".join(own) for trial, own in names.items()}


def predictions(storage: Path) -> Mapping[str, float]:
    """Return the seconds that trials were predicted to take, by id; the newest sweep's count."""
    seconds: dict[str, float] = {}
    for sweep in all_sweeps(storage)[0]:
        seconds |= sweep.predicted
    return seconds


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
                    # Another version of q3q wrote this spec: its result is not this trial's.
                    raise ValueError(f"it belongs to trial {record.spec.id}")
                check_record(record)
            except UNREADABLE as error:
                damaged.append(_damage(path, error))
                continue
            records[record.spec.id] = record
            damaged += [
                f"{problem}. What needs it is left out; the sweep's command measures it again"
                for problem in damaged_files(record.files, folder).values()
            ]
            break
    return records, damaged


def check_record(record: TrialRecord) -> None:
    """Raise ValueError if a record's parts have wrong types: without a checksum, anything may."""
    for part in ("metrics", "intervals", "environment", "results", "notes", "comparisons"):
        _check_type(getattr(record, part), dict, part)
    for name, value in record.metrics.items():
        _check_type(value, (int, float), name)
    for name, ends in record.intervals.items():
        for end in ends:
            _check_type(end, (int, float), f"the interval of {name}")
    for part in ("status", "reason"):
        _check_type(getattr(record, part), str, part)
    for name in (*record.diverged, *record.files):
        _check_type(name, str, "diverged or files")
    for site in record.sites:
        for error in (site.weight_error, site.output_error or 0.0, *(site.experts or ())):
            _check_type(error, (int, float), f"an error of block {site.block}")
    for row in record.comparisons.values():
        for number in (row.difference, row.low, row.high):
            if number is not None:
                _check_type(number, (int, float), f"the comparison of {row.metric}")
    _check_type(record.environment.get("planned", {}), dict, "planned")


def _check_type(value: object, kind: type | tuple[type, ...], name: str) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"{name} is {type(value).__name__}")


def _damage(path: Path, error: Exception) -> str:
    is_json = not isinstance(error, json.JSONDecodeError)
    reason = f"{type(error).__name__}: {error}" if is_json else "not JSON"
    return f"{path} cannot be read and is left out ({' '.join(reason.split())[:LONGEST_REASON]})"


def _nothing(storage: Path, damaged: Sequence[str]) -> str:
    if damaged:
        more = f", and {len(damaged) - 1} more" if len(damaged) > 1 else ""
        return f"{storage}/trials holds no record that can be read: {damaged[0]}{more}"
    return (
        f"{storage}/trials holds no records: run a sweep first, or give its storage folder as "
        "--storage DIR"
    )


def margin_of(sweep: Sweep) -> float | None:
    """Return the margin that a sweep was started with; None if it has none, as older ones."""
    from omegaconf import OmegaConf

    try:
        margin = OmegaConf.select(OmegaConf.create(sweep.config), "report.margin")
    except Exception:  # a config that another version or program wrote
        return None
    return float(margin) if isinstance(margin, int | float) and margin > 0 else None
