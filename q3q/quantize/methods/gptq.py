"""GPTQ: round column by column, and let the columns still to come absorb each column's error.

Frantar et al. 2022, arXiv 2210.17323, as IST-DASLab/gptq codes it. Shapes: E experts (1 in a dense block), O out
features, I in features, G groups, S columns per group, C columns of one lazy update, K grids that those use.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from q3q.numerics.grid import Grid, into_groups, minmax_grid
from q3q.numerics.linalg import damped_factor
from q3q.numerics.weights import QuantizedWeight, concatenate_rows
from q3q.quantize.kernels.columns import BlockSolver, block_solver
from q3q.quantize.method import Method, SiteTask
from q3q.quantize.methods.settings import GptqSettings
from q3q.quantize.statistics import Gram
from q3q.spec import Scheme

# Rows (of all experts of a chunk) that go through the columns together: on a CPU as measured; a GPU wants all it can
# get, and so many of 4096 columns are 0.5 GB.
CPU_ROWS, GPU_ROWS = 4096, 2**15

# (first column, column after the last) -> the grids [E, K, O] that these columns use, and which one each uses
GridsOf = Callable[[int, int], tuple[Grid, list[int]]]


class Gptq(Method):
    """All rows of a site share its Hessian, one factor and one solve: rows are independent given the factor."""

    def __init__(self, settings: GptqSettings) -> None:
        self.settings = settings
        self.sequential = settings.true_sequential  # type: ignore[misc]

    def observe(self) -> Gram:
        return Gram()

    def row_step(self, device: torch.device) -> int:
        return CPU_ROWS if device.type == "cpu" else GPU_ROWS

    def quantize(self, task: SiteTask, scheme: Scheme) -> QuantizedWeight:
        gram: Gram = task.statistics
        experts, solved = len(task.weight_EOI), []
        for hessians in gram.hessians(task.starved_experts()):
            weight_EOI = task.weight_EOI[hessians.experts]
            if gram.shared:  # one Hessian for all experts: their rows are rows of one linear
                weight_EOI = weight_EOI.flatten(0, 1)[None]
            solved.append(
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
                )
            )
        task.note_damping(
            torch.cat([part.damping_E for part in solved]).expand(experts), self.settings.damping
        )
        weight = concatenate_experts([part.weight for part in solved])
        return split_experts(weight, experts) if gram.shared else weight


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
    dead_diagonal_E: Tensor | None = None,
    solver: BlockSolver | None = None,
    overwrite_hessian: bool = False,
) -> Solved:
    """Algorithm 1 of GPTQ (arXiv 2210.17323), for every expert at once.

    Args:
        weight_EOI: float32. Not modified.
        hessian_EII: mean of x x^T over calibration tokens, or that times any positive factor: the codes are the same.
        block_size: columns per lazy update of the rest; a group's grid sees updates of earlier blocks only.
        act_order: most active columns (largest Hessian diagonal) first. Groups are then formed in that order.
        static_groups: grids are fixed beforehand from neighbouring original columns, also under act_order.
        dead_diagonal_E: what the diagonal becomes where no token activates a column: 1 in the official code, on the
            scale of its Hessian. It weighs in the mean that damping is a share of.
        solver: of one block's columns; by default the device's fastest.
        overwrite_hessian: its memory may be used; otherwise it is not modified.

    Raises:
        ShapeError: the group size does not divide I. NumericsError: the Hessian cannot be factored.
    """
    into_groups(weight_EOI, scheme.group_size)  # refuses a size that does not divide
    columns, damping_E = factored_columns(
        hessian_EII if overwrite_hessian else hessian_EII.clone(),
        damping,
        dead_diagonal_E,
        act_order=act_order,
    )
    grid_of = partial(minmax_grid, bits=scheme.bits, symmetric=scheme.symmetric, mse=mse)
    solve = partial(
        round_rows,
        scheme=scheme,
        grid_of=grid_of,
        static_groups=static_groups,
        block_size=block_size,
        solver=solver or block_solver(weight_EOI.device),
    )
    experts, rows, _ = weight_EOI.shape
    at_once = CPU_ROWS if weight_EOI.device.type == "cpu" else GPU_ROWS
    few = max(1, at_once // rows)
    solved = [
        concatenate_rows(
            [solve(part_eoI, columns.of(e, e + few)) for part_eoI in some_eOI.split(at_once, 1)]
        )
        for e, some_eOI in zip(range(0, experts, few), weight_EOI.split(few), strict=True)
    ]
    return Solved(concatenate_experts(solved), damping_E)


@dataclass(frozen=True)
class Columns:
    """The columns as they are treated, of each expert.

    factor_EII: upper triangular U, U^T U the inverse of the damped Hessian, in that order. dead_EI: no token activates
    the column. order_EI: which column comes at each place, None for one after the other.
    """

    factor_EII: Tensor
    dead_EI: Tensor
    order_EI: Tensor | None

    def of(self, first: int, stop: int) -> "Columns":
        some = slice(first, stop)
        order_EI = None if self.order_EI is None else self.order_EI[some]
        return Columns(self.factor_EII[some], self.dead_EI[some], order_EI)


def factored_columns(
    hessian_EII: Tensor, damping: float, dead_diagonal_E: Tensor | None, *, act_order: bool
) -> tuple[Columns, Tensor]:
    """Order the columns, and factor the inverse of their Hessian, which is overwritten. Also the damping needed [E]."""
    diagonal_EI = hessian_EII.diagonal(dim1=1, dim2=2)
    dead_EI = diagonal_EI == 0
    one_E = diagonal_EI.new_ones(len(diagonal_EI)) if dead_diagonal_E is None else dead_diagonal_E
    diagonal_EI.copy_(torch.where(dead_EI, one_E[:, None], diagonal_EI))
    order_EI = None
    if act_order:
        order_EI = diagonal_EI.argsort(dim=1, descending=True, stable=True)
        for whole_II, order_I in zip(hessian_EII, order_EI, strict=True):
            torch.index_select(whole_II[order_I], 1, order_I, out=whole_II)
    factor_EII, damping_E = damped_factor(hessian_EII, damping, overwrite=True)
    return Columns(factor_EII, dead_EI, order_EI), damping_E


def round_rows(
    weight_EOI: Tensor,
    columns: Columns,
    scheme: Scheme,
    grid_of: Callable[[Tensor], Grid],
    *,
    static_groups: bool,
    block_size: int,
    solver: BlockSolver,
) -> QuantizedWeight:
    """Some rows, of which none depends on another given the factor: take grids, round column by column, put back."""
    size = weight_EOI.shape[2] if scheme.group_size == -1 else scheme.group_size
    fixed: Grid | None = None
    if scheme.group_size == -1:
        # The official code takes whole-row grids before it clears the columns that no token ever activates.
        fixed = grid_of(weight_EOI)
    weight_EOI = weight_EOI.masked_fill(columns.dead_EI[:, None], 0)
    if fixed is None and static_groups:
        grid = grid_of(into_groups(weight_EOI, size))
        fixed = Grid(grid.scale.squeeze(-1), grid.zero.squeeze(-1))
    weight_EIO = in_order(weight_EOI.mT.contiguous(), columns.order_EI)
    if fixed is None:
        shape = (len(weight_EIO), weight_EIO.shape[1] // size, weight_EIO.shape[2])
        grids = Grid(weight_EIO.new_empty(shape), weight_EIO.new_empty(shape))
        grids_of = started_grids(weight_EIO, size, grid_of, grids)
    else:
        grids = Grid(fixed.scale.mT, fixed.zero.mT)
        grids_of = fixed_grids(grids, size, columns.order_EI)
    codes_EIO = solve_columns(
        weight_EIO, columns.factor_EII, scheme.bits, block_size, grids_of, solver
    )
    place_EI = None if columns.order_EI is None else columns.order_EI.argsort(1)
    return QuantizedWeight(
        in_order(codes_EIO, place_EI).mT.contiguous(),
        grids.scale.mT.contiguous(),
        grids.zero.mT.contiguous(),
        scheme.bits,
        scheme.symmetric,
        None if place_EI is None or fixed is not None else (place_EI // size).to(torch.int32),
    )


def fixed_grids(grids: Grid, size: int, order_EI: Tensor | None) -> GridsOf:
    """Grids [E, G, O] that were taken beforehand, of groups of neighbours; each expert's columns come in its order."""

    def grids_of(start: int, stop: int) -> tuple[Grid, list[int]]:
        if order_EI is None:
            first = start // size
            used = slice(first, -(-stop // size))
            return Grid(grids.scale[:, used], grids.zero[:, used]), [
                i // size - first for i in range(start, stop)
            ]
        if grids.scale.shape[1] == 1:
            return grids, [0] * (stop - start)
        group_EC = order_EI[:, start:stop] // size
        return Grid(in_order(grids.scale, group_EC), in_order(grids.zero, group_EC)), list(
            range(stop - start)
        )

    return grids_of


def started_grids(
    weight_EIO: Tensor, size: int, grid_of: Callable[[Tensor], Grid], grids: Grid
) -> GridsOf:
    """Grids that are taken when a block is reached, from its groups as earlier blocks left them.

    grids: [E, G, O], filled as the blocks are reached.
    """

    def grids_of(start: int, stop: int) -> tuple[Grid, list[int]]:
        first, last = -(-start // size), -(-stop // size)  # the groups that start in this block
        if first < last:
            groups_EKOS = weight_EIO[:, first * size : last * size].unflatten(1, (-1, size)).mT
            fresh = grid_of(groups_EKOS)
            grids.scale[:, first:last], grids.zero[:, first:last] = (
                fresh.scale.squeeze(-1),
                fresh.zero.squeeze(-1),
            )
        used = slice(start // size, last)
        return Grid(grids.scale[:, used], grids.zero[:, used]), [
            i // size - used.start for i in range(start, stop)
        ]

    return grids_of


def solve_columns(
    weight_EIO: Tensor,
    factor_EII: Tensor,
    bits: int,
    block_size: int,
    grids_of: GridsOf,
    solver: BlockSolver,
) -> Tensor:
    """Round the columns one after the other, each error absorbed by the columns behind it.

    Args:
        weight_EIO: overwritten: columns behind the current block hold what they have absorbed so far. Transposed, so
            that a column is contiguous.
        factor_EII: upper triangular, `damped_factor`'s.

    Returns:
        Codes [E, I, O], uint8.
    """
    codes_EIO = torch.empty(weight_EIO.shape, dtype=torch.uint8, device=weight_EIO.device)
    columns = weight_EIO.shape[1]
    for start in range(0, columns, block_size):
        stop = min(start + block_size, columns)
        grids, grid_of_C = grids_of(start, stop)
        pivot_EC1 = factor_EII[:, start:stop, start:stop].diagonal(dim1=1, dim2=2)[:, :, None]
        # With ones on the diagonal, the error of a column is what it was rounded by, without a division.
        factor_ECI = factor_EII[:, start:stop, start:] / pivot_EC1
        block = slice(0, stop - start)
        codes_ECO, error_ECO = solver(
            weight_EIO[:, start:stop],
            factor_ECI[:, :, block],
            grids.scale,
            grids.zero,
            grid_of_C,
            2**bits - 1,
        )
        codes_EIO[:, start:stop] = codes_ECO
        if stop < columns:
            weight_EIO[:, stop:].baddbmm_(factor_ECI[:, :, block.stop :].mT, error_ECO, alpha=-1)
    return codes_EIO


def in_order(values_EIO: Tensor, order_EI: Tensor | None) -> Tensor:
    """Each expert's rows in its order, in which a row may come more than once or not at all; as they are with None."""
    if order_EI is None:
        return values_EIO
    return torch.stack(
        [rows_IO[order_I] for rows_IO, order_I in zip(values_EIO, order_EI, strict=True)]
    )


def concatenate_experts(parts: list[QuantizedWeight]) -> QuantizedWeight:
    """Several experts' weights, of one scheme, as one."""
    if len(parts) == 1:
        return parts[0]
    groups = [part.group_EI for part in parts if part.group_EI is not None]
    return QuantizedWeight(
        torch.cat([part.codes_EOI for part in parts]),
        torch.cat([part.scale_EOG for part in parts]),
        torch.cat([part.zero_EOG for part in parts]),
        parts[0].bits,
        parts[0].symmetric,
        torch.cat(groups) if groups else None,
    )


def split_experts(weight: QuantizedWeight, experts: int) -> QuantizedWeight:
    """Rows of one linear as those of several experts, which then share its grouping of columns."""
    return QuantizedWeight(
        weight.codes_EOI[0].unflatten(0, (experts, -1)),
        weight.scale_EOG[0].unflatten(0, (experts, -1)),
        weight.zero_EOG[0].unflatten(0, (experts, -1)),
        weight.bits,
        weight.symmetric,
        None if weight.group_EI is None else weight.group_EI.expand(experts, -1),
    )
