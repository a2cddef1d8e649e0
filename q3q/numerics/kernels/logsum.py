"""The log of the softmax's denominator, and the highest logit, of each row of logits.

Shapes: C positions, V logits of each (all of the vocabulary or a slab of it).
"""

from torch import Tensor

from q3q.numerics.kernels.compiler import has_fused


def logsum_plain(logits_CV: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's log of the sum of exp, and its highest logit, both float32 [C].

    Float32 logits are overwritten.
    """
    wide_CV = logits_CV.float()
    highest_C = wide_CV.amax(1)
    return highest_C + wide_CV.sub_(highest_C[:, None]).exp_().sum(1).log(), highest_C


def logsum(logits_CV: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `logsum_plain` in the way that is fastest on the logits' device."""
    if not has_fused(logits_CV.device):
        return logsum_plain(logits_CV)
    from q3q.numerics.kernels.fused import logsum_fused

    return logsum_fused(logits_CV)
