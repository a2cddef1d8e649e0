"""A tracker for tests."""

from collections.abc import Mapping
from types import MappingProxyType

from q3q.record import Sweep, TrialRecord
from q3q.spec import TrialSpec
from q3q.track.tracker import sync_command


class MemoryTracker:
    """A tracker that keeps everything in plain attributes."""

    def __init__(self) -> None:
        self.sync = sync_command()
        self.sweep: Sweep | None = None
        self.records: dict[str, TrialRecord] = {}
        self.artifacts: dict[str, dict[str, bytes]] = {}
        self.closing: dict[str, bytes] = {}
        self.succeeded: bool | None = None
        self.headline: dict[str, float] = {}
        self.steps: dict[str, list[tuple[int, dict[str, float]]]] = {}

    @property
    def page(self) -> str:
        return ""

    def remarks(self) -> list[str]:
        return []

    def check(self) -> None:
        pass

    def open(self, sweep: Sweep) -> None:
        self.sweep, self.succeeded = sweep, None

    def live(self, spec: TrialSpec, metrics: Mapping[str, float], step: int) -> None:
        self.steps.setdefault(spec.id, []).append((step, dict(metrics)))

    def log(self, record: TrialRecord, artifacts: Mapping[str, bytes]) -> None:
        self.records[record.spec.id] = record
        self.artifacts[record.spec.id] = dict(artifacts)

    def close(
        self,
        artifacts: Mapping[str, bytes],
        succeeded: bool,
        headline: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        self.closing, self.succeeded, self.headline = dict(artifacts), succeeded, dict(headline)
