"""Token perplexity in fixed windows, as the papers compute it.

exp of the mean negative log-likelihood of tokens 2 .. T of each window of T tokens; windows do not
overlap and do not see each other (GPTQ's evaluation, which AWQ, SmoothQuant, BiLLM and the Qwen3
study all use). Likelihoods are float32; the study's script leaves them in 16 bits.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from q3q.evaluate.budget import TokenBudget, pass_tokens
from q3q.evaluate.compare import NORMAL_95
from q3q.evaluate.journal import Journal
from q3q.evaluate.metrics import exp_or_infinity
from q3q.models.decoder import Decoder
from q3q.reporter import Steps, no_steps


@dataclass(frozen=True)
class Perplexity:
    """A text's perplexity.

    nll: mean negative log-likelihood, nats per token; may be infinite or nan.
    standard_error: of nll, over windows.
    """

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


def perplexity(model: Decoder, windows_NT: Tensor) -> Perplexity:
    """Compute the perplexity over windows of token ids [N, T].

    Tests and benchmarks do; a trial has a journal of each window's loss as well.
    """
    return of_losses(window_losses(model, windows_NT))


def of_losses(loss_N: Tensor) -> Perplexity:
    """Return the perplexity of windows with these losses, nats per token, float64."""
    error = float(loss_N.std() / math.sqrt(len(loss_N))) if len(loss_N) > 1 else math.nan
    return Perplexity(float(loss_N.mean()), error, len(loss_N))


def window_losses(
    model: Decoder, windows_NT: Tensor, steps: Steps = no_steps, journal: Journal | None = None
) -> Tensor:
    """Compute each window's mean negative log-likelihood [N], float64, nats per token.

    Args:
        steps: receives the windows done and in all.
        journal: this model's on these windows: its losses are not computed again, new ones added.
    """
    loss_N = torch.zeros(len(windows_NT), dtype=torch.float64)
    earlier = [] if journal is None else journal.consecutive()
    loss_N[: len(earlier)] = torch.tensor(earlier, dtype=torch.float64)
    for first, hidden_BPH in scored_states(model, windows_NT, len(earlier)):
        rows = slice(first, first + len(hidden_BPH))
        targets_P = windows_NT[rows, 1:].flatten()
        scores_P, _ = model.log_likelihoods(hidden_BPH.flatten(0, 1), targets_P)
        loss_N[rows] = -scores_P.view(len(hidden_BPH), -1).double().mean(1).cpu()
        if journal is not None:
            losses = enumerate(loss_N[rows].tolist(), start=first)
            journal.add((str(row), loss) for row, loss in losses if math.isfinite(loss))
        steps(rows.stop, len(windows_NT))
    return loss_N


def scored_states(
    model: Decoder, windows_NT: Tensor, start: int = 0
) -> Iterator[tuple[int, Tensor]]:
    """Yield each batch's first window's number, and final hidden states [B, P, H].

    P = T - 1 positions of a window predict one of its tokens. The batches do not depend on the
    machine's load, so neither do the bits. One pass through a streamed model takes as many windows
    as PASS_BYTES of hidden states allow.

    Args:
        start: number of the first window to score; windows before it in its batch run, too.
    """
    count, length = windows_NT.shape
    budget = TokenBudget.set(model, least=length)
    windows_a_pass = max(1, pass_tokens(model) // length)
    first = start if start == count else start - start % max(1, budget.tokens // length)

    def attempt(tokens: int) -> tuple[int, Iterator[Tensor]]:
        rows = max(1, tokens // length)
        states = model.states(windows_NT[first : first + max(windows_a_pass, rows)].split(rows))
        # Whatever could take too much memory has run when the first states are there.
        return 0, chain([next(states)], states)

    while first < count:
        for hidden_BTH in budget.run(attempt):
            yield first, hidden_BTH[:, :-1]
            first += len(hidden_BTH)


def scored_windows(
    model: Decoder, windows_NT: Tensor, start: int = 0
) -> Iterator[tuple[int, Tensor]]:
    """Yield `scored_states` window by window from `start` on: its number, and [P, H]."""
    for first, hidden_BPH in scored_states(model, windows_NT, start):
        skipped = max(0, start - first)
        yield from enumerate(hidden_BPH[skipped:], start=first + skipped)
