"""MLflow as the tracker: one parent run per sweep, one child run per trial.

Every call names its run: MLflow's global active run is never used, and only the driver writes.
"""

import json
import logging
import os
import sqlite3
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from q3q.environment import environment_variables
from q3q.errors import NotRegisteredError, TrackingError
from q3q.evaluate.metrics import held_out
from q3q.export.marker import digest_faults
from q3q.masking import masked
from q3q.record import ANSWER, Sweep, TrialRecord
from q3q.spec import MEAN_ACCURACY, Json, TrialSpec
from q3q.track.mlflow_fields import (
    MAX_PARAM,
    block_metrics,
    metric_entities,
    milliseconds,
    record_digest,
    record_metrics,
    source_tags,
    sweep_params,
    trial_tags,
    trial_times,
    truncated_tags,
)
from q3q.track.mlflow_sqlite import prepare_database, read_uri
from q3q.track.wording import shared_view, sweep_note, sweep_run_name, trial_run_name, truncated

if TYPE_CHECKING:
    from mlflow.entities import Experiment, Metric
    from mlflow.tracking import MlflowClient

# Seconds without an answer from a server, and retries of a request.
CHECK_LIMITS = (5, 0)
WORK_LIMITS = (15, 2)
MAX_BATCH = 1000  # metrics, params and tags in one request
MAX_BATCH_PARAMS = 100  # params among them
REMOTE = tuple(
    "mlflow-artifacts s3 gs wasbs abfss dbfs hdfs http https ftp sftp r2".split()
)  # artifact stores that a model registry can reach
QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}
# Modules whose exceptions are about the store, not about a mistake in this code.
STORE_MODULES = ("mlflow.", "sqlalchemy.", "requests.", "urllib3.")


@dataclass(frozen=True)
class LoggedRecord:
    """The record that a run holds.

    digest: empty while the run holds none
    started: when the record's attempt began, ISO 8601
    """

    digest: str = ""
    started: str = ""


class MlflowTracker:
    """A tracker that keeps sweeps in an MLflow store.

    Args:
        uri: `sqlite:///FILE` (relative to the working directory, made if missing) or a server's
            address.
        artifacts: folder of a SQLite store's files, by default `artifacts` next to it; a server
            has its own place.
        experiment: the MLflow experiment of the runs.
        register: name of a registered model; exported checkpoints become its versions.

    Raises:
        TrackingError: the URI is neither.
    """

    def __init__(
        self,
        uri: str,
        artifacts: str | None = None,
        experiment: str = "q3q",
        register: str | None = None,
    ) -> None:
        self.uri, self._database = read_uri(uri)
        self.experiment, self.register = experiment, register
        self._artifacts: Path | None = None
        if self._database is not None:
            self._artifacts = Path(artifacts or self._database.parent / "artifacts").absolute()
        self._connecting = threading.Lock()
        self._connected: MlflowClient | None = None
        self._experiment_id = ""
        self._sweep: Sweep | None = None
        self._parent = ""
        # By trial: the run that receives its metrics while it works; all its runs and their
        # records; the metrics and steps that it has logged while it works.
        self._live: dict[str, str] = {}
        self._runs: dict[str, dict[str, LoggedRecord]] = {}
        self._logged: dict[str, set[tuple[str, int]]] = {}
        self._columns: dict[str, None] = {}  # of the sweep's table, in the order of its records

    @property
    def page(self) -> str:
        """The open sweep's page in the UI, below a server's address: a table of its trials."""
        sweep = self._open_sweep()
        return (
            f"#/experiments/{self._experiment_id}/runs?workflowType=machine_learning"
            f"&viewStateShareKey={sweep.id}"
        )

    def check(self) -> None:
        """See `Tracker.check`.

        It imports MLflow and makes a missing SQLite store, which takes seconds; it may run in a
        thread.
        """
        with self._tracking_errors("cannot be used"), _request_limits(*CHECK_LIMITS):
            self._find_experiment()
            if self.register is not None:
                self._check_registry()

    def open(self, sweep: Sweep) -> None:
        with self._tracking_errors("cannot be used"), _request_limits(*WORK_LIMITS):
            client = self._client()
            experiment = self._find_experiment() or self._make_experiment()
            self._experiment_id = str(experiment.experiment_id)
            parents = client.search_runs(
                [self._experiment_id],
                f"tags.`q3q.sweep` = '{sweep.id}'",
                order_by=["start_time DESC"],
                max_results=1,
            )
            params = sweep_params([trial.spec for trial in sweep.trials])
            if parents:
                self._parent, earlier = parents[0].info.run_id, parents[0].data.params
                params = {name: value for name, value in params.items() if name not in earlier}
                client.update_run(self._parent, status="RUNNING")
            else:
                self._parent = client.create_run(
                    self._experiment_id,
                    start_time=milliseconds(sweep.started or None),
                    run_name=sweep_run_name(sweep),
                    tags={"q3q.sweep": sweep.id},
                ).info.run_id
            tags = {
                "q3q.sweep": sweep.id,
                "q3q.command": sweep.command,
                "mlflow.note.content": sweep_note(sweep),
                **source_tags(),
            }
            self._log_batch(self._parent, [], params, tags)
            self._upload(self._parent, {"config.yaml": sweep.config.encode()})
            self._sweep, self._columns = sweep, {}
            self._runs, self._live, self._logged = {}, {}, {}
            for run in self._children_of(self._parent):
                tags = run.data.tags
                logged = LoggedRecord(tags.get("q3q.record", ""), tags.get("q3q.started", ""))
                self._runs.setdefault(tags.get("q3q.trial", ""), {})[run.info.run_id] = logged
                if not logged.digest and run.info.status == "RUNNING":  # its driver died
                    client.set_terminated(run.info.run_id, "KILLED")

    def live(self, spec: TrialSpec, metrics: Mapping[str, float], step: int) -> None:
        refused = f"did not take trial {spec.id}"
        with self._tracking_errors(refused), _request_limits(*CHECK_LIMITS):
            self._open_sweep()
            now = int(time.time() * 1000)
            if spec.id not in self._live:
                self._live[spec.id] = self._start_run(spec, now)
                self._runs.setdefault(spec.id, {})[self._live[spec.id]] = LoggedRecord()
            self._client().log_batch(self._live[spec.id], metric_entities(metrics, now, step))
            self._logged.setdefault(spec.id, set()).update((name, step) for name in metrics)

    def log(self, record: TrialRecord, artifacts: Mapping[str, bytes]) -> None:
        spec = record.spec
        begun = str(record.environment.get("started") or "")
        logged = LoggedRecord(record_digest(record), begun)
        refused = f"did not take trial {spec.id}"
        with self._tracking_errors(refused), _request_limits(*WORK_LIMITS):
            self._open_sweep()
            metrics, params = record_metrics(record), spec.flat()
            self._add_columns(
                name for name in metrics if name in record.intervals or name == MEAN_ACCURACY
            )
            runs = self._runs.setdefault(spec.id, {})
            complete = next((run for run, content in runs.items() if content == logged), None)
            if complete is not None:  # others: their driver died before it deleted them
                self._delete(spec.id, [run for run in runs if run != complete])
                return
            # A later record of the same attempt updates its run, and so keeps the live charts.
            same_attempt = [
                run
                for run, content in runs.items()
                if content.digest and begun and content.started == begun
            ]
            live_steps = self._logged.pop(spec.id, set())
            existing = self._live.pop(spec.id, None) or next(iter(same_attempt), None)
            is_update = existing in same_attempt
            started, ended = trial_times(record)
            tags = {**trial_tags(record), "q3q.started": begun}
            run = existing or self._start_run(spec, started, tags)
            # The run is known from here on, without a digest: if the rest fails, the next try
            # replaces it.
            runs[run] = LoggedRecord()
            if is_update:
                self._client().set_tag(run, "q3q.record", "")
            else:
                self._log_datasets(run, spec)
            self._upload(run, artifacts)
            refusal = None
            if self.register is not None and record.completed and spec.export:
                refusal = self._register(run, record)
            self._client().set_terminated(run, "FINISHED" if record.completed else "FAILED", ended)
            blocks = [] if is_update else block_metrics(record, live_steps, ended)
            final_tags = {"q3q.record": logged.digest}
            if existing:
                metrics, params = self._changes(run, metrics, params, tags)
                final_tags |= tags
            # A request costs some milliseconds whatever it holds, so one has all the rest; MLflow
            # writes the digest last.
            self._log_batch(run, [*blocks, *metric_entities(metrics, ended)], params, final_tags)
            runs[run] = logged
            self._delete(spec.id, [old for old in runs if old != run])
        if refusal is not None:
            raise NotRegisteredError(refusal)

    def close(self, artifacts: Mapping[str, bytes], succeeded: bool) -> None:
        refused = "did not take the sweep's table and plots"
        with self._tracking_errors(refused), _request_limits(*WORK_LIMITS):
            sweep, client = self._open_sweep(), self._client()
            self._upload(self._parent, artifacts)
            note = sweep_note(sweep, artifacts.get(ANSWER, b"").decode())
            client.set_tag(self._parent, "mlflow.note.content", note)
            for run in self._live.values():  # their trials were interrupted
                client.set_terminated(run, "KILLED")
            ended = milliseconds(sweep.ended or None)
            client.set_terminated(self._parent, "FINISHED" if succeeded else "FAILED", ended)

    def _delete(self, trial: str, runs: Sequence[str]) -> None:
        for run in runs:
            self._client().delete_run(run)
            del self._runs[trial][run]

    def _changes(
        self,
        run: str,
        metrics: Mapping[str, float],
        params: Mapping[str, str],
        tags: Mapping[str, str],
    ) -> tuple[dict[str, float], dict[str, str]]:
        """Return the metrics and params that differ from the run's; delete its outdated tags."""
        data = self._client().get_run(run).data
        for name in data.tags:
            if name.startswith("q3q.") and name not in (*tags, "q3q.trial", "q3q.record"):
                self._client().delete_tag(run, name)
        return (
            {name: value for name, value in metrics.items() if data.metrics.get(name) != value},
            {name: value for name, value in params.items() if name not in data.params},
        )

    def _add_columns(self, metrics: Iterable[str]) -> None:
        """Give the sweep's table columns for these metrics."""
        if (columns := self._columns | dict.fromkeys(metrics)) != self._columns:
            view = f"mlflow.sharedViewState.{self._open_sweep().id}"
            # As in the report, a text that was not calibrated on ranks the trials.
            specs = [trial.spec for trial in self._open_sweep().trials]
            ranked = sorted(columns, key=lambda name: not held_out(name, specs))
            self._client().set_experiment_tag(
                self._experiment_id, view, shared_view(self._parent, ranked)
            )
            self._columns = columns

    def _start_run(
        self, spec: TrialSpec, started: int, tags: Mapping[str, str] = MappingProxyType({})
    ) -> str:
        """Start a child run, and return its id."""
        run = self._client().create_run(
            self._experiment_id,
            start_time=started,
            run_name=trial_run_name(self._open_sweep(), spec),
            tags={**truncated_tags(tags), "mlflow.parentRunId": self._parent, "q3q.trial": spec.id},
        )
        return str(run.info.run_id)

    def _log_datasets(self, run: str, spec: TrialSpec) -> None:
        """Log the trial's texts, and its tasks' questions, as MLflow's data sets."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        texts: list[tuple[str, Json]] = []
        if spec.calibration is not None:
            texts.append(("calibration", spec.calibration.to_json()))
        texts += [("evaluation", text.to_json()) for text in spec.evaluation.texts]
        prefix = "evaluation.data."
        texts += [
            ("evaluation", {"name": key.removeprefix(prefix), "digest": digest})
            for key, digest in spec.flat().items()
            if key.startswith(prefix)
        ]
        inputs = [
            DatasetInput(
                Dataset(
                    name=str(text.get("name") or text["source"]),
                    digest=text["digest"][:36] or "unknown",
                    source_type="q3q",
                    source=json.dumps({key: text[key] for key in text if key != "digest"}),
                ),
                [InputTag("mlflow.data.context", context)],
            )
            for context, text in texts
        ]
        if inputs:
            self._client().log_inputs(run, inputs)

    def _check_registry(self) -> None:
        """Check that a model registry can reach the artifacts of the experiment.

        Raises:
            TrackingError: they are local files.
        """
        place = "files on this machine alone"
        if self._database is None:
            experiment = self._find_experiment() or self._make_experiment()
            location = experiment.artifact_location
            if urlsplit(location).scheme in REMOTE:
                return
            place = (
                f"those of the experiment {self.experiment} in {location}, a folder of its machine"
            )
        raise TrackingError(
            f"track.register={self.register} needs a remote artifact store, and "
            f"track.uri={masked(self.uri)} keeps {place}: give a server "
            "(track.uri=http://HOST:PORT, mlflow server --artifacts-destination PLACE) and an "
            "experiment that was made there (track.experiment=NAME), or leave it out"
        )

    def _register(self, run: str, record: TrialRecord) -> str | None:
        """Upload the checkpoint and make it a version of the model, unless it is one.

        Returns:
            Why it is not uploaded: its files are not those that were published. None if it is.
        """
        assert self.register is not None
        client, sha256 = self._client(), str(record.notes.get("export", {}).get("sha256", ""))
        tags = {"q3q.trial": record.spec.id, "q3q.export.sha256": sha256}
        if not client.search_registered_models(f"name = '{self.register}'"):
            client.create_registered_model(self.register)
        for version in client.search_model_versions(f"name = '{self.register}'"):
            if tags.items() <= version.tags.items() and version.status == "READY":
                return None
        folder = record.placement.export
        present = folder is not None and folder.is_dir()
        fault = next(digest_faults(folder), None) if folder and present else "it is missing"
        if fault is not None:
            return (
                f"{self.register} has no version of trial {record.spec.id}: the export {folder} "
                f"is damaged ({fault}). Remove the folder: the same command makes and registers it"
            )
        client.log_artifacts(run, str(folder), "checkpoint")
        source = f"{client.get_run(run).info.artifact_uri}/checkpoint"
        client.create_model_version(self.register, source, run_id=run, tags=tags)
        return None

    def _client(self) -> "MlflowClient":
        with self._connecting:
            if self._connected is None:
                for name, value in QUIET.items():
                    os.environ.setdefault(name, value)
                if self._database is not None and self._artifacts is not None:
                    prepare_database(self._database, self._artifacts)
                from mlflow.tracking import MlflowClient

                self._connected = MlflowClient(tracking_uri=self.uri)
        return self._connected

    def _find_experiment(self) -> "Experiment | None":
        """Return the experiment, None if there is none yet.

        Raises:
            TrackingError: it was deleted, or keeps its files where the storage folder was before.
        """
        experiment = self._client().get_experiment_by_name(self.experiment)
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
        beside = self._database.parent == self._artifacts.parent
        if folder.resolve() != self._artifacts.resolve() and (beside or not folder.is_dir()):
            raise TrackingError(
                f"track.uri={self.uri}: the experiment {self.experiment} keeps its files in "
                f"{folder}, not in {self._artifacts}. If the storage folder was moved or copied, "
                f"rename {self._database} (or give a new file as track.uri): `python -m q3q.track "
                "sync` fills a new database from the records. Otherwise give another name as "
                "track.experiment"
            )

    def _make_experiment(self) -> "Experiment":
        client = self._client()
        location = self._artifacts.as_uri() if self._artifacts else None
        try:
            # By its kind the UI decides what to show: runs, or traces of chat applications.
            kind = {"mlflow.experimentKind": "custom_model_development"}
            return client.get_experiment(
                client.create_experiment(self.experiment, artifact_location=location, tags=kind)
            )
        except Exception:
            experiment = self._find_experiment()  # another sweep may have made it meanwhile
            if experiment is None:
                raise
            return experiment

    def _children_of(self, parent: str) -> Iterator[Any]:
        query, token = f"tags.`mlflow.parentRunId` = '{parent}'", None
        while True:
            page = self._client().search_runs(
                [self._experiment_id], query, max_results=1000, page_token=token
            )
            yield from page
            token = page.token
            if not token:
                return

    def _log_batch(
        self,
        run: str,
        metrics: Sequence["Metric"],
        params: Mapping[str, str],
        tags: Mapping[str, str],
    ) -> None:
        """Log all in as few requests as MLflow accepts; the last has the tags, written last."""
        from mlflow.entities import Param, RunTag

        client = self._client()
        param_entities = [
            Param(name, truncated(value, MAX_PARAM)) for name, value in params.items()
        ]
        tag_entities = [RunTag(name, value) for name, value in truncated_tags(tags).items()]
        while len(param_entities) > MAX_BATCH_PARAMS:
            client.log_batch(run, params=param_entities[:MAX_BATCH_PARAMS])
            param_entities = param_entities[MAX_BATCH_PARAMS:]
        while len(metrics) + len(param_entities) + len(tags) > MAX_BATCH:
            client.log_batch(run, metrics[:MAX_BATCH])
            metrics = metrics[MAX_BATCH:]
        client.log_batch(run, metrics, param_entities, tag_entities)

    def _upload(self, run: str, artifacts: Mapping[str, bytes]) -> None:
        if not artifacts:
            return
        with tempfile.TemporaryDirectory(prefix="q3q-") as folder:
            for name, content in artifacts.items():
                path = Path(folder, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            self._client().log_artifacts(run, folder)

    def _open_sweep(self) -> Sweep:
        if self._sweep is None:
            raise TrackingError(
                "the tracker has no open sweep: open() comes before log() and close()"
            )
        return self._sweep

    @contextmanager
    def _tracking_errors(self, failure: str) -> Iterator[None]:
        """Turn errors of MLflow, its database and the network into a TrackingError of one line."""
        try:
            yield
        except TrackingError:
            raise
        except Exception as error:
            of_store = type(error).__module__.startswith(STORE_MODULES)
            if not of_store and not isinstance(error, (OSError, sqlite3.Error)):
                raise
            advice = (
                "see that the file and its folder can be written, or give another file"
                if self._database is not None
                else "see that an MLflow server answers there (mlflow server --port PORT), or give "
                "sqlite:///FILE"
            )
            raise TrackingError(
                f"track.uri={masked(self.uri)} {failure} ({_reason(error)}); {advice}"
            ) from error


@contextmanager
def _request_limits(seconds: int, retries: int) -> Iterator[None]:
    """Limit how long MLflow's client waits for a server, without a log line for each retry."""
    limits = {  # the client reads them at each request
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(seconds),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries),
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    }
    retry_logger = logging.getLogger("urllib3.connectionpool")
    level = retry_logger.level
    retry_logger.setLevel(logging.ERROR)
    try:
        with environment_variables(limits):
            yield
    finally:
        retry_logger.setLevel(level)


def _reason(error: BaseException) -> str:
    """Return the error at the chain's root in one line: `Connection refused`, say."""
    while cause := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = cause
    return truncated(masked(" ".join(str(error).split())) or type(error).__name__, 200)
