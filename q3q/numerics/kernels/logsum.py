"""What a row of logits needs to become probabilities: its highest, and the log of the softmax's denominator.

Shapes: C positions, V logits of each (all of the vocabulary or a slab of it).
"""

from importlib.util import find_spec

import torch
from torch import Tensor


def logsum_plain(logits_CV: Tensor) -> tuple[Tensor, Tensor]:
    """log of the sum of exp of each row, and its highest logit, both float32 [C]. Float32 logits are overwritten."""
    wide_CV = logits_CV.float()
    highest_C = wide_CV.amax(1)
    return highest_C + wide_CV.sub_(highest_C[:, None]).exp_().sum(1).log(), highest_C


def has_fused(device: torch.device) -> bool:
    """Whether `logsum_fused` runs there: on CUDA, with Triton, which comes with PyTorch there (but on Windows)."""
    return device.type == "cuda" and find_spec("triton") is not None


def logsum(logits_CV: Tensor) -> tuple[Tensor, Tensor]:
    """`logsum_plain`, the way that is fastest on the logits' device."""
    if not has_fused(logits_CV.device):
        return logsum_plain(logits_CV)
    from q3q.numerics.kernels.fused import logsum_fused

    return logsum_fused(logits_CV)
