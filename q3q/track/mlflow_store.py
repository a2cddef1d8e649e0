"""An MLflow store or server: connecting to it, its experiment, and requests that it can take."""

import logging
import os
import sqlite3
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from q3q.environment import environment_variables
from q3q.errors import RefusedByTrackerError, TrackingError
from q3q.masking import masked
from q3q.track.mlflow_held import HeldSweep, held_sweep
from q3q.track.mlflow_names import MAX_PARAM, batches, experiment_name, fitted_text
from q3q.track.mlflow_sqlite import OWN, prepare_database, read_uri
from q3q.track.wording import ABOUT_EXPERIMENT, MAX_TAG, NOTE

if TYPE_CHECKING:
    from mlflow.entities import Experiment, Metric
    from mlflow.tracking import MlflowClient

# Seconds without an answer from a server, and retries of a request.
CHECK_LIMITS = (5, 0)
WORK_LIMITS = (15, 2)
BUSY_PAUSES = (0.1, 0.3, 1.0, 2.0)  # seconds
# What SQLite says to the later of two writers, and what it, PostgreSQL and MySQL say of a row that
# the earlier one inserted.
WRITTEN_AT_ONCE = (
    "database is locked",
    "UNIQUE constraint failed",
    "duplicate key value violates unique constraint",
    "Duplicate entry",
)
QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}
# Modules whose exceptions are about the store, not about a mistake in this code.
STORE_MODULES = ("mlflow.", "sqlalchemy.", "requests.", "urllib3.")
NOISY = ("urllib3.connectionpool", "mlflow.store.db.utils")  # loggers


class MlflowStore:
    """One experiment in a SQLite file or on a server.

    Args:
        uri: `sqlite:///FILE` (relative to the working directory, made if missing) or a server's
            address.
        storage: folder of the records; it holds the artifacts of a SQLite store, while a server
            has its own place for them. None means the folder of the SQLite file.
        sync: the command that fills a store from the records, for messages.

    Raises:
        TrackingError: the URI is neither.
    """

    def __init__(self, uri: str, storage: Path | None, experiment: str, sync: str) -> None:
        self.uri, self._database = read_uri(uri)
        self.experiment, self._sync = experiment_name(experiment), sync
        self.remarks: dict[str, None] = {}  # lines to say, each once, in order
        if self.experiment != experiment:
            self.remark(f"The experiment is called {self.experiment} in MLflow")
        self._artifacts: Path | None = None
        if self._database is not None:
            self._artifacts = ((storage or self._database.parent) / "artifacts").absolute()
        self._connecting = threading.Lock()
        self._connected: MlflowClient | None = None
        self.experiment_id = ""

    def remark(self, line: str) -> None:
        self.remarks.setdefault(line)

    @property
    def is_file(self) -> bool:
        """Return True for a SQLite file, False for a server."""
        return self._database is not None

    @property
    def is_own(self) -> bool:
        """Return True for a database beside the artifacts: all that it holds is this storage's."""
        return (
            self._database is not None
            and self._artifacts is not None
            and self._database.parent == self._artifacts.parent
        )

    def held(self, sweep: str, owner: str) -> HeldSweep | None:
        """Return what the storage's own database holds of a sweep that has ended; see there."""
        if not self.is_own or self._database is None or self._artifacts is None:
            return None
        return held_sweep(self._database, self._artifacts, self.experiment, sweep, owner)

    @property
    def client(self) -> "MlflowClient":
        with self._connecting:
            if self._connected is None:
                for name, value in QUIET.items():
                    os.environ.setdefault(name, value)
                if self._database is not None and self._artifacts is not None:
                    own = self.is_own and self._database.name == OWN
                    line = prepare_database(self._database, self._artifacts, own, self._sync)
                    if line:
                        self.remark(line)
                from mlflow.tracking import MlflowClient

                self._connected = MlflowClient(tracking_uri=self.uri)
        return self._connected

    def open(self) -> None:
        """Find or make the experiment, and describe it to people who know only its address."""
        experiment = self.find_experiment() or self._make_experiment()
        self.experiment_id = str(experiment.experiment_id)
        if not experiment.tags.get(NOTE):
            self.client.set_experiment_tag(self.experiment_id, NOTE, ABOUT_EXPERIMENT)

    def find_experiment(self) -> "Experiment | None":
        """Return the experiment, None if there is none yet.

        Raises:
            TrackingError: it was deleted, or keeps its files where the storage folder was before.
        """
        experiment = self.client.get_experiment_by_name(self.experiment)
        if experiment is None:
            return None
        if experiment.lifecycle_stage != "active":
            raise TrackingError(
                f"track.uri={masked(self.uri)}: the experiment {self.experiment} was deleted "
                "there; restore it in MLflow, or give another name as track.experiment"
            )
        self._refuse_moved(experiment)
        return experiment

    def _refuse_moved(self, experiment: "Experiment") -> None:
        """Raise if the storage folder was moved or copied: MLflow would write to its old place.

        A database outside the storage folder may serve several of them: the experiment's files
        are then where it was made.
        """
        location = urlsplit(experiment.artifact_location)
        if self._database is None or self._artifacts is None or location.scheme != "file":
            return
        folder = Path(unquote(location.path))
        if folder.resolve() == self._artifacts.resolve():
            return
        if self.is_own or not folder.is_dir():
            raise TrackingError(
                f"track.uri={self.uri}: the experiment {self.experiment} keeps its files in "
                f"{folder}, not in {self._artifacts}. If the storage folder was moved or copied, "
                f"rename {self._database} (or give a new file as track.uri): `{self._sync}` fills "
                "a new database from the records. Otherwise give another name as track.experiment"
            )

    def _make_experiment(self) -> "Experiment":
        location = None
        if self._artifacts is not None:
            # Where it is missing, other storages must think that the folder was moved.
            self._artifacts.mkdir(parents=True, exist_ok=True)
            location = self._artifacts.as_uri()
        try:
            # By its kind the UI decides what to show: runs, or traces of chat applications.
            kind = {"mlflow.experimentKind": "custom_model_development"}
            made = self.client.create_experiment(
                self.experiment, artifact_location=location, tags=kind
            )
            return self.client.get_experiment(made)
        except Exception:
            experiment = self.find_experiment()  # another sweep may have made it meanwhile
            if experiment is None:
                raise
            return experiment

    def artifact_location(self) -> str:
        """Return where the experiment keeps its files; make it if it is missing."""
        return str((self.find_experiment() or self._make_experiment()).artifact_location)

    def search(self, query: str) -> Iterator[Any]:
        """Yield the experiment's active runs, the newest first."""
        token = None
        while True:
            page = self.client.search_runs(
                [self.experiment_id],
                query,
                order_by=["start_time DESC"],
                max_results=1000,
                page_token=token,
            )
            yield from page
            token = page.token
            if not token:
                return

    def log_batch(
        self,
        run: str,
        metrics: Sequence["Metric"],
        params: Mapping[str, str],
        tags: Mapping[str, str],
    ) -> None:
        """Log all in as few requests as MLflow accepts; the last tag is written last."""
        from mlflow.entities import Param, RunTag

        for name, value in params.items():
            if len(value) > MAX_PARAM:
                self.remark(
                    f"{name} is too long for MLflow and is cut off there; the record has it in full"
                )
        all_params = [Param(name, fitted_text(value, MAX_PARAM)) for name, value in params.items()]
        all_tags = [RunTag(name, fitted_text(value, MAX_TAG)) for name, value in tags.items()]
        for batch in batches(metrics, all_params, all_tags):
            self.client.log_batch(run, batch.metrics, batch.params, batch.tags)

    def upload(self, run: str, artifacts: Mapping[str, bytes]) -> None:
        if not artifacts:
            return
        with tempfile.TemporaryDirectory(prefix="q3q-") as folder:
            for name, content in artifacts.items():
                path = Path(folder, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            self.client.log_artifacts(run, folder)

    def patiently(self, call: Callable[[], None]) -> None:
        """Make a call that can be repeated, again if another process wrote at the same moment.

        A database waits for others by itself, but not where two that read want to write, and MLflow
        looks for a row before it inserts it: two that found none both insert.
        """
        for pause in BUSY_PAUSES:
            try:
                return call()
            except Exception as error:
                of_mlflow = type(error).__module__.startswith("mlflow.")
                if not of_mlflow or not any(words in str(error) for words in WRITTEN_AT_ONCE):
                    raise
                time.sleep(pause)
        return call()

    @contextmanager
    def errors(self, failure: str, limits: tuple[int, int] = WORK_LIMITS) -> Iterator[None]:
        """Limit how long requests wait; turn errors of MLflow, its database and the network into
        a TrackingError of one line."""
        try:
            with _request_limits(*limits):
                yield
        except TrackingError:
            raise
        except Exception as error:
            of_store = type(error).__module__.startswith(STORE_MODULES)
            if not of_store and not isinstance(error, (OSError, sqlite3.Error)):
                raise
            where = f"track.uri={masked(self.uri)} {failure} ({_reason(error)})"
            if is_refusal(error):
                raise RefusedByTrackerError(f"{where}; all others can be sent") from error
            raise TrackingError(f"{where}; {self._advice(error)}") from error

    def _advice(self, error: Exception) -> str:
        if "database schema" in str(error):
            return (
                f"an older MLflow made it: copy the file, then `mlflow db upgrade '{self.uri}'`, "
                "or give another file"
            )
        if self._database is not None:
            return "see that the file and its folder can be written, or give another file"
        return (
            "see that an MLflow server answers there (mlflow server --port PORT), or give "
            "sqlite:///FILE"
        )


def is_refusal(error: Exception) -> bool:
    """Return True if the store works but refuses this request."""
    if "'active' state" in str(error):  # somebody deleted the run meanwhile
        return False
    code = str(getattr(error, "error_code", ""))
    return code == "INVALID_PARAMETER_VALUE" or (
        code == "BAD_REQUEST" and "DataError" in str(error)
    )


@contextmanager
def _request_limits(seconds: int, retries: int) -> Iterator[None]:
    """Limit how long MLflow's client waits for a server.

    Retries log no lines meanwhile, and errors of a database no tracebacks: q3q says them in a line.
    """
    limits = {  # the client reads them at each request
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(seconds),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries),
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    }
    loggers = [logging.getLogger(name) for name in NOISY]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with environment_variables(limits):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _reason(error: BaseException) -> str:
    """Return the error at the chain's root in one line: `Connection refused`, say."""
    while cause := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = cause
    return fitted_text(masked(" ".join(str(error).split())) or type(error).__name__, 200)
