"""Prepare the SQLite file that MLflow keeps its records in."""

import os
import re
import sqlite3
import uuid
from contextlib import closing, suppress
from pathlib import Path

from q3q.errors import TrackingError
from q3q.masking import masked


def read_uri(uri: str) -> tuple[str, Path | None]:
    """Return the URI in full, and the database file that it names, None for a server.

    Raises:
        TrackingError: it is neither.
    """
    if re.match(r"https?://[^/]", uri):
        return uri.rstrip("/"), None
    file = re.fullmatch(r"sqlite:///([^?]+)", uri)
    if file is None or file[1] == ":memory:":
        raise TrackingError(
            f"track.uri={masked(uri)}: give sqlite:///FILE, or the address of an MLflow server "
            "(http://HOST:PORT); another database is reached through `mlflow server "
            "--backend-store-uri`"
        )
    path = Path(file[1]).absolute()
    return f"sqlite:///{path}", path


def prepare_database(path: Path, artifacts: Path) -> None:
    """Make the database if it is missing, and check that it can be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        _create_database(path, artifacts)
    # MLflow retries an unusable file for minutes: check here that it is a writable database.
    with closing(sqlite3.connect(path, timeout=5)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        connection.rollback()


def _create_database(path: Path, artifacts: Path) -> None:
    """Run MLflow's own migrations in memory: on a disk its 430 statements take 6 s, not 0.7 s.

    The file gets its name when it is complete and on the disk, so a crash leaves no half-migrated
    database. If another process was faster, its database stays.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    shared = f"file:{uuid.uuid4().hex}?mode=memory&cache=shared"
    try:
        with (
            closing(sqlite3.connect(partial)) as disk,  # fails at once in a read-only folder
            closing(sqlite3.connect(shared, uri=True)) as memory,  # keeps it alive
        ):
            from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

            SqlAlchemyStore(f"sqlite:///{shared}&uri=true", str(artifacts)).engine.dispose()
            memory.backup(disk)
        with suppress(FileExistsError):
            os.link(partial, path)
    finally:
        partial.unlink(missing_ok=True)
