"""The interface to the place where a sweep's results are browsed, and its double for tests."""

from collections.abc import Mapping
from typing import Protocol

from q3q.record import Sweep, TrialRecord
from q3q.spec import TrialSpec


class Tracker(Protocol):
    """A place for results, written by one process, the sweep's driver.

    Records are on disk first, so what a tracker refuses is not lost.
    """

    @property
    def page(self) -> str:
        """The open sweep's page, below the place's own address; empty if it has none."""
        ...

    def check(self) -> None:
        """Check, within about ten seconds, that results can be kept here.

        It starts no run, and a failed check leaves no file.

        Raises:
            TrackingError: they cannot; one line that names the place and says what to do.
        """

    def open(self, sweep: Sweep) -> None:
        """Begin the sweep's own entry, or resume that of an earlier sweep with the same id.

        Raises:
            TrackingError: the store cannot be used.
        """

    def live(self, spec: TrialSpec, metrics: Mapping[str, float], step: int) -> None:
        """Add metrics of a running trial to its entry, which `log` completes.

        Raises:
            TrackingError: the store refused them. Nothing is lost: the record will hold them.
        """

    def log(self, record: TrialRecord, artifacts: Mapping[str, bytes]) -> None:
        """Keep a trial's record and files under the open sweep; they replace its earlier ones.

        Args:
            artifacts: content by path.

        Raises:
            TrackingError: the store refused it, after bounded retries. It may be logged again.
            NotRegisteredError: it took all but a checkpoint that is damaged.
        """

    def close(self, artifacts: Mapping[str, bytes], succeeded: bool) -> None:
        """End the sweep's entry, with its files; its front page shows `ANSWER` among them.

        Raises:
            TrackingError: the store refused it.
        """


class MemoryTracker:
    """A tracker that keeps everything in plain attributes."""

    def __init__(self) -> None:
        self.sweep: Sweep | None = None
        self.records: dict[str, TrialRecord] = {}
        self.artifacts: dict[str, dict[str, bytes]] = {}
        self.closing: dict[str, bytes] = {}
        self.succeeded: bool | None = None
        self.steps: dict[str, list[tuple[int, dict[str, float]]]] = {}

    @property
    def page(self) -> str:
        return ""

    def check(self) -> None:
        pass

    def open(self, sweep: Sweep) -> None:
        self.sweep, self.succeeded = sweep, None

    def live(self, spec: TrialSpec, metrics: Mapping[str, float], step: int) -> None:
        self.steps.setdefault(spec.id, []).append((step, dict(metrics)))

    def log(self, record: TrialRecord, artifacts: Mapping[str, bytes]) -> None:
        self.records[record.spec.id] = record
        self.artifacts[record.spec.id] = dict(artifacts)

    def close(self, artifacts: Mapping[str, bytes], succeeded: bool) -> None:
        self.closing, self.succeeded = dict(artifacts), succeeded
