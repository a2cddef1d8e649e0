"""Prepare the SQLite file that MLflow keeps its records in, and put a damaged one aside."""

import os
import re
import sqlite3
import uuid
from contextlib import closing, suppress
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from q3q.errors import TrackingError
from q3q.masking import masked
from q3q.storage.aside import DAMAGED, MOVED, place_aside

OWN = "mlflow.db"  # the database of a storage folder
COMPANIONS = ("-journal", "-wal", "-shm")  # endings of files that SQLite keeps beside a database
MOST_CHECKED = 2**29  # bytes: SQLite reads 1 GB in some seconds; of a larger file only the header


def own_uri(storage: Path) -> str:
    """Return the URI of a storage folder's own database."""
    return _uri_of(storage / OWN)


def _uri_of(path: Path) -> str:
    """Return the URI by which MLflow opens a file.

    SQLAlchemy takes what follows a question mark for a query; from 2.1 on it decodes %3F and its
    like in a path, before that SQLite does so in a `file:` name. MLflow makes the parent of
    whatever follows `sqlite:///`, hence the driver's name before a path that is encoded.
    """
    decodes = metadata.version("sqlalchemy").split(".")[:2] >= ["2", "1"]
    if "?" not in str(path) and not (decodes and "%" in str(path)):
        return f"sqlite:///{path}"
    if decodes:
        return f"sqlite+pysqlite:///{quote(str(path))}"
    return f"sqlite+pysqlite:///file:{quote(str(path))}?uri=true"


def read_uri(uri: str) -> tuple[str, Path | None]:
    """Return the URI in full, and the database file that it names, None for a server.

    Raises:
        TrackingError: it is neither.
    """
    if re.match(r"https?://[^/]", uri):
        return uri.rstrip("/"), None
    quoted = re.fullmatch(r"sqlite\+pysqlite:///(?:file:([^?#]+)\?uri=true|([^?#]+))", uri)
    plain = re.fullmatch(r"sqlite:///([^?]+)", uri)
    if (quoted is None and plain is None) or (plain is not None and plain[1] == ":memory:"):
        odd = (
            "; a question mark in its name is written so: sqlite+pysqlite:////folder/a%3Fb.db"
            if uri.startswith("sqlite:") and "?" in uri
            else ""
        )
        raise TrackingError(
            f"track.uri={masked(uri)}: give sqlite:///FILE{odd}, or the address of an MLflow "
            "server (http://HOST:PORT); another database is reached through `mlflow server "
            "--backend-store-uri`"
        )
    path = Path(unquote(quoted[1] or quoted[2]) if quoted else plain[1] if plain else "")
    return _uri_of(path.absolute()), path.absolute()


def prepare_database(path: Path, artifacts: Path, own: bool, sync: str) -> str:
    """Make the database if it is missing, and check that it is whole and can be written.

    Args:
        own: it is a storage folder's own. Then the records there can fill a new one, so whatever
            is in its place and is no database is put aside, and so is a database that came with a
            storage folder that was moved or copied: MLflow would write to the old place.
        sync: the command that fills a new database from the records.

    Returns:
        A line that says what was put aside; empty if nothing was.

    Raises:
        OSError, sqlite3.Error: it cannot be made or written.
        TrackingError: it is no database of this MLflow's.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    damage = damage_of(path)
    aside = None
    if damage and not own and path.is_file() and path.stat().st_size:
        raise TrackingError(
            f"track.uri={_uri_of(path)} cannot be used ({damage}); rename the file, then the "
            f"same command, or `{sync}`, fills a new one from the records; or give another file"
        )
    former = _former_place(path, artifacts) if own and not damage else None
    if damage and (own or path.is_file()):
        aside = _put_aside(path, DAMAGED)
    elif former is not None:
        aside = _put_aside(path, MOVED)
    if not path.exists():
        _create_database(path, artifacts)
    # MLflow retries an unusable file for minutes: check here that it is a writable database.
    with closing(sqlite3.connect(path, timeout=5)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        connection.rollback()
        refuse_unknown(connection, path)
    if aside is None:
        return ""
    why = f"is not a whole database ({damage})" if damage else f"belongs to the storage {former}"
    return (
        f"{path} {why}, so it is now {aside}. The records of this sweep fill a new one; `{sync}` "
        "adds those of all others"
    )


def _former_place(path: Path, artifacts: Path) -> Path | None:
    """Return the storage folder that a database was made for, if it was moved or copied from there.

    The old folder is gone then, or has a database of its own. Otherwise it may be another storage,
    which shares this database.
    """
    if not path.is_file():
        return None
    with closing(sqlite3.connect(path, timeout=5)) as connection:
        if not connection.execute(
            "SELECT 1 FROM sqlite_master WHERE name = 'experiments'"
        ).fetchone():
            return None
        made = connection.execute(
            "SELECT artifact_location FROM experiments WHERE experiment_id != 0"
        ).fetchall()
    for location in (urlsplit(str(where)) for (where,) in made):
        folder = Path(unquote(location.path))
        if location.scheme != "file" or folder.resolve() == artifacts.resolve():
            continue
        if folder.name == artifacts.name and (
            not folder.is_dir() or (folder.parent / OWN).is_file()
        ):
            return folder.parent
    return None


def damage_of(path: Path) -> str:
    """Return what is wrong with the content of a file that should be a database, if anything is.

    A file that cannot be read, or that another process has locked, may be whole.
    """
    if not path.exists() and not path.is_symlink():
        return ""
    if path.is_dir():
        return "it is a folder"
    if not path.is_file():
        return "it is not a file"
    if not path.stat().st_size:
        return "it is empty"
    try:
        with closing(sqlite3.connect(path, timeout=1)) as connection:
            whole = path.stat().st_size <= MOST_CHECKED
            check = "PRAGMA quick_check(1)" if whole else "SELECT count(*) FROM sqlite_master"
            [(verdict, *_)] = connection.execute(check).fetchall()
            return "" if not whole or verdict == "ok" else " ".join(str(verdict).split())
    except sqlite3.DatabaseError as error:
        # The lowest byte is the primary code; the others say more about it.
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        return str(error) if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB) else ""


def _put_aside(path: Path, ending: str) -> Path:
    """Rename it, and what SQLite keeps beside it, to a name that is free: `mlflow.db.damaged`."""
    aside = place_aside(path, ending)
    path.rename(aside)
    for companion in COMPANIONS:
        with suppress(FileNotFoundError):
            path.with_name(path.name + companion).rename(aside.with_name(aside.name + companion))
    return aside


def refuse_unknown(connection: sqlite3.Connection, path: Path) -> None:
    """Raise TrackingError for a database of a newer MLflow, or of another program."""
    tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
    if tables and "alembic_version" not in tables and "experiments" not in tables:
        raise TrackingError(
            f"track.uri={_uri_of(path)}: that database is another program's (its tables are "
            f"{', '.join(sorted(tables)[:3])}); give another file"
        )
    if "alembic_version" not in tables:
        return
    package = find_spec("mlflow")  # to import it takes seconds
    migrations = Path(str(package and package.origin)).parent / "store/db_migrations/versions"
    for (version,) in connection.execute("SELECT version_num FROM alembic_version"):
        if not list(migrations.glob(f"{version}_*.py")):
            raise TrackingError(
                f"track.uri={_uri_of(path)}: a newer MLflow made this database (schema {version}), "
                f"and MLflow {metadata.version('mlflow')} cannot read it: pip install --upgrade "
                "mlflow, or give another file"
            )


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
