"""An attempt at a trial: alone at it, never at one that is done, and with a log of what it came to."""

import os
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from q3q.environment import now
from q3q.errors import Q3QError
from q3q.export.destination import forget_export, is_finished
from q3q.masking import masked
from q3q.record import (
    COMPLETED,
    Progress,
    TrialRecord,
    forget_progress,
    kept_blocks_folder,
    load_spec,
    trial_folder,
)
from q3q.spec import TrialSpec
from q3q.storage.claim import Board, Claim, Holder, claimed
from q3q.storage.mirror import Mirror, is_light, mirror_for, uploading

CLAIM = "trial"  # the name of a trial's claim, in its folder
LOG = "trial.log"

Report = Callable[[Progress], None]


@dataclass(frozen=True)
class Attempt:
    """done: the trial's record if it is done already. tell: to be told of every step; raises ClaimLostError if another
    process took this trial over, and what `report` raises. end: to be told of the record, once it is saved."""

    done: TrialRecord | None
    tell: Report
    end: Callable[[TrialRecord], None]


@contextmanager
def attempt(spec: TrialSpec, report: Report) -> Iterator[Attempt]:
    """Be the only one that runs the trial; wait while another does, and take its result."""
    folder = trial_folder(spec)
    log = TrialLog(folder / LOG)

    def wait(holder: Holder) -> None:
        report(Progress(trial=spec.id, phase="wait", note=f"for {holder}, which runs it"))

    mirror = mirror_for(spec.places)
    with claimed(claims_of(spec, mirror), CLAIM, wait) as claim, _mirrored(spec, mirror, claim):
        done = finished_record(spec)
        if done is not None and _fresh(spec) in (None, _fresh(done.spec)):
            yield Attempt(done, report, lambda record: None)
            return
        if _fresh(spec) not in (None, _begun(spec)):
            forget_progress(spec)
            forget_export(spec)

        def tell(event: Progress) -> None:
            log.step(event)
            report(event)
            # What follows a record's step cannot be undone, so the board is asked; else the last beat will do.
            claim.confirm() if event.phase == "record" else claim.check()

        log.write("start")
        try:
            yield Attempt(
                None, tell, lambda record: log.write(f"end {record.status} {record.reason}")
            )
        except BaseException as error:  # asked to end, or no longer ours: it says so and goes
            log.write(f"stop {type(error).__name__}")
            raise


def claims_of(spec: TrialSpec, mirror: Mirror | None) -> Path | Board:
    """Where the trial is claimed: in its folder, or in its store's."""
    return trial_folder(spec) if mirror is None else mirror.board(f"trials/{spec.id}")


@contextmanager
def _mirrored(spec: TrialSpec, mirror: Mirror | None, claim: Claim) -> Iterator[None]:
    """With a store as storage: have here what others left of the trial, and bring what comes of it there."""
    if mirror is None:
        yield
        return
    names = [mirror.name_of(folder) for folder in (trial_folder(spec), kept_blocks_folder(spec))]
    mine, kept = (name for name in names if name is not None)
    exported = mirror.name_of(Path(spec.places["export"])) if spec.export is not None else None
    mirror.pull(mine)
    if exported is not None:
        mirror.pull(exported, only=is_light)
    others = [kept, *([] if exported is None else [exported])]
    done = finished_record(spec) is not None
    mirror.pull(*([] if done else others))
    with uploading(mirror, mine, *([] if done else [kept]), sure=claim.confirm) as courier:
        yield
        if exported is not None and is_finished(spec):  # proved
            courier.add(exported)


def finished_record(spec: TrialSpec) -> TrialRecord | None:
    """The record of a trial that is done already, or None: not run, failed, not readable, or its export is gone."""
    path = trial_folder(spec) / "record.json"
    try:
        record = TrialRecord.load(path)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    # The identity of a record is recomputed, not read: a file in the wrong folder is nobody's result.
    done = record.status == COMPLETED and record.spec.id == spec.id and is_finished(spec)
    return record if done else None


def afresh(spec: TrialSpec, since: str) -> TrialSpec:
    """The spec of a trial that is to run from nothing, even if it is done (fresh=true). since: a name for this wish, so
    that what comes of it counts as done."""
    return spec.with_places({**spec.places, "fresh": since})


def _fresh(spec: TrialSpec) -> str | None:
    found: str | None = spec.places.get("fresh")
    return found


def _begun(spec: TrialSpec) -> str | None:
    """For which wish the trial's unfinished state was made."""
    try:
        planned = load_spec(trial_folder(spec) / "spec.json")
    except (OSError, ValueError, KeyError, TypeError, Q3QError):
        return None
    return _fresh(planned)


class TrialLog:
    """A line for each step of a trial, over all its attempts: when, where, what. Written at once, so that the last line
    of a process that died says where. Never in a trial's way: what cannot be written is left out."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._last = ""

    def step(self, event: Progress) -> None:
        """A phase, one of its blocks, or a measurement that is there; not each batch of it."""
        words = f"{event.phase} {event.note}".rstrip()
        if event.phase == "quantize" and event.total:
            words += f" {event.done} of {event.total} blocks"
        elif event.metrics:
            words += ", done"
        if words != self._last:
            self._last = words
            self.write(words)

    def write(self, words: str) -> None:
        line = f"{now()} {platform.node()} {os.getpid()} {' '.join(masked(words).split())}\n"
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab", buffering=0) as file:
                file.write(line.encode())
