"""A tracker for a study with nothing left to run: MLflow is loaded only if something differs."""

from collections.abc import Mapping
from types import MappingProxyType

from q3q.record import Sweep, TrialRecord
from q3q.spec import TrialSpec
from q3q.track.mlflow import MlflowTracker
from q3q.track.mlflow_held import HeldSweep


class IdleTracker:
    """Compare a study with what MLflow's database holds of it, and write once they differ.

    From the first difference on, the MLflow tracker receives all calls: also the earlier ones.
    """

    def __init__(self, tracker: MlflowTracker) -> None:
        self._tracker, self.uri, self.sync = tracker, tracker.uri, tracker.sync
        self._sweep: Sweep | None = None
        self._held: HeldSweep | None = None
        self._same: dict[str, tuple[TrialRecord, Mapping[str, bytes]]] = {}

    @property
    def page(self) -> str:
        if self._held is None or self._sweep is None:
            return self._tracker.page
        return self._tracker.page_of(self._held, self._sweep)

    def remarks(self) -> list[str]:
        return self._tracker.remarks()

    def check(self) -> None:
        self._tracker.check()

    def open(self, sweep: Sweep) -> None:
        self._sweep, self._same = sweep, {}
        self._held = self._tracker.held(sweep)
        if self._held is None:
            self._tracker.open(sweep)

    def live(self, spec: TrialSpec, metrics: Mapping[str, float], step: int) -> None:
        self._write()
        self._tracker.live(spec, metrics, step)

    def log(self, record: TrialRecord, artifacts: Mapping[str, bytes]) -> None:
        if self._held is not None and self._held.has_record(record):
            self._same[record.spec.id] = record, artifacts
            return
        self._write()
        self._tracker.log(record, artifacts)

    def close(
        self,
        artifacts: Mapping[str, bytes],
        succeeded: bool,
        headline: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        held, sweep = self._held, self._sweep
        if (
            held is not None
            and sweep is not None
            and set(self._same) == set(held.records)
            and held.is_closed_with(sweep, artifacts, succeeded, headline)
        ):
            return
        self._write()
        self._tracker.close(artifacts, succeeded, headline)

    def _write(self) -> None:
        """Pass on what was held back, once."""
        if self._held is None or self._sweep is None:
            return
        self._held = None
        self._tracker.open(self._sweep)
        for record, artifacts in self._same.values():
            self._tracker.log(record, artifacts)
