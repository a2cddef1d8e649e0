"""Where a sweep's results are kept for browsing: the seam, and its twin for tests."""

from collections.abc import Mapping
from typing import Protocol

from q3q.record import Sweep, TrialRecord
from q3q.spec import TrialSpec


class Tracker(Protocol):
    """Written by one process, the sweep's driver. Records are on disk first: what a tracker cannot take is not lost."""

    @property
    def page(self) -> str:
        """Where a person looks at the open sweep, below the place's own address; empty if there is nothing to see."""
        ...

    def check(self) -> None:
        """See that results can be kept here, within about ten seconds; no run is made, a failed check leaves no file.

        Raises:
            TrackingError: they cannot; one line that names the place and says what to do.
        """

    def open(self, sweep: Sweep) -> None:
        """Begin the sweep's own entry, or go on in the one that an earlier sweep of the same id began.

        Raises:
            TrackingError: the store cannot be used.
        """

    def live(self, spec: TrialSpec, metrics: Mapping[str, float], step: int) -> None:
        """Keep what is known of a trial at work, so that its charts move; `log` goes on in the same entry.

        Raises:
            TrackingError: the store did not take it. Nothing is lost: its record will hold it.
        """

    def log(self, record: TrialRecord, artifacts: Mapping[str, bytes]) -> None:
        """Keep a trial's record and files (content by path) under the open sweep, in place of an earlier record of it.

        Raises:
            TrackingError: the store did not take it, after bounded retries. The same record may be logged again.
        """

    def close(self, artifacts: Mapping[str, bytes], succeeded: bool) -> None:
        """End the sweep's entry, with its files; `ANSWER` among them is for its front page.

        Raises:
            TrackingError: the store did not take it.
        """


class MemoryTracker:
    """Keeps everything in plain attributes."""

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
