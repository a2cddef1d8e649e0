"""Token perplexity in fixed windows, as the papers compute it.

exp of the mean negative log-likelihood of tokens 2 .. T of each window of T tokens; windows do not overlap and do not
see each other (GPTQ's evaluation, which AWQ, SmoothQuant, BiLLM and the Qwen3 study all use). Likelihoods are float32;
the study's script leaves them in 16 bits.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from q3q.models.decoder import Decoder

BATCH_TOKENS = 8192
NORMAL_95 = 1.959964  # 97.5 % quantile of the normal distribution


@dataclass(frozen=True)
class Perplexity:
    """nll: mean negative log-likelihood, nats per token, may be infinite or nan. standard_error: over windows."""

    nll: float
    standard_error: float
    windows: int

    @property
    def value(self) -> float:
        return _exp(self.nll)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the perplexity."""
        spread = NORMAL_95 * self.standard_error
        return _exp(self.nll - spread), _exp(self.nll + spread)


def perplexity(
    model: Decoder, windows_NT: Tensor, progress: Callable[[int, int], None] = lambda done, total: None
) -> Perplexity:
    """Perplexity of `model` over windows of token ids [N, T]; progress is told (windows done, windows in all)."""
    rows = max(1, BATCH_TOKENS // windows_NT.shape[1])
    losses = []
    for ids_BT in windows_NT.split(rows):
        hidden_BTH = model.hidden(ids_BT)[:, :-1]
        scores_P, _ = model.log_likelihoods(hidden_BTH.flatten(0, 1), ids_BT[:, 1:].flatten())
        losses.append(-scores_P.view(len(ids_BT), -1).double().mean(1).cpu())
        progress(sum(map(len, losses)), len(windows_NT))
    loss_N = torch.cat(losses)
    error = float(loss_N.std() / math.sqrt(len(loss_N))) if len(loss_N) > 1 else math.nan
    return Perplexity(float(loss_N.mean()), error, len(loss_N))


def _exp(value: float) -> float:
    """exp that overflows to infinity, and stays nan for nan."""
    return math.exp(value) if not value > 700 else math.inf
