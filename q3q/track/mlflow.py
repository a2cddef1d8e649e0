"""MLflow as the tracker: one parent run per sweep, one child run per trial. The only file that imports mlflow.

Every call names its run: MLflow's global active run is never used, and nobody but the driver writes.
"""

import hashlib
import json
import logging
import math
import os
import re
import sqlite3
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from q3q.errors import TrackingError
from q3q.masking import masked
from q3q.record import TrialRecord, block_errors, write_atomically
from q3q.spec import MEAN_ACCURACY, TrialSpec, mean_metrics
from q3q.track.tracker import ANSWER, Sweep

if TYPE_CHECKING:
    from mlflow.entities import Metric
    from mlflow.tracking import MlflowClient

# Seconds that a server may keep silent, and how often a request is sent again.
WHEN_CHECKING = (5, 0)
WHEN_WORKING = (15, 2)
# What MLflow takes, in characters (tags: servers before 3.0). Longer texts are cut and stand whole in artifacts.
LONGEST_PARAM, LONGEST_TAG = 6000, 5000
LONGEST_COMMAND = 1500  # in the note of a sweep; whole in a tag, as far as that takes it
ASIDE = ("top1_agreement/", "kl_p")  # of what a trial measured; no columns of the table of a sweep
LONGEST_NAME = 120  # of a run, which stands in a table's column
MOST_AT_ONCE, MOST_PARAMS = (
    1000,
    100,
)  # metrics, params and tags in one request, and params among them
MOST_COLUMNS = 8  # metrics in the UI's table of a sweep
DIGITS = (
    7  # of a metric that is no whole number: a table has no room for more, record.json has them all
)
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
        self.uri, self._database = _read_uri(uri)
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
                "mlflow.note.content": _note(sweep),
                **_origin(),
            }
            known: dict[str, str] = {}
            if found:
                self._parent, known = found[0].info.run_id, found[0].data.params
                client.update_run(self._parent, status="RUNNING")
            else:
                self._parent = client.create_run(
                    self._experiment_id,
                    start_time=_milliseconds(sweep.started or None),
                    run_name=_headline(sweep),
                    tags={"q3q.sweep": sweep.id},
                ).info.run_id
            params = {
                key: value for key, value in _summary(sweep.trials).items() if key not in known
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
            self._client().log_batch(self._live[spec.id], _named(metrics, now, step))
            self._drawn.setdefault(spec.id, set()).update((name, step) for name in metrics)

    def log(self, record: TrialRecord, artifacts: Mapping[str, bytes]) -> None:
        trial, now = (
            record.spec.id,
            Kept(_digest(record), str(record.environment.get("started") or "")),
        )
        with self._trouble(f"did not take trial {trial}"), _patience(*WHEN_WORKING):
            self._expect_open()
            self._show(
                name
                for name in _metrics(record)
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
            started, ended = _times(record)
            tags = {**_tags(record), "q3q.started": now.started}
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
                _metrics(record),
                record.spec.flat(),
                {"q3q.record": now.digest},
            )
            blocks = [] if goes_on else _of_blocks(record, drawn, ended)
            if there:
                metrics, params = self._new_to(run, metrics, params, tags)
                signed |= tags
            # A request costs MLflow some milliseconds, whatever it holds: so all that is left is one, the digest last.
            self._log_batch(run, [*blocks, *_named(metrics, ended)], params, signed)
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
                self._parent, "mlflow.note.content", _cut(_note(sweep, answer), LONGEST_TAG)
            )
            for run in self._live.values():  # interrupted at work: nobody writes to it any more
                client.set_terminated(run, "KILLED")
            ended = _milliseconds(sweep.ended or None)
            client.set_terminated(self._parent, "FINISHED" if succeeded else "FAILED", ended)

    def _show(self, measured: Iterable[str]) -> None:
        """See that the sweep's page has columns for these metrics."""
        if (known := self._measured | dict.fromkeys(measured)) != self._measured:
            view = _view(self._parent, list(known))
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
            run_name=_cut(
                self._expect_open().names.get(spec.id, f"{spec.name} · {_model(spec)}"),
                LONGEST_NAME,
            ),
            tags={**_fitting(tags), "mlflow.parentRunId": self._parent, "q3q.trial": spec.id},
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
                    _prepare_database(self._database, str(self._artifacts))
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

        named = [Param(name, _cut(value, LONGEST_PARAM)) for name, value in params.items()]
        while len(named) > MOST_PARAMS:
            self._client().log_batch(run, params=named[:MOST_PARAMS])
            named = named[MOST_PARAMS:]
        while len(metrics) + len(named) + len(tags) > MOST_AT_ONCE:
            self._client().log_batch(run, metrics[:MOST_AT_ONCE])
            metrics = metrics[MOST_AT_ONCE:]
        self._client().log_batch(
            run, metrics, named, [RunTag(name, value) for name, value in _fitting(tags).items()]
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


def _read_uri(uri: str) -> tuple[str, Path | None]:
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


def _prepare_database(path: Path, artifacts: str) -> None:
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
    return _cut(masked(" ".join(str(error).split())) or type(error).__name__, 200)


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _fitting(tags: Mapping[str, str]) -> dict[str, str]:
    return {name: _cut(value, LONGEST_TAG) for name, value in tags.items()}


def _digest(record: TrialRecord) -> str:
    return hashlib.sha256(json.dumps(record.to_json(), sort_keys=True).encode()).hexdigest()[:16]


def _times(record: TrialRecord) -> tuple[int, int]:
    """When the trial started and ended, in milliseconds since 1970; now, for one that died before it could say."""
    now = int(time.time() * 1000)
    ended, started = (_milliseconds(record.environment.get(key)) for key in ("ended", "started"))
    return started or ended or now, ended or now


def _milliseconds(moment: str | None) -> int | None:
    return None if moment is None else int(datetime.fromisoformat(moment).timestamp() * 1000)


def _metrics(record: TrialRecord) -> dict[str, float]:
    """The record's metrics under names that MLflow takes, `<metric>.low` and `<metric>.high` of each 95 % interval,
    `<metric>.difference` from the unquantized model, and the mean accuracy of the tasks."""
    named = dict(record.metrics)
    for name, (low, high) in record.intervals.items():
        named |= {f"{name}.low": low, f"{name}.high": high}
    for name, compared in record.comparisons.items():
        if compared.difference is not None:
            named[f"{name}.difference"] = compared.difference
    accuracies = mean_metrics(record.spec)
    if len(accuracies) > 1 and all(name in record.metrics for name in accuracies):
        named[MEAN_ACCURACY] = math.fsum(record.metrics[name] for name in accuracies) / len(
            accuracies
        )
    return {_metric_name(name): _brief(value) for name, value in named.items()}


def _named(metrics: Mapping[str, float], at: int, step: int = 0) -> list["Metric"]:
    """As MLflow takes them. at: milliseconds since 1970."""
    from mlflow.entities import Metric

    return [Metric(_metric_name(name), value, at, step) for name, value in metrics.items()]


def _of_blocks(record: TrialRecord, drawn: set[tuple[str, int]], at: int) -> list["Metric"]:
    """Mean error of each block's linears, a step a block, so that the UI draws it: those that are not drawn yet."""
    return [
        metric
        for block, errors in block_errors(record.sites).items()
        for metric in _named(
            {name: value for name, value in errors.items() if (name, block) not in drawn}, at, block
        )
    ]


def _brief(value: float) -> float:
    return value if float(value).is_integer() else float(f"{value:.{DIGITS}g}")


def _metric_name(name: str) -> str:
    return re.sub(r"[^\w/.\- ]", "_", name)


def _tags(record: TrialRecord) -> dict[str, str]:
    spec, commit = record.spec, str(record.environment.get("git_commit") or "")
    tags = {
        "q3q.quantization": spec.quantization_id,
        "q3q.method": str(spec.method["name"]),
        "q3q.model": _model(spec),
        "q3q.status": record.status,
        "q3q.reason": record.reason,
        "q3q.diverged": ", ".join(record.diverged),
        "q3q.git_commit": commit,
        "mlflow.source.git.commit": commit.partition("+")[0],
        "mlflow.note.content": _story(record),
        **_exported(record),
        **_origin(),
    }
    return {name: value for name, value in tags.items() if value}


def _exported(record: TrialRecord) -> dict[str, str]:
    """Where an exported checkpoint is and what: gigabytes are not copied unless somebody registers them."""
    facts = record.notes.get("export", {})
    size = (
        {"bytes": f"{record.metrics['export_bytes']:.0f}"}
        if facts and "export_bytes" in record.metrics
        else {}
    )
    named = {name: str(facts[name]) for name in ("format", "path", "sha256") if name in facts}
    return {f"q3q.export.{name}": value for name, value in {**named, **size}.items()}


def _story(record: TrialRecord) -> str:
    """What a person should know of the trial, in Markdown."""
    lines = [f"{record.spec.name} · {_model(record.spec)}: **{record.status}**"]
    if record.reason:
        lines.append(f"Reason: {record.reason}")
    if record.diverged:
        lines.append(f"Not a finite number: {', '.join(record.diverged)}")
    if record.comparisons:
        told = [name for name, compared in record.comparisons.items() if compared.distinguishable]
        lines.append(f"Distinguishable from the unquantized model: {', '.join(told) or 'nothing'}")
    lines += [
        f"Check {check.name} failed: {check.detail}" for check in record.checks if not check.passed
    ]
    return "\n\n".join(lines)


def _origin() -> dict[str, str]:
    user = os.environ.get("USER") or os.environ.get("LOGNAME")
    return {"mlflow.source.name": "launch.py", "mlflow.source.type": "LOCAL"} | (
        {"mlflow.user": user} if user else {}
    )


def _summary(trials: tuple[TrialSpec, ...]) -> dict[str, str]:
    """What the sweep varies, as short strings."""
    schemes = [spec.scheme for spec in trials if spec.scheme is not None]
    return {
        "models": _listed(_model(spec) for spec in trials),
        "methods": _listed(spec.method["name"] for spec in trials),
        "bits": _listed(scheme.bits for scheme in schemes),
        "group_sizes": _listed(scheme.group_size for scheme in schemes),
        "act_bits": _listed(scheme.act_bits for scheme in schemes),
        "seeds": _listed(spec.seed for spec in trials),
        "trials": str(len(trials)),
    }


def _listed(values: Any) -> str:
    """Each value once, in order; `-` if there is none."""
    return ", ".join(map(str, sorted({value for value in values if value is not None}))) or "-"


def _model(spec: TrialSpec) -> str:
    return str(spec.model.get("name") or spec.model.get("source"))


def _view(parent: str, measured: list[str]) -> str:
    """What the UI's table of a sweep shows, as the UI itself keeps a view that somebody shares: the trials alone, what
    they measured beside their bits, the best first. A UI that does not know it says so and shows all runs."""
    main = sorted((name for name in measured if not name.startswith(ASIDE)), key=_rank) or measured
    columns = [
        f"metrics.`{_metric_name(name)}`"
        for name in [*main[:MOST_COLUMNS], "bits_per_weight_model"]
    ]
    return json.dumps(
        {
            "searchFilter": f"tags.mlflow.parentRunId = '{parent}'",
            "orderByKey": columns[0],
            "orderByAsc": "accuracy" not in columns[0] and "/acc" not in columns[0],
            "startTime": "ALL",
            "lifecycleFilter": "Active",
            "datasetsFilter": [],
            "modelVersionFilter": "All Runs",
            "selectedColumns": ["params.`scheme.bits`", "params.`scheme.group_size`", *columns],
        }
    )


def _rank(name: str) -> int:
    """Perplexities first, then the mean accuracy, then what is about single tasks and tokens."""
    return 0 if name.startswith("perplexity") else 1 if name == MEAN_ACCURACY else 2


def _headline(sweep: Sweep) -> str:
    """What the sweep's own run is called: its question, if it has one."""
    return _cut(sweep.question or sweep.name, LONGEST_NAME)


def _note(sweep: Sweep, answer: str = "") -> str:
    """What was asked, how to ask it again, and as many tables of the answer as there is room for."""
    asked = [
        f"**{word}.** {text}"
        for word, text in (("Question", sweep.question), ("Expectation", sweep.expectation))
        if text
    ]
    note = "\n\n".join([*asked, f"```\n{_cut(sweep.command, LONGEST_COMMAND)}\n```"])
    if not answer:
        return note
    pointer = "The whole report is `report.html` among the artifacts of this run."
    for table in re.split(r"\n\n(?=\*\*)", answer.strip()):
        if len(note) + len(table) + len(pointer) + 4 > LONGEST_TAG:
            break
        note += f"\n\n{table}"
    return f"{note}\n\n{pointer}"
