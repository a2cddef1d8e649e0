"""GPTQ's inner loop over the columns of one block, as one Triton kernel.

Importing this file needs Triton. Tested in Triton's interpreter on a CPU. Shapes as in `columns`.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from q3q.numerics.levels import FloatLevels, Levels

# Rows that one program solves; a block of 128 columns of them stays in registers.
BLOCK_ROWS = 16


@triton.jit
def _solve(  # type: ignore[no-untyped-def]
    weight,
    factor,
    scale,
    zero,
    grid_of,
    codes,
    error,
    columns,
    rows,
    grids,
    weight_stride,
    top,
    smallest_normal,
    first_binade,
    MANTISSA: tl.constexpr,
    SIGN: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    e = tl.program_id(0).to(tl.int64)
    o = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    c = tl.arange(0, BLOCK_COLUMNS)
    inside = o < rows
    offset = c[:, None] * rows + o[None, :]
    tile = tl.load(
        weight + e * weight_stride + offset,
        mask=(c < columns)[:, None] & inside[None, :],
        other=0.0,
    )
    for i in range(columns):
        k = e * grids + tl.load(grid_of + i)
        s = tl.load(scale + k * rows + o, mask=inside, other=1.0)
        z = tl.load(zero + k * rows + o, mask=inside, other=0.0)
        value = tl.sum(tl.where(c[:, None] == i, tile, 0.0), axis=0)
        # Clamped first (the bounds are whole), so that +- 1.5 * 2**23 rounds half to even.
        if SIGN > 0:  # a floating-point format, whose steps are powers of two: as `nearest_`
            step_count = tl.minimum(tl.maximum(tl.div_rn(value, s), -top), top)
            exponent = step_count.to(tl.int32, bitcast=True) & 0x7F800000
            power = tl.maximum(exponent.to(tl.float32, bitcast=True), smallest_normal)
            step = power * (1.0 / (1 << MANTISSA))
            level = ((step_count / step + 12582912.0) - 12582912.0) * step
            exponent = level.to(tl.int32, bitcast=True) & 0x7F800000  # as `encode`
            power = tl.maximum(exponent.to(tl.float32, bitcast=True), smallest_normal)
            binade = (power.to(tl.int32, bitcast=True) >> 23) - first_binade
            code = tl.abs(level) / power * (1 << MANTISSA) + binade * (1 << MANTISSA)
            code += tl.where(step_count.to(tl.int32, bitcast=True) < 0, SIGN, 0)
        else:
            level = tl.minimum(tl.maximum(tl.div_rn(value, s), -z), top - z)
            level = (level + 12582912.0) - 12582912.0
            code = level + z
        rounding_error = value - s * level
        out = (e * columns + i) * rows + o
        tl.store(codes + out, code, mask=inside)
        tl.store(error + out, rounding_error, mask=inside)
        row = factor + (e * columns + i) * columns
        behind = tl.load(row + c, mask=(c > i) & (c < columns), other=0.0)
        tile -= behind[:, None] * rounding_error[None, :]


def solve_block_fused(
    weight_ECO: Tensor,
    factor_ECC: Tensor,
    scale_EKO: Tensor,
    zero_EKO: Tensor,
    grid_of_C: Sequence[int],
    levels: Levels,
) -> tuple[Tensor, Tensor]:
    """Solve as `columns.solve_block_plain` does, in one launch.

    `weight_ECO` is not modified, and may be a slice of rows of a contiguous [E, I, O].
    """
    experts, columns, rows = weight_ECO.shape
    codes_ECO = torch.empty(weight_ECO.shape, device=weight_ECO.device)
    error_ECO = torch.empty_like(codes_ECO)
    form = levels.form if isinstance(levels, FloatLevels) else None
    _solve[(experts, triton.cdiv(rows, BLOCK_ROWS))](
        weight_ECO,
        factor_ECC.contiguous(),
        scale_EKO.contiguous(),
        zero_EKO.contiguous(),
        torch.tensor(grid_of_C, dtype=torch.int32, device=weight_ECO.device),
        codes_ECO,
        error_ECO,
        columns,
        rows,
        scale_EKO.shape[1],
        weight_ECO.stride(0),
        float(2**levels.bits - 1) if form is None else form.largest,
        0.0 if form is None else form.smallest_normal,
        0 if form is None else 128 - form.bias,
        MANTISSA=0 if form is None else form.mantissa,
        SIGN=0 if form is None else 2 ** (form.bits - 1),
        BLOCK_COLUMNS=triton.next_power_of_2(columns),
        BLOCK_ROWS=BLOCK_ROWS,
    )
    return codes_ECO, error_ECO
