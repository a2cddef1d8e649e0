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

from q3q.evaluate.budget import START_TOKENS, TokenBudget
from q3q.models.decoder import Decoder

BATCH_TOKENS = 8192  # of windows whose hidden states are kept together
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
    return of_losses(window_losses(model, windows_NT, progress))


def of_losses(loss_N: Tensor) -> Perplexity:
    """The perplexity of windows whose mean negative log-likelihoods are these, nats per token, float64."""
    error = float(loss_N.std() / math.sqrt(len(loss_N))) if len(loss_N) > 1 else math.nan
    return Perplexity(float(loss_N.mean()), error, len(loss_N))


def window_losses(
    model: Decoder, windows_NT: Tensor, progress: Callable[[int, int], None] = lambda done, total: None
) -> Tensor:
    """Each window's mean negative log-likelihood [N], float64, nats per token; arguments as of `perplexity`."""
    count, length = windows_NT.shape
    loss_N = torch.zeros(count, dtype=torch.float64)
    done, budget = 0, TokenBudget(max(START_TOKENS, length))

    def attempt(tokens: int) -> tuple[int, Tensor]:
        ids_BT = windows_NT[done : done + max(1, tokens // length)]
        hidden_BTH = model.hidden(ids_BT)[:, :-1]
        scores_P, _ = model.log_likelihoods(hidden_BTH.flatten(0, 1), ids_BT[:, 1:].flatten())
        return ids_BT.numel(), -scores_P.view(len(ids_BT), -1).double().mean(1).cpu()

    while done < count:
        loss_B = budget.run(attempt)
        loss_N[done : done + len(loss_B)] = loss_B
        done += len(loss_B)
        progress(done, count)
    return loss_N


def _exp(value: float) -> float:
    """exp that overflows to infinity, and stays nan for nan."""
    return math.exp(value) if not value > 700 else math.inf
