"""GPTQ: round column by column, and let the columns still to come absorb each column's error.

Frantar et al. 2022, arXiv 2210.17323, as IST-DASLab/gptq codes it. Shapes: E experts (1 in a dense block), O out
features, I in features, G groups, S columns per group.
"""

from collections.abc import Callable
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

# An expert that fewer calibration tokens reached is rounded to nearest (its Hessian would be noise) and named.
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
        hessian_EII: mean of x x^T over calibration tokens. Any positive factor gives the same codes, but for columns
            that no token activates: their diagonal becomes 1, which weighs in the mean that damping is a share of.
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
    fixed = grid_of(weight_EOI) if scheme.group_size == -1 else None
    weight_EOI, hessian_EII = weight_EOI.clone(), hessian_EII.clone()
    diagonal_EI = hessian_EII.diagonal(dim1=1, dim2=2)
    dead_EI = diagonal_EI == 0
    diagonal_EI[dead_EI] = 1
    weight_EOI.masked_fill_(dead_EI[:, None, :], 0)
    if fixed is None and static_groups:
        grid = grid_of(into_groups(weight_EOI, size))
        fixed = Grid(grid.scale.squeeze(-1), grid.zero.squeeze(-1))

    order_EI = torch.arange(columns, device=weight_EOI.device).expand(experts, columns)
    if act_order:
        order_EI = diagonal_EI.argsort(dim=1, descending=True, stable=True)
        weight_EOI = weight_EOI.gather(2, order_EI[:, None, :].expand_as(weight_EOI))
        hessian_EII = hessian_EII.gather(1, order_EI[:, :, None].expand_as(hessian_EII))
        hessian_EII = hessian_EII.gather(2, order_EI[:, None, :].expand_as(hessian_EII))
    factor_EII, damping_E = damped_factor(hessian_EII, damping)

    started: list[Grid] = []

    def next_grid(column: int, rest_EOC: Tensor) -> Grid:
        """The grid of this column of the order."""
        if fixed is not None:
            group_EO1 = (order_EI[:, column] // size)[:, None, None].expand(experts, rows, 1)
            return Grid(fixed.scale.gather(2, group_EO1), fixed.zero.gather(2, group_EO1))
        if column % size == 0:
            started.append(grid_of(rest_EOC[:, :, :size]))
        return started[-1]

    codes_EOI = solve_columns(weight_EOI, factor_EII, bits, block_size, next_grid)
    place_EI = order_EI.argsort(1)
    codes_EOI = codes_EOI.gather(2, place_EI[:, None, :].expand_as(codes_EOI))
    if fixed is None:
        fixed = Grid(torch.cat([grid.scale for grid in started], 2), torch.cat([grid.zero for grid in started], 2))
        group_EI = (place_EI // size).to(torch.int32) if act_order else None
    else:
        group_EI = None
    weight = QuantizedWeight(codes_EOI.to(torch.uint8), fixed.scale, fixed.zero, bits, symmetric, group_EI)
    return Solved(weight, damping_E)


def solve_columns(
    weight_EOI: Tensor,
    factor_EII: Tensor,
    bits: int,
    block_size: int,
    next_grid: Callable[[int, Tensor], Grid],
) -> Tensor:
    """Round the columns one after the other, each error absorbed by the columns behind it.

    Args:
        weight_EOI: overwritten: columns behind the current block hold what they have absorbed so far.
        factor_EII: upper triangular, `damped_factor`'s.
        next_grid: given a column and the weights from there on (as earlier blocks left them), its grid [E, O, 1].

    Returns:
        Codes [E, O, I] as whole float32 numbers.
    """
    codes_EOI = torch.empty_like(weight_EOI)
    columns, top = weight_EOI.shape[2], 2**bits - 1
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        block_EOC = weight_EOI[:, :, start:stop].clone()
        error_EOC = torch.empty_like(block_EOC)
        local_ECC = factor_EII[:, start:stop, start:stop]
        for i in range(stop - start):
            scale_EO1, zero_EO1 = next_grid(start + i, weight_EOI[:, :, start + i :])
            value_EO1 = block_EOC[:, :, i : i + 1]
            code_EO1 = torch.round(value_EO1 / scale_EO1).add_(zero_EO1).clamp_(0, top)
            codes_EOI[:, :, start + i : start + i + 1] = code_EO1
            wrong_EO1 = (value_EO1 - scale_EO1 * (code_EO1 - zero_EO1)) / local_ECC[:, i, i, None, None]
            # Column i itself is not read again, so the update may start behind it.
            block_EOC[:, :, i + 1 :].baddbmm_(wrong_EO1, local_ECC[:, i : i + 1, i + 1 :], alpha=-1)
            error_EOC[:, :, i : i + 1] = wrong_EO1
        weight_EOI[:, :, stop:].baddbmm_(error_EOC, factor_EII[:, start:stop, stop:], alpha=-1)
    return codes_EOI
