"""GPTQ's inner loop over the columns of one block: plain, and with as few framework calls per column as can be.

Both solve the same block in place: weights lie transposed, so that a column is contiguous, and the factor's rows are
divided by their diagonal, so that an error need not be. Shapes: E experts, C columns of the block, O out features, K
grids that the block's columns use. Measured on a CPU: BENCHMARKS.md.
"""

from collections.abc import Callable, Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

# Columns that are updated one by one; the rest of the block absorbs their errors together. 16 to 64 measure alike.
SUB_BLOCK = 32

# (weight_ECO, factor_ECC, scale_EKO, zero_EKO, grid_of_C, top) -> codes_ECO, error_ECO
BlockSolver = Callable[[Tensor, Tensor, Tensor, Tensor, Sequence[int], int], tuple[Tensor, Tensor]]


def solve_block_plain(
    weight_ECO: Tensor,
    factor_ECC: Tensor,
    scale_EKO: Tensor,
    zero_EKO: Tensor,
    grid_of_C: Sequence[int],
    top: int,
) -> tuple[Tensor, Tensor]:
    """Round each column; the columns behind it absorb its error (arXiv 2210.17323, Algorithm 1, the inner loop).

    Args:
        weight_ECO: float32. Overwritten.
        factor_ECC: upper triangular with ones on the diagonal: rows of `damped_factor`'s, each over its diagonal.
        scale_EKO, zero_EKO, grid_of_C: the grids, and which one each column uses.
        top: largest code.

    Returns:
        Codes, as whole float32 numbers, and what each column was rounded by.
    """
    codes_ECO, error_ECO = torch.empty_like(weight_ECO), torch.empty_like(weight_ECO)
    for i, k in enumerate(grid_of_C):
        value_EO, scale_EO, zero_EO = weight_ECO[:, i], scale_EKO[:, k], zero_EKO[:, k]
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
    top: int,
) -> tuple[Tensor, Tensor]:
    """`solve_block_plain` with five calls per column, none of which allocates."""
    experts, columns, _ = weight_ECO.shape
    codes_ECO = torch.empty(weight_ECO.shape, device=weight_ECO.device)
    error_ECO = torch.empty_like(codes_ECO)
    # A code less its zero point, clamped between two whole numbers: one call where shifting there and back takes three.
    low_EKO, high_EKO = -zero_EKO, top - zero_EKO
    weight, factor, codes, error = weight_ECO, factor_ECC, codes_ECO, error_ECO
    grids = (scale_EKO, low_EKO, high_EKO)
    if experts == 1:  # a rank-1 update of a matrix is several times faster than of a batch of one
        weight, factor, codes, error = weight[0], factor[0], codes[0], error[0]
        grids = (scale_EKO[0], low_EKO[0], high_EKO[0])
    axis = weight.ndim - 2
    values, levels, errors = weight.unbind(axis), codes.unbind(axis), error.unbind(axis)
    scales, lows, highs = (grid.unbind(axis) for grid in grids)
    for start in range(0, columns, SUB_BLOCK):
        stop = min(start + SUB_BLOCK, columns)
        for i in range(start, stop):
            value, level, wrong, k = values[i], levels[i], errors[i], grid_of_C[i]
            torch.div(value, scales[k], out=level)
            torch.clamp(level.round_(), lows[k], highs[k], out=level)
            torch.addcmul(value, scales[k], level, value=-1, out=wrong)
            if i + 1 == stop:
                break
            if experts == 1:
                weight[i + 1 : stop].addr_(factor[i, i + 1 : stop], wrong, alpha=-1)
            else:
                weight[:, i + 1 : stop].baddbmm_(
                    factor[:, i, i + 1 : stop, None], wrong[:, None], alpha=-1
                )
        if stop < columns:
            weight_ECO[:, stop:].baddbmm_(
                factor_ECC[:, start:stop, stop:].mT, error_ECO[:, start:stop], alpha=-1
            )
    for i, k in enumerate(grid_of_C):
        levels[i].sub_(lows[k])
    return codes_ECO, error_ECO


def block_solver(device: torch.device) -> BlockSolver:
    """The fastest solver for a device: on CUDA the fused kernel, if Triton (which comes with PyTorch there) is here."""
    if device.type == "cuda" and find_spec("triton") is not None:
        from q3q.quantize.kernels.fused import solve_block_fused

        return solve_block_fused
    return solve_block
