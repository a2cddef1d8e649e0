"""The Hugging Face Hub and its local cache: revisions and downloads."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

from q3q.errors import UNREADABLE, CheckpointError, Q3QError, UnavailableModelError, first_line
from q3q.models.facts import ModelFacts, read_facts
from q3q.models.model_json import OWN_FOLDER, read_json
from q3q.models.published.modelopt import FILE as MODELOPT_FILE
from q3q.placement import Trial

# All that a model's folder needs, and its licence; no pickles, which can run code when loaded.
# And no second copy of the weights in their maker's own layout (Llama's, Mistral's).
_FILES: dict[str, Any] = {
    "allow_patterns": ["*.safetensors", "*.json", "*.txt", "*.jinja", "README.md", "LICENSE*"],
    "ignore_patterns": ["consolidated*", "original/*"],
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
COMMIT = re.compile(r"[0-9a-f]{40}")
HUB_SECONDS = 5.0  # to wait for the Hub's answer
SILENT_SECONDS = 60.0  # for which a Hub that did not answer is not asked again
T = TypeVar("T")
_silent: dict[str, tuple[float, Exception]] = {}  # by the Hub's address: since when, and why


def locate(source: str, revision: str | None = None, *, offline: bool = False) -> Path:
    """Return a model's folder: a local one, or a Hub id's snapshot, downloaded if need be.

    Args:
        source: a folder, or a Hub id such as `Qwen/Qwen3-8B`. A folder of that name wins.
        revision: branch, tag or commit of a Hub id; its main branch if None.
        offline: look in the local cache only.

    Raises:
        CheckpointError: no such folder, or neither the Hub nor the local cache gives the model.
    """
    if (folder := _local_folder(source, revision)) is not None:
        return folder
    _check_hub_id(source)
    from huggingface_hub import snapshot_download

    refusal = CheckpointError("offline was asked for") if offline else _ask_hub(source, revision)
    try:
        path = snapshot_download(
            source,
            revision=revision,
            local_files_only=refusal is not None,
            etag_timeout=HUB_SECONDS,
            **_FILES,
        )
    except Exception as error:  # of the client, its HTTP library or the disk
        raise _unreachable(source, revision, refusal or error) from error
    if refusal is not None and not _is_whole(Path(path)):
        raise _unreachable(source, revision, refusal) from refusal
    return Path(path)


def bytes_to_download(source: str, revision: str | None = None) -> int:
    """Return the bytes of a Hub model that the local cache does not have; 0 if it has all.

    Raises:
        CheckpointError: it has not all, and the Hub does not give the rest.
    """
    _check_hub_id(source)
    from huggingface_hub import snapshot_download

    refusal = _ask_hub(source, revision)
    try:
        if refusal is None:
            files = snapshot_download(
                source,
                revision=revision,
                etag_timeout=HUB_SECONDS,
                dry_run=True,
                **_FILES,
            )
            return sum(file.file_size or 0 for file in files if file.will_download)
        folder = snapshot_download(source, revision=revision, local_files_only=True, **_FILES)
    except Exception as error:  # see `locate`
        raise _unreachable(source, revision, refusal or error) from error
    if not _is_whole(Path(folder)):
        raise _unreachable(source, revision, refusal) from refusal
    return 0


def cache_folder(source: str, kind: Literal["models", "datasets"] = "models") -> Path:
    """Return the local cache's folder of a Hub repository, which may not exist yet."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"{kind}--{source.replace('/', '--')}"


def is_downloaded(source: str, revision: str | None) -> bool:
    """Return True if the local cache has all files of a Hub model; the Hub is not asked."""
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(source, revision=revision, local_files_only=True, **_FILES)
    except Exception:  # see `locate`
        return False
    return _is_whole(Path(folder))


def ask(question: Callable[[], T]) -> T:
    """Ask the Hub something and return its answer.

    Where it did not answer at all, it is not asked again for a while: many things may be missing,
    and for each one the wait would be as long.

    Raises:
        Exception: its refusal, or the same error as before of its HTTP library.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    since, why = _silent.get(constants.ENDPOINT, (0.0, None))
    if why is not None and time.monotonic() - since < SILENT_SECONDS:
        raise why
    try:
        return question()
    except (HfHubHTTPError, OfflineModeIsEnabled):
        raise
    except Exception as error:  # of its HTTP library
        _silent[constants.ENDPOINT] = time.monotonic(), error
        raise


def commit_of_data_set(repository: str, revision: str | None = None) -> str | None:
    """Ask the Hub which commit a data set has now, or at a revision.

    It fails within seconds, where a download would try again for half a minute or longer.
    """
    from huggingface_hub import HfApi

    info = HfApi().dataset_info
    return ask(lambda: info(repository, revision=revision, expand=["sha"], timeout=HUB_SECONDS)).sha


def resolve_revision(source: str, revision: str | None = None) -> str:
    """Return the commit that a Hub id means now, without downloading weights.

    If the Hub does not answer within seconds, the local cache does: it remembers what a branch
    meant at the last download.

    Raises:
        CheckpointError: not a Hub id, or neither the Hub nor the local cache knows it.
    """
    _check_hub_id(source)
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    return _config_folder(source, revision).name  # .../snapshots/<commit>


def fetch_facts(source: str, revision: str | None = None) -> ModelFacts:
    """Return a Hub model's facts, without its weights.

    Raises:
        CheckpointError: neither the Hub nor the local cache has it, or q3q runs no such model.
    """
    _check_hub_id(source)
    folder = _config_folder(source, revision)
    if "quantization_config" not in read_json(folder / "config.json") and not _is_whole(folder):
        # Older ModelOpt says in a file of its own how it quantized. Without an answer the trial
        # looks again when it has the weights.
        with contextlib.suppress(UnavailableModelError):
            fetch_file(source, MODELOPT_FILE, folder.name)
    return read_facts(folder)


def facts_of_trial(trial: Trial) -> ModelFacts | None:
    """Return the facts of a trial's model; None where nothing here knows them any more."""
    model = trial.spec.model
    return _facts(trial.placement.model, model.source, model.revision)


@functools.cache
def _facts(folder: Path | None, source: str | None, revision: str | None) -> ModelFacts | None:
    try:
        return read_facts(folder) if folder is not None else fetch_facts(str(source), revision)
    except (OSError, Q3QError):
        return None


def fetch_file(source: str, name: str, revision: str | None = None) -> Path | None:
    """Return a small file of a Hub model; None if the model has none of this name.

    Raises:
        CheckpointError: neither the Hub nor the local cache can tell.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    cached = try_to_load_from_cache(source, name, revision=revision)
    if cached is not None:  # a path, or the note that the model was found not to have it
        return Path(cached) if isinstance(cached, str) else None
    if (refusal := _ask_hub(source, revision)) is not None:
        raise _unreachable(source, revision, refusal) from refusal
    try:
        return Path(hf_hub_download(source, name, revision=revision, etag_timeout=HUB_SECONDS))
    except Exception as error:  # see `locate`
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None
        raise _unreachable(source, revision, error) from error


def _config_folder(source: str, revision: str | None) -> Path:
    """Return a snapshot of the local cache that has config.json, fresh if the Hub answers."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(source, "config.json", revision=revision)
    fixed = revision is not None and COMMIT.fullmatch(revision)  # a branch may move
    if not (fixed and isinstance(cached, str)):
        if (refusal := _ask_hub(source, revision)) is None:
            try:
                config = hf_hub_download(
                    source, "config.json", revision=revision, etag_timeout=HUB_SECONDS
                )
                return Path(config).parent
            except Exception as error:  # see `locate`
                refusal = error
        if not isinstance(cached, str):
            raise _unreachable(source, revision, refusal) from refusal
    return Path(cached).parent


def _ask_hub(source: str, revision: str | None) -> Exception | None:
    """Return the Hub's refusal, or None; in seconds, where a download tries for half a minute."""
    from huggingface_hub import HfApi

    try:
        ask(
            lambda: HfApi().model_info(
                source, revision=revision, expand=["sha"], timeout=HUB_SECONDS
            )
        )
    except Exception as error:  # see `locate`
        return error
    return None


def _is_whole(folder: Path) -> bool:
    """Return True if a snapshot has weights and a tokenizer, not config.json alone."""
    index = folder / "model.safetensors.index.json"
    try:
        shards = {*json.loads(index.read_bytes())["weight_map"].values()}
    except FileNotFoundError:
        shards = {path.name for path in folder.glob("*.safetensors")}
    except UNREADABLE:
        return False
    tokenizer = any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json"))
    return bool(shards) and tokenizer and all((folder / name).is_file() for name in shards)


def _local_folder(source: str, revision: str | None) -> Path | None:
    folder = Path(source).expanduser()
    if not source or not folder.is_dir():
        return None
    if revision is not None:
        raise CheckpointError(
            f"{source} is a folder, which has no revision {revision!r}. Leave model.revision out"
        )
    return folder


def _check_hub_id(source: str) -> None:
    if Path(source).expanduser().is_file():
        raise CheckpointError(
            f"{source} is a file. Give the folder that has config.json: model=local model.path=DIR"
        )
    if not _HUB_ID.fullmatch(source):
        raise CheckpointError(
            f"{source!r} is neither a folder nor a Hub id (owner/name). {OWN_FOLDER}"
        )


def _unreachable(source: str, revision: str | None, error: Exception) -> UnavailableModelError:
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    what = source if revision is None else f"{source} (revision {revision})"
    if isinstance(error, RepositoryNotFoundError):
        reason = "it has no such model, or requires a login"
    elif isinstance(error, RevisionNotFoundError):
        reason = "it has no such revision"
    else:
        reason = first_line(error)
    return UnavailableModelError(
        f"{what} is no folder here, and as a Hub id it is neither in the local cache "
        f"nor available from the Hub: {reason}. {OWN_FOLDER}"
    )
