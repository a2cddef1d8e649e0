"""`python -m q3q.track sync`: bring a new or emptied MLflow up to date from the records on disk."""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from q3q.errors import Q3QError, TrackingError
from q3q.masking import masked
from q3q.record import Sweep, TrialRecord
from q3q.report.measures import trial_names
from q3q.report.records import all_sweeps, find_records, predictions
from q3q.report.write import About, trial_artifacts, write_report
from q3q.storage.mirror import refreshed
from q3q.storage.status import at_work
from q3q.track.mlflow import MlflowTracker

FAILED, MISUSED = 1, 2
LOOSE = "records without a sweep"


def main(arguments: Sequence[str] | None = None) -> int:
    """Log every sweep of a storage folder; what the store has already is not logged again. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m q3q.track", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("what", choices=["sync"])
    parser.add_argument(
        "--storage", default="mlruns", metavar="DIR", help="or a URL; default: mlruns"
    )
    parser.add_argument(
        "--uri", help="of the MLflow store or server; default: sqlite:///<storage>/mlflow.db"
    )
    given = parser.parse_args(arguments)
    try:
        storage = refreshed(given.storage)
        failures = sync(storage, given.uri or f"sqlite:///{storage}/mlflow.db", print)
    except Q3QError as error:
        print(f"q3q: {masked(str(error))}", file=sys.stderr)
        return MISUSED
    for line in failures:
        print(f"q3q: {line}", file=sys.stderr)
    return FAILED if failures else 0


def sync(storage: Path, uri: str, say: Callable[[str], object]) -> list[str]:
    """See `main`. say: is told a line for each sweep, and for each file that could not be read.

    Returns:
        A line for each sweep that the store did not take whole; the same command goes on there.

    Raises:
        ReportError: there are no records. TrackingError: the store cannot be used.
    """
    found = find_records(storage)
    records = {record.spec.id: record for record in found.records}
    sweeps, damaged = all_sweeps(storage)
    for line in (*found.damaged, *damaged):
        say(line)
    known = {spec.id for sweep in sweeps for spec in sweep.trials}
    loose = tuple(record.spec for record in found.records if record.spec.id not in known)
    if loose:
        # Its id does not depend on which they are: next time there may be more of them.
        sweeps.append(
            Sweep(
                id="loose", name=LOOSE, command="python -m q3q.track sync", config="", trials=loose
            )
        )
    busy = {(bulletin.name, bulletin.command) for bulletin in at_work(storage)}
    failures = []
    for sweep in sweeps:
        mine = [records[spec.id] for spec in sweep.trials if spec.id in records]
        if (sweep.name, masked(sweep.command)) in busy:
            say(f"{sweep.name}: is at work, and tells its tracker itself")
        elif mine:
            tracker = MlflowTracker(uri, f"{storage}/artifacts", sweep.experiment)
            tracker.check()
            failure = _tell(tracker, sweep, mine, storage)
            if failure:
                failures.append(failure)
            else:
                count = f"{len(mine)} of {len(sweep.trials)} trials are"
                say(f"{sweep.name}: {count} in experiment {sweep.experiment}")
    return failures


def _tell(
    tracker: MlflowTracker, sweep: Sweep, records: Sequence[TrialRecord], storage: Path
) -> str:
    """Tell the tracker all of a sweep, as of the time when it ran. Returns what went wrong, or nothing."""
    times = [
        str(moment)
        for one in records
        for key in ("started", "ended")
        if (moment := one.environment.get(key))
    ]
    names = sweep.names or trial_names(sweep.trials)
    sweep = replace(
        sweep, names=names, started=min(times, default=""), ended=max(times, default="")
    )
    done = 0
    try:
        tracker.open(sweep)
        for record in records:
            tracker.log(record, trial_artifacts(record))
            done += 1
        finished = len(records) == len(sweep.trials) and all(record.completed for record in records)
        tracker.close(_report(sweep, records, storage), finished)
    except TrackingError as error:
        return f"{sweep.name}: {done} of {len(records)} records are told, then: {error}"
    return ""


def _report(sweep: Sweep, records: Sequence[TrialRecord], storage: Path) -> dict[str, bytes]:
    """The files of the sweep's own run; records without a sweep were no study, and have none."""
    if sweep.name == LOOSE:
        return {}
    missing = len(sweep.trials) - len(records)
    about = About(
        name=sweep.name,
        command=sweep.command,
        question=sweep.question,
        expectation=sweep.expectation,
        predicted=predictions(storage),
        warnings=[f"{missing} of the study's {len(sweep.trials)} trials have no record yet."]
        if missing
        else [],
    )
    return write_report(
        records, storage / "reports" / f"{sweep.name}_{sweep.id}", about
    ).artifacts()


if __name__ == "__main__":
    sys.exit(main())
