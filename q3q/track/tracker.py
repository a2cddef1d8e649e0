"""The interface to the place where a sweep's results are browsed."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Protocol

from q3q.masking import masked
from q3q.quoting import module
from q3q.record import Sweep, TrialRecord
from q3q.spec import TrialSpec

DEFAULT_STORAGE = "mlruns"


def sync_command(storage: str = DEFAULT_STORAGE, uri: str | None = None) -> str:
    """Return the command that brings a tracker up to date from the records on disk.

    Args:
        storage: folder or URL, as the user gave it.
        uri: the tracker's, if it is not the storage's own.
    """
    other = [] if uri is None else ["--uri", masked(uri)]
    return module("q3q.track", "sync", "--storage", masked(storage), *other)


class Tracker(Protocol):
    """A place for results, written by one process, the sweep's driver.

    Records are on disk first, so what a tracker refuses is not lost.

    sync: the command that sends it what it missed
    """

    sync: str

    @property
    def page(self) -> str:
        """The open sweep's page, below the place's own address; empty if it has none."""

    def remarks(self) -> list[str]:
        """Return what a person should know of the calls since the last time: each line once.

        That is which names had to be changed, say.
        """

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
            NotRegisteredError: it took all but a checkpoint that is damaged.
            RefusedByTrackerError: the store refused this record, but works.
            TrackingError: the store does not work, after bounded retries. It may be logged again.
        """

    def close(
        self,
        artifacts: Mapping[str, bytes],
        succeeded: bool,
        headline: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """End the sweep's entry, with its files; its front page shows `ANSWER` among them.

        Args:
            headline: the numbers that answer the sweep's question, by name.

        Raises:
            TrackingError: the store refused it.
        """
