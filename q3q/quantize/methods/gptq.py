"""GPTQ: round column by column, and let the columns still to come absorb each column's error.

Frantar et al. 2022, arXiv 2210.17323, as IST-DASLab/gptq codes it. Shapes: E experts (1 in a dense block), O out
features, I in features, G groups, S columns per group, C columns of one lazy update, K grids that those use.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from q3q.calibrate.statistics import Gram, starved_experts
from q3q.numerics.grid import Grid, into_groups, minmax_grid
from q3q.numerics.linalg import damped_factor
from q3q.numerics.weights import QuantizedWeight, concatenate_rows
from q3q.quantize.kernels.columns import BlockSolver, block_solver
from q3q.quantize.method import Method, SiteTask
from q3q.quantize.methods.settings import GptqSettings
from q3q.spec import Scheme

# Experts are factored and solved in chunks: bytes of their Hessians, of which a factorization holds up to eight copies.
HESSIAN_BYTES = 2**27
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

    def quantize(self, task: SiteTask, scheme: Scheme) -> QuantizedWeight:
        gram: Gram = task.statistics
        weight_EOI = task.weight_EOI
        experts, _, columns = weight_EOI.shape
        starved = starved_experts(gram.tokens_E)
        if starved:
            task.notes["experts_rounded_to_nearest"] = starved
        if gram.shared:  # one Hessian for all experts: their rows are rows of one linear
            weight_EOI = weight_EOI.flatten(0, 1)[None]
        # The official Hessian is 2/windows * sum x x^T, ours the mean over tokens.
        dead_diagonal_E = gram.windows / (2 * gram.tokens_E.clamp(min=1)).to(weight_EOI.device)
        solved = []
        chunk = max(1, HESSIAN_BYTES // (4 * columns**2))
        for first in range(0, len(weight_EOI), chunk):
            some = slice(first, min(first + chunk, len(weight_EOI)))
            hessian_EII = gram.mean_EII(some)
            # With the identity for a Hessian no column can help another, and GPTQ is rounding to nearest.
            for e in starved:
                if some.start <= e < some.stop:
                    hessian_EII[e - some.start] = torch.eye(columns, device=hessian_EII.device)
            solved.append(
                gptq_round(
                    weight_EOI[some],
                    hessian_EII,
                    scheme,
                    damping=self.settings.damping,
                    block_size=self.settings.block_size,
                    act_order=self.settings.act_order,
                    static_groups=self.settings.static_groups,
                    mse=self.settings.mse,
                    dead_diagonal_E=dead_diagonal_E[some],
                )
            )
        damping_E = torch.cat([part.damping_E for part in solved]).expand(experts)
        raised = {e: d for e, d in enumerate(damping_E.tolist()) if d > self.settings.damping * 1.01}
        if raised:
            task.notes["damping_raised"] = raised
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
) -> Solved:
    """Algorithm 1 of GPTQ (arXiv 2210.17323), for every expert at once.

    Args:
        weight_EOI: float32. Not modified.
        hessian_EII: mean of x x^T over calibration tokens, or that times any positive factor: the codes are the same.
            Not modified.
        block_size: columns per lazy update of the rest; a group's grid sees updates of earlier blocks only.
        act_order: most active columns (largest Hessian diagonal) first. Groups are then formed in that order.
        static_groups: grids are fixed beforehand from neighbouring original columns, also under act_order.
        dead_diagonal_E: what the diagonal becomes where no token activates a column: 1 in the official code, on the
            scale of its Hessian. It weighs in the mean that damping is a share of.
        solver: of one block's columns; by default the device's fastest.

    Raises:
        ShapeError: the group size does not divide I. NumericsError: the Hessian cannot be factored.
    """
    into_groups(weight_EOI, scheme.group_size)  # refuses a size that does not divide
    experts, rows, columns = weight_EOI.shape
    size = columns if scheme.group_size == -1 else scheme.group_size
    diagonal_EI = hessian_EII.diagonal(dim1=1, dim2=2)
    dead_EI = diagonal_EI == 0
    if dead_EI.any():
        one_E = torch.ones(experts, device=weight_EOI.device) if dead_diagonal_E is None else dead_diagonal_E
        hessian_EII = hessian_EII.clone()
        diagonal_EI = torch.where(dead_EI, one_E[:, None], diagonal_EI)
        hessian_EII.diagonal(dim1=1, dim2=2).copy_(diagonal_EI)
    order_EI = torch.arange(columns, device=weight_EOI.device).expand(experts, columns)
    if act_order:
        order_EI = diagonal_EI.argsort(dim=1, descending=True, stable=True)
        pairs = zip(hessian_EII, order_EI, strict=True)
        hessian_EII = torch.stack([whole_II[order_I][:, order_I] for whole_II, order_I in pairs])
    factor_EII, damping_E = damped_factor(hessian_EII, damping)
    place_EI = order_EI.argsort(1)

    def grid_of(part_xS: Tensor) -> Grid:
        return minmax_grid(part_xS, scheme.bits, symmetric=scheme.symmetric, mse=mse)

    def solve(some: slice, weight_EOI: Tensor) -> QuantizedWeight:
        """Some experts, and some of their rows."""
        fixed: Grid | None = None
        if scheme.group_size == -1:
            # The official code takes whole-row grids before it clears the columns that no token ever activates.
            fixed = grid_of(weight_EOI)
        weight_EOI = weight_EOI.masked_fill(dead_EI[some, None], 0)
        if fixed is None and static_groups:
            grid = grid_of(into_groups(weight_EOI, size))
            fixed = Grid(grid.scale.squeeze(-1), grid.zero.squeeze(-1))
        weight_EIO = permuted(weight_EOI.mT.contiguous(), order_EI[some])
        if fixed is None:
            shape = (len(weight_EIO), columns // size, weight_EIO.shape[2])
            grids = Grid(weight_EIO.new_empty(shape), weight_EIO.new_empty(shape))
            grids_of = started_grids(weight_EIO, size, grid_of, grids)
        else:
            grids = Grid(fixed.scale.mT, fixed.zero.mT)
            grids_of = fixed_grids(grids, order_EI[some] // size)
        codes_EIO = solve_columns(
            weight_EIO, factor_EII[some], scheme.bits, block_size, grids_of, solver or block_solver(weight_EIO.device)
        )
        return QuantizedWeight(
            permuted(codes_EIO, place_EI[some]).mT.contiguous(),
            grids.scale.mT.contiguous(),
            grids.zero.mT.contiguous(),
            scheme.bits,
            scheme.symmetric,
            (place_EI[some] // size).to(torch.int32) if act_order and fixed is None else None,
        )

    at_once = CPU_ROWS if weight_EOI.device.type == "cpu" else GPU_ROWS
    chunks = [slice(e, e + max(1, at_once // rows)) for e in range(0, experts, max(1, at_once // rows))]
    return Solved(
        concatenate_experts(
            [concatenate_rows([solve(some, part) for part in weight_EOI[some].split(at_once, 1)]) for some in chunks]
        ),
        damping_E,
    )


def fixed_grids(grids: Grid, group_EI: Tensor) -> GridsOf:
    """Grids [E, G, O] that were taken beforehand, and the group of each column, which may differ by expert."""

    def grids_of(start: int, stop: int) -> tuple[Grid, list[int]]:
        if grids.scale.shape[1] == 1:
            return grids, [0] * (stop - start)
        group_EC = group_EI[:, start:stop]
        return Grid(permuted(grids.scale, group_EC), permuted(grids.zero, group_EC)), list(range(stop - start))

    return grids_of


def started_grids(weight_EIO: Tensor, size: int, grid_of: Callable[[Tensor], Grid], grids: Grid) -> GridsOf:
    """Grids that are taken when a block is reached, from its groups as earlier blocks left them.

    grids: [E, G, O], filled as the blocks are reached.
    """

    def grids_of(start: int, stop: int) -> tuple[Grid, list[int]]:
        first, last = -(-start // size), -(-stop // size)  # the groups that start in this block
        if first < last:
            groups_EKOS = weight_EIO[:, first * size : last * size].unflatten(1, (-1, size)).mT
            fresh = grid_of(groups_EKOS)
            grids.scale[:, first:last], grids.zero[:, first:last] = fresh.scale.squeeze(-1), fresh.zero.squeeze(-1)
        used = slice(start // size, last)
        return Grid(grids.scale[:, used], grids.zero[:, used]), [i // size - used.start for i in range(start, stop)]

    return grids_of


def solve_columns(
    weight_EIO: Tensor, factor_EII: Tensor, bits: int, block_size: int, grids_of: GridsOf, solver: BlockSolver
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
            weight_EIO[:, start:stop], factor_ECI[:, :, block], grids.scale, grids.zero, grid_of_C, 2**bits - 1
        )
        codes_EIO[:, start:stop] = codes_ECO
        if stop < columns:
            weight_EIO[:, stop:].baddbmm_(factor_ECI[:, :, block.stop :].mT, error_ECO, alpha=-1)
    return codes_EIO


def permuted(values_EIO: Tensor, order_EI: Tensor) -> Tensor:
    """Each expert's rows in its order; a row may be taken more than once or not at all."""
    return torch.stack([rows_IO[order_I] for rows_IO, order_I in zip(values_EIO, order_EI, strict=True)])


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
