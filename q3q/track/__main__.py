"""`python -m q3q.track sync`: bring a new or emptied MLflow up to date from the records on disk."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from q3q.errors import Q3QError
from q3q.masking import masked
from q3q.mirror import refreshed
from q3q.report.records import all_sweeps, find_records
from q3q.sweep.study import Study
from q3q.track.mlflow import MlflowTracker
from q3q.track.tracker import Sweep

MISUSED = 2
LOOSE = "records without a sweep"


def main(arguments: Sequence[str] | None = None) -> int:
    """Log every sweep of a storage folder; what the store has already is not logged again. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m q3q.track", description=__doc__, allow_abbrev=False)
    parser.add_argument("what", choices=["sync"])
    parser.add_argument("--storage", default="mlruns", metavar="DIR", help="or a URL; default: mlruns")
    parser.add_argument("--uri", help="of the MLflow store or server; default: sqlite:///<storage>/mlflow.db")
    given = parser.parse_args(arguments)
    try:
        storage = refreshed(given.storage)
        for line in sync(storage, given.uri or f"sqlite:///{storage}/mlflow.db"):
            print(line)
    except Q3QError as error:
        print(f"q3q: {masked(str(error))}", file=sys.stderr)
        return MISUSED
    return 0


def sync(storage: Path, uri: str) -> list[str]:
    """See `main`. Returns a line for each sweep, and for each file that could not be read.

    Raises:
        ReportError: there are no records. TrackingError: the store cannot be used.
    """
    found = find_records(storage)
    records = {record.spec.id: record for record in found.records}
    sweeps, damaged = all_sweeps(storage)
    lines = [*found.damaged, *damaged]
    known = {spec.id for sweep in sweeps for spec in sweep.trials}
    loose = tuple(record.spec for record in found.records if record.spec.id not in known)
    if loose:
        sweeps.append(Sweep(id="", name=LOOSE, command="python -m q3q.track sync", config="", trials=loose))
    for sweep in sweeps:
        mine = {spec.id: records[spec.id] for spec in sweep.trials if spec.id in records}
        if not mine:
            continue
        tracker = MlflowTracker(uri, f"{storage}/artifacts", sweep.experiment)
        tracker.check()
        study = Study(
            name=sweep.name,
            command=sweep.command,
            config=sweep.config,
            specs=sweep.trials,
            storage=storage,
            tracker=tracker,
            note=lines.append,
            records=mine,
            question=sweep.question,
            expectation=sweep.expectation,
            experiment=sweep.experiment,
        )
        study.open()
        study.close()
        lines.append(f"{sweep.name}: {len(mine)} of {len(sweep.trials)} trials are in experiment {sweep.experiment}")
    return lines


if __name__ == "__main__":
    sys.exit(main())
