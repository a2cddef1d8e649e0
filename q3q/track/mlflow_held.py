"""Read what a storage's own MLflow database holds of a sweep, without MLflow.

To import MLflow takes seconds. A command that finds all its trials done, and all of them logged,
needs none of it.
"""

import hashlib
import sqlite3
from collections.abc import Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote, urlsplit

from q3q.canonical import sha256
from q3q.record import ANSWER, Sweep, TrialRecord
from q3q.track.mlflow_fields import record_digest
from q3q.track.mlflow_names import fitted_names, fitted_text
from q3q.track.mlflow_sqlite import damage_of, refuse_unknown
from q3q.track.wording import MAX_TAG, NOTE, sweep_note

COMMAND = "q3q.command"  # the tag that has a sweep's command in full

SWEEPS = """
    SELECT experiments.experiment_id, run_uuid, status, artifact_uri
    FROM runs JOIN experiments USING (experiment_id) JOIN tags USING (run_uuid)
    WHERE experiments.name = ? AND artifact_location = ? AND tags.key = 'q3q.sweep'
    AND tags.value = ? AND experiments.lifecycle_stage = 'active'
    AND runs.lifecycle_stage = 'active'
"""
TRIALS = """
    SELECT run_uuid FROM runs JOIN tags USING (run_uuid)
    WHERE key = 'mlflow.parentRunId' AND value = ? AND lifecycle_stage = 'active'
"""


@dataclass(frozen=True)
class HeldSweep:
    """A sweep that has ended, as the database holds it.

    owner: the id of the storage that logged it
    status: `FINISHED` or `FAILED`
    tags, metrics: of the sweep's own run
    folder: the artifacts of that run
    records: the digest of the record that each trial's one run holds, by the trial's id
    """

    owner: str
    experiment_id: str
    status: str
    tags: Mapping[str, str]
    metrics: Mapping[str, float]
    folder: Path
    records: Mapping[str, str]

    def has_record(self, record: TrialRecord) -> bool:
        return self.records.get(record.spec.id) == record_digest(record)

    def is_closed_with(
        self,
        sweep: Sweep,
        artifacts: Mapping[str, bytes],
        succeeded: bool,
        headline: Mapping[str, float],
    ) -> bool:
        """Return True if the sweep's run has all that `Tracker.close` would give it."""
        tags = {COMMAND: sweep.command, **closing_tags(sweep, artifacts)}
        names = fitted_names(headline)
        return (
            self.status == ("FINISHED" if succeeded else "FAILED")
            and {trial.id for trial in sweep.trials} == set(self.records)
            and all(self.tags.get(key) == fitted_text(tags[key], MAX_TAG) for key in tags)
            and all(self.metrics.get(names[key]) == headline[key] for key in headline)
            and self._has_files({**artifacts, **config_file(sweep)})
        )

    def _has_files(self, artifacts: Mapping[str, bytes]) -> bool:
        """Return True if files of these names and lengths are there; a tag has their digest."""
        with suppress(OSError):
            return all(
                (self.folder / name).stat().st_size == len(content)
                for name, content in artifacts.items()
            )
        return False


def closing_tags(sweep: Sweep, artifacts: Mapping[str, bytes]) -> dict[str, str]:
    """Return the tags that a sweep's run gets at its end: the note, and the digest of its files."""
    sha = hashlib.sha256()
    for name, content in sorted(artifacts.items()):
        sha.update(f"{name} {sha256(content)}\n".encode())
    note = sweep_note(sweep, artifacts.get(ANSWER, b"").decode())
    return {NOTE: note, "q3q.files": sha.hexdigest()[:16]}


def config_file(sweep: Sweep) -> dict[str, bytes]:
    """Return the one file that a sweep's run has from its start."""
    return {"config.yaml": sweep.config.encode(errors="replace")}


def held_sweep(
    database: Path, artifacts: Path, experiment: str, sweep: str, owner: str
) -> HeldSweep | None:
    """Return a sweep that has ended and whose trials have one complete run each.

    Args:
        artifacts: the folder of the database's artifacts
        sweep, owner: ids of the sweep and of the storage

    Returns:
        None if the database holds anything else of this sweep, or cannot be read: MLflow sees to
        that.
    """
    if not database.is_file() or damage_of(database):
        return None
    try:
        with closing(sqlite3.connect(f"file:{quote(str(database))}?mode=ro", uri=True)) as reader:
            refuse_unknown(reader, database)
            rows = reader.execute(SWEEPS, (experiment, artifacts.as_uri(), sweep)).fetchall()
            if len(rows) != 1:
                return None
            [(experiment_id, run, status, location)] = rows
            tags = _of_run(reader, "tags", run)
            metrics = _of_run(reader, "latest_metrics", run)
            trials = [_of_run(reader, "tags", trial) for (trial,) in reader.execute(TRIALS, (run,))]
    except sqlite3.Error:
        return None
    records = {trial.get("q3q.trial", ""): trial.get("q3q.record", "") for trial in trials}
    others = [run_tags for run_tags in (tags, *trials) if run_tags.get("q3q.storage") != owner]
    if others or len(records) < len(trials) or not all(records.values()) or status == "RUNNING":
        return None
    folder = Path(unquote(urlsplit(location).path))
    return HeldSweep(owner, str(experiment_id), status, tags, metrics, folder, records)


def _of_run(reader: sqlite3.Connection, table: str, run: str) -> dict[str, Any]:
    return dict(reader.execute(f"SELECT key, value FROM {table} WHERE run_uuid = ?", (run,)))
