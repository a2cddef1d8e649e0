"""Where a sweep's results are kept for browsing: the seam, and its twin for tests."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from q3q.record import TrialRecord
from q3q.spec import TrialSpec


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What is known of a sweep before it runs.

    id: the same for the same set of trials. command: what a person types to get it again. config: composed, as YAML.
    """

    id: str
    name: str
    command: str
    config: str
    trials: tuple[TrialSpec, ...]


class Tracker(Protocol):
    """Written by one process, the sweep's driver. Records are on disk first: what a tracker cannot take is not lost."""

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

    def log(self, record: TrialRecord, artifacts: Mapping[str, bytes]) -> None:
        """Keep a trial's record and files (content by path) under the open sweep, in place of an earlier record of it.

        Raises:
            TrackingError: the store did not take it, after bounded retries. The same record may be logged again.
        """

    def close(self, artifacts: Mapping[str, bytes], succeeded: bool) -> None:
        """End the sweep's entry, with its files; a table for its front page is expected in `table.md`.

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

    def check(self) -> None:
        pass

    def open(self, sweep: Sweep) -> None:
        self.sweep, self.succeeded = sweep, None

    def log(self, record: TrialRecord, artifacts: Mapping[str, bytes]) -> None:
        self.records[record.spec.id] = record
        self.artifacts[record.spec.id] = dict(artifacts)

    def close(self, artifacts: Mapping[str, bytes], succeeded: bool) -> None:
        self.closing, self.succeeded = dict(artifacts), succeeded
