"""Measure sensitivities: what the model loses when one unit alone is quantized, at each width.

Every unit is quantized by the trial's own method on the original model's activations. The text's
windows run through the model once; at each block their states are kept, a changed copy of the
block runs on them, and its outputs alone run through the rest of the model.

Shapes: B windows, T tokens of one, H hidden, P positions of all windows, N windows.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from q3q.bit_budget import KL
from q3q.errors import NumericsError
from q3q.models.block import Block, Rope
from q3q.models.decoder import Decoder
from q3q.models.footprint import Device, batch_tokens
from q3q.models.spool import Spool
from q3q.quantize.activations import Activations, activations_of, pass_through
from q3q.quantize.budget.program import rounded
from q3q.quantize.budget.units import Unit, by_block, full_name
from q3q.quantize.method import Method
from q3q.quantize.search import mean_divergence
from q3q.quantize.walk import quantize_block
from q3q.spec import Schemes

Row = list[float]


@dataclass(frozen=True)
class Measurement:
    """What is measured, and with what.

    schemes: of the linears; each unit's linears are quantized with other bits, all others stay
    calibration_NT: token ids that the method observes; None for one that observes nothing
    text_NT: token ids on which the units' sensitivities are measured
    """

    model: Decoder
    method: Method
    schemes: Schemes
    units: Sequence[Unit]
    widths: Sequence[int]
    measure: str
    calibration_NT: Tensor | None
    text_NT: Tensor

    @cached_property
    def rope(self) -> Rope:
        return self.model.rope

    @property
    def room(self) -> int | None:
        """Return the bytes in memory of one set of all windows' states; None for no limit.

        There is one for each unit of a block at each width, and the block's input.
        """
        if self.model.activations is None:
            return None
        most = max(map(len, by_block(self.units).values()))
        return self.model.activations // (2 * (most * len(self.widths) + 1))


def measured(
    job: Measurement, known: Mapping[str, Row], begin: Callable[[Unit], object]
) -> Iterator[tuple[str, Row]]:
    """Yield each unit's sensitivities that are not known, in the order of the model.

    A model that is not resident yields all of a block's units after the block, as its later blocks
    are read once for all of them. The model is not modified.

    Args:
        begin: receives each unit before it is quantized; may raise.

    Raises:
        NumericsError: a sensitivity is not finite.
    """
    model, units_of_block = job.model, by_block(job.units)
    missing = [unit.block for unit in job.units if unit.name not in known]
    if not missing:
        return
    with ExitStack() as spools:
        hidden = spools.enter_context(Spool(job.room))
        batches = _batches(job)
        hidden.extend(model.embed_batches(batches))
        final_PH = None
        if job.measure == KL:
            final_PH = torch.cat([x_BTH.flatten(0, 1) for x_BTH in model.states(batches)])
        activations = activations_of(model, job.calibration_NT)
        spools.enter_context(activations.hidden)
        for k in range(max(missing) + 1):
            block = model.blocks[k]
            left = [
                job.units[u] for u in units_of_block.get(k, []) if job.units[u].name not in known
            ]
            if left:
                yield from _of_block(job, block, left, hidden, activations, final_PH, begin)
            if k < max(missing):
                pass_through(block, hidden, job.rope)
                if activations.windows:
                    pass_through(block, activations.hidden, job.rope)
            del block


def _of_block(
    job: Measurement,
    block: Block,
    units: Sequence[Unit],
    hidden: Spool,
    activations: Activations,
    final_PH: Tensor | None,
    begin: Callable[[Unit], object],
) -> Iterator[tuple[str, Row]]:
    """Yield the sensitivities of a block's units."""
    waiting: list[tuple[Unit, list[Spool]]] = []
    for together in _sharing_sites(units):
        begin(together[0])
        # By width: the block with all of these units quantized.
        changed = [_quantized(job, block, together, bits, activations) for bits in job.widths]
        for unit in together:
            begin(unit)
            candidates = [
                block.with_weights(_weights_of(unit, block, other, whole=len(together) == 1))
                for other in changed
            ]
            if final_PH is None:
                yield unit.name, _checked(unit, _output_errors(job, block, candidates, hidden))
                continue
            waiting.append((unit, [_outputs(job, candidate, hidden) for candidate in candidates]))
            if not job.model.streamed:
                yield from _divergences(job, unit.block, waiting, final_PH)
                waiting = []
    if waiting and final_PH is not None:
        yield from _divergences(job, units[0].block, waiting, final_PH)


def _sharing_sites(units: Sequence[Unit]) -> list[list[Unit]]:
    """Return units that lie in the same sites together.

    Rows of a site are independent given what it reads, so one solve of it serves all its linears.
    """
    by_sites: dict[tuple[str, ...], list[Unit]] = {}
    for unit in units:
        by_sites.setdefault(unit.sites, []).append(unit)
    return list(by_sites.values())


def _quantized(
    job: Measurement, block: Block, units: Sequence[Unit], bits: int, activations: Activations
) -> Block:
    """Return the block with these units quantized at a width, and everything else as it is."""
    own = {linear for unit in units for linear in unit.linears}
    every = {full_name(block.layer, name) for site in block.sites for name in site.weights}
    schemes = replace(
        job.schemes,
        base=replace(job.schemes.base, bits=bits),
        overrides={
            name: {key: value for key, value in changes.items() if key != "bits"}
            for name, changes in job.schemes.overrides.items()
        },
        skip=frozenset(every - own),
    )
    return quantize_block(
        block, block.layer, job.method, schemes, activations, job.rope, passes_on=False
    )[1]


def _weights_of(unit: Unit, block: Block, changed: Block, *, whole: bool) -> dict[str, Tensor]:
    """Return a unit's new weights; if it was quantized alone, all that the method changed."""
    if not whole:
        return {name: changed.weights[name] for name in unit.weights}
    return {
        name: weight
        for name, weight in changed.weights.items()
        if weight is not block.weights[name]
    }


def _batches(job: Measurement) -> list[Tensor]:
    device: Device = "cuda" if job.model.device.type == "cuda" else "cpu"
    dtype = str(job.model.norm_H.dtype).removeprefix("torch.")
    tokens = batch_tokens(job.model.facts, dtype, device)
    return list(job.text_NT.split(max(1, tokens // job.text_NT.shape[1])))


def _outputs(job: Measurement, block: Block, hidden: Spool) -> Spool:
    spool = Spool(job.room)
    spool.extend(block(x_BTH, job.rope) for x_BTH in hidden)
    return spool


def _output_errors(
    job: Measurement, block: Block, candidates: Sequence[Block], hidden: Spool
) -> Row:
    """Return |Y - Z|^2 / |Y|^2 for each candidate: Y is the block's output, Z the candidate's."""
    norm, errors = 0.0, [0.0] * len(candidates)
    for x_BTH in hidden:
        y_BTH = block(x_BTH, job.rope).double()
        norm += float(y_BTH.square().sum())
        for c, candidate in enumerate(candidates):
            difference_BTH = candidate(x_BTH, job.rope).double() - y_BTH
            errors[c] += float(difference_BTH.square().sum())
    return [error / norm if norm else 0.0 for error in errors]


def _divergences(
    job: Measurement, k: int, waiting: Sequence[tuple[Unit, list[Spool]]], final_PH: Tensor
) -> Iterator[tuple[str, Row]]:
    """Yield the divergences of the predictions of units whose outputs of block k wait."""
    model = job.model
    for later in range(k + 1, len(model.blocks)):
        block = model.blocks[later]
        for _, spools in waiting:
            for spool in spools:
                pass_through(block, spool, job.rope)
        del block
    for unit, spools in waiting:
        row = []
        for spool in spools:
            changed_PH = torch.cat([model.normed(x_BTH).flatten(0, 1) for x_BTH in spool])
            row.append(mean_divergence(model, final_PH, changed_PH))
            spool.close()
        yield unit.name, _checked(unit, row)


def _checked(unit: Unit, row: Row) -> Row:
    if not all(number < float("inf") for number in row):  # false for nan, too
        raise NumericsError(
            f"{unit.name}: the model's output is not finite when this alone is quantized; leave it "
            f"out (skip=[{unit.name}]), or take other budget.widths"
        )
    return [rounded(number) for number in row]
