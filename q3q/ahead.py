"""Prepare a trial's windows and requests beside it: `python -m q3q.ahead`, started by the trial.

A trial on a GPU reads texts and builds its questions' prompts while the GPU waits, unless an
earlier trial has left the prepared files (`data/prepared`). So another process makes those files
while the trial loads its model and quantizes it. It is a process, not a thread: it runs Python for
a minute or more, and a thread would keep from the walk the lock that each of its launches needs.

A file is made under the claim under which the trial would make it, so the trial waits for one that
is half made. If this process fails, the trial makes what is missing, and says its own error. It
ends with its trial.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from q3q.data.calibration import (
    calibration_identity,
    calibration_windows,
    drawing,
    drawn_identities,
)
from q3q.data.prepared import FOLDER, Shelf, kept_identities
from q3q.data.questions import Library
from q3q.data.windows import evaluation_identity, evaluation_windows
from q3q.ending import listen
from q3q.evaluate.batches import batches
from q3q.evaluate.identities import prepared_identities, requests_identity, says_all_of
from q3q.evaluate.suites import prepare_batch
from q3q.limits import cores
from q3q.models.checkpoint import Checkpoint, load_tokenizer
from q3q.models.footprint import Device
from q3q.placement import Trial
from q3q.spec import Json, TrialSpec, digest
from q3q.storage.claim import Claim, holder_of

COMMAND = (sys.executable, "-m", "q3q.ahead")
END_SECONDS = 10.0  # that the process has to end, before it is killed


class _MadeElsewhereError(Exception):
    """Another process makes a file at this moment."""


@dataclass(frozen=True)
class Preparation:
    """One file of prepared input that a trial reads.

    identity: as far as the spec says it
    make: puts it on the shelf, unless it is there
    """

    identity: Json
    make: Callable[[], object]


def missing(spec: TrialSpec, shelf: Shelf, *, quantizes: bool = True) -> list[Json]:
    """Return the identities of a trial's prepared input that is not on the shelf.

    Args:
        quantizes: the trial will quantize, and not find all its blocks.
    """
    kept = kept_identities(shelf.folder).values()
    present = [identity for identity in kept if identity.get("tokenizer") == shelf.tokenizer]
    unread = [] if quantizes else drawn_identities(spec)
    return [
        identity
        for identity in prepared_identities(spec)
        if identity not in unread and not any(says_all_of(whole, [identity]) for whole in present)
    ]


@contextmanager
def preparing(
    trial: Trial, folder: Path, shelf: Shelf | None, device: Device, *, quantizes: bool
) -> Iterator[None]:
    """Have another process prepare a trial's input while the block lasts, where that pays.

    It pays on a GPU, if a core is free beside the trial's own and some input is missing that no
    process prepares. If trials compute on cores, no core is free.

    Args:
        folder: the model's.
        shelf: the trial's, None if nothing of its tokenizer's can be kept.
        quantizes: see `missing`.
    """
    identities = missing(trial.spec, shelf, quantizes=quantizes) if shelf is not None else []
    if shelf is None or not identities or not pays(device):
        yield
        return
    name = _claim_name(identities)
    if holder_of(shelf.folder, name) is not None:
        yield
        return
    order = {"trial": trial.to_json(), "folder": str(folder), "wanted": identities, "claim": name}
    process = _start(json.dumps(order))
    try:
        yield
    finally:
        if process is not None:
            _end(process)


def pays(device: Device) -> bool:
    """Return True if a core is idle while the trial's own device computes."""
    return device == "cuda" and cores() > 1


def _claim_name(identities: Iterable[Json]) -> str:
    return f"ahead-{digest({'wanted': list(identities)})[:32]}"


def _start(order: str) -> "subprocess.Popen[bytes] | None":
    """Start the process; its input stays open, and its end tells it that the trial is gone."""
    path = os.pathsep.join(entry for entry in sys.path if entry)
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    environment = os.environ | threads | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    try:
        process = subprocess.Popen(
            COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
        )
    except OSError:  # the trial prepares its input itself
        return None
    with suppress(OSError):  # it has died already
        assert process.stdin is not None
        process.stdin.write(order.encode() + b"\n")
        process.stdin.flush()
    return process


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    assert process.stdin is not None
    with suppress(OSError):  # what it did not read
        process.stdin.close()


def prepare(trial: Trial, folder: Path, identities: Iterable[Json]) -> None:
    """Make a trial's missing prepared input, except files that another process makes now."""
    tokenizer = load_tokenizer(folder)
    shelf = Shelf.of(trial, tokenizer)
    assert shelf is not None
    by_identity = {
        digest(source.identity): source for source in _inputs(trial, folder, tokenizer, shelf)
    }
    for identity in identities:
        with suppress(_MadeElsewhereError):
            by_identity[digest(identity)].make()


def _inputs(trial: Trial, folder: Path, tokenizer: Any, shelf: Shelf) -> Iterator[Preparation]:
    """Yield all prepared input of a trial."""
    spec, placement, evaluation = trial.spec, trial.placement, trial.spec.evaluation
    for drawn_spec in drawing(spec):
        if drawn_spec.calibration is not None and not drawn_spec.calibration.writes:
            yield Preparation(
                calibration_identity(drawn_spec.calibration, drawn_spec.seed),
                partial(calibration_windows, replace(trial, spec=drawn_spec), tokenizer, _pass_on),
            )
    for text in evaluation.texts:
        yield Preparation(
            evaluation_identity(text, evaluation.quick),
            partial(evaluation_windows, tokenizer, trial, text, _pass_on),
        )
    for batch in batches(evaluation):
        library = Library(placement.data, dict(evaluation.data), include=placement.tasks)
        yield Preparation(
            requests_identity(evaluation, batch, spec.seed),
            partial(
                prepare_batch,
                Checkpoint(folder).facts,
                tokenizer,
                evaluation,
                batch,
                library,
                include=placement.tasks,
                seed=spec.seed,
                shelf=shelf,
                wait=_pass_on,
            ),
        )


def _pass_on() -> None:
    raise _MadeElsewhereError


def main() -> None:
    """Do what the trial ordered; end with the trial."""
    listen()
    order = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_the_trial, daemon=True).start()
    trial = Trial.from_json(order["trial"])
    claim = Claim(trial.placement.storage / FOLDER, order["claim"])
    if claim.take() is not None:  # another trial's process was faster
        return
    try:
        prepare(trial, Path(order["folder"]), order["wanted"])
    finally:
        claim.release()


def _end_with_the_trial() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main()
