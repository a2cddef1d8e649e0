"""Prepare the SQLite file that MLflow keeps its records in."""

import os
import re
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from q3q.errors import TrackingError
from q3q.masking import masked
from q3q.storage.files import write_atomically

if TYPE_CHECKING:
    pass


def read_uri(uri: str) -> tuple[str, Path | None]:
    """The URI in full, and the file that it means, None for a server."""
    if re.match(r"https?://[^/]", uri):
        return uri.rstrip("/"), None
    file = re.fullmatch(r"sqlite:///([^?]+)", uri)
    if file is None or file[1] == ":memory:":
        raise TrackingError(
            f"track.uri={masked(uri)}: give sqlite:///FILE, or the address of an MLflow server (http://HOST:PORT); "
            "another database is reached through `mlflow server --backend-store-uri`"
        )
    path = Path(file[1]).absolute()
    return f"sqlite:///{path}", path


def prepare_database(path: Path, artifacts: str) -> None:
    """A SQLite store that can be written, made if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        _create_database(path, artifacts)
    # MLflow tries an unusable file again for minutes: see for ourselves that it is a database and can be written.
    with closing(sqlite3.connect(path, timeout=5)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        connection.rollback()
        _follow_artifacts(connection, Path(artifacts))


def _follow_artifacts(connection: sqlite3.Connection, artifacts: Path) -> None:
    """Where runs have their files, in a store that was moved or copied with them: MLflow keeps the whole path of each.

    An experiment's files have come along if a folder of one of its runs is here, and its location is another.
    """
    ours, runs = artifacts.as_uri(), "SELECT run_uuid FROM runs WHERE experiment_id = ?"
    for experiment, theirs in connection.execute(
        "SELECT experiment_id, artifact_location FROM experiments WHERE artifact_location != ?",
        (ours,),
    ).fetchall():
        if any((artifacts / run).is_dir() for (run,) in connection.execute(runs, (experiment,))):
            with connection:
                connection.execute(
                    "UPDATE experiments SET artifact_location = ? WHERE experiment_id = ?",
                    (ours, experiment),
                )
                connection.execute(
                    "UPDATE runs SET artifact_uri = ? || substr(artifact_uri, ?) "
                    "WHERE experiment_id = ? AND substr(artifact_uri, 1, ?) = ?",
                    (ours, len(theirs) + 1, experiment, len(theirs), theirs),
                )


def _create_database(path: Path, artifacts: str) -> None:
    """MLflow's own migrations, without waiting for the disk at each of their 430 statements: 0.7 s, not 6 s.

    The file appears under its name when it is whole and on the disk, so a crash leaves no half-migrated store. If
    another process was faster, its store stands.
    """
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
    from sqlalchemy import event
    from sqlalchemy.engine import Engine

    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    write_atomically(partial, b"")  # an unwritable folder fails here and now
    event.listen(Engine, "connect", _leave_disk_alone)
    try:
        SqlAlchemyStore(f"sqlite:///{partial}", artifacts).engine.dispose()
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.link(partial, path)
    except FileExistsError:
        pass
    finally:
        event.remove(Engine, "connect", _leave_disk_alone)
        partial.unlink()


def _leave_disk_alone(connection: Any, _: Any) -> None:
    if isinstance(connection, sqlite3.Connection):
        connection.execute("PRAGMA synchronous = OFF")
        connection.execute("PRAGMA journal_mode = MEMORY")
