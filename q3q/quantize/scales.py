"""Let a method shift scale between a producer and its readers, a scale group at a time."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from q3q.errors import IncompatibleError, IntegrityError, NumericsError
from q3q.models.anatomy import ScaleGroup, Site
from q3q.models.qwen3 import Qwen3Block, Rope, finish
from q3q.numerics.weights import (
    StoredWeight,
)
from q3q.quantize.activations import Activations
from q3q.quantize.block import BlockSink
from q3q.quantize.method import Method, ScaleTask
from q3q.quantize.statistics import Kept
from q3q.spec import Scheme

# Every deployed format stores scales in 16 bits, GPTQ's and AWQ's in float16.
LARGEST_SCALE = torch.finfo(torch.float16).max


def exchanging(sink: BlockSink | None, index: int, like: Tensor) -> dict[str, Tensor]:
    """The weights of a block that was quantized, as the sink has them."""
    block = None if sink is None else sink.load(index)
    if block is None:
        raise IntegrityError(
            f"block {index}, which was quantized and stored, is not there whole any more"
        )
    return block.numbers(like.dtype, like.device)


def rebalance_group(
    block: Qwen3Block,
    method: Method,
    parts: Mapping[Site, Sequence[tuple[Site, Scheme]]],
    seen: Mapping[Site, tuple[int, Any]],
    share: Activations,
    rope: Rope,
    *,
    index: int,
) -> None:
    """Find each group's scale, all with the weights as they were, where the statistics are; then shift them.

    seen: of each site, the owner and, there, the statistics.
    """
    groups = [group for group in block.scale_groups if parts[group.site]]
    schemes = [_only_scheme(group.site, parts[group.site], method, index) for group in groups]
    found: list[list[Tensor]] = [[] for _ in groups]
    for group, scheme, scales in zip(groups, schemes, found, strict=True):
        owner, statistics = seen[group.site]
        if owner == share.team.rank:
            method.rebalance(
                scale_task(block, group, statistics, rope, share, scales.append), scheme
            )
    for group, scales in zip(groups, found, strict=True):
        owner, statistics = seen[group.site]
        for scale_EI in share.team.broadcast(scales, owner):
            block.weights.update(migrate_scale(block.weights, group, scale_EI))
            if owner == share.team.rank:
                statistics.rescale(scale_EI)


def _only_scheme(
    site: Site, parts: Sequence[tuple[Site, Scheme]], method: Method, index: int
) -> Scheme:
    part, scheme = parts[0]
    if part != site and type(method).rebalance is not Method.rebalance:
        raise IncompatibleError(
            f"blocks.{index}.{site.name}: one scale is shifted to all linears of a site, so they take one setting"
        )
    return scheme


def check_scales(quantized: StoredWeight, weight_EOI: Tensor, where: str) -> None:
    largest = quantized.largest_scale()
    if not largest <= LARGEST_SCALE:  # also when it is not a number
        outlier = float(weight_EOI.abs().amax())
        raise NumericsError(
            f"{where.removesuffix('.weight')}: its largest weight, {outlier:g}, needs a scale of {largest:g}, "
            f"and a scale is stored in 16 bits, {LARGEST_SCALE:g} at most; skip this linear, or mend the checkpoint"
        )


def scale_task(
    block: Qwen3Block,
    group: ScaleGroup,
    statistics: Any,
    rope: Rope,
    share: Activations,
    apply: Callable[[Tensor], None],
) -> ScaleTask:
    attention = group.site.name == "qkv"

    def run(rows_RTI: Tensor, exchanged: Mapping[str, Tensor]) -> Tensor:
        piece = block.with_weights(exchanged)
        return finish(
            piece.attention_stages(rows_RTI, rope) if attention else piece.mlp_stages(rows_RTI)
        )

    windows = statistics.windows() if isinstance(statistics, Kept) else ()
    row = share.length if attention else 1
    return ScaleTask(group, block.weights, statistics, windows, row, run, share.spool, apply)


def migrate_scale(
    weights: Mapping[str, Tensor], group: ScaleGroup, scale_EI: Tensor
) -> dict[str, Tensor]:
    """The group's weights with `scale` taken from the producer's outputs and given to its readers' input columns.

    The block computes the same function: (x / s) (W s)^T = x W^T.

    Args:
        scale_EI: one scale per channel of the site's input; one row for all experts or, where the producer is an
            expert's own linear, a row an expert.
    """
    changed = {}
    for name in (*group.site.weights, *group.site.also):
        weight = weights[name]
        columns = scale_EI[:, None, :] if weight.ndim == 3 else scale_EI[0]
        changed[name] = (weight.float() * columns).to(weight.dtype)
    producer = weights[group.producer]
    produced_EO = scale_EI
    if group.repeat > 1:
        produced_EO = scale_EI.unflatten(1, (-1, group.repeat, group.head_dim))[:, :, 0].flatten(1)
    if producer.ndim == 1:
        divisor = produced_EO[0]
    else:
        divisor = produced_EO[:, :, None] if producer.ndim == 3 else produced_EO[0][:, None]
    changed[group.producer] = (producer.float() / divisor).to(producer.dtype)
    return changed
