"""Run a trial exclusively; return its record if it is finished; log each step."""

import json
import os
import platform
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from q3q.environment import now
from q3q.errors import UNREADABLE
from q3q.evaluate.samples import damaged_files
from q3q.export.destination import forget_export, is_finished
from q3q.masking import masked
from q3q.placement import Trial
from q3q.record import COMPLETED, Progress, Report, TrialRecord, forget_progress, load_trial
from q3q.storage.aside import clear_for_file, clear_for_folder, put_aside, tell, telling
from q3q.storage.claim import Claim, ClaimStore, Holder, claimed, seen_holder_of
from q3q.storage.files import make_folder
from q3q.storage.mirror import Mirror, is_light, mirror_for
from q3q.storage.stores import StoreError, with_retries
from q3q.storage.uploader import uploading

CLAIM = "trial"  # the name of a trial's claim, in its folder
LOG = "trial.log"
# Errors of reading a file that is missing, torn, or another program's.


@dataclass(frozen=True)
class Attempt:
    """One process's turn at a trial.

    done: the trial's record, if it is done already
    report: receives every step; raises ClaimLostError if another process took the trial over,
        and whatever the driver's `report` raises
    end: receives the record once it is saved
    """

    done: TrialRecord | None
    report: Report
    end: Callable[[TrialRecord], None]


@contextmanager
def attempt(trial: Trial, report: Report) -> Iterator[Attempt]:
    """Hold the trial's claim; while another process holds it, wait and take its result."""
    log = TrialLog(trial.folder / LOG)

    def wait(holder: Holder) -> None:
        report(Progress(trial=trial.id, phase="wait", note=f"for {holder}, which runs it"))

    def remark(line: str) -> None:
        log.write(line)
        report(Progress(trial=trial.id, phase="note", remark=line))

    mirror = mirror_for(trial.placement.store)
    with telling(remark):
        clear_for_folder(trial.folder)
    with (
        telling(remark),
        claimed(claims_of(trial, mirror), CLAIM, wait) as claim,
        _mirrored(trial, mirror, claim),
    ):
        done, wish = finished_record(trial), trial.placement.fresh
        if done is not None and wish in (None, done.placement.fresh):
            yield Attempt(done, report, lambda record: None)
            return
        if wish not in (None, _wish_of_unfinished(trial)):
            forget_progress(trial)
            forget_export(trial)
        _put_aside_damage(trial)

        def checked_report(event: Progress) -> None:
            log.step(event)
            report(event)
            # Nothing after the record's step can be undone, so the store itself is asked then.
            claim.confirm() if event.phase == "record" else claim.check()

        log.write("start")
        try:
            yield Attempt(
                None,
                checked_report,
                lambda record: log.write(f"end {record.status} {record.reason}"),
            )
        except BaseException as error:  # asked to end, or the claim is lost
            log.write(f"stop {type(error).__name__}")
            raise


def claims_of(trial: Trial, mirror: Mirror | None) -> Path | ClaimStore:
    """Return where the trial is claimed: in its folder, or in its store's."""
    return trial.folder if mirror is None else mirror.claim_store(f"trials/{trial.id}")


@contextmanager
def _mirrored(trial: Trial, mirror: Mirror | None, claim: Claim) -> Iterator[None]:
    """Fetch from a store what others left of the trial, and upload what comes of it."""
    if mirror is None:
        yield
        return
    own, blocks = map(mirror.name_of, (trial.folder, trial.kept_blocks_folder))
    assert own is not None
    assert blocks is not None
    export = trial.placement.export
    exported = mirror.name_of(export) if trial.spec.export and export is not None else None
    mirror.pull(own)
    if exported is not None:
        mirror.pull(exported, only=is_light)
    done = finished_record(trial) is not None
    if not done:
        mirror.pull(blocks, *([] if exported is None else [exported]))
    with uploading(mirror, own, check_claim=claim.confirm) as uploader:
        yield
        if exported is not None and is_finished(trial):  # proved
            uploader.add(exported)


def running_quantizations(besides: Trial) -> set[str] | None:
    """Return the quantizations of the other trials of a storage that run, perhaps elsewhere.

    Returns:
        None if a running trial's spec cannot be read, as before it is sent to a store.

    Raises:
        StoreError: the store does not answer.
    """
    mirror = mirror_for(besides.placement.store)
    if mirror is not None:
        return _running_in_store(mirror, besides.id)
    running = set()
    for folder in {path.parent for path in besides.placement.trials.glob(f"*/{CLAIM}.claim.*")}:
        try:
            if folder != besides.folder and seen_holder_of(folder, CLAIM) is not None:
                running.add(load_trial(folder / "spec.json").spec.quantization_id)
        except UNREADABLE:
            return None
    return running


def _running_in_store(mirror: Mirror, besides: str) -> set[str] | None:
    names = with_retries(mirror.url, lambda: mirror.store.find("trials"))
    claims = (re.fullmatch(rf"trials/([^/]+)/{CLAIM}\.claim\.\d+", name) for name in names)
    running = set()
    # One that has a record may run again: fresh=true, or its export is damaged.
    for trial in {claim[1] for claim in claims if claim} - {besides}:
        if seen_holder_of(mirror.claim_store(f"trials/{trial}"), CLAIM) is not None:
            spec = f"trials/{trial}/spec.json"
            try:
                data = json.loads(with_retries(mirror.url, partial(mirror.store.read, spec)))
                running.add(Trial.from_json(data).spec.quantization_id)
            except StoreError:
                raise
            except UNREADABLE:
                return None
    return running


def finished_record(trial: Trial) -> TrialRecord | None:
    """Return a finished trial's record; None if it has not run, failed, or lost a file."""
    try:
        record = _own_record(trial)
    except UNREADABLE:
        return None
    done = record.status == COMPLETED and is_finished(trial)
    return record if done and not damaged_files(record.files, trial.folder) else None


def _own_record(trial: Trial) -> TrialRecord:
    """Read the trial's record; raise one of `UNREADABLE` if there is none."""
    record = TrialRecord.load(trial.folder / "record.json")
    # The identity of a record is recomputed, not read: a file in the wrong folder is no result.
    if record.spec.id != trial.id:
        raise ValueError(f"it is trial {record.spec.id}'s")
    return record


def _put_aside_damage(trial: Trial) -> None:
    """Put aside what stands in the way of a trial that is to run, and say what it lost."""
    clear_for_folder(trial.kept_blocks_folder)
    for folder in (trial.blocks_folder, trial.folder / "evaluations"):
        clear_for_folder(folder)
    path = trial.folder / "record.json"
    try:
        record = _own_record(trial)
    except FileNotFoundError:
        return
    except UNREADABLE as error:
        put_aside(path, f"cannot be read ({error})")
        return
    for name, problem in damaged_files(record.files, trial.folder).items():
        if os.path.lexists(file := trial.folder / name):
            put_aside(file, "is damaged")
        tell(f"The trial is measured again: {problem}")


def afresh(trial: Trial, since: str) -> Trial:
    """Return the trial as one that is to run from nothing, even if it is done (fresh=true).

    Args:
        since: names this wish, so that what comes of it counts as done.
    """
    return trial.placed(fresh=since)


def _wish_of_unfinished(trial: Trial) -> str | None:
    """Return the wish that the trial's unfinished state was made for."""
    try:
        return load_trial(trial.folder / "spec.json").placement.fresh
    except UNREADABLE:
        return None


class TrialLog:
    """A line for each step of a trial, over all its attempts: when, where, what.

    Each line is written at once, so that the last line of a process that died says where. A log
    that cannot be written stops no trial.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._last = ""

    def step(self, event: Progress) -> None:
        """Log a phase, one of its blocks, or a finished measurement; not each batch of it."""
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
            make_folder(self.path.parent)
            clear_for_file(self.path)
            with self.path.open("ab", buffering=0) as file:
                file.write(line.encode())
