"""Uniform grids and rounding to them: pure functions on tensors, batched over every leading axis.

A grid has a scale and a zero point per group of weights; a code c stands for scale * (c - zero), 0 <= c < 2**bits.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from q3q.errors import ShapeError

# GPTQ's MSE search (the `mse` path of IST-DASLab/gptq): 80 shrinks in steps of 1/100, error to the power 2.4.
MSE_SHRINKS, MSE_STEPS, MSE_POWER = 80, 100, 2.4
SMALLEST_RANGE = 1e-5


class Grid(NamedTuple):
    """scale and zero, float32, of any one shape that broadcasts against the weights."""

    scale: Tensor
    zero: Tensor


def minmax_grid(weight_xS: Tensor, bits: int, *, symmetric: bool, mse: bool = False) -> Grid:
    """The grid of GPTQ's Quantizer for each group, a group being the last axis: range forced to include zero.

    Args:
        weight_xS: groups [..., S], float32. Not modified.
        bits: 1 to 8. symmetric: the range is +-max |w|, and the zero point its middle code.
        mse: shrink the range to the one of 80 that costs least, error counted as |w - q|**2.4.

    Returns:
        Grid with shape [..., 1]. A group of zeros gets the range [-1, 1].

    Source: IST-DASLab/gptq, quant.py (find_params).
    """
    top = 2**bits - 1
    low = weight_xS.amin(-1, keepdim=True).clamp(max=0)
    high = weight_xS.amax(-1, keepdim=True).clamp(min=0)
    if symmetric:
        high = torch.maximum(-low, high)
        low = -high
    empty = (low == 0) & (high == 0)
    low, high = low.masked_fill(empty, -1.0), high.masked_fill(empty, 1.0)

    def grid(share: float) -> Grid:
        scale = (high - low) * share / top
        zero = (
            torch.full_like(scale, 2 ** (bits - 1)) if symmetric else (-low * share / scale).round()
        )
        return Grid(scale, zero)

    best = grid(1.0)
    if not mse:
        return best
    best_cost = torch.full_like(low, torch.inf)
    for step in range(MSE_SHRINKS):
        tried = grid(1 - step / MSE_STEPS)
        cost = (
            (on_grid(weight_xS, tried, bits) - weight_xS).abs().pow(MSE_POWER).sum(-1, keepdim=True)
        )
        better = cost < best_cost
        best_cost = torch.where(better, cost, best_cost)
        best = Grid(
            torch.where(better, tried.scale, best.scale), torch.where(better, tried.zero, best.zero)
        )
    return best


def awq_grid(weight_xS: Tensor, bits: int, *, symmetric: bool) -> Grid:
    """The grid of AWQ's pseudo_quantize_tensor: range from the smallest to the largest weight, zero not forced in.

    Source: mit-han-lab/llm-awq, quantizer.py. Shapes as in `minmax_grid`.
    """
    low, high = weight_xS.amin(-1, keepdim=True), weight_xS.amax(-1, keepdim=True)
    return awq_grid_of_range(low, high, bits, symmetric=symmetric)


def awq_grid_of_range(low: Tensor, high: Tensor, bits: int, *, symmetric: bool) -> Grid:
    """`awq_grid` of weights whose smallest and largest are known."""
    if symmetric:
        return absmax_grid(torch.maximum(-low, high), bits)
    top = 2**bits - 1
    scale = (high - low).clamp(min=SMALLEST_RANGE) / top
    return Grid(scale, (-(low / scale).round()).clamp(0, top))


def absmax_grid(weight_xS: Tensor, bits: int) -> Grid:
    """The symmetric grid whose outermost points are +-max |w|; of the 2**bits codes the lowest stays unused.

    Source: SmoothQuant's quantize_weight_per_channel_absmax (mit-han-lab/smoothquant, fake_quant.py), and llm-awq's
    quantizer without zero points. Shapes as in `minmax_grid`; bits 2 or more.
    """
    scale = weight_xS.abs().amax(-1, keepdim=True).clamp(min=SMALLEST_RANGE) / (2 ** (bits - 1) - 1)
    return Grid(scale, torch.full_like(scale, 2 ** (bits - 1)))


def to_codes(weight: Tensor, grid: Grid, bits: int) -> Tensor:
    """Nearest code of each weight, float32 whole numbers in 0 .. 2**bits - 1 (ties to even)."""
    return (weight / grid.scale).round_().add_(grid.zero).clamp_(0, 2**bits - 1)


def on_grid(weight: Tensor, grid: Grid, bits: int) -> Tensor:
    """Each weight moved to the nearest point of its grid."""
    return to_codes(weight, grid, bits).sub_(grid.zero).mul_(grid.scale)


def absmax_per_token(inputs_xI: Tensor, bits: int) -> Tensor:
    """Dynamic symmetric fake quantization of activations, one scale per token; computed in float32.

    Source: SmoothQuant's quantize_activation_per_token_absmax (arXiv 2211.10438), but leaves its input untouched.
    """
    top = 2 ** (bits - 1) - 1
    wide_xI = (
        inputs_xI.float()
    )  # in 16 bits the scale itself is rounded, and codes beyond the top would appear
    scale = wide_xI.abs().amax(-1, keepdim=True).clamp(min=1e-5) / top
    return ((wide_xI / scale).round().clamp(-top, top) * scale).to(inputs_xI.dtype)


def into_groups(weight_xI: Tensor, group_size: int) -> Tensor:
    """[..., I] seen as [..., G, S]; group_size -1 makes the whole row one group.

    Raises:
        ShapeError: `group_size` does not divide I.
    """
    columns = weight_xI.shape[-1]
    size = columns if group_size == -1 else group_size
    if columns % size:
        usable = [s for s in (16, 32, 64, 128, 256) if columns % s == 0]
        raise ShapeError(
            f"group_size={group_size} does not divide {columns} input columns; sizes that do: {usable} or -1"
        )
    return weight_xI.unflatten(-1, (-1, size))
