"""Delete what trials left on disk, but nothing that other trials still use."""

import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from q3q.attempt import CLAIM
from q3q.data.prepared import FOLDER as PREPARED
from q3q.data.prepared import kept_identities
from q3q.data.traces import FOLDER as TRACES
from q3q.data.traces import traces_identity, traces_of
from q3q.errors import UNREADABLE, ConfigError
from q3q.evaluate.identities import prepared_identities, says_all_of
from q3q.formatting import bytes_in_words
from q3q.placement import Trial
from q3q.spec import Json
from q3q.storage.claim import Claim, Holder, claim_or_refuse
from q3q.storage.files import bytes_below
from q3q.storage.mirror import mirror_at
from q3q.storage.stores import folder_of
from q3q.trials.stored import StoredTrial, exports_of


def delete_trials(
    which: Sequence[StoredTrial],
    trials: Sequence[StoredTrial],
    storage: str | Path,
    say: Callable[[str], object],
) -> None:
    """Delete trials' folders and exports, here and in a storage that is a URL.

    Kept blocks, states that drift is measured against, prepared input and traces go where no other
    trial uses them.

    Raises:
        ConfigError: one of the trials is running; those before it are deleted.
    """
    leaving = {entry.id for entry in which}
    folder, mirror = folder_of(str(storage)), mirror_at(str(storage))
    staying = [
        entry.trial for entry in trials if entry.trial is not None and entry.id not in leaving
    ]
    written = trace_identities(entry.trial for entry in which if entry.trial is not None)
    if mirror is not None and written:
        mirror.pull(TRACES)  # another machine may have sent them
    for entry in which:
        folders = [folder / "trials" / entry.id]
        if entry.trial is not None:
            folders += exports_of(entry.trial)
            quantization = entry.trial.spec.quantization_id
            if all(quantization != other.spec.quantization_id for other in staying):
                folders.append(entry.trial.kept_blocks_folder)
            used = {path for other in staying for path in baselines_of(other, folder)}
            folders += [path for path in baselines_of(entry.trial, folder) if path not in used]
        inputs = _inputs_of(entry, staying, folder)
        freed = sum(map(bytes_below, folders)) + sum(path.stat().st_size for path in inputs)
        board = None if mirror is None else mirror.claim_store(f"trials/{entry.id}")
        claim = Claim(board or folders[0], CLAIM)
        if folders[0].exists():
            claim_or_refuse(claim, partial(_is_running, entry), say)
        if mirror is not None:
            for name in filter(None, map(mirror.name_of, [*folders, *inputs])):
                mirror.remove(name)
        for path in filter(Path.exists, folders):
            shutil.rmtree(path)
        for path in inputs:
            path.unlink(missing_ok=True)
        claim.release()
        if board is not None:
            board.clear()
        say(f"{entry.id} {entry.name}: deleted, {bytes_in_words(freed)}")
    if not which:
        say("Nothing to delete.")


def baselines_of(trial: Trial, storage: Path) -> list[Path]:
    """Return the baselines that a trial's drift is measured against: its model, on its texts."""
    evaluation, model = trial.spec.evaluation, trial.spec.model.identity
    if evaluation.drift is None:
        return []
    digests = {text.digest for text in evaluation.texts}
    folders = []
    for path in (storage / "baselines").glob("*/manifest.json"):
        # A damaged one is computed again by the trial that needs it.
        with suppress(*UNREADABLE):
            identity = json.loads(path.read_text(encoding="utf-8"))["body"]["identity"]
            if identity["model"] == model and identity["text"] in digests:
                folders.append(path.parent)
    return folders


def trace_identities(trials: Iterable[Trial]) -> list[Json]:
    """Return what trials say of the traces that they are calibrated on."""
    return [
        traces_identity(trial.spec, traces) for trial in trials for traces in traces_of(trial.spec)
    ]


def _inputs_of(entry: StoredTrial, staying: Sequence[Trial], storage: Path) -> list[Path]:
    """Return the files of input and of traces that this trial reads and none of those that stay."""
    if entry.trial is None:
        return []
    leaving = prepared_identities(entry.trial.spec)
    others = [identity for trial in staying for identity in prepared_identities(trial.spec)]
    files = [
        path
        for path, whole in kept_identities(storage / PREPARED).items()
        if says_all_of(whole, leaving) and not says_all_of(whole, others)
    ]
    own, kept = (trace_identities(trials) for trials in ([entry.trial], staying))
    return files + [
        path
        for path, whole in kept_identities(storage / TRACES).items()
        if says_all_of(whole, own) and not says_all_of(whole, kept)
    ]


def _is_running(entry: StoredTrial, holder: Holder) -> ConfigError:
    return ConfigError(f"{entry.id} ({entry.name}) is running: {holder}. Stop that first")
