"""Which records a report is about: those of a study, or all that lie in a storage folder."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from q3q.config import nearest
from q3q.errors import ReportError
from q3q.record import TrialRecord
from q3q.track.tracker import Sweep

RECORDS = ("record.json", "failed.json")  # the first that can be read counts: a failure never hides a result


@dataclass(frozen=True)
class Found:
    """What a storage folder holds.

    sweep: the study that was asked for, None for all records. damaged: a line for each file that could not be read.
    missing: the study's trials that left no record.
    """

    records: tuple[TrialRecord, ...]
    sweep: Sweep | None = None
    damaged: tuple[str, ...] = ()
    missing: int = 0


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
    sweep = find_sweep(storage, study)
    records, damaged = _read([storage / "trials" / spec.id for spec in sweep.trials])
    if not records:
        raise ReportError(f"none of the {len(sweep.trials)} trials of study {study} has a record yet: run it first")
    return Found(tuple(records.values()), sweep, tuple(damaged), len(sweep.trials) - len(records))


def find_sweep(storage: Path, study: str) -> Sweep:
    """The newest sweep of that name, or the one of that id.

    Raises:
        ReportError: there is none.
    """
    sweeps, _ = all_sweeps(storage)
    fitting = [sweep for sweep in sweeps if study in (sweep.name, sweep.id)]
    if not fitting:
        names = list(dict.fromkeys(sweep.name for sweep in sweeps))
        known = f"Known in {storage}: {', '.join(names)}" if names else f"No sweep was run with storage={storage}"
        raise ReportError(f"--study {study} is not known{nearest(study, names)}{known}")
    return fitting[-1]


def all_sweeps(storage: Path) -> tuple[list[Sweep], list[str]]:
    """Every sweep that was started in this storage folder, the newest last, and a line for each damaged file."""
    sweeps, damaged = [], []
    paths = sorted((storage / "sweeps").glob("*.json"), key=lambda path: (path.stat().st_mtime_ns, path.name))
    for path in paths:
        try:
            sweeps.append(Sweep.load(path))
        except (OSError, ValueError, KeyError, TypeError) as error:
            damaged.append(_damage(path, error))
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
            except (OSError, ValueError, KeyError, TypeError) as error:
                damaged.append(_damage(path, error))
                continue
            records[record.spec.id] = record
            break
    return records, damaged


def _damage(path: Path, error: Exception) -> str:
    what = "not JSON" if isinstance(error, json.JSONDecodeError) else f"{type(error).__name__}: {error}"
    return f"{path} cannot be read and is left out ({' '.join(what.split())})"


def _nothing(storage: Path, damaged: Sequence[str]) -> str:
    if damaged:
        return f"{storage}/trials holds no record that can be read: {damaged[0]}" + (
            f", and {len(damaged) - 1} more" if len(damaged) > 1 else ""
        )
    return f"{storage}/trials holds no records: run a sweep first, or give its storage folder as --storage DIR"
