"""Let a method shift scale between a producer and its readers, one scale group at a time.

Shapes: E experts (1 in a dense block), I in features of the group's site.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from q3q.errors import IncompatibleError
from q3q.models.anatomy import ScaleGroup
from q3q.models.qwen3 import Qwen3Block, Rope, finish
from q3q.quantize.activations import Activations
from q3q.quantize.method import Method, ScaleTask
from q3q.quantize.sites import Chunk, SiteQuantizer
from q3q.quantize.statistics import StoredInputs
from q3q.spec import Scheme


def rebalance_groups(
    block: Qwen3Block,
    method: Method,
    chunks: Sequence[Chunk],
    activations: Activations,
    rope: Rope,
) -> None:
    """Find all groups' scales for the block as it is, each on the rank with the site's statistics;
    then apply them one after the other.

    Args:
        chunks: the observed chunks. A method that rebalances has one at each site.
    """
    team = activations.team
    chunk_of = {chunk.quantizer.site: chunk for chunk in reversed(chunks)}
    groups = [
        (group, chunk_of[group.site])
        for group in block.scale_groups
        if chunk_of[group.site].quantizer.parts
    ]
    schemes = [_only_scheme(chunk.quantizer) for _, chunk in groups]
    scales: list[list[Tensor]] = [[] for _ in groups]
    for (group, chunk), scheme, scales_EI in zip(groups, schemes, scales, strict=True):
        if chunk.owner == team.rank:
            task = scale_task(block, group, chunk.statistics, rope, activations, scales_EI.append)
            method.rebalance(task, scheme)
    for (group, chunk), scales_EI in zip(groups, scales, strict=True):
        for scale_EI in team.broadcast(scales_EI, chunk.owner):
            block.weights.update(migrate_scale(block.weights, group, scale_EI))
            if chunk.owner == team.rank:
                chunk.statistics.rescale(scale_EI)


def _only_scheme(quantizer: SiteQuantizer) -> Scheme:
    part, scheme = quantizer.parts[0]
    if part != quantizer.site and quantizer.method.rebalances:
        raise IncompatibleError(
            f"blocks.{quantizer.result.index}.{quantizer.site.name}: one scale is shifted to all "
            "linears of a site, so they take one setting"
        )
    return scheme


def scale_task(
    block: Qwen3Block,
    group: ScaleGroup,
    statistics: Any,
    rope: Rope,
    activations: Activations,
    apply: Callable[[Tensor], None],
) -> ScaleTask:
    attention = group.site.name == "qkv"

    def run(rows_RTI: Tensor, changed: Mapping[str, Tensor]) -> Tensor:
        piece = block.with_weights(changed)
        return finish(
            piece.attention_stages(rows_RTI, rope) if attention else piece.mlp_stages(rows_RTI)
        )

    windows = statistics.windows() if isinstance(statistics, StoredInputs) else ()
    row = activations.length if attention else 1
    return ScaleTask(group, block.weights, statistics, windows, row, run, activations.spool, apply)


def migrate_scale(
    weights: Mapping[str, Tensor], group: ScaleGroup, scale_EI: Tensor
) -> dict[str, Tensor]:
    """Divide the producer's outputs by the scale, and multiply its readers' input columns by it.

    The block computes the same function: (x / s) (W s)^T = x W^T.

    Args:
        scale_EI: a scale per channel of the site's input: one row for all experts or, where the
            producer is an expert's own linear, one row per expert.

    Returns:
        The changed weights by name.
    """
    changed = {}
    for name in (*group.site.weights, *group.site.unquantized):
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
