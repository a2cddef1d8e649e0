"""How far one distribution over tokens is from another. Shapes: C positions, V vocabulary."""

import torch
from torch import Tensor

# Logits whose divergence is computed at one time: the float64 copies of so few stay in a processor's cache; a GPU wants
# enough to be busy with, and its three copies take 0.4 GB.
STRIP_LOGITS = {"cpu": 1 << 20, "cuda": 1 << 24}


def kl_divergence(p_CV: Tensor, q_CV: Tensor) -> Tensor:
    """KL(softmax p || softmax q) of each row of logits, [C] float64, nats.

    In float64, since a sum of 151,936 float32 terms is off by 5e-6 nats, which an 8-bit model's divergence would show.
    """
    kls = []
    rows = max(1, STRIP_LOGITS.get(p_CV.device.type, STRIP_LOGITS["cpu"]) // p_CV.shape[1])
    # Large tensors come from the operating system page by page, and that costs more than what is done with them here.
    held = [
        p_CV.new_empty(min(rows, len(p_CV)), p_CV.shape[1], dtype=torch.float64) for _ in range(3)
    ]
    for p_SV, q_SV in zip(p_CV.split(rows), q_CV.split(rows), strict=True):
        log_p, log_q, work = (one[: len(p_SV)] for one in held)
        for log_softmax, logits_SV in ((log_p, p_SV), (log_q, q_SV)):
            log_softmax.copy_(logits_SV).sub_(log_softmax.amax(1, keepdim=True))
            log_softmax.sub_(torch.exp(log_softmax, out=work).sum(1, keepdim=True).log())
        torch.exp(log_p, out=work)
        kls.append(work.mul_(log_p.sub_(log_q)).sum(1))
    return torch.cat(kls)
