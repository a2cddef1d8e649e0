"""How far one distribution over tokens is from another. Shapes: C positions, V vocabulary."""

import torch
from torch import Tensor

# Logits whose divergence is computed at one time: the float64 copies of so few stay in the processor's cache.
STRIP_LOGITS = 1 << 20


def kl_divergence(p_CV: Tensor, q_CV: Tensor) -> Tensor:
    """KL(softmax p || softmax q) of each row of logits, [C] float64, nats.

    In float64, since a sum of 151,936 float32 terms is off by 5e-6 nats, which an 8-bit model's divergence would show.
    """
    kls = []
    rows = max(1, STRIP_LOGITS // p_CV.shape[1])
    for p_SV, q_SV in zip(p_CV.split(rows), q_CV.split(rows), strict=True):
        log_p, log_q = p_SV.double().log_softmax(1), q_SV.double().log_softmax(1)
        kls.append((log_p.exp() * (log_p - log_q)).sum(1))
    return torch.cat(kls)
