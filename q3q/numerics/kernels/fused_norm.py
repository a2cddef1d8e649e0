"""`rms_norm` as one Triton kernel, which reads each number once and writes its result once.

The plain norm reads and writes nine times as many bytes (benchmarks/between.py). Both round in the
same places; the sum of a row's squares is taken in another order. Importing this file needs Triton.
Tested in Triton's interpreter on a CPU. Shapes as in `norm`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

NUMBERS = 4096  # of several rows that a program norms, where rows are short


@triton.jit
def _rms_norm(  # type: ignore[no-untyped-def]
    x,
    gain,
    result,
    rows,
    columns,
    eps,
    offset,
    ADDS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, COLUMNS)
    place = row[:, None] * columns + c[None, :]
    real = (row[:, None] < rows) & (c[None, :] < columns)
    value = tl.load(x + place, mask=real, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, axis=1) / columns + eps)
    normed = value * scale[:, None]
    weight = tl.load(gain + c, mask=c < columns, other=0.0).to(tl.float32)[None, :]
    if ADDS:
        normed = normed * (weight + offset)
    else:
        normed = normed.to(result.dtype.element_ty).to(tl.float32) * weight
    tl.store(result + place, normed.to(result.dtype.element_ty), mask=real)


def rms_norm_fused(x_xH: Tensor, gain_H: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """Compute `norm.rms_norm_plain`."""
    columns = x_xH.shape[-1]
    x_RH = x_xH.reshape(-1, columns)
    result_RH = torch.empty_like(x_RH, memory_format=torch.contiguous_format)
    if len(x_RH):
        width = triton.next_power_of_2(columns)
        rows = max(1, NUMBERS // width)
        _rms_norm[(triton.cdiv(len(x_RH), rows),)](
            x_RH.contiguous(),
            gain_H.contiguous(),
            result_RH,
            len(x_RH),
            columns,
            eps,
            offset,
            ADDS=offset != 0,
            ROWS=rows,
            COLUMNS=width,
            num_warps=8,
        )
    return result_RH.view(x_xH.shape)
