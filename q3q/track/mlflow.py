"""MLflow as the tracker: one parent run per sweep, one child run per trial. The only file that imports mlflow.

Every call names its run: MLflow's global active run is never used, and nobody but the driver writes.
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
from urllib.parse import urlsplit

from q3q.errors import TrackingError
from q3q.masking import masked
from q3q.record import ANSWER, Sweep, TrialRecord
from q3q.spec import MEAN_ACCURACY, TrialSpec
from q3q.track.mlflow_sqlite import prepare_database, read_uri
from q3q.track.wording import (
    LONGEST_NAME,
    LONGEST_PARAM,
    LONGEST_TAG,
    block_metrics,
    content_digest,
    fitting_params,
    headline_of,
    metric_entities,
    milliseconds,
    model_label,
    named_metrics,
    origin_of,
    run_times,
    shortened,
    sweep_note,
    sweep_summary,
    table_view,
    trial_tags,
)

if TYPE_CHECKING:
    from mlflow.entities import Metric
    from mlflow.tracking import MlflowClient

# Seconds that a server may keep silent, and how often a request is sent again.
WHEN_CHECKING = (5, 0)
WHEN_WORKING = (15, 2)
MOST_AT_ONCE, MOST_PARAMS = (
    1000,
    100,
)  # metrics, params and tags in one request, and params among them
REMOTE = (
    "mlflow-artifacts",
    "s3",
    "gs",
    "wasbs",
    "abfss",
    "dbfs",
    "hdfs",
    "http",
    "https",
    "ftp",
    "sftp",
    "r2",
)
QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
}


@dataclass(frozen=True)
class Kept:
    """Which record a run holds: its digest, and when the attempt began that it is of; empty while there is none."""

    digest: str = ""
    started: str = ""


class MlflowTracker:
    """Keeps sweeps in an MLflow store.

    uri: `sqlite:///FILE` (relative to the working directory, made if missing) or the address of a server.
    artifacts: the folder for files beside a SQLite store, `artifacts` next to it if None; a server has its own place.
    experiment: what MLflow files the runs under. register: name of a model in the registry that exported checkpoints
    become versions of, None for none.

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
        self._live: dict[str, str] = {}  # trial id -> the run that its metrics go to while it works
        self._children: dict[
            str, dict[str, Kept]
        ] = {}  # trial id -> its runs -> the record that each holds
        self._drawn: dict[
            str, set[tuple[str, int]]
        ] = {}  # trial id -> metrics and steps that it has while it works
        self._measured: dict[
            str, None
        ] = {}  # what trials of the sweep measured, in the order of their records

    @property
    def page(self) -> str:
        """Where the UI shows the open sweep: its trials as a table with what was measured, below a server's address."""
        sweep = self._expect_open()
        return f"#/experiments/{self._experiment_id}/runs?workflowType=machine_learning&viewStateShareKey={sweep.id}"

    def check(self) -> None:
        """See `Tracker.check`. Imports MLflow and makes a missing SQLite store: takes seconds, may run in a thread."""
        with self._trouble("cannot be used"), _patience(*WHEN_CHECKING):
            self._find_experiment()
            if self.register is not None:
                self._check_registry()

    def open(self, sweep: Sweep) -> None:
        with self._trouble("cannot be used"), _patience(*WHEN_WORKING):
            client = self._client()
            self._experiment_id = self._find_experiment() or self._make_experiment()
            found = client.search_runs(
                [self._experiment_id],
                f"tags.`q3q.sweep` = '{sweep.id}'",
                order_by=["start_time DESC"],
                max_results=1,
            )
            tags = {
                "q3q.sweep": sweep.id,
                "q3q.command": sweep.command,
                "mlflow.note.content": sweep_note(sweep),
                **origin_of(),
            }
            known: dict[str, str] = {}
            if found:
                self._parent, known = found[0].info.run_id, found[0].data.params
                client.update_run(self._parent, status="RUNNING")
            else:
                self._parent = client.create_run(
                    self._experiment_id,
                    start_time=milliseconds(sweep.started or None),
                    run_name=headline_of(sweep),
                    tags={"q3q.sweep": sweep.id},
                ).info.run_id
            params = {
                key: value for key, value in sweep_summary(sweep.trials).items() if key not in known
            }
            self._log_batch(self._parent, [], params, tags)
            self._upload(self._parent, {"config.yaml": sweep.config.encode()})
            self._sweep, self._children, self._live, self._measured, self._drawn = (
                sweep,
                {},
                {},
                {},
                {},
            )
            for run in self._children_of(self._parent):
                tags = run.data.tags
                kept = Kept(tags.get("q3q.record", ""), tags.get("q3q.started", ""))
                self._children.setdefault(tags.get("q3q.trial", ""), {})[run.info.run_id] = kept
                if not kept.digest and run.info.status == "RUNNING":  # whoever wrote to it is gone
                    client.set_terminated(run.info.run_id, "KILLED")

    def live(self, spec: TrialSpec, metrics: Mapping[str, float], step: int) -> None:
        with self._trouble(f"did not take trial {spec.id}"), _patience(*WHEN_CHECKING):
            self._expect_open()
            now = int(time.time() * 1000)
            if spec.id not in self._live:
                self._live[spec.id] = self._begin(spec, now)
                self._children.setdefault(spec.id, {})[self._live[spec.id]] = Kept()
            self._client().log_batch(self._live[spec.id], named_metrics(metrics, now, step))
            self._drawn.setdefault(spec.id, set()).update((name, step) for name in metrics)

    def log(self, record: TrialRecord, artifacts: Mapping[str, bytes]) -> None:
        trial, now = (
            record.spec.id,
            Kept(content_digest(record), str(record.environment.get("started") or "")),
        )
        with self._trouble(f"did not take trial {trial}"), _patience(*WHEN_WORKING):
            self._expect_open()
            self._show(
                name
                for name in metric_entities(record)
                if name in record.intervals or name == MEAN_ACCURACY
            )
            runs = self._children.setdefault(trial, {})
            whole = next((run for run, kept in runs.items() if kept == now), None)
            if whole is not None:  # and others, if whoever logged it did not come to delete them
                self._delete(trial, [run for run in runs if run != whole])
                return
            # The same attempt, of which more is known by now, goes on in its run: what was charted live stays there.
            known = [
                run
                for run, kept in runs.items()
                if kept.digest and now.started and kept.started == now.started
            ]
            drawn = self._drawn.pop(trial, set())
            there = self._live.pop(trial, None) or next(iter(known), None)
            goes_on = there in known
            started, ended = run_times(record)
            tags = {**trial_tags(record), "q3q.started": now.started}
            run = there or self._begin(record.spec, started, tags)
            # From here on the run is known, and without a digest: if the rest fails, the next try replaces it.
            runs[run] = Kept()
            if goes_on:
                self._client().set_tag(run, "q3q.record", "")
            else:
                self._log_data(run, record.spec)
            self._upload(run, artifacts)
            if self.register is not None and record.completed and record.spec.export:
                self._register(run, record)
            self._client().set_terminated(run, "FINISHED" if record.completed else "FAILED", ended)
            metrics, params, signed = (
                metric_entities(record),
                record.spec.flat(),
                {"q3q.record": now.digest},
            )
            blocks = [] if goes_on else block_metrics(record, drawn, ended)
            if there:
                metrics, params = self._new_to(run, metrics, params, tags)
                signed |= tags
            # A request costs MLflow some milliseconds, whatever it holds: so all that is left is one, the digest last.
            self._log_batch(run, [*blocks, *named_metrics(metrics, ended)], params, signed)
            runs[run] = now
            self._delete(trial, [old for old in runs if old != run])

    def _delete(self, trial: str, runs: Sequence[str]) -> None:
        for run in runs:
            self._client().delete_run(run)
            del self._children[trial][run]

    def _new_to(
        self,
        run: str,
        metrics: Mapping[str, float],
        params: Mapping[str, str],
        tags: Mapping[str, str],
    ) -> tuple[dict[str, float], dict[str, str]]:
        """Those metrics and params that the run does not have as they are; tags that are no longer true go."""
        there = self._client().get_run(run).data
        for name in there.tags:
            if name.startswith("q3q.") and name not in (*tags, "q3q.trial", "q3q.record"):
                self._client().delete_tag(run, name)
        return (
            {name: value for name, value in metrics.items() if there.metrics.get(name) != value},
            {name: value for name, value in params.items() if name not in there.params},
        )

    def close(self, artifacts: Mapping[str, bytes], succeeded: bool) -> None:
        with self._trouble("did not take the sweep's table and plots"), _patience(*WHEN_WORKING):
            sweep, client = self._expect_open(), self._client()
            self._upload(self._parent, artifacts)
            answer = artifacts.get(ANSWER, b"").decode()
            self._client().set_tag(
                self._parent,
                "mlflow.note.content",
                shortened(sweep_note(sweep, answer), LONGEST_TAG),
            )
            for run in self._live.values():  # interrupted at work: nobody writes to it any more
                client.set_terminated(run, "KILLED")
            ended = milliseconds(sweep.ended or None)
            client.set_terminated(self._parent, "FINISHED" if succeeded else "FAILED", ended)

    def _show(self, measured: Iterable[str]) -> None:
        """See that the sweep's page has columns for these metrics."""
        if (known := self._measured | dict.fromkeys(measured)) != self._measured:
            view = table_view(self._parent, list(known))
            self._client().set_experiment_tag(
                self._experiment_id, f"mlflow.sharedViewState.{self._expect_open().id}", view
            )
            self._measured = known

    def _begin(
        self, spec: TrialSpec, started: int, tags: Mapping[str, str] = MappingProxyType({})
    ) -> str:
        """A child run under way."""
        run = self._client().create_run(
            self._experiment_id,
            start_time=started,
            run_name=shortened(
                self._expect_open().names.get(spec.id, f"{spec.name} · {model_label(spec)}"),
                LONGEST_NAME,
            ),
            tags={**fitting_params(tags), "mlflow.parentRunId": self._parent, "q3q.trial": spec.id},
        )
        return str(run.info.run_id)

    def _log_data(self, run: str, spec: TrialSpec) -> None:
        """What a trial calibrated and was measured on, as MLflow's data sets: texts, and the tasks' questions."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        texts = [("calibration", spec.calibration)] if spec.calibration else []
        texts += [("evaluation", text) for text in spec.evaluation.get("texts", [])]
        start = "evaluation.data."
        texts += [
            ("evaluation", {"name": key.removeprefix(start), "digest": digest})
            for key, digest in spec.flat().items()
            if key.startswith(start)
        ]
        inputs = [
            DatasetInput(
                Dataset(
                    name=str(text.get("name") or text["source"]),
                    digest=str(text.get("digest", ""))[:36] or "unknown",
                    source_type="q3q",
                    source=json.dumps(
                        {key: value for key, value in text.items() if key != "digest"}
                    ),
                ),
                [InputTag("mlflow.data.context", context)],
            )
            for context, text in texts
        ]
        if inputs:
            self._client().log_inputs(run, inputs)

    def _check_registry(self) -> None:
        """A registry takes only what lies in an artifact store that it can reach: where, an experiment alone says.

        Raises:
            TrackingError: it refuses local files.
        """
        where = "files on this machine alone"
        if self._database is None:
            place = (
                self._client()
                .get_experiment(self._find_experiment() or self._make_experiment())
                .artifact_location
            )
            if urlsplit(place).scheme in REMOTE:
                return
            where = f"those of the experiment {self.experiment} in {place}, a folder of its machine"
        raise TrackingError(
            f"track.register={self.register} needs a remote artifact store, and track.uri={masked(self.uri)} keeps "
            f"{where}: give a server (track.uri=http://HOST:PORT, mlflow server --artifacts-destination PLACE) and "
            "an experiment that was made there (track.experiment=NAME), or leave it out"
        )

    def _register(self, run: str, record: TrialRecord) -> None:
        """Upload the checkpoint and make it a version of the model, unless it is one."""
        assert self.register is not None
        client, sha256 = self._client(), str(record.notes.get("export", {}).get("sha256", ""))
        tags = {"q3q.trial": record.spec.id, "q3q.export.sha256": sha256}
        if not client.search_registered_models(f"name = '{self.register}'"):
            client.create_registered_model(self.register)
        for version in client.search_model_versions(f"name = '{self.register}'"):
            if tags.items() <= version.tags.items() and version.status == "READY":
                return
        client.log_artifacts(run, str(record.spec.places["export"]), "checkpoint")
        source = f"{client.get_run(run).info.artifact_uri}/checkpoint"
        client.create_model_version(self.register, source, run_id=run, tags=tags)

    def _client(self) -> "MlflowClient":
        with self._connecting:
            if self._connected is None:
                for name, value in QUIET.items():
                    os.environ.setdefault(name, value)
                if self._database is not None:
                    prepare_database(self._database, str(self._artifacts))
                from mlflow.tracking import MlflowClient

                self._connected = MlflowClient(tracking_uri=self.uri)
        return self._connected

    def _find_experiment(self) -> str | None:
        found = self._client().get_experiment_by_name(self.experiment)
        if found is not None and found.lifecycle_stage != "active":
            raise TrackingError(
                f"track.uri={masked(self.uri)}: the experiment {self.experiment} was deleted there; "
                "restore it in MLflow, or give another name as track.experiment"
            )
        return None if found is None else str(found.experiment_id)

    def _make_experiment(self) -> str:
        location = None if self._artifacts is None else self._artifacts.as_uri()
        try:
            # The kind decides which of its faces the UI shows: runs, or traces of chat applications.
            kind = {"mlflow.experimentKind": "custom_model_development"}
            return str(
                self._client().create_experiment(
                    self.experiment, artifact_location=location, tags=kind
                )
            )
        except Exception:
            faster = self._find_experiment()  # another sweep may have made it meanwhile
            if faster is None:
                raise
            return faster

    def _children_of(self, parent: str) -> Iterator[Any]:
        wanted, token = f"tags.`mlflow.parentRunId` = '{parent}'", None
        while True:
            page = self._client().search_runs(
                [self._experiment_id], wanted, max_results=1000, page_token=token
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
        """In as few requests as MLflow takes, the tags in the last, where MLflow writes them last."""
        from mlflow.entities import Param, RunTag

        named = [Param(name, shortened(value, LONGEST_PARAM)) for name, value in params.items()]
        while len(named) > MOST_PARAMS:
            self._client().log_batch(run, params=named[:MOST_PARAMS])
            named = named[MOST_PARAMS:]
        while len(metrics) + len(named) + len(tags) > MOST_AT_ONCE:
            self._client().log_batch(run, metrics[:MOST_AT_ONCE])
            metrics = metrics[MOST_AT_ONCE:]
        self._client().log_batch(
            run,
            metrics,
            named,
            [RunTag(name, value) for name, value in fitting_params(tags).items()],
        )

    def _upload(self, run: str, artifacts: Mapping[str, bytes]) -> None:
        if not artifacts:
            return
        with tempfile.TemporaryDirectory(prefix="q3q-") as folder:
            for name, content in artifacts.items():
                path = Path(folder, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            self._client().log_artifacts(run, folder)

    def _expect_open(self) -> Sweep:
        if self._sweep is None:
            raise TrackingError(
                "the tracker has no open sweep: open() comes before log() and close()"
            )
        return self._sweep

    @contextmanager
    def _trouble(self, what: str) -> Iterator[None]:
        """MLflow's, the database's and the network's errors as one line of ours; our own bugs stay what they are."""
        try:
            yield
        except TrackingError:
            raise
        except Exception as error:
            if not (
                isinstance(error, (OSError, sqlite3.Error))
                or type(error).__module__.startswith(_DOORS)
            ):
                raise
            advice = (
                "see that the file and its folder can be written, or give another file"
                if self._database is not None
                else "see that an MLflow server answers there (mlflow server --port PORT), or give sqlite:///FILE"
            )
            raise TrackingError(
                f"track.uri={masked(self.uri)} {what} ({_reason(error)}); {advice}"
            ) from error


_DOORS = (
    "mlflow.",
    "sqlalchemy.",
    "requests.",
    "urllib3.",
)  # whose exceptions speak of the store, not of our code


@contextmanager
def _patience(seconds: int, retries: int) -> Iterator[None]:
    """How long MLflow's client waits for a server; it reads this at each request. Single retries are not told."""
    wanted = {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(seconds),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(retries),
        "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    }
    before = {name: os.environ.get(name) for name in wanted}
    retrying = logging.getLogger("urllib3.connectionpool")
    level = retrying.level
    os.environ.update(wanted)
    retrying.setLevel(logging.ERROR)
    try:
        yield
    finally:
        retrying.setLevel(level)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _reason(error: BaseException) -> str:
    """The error at the bottom of the chain, in one line: `Connection refused`, not the five errors around it."""
    while deeper := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = deeper
    return shortened(masked(" ".join(str(error).split())) or type(error).__name__, 200)
