"""GPTQ: round column by column, and let the columns still to come absorb each column's error.

Frantar et al. 2022, arXiv 2210.17323, as IST-DASLab/gptq codes it. Shapes: E experts (1 in a dense block), O out
features, I in features, G groups, S columns per group.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from q3q.calibrate.statistics import Gram
from q3q.numerics.grid import Grid, into_groups, minmax_grid
from q3q.numerics.linalg import damped_factor
from q3q.numerics.weights import QuantizedWeight
from q3q.quantize.method import Method, SiteTask
from q3q.quantize.methods.settings import GptqSettings
from q3q.spec import Scheme

# An expert that fewer calibration tokens reached is rounded to nearest: its Hessian would be noise. The record names it.
MIN_EXPERT_TOKENS = 128


class Gptq(Method):
    """All rows of a site share its Hessian, one factor and one solve: rows are independent given the factor."""

    def __init__(self, settings: GptqSettings) -> None:
        self.settings = settings
        self.sequential = settings.true_sequential  # type: ignore[misc]

    def observe(self) -> Gram:
        return Gram()

    def quantize(self, task: SiteTask, scheme: Scheme) -> QuantizedWeight:
        hessian_EII = task.statistics.mean_EII()
        starved_E = task.statistics.tokens_E < MIN_EXPERT_TOKENS
        if len(starved_E) > 1 and starved_E.any():
            # With the identity for a Hessian no column can help another, and GPTQ is rounding to nearest.
            hessian_EII[starved_E] = torch.eye(hessian_EII.shape[-1], device=hessian_EII.device)
            task.notes["experts_rounded_to_nearest"] = starved_E.nonzero().flatten().tolist()
        solved = gptq_round(
            task.weight_EOI,
            hessian_EII,
            scheme,
            damping=self.settings.damping,
            block_size=self.settings.block_size,
            act_order=self.settings.act_order,
            static_groups=self.settings.static_groups,
            mse=self.settings.mse,
        )
        raised = {e: d for e, d in enumerate(solved.damping_E.tolist()) if d > self.settings.damping * 1.01}
        if raised:
            task.notes["damping_raised"] = raised
        return solved.weight


@dataclass(frozen=True)
class Solved:
    """The quantized weight, and the damping that each expert's Hessian needed."""

    weight: QuantizedWeight
    damping_E: Tensor


def gptq_round(
    weight_EOI: Tensor,
    hessian_EII: Tensor,
    scheme: Scheme,
    *,
    damping: float = 0.01,
    block_size: int = 128,
    act_order: bool = False,
    static_groups: bool = False,
    mse: bool = False,
) -> Solved:
    """Algorithm 1 of GPTQ (arXiv 2210.17323), for every expert at once.

    Args:
        weight_EOI: float32. Not modified.
        hessian_EII: mean of x x^T over calibration tokens, up to any positive factor. Not modified.
        block_size: columns per lazy update of the rest; a group's grid sees updates of earlier blocks only.
        act_order: most active columns (largest Hessian diagonal) first. Groups are then formed in that order.
        static_groups: grids are fixed beforehand from neighbouring original columns, also under act_order.

    Raises:
        ShapeError: the group size does not divide I. NumericsError: the Hessian cannot be factored.
    """
    bits, symmetric = scheme.bits, scheme.symmetric
    experts, rows, columns = weight_EOI.shape
    size = columns if scheme.group_size == -1 else scheme.group_size
    into_groups(weight_EOI, scheme.group_size)  # refuses a size that does not divide

    def grid_of(part_EOS: Tensor) -> Grid:
        return minmax_grid(part_EOS, bits, symmetric=symmetric, mse=mse)

    # The official code takes whole-row grids before it clears the columns that no token ever activates.
    row_grid = grid_of(weight_EOI) if scheme.group_size == -1 else None
    weight_EOI, hessian_EII = weight_EOI.clone(), hessian_EII.clone()
    diagonal_EI = hessian_EII.diagonal(dim1=1, dim2=2)
    dead_EI = diagonal_EI == 0
    diagonal_EI[dead_EI] = 1
    weight_EOI.masked_fill_(dead_EI[:, None, :], 0)

    group_I = torch.arange(columns, device=weight_EOI.device) // size
    fixed = None
    if row_grid is None and static_groups:
        fixed = grid_of(into_groups(weight_EOI, size))
    order_EI = torch.arange(columns, device=weight_EOI.device).expand(experts, columns)
    if act_order:
        order_EI = diagonal_EI.argsort(dim=1, descending=True, stable=True)
        weight_EOI = weight_EOI.gather(2, order_EI[:, None, :].expand_as(weight_EOI))
        hessian_EII = hessian_EII.gather(1, order_EI[:, :, None].expand_as(hessian_EII))
        hessian_EII = hessian_EII.gather(2, order_EI[:, None, :].expand_as(hessian_EII))
    factor_EII, damping_E = damped_factor(hessian_EII, damping)

    codes_EOI = torch.empty_like(weight_EOI)
    scales: list[Tensor] = []
    zeros: list[Tensor] = []
    grid = row_grid
    top = 2**bits - 1
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        block_EOC = weight_EOI[:, :, start:stop].clone()
        error_EOC = torch.empty_like(block_EOC)
        local_ECC = factor_EII[:, start:stop, start:stop]
        for i in range(stop - start):
            column = start + i
            if fixed is not None:
                wanted_EO1 = group_I[order_EI[:, column]][:, None, None].expand(experts, rows, 1)
                grid = Grid(fixed.scale[..., 0].gather(2, wanted_EO1), fixed.zero[..., 0].gather(2, wanted_EO1))
            elif row_grid is None and column % size == 0:
                grid = grid_of(weight_EOI[:, :, column : column + size])
                scales.append(grid.scale)
                zeros.append(grid.zero)
            assert grid is not None
            value_EO1 = block_EOC[:, :, i : i + 1]
            code_EO1 = torch.round(value_EO1 / grid.scale).add_(grid.zero).clamp_(0, top)
            codes_EOI[:, :, column : column + 1] = code_EO1
            wrong_EO1 = (value_EO1 - grid.scale * (code_EO1 - grid.zero)) / local_ECC[:, i, i, None, None]
            # Column i itself is not read again, so the update may start behind it.
            block_EOC[:, :, i + 1 :].baddbmm_(wrong_EO1, local_ECC[:, i : i + 1, i + 1 :], alpha=-1)
            error_EOC[:, :, i : i + 1] = wrong_EO1
        weight_EOI[:, :, stop:].baddbmm_(error_EOC, factor_EII[:, start:stop, stop:], alpha=-1)

    if row_grid is not None:
        scale_EOG, zero_EOG = row_grid.scale[..., 0, None], row_grid.zero[..., 0, None]
    elif fixed is not None:
        scale_EOG, zero_EOG = fixed.scale[..., 0], fixed.zero[..., 0]
    else:
        scale_EOG, zero_EOG = torch.cat(scales, 2), torch.cat(zeros, 2)
    group_EI = None
    if act_order:
        place_EI = order_EI.argsort(1)
        codes_EOI = codes_EOI.gather(2, place_EI[:, None, :].expand_as(codes_EOI))
        if row_grid is None and fixed is None:
            group_EI = group_I[place_EI].to(torch.int32)
    return Solved(QuantizedWeight(codes_EOI.to(torch.uint8), scale_EOG, zero_EOG, bits, symmetric, group_EI), damping_E)
