"""`python -m q3q.track sync`: bring a new or emptied MLflow up to date from the records on disk."""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from q3q.ending import begin_farewell, end_well
from q3q.errors import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_MISUSED,
    Q3QError,
    RefusedByTrackerError,
    TrackingError,
)
from q3q.masking import masked
from q3q.names import trial_names
from q3q.quoting import module
from q3q.record import Sweep, TrialRecord
from q3q.report.drawn import TrialFiles, sweep_report
from q3q.report.records import all_sweeps, find_records
from q3q.storage.mirror import refreshed
from q3q.storage.status import at_work
from q3q.storage.stores import folder_of
from q3q.track.mlflow import MlflowTracker
from q3q.track.mlflow_sqlite import own_uri

LOOSE, LOOSE_ID = "records without a sweep", "loose"


def main(arguments: Sequence[str] | None = None) -> int:
    """Log every sweep of a storage folder, except what the store has; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m q3q.track", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("what", choices=["sync"])
    parser.add_argument(
        "--storage",
        default="mlruns",
        metavar="DIR",
        help="the storage, a folder or a URL; default: mlruns",
    )
    parser.add_argument(
        "--uri", help="the MLflow store or server; default: sqlite:///<storage>/mlflow.db"
    )
    options = parser.parse_args(arguments)
    try:
        storage = refreshed(options.storage)
        failures = sync(options.storage, options.uri or own_uri(storage), print)
    except Q3QError as error:
        print(f"q3q: {masked(str(error))}", file=sys.stderr)
        return EXIT_MISUSED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    for line in failures:
        print(f"q3q: {line}", file=sys.stderr)
    return EXIT_FAILED if failures else 0


def sync(named: str, uri: str, say: Callable[[str], object]) -> list[str]:
    """Log every sweep of a storage, except what the store has.

    Args:
        named: the storage's folder or URL; a URL's files are here already.
        say: receives a line for each sweep, and for each file that could not be read.

    Returns:
        A line for each sweep that the store did not take completely; a second sync resumes there.

    Raises:
        ReportError: there are no records.
        TrackingError: the store cannot be used.
    """
    storage = folder_of(named)
    stored = find_records(storage)
    records = {record.spec.id: record for record in stored.records}
    sweeps, damaged = all_sweeps(storage)
    for line in (*stored.damaged, *damaged):
        say(line)
    in_sweeps = {trial.id for sweep in sweeps for trial in sweep.trials}
    loose = tuple(record.trial for record in stored.records if record.spec.id not in in_sweeps)
    if loose:
        # The id does not depend on the trials: next time there may be more of them.
        command = module("q3q.track", "sync", "--storage", str(storage))
        sweeps.append(Sweep(id=LOOSE_ID, name=LOOSE, command=command, config="", trials=loose))
    busy = {(status.name, status.command) for status in at_work(storage)}
    failures: list[str] = []
    said: set[str] = set()
    for sweep in sweeps:
        finished = [records[trial.id] for trial in sweep.trials if trial.id in records]
        if (sweep.name, masked(sweep.command)) in busy:
            say(f"{sweep.name}: is running, and logs its trials itself")
        elif finished:
            tracker = MlflowTracker(uri, named, sweep.experiment)
            tracker.check()
            failed = _log_sweep(tracker, sweep, finished, storage)
            for line in tracker.remarks():
                if line not in said:
                    say(line)
                said.add(line)
            if not failed:
                count = f"{len(finished)} of {len(sweep.trials)} trials are"
                say(f"{sweep.name}: {count} in experiment {tracker.experiment}")
            failures += failed
    return failures


def _log_sweep(
    tracker: MlflowTracker, sweep: Sweep, records: Sequence[TrialRecord], storage: Path
) -> list[str]:
    """Log a sweep with the times when it ran; return a line for each thing that went wrong."""
    times = [
        str(moment)
        for record in records
        for key in ("started", "ended")
        if (moment := record.environment.get(key))
    ]
    sweep = replace(
        sweep,
        names=sweep.names or trial_names([trial.spec for trial in sweep.trials]),
        started=min(times, default=""),
        ended=max(times, default=""),
    )
    logged, refused = 0, []
    try:
        tracker.open(sweep)
        for record in records:
            try:
                tracker.log(record, TrialFiles(record))
                logged += 1
            except RefusedByTrackerError as error:
                refused.append(f"{sweep.name}: {error}")
        finished = len(records) == len(sweep.trials) and all(record.completed for record in records)
        artifacts, headline = _report(sweep, records, storage)
        tracker.close(artifacts, finished, headline)
    except TrackingError as error:
        counted = f"{logged} of {len(records)} records are logged, then: {error}"
        return [*refused, f"{sweep.name}: {counted}"]
    except (KeyboardInterrupt, SystemExit):
        begin_farewell()
        with suppress(TrackingError):  # its run must not seem to go on
            tracker.close({}, succeeded=False)
        raise
    return refused


def _report(
    sweep: Sweep, records: Sequence[TrialRecord], storage: Path
) -> tuple[Mapping[str, bytes], Mapping[str, float]]:
    """Return the files and the headline of the sweep's own run; loose records have none."""
    if sweep.id == LOOSE_ID:
        return {}, {}
    report = sweep_report(sweep, records, storage)
    return report.artifacts(), report.headline


if __name__ == "__main__":
    end_well()
    sys.exit(main())
