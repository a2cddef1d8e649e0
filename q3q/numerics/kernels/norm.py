"""The root-mean-square norm of a decoder's blocks.

Shapes: x any, H numbers that are normed together.
"""

from torch import Tensor, float32

from q3q.numerics.kernels.compiler import has_fused

MOST_COLUMNS = 16_384  # of the kernel, which holds a row


def rms_norm_plain(x_xH: Tensor, gain_H: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """Compute the root-mean-square norm in float32; return the input's dtype, as transformers.

    Args:
        offset: what is added to the gain; if it is not 0, the product too is taken in float32.
    """
    wide = x_xH.float()
    scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    normed = wide * scale if x_xH.dtype == float32 else wide.mul_(scale)
    if offset:
        return normed.mul_(gain_H.float() + offset).to(x_xH.dtype)
    return normed.to(x_xH.dtype).mul_(gain_H)


def rms_norm(x_xH: Tensor, gain_H: Tensor, eps: float, offset: float = 0.0) -> Tensor:
    """Compute `rms_norm_plain` in the way that is fastest on the numbers' device."""
    if x_xH.shape[-1] > MOST_COLUMNS or not has_fused(x_xH.device):
        return rms_norm_plain(x_xH, gain_H, eps, offset)
    from q3q.numerics.kernels.fused_norm import rms_norm_fused

    return rms_norm_fused(x_xH, gain_H, eps, offset)
