"""GPTQ's inner loop over the columns of one block: plain, and with few calls per column.

Both solve a block in place. Weights are transposed, so that a column is contiguous. The factor's
rows are divided by their diagonal, so that errors need no division. Shapes: E experts, C columns of
the block, O out features, K grids that the block's columns use. CPU measurements: BENCHMARKS.md.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from q3q.numerics.floats import encode, nearest_
from q3q.numerics.grid import Grid
from q3q.numerics.kernels.compiler import has_fused
from q3q.numerics.levels import BlockLevels, FloatLevels, Levels

# Columns updated one by one before the block's rest absorbs their errors. 16 to 64: equally fast.
SUB_BLOCK = 32

# (weight_ECO, factor_ECC, scale_EKO, zero_EKO, grid_of_C, levels) -> codes_ECO, error_ECO
BlockSolver = Callable[
    [Tensor, Tensor, Tensor, Tensor, Sequence[int], Levels], tuple[Tensor, Tensor]
]


def solve_block_plain(
    weight_ECO: Tensor,
    factor_ECC: Tensor,
    scale_EKO: Tensor,
    zero_EKO: Tensor,
    grid_of_C: Sequence[int],
    levels: Levels,
) -> tuple[Tensor, Tensor]:
    """Round each column; the columns behind it absorb its error (GPTQ's Algorithm 1, inner loop).

    Args:
        weight_ECO: float32. Overwritten.
        factor_ECC: rows of `damped_factor`'s upper triangular factor, over their diagonal.
        grid_of_C: the index of each column's grid among `scale_EKO` and `zero_EKO`.

    Returns:
        Codes, as whole numbers of the weight's type, and each column's rounding error.
    """
    codes_ECO, error_ECO = torch.empty_like(weight_ECO), torch.empty_like(weight_ECO)
    for i, k in enumerate(grid_of_C):
        value_EO, scale_EO, zero_EO = weight_ECO[:, i], scale_EKO[:, k], zero_EKO[:, k]
        if isinstance(levels, BlockLevels):
            grid = Grid(scale_EO, zero_EO)
            code_EO = levels.to_codes(value_EO, grid)
            error_EO = value_EO - levels.on_grid(value_EO, grid)
        elif isinstance(levels, FloatLevels):
            level_EO = nearest_(value_EO / scale_EO, levels.form)
            code_EO, error_EO = encode(level_EO, levels.form), value_EO - scale_EO * level_EO
        else:
            top = 2**levels.bits - 1
            code_EO = ((value_EO / scale_EO).round() + zero_EO).clamp(0, top)
            error_EO = value_EO - scale_EO * (code_EO - zero_EO)
        weight_ECO[:, i + 1 :] -= factor_ECC[:, i, i + 1 :, None] * error_EO[:, None]
        codes_ECO[:, i], error_ECO[:, i] = code_EO, error_EO
    return codes_ECO, error_ECO


def solve_block(
    weight_ECO: Tensor,
    factor_ECC: Tensor,
    scale_EKO: Tensor,
    zero_EKO: Tensor,
    grid_of_C: Sequence[int],
    levels: Levels,
) -> tuple[Tensor, Tensor]:
    """Solve as `solve_block_plain` does, with five calls per column, none of which allocates.

    A floating-point format takes a few calls more, which allocate. GGUF's blocks have offsets where
    whole numbers have zero points, and are solved plainly.
    """
    if isinstance(levels, BlockLevels):
        return solve_block_plain(weight_ECO, factor_ECC, scale_EKO, zero_EKO, grid_of_C, levels)
    form = levels.form if isinstance(levels, FloatLevels) else None
    experts, columns, _ = weight_ECO.shape
    codes_ECO = torch.empty(weight_ECO.shape, device=weight_ECO.device)
    error_ECO = torch.empty_like(codes_ECO)
    # Codes are kept less their zero point: one clamp replaces adding, clamping, subtracting.
    low_EKO, high_EKO = -zero_EKO, 2**levels.bits - 1 - zero_EKO
    weight, factor, codes, error = weight_ECO, factor_ECC, codes_ECO, error_ECO
    grids = (scale_EKO, low_EKO, high_EKO)
    if experts == 1:  # a matrix's rank-1 update is several times faster than that of a batch of one
        weight, factor, codes, error = weight[0], factor[0], codes[0], error[0]
        grids = (scale_EKO[0], low_EKO[0], high_EKO[0])
    axis = weight.ndim - 2
    values, rounded, errors = weight.unbind(axis), codes.unbind(axis), error.unbind(axis)
    scales, lows, highs = (grid.unbind(axis) for grid in grids)
    for start in range(0, columns, SUB_BLOCK):
        stop = min(start + SUB_BLOCK, columns)
        for i in range(start, stop):
            k = grid_of_C[i]
            torch.div(values[i], scales[k], out=rounded[i])
            if form is None:
                torch.clamp(rounded[i].round_(), lows[k], highs[k], out=rounded[i])
            else:
                nearest_(rounded[i], form)
            torch.addcmul(values[i], scales[k], rounded[i], value=-1, out=errors[i])
            if i + 1 == stop:
                break
            if experts == 1:
                weight[i + 1 : stop].addr_(factor[i, i + 1 : stop], errors[i], alpha=-1)
            else:
                row = factor[:, i, i + 1 : stop, None]
                weight[:, i + 1 : stop].baddbmm_(row, errors[i][:, None], alpha=-1)
        if stop < columns:
            rows = factor_ECC[:, start:stop, stop:].mT
            weight_ECO[:, stop:].baddbmm_(rows, error_ECO[:, start:stop], alpha=-1)
    if form is not None:
        return encode(codes_ECO, form).to(codes_ECO.dtype), error_ECO
    for i, k in enumerate(grid_of_C):
        rounded[i].sub_(lows[k])
    return codes_ECO, error_ECO


def block_solver(device: torch.device, levels: Levels) -> BlockSolver:
    """Return the fastest solver: on CUDA the fused kernel, if Triton compiles there.

    It has no GGUF types, which `solve_block` takes on any device.
    """
    if has_fused(device) and not isinstance(levels, BlockLevels):
        from q3q.quantize.kernels.fused import solve_block_fused

        return solve_block_fused
    return solve_block
