"""Uniform grids and rounding to them: pure functions on tensors, batched over every leading axis.

A grid has a scale and a zero point per group of weights; a code c, 0 <= c < 2**bits, represents
scale * (c - zero). A zero point need not be a whole number.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from q3q.errors import ShapeError

# GPTQ's MSE search (`mse` in IST-DASLab/gptq): 80 ranges in steps of 1/100, error to the power 2.4.
MSE_SHRINKS, MSE_STEPS, MSE_POWER = 80, 100, 2.4
SMALLEST_RANGE = 1e-5


class Grid(NamedTuple):
    """A scale and a zero point, of one shape that broadcasts against the weights."""

    scale: Tensor
    zero: Tensor


def minmax_grid(weight_xS: Tensor, bits: int, *, symmetric: bool, mse: bool = False) -> Grid:
    """Take the grid of GPTQ's Quantizer for each group (the last axis); its range includes zero.

    Source: IST-DASLab/gptq, quant.py (find_params).

    Args:
        weight_xS: groups [..., S]. Not modified.
        bits: 1 to 8.
        symmetric: the range is +-max |w|, and the zero point its middle code.
        mse: shrink the range to the one of 80 with the smallest sum of |w - q|**2.4.

    Returns:
        Grid with shape [..., 1]. A group of zeros gets the range [-1, 1].
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
        if symmetric:
            return Grid(scale, torch.full_like(scale, 2 ** (bits - 1)))
        return Grid(scale, (-low * share / scale).round())

    best = grid(1.0)
    if not mse:
        return best
    best_cost = torch.full_like(low, torch.inf)
    for step in range(MSE_SHRINKS):
        tried = grid(1 - step / MSE_STEPS)
        error_xS = (on_grid(weight_xS, tried, bits) - weight_xS).abs()
        cost = error_xS.pow(MSE_POWER).sum(-1, keepdim=True)
        better = cost < best_cost
        best_cost = torch.where(better, cost, best_cost)
        best = Grid(*(torch.where(better, new, old) for new, old in zip(tried, best, strict=True)))
    return best


def awq_grid(weight_xS: Tensor, bits: int, *, symmetric: bool) -> Grid:
    """Take the grid of AWQ's pseudo_quantize_tensor, from the smallest to the largest weight.

    Unlike `minmax_grid`'s, the range need not include zero; shapes are the same. Source:
    mit-han-lab/llm-awq, quantizer.py.
    """
    low, high = weight_xS.amin(-1, keepdim=True), weight_xS.amax(-1, keepdim=True)
    return awq_grid_of_range(low, high, bits, symmetric=symmetric)


def awq_grid_of_range(low: Tensor, high: Tensor, bits: int, *, symmetric: bool) -> Grid:
    """Take the `awq_grid` of weights from their minimum and maximum."""
    if symmetric:
        return absmax_grid(torch.maximum(-low, high), bits)
    top = 2**bits - 1
    scale = (high - low).clamp(min=SMALLEST_RANGE) / top
    return Grid(scale, (-(low / scale).round()).clamp(0, top))


def absmax_grid(weight_xS: Tensor, bits: int) -> Grid:
    """Take the symmetric grid with outermost points +-max |w|, which leaves the lowest code unused.

    Source: quantize_weight_per_channel_absmax (mit-han-lab/smoothquant, fake_quant.py), and
    llm-awq's quantizer without zero points. Shapes as in `minmax_grid`; bits 2 or more.
    """
    scale = weight_xS.abs().amax(-1, keepdim=True).clamp(min=SMALLEST_RANGE) / (2 ** (bits - 1) - 1)
    return Grid(scale, torch.full_like(scale, 2 ** (bits - 1)))


def to_codes(weight: Tensor, grid: Grid, bits: int) -> Tensor:
    """Return each weight's nearest code (ties to even), a whole number, in the weight's dtype.

    Of a zero point that is not whole, the fraction is added before rounding, round(w / s + z), and
    the whole part after it, so that whole ones give the bits of the methods' own code.
    """
    steps, whole = weight / grid.scale, grid.zero.floor()
    if not torch.equal(whole, grid.zero):  # whole zero points spare a pass over all weights
        steps += grid.zero - whole
    return steps.round_().add_(whole).clamp_(0, 2**bits - 1)


def on_grid(weight: Tensor, grid: Grid, bits: int) -> Tensor:
    """Round each weight to the nearest point of its grid."""
    return to_codes(weight, grid, bits).sub_(grid.zero).mul_(grid.scale)


def absmax_per_token(inputs_xI: Tensor, bits: int, group_size: int = -1) -> Tensor:
    """Round activations to a symmetric grid with one scale per token, computed in float32.

    Source: SmoothQuant's quantize_activation_per_token_absmax; this version copies its input.

    Args:
        group_size: channels of a token that share a scale; -1: all.
    """
    if group_size != -1:
        return absmax_per_token(into_groups(inputs_xI, group_size), bits).flatten(-2)
    top = 2 ** (bits - 1) - 1
    wide_xI = inputs_xI.float()  # a scale rounded to 16 bits would give codes beyond the top
    scale = wide_xI.abs().amax(-1, keepdim=True).clamp(min=1e-5) / top
    return ((wide_xI / scale).round().clamp(-top, top) * scale).to(inputs_xI.dtype)


def range_per_token(inputs_xI: Tensor, bits: int, group_size: int = -1) -> Tensor:
    """Round numbers to grids from each group's smallest to its largest one, computed in float32.

    Source: KIVI's quantization of keys and values (jy-yuan/KIVI, new_pack.py), whose smallest
    number is stored beside the scale.

    Args:
        group_size: neighbouring numbers that share a grid; -1: all of the last axis.
    """
    groups_xGS = into_groups(inputs_xI.float(), group_size)
    low, high = groups_xGS.amin(-1, keepdim=True), groups_xGS.amax(-1, keepdim=True)
    top = 2**bits - 1
    scale = (high - low) / top
    scale = torch.where(scale == 0, 1.0, scale)  # all are equal: code 0 is the smallest number
    codes_xGS = ((groups_xGS - low) / scale).round_().clamp_(0, top)
    return codes_xGS.mul_(scale).add_(low).flatten(-2).to(inputs_xI.dtype)


def into_groups(weight_xI: Tensor, group_size: int) -> Tensor:
    """View [..., I] as [..., G, S]; group_size -1 makes the whole row one group.

    Raises:
        ShapeError: `group_size` does not divide I.
    """
    columns = weight_xI.shape[-1]
    size = columns if group_size == -1 else group_size
    if columns % size:
        usable = [s for s in (16, 32, 64, 128, 256) if columns % s == 0]
        raise ShapeError(
            f"group_size={group_size} does not divide {columns} input columns; "
            f"sizes that do: {usable} or -1"
        )
    return weight_xI.unflatten(-1, (-1, size))
