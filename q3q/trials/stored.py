"""The trials that a storage folder knows of: their states, sizes, and what they wait for."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from q3q.attempt import CLAIM
from q3q.crash import TRACEBACK_AT
from q3q.errors import UNREADABLE, ConfigError
from q3q.evaluate.samples import damaged_files
from q3q.export.destination import export_fault, is_ours, partial_path
from q3q.export.marker import disk_bytes
from q3q.formatting import bytes_in_words
from q3q.masking import masked
from q3q.names import trial_names
from q3q.placement import Trial
from q3q.quoting import module
from q3q.record import Sweep, TrialRecord, load_trial
from q3q.report.records import RECORDS, all_sweeps
from q3q.storage.block_cache import stored_blocks
from q3q.storage.claim import holder_of
from q3q.storage.files import bytes_below
from q3q.storage.mirror import Mirror, mirror_at
from q3q.storage.mirrored_blocks import block_cache_of
from q3q.storage.status import SweepStatus, at_work
from q3q.storage.stores import is_url
from q3q.storage.uploader import DRIVER_SECONDS

STATES = ("completed", "failed", "running", "stopped", "waiting", "unknown")
LIST_ORDER = ("running", "waiting", "stopped", "failed", "unknown", "completed")
NOT_TRIALS = ("blocks", "digests")  # folders beside the trials'


@dataclass(frozen=True, kw_only=True)
class StoredTrial:
    """A trial that storage knows of.

    size: bytes on disk, kept blocks and export included
    waits: for what, in words
    trial: None if its files cannot be read
    sweep: the newest that has the trial
    """

    id: str
    name: str
    state: str
    size: int
    waits: str
    trial: Trial | None
    sweep: Sweep | None

    @property
    def checkpoint(self) -> Path | None:
        """The folder of its finished export, if it is here."""
        path = None if self.trial is None else self.trial.placement.export
        return path if path is not None and path.is_dir() else None


def find_trials(storage: Path, named: str = "") -> list[StoredTrial]:
    """Return every trial with a folder or a place in a sweep, running and waiting ones first.

    Args:
        named: the storage as the user called it: a URL's folder is its mirror.

    Raises:
        ConfigError: nothing was ever stored there.
    """
    if not storage.is_dir():
        raise ConfigError(
            f"--storage {named or storage} is not a folder: give the one that the sweep was "
            "started with"
        )
    sweeps = all_sweeps(storage)[0]
    owner = {trial.id: sweep for sweep in sweeps for trial in sweep.trials}
    planned = {trial.id: trial for sweep in sweeps for trial in sweep.trials}
    folder = storage / "trials"
    ids = [path.name for path in sorted(folder.glob("*/")) if path.name not in NOT_TRIALS]
    running = running_sweeps(storage, mirror_at(named))
    stored = [
        _stored(folder / name, planned.get(name), owner.get(name), running, named)
        for name in dict.fromkeys([*ids, *planned])
    ]
    names = trial_names([entry.trial.spec for entry in stored if entry.trial is not None])
    stored = [replace(entry, name=names.get(entry.id, entry.name)) for entry in stored]
    return sorted(stored, key=lambda trial: (LIST_ORDER.index(trial.state), trial.name, trial.id))


def running_sweeps(storage: Path, mirror: Mirror | None) -> list[SweepStatus]:
    """Return sweeps that go on; in a mirror, their status files take longer to arrive."""
    if mirror is None:
        return at_work(storage)
    return at_work(storage, partial(mirror.pull, "running"), 3 * DRIVER_SECONDS)


def chosen(
    trials: Sequence[StoredTrial], which: Iterable[str], states: Sequence[str]
) -> list[StoredTrial]:
    """Return trials by id, or all in a state.

    Raises:
        ConfigError: there is no such trial, or it is running.
    """
    selected: dict[str, StoredTrial] = {}
    for word in which:
        fitting = [
            trial
            for trial in trials
            if trial.id == word or (word in states and trial.state == word)
        ]
        if not fitting and word not in states:
            raise ConfigError(
                f"{word} is no trial's id, nor one of {', '.join(states)}: python -m q3q.trials "
                "lists them"
            )
        for trial in fitting:
            if trial.state == "running":
                raise ConfigError(
                    f"{trial.id} ({trial.name}) runs in a sweep ({trial.waits}): stop that first"
                )
            selected[trial.id] = trial
    return list(selected.values())


def listed(trials: Sequence[StoredTrial], storage: str | Path, folder: Path | None = None) -> str:
    """Return a line for each trial, one for its checkpoint if it exported one, and one for all.

    Args:
        folder: of this machine, where a storage that is a URL lies.
    """
    folder = Path(storage) if folder is None else folder
    if not trials:
        return f"No trials in {storage}."
    width = max(len(trial.name) for trial in trials)
    lines = [f"{'trial':10}  {'what':{width}}  {'state':9}  {'on disk':>8}  waits for"]
    for trial in trials:
        size = bytes_in_words(trial.size)
        line = f"{trial.id:10}  {trial.name:{width}}  {trial.state:9}  {size:>8}  {trial.waits}"
        lines.append(line.rstrip())
        if trial.checkpoint is not None and trial.state == "completed":
            taken, place = bytes_in_words(disk_bytes(trial.checkpoint)), str(trial.checkpoint)
            if is_url(str(storage)):
                place = place.replace(str(folder), str(storage).rstrip("/"), 1)
            lines.append(f"{'':10}  its checkpoint, {taken}: {place}")
    counts = {state: sum(trial.state == state for trial in trials) for state in STATES}
    states = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
    total = bytes_in_words(bytes_below(folder))
    lines.append(f"{states}. {folder} takes {total} in all, shared files included.")
    if kept := block_cache_of(storage if is_url(str(storage)) else folder).describe():
        lines.append(kept)
    return "\n".join(lines)


def exports_of(trial: Trial) -> list[Path]:
    """Return what a trial exported, finished or not, wherever it is."""
    path = trial.placement.export
    if path is None:
        return []
    return [folder for folder in (path, partial_path(path)) if is_ours(folder, trial.spec)]


def _stored(
    folder: Path,
    planned: Trial | None,
    sweep: Sweep | None,
    running: Sequence[SweepStatus],
    named: str,
) -> StoredTrial:
    trial, record = _read(folder)
    trial = trial or (planned and planned.moved(folder.absolute().parent.parent))
    if trial is None or trial.id != folder.name:
        return StoredTrial(
            id=folder.name,
            name="?",
            state="unknown",
            size=bytes_below(folder),
            waits="another version of q3q made it, or its files are damaged; nothing will use it",
            trial=None,
            sweep=None,
        )
    if is_url(named):
        trial = trial.placed(store=named.rstrip("/"))
    state, waits = _state(trial, folder, record, sweep, running, named)
    folders = [folder, trial.kept_blocks_folder, *exports_of(trial)]
    return StoredTrial(
        id=trial.id,
        name=trial.spec.label,
        state=state,
        size=sum(map(bytes_below, folders)),
        waits=waits,
        trial=trial,
        sweep=sweep,
    )


def _state(
    trial: Trial,
    folder: Path,
    record: TrialRecord | None,
    sweep: Sweep | None,
    running: Sequence[SweepStatus],
    named: str,
) -> tuple[str, str]:
    """Return a trial's state and what it waits for."""
    works = [work for status in running for work in status.view.running]
    doing = next((work.doing for work in works if work.trial == trial.id), None)
    holder = holder_of(folder, CLAIM)
    # A trial resumed by hand, say. A holder on another machine may be dead or not.
    if doing is None and holder is not None and holder.dead() is False:
        doing = str(holder)
    if doing is not None:
        return "running", doing
    command = masked(sweep.command) if sweep is not None else None
    waits_in_sweep = any(status.command == command for status in running)
    storage = named or str(trial.placement.trials.parent)
    again = command or module("q3q.trials", "--storage", storage, "resume", trial.id)
    after = "its turn in the running sweep" if waits_in_sweep else again
    if record is not None and record.completed:
        if lost := _lost(trial, folder, record):
            return "stopped", f"{lost}: {after}"
        return "completed", _completed_waits(trial, folder, record)
    if record is not None:
        return "failed", f"{_shortened(record.reason)}; then {after}"
    if folder.is_dir() and not waits_in_sweep:
        blocks = stored_blocks(folder / "blocks", trial.kept_blocks_folder)
        return "stopped", f"{f'to go on at block {blocks}: ' if blocks else ''}{after}"
    return "waiting", after


def _lost(trial: Trial, folder: Path, record: TrialRecord) -> str:
    """Return what of a finished trial is to be made again, and why; empty if nothing is."""
    if damaged := damaged_files(record.files, folder):
        return f"to be measured again, as {next(iter(damaged.values()))}"
    if trial.placement.export is not None and (fault := export_fault(trial)) is not None:
        return f"its export to be made again ({fault})"
    return ""


def _completed_waits(trial: Trial, folder: Path, record: TrialRecord) -> str:
    baseline = trial.placement.baseline
    waits = baseline is not None and not record.comparisons
    if waits and not (folder.parent / str(baseline) / "record.json").is_file():
        return f"method=none ({baseline}), to be compared with"
    return ""


def _read(folder: Path) -> tuple[Trial | None, TrialRecord | None]:
    """Return the trial that a folder holds, and the record that counts."""
    for name in RECORDS:
        try:
            record = TrialRecord.load(folder / name)
        except UNREADABLE:
            continue
        return record.trial, record
    try:
        return load_trial(folder / "spec.json"), None
    except UNREADABLE:
        return None, None


def _shortened(reason: str) -> str:
    line = " ".join(reason.split())
    words, mark, file = line.rpartition(TRACEBACK_AT)
    words = words if mark else line
    return (words if len(words) <= 100 else f"{words[:99]}…") + (mark + file if mark else "")
