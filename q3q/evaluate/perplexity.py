"""Token perplexity in fixed windows, as the papers compute it.

exp of the mean negative log-likelihood of tokens 2 .. T of each window of T tokens; windows do not overlap and do not
see each other (GPTQ's evaluation, which AWQ, SmoothQuant, BiLLM and the Qwen3 study all use). Likelihoods are float32;
the study's script leaves them in 16 bits.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from q3q.evaluate.budget import TokenBudget, pass_tokens
from q3q.evaluate.journal import Journal
from q3q.models.decoder import Decoder

NORMAL_95 = 1.959964  # 97.5 % quantile of the normal distribution


@dataclass(frozen=True)
class Perplexity:
    """nll: mean negative log-likelihood, nats per token, may be infinite or nan. standard_error: over windows."""

    nll: float
    standard_error: float
    windows: int

    @property
    def value(self) -> float:
        return exp_or_infinity(self.nll)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the perplexity."""
        spread = NORMAL_95 * self.standard_error
        return exp_or_infinity(self.nll - spread), exp_or_infinity(self.nll + spread)


def perplexity(
    model: Decoder,
    windows_NT: Tensor,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Perplexity:
    """Perplexity of `model` over windows of token ids [N, T]; progress is told (windows done, windows in all)."""
    return of_losses(window_losses(model, windows_NT, progress))


def of_losses(loss_N: Tensor) -> Perplexity:
    """The perplexity of windows whose mean negative log-likelihoods are these, nats per token, float64."""
    error = float(loss_N.std() / math.sqrt(len(loss_N))) if len(loss_N) > 1 else math.nan
    return Perplexity(float(loss_N.mean()), error, len(loss_N))


def window_losses(
    model: Decoder,
    windows_NT: Tensor,
    progress: Callable[[int, int], None] = lambda done, total: None,
    journal: Journal | None = None,
) -> Tensor:
    """Each window's mean negative log-likelihood [N], float64, nats per token; arguments as of `perplexity`.

    journal: of this model and these windows; what it holds is not computed again, and what is finite goes there.
    """
    loss_N = torch.zeros(len(windows_NT), dtype=torch.float64)
    known = [] if journal is None else journal.counted()
    loss_N[: len(known)] = torch.tensor(known, dtype=torch.float64)
    for first, hidden_BPH in scored_states(model, windows_NT, len(known)):
        rows = slice(first, first + len(hidden_BPH))
        scores_P, _ = model.log_likelihoods(
            hidden_BPH.flatten(0, 1), windows_NT[rows, 1:].flatten()
        )
        loss_N[rows] = -scores_P.view(len(hidden_BPH), -1).double().mean(1).cpu()
        if journal is not None:
            losses = enumerate(loss_N[rows].tolist(), start=first)
            journal.add((str(row), loss) for row, loss in losses if math.isfinite(loss))
        progress(rows.stop, len(windows_NT))
    return loss_N


def scored_states(
    model: Decoder, windows_NT: Tensor, start: int = 0
) -> Iterator[tuple[int, Tensor]]:
    """Windows batch by batch: the first one's number, and the final hidden states [B, P, H] at the P = T - 1 positions
    that predict one of a window's tokens. start: windows before it are left out, but for those of its own batch.

    The same batches whatever the machine is busy with, so the same bits. A streamed model is gone through once for as
    many windows as the disk may hold the hidden states of.
    """
    count, length = windows_NT.shape
    budget = TokenBudget.set(model, least=length)
    together = max(1, pass_tokens(model) // length)
    first = start if start == count else start - start % max(1, budget.tokens // length)

    def attempt(tokens: int) -> tuple[int, Iterator[Tensor]]:
        rows = max(1, tokens // length)
        states = model.states(windows_NT[first : first + max(together, rows)].split(rows))
        return 0, chain(
            [next(states)], states
        )  # whatever could take too much memory has been run by then

    while first < count:
        for hidden_BTH in budget.run(attempt):
            yield first, hidden_BTH[:, :-1]
            first += len(hidden_BTH)


def scored_windows(
    model: Decoder, windows_NT: Tensor, start: int = 0
) -> Iterator[tuple[int, Tensor]]:
    """`scored_states` window by window, from `start` on: its number, and [P, H]."""
    for first, hidden_BPH in scored_states(model, windows_NT, start):
        skipped = max(0, start - first)
        yield from enumerate(hidden_BPH[skipped:], start=first + skipped)


def exp_or_infinity(value: float) -> float:
    """exp that overflows to infinity, and stays nan for nan: a perplexity that diverged is a result."""
    return math.exp(value) if not value > 700 else math.inf
