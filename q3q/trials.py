"""`python -m q3q.trials`: what a storage folder holds; resume, delete, or watch from a second terminal."""

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from q3q.attempt import CLAIM
from q3q.errors import ConfigError, Q3QError
from q3q.export.destination import is_ours, partial_path
from q3q.masking import masked
from q3q.record import Sweep, TrialRecord, kept_blocks_folder, load_spec, moved, trial_folder
from q3q.report.records import RECORDS, all_sweeps
from q3q.spec import TrialSpec
from q3q.storage.claim import Claim, Holder, claim_or_refuse, holder_of
from q3q.storage.mirror import DRIVER_SECONDS, Mirror, mirror_at, refreshed
from q3q.storage.status import LOOK_SECONDS, SILENT_SECONDS, SweepStatus, at_work, sweep_statuses
from q3q.storage.stores import folder_of, is_url
from q3q.sweep.progress import Screen, count, headline, picture

FAILED, MISUSED, INTERRUPTED = 1, 2, 130
STATES = ("completed", "failed", "running", "stopped", "waiting", "unknown")
NOT_TRIALS = ("blocks", "digests")  # folders beside the trials'


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A trial that storage knows of. size: bytes on disk, kept blocks and export included. waits: for what, for
    people."""

    id: str
    name: str
    state: str
    size: int
    waits: str
    spec: TrialSpec | None


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module's first line. Returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m q3q.trials", description=__doc__, allow_abbrev=False
    )
    parser.add_argument(
        "--storage", default="mlruns", metavar="DIR", help="or a URL; default: mlruns"
    )
    verbs = parser.add_subparsers(
        dest="verb", metavar="list | resume | delete | attach", title="what to do"
    )
    listing = verbs.add_parser(
        "list", help="every trial: state, size on disk, what it waits for (the default)"
    )
    listing.add_argument(
        "state", nargs="*", choices=[*STATES, []], help="only trials in these states"
    )
    resume = verbs.add_parser(
        "resume", help="go on with trials here, at the block where they stopped"
    )
    resume.add_argument("which", nargs="+", metavar="ID|failed|stopped")
    delete = verbs.add_parser(
        "delete", help="delete all that trials left on disk; MLflow keeps what it has"
    )
    delete.add_argument("which", nargs="+", metavar="ID|failed|stopped|unknown")
    attach = verbs.add_parser(
        "attach", help="watch a sweep that runs in another terminal or on another machine"
    )
    attach.add_argument("sweep", nargs="?", help="its name; without it the one that runs")
    given = parser.parse_args(arguments)
    try:
        storage = refreshed(given.storage)
        if given.verb == "attach":
            return watch(storage, given.sweep, mirror_at(given.storage))
        trials = find_trials(storage, given.storage)
        if given.verb == "resume":
            return go_on(chosen(trials, given.which, ("failed", "stopped")), print)
        if given.verb == "delete":
            delete_trials(
                chosen(trials, given.which, ("failed", "stopped", "unknown")),
                trials,
                given.storage,
                print,
            )
            return 0
        wanted = getattr(given, "state", None) or STATES
        print(listed([trial for trial in trials if trial.state in wanted], given.storage, storage))
    except Q3QError as error:
        print(f"q3q: {masked(str(error))}", file=sys.stderr)
        return MISUSED
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


# ---------------------------------------------------------------------------------------------- what is there


def find_trials(storage: Path, named: str = "") -> list[Trial]:
    """Every trial with a folder, or with a place in a sweep that was started; those at work and waiting first.

    named: what the storage was called, if not by its folder: a URL's is its mirror.

    Raises:
        ConfigError: nothing was ever stored there.
    """
    if not storage.is_dir():
        raise ConfigError(
            f"--storage {named or storage} is not a folder: give the one that the sweep was started with"
        )
    sweeps = all_sweeps(storage)[0]
    owner = {spec.id: sweep for sweep in sweeps for spec in sweep.trials}
    planned = {spec.id: spec for sweep in sweeps for spec in sweep.trials}
    folder = storage / "trials"
    ids = [path.name for path in sorted(folder.glob("*/")) if path.name not in NOT_TRIALS]
    going = sweeps_at_work(storage, mirror_at(named))
    found = [
        _trial(folder / name, planned.get(name), owner.get(name), going, named)
        for name in dict.fromkeys([*ids, *planned])
    ]
    order = ("running", "waiting", "stopped", "failed", "unknown", "completed")
    return sorted(found, key=lambda trial: (order.index(trial.state), trial.name, trial.id))


def sweeps_at_work(storage: Path, mirror: Mirror | None) -> list[SweepStatus]:
    """See `at_work`. mirror: of a storage that is a URL, where a sweep's word takes longer to arrive."""
    if mirror is None:
        return at_work(storage)
    return at_work(storage, partial(mirror.pull, "running"), 3 * DRIVER_SECONDS)


def _trial(
    folder: Path,
    planned: TrialSpec | None,
    sweep: Sweep | None,
    going: Sequence[SweepStatus],
    named: str,
) -> Trial:
    spec, record = _read(folder)
    spec = spec or (planned and moved(planned, folder.absolute().parent.parent))
    if spec is None or spec.id != folder.name:
        about = "another version of q3q made it, or its files are damaged; nothing will use it"
        return Trial(
            id=folder.name, name="?", state="unknown", size=_size(folder), waits=about, spec=None
        )
    state, waits = _state(spec, folder, record, sweep, going)
    if is_url(named):
        spec = spec.with_places({**spec.places, "store": named.rstrip("/")})
    return Trial(
        id=spec.id,
        name=f"{spec.name} · {spec.model.get('name')}",
        state=state,
        size=sum(map(_size, [folder, kept_blocks_folder(spec), *exports_of(spec)])),
        waits=waits,
        spec=spec,
    )


def _state(
    spec: TrialSpec,
    folder: Path,
    record: TrialRecord | None,
    sweep: Sweep | None,
    going: Sequence[SweepStatus],
) -> tuple[str, str]:
    """In which state a trial is, and what it waits for."""
    for bulletin in going:
        for work in bulletin.view.running:
            if work.trial == spec.id:
                return "running", work.doing
    holder = holder_of(folder, CLAIM)
    if (
        holder is not None and holder.dead() is False
    ):  # resumed by hand, say; of one elsewhere a look cannot tell
        return "running", str(holder)
    again = masked(sweep.command) if sweep is not None else f"python -m q3q.trials resume {spec.id}"
    coming = any(sweep is not None and one.command == masked(sweep.command) for one in going)
    after = "its turn in the running sweep" if coming else again
    if record is not None and record.completed:
        baseline = spec.places.get("baseline")
        lacks = (
            baseline
            and not record.comparisons
            and not (folder.parent / baseline / "record.json").is_file()
        )
        return "completed", f"method=none ({baseline}), to be compared with" if lacks else ""
    if record is not None:
        return "failed", f"{_brief(record.reason)}; then {after}"
    if folder.is_dir() and not coming:
        blocks = len(list((folder / "blocks").glob("block_*.json")))
        return "stopped", f"{f'to go on at block {blocks}: ' if blocks else ''}{after}"
    return "waiting", after


def _read(folder: Path) -> tuple[TrialSpec | None, TrialRecord | None]:
    """What the folder says its trial is, and the record that counts."""
    for name in RECORDS:
        try:
            record = TrialRecord.load(folder / name)
        except (OSError, ValueError, KeyError, TypeError, Q3QError):
            continue
        return record.spec, record
    try:
        return load_spec(folder / "spec.json"), None
    except (OSError, ValueError, KeyError, TypeError, Q3QError):
        return None, None


def _size(folder: Path) -> int:
    """Bytes of all files under a folder. A file that goes away meanwhile counts as none."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += 0 if path.is_symlink() or path.is_dir() else path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def listed(trials: Sequence[Trial], storage: str | Path, folder: Path | None = None) -> str:
    """A line per trial, and one for all. folder: where a storage that is a URL lies here."""
    folder = Path(storage) if folder is None else folder
    if not trials:
        return f"No trials in {storage}."
    width = max(len(trial.name) for trial in trials)
    lines = [
        f"{trial.id:10}  {trial.name:{width}}  {trial.state:9}  {_bytes(trial.size):>8}  {trial.waits}".rstrip()
        for trial in trials
    ]
    states = [
        f"{number} {state}"
        for state in STATES
        if (number := sum(one.state == state for one in trials))
    ]
    head = f"{'trial':10}  {'what':{width}}  {'state':9}  {'on disk':>8}  waits for"
    return "\n".join(
        [
            head,
            *lines,
            f"{', '.join(states)}; {_bytes(_size(folder))} in {folder} with all else there",
        ]
    )


def chosen(trials: Sequence[Trial], which: Iterable[str], states: Sequence[str]) -> list[Trial]:
    """Trials by id, or all that are in a state.

    Raises:
        ConfigError: no such trial, or it is at work.
    """
    found: dict[str, Trial] = {}
    for word in which:
        fitting = [
            trial
            for trial in trials
            if trial.id == word or (word in states and trial.state == word)
        ]
        if not fitting and word not in states:
            raise ConfigError(
                f"{word} is no trial's id, nor one of {', '.join(states)}: python -m q3q.trials lists them"
            )
        for trial in fitting:
            if trial.state == "running":
                raise ConfigError(
                    f"{trial.id} ({trial.name}) is at work in a running sweep ({trial.waits}): stop that first"
                )
            found[trial.id] = trial
    return list(found.values())


# ---------------------------------------------------------------------------------------------- what is done


def delete_trials(
    which: Sequence[Trial],
    trials: Sequence[Trial],
    storage: str | Path,
    say: Callable[[str], object],
) -> None:
    """Delete their folders and exports, and of kept blocks, and of what drift is measured against, those that no other
    trial has use for; here and, of a URL, there.

    Raises:
        ConfigError: one of them is at work, on another machine perhaps; those before it are deleted.
    """
    going = {trial.id for trial in which}
    folder, mirror = folder_of(str(storage)), mirror_at(str(storage))
    staying = [trial.spec for trial in trials if trial.spec is not None and trial.id not in going]
    for trial in which:
        folders = [folder / "trials" / trial.id]
        if trial.spec is not None:
            folders += exports_of(trial.spec)
            if all(trial.spec.quantization_id != other.quantization_id for other in staying):
                folders.append(kept_blocks_folder(trial.spec))
            used = {one for other in staying for one in baselines_of(other, folder)}
            folders += [one for one in baselines_of(trial.spec, folder) if one not in used]
        freed = sum(map(_size, folders))
        board = None if mirror is None else mirror.board(f"trials/{trial.id}")
        claim = Claim(board or folders[0], CLAIM)
        if folders[0].exists():
            claim_or_refuse(claim, partial(_at_work, trial), say)
        if mirror is not None:
            for name in filter(None, map(mirror.name_of, folders)):
                mirror.remove(name)
        for one in filter(Path.exists, folders):
            shutil.rmtree(one)
        claim.release()
        if board is not None:
            board.clear()
        say(f"{trial.id} {trial.name}: deleted, {_bytes(freed)}")
    if not which:
        say("Nothing to delete.")


def exports_of(spec: TrialSpec) -> list[Path]:
    """What a trial exported, finished or not, wherever it is."""
    if "export" not in spec.places:
        return []
    path = Path(spec.places["export"])
    return [one for one in (path, partial_path(path)) if is_ours(one, spec)]


def baselines_of(spec: TrialSpec, storage: Path) -> list[Path]:
    """Entries that a trial's drift is measured against: of its model, on one of its texts."""
    if spec.evaluation.get("drift") is None:
        return []
    model = {key: value for key, value in spec.model.items() if key != "name"}
    texts, found = {text["digest"] for text in spec.evaluation["texts"]}, []
    for path in (storage / "baselines").glob("*/manifest.json"):
        with suppress(
            OSError, ValueError, KeyError, TypeError
        ):  # damaged, and made anew by whoever needs it
            identity = json.loads(path.read_text(encoding="utf-8"))["body"]["identity"]
            if identity["model"] == model and identity["text"] in texts:
                found.append(path.parent)
    return found


def _at_work(trial: Trial, holder: Holder) -> ConfigError:
    return ConfigError(f"{trial.id} ({trial.name}) is at work: {holder}. Stop that first")


def go_on(which: Sequence[Trial], say: Callable[[str], object]) -> int:
    """Run trials here, one after the other, each from where it stopped. Returns the exit code."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when lm-eval is imported
    from q3q.trial import attempt_trial

    failed = 0
    for trial in which:
        if trial.spec is None:
            raise ConfigError(f"{trial.id}: {trial.waits}")
        if trial.state == "completed":
            say(f"{trial.id} {trial.name}: is done already")
            continue
        (trial_folder(trial.spec) / "failed.json").unlink(missing_ok=True)
        record = attempt_trial(alone(trial.spec))
        failed += not record.completed
        end = ", ".join(headline(record)) if record.completed else f"FAILED: {record.reason}"
        say(f"{trial.id} {trial.name}: {end}")
    if which:
        say(
            "Records are on disk; the next sweep with these trials, or python -m q3q.track sync, tells MLflow."
        )
    else:
        say("Nothing to resume.")
    return FAILED if failed else 0


def alone(spec: TrialSpec) -> TrialSpec:
    """The trial as one process runs it, on whatever there is here: without the share that another had of it."""
    places = {key: value for key, value in spec.places.items() if key != "share"}
    if places.get("loader") == "sharded":
        del places["loader"]
    return spec.with_places(places)


def watch(storage: Path, name: str | None, mirror: Mirror | None = None) -> int:
    """Show a running sweep until it ends: a live picture on a terminal, else its lines as they come.

    mirror: of a storage that is a URL, asked every DRIVER_SECONDS.

    Returns:
        0 when the sweep is over; 1 if it vanished (its machine or process died).

    Raises:
        ConfigError: none runs, or none of that name, or it is not clear which.
    """
    known = [one for one in sweep_statuses(storage) if name in (None, one.name)]
    going = [one for one in sweeps_at_work(storage, mirror) if name in (None, one.name)]
    if not going:
        last = (
            f" The last one, {known[0].name}, {'has ended' if known[0].over else 'died'}."
            if known
            else ""
        )
        raise ConfigError(
            f"no sweep{f' named {name}' if name else ''} runs with storage={storage}.{last}"
        )
    if len({one.name for one in going}) > 1:
        raise ConfigError(
            f"several sweeps run there, name one: {', '.join(sorted(one.name for one in going))}"
        )
    path, shown = storage / "running" / f"{going[0].key}.json", going[0]
    print(
        f"{shown.name} on {shown.holder.host}, process {shown.holder.pid}: {shown.command}",
        flush=True,
    )
    latest = {"bulletin": shown}
    screen = _screen(latest) if sys.stdout.isatty() else None
    said, asked, heard = 0, time.monotonic(), time.monotonic()
    try:
        while True:
            for number, line in shown.lines:
                if number > said:
                    screen.say(line) if screen else print(line, flush=True)
                    said = number
            lives = shown.lives()
            if lives is False or (lives is None and time.monotonic() - heard > SILENT_SECONDS):
                break
            time.sleep(LOOK_SECONDS)
            if mirror is not None and time.monotonic() - asked > DRIVER_SECONDS:
                mirror.pull("running")
                asked = time.monotonic()
            before = shown.updated
            with suppress(
                OSError, ValueError, KeyError, TypeError
            ):  # gone, or not there whole: that is silence too
                shown = latest["bulletin"] = SweepStatus.load(path)
            heard = heard if shown.updated == before else time.monotonic()
    finally:
        if screen is not None:
            screen.close()
    print(
        f"{shown.name}: {count(shown.view)}; {'it has ended' if shown.over else 'it died, the same command goes on'}"
    )
    return 0 if shown.over else FAILED


def _screen(latest: Mapping[str, SweepStatus]) -> Screen:
    return Screen(
        sys.stdout, lambda *size: picture(latest["bulletin"].view, *size), lambda error: None
    )


def _brief(reason: str) -> str:
    line = " ".join(reason.split())
    return line if len(line) <= 100 else f"{line[:99]}…"


def _bytes(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


if __name__ == "__main__":
    sys.exit(main())
