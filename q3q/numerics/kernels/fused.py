"""`logsum` as one Triton kernel, which reads each logit once and writes none.

Importing this file needs Triton. Tested in Triton's interpreter on a CPU. Shapes as in `logsum`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_COLUMNS = 4096


@triton.jit
def _logsum(  # type: ignore[no-untyped-def]
    logits,
    logsum,
    highest,
    columns,
    stride,
    BLOCK_COLUMNS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK_COLUMNS)
    high = tl.full([BLOCK_COLUMNS], -float("inf"), tl.float32)
    total = tl.full([BLOCK_COLUMNS], 0.0, tl.float32)
    for start in range(0, columns, BLOCK_COLUMNS):
        value = tl.load(
            logits + row * stride + start + c, mask=start + c < columns, other=-float("inf")
        ).to(tl.float32)
        above = tl.maximum(high, value)
        shift = tl.where(above == -float("inf"), 0.0, above)  # -inf: no finite logit so far
        total = total * tl.exp(high - shift) + tl.exp(value - shift)
        high = above
    top = tl.max(high, axis=0)
    tl.store(highest + row, top)
    tl.store(logsum + row, top + tl.log(tl.sum(total * tl.exp(high - top), axis=0)))


def logsum_fused(logits_CV: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `logsum.logsum_plain` without modifying the logits."""
    rows, columns = logits_CV.shape
    logsum_C = torch.empty(rows, device=logits_CV.device)
    highest_C = torch.empty_like(logsum_C)
    if rows:
        _logsum[(rows,)](
            logits_CV,
            logsum_C,
            highest_C,
            columns,
            logits_CV.stride(0),
            BLOCK_COLUMNS=BLOCK_COLUMNS,
            num_warps=8,
        )
    return logsum_C, highest_C
