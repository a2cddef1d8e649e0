"""Let a method shift scale between a producer and its readers, one scale group at a time.

Shapes: E experts (1 in a dense block), I in features of the group's site.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from q3q.errors import IncompatibleError
from q3q.models.anatomy import ScaleGroup, Site, bias_of
from q3q.models.block import Block, Rope, finish
from q3q.models.footprint import batch_tokens
from q3q.numerics.weights import NUMBERS_AT_ONCE
from q3q.quantize.activations import Activations
from q3q.quantize.method import Method, ScaleTask
from q3q.quantize.sites import Chunk, SiteQuantizer
from q3q.quantize.statistics import StoredInputs
from q3q.spec import Scheme


class Rebalancing:
    """A method's scales of one block, chunk by chunk of its experts.

    A scale that all linears of a site share is found once, with the first chunk's statistics, and
    serves all chunks. Where an expert's own linear is the producer, its scale is found with its
    chunk's. All are found for the original block.
    """

    def __init__(
        self,
        original: Block,
        block: Block,
        method: Method,
        activations: Activations,
        rope: Rope,
    ) -> None:
        self._original, self._block, self._method = original, block, method
        self._activations, self._rope = activations, rope
        self._shared: dict[Site, list[Tensor]] = {}

    @property
    def changed(self) -> frozenset[str]:
        """Names of weights that the block no longer shares with the original one."""
        before, now = self._original.weights, self._block.weights
        return frozenset(name for name in now if now[name] is not before[name])

    def shift(self, chunks: Sequence[Chunk]) -> None:
        """Find the observed chunks' scales, each on the rank with the statistics; then apply them,
        group by group.
        """
        if not self._method.rebalances:
            return
        rank, broadcast = self._activations.team.rank, self._activations.team.broadcast
        quantized = {c.quantizer.site: c.quantizer for c in chunks if c.quantizer.parts}
        groups = [
            (
                _narrowed(group, quantized),
                [c for c in chunks if c.quantizer is quantized[group.site]],
            )
            for group in self._block.scale_groups
            if group.site in quantized
        ]
        searches = [
            (group, chunk, _only_scheme(chunk.quantizer), list[Tensor]())
            for group, its_chunks in groups
            for chunk in (its_chunks if self._of_experts(group) else its_chunks[:1])
            if chunk.quantizer.site not in self._shared
        ]
        for group, chunk, scheme, scales in searches:
            if chunk.owner == rank:
                self._method.rebalance(self._task(group, chunk, scales), scheme)
        for group, chunk, _, scales in searches:
            scales_EI = broadcast(scales, chunk.owner)
            experts = chunk.experts if self._of_experts(group) else slice(None)
            weights = self._block.weights
            for number, wished_EI in enumerate(scales_EI):
                scale_EI = storable(weights[group.producer], group, wished_EI)
                weights.update(migrate_scale(weights, group, scale_EI, experts, self.changed))
                scales_EI[number] = scale_EI
            if not self._of_experts(group):
                shared = (chunk.quantizer.site, *group.also)
                self._shared |= dict.fromkeys(shared, scales_EI)
            elif chunk.owner == rank:
                _rescale(chunk, scales_EI)
        for chunk in chunks:
            if chunk.owner == rank and chunk.quantizer.parts:
                _rescale(chunk, self._shared.get(chunk.quantizer.site, []))

    def _of_experts(self, group: ScaleGroup) -> bool:
        """Return True if each expert's own linear feeds the group's site."""
        return self._block.weights[group.producer].ndim == 3

    def _task(self, group: ScaleGroup, chunk: Chunk, scales: list[Tensor]) -> ScaleTask:
        task = scale_task(
            self._original, group, chunk.statistics, self._rope, self._activations, scales.append
        )
        return replace(task, experts=chunk.experts) if self._of_experts(group) else task


def storable(gain: Tensor, group: ScaleGroup, scale_EI: Tensor) -> Tensor:
    """Return the scale that a producer can take over exactly, next to the given one.

    A gain that lies in its file around 0 takes effect with 1 added. A small one is stored near -1,
    where 16-bit numbers are far apart, so it is not divided by just any scale; the readers must be
    multiplied by the one that it is divided by.
    """
    if not group.offset:
        return scale_EI
    whole_I = gain.float() + group.offset
    stored_I = (whole_I / scale_EI[0] - group.offset).to(gain.dtype).float() + group.offset
    # Where nothing would be left of the gain, the channel keeps it.
    return torch.where(stored_I == 0, 1.0, whole_I / stored_I)[None]


def _rescale(chunk: Chunk, scales_EI: Sequence[Tensor]) -> None:
    for scale_EI in scales_EI:
        chunk.statistics.rescale(scale_EI)


def _narrowed(group: ScaleGroup, quantized: Mapping[Site, SiteQuantizer]) -> ScaleGroup:
    """Return the group as a method sees it: the site's weights are those that it rounds alike.

    All else that reads the same tensor is unquantized: linears that are left out, and those of
    `also` with another scheme.
    """
    part, scheme = quantized[group.site].parts[0]
    parts = [own for site in group.also if site in quantized for own in quantized[site].parts]
    also = [name for own, its_scheme in parts if its_scheme == scheme for name in own.weights]
    weights = (*part.weights, *also)
    rest = tuple(name for name in group.readers if name not in weights)
    return replace(group, site=replace(group.site, weights=weights, unquantized=rest))


def _only_scheme(quantizer: SiteQuantizer) -> Scheme:
    _, scheme = quantizer.parts[0]
    if len(quantizer.parts) > 1 and quantizer.method.rebalances:
        raise IncompatibleError(
            f"blocks.{quantizer.result.index}.{quantizer.site.name}: one scale is shifted to all "
            "linears of a site, so they take one setting"
        )
    return scheme


def scale_task(
    block: Block,
    group: ScaleGroup,
    statistics: Any,
    rope: Rope,
    activations: Activations,
    apply: Callable[[Tensor], None],
) -> ScaleTask:
    attention = group.site.mixes_tokens

    def run(rows_RTI: Tensor, changed: Mapping[str, Tensor]) -> Tensor:
        piece = block.with_weights(changed)
        return finish(
            piece.attention_stages(rows_RTI, rope) if attention else piece.mlp_stages(rows_RTI)
        )

    windows = statistics.windows() if isinstance(statistics, StoredInputs) else ()
    most_tokens = None  # a CPU's limit, and a dense model's, is the method's own
    if block.device.type == "cuda" and block.facts.experts:
        dtype = str(block.dtype).removeprefix("torch.")
        most_tokens = batch_tokens(block.facts, dtype, "cuda")
    return ScaleTask(
        group,
        block.weights,
        statistics,
        windows,
        row=activations.length if attention else 1,
        run=run,
        spool=activations.spool,
        apply=apply,
        share=1.0 if attention else block.share_read,
        most_tokens=most_tokens,
    )


def migrate_scale(
    weights: Mapping[str, Tensor],
    group: ScaleGroup,
    scale_EI: Tensor,
    experts: slice = slice(None),
    overwritten: Collection[str] = (),
) -> dict[str, Tensor]:
    """Divide the producer's outputs by the scale, and multiply its readers' input columns by it.

    The block computes the same function: (x / s) (W s)^T = x W^T.

    Args:
        scale_EI: a scale per channel of the site's input: one row for all experts or, where the
            producer is an expert's own linear, one row for each of `experts`.
        overwritten: weights that are changed where they lie; the others are copied first.

    Returns:
        The changed weights by name.
    """
    changed = {}
    bias = bias_of(group.producer)  # of a linear, part of its outputs
    produced = (group.producer, bias) if bias in weights else (group.producer,)
    for name in (*group.readers, *produced):
        old = weights[name]
        changed[name] = (
            old if name in overwritten else old.clone(memory_format=torch.contiguous_format)
        )
    for name in group.readers:
        _change(changed[name], torch.mul, scale_EI[:, None, :], experts)
    produced_EO = scale_EI
    if group.repeat > 1:
        produced_EO = scale_EI.unflatten(1, (-1, group.repeat, group.head_dim))[:, :, 0].flatten(1)
    for name in produced:
        if group.offset:  # (gain + offset) / s is the gain that takes effect
            gain_O = (changed[name].float() + group.offset) / produced_EO[0]
            changed[name].copy_(gain_O - group.offset)
        else:
            _change(changed[name], torch.div, produced_EO[:, :, None], experts)
    return changed


def _change(
    weight: Tensor, by: Callable[[Tensor, Tensor], Tensor], factor_EOI: Tensor, experts: slice
) -> None:
    """Multiply or divide a weight in place, in float32, a few experts at a time.

    Args:
        weight: [E, O, I], [O, I], or a norm's gain or a bias [O].
        factor_EOI: one for all, or one for each of `experts`; broadcast over rows or columns.
    """
    if weight.ndim < 3:
        factor = factor_EOI[0] if weight.ndim == 2 else factor_EOI[0, :, 0]
        weight.copy_(by(weight.float(), factor))
        return
    part_EOI = weight[experts]
    step = max(1, NUMBERS_AT_ONCE // part_EOI[0].numel())
    for e, few_eOI in zip(range(0, len(part_EOI), step), part_EOI.split(step), strict=True):
        own_eOI = factor_EOI if len(factor_EOI) == 1 else factor_EOI[e : e + step]
        few_eOI.copy_(by(few_eOI.float(), own_eOI))
