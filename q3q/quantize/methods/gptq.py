"""GPTQ: round column by column, and let the remaining columns absorb each column's error.

Frantar et al. 2022, arXiv 2210.17323, as IST-DASLab/gptq codes it. Shapes: E experts (1 in a dense
block), O out features, I in features, G groups, S columns per group, C columns of one lazy update,
K grids that those use.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from q3q.numerics.grid import Grid, into_groups
from q3q.numerics.levels import Levels, StoredLevels
from q3q.numerics.linalg import damped_factor
from q3q.numerics.weights import concatenate_experts, concatenate_rows, split_experts
from q3q.quantize.kernels.columns import BlockSolver, block_solver
from q3q.quantize.method import Method, SiteTask, levels_for
from q3q.quantize.methods.settings import GptqSettings
from q3q.quantize.statistics import Gram
from q3q.spec import Scheme

# Rows (of all experts of a chunk) that are solved together. The CPU's number was measured; a GPU
# runs best with as many as fit, and 2**15 rows of 4096 columns take 0.5 GB.
CPU_ROWS, GPU_ROWS = 4096, 2**15

# (start, stop) -> the grids [E, K, O] that columns start .. stop - 1 use, and each column's grid
GridsOf = Callable[[int, int], tuple[Grid, list[int]]]


def gptq_round_plain(
    weight_OI: Tensor,
    hessian_II: Tensor,
    scheme: Scheme,
    *,
    damping: float = 0.01,
    block_size: int = 128,
    act_order: bool = False,
    static_groups: bool = False,
    mse: bool = False,
    dead_diagonal: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Round one linear by Algorithm 1 of GPTQ (arXiv 2210.17323), in the dtype of the arguments.

    The plain algorithm with every option that changes a number: tests compare `gptq_round`, which
    trials run, with it. Each error updates all later columns at once; Algorithm 1 defers a part of
    that to the end of a block, which changes speed alone.

    Returns:
        The rounded weight and its codes, both [O, I].
    """
    columns = weight_OI.shape[1]
    per_row = scheme.group_size == -1
    size = columns if per_row else scheme.group_size
    levels = levels_for(scheme, weight_OI[None])
    weight_OI, hessian_II = weight_OI.clone(), hessian_II.clone()

    def grids_of(weight_OI: Tensor) -> list[Grid]:
        scale_OG1, zero_OG1 = (
            part[0] for part in levels.minmax(into_groups(weight_OI, size)[None], mse=mse)
        )
        return [Grid(*parts) for parts in zip(scale_OG1.unbind(1), zero_OG1.unbind(1), strict=True)]

    static = grids_of(weight_OI)  # the official code takes a row's before it clears dead columns
    dead_I = hessian_II.diagonal() == 0  # no token activates these columns
    hessian_II[dead_I, dead_I], weight_OI[:, dead_I] = dead_diagonal, 0
    static = static if per_row else grids_of(weight_OI)
    order_I = torch.arange(columns)
    if act_order:
        order_I = hessian_II.diagonal().argsort(descending=True, stable=True)
    weight_OI, hessian_II = weight_OI[:, order_I], hessian_II[order_I][:, order_I]
    hessian_II.diagonal().add_(damping * hessian_II.diagonal().mean())  # H + lambda I
    factor_II = torch.linalg.cholesky(hessian_II.inverse(), upper=True)  # Cholesky(H^-1)^T
    codes_OI, rounded_OI = torch.empty_like(weight_OI), torch.empty_like(weight_OI)
    for j in range(columns):
        if j % block_size == 0:
            block_start_OI = weight_OI.clone()  # a group's grid sees updates of earlier blocks only
        if static_groups or per_row or levels.fixed or scheme.own_groups:
            grid = static[order_I[j] // size]
        elif j % size == 0:
            [grid] = grids_of(block_start_OI[:, j : j + size])
        column_O1 = weight_OI[:, j : j + 1]
        rounded_O1 = levels.on_grid(column_O1, grid)  # Q_j = quant(W_j)
        error_O1 = (column_O1 - rounded_O1) / factor_II[j, j]  # E_j = (W_j - Q_j) / U_jj
        weight_OI[:, j + 1 :] -= error_O1 * factor_II[j, j + 1 :]  # W_k -= E_j U_jk for each k > j
        codes_OI[:, j : j + 1] = levels.to_codes(column_O1, grid)
        rounded_OI[:, j : j + 1] = rounded_O1
    place_I = order_I.argsort()
    return rounded_OI[:, place_I], codes_OI[:, place_I]


class Gptq(Method):
    """Solves all rows of a site with one factor: given the factor, rows are independent."""

    settings: GptqSettings

    def observe(self) -> Gram:
        return Gram()

    def row_step(self, device: torch.device) -> int:
        return CPU_ROWS if device.type == "cpu" else GPU_ROWS

    def quantize(self, task: SiteTask, scheme: Scheme) -> StoredLevels:
        gram: Gram = task.statistics
        experts, results, all_levels = len(task.weight_EOI), [], task.levels_for(scheme)
        for hessians in gram.hessians(task.starved_experts()):
            weight_EOI = task.weight_EOI[hessians.experts]
            levels = all_levels.part(hessians.experts, slice(None))
            if gram.shared:  # one Hessian for all experts: their rows are rows of one linear
                weight_EOI, levels = weight_EOI.flatten(0, 1)[None], levels.as_one_linear()
            results.append(
                gptq_round(
                    weight_EOI,
                    hessians.mean_MII,
                    scheme,
                    damping=self.settings.damping,
                    block_size=self.settings.block_size,
                    act_order=self.settings.act_order,
                    static_groups=self.settings.static_groups,
                    mse=self.settings.mse,
                    dead_diagonal_E=hessians.dead_diagonal_M,
                    overwrite_hessian=True,
                    levels=levels,
                )
            )
        damping_E = torch.cat([result.damping_E for result in results]).expand(experts)
        task.note_damping(damping_E, self.settings.damping)
        weight = concatenate_experts([result.weight for result in results])
        return split_experts(weight, experts) if gram.shared else weight


@dataclass(frozen=True)
class GptqResult:
    """The quantized weight, and the damping that each expert's Hessian needed."""

    weight: StoredLevels
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
    dead_diagonal_E: Tensor | None = None,
    solver: BlockSolver | None = None,
    overwrite_hessian: bool = False,
    levels: Levels | None = None,
) -> GptqResult:
    """Round by Algorithm 1 of GPTQ (arXiv 2210.17323), for every expert at once.

    Args:
        weight_EOI: float32. Not modified.
        hessian_EII: mean of x x^T over calibration tokens, up to a positive factor.
        damping: share of the mean Hessian diagonal that is added to the diagonal.
        block_size: columns per lazy update; a group's grid sees updates of earlier blocks only.
        act_order: most active columns (largest Hessian diagonal) first; groups form in that order.
        static_groups: take all grids beforehand from neighbours in the original order; always so
            where the format has groups of its own, which are neighbours by definition.
        mse: shrink each grid's range to the one with the smallest rounding error.
        dead_diagonal_E: diagonal entry of a column that no token activates: 1 in the official code,
            on the scale of its Hessian. It counts in the mean that damping is a share of.
        solver: rounds the columns of one block; by default the device's fastest.
        overwrite_hessian: use the Hessian's memory; otherwise it is not modified.
        levels: the scheme's, for these rows; by default as if each expert were one linear.

    Raises:
        ShapeError: the group size does not divide I.
        NumericsError: the Hessian cannot be factored.
    """
    into_groups(weight_EOI, scheme.group_size)  # raises ShapeError
    columns, damping_E = factored_columns(
        hessian_EII if overwrite_hessian else hessian_EII.clone(),
        damping,
        dead_diagonal_E,
        act_order=act_order,
    )
    levels = levels or levels_for(scheme, weight_EOI)
    solve = partial(
        round_rows,
        group_size=scheme.group_size,
        mse=mse,
        static_groups=static_groups or levels.fixed or scheme.own_groups,
        block_size=block_size,
        solver=solver or block_solver(weight_EOI.device, levels),
    )
    experts, rows, _ = weight_EOI.shape
    max_rows = CPU_ROWS if weight_EOI.device.type == "cpu" else GPU_ROWS
    step = max(1, max_rows // rows)
    parts = []
    for e, part_EOI in zip(range(0, experts, step), weight_EOI.split(step), strict=True):
        part_columns = columns.of_experts(slice(e, e + step))
        solved = [
            solve(
                rows_EOI,
                part_columns,
                levels=levels.part(slice(e, e + step), slice(o, o + max_rows)),
            )
            for o, rows_EOI in zip(
                range(0, rows, max_rows), part_EOI.split(max_rows, 1), strict=True
            )
        ]
        parts.append(concatenate_rows(solved))
    return GptqResult(concatenate_experts(parts), damping_E)


@dataclass(frozen=True)
class Columns:
    """The order in which columns are rounded, for each expert, and the factor in this order.

    factor_EII: upper triangular U, where U^T U is the inverse of the damped Hessian.
    dead_EI: no token activates the column; in the original order.
    order_EI: the original column at each place; None for the original order.
    """

    factor_EII: Tensor
    dead_EI: Tensor
    order_EI: Tensor | None

    def of_experts(self, experts: slice) -> "Columns":
        order_EI = None if self.order_EI is None else self.order_EI[experts]
        return Columns(self.factor_EII[experts], self.dead_EI[experts], order_EI)


def factored_columns(
    hessian_EII: Tensor, damping: float, dead_diagonal_E: Tensor | None, *, act_order: bool
) -> tuple[Columns, Tensor]:
    """Order the columns and factor the inverse of their Hessian, which is overwritten.

    Arguments as in `gptq_round`.

    Returns:
        The columns, and the damping that each Hessian needed [E].
    """
    diagonal_EI = hessian_EII.diagonal(dim1=1, dim2=2)
    dead_EI = diagonal_EI == 0
    if dead_diagonal_E is None:
        dead_diagonal_E = diagonal_EI.new_ones(len(diagonal_EI))
    diagonal_EI.copy_(torch.where(dead_EI, dead_diagonal_E[:, None], diagonal_EI))
    order_EI = None
    if act_order:
        order_EI = diagonal_EI.argsort(dim=1, descending=True, stable=True)
        for expert_II, order_I in zip(hessian_EII, order_EI, strict=True):
            torch.index_select(expert_II[order_I], 1, order_I, out=expert_II)
    factor_EII, damping_E = damped_factor(hessian_EII, damping, overwrite=True)
    return Columns(factor_EII, dead_EI, order_EI), damping_E


def round_rows(
    weight_EOI: Tensor,
    columns: Columns,
    levels: Levels,
    *,
    group_size: int,
    mse: bool,
    static_groups: bool,
    block_size: int,
    solver: BlockSolver,
) -> StoredLevels:
    """Take grids for some rows, order the columns, round one by one, and restore the order."""
    size = weight_EOI.shape[2] if group_size == -1 else group_size
    # The official code takes whole-row grids before it clears columns that no token activates.
    fixed = levels.minmax(weight_EOI[:, :, None], mse=mse) if group_size == -1 else None
    weight_EOI = weight_EOI.masked_fill(columns.dead_EI[:, None], 0)
    if fixed is None and static_groups:
        fixed = levels.minmax(into_groups(weight_EOI, size), mse=mse)
    weight_EIO = in_order(weight_EOI.mT.contiguous(), columns.order_EI)
    if fixed is None:
        shape = (len(weight_EIO), weight_EIO.shape[1] // size, weight_EIO.shape[2])
        grids = Grid(weight_EIO.new_empty(shape), weight_EIO.new_empty(shape))
        grids_of = lazy_grids(weight_EIO, size, partial(levels.minmax, mse=mse), grids)
    else:
        grids = Grid(fixed.scale.squeeze(-1).mT, fixed.zero.squeeze(-1).mT)
        grids_of = fixed_grids(grids, size, columns.order_EI)
    codes_EIO = solve_columns(weight_EIO, columns.factor_EII, levels, block_size, grids_of, solver)
    place_EI = None if columns.order_EI is None else columns.order_EI.argsort(1)
    return levels.stored(
        in_order(codes_EIO, place_EI).mT.contiguous(),
        Grid(grids.scale.mT.contiguous(), grids.zero.mT.contiguous()),
        None if place_EI is None or fixed is not None else (place_EI // size).to(torch.int32),
    )


def fixed_grids(grids: Grid, size: int, order_EI: Tensor | None) -> GridsOf:
    """Look up grids [E, G, O] that were taken from groups of neighbouring original columns."""

    def grids_of(start: int, stop: int) -> tuple[Grid, list[int]]:
        if order_EI is None:
            first = start // size
            used = slice(first, -(-stop // size))
            grid_of_C = [i // size - first for i in range(start, stop)]
            return Grid(grids.scale[:, used], grids.zero[:, used]), grid_of_C
        if grids.scale.shape[1] == 1:
            return grids, [0] * (stop - start)
        group_EC = order_EI[:, start:stop] // size
        ordered = Grid(in_order(grids.scale, group_EC), in_order(grids.zero, group_EC))
        return ordered, list(range(stop - start))

    return grids_of


def lazy_grids(
    weight_EIO: Tensor, size: int, grid_of: Callable[[Tensor], Grid], grids: Grid
) -> GridsOf:
    """Take each group's grid when its block is reached, after the earlier blocks' updates.

    grids: [E, G, O], filled as the blocks are reached.
    """

    def grids_of(start: int, stop: int) -> tuple[Grid, list[int]]:
        first, last = -(-start // size), -(-stop // size)  # the groups that start in this block
        if first < last:
            groups_EKSO = weight_EIO[:, first * size : last * size].unflatten(1, (-1, size))
            taken = grid_of(groups_EKSO.permute(0, 3, 1, 2))
            grids.scale[:, first:last] = taken.scale.squeeze(-1).mT
            grids.zero[:, first:last] = taken.zero.squeeze(-1).mT
        used = slice(start // size, last)
        grid_of_C = [i // size - used.start for i in range(start, stop)]
        return Grid(grids.scale[:, used], grids.zero[:, used]), grid_of_C

    return grids_of


def solve_columns(
    weight_EIO: Tensor,
    factor_EII: Tensor,
    levels: Levels,
    block_size: int,
    grids_of: GridsOf,
    solver: BlockSolver,
) -> Tensor:
    """Round the columns one by one; the remaining columns absorb each column's error.

    Args:
        weight_EIO: transposed, so that a column is contiguous. Overwritten: columns behind the
            current block hold what they have absorbed so far.
        factor_EII: the upper triangular factor of `damped_factor`.

    Returns:
        Codes [E, I, O], uint8.
    """
    codes_EIO = torch.empty(weight_EIO.shape, dtype=torch.uint8, device=weight_EIO.device)
    columns = weight_EIO.shape[1]
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        grids, grid_of_C = grids_of(start, stop)
        pivot_EC1 = factor_EII[:, start:stop, start:stop].diagonal(dim1=1, dim2=2)[:, :, None]
        # With ones on the diagonal, a column's error is its rounding error, without a division.
        factor_ECI = factor_EII[:, start:stop, start:] / pivot_EC1
        codes_ECO, error_ECO = solver(
            weight_EIO[:, start:stop],
            factor_ECI[:, :, : stop - start],
            grids.scale,
            grids.zero,
            grid_of_C,
            levels,
        )
        codes_EIO[:, start:stop] = codes_ECO
        if stop < columns:
            weight_EIO[:, stop:].baddbmm_(factor_ECI[:, :, stop - start :].mT, error_ECO, alpha=-1)
    return codes_EIO


def in_order(values_EIO: Tensor, order_EI: Tensor | None) -> Tensor:
    """Select each expert's rows by index (None: return them unchanged); indices may repeat."""
    if order_EI is None:
        return values_EIO
    pairs = zip(values_EIO, order_EI, strict=True)
    return torch.stack([rows_IO[order_I] for rows_IO, order_I in pairs])
