"""Quantize a trial's model: bits from its budget, calibration windows, then the walk."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from q3q.data.calibration import calibration_windows
from q3q.environment import Phases
from q3q.export.writer import Exporter, ExportingSink, open_exporter
from q3q.loaded import Loaded
from q3q.models.adjust import set_route
from q3q.models.decoder import Decoder
from q3q.numerics.weights import StoredWeight
from q3q.placement import Trial
from q3q.quantize.block_store import BlockStore
from q3q.quantize.budget.sensitivities import SENSING
from q3q.quantize.budget.stage import allotted
from q3q.quantize.ends import quantize_ends
from q3q.quantize.ledger import Ledger
from q3q.quantize.methods.build import build_method
from q3q.quantize.search import choose_variant
from q3q.quantize.traces import traces
from q3q.quantize.walk import quantized_blocks
from q3q.record import block_errors
from q3q.reporter import Reporter
from q3q.spec import Json


@dataclass(frozen=True)
class Quantized:
    """What came of the model's linears.

    trial: with the widths that its budget was allotted among its overrides
    ends: a quantized embedding and head
    notes: on the allotment, for the record
    """

    trial: Trial
    exporter: Exporter | None
    ledger: Ledger
    ends: Mapping[str, StoredWeight]
    notes: Json

    @property
    def changed(self) -> bool:
        return bool(self.ledger.weights or self.ends)


def quantized(
    trial: Trial, loaded: Loaded, store: BlockStore, phases: Phases, reporter: Reporter
) -> Quantized:
    """Allot the trial's bits if it has a budget, and quantize the model in place."""
    model, tokenizer = loaded.model, loaded.tokenizer
    with phases.phase(SENSING) if trial.spec.budget else nullcontext():
        allotment = allotted(trial, model, loaded.checkpoint, tokenizer, store, reporter)
    trial = replace(trial, spec=allotment.spec)
    exporter = open_exporter(trial, loaded.checkpoint)
    ledger, ends = Ledger(), dict[str, StoredWeight]()
    if trial.spec.schemes is not None:
        with phases.phase("calibrate"):
            windows = _windows(trial, model, tokenizer, store, reporter)
        with phases.phase("quantize"):
            ledger, ends = _quantize(trial, model, windows, store, exporter, reporter)
    allotment.check(ledger)
    return Quantized(trial, exporter, ledger, ends, allotment.notes)


def _quantize(
    trial: Trial,
    model: Decoder,
    windows: Tensor | None,
    store: BlockStore,
    exporter: Exporter | None,
    reporter: Reporter,
) -> tuple[Ledger, dict[str, StoredWeight]]:
    """Quantize the model in place; return the facts about its blocks, and its quantized ends."""
    spec, count, ledger = trial.spec, len(model.blocks), Ledger()
    assert spec.schemes is not None
    set_route(model, spec)
    reporter.phase("quantize")(0, count)
    method = choose_variant(build_method(spec), model, spec, windows, store, reporter)
    sink = store if exporter is None else ExportingSink(store, exporter)
    for block in quantized_blocks(model, method, spec.schemes, windows, sink):
        ledger.add(block)
        errors = block_errors(block.errors).get(block.index)
        reporter.phase("quantize", metrics=errors)(block.index + 1, count)
        del block  # its codes would lie on a GPU while the next ones are found
    store.settle()
    return ledger, quantize_ends(model, spec.schemes)


def _windows(
    trial: Trial, model: Decoder, tokenizer: Any, store: BlockStore, reporter: Reporter
) -> Tensor | None:
    """Return the calibration windows; None if no block is missing, or the method observes none."""
    steps = reporter.phase("calibrate")
    steps(0, 1)
    if store.holds(len(model.blocks)):
        return None
    write = partial(traces, trial, model, tokenizer, steps=steps)
    return calibration_windows(trial, tokenizer, partial(steps, 0, 1), write)
