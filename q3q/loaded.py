"""A trial's model in memory, and the model or baseline that it is compared with."""

from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from q3q.ahead import preparing
from q3q.data.prepared import Shelf
from q3q.environment import Phases
from q3q.evaluate.measure import Reference, reference_of
from q3q.models.checkpoint import Checkpoint, load_tokenizer
from q3q.models.decoder import Decoder
from q3q.models.facts import refuse_second_rounding
from q3q.models.footprint import Device
from q3q.models.hub import is_downloaded
from q3q.models.likeness import note_of
from q3q.models.loading import (
    Loading,
    device_of,
    load_model,
    load_original,
    open_checkpoint,
    original_of,
)
from q3q.numerics.kernels.compiler import compiler_fault
from q3q.placement import Trial
from q3q.quantize.methods.registry import settings_of
from q3q.record import JUDGED
from q3q.reporter import Reporter
from q3q.spec import Json
from q3q.storage.aside import tell
from q3q.storage.block_cache import stored_blocks
from q3q.team import Team


@dataclass(frozen=True)
class Loaded:
    """The model and its files.

    tokenizer: of a judged checkpoint the original's, so that both read the same
    loading: with which loader, and why
    reference: of the unquantized model, or the original; perhaps to be waited for
    notes: for the record
    """

    checkpoint: Checkpoint
    tokenizer: Any
    model: Decoder
    loading: Loading
    reference: Reference
    notes: Json


def load(trial: Trial, team: Team, beside: ExitStack, phases: Phases, reporter: Reporter) -> Loaded:
    """Load the trial's model, and measure the model that it is compared with.

    Args:
        beside: receives what goes on beside the trial, and ends with it.
    """
    reporter.phase("load")(0, 1)
    spec, memory = trial.spec, settings_of(trial.spec.method).memory()
    with phases.phase("load"):
        checkpoint = _opened(trial, reporter)
        if spec.scheme is not None:  # the Hub's config.json may not have said it to the plan
            refuse_second_rounding(checkpoint.folder, checkpoint.facts)
        original = _opened(original_of(trial), reporter) if spec.reference else checkpoint
        tokenizer = load_tokenizer(original.folder)
        device = _device(trial)
        beside.enter_context(trial.placement.block_cache.lease(spec.quantization_id))
        beside.enter_context(_preparing(trial, original, tokenizer, device))
    judged = None
    with phases.phase("baseline"):
        if spec.reference is not None:
            judged = _beside(checkpoint, original, tokenizer, device, trial, reporter)
    with phases.phase("load"):
        model, loading = load_model(checkpoint, trial, device, memory, team)
    reporter.phase("load", str(loading))(1, 1)
    with phases.phase("baseline"):
        again = partial(load_original, checkpoint, trial, device)
        # Who quantizes nothing has nothing else to do; a gang's rank 0 has no room for it alone.
        later = again if spec.schemes is not None and team.size == 1 else None
        reference = judged[0] if judged else reference_of(model, tokenizer, trial, reporter, later)
    notes = {JUDGED: judged[1]} if judged else {}
    notes |= _notes_on(checkpoint) | notes_on_kernels(device)
    return Loaded(checkpoint, tokenizer, model, loading, reference, notes)


def _preparing(
    trial: Trial, checkpoint: Checkpoint, tokenizer: Any, device: Device
) -> AbstractContextManager[None]:
    """Have the trial's windows and requests prepared beside it, see `ahead`."""
    blocks = stored_blocks(*trial.block_folders)
    quantizes = blocks < checkpoint.facts.layers
    shelf = Shelf.of(trial, tokenizer)
    return preparing(trial, checkpoint.folder, shelf, device, quantizes=quantizes)


def _beside(
    checkpoint: Checkpoint,
    original: Checkpoint,
    tokenizer: Any,
    device: Device,
    trial: Trial,
    reporter: Reporter,
) -> tuple[Reference, Json]:
    """Return what a judged checkpoint's drift is measured against, and the note on its files."""
    streamed, own = load_original(original, trial, device), original_of(trial)
    reference = reference_of(streamed, tokenizer, own, reporter)
    steps = reporter.phase("baseline", "weights")
    return reference, note_of(checkpoint, original, tokenizer, steps)


def _opened(trial: Trial, reporter: Reporter) -> Checkpoint:
    """Open the trial's checkpoint; report where its files disagree with its config.json."""
    model = trial.spec.model
    if model.source is not None and not is_downloaded(model.source, model.revision):
        reporter.phase("download", model.source)(0, 1)
    checkpoint = open_checkpoint(trial)
    for remark in checkpoint.remarks:
        reporter.phase("load", remark)(0, 1)
    return checkpoint


def _device(trial: Trial) -> Device:
    """Return where the trial computes; say so if it is a GPU without q3q's own kernels."""
    device = device_of(trial)
    for line in notes_on_kernels(device).values():
        tell(line)
    return device


def notes_on_kernels(device: Device) -> Json:
    """Return the record's note on a GPU that computes with plain kernels; none on any other."""
    fault = compiler_fault() if device == "cuda" else None
    slower = f"plain kernels compute in place of Triton's, more slowly: {fault}"
    return {} if fault is None else {"kernels": slower}


def _notes_on(checkpoint: Checkpoint) -> Json:
    """Return the record's note on files that disagree with config.json; none if they agree."""
    return {"checkpoint": list(checkpoint.remarks)} if checkpoint.remarks else {}
