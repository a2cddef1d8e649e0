"""MLflow as the tracker: one parent run per sweep, one child run per trial.

Every call names its run: MLflow's global active run is never used, and only the driver writes.

Several storages may share one MLflow. Each has an id, which its runs carry as a tag, and no storage
changes or deletes the runs of another.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, TypeVar

from q3q.errors import NotRegisteredError, TrackingError
from q3q.evaluate.metrics import held_out
from q3q.formatting import plural
from q3q.record import Sweep, TrialRecord
from q3q.spec import TrialSpec
from q3q.storage.identity import storage_id
from q3q.storage.stores import folder_of
from q3q.track.mlflow_fields import (
    block_metrics,
    dataset_inputs,
    deciding_columns,
    earlier_digest,
    metric_entities,
    milliseconds,
    record_digest,
    record_metrics,
    source_tags,
    sweep_params,
    trial_params,
    trial_tags,
    trial_times,
)
from q3q.track.mlflow_held import COMMAND, HeldSweep, closing_tags, config_file
from q3q.track.mlflow_names import fitted_names, fitted_text
from q3q.track.mlflow_registry import check_registry, register
from q3q.track.mlflow_sqlite import own_uri, read_uri
from q3q.track.mlflow_store import CHECK_LIMITS, MlflowStore, is_refusal
from q3q.track.tracker import DEFAULT_STORAGE, sync_command
from q3q.track.wording import MAX_TAG, NOTE, shared_view, sweep_note, sweep_run_name, trial_run_name

Value = TypeVar("Value")


@dataclass(frozen=True)
class LoggedRecord:
    """The record that a run holds.

    digest: empty while the run holds none
    started: when the record's attempt began, ISO 8601
    ours: this storage logged it. A run without a storage's id is ours in the storage's own
        database alone: earlier versions gave none.
    """

    digest: str = ""
    started: str = ""
    ours: bool = True


class MlflowTracker:
    """A tracker that keeps sweeps in an MLflow store.

    Args:
        uri: `sqlite:///FILE` (relative to the working directory, made if missing) or a server's
            address.
        storage: folder or URL of the records, as the user gave it. It has an id, and holds a
            SQLite store's artifacts; None stands for the folder of the SQLite file.
        register: name of a registered model; exported checkpoints become its versions.

    Raises:
        TrackingError: the URI is neither.
    """

    def __init__(
        self,
        uri: str,
        storage: str | None = None,
        experiment: str = "q3q",
        register: str | None = None,
    ) -> None:
        full, _ = read_uri(uri)
        folder = None if storage is None else folder_of(storage)
        # The storage's own database need not be named.
        is_default = folder is not None and full == read_uri(own_uri(folder))[0]
        self.sync = sync_command(storage or DEFAULT_STORAGE, None if is_default else full)
        self._store = MlflowStore(uri, folder, experiment, self.sync)
        self.uri, self.experiment = full, self._store.experiment
        self.register, self._storage = register, storage
        self._owner = ""  # the storage's id; it is made when a sweep is opened
        self._sweep: Sweep | None = None
        self._parent = ""
        self._view = ""  # the key of the view that is the sweep's page
        # By trial: the run that receives its metrics while it works; all its runs and their
        # records; the metrics and steps that it has logged while it works.
        self._live: dict[str, str] = {}
        self._runs: dict[str, dict[str, LoggedRecord]] = {}
        self._logged: dict[str, set[tuple[str, int]]] = {}
        # Records that runs of other storages hold, as where this storage is a copy.
        self._elsewhere: set[str | None] = set()
        self._columns: dict[str, str] = {}  # of the sweep's table, by metric
        self._said: set[str] = set()

    @property
    def page(self) -> str:
        """The open sweep's page in the UI, below a server's address: a table of its trials."""
        self._open_sweep()
        return _page(self._store.experiment_id, self._view)

    def held(self, sweep: Sweep) -> HeldSweep | None:
        """Return what the storage's own database holds of a sweep that has ended.

        MLflow is not imported. None where MLflow must see to it.
        """
        if self._storage is None or self.register is not None:
            return None
        with self._store.errors("cannot be used"):
            return self._store.held(sweep.id, storage_id(self._storage))

    def page_of(self, held: HeldSweep, sweep: Sweep) -> str:
        """Return the page of a sweep that is not open."""
        return _page(held.experiment_id, _view(sweep, held.owner))

    def remarks(self) -> list[str]:
        lines = [line for line in list(self._store.remarks) if line not in self._said]
        self._said.update(lines)
        return lines

    def check(self) -> None:
        """See `Tracker.check`.

        It imports MLflow and makes a missing SQLite store, which takes seconds; it may run in a
        thread.
        """
        with self._store.errors("cannot be used", CHECK_LIMITS):
            self._store.patiently(self._check)

    def _check(self) -> None:
        self._store.find_experiment()
        if self.register is not None:
            check_registry(self._store, self.register)

    def open(self, sweep: Sweep) -> None:
        with self._store.errors("cannot be used"):
            self._store.patiently(partial(self._open, sweep))

    def _open(self, sweep: Sweep) -> None:
        self._store.open()
        self._owner = storage_id(self._storage) if self._storage is not None else ""
        self._sweep, self._parent, self._columns, self._elsewhere = sweep, "", {}, set()
        self._runs, self._live, self._logged = {}, {}, {}
        # A run of an earlier version has no storage's id: the first that opens it has it.
        of_storages: dict[str, list[Any]] = {self._owner: [], "": []}
        for run in self._store.search(f"tags.`q3q.sweep` = '{sweep.id}'"):
            owner = run.data.tags.get("q3q.storage", "")
            of_storages.setdefault(owner, []).append(run)
        own = [*of_storages.pop(self._owner), *of_storages.pop("", [])]
        for owner, parents in of_storages.items():
            self._view = _view(sweep, owner)
            for child in self._children_of(parents[0]):
                self._elsewhere |= {child.data.tags.get("q3q.record")} - {"", None}
        if own:
            self._resume(own[0])
        elif not self._elsewhere:
            self._start_parent()
        # Else there may be nothing to log: then the sweep has no run of its own here.

    def _resume(self, parent: Any) -> None:
        """Go on in the run of an earlier sweep with the same trials."""
        client, self._parent = self._store.client, parent.info.run_id
        client.update_run(self._parent, status="RUNNING")
        self._describe_parent(parent.data.params)
        for run in self._children_of(parent):
            tags = run.data.tags
            owner = tags.get("q3q.storage", "")
            if owner not in ("", self._owner):
                continue
            logged = LoggedRecord(
                tags.get("q3q.record", ""),
                tags.get("q3q.started", ""),
                ours=owner == self._owner or self._store.is_own,
            )
            self._runs.setdefault(tags.get("q3q.trial", ""), {})[run.info.run_id] = logged
            # Its driver died.
            if logged.ours and not logged.digest and run.info.status == "RUNNING":
                client.set_terminated(run.info.run_id, "KILLED")

    def _start_parent(self) -> None:
        sweep = self._open_sweep()
        self._parent = self._store.client.create_run(
            self._store.experiment_id,
            start_time=milliseconds(sweep.started or None),
            run_name=sweep_run_name(sweep),
            tags={"q3q.sweep": sweep.id, **self._owner_tag},
        ).info.run_id
        self._describe_parent({})

    def _describe_parent(self, earlier: Mapping[str, str]) -> None:
        """Log what the sweep is.

        Args:
            earlier: params that its run has; none of them can be changed.
        """
        sweep = self._open_sweep()
        self._view = _view(sweep, self._owner)
        params = sweep_params([trial.spec for trial in sweep.trials])
        params = {name: value for name, value in params.items() if name not in earlier}
        tags = {
            "q3q.sweep": sweep.id,
            COMMAND: sweep.command,
            NOTE: sweep_note(sweep),
            **self._owner_tag,
            **source_tags(),
        }
        self._store.log_batch(self._parent, [], params, tags)
        self._store.upload(self._parent, config_file(sweep))

    @property
    def _owner_tag(self) -> dict[str, str]:
        return {"q3q.storage": self._owner} if self._owner else {}

    def live(self, spec: TrialSpec, metrics: Mapping[str, float], step: int) -> None:
        with self._store.errors(f"did not take trial {spec.id}", CHECK_LIMITS):
            self._store.patiently(partial(self._log_live, spec, metrics, step))

    def _log_live(self, spec: TrialSpec, metrics: Mapping[str, float], step: int) -> None:
        self._open_sweep()
        now = int(time.time() * 1000)
        if not self._parent:
            self._start_parent()
        if spec.id not in self._live:
            self._live[spec.id] = self._start_run(spec, now)
            self._runs.setdefault(spec.id, {})[self._live[spec.id]] = LoggedRecord()
        entities = metric_entities(metrics, now, step)
        self._store.log_batch(self._live[spec.id], entities, {}, {})
        self._logged.setdefault(spec.id, set()).update((name, step) for name in metrics)

    def log(self, record: TrialRecord, artifacts: Mapping[str, bytes]) -> None:
        with self._store.errors(f"did not take trial {record.spec.id}"):
            self._store.patiently(partial(self._log, record, artifacts))

    def _log(self, record: TrialRecord, artifacts: Mapping[str, bytes]) -> None:
        spec = record.spec
        begun = str(record.environment.get("started") or "")
        logged = LoggedRecord(record_digest(record), begun)
        self._open_sweep()
        runs, earlier = self._runs.setdefault(spec.id, {}), earlier_digest(record)
        complete = next(
            (run for run, previous in runs.items() if previous.digest == logged.digest), None
        )
        is_elsewhere = bool(self._elsewhere & {logged.digest, earlier})
        if is_elsewhere and complete is None and spec.id not in self._live:
            return
        if not self._parent:
            self._start_parent()
        metrics = self._fit(record_metrics(record))
        self._add_columns(deciding_columns(record))
        if complete is not None:  # others: their driver died before it deleted them
            self._live.pop(spec.id, None)
            self._delete(spec.id, [run for run in runs if run != complete])
            return
        # A later record of the same attempt updates its run, and so keeps the live charts.
        same_attempt = [
            run
            for run, previous in runs.items()
            if previous.digest
            and ((begun and previous.started == begun) or previous.digest == earlier)
        ]
        live = self._live.pop(spec.id, None)
        existing = live or next(iter(same_attempt), None)
        # Without a digest they hold nothing: what was to fill them failed.
        broken = [run for run, previous in runs.items() if not previous.digest and run != existing]
        self._delete(spec.id, broken)
        started, ended = trial_times(record)
        tags = {**trial_tags(record), **self._owner_tag, "q3q.started": begun}
        run = existing or self._start_run(spec, started, tags)
        # The run is known from here on, without a digest: if the rest fails, the next try
        # replaces it.
        runs[run] = LoggedRecord()
        try:
            missing = tags if existing else {}
            refusal = self._fill(run, record, artifacts, metrics, missing, existing in same_attempt)
        except Exception as error:
            if is_refusal(error):  # else the run would be shown as running for ever
                self._store.client.set_terminated(run, "FAILED", ended)
            raise
        runs[run] = logged
        self._delete(spec.id, [old for old in runs if old != run])
        if refusal is not None:
            raise refusal

    def _fill(
        self,
        run: str,
        record: TrialRecord,
        artifacts: Mapping[str, bytes],
        metrics: Mapping[str, float],
        tags: Mapping[str, str],
        is_update: bool,
    ) -> NotRegisteredError | None:
        """Log a record to its run; the record's digest, which completes the run, comes last.

        Args:
            tags: to write; a run that was made for this record has them already.
            is_update: the run holds an earlier record of the same attempt.

        Returns:
            Why its checkpoint is not registered, if that is damaged; all else is logged.
        """
        client, spec = self._store.client, record.spec
        live_steps = self._logged.pop(spec.id, set())
        if is_update:
            client.set_tag(run, "q3q.record", "")
        elif inputs := dataset_inputs(spec):
            client.log_inputs(run, inputs)
        self._store.upload(run, artifacts)
        refusal = None
        if self.register is not None and record.completed and spec.export:
            try:
                register(client, self.register, run, record)
            except NotRegisteredError as error:
                refusal = error
        _, ended = trial_times(record)
        client.set_terminated(run, "FINISHED" if record.completed else "FAILED", ended)
        blocks = [] if is_update else block_metrics(record, live_steps, ended)
        params = self._fit(trial_params(spec))
        if tags:
            metrics, params = self._changes(run, metrics, params, tags)
        # A request costs some milliseconds whatever it holds, so one has all the rest; MLflow
        # writes its last tag last.
        entities = [*blocks, *metric_entities(metrics, ended)]
        self._store.log_batch(run, entities, params, {**tags, "q3q.record": record_digest(record)})
        return refusal

    def close(
        self,
        artifacts: Mapping[str, bytes],
        succeeded: bool,
        headline: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        with self._store.errors("did not take the sweep's table and plots"):
            self._store.patiently(partial(self._close, artifacts, succeeded, headline))

    def _close(
        self, artifacts: Mapping[str, bytes], succeeded: bool, headline: Mapping[str, float]
    ) -> None:
        sweep, client = self._open_sweep(), self._store.client
        if not self._parent:
            return  # other storages' runs hold all records of this one
        self._store.upload(self._parent, artifacts)
        ended = milliseconds(sweep.ended or None)
        earlier = client.get_run(self._parent).data.metrics
        metrics = {name: x for name, x in self._fit(headline).items() if earlier.get(name) != x}
        now = ended or int(time.time() * 1000)
        tags = closing_tags(sweep, artifacts)
        self._store.log_batch(self._parent, metric_entities(metrics, now), {}, tags)
        for run in self._live.values():  # their trials were interrupted
            client.set_terminated(run, "KILLED")
        client.set_terminated(self._parent, "FINISHED" if succeeded else "FAILED", ended)

    def _delete(self, trial: str, runs: Sequence[str]) -> None:
        """Delete runs of a trial, but for those that another storage may have logged."""
        for run in runs:
            if self._runs[trial][run].ours:
                self._store.client.delete_run(run)
                del self._runs[trial][run]

    def _fit(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """Return metrics or params under names that MLflow takes; remark if it takes others."""
        names = fitted_names(values)
        changed = [name for name, word in names.items() if name != word]
        if changed:
            others = plural(len(changed) - 1, "other name")
            more = f" ({others} changed as well)" if len(changed) > 1 else ""
            self._store.remark(
                f"MLflow does not accept the name {changed[0]}, so it is called "
                f"{names[changed[0]]} there{more}"
            )
        return {names[name]: value for name, value in values.items()}

    def _children_of(self, parent: Any) -> Iterator[Any]:
        return self._store.search(f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")

    def _changes(
        self,
        run: str,
        metrics: Mapping[str, float],
        params: Mapping[str, str],
        tags: Mapping[str, str],
    ) -> tuple[dict[str, float], dict[str, str]]:
        """Return the metrics and params that differ from the run's; delete its outdated tags."""
        client = self._store.client
        data = client.get_run(run).data
        for name in data.tags:
            if name.startswith("q3q.") and name not in (*tags, "q3q.trial", "q3q.record"):
                client.delete_tag(run, name)
        return (
            {name: value for name, value in metrics.items() if data.metrics.get(name) != value},
            {name: value for name, value in params.items() if name not in data.params},
        )

    def _add_columns(self, new: Mapping[str, str]) -> None:
        """Give the sweep's table these columns, by metric."""
        if (columns := self._columns | dict(new)) != self._columns:
            view = f"mlflow.sharedViewState.{self._view}"
            # As in the report, a text that was not calibrated on ranks the trials.
            sweep = self._open_sweep()
            specs = [trial.spec for trial in sweep.trials]
            ranked = sorted(columns, key=lambda name: not held_out(name, specs))
            fitted = fitted_names(columns[name] for name in ranked)
            names = [trial_run_name(sweep, spec) for spec in specs]
            content = shared_view(self._parent, [fitted[columns[name]] for name in ranked], names)
            self._store.client.set_experiment_tag(self._store.experiment_id, view, content)
            self._columns = columns

    def _start_run(
        self, spec: TrialSpec, started: int, tags: Mapping[str, str] = MappingProxyType({})
    ) -> str:
        """Start a child run, and return its id."""
        own = {"mlflow.parentRunId": self._parent, "q3q.trial": spec.id, **self._owner_tag}
        run = self._store.client.create_run(
            self._store.experiment_id,
            start_time=started,
            run_name=trial_run_name(self._open_sweep(), spec),
            tags={name: fitted_text(value, MAX_TAG) for name, value in {**tags, **own}.items()},
        )
        return str(run.info.run_id)

    def _open_sweep(self) -> Sweep:
        if self._sweep is None:
            raise TrackingError(
                "the tracker has no open sweep: open() comes before log() and close()"
            )
        return self._sweep


def _page(experiment_id: str, view: str) -> str:
    return (
        f"#/experiments/{experiment_id}/runs?workflowType=machine_learning&viewStateShareKey={view}"
    )


def _view(sweep: Sweep, owner: str) -> str:
    """Return the key of the view that is a sweep's page, in one storage."""
    return f"{sweep.id}-{owner}" if owner else sweep.id
