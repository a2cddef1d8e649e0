"""How far the quantized model's next-token distributions are from the original's, and its perplexity, in one pass.

Measured where perplexity is: at the T - 1 positions of a window that predict one of its tokens, over the whole
vocabulary with its padding. Shapes: N windows, T tokens of one, P = T - 1 positions, H hidden, V vocabulary, C
positions whose logits exist at one time.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy
import torch
from torch import Tensor
from torch.nn.functional import linear

from q3q.errors import IntegrityError
from q3q.evaluate.baseline import Baseline
from q3q.evaluate.compare import quantile_interval
from q3q.evaluate.journal import Journal
from q3q.evaluate.perplexity import NORMAL_95, Perplexity, scored_windows
from q3q.models.decoder import Decoder
from q3q.numerics.divergence import kl_divergence

PERCENTILES = (1, 10, 25, 50, 75, 90, 99.9)  # of positions, kept beside the 99th


@dataclass(frozen=True)
class Drift:
    """KL(unquantized || quantized) of the next token, nats, and how often both have the same likeliest token.

    kl, kl_99: mean and 99th percentile over positions. kl_99_interval: 95 %, see `compare.quantile_interval`.
    kl_percentiles: the distribution over positions, by `PERCENTILES`.
    agreement: share of positions. Errors are standard errors of the means over windows, since positions of one window
    are not independent; nan for a single window. A model whose logits are not finite has a kl that is not.
    """

    kl: float
    kl_error: float
    kl_99: float
    kl_99_interval: tuple[float, float]
    kl_percentiles: tuple[float, ...]
    agreement: float
    agreement_error: float
    windows: int
    positions: int

    def metrics(self, text: str) -> dict[str, float]:
        return {
            f"kl/{text}": self.kl,
            f"kl_p99/{text}": self.kl_99,
            f"top1_agreement/{text}": self.agreement,
            **{
                f"kl_p{p:g}/{text}": kl
                for p, kl in zip(PERCENTILES, self.kl_percentiles, strict=True)
            },
        }

    def intervals(self, text: str) -> dict[str, tuple[float, float]]:
        """95 % intervals, within what is possible."""
        kl, agreement = NORMAL_95 * self.kl_error, NORMAL_95 * self.agreement_error
        return {
            f"kl/{text}": (max(0.0, self.kl - kl), self.kl + kl),
            f"kl_p99/{text}": self.kl_99_interval,
            f"top1_agreement/{text}": (
                max(0.0, self.agreement - agreement),
                min(1.0, self.agreement + agreement),
            ),
        }


@dataclass(frozen=True)
class Measured:
    """What one pass over a text gives. nll_N: each window's mean negative log-likelihood, float64, nats per token."""

    perplexity: Perplexity
    nll_N: Tensor
    drift: Drift


def perplexity_and_drift(
    model: Decoder,
    windows_NT: Tensor,
    baseline: Baseline,
    head_VH: Tensor,
    progress: Callable[[int, int], None] = lambda done, total: None,
    journal: Journal | None = None,
) -> Measured:
    """Run `model` over the windows once, for its perplexity on all and its drift on those that the baseline keeps.

    Args:
        model: the quantized model.
        windows_NT: token ids, those of the baseline.
        baseline: the unquantized model's final hidden states.
        head_VH: the unquantized model's own head, which turns them into logits again.
        progress: told windows done and in all.
        journal: of this model and these windows; what it holds is not computed again, and what is finite goes there.

    Raises:
        IntegrityError: the baseline is of another vocabulary or of other tokens, the head is not its own, or its files
            changed.
    """
    baseline.check_fits(model, windows_NT)
    _check_head(head_VH, baseline)
    kept = frozenset(baseline.rows)
    found = (
        [] if journal is None else journal.counted()
    )  # of each window its nll, and its kl [P] and agreement if kept
    for row, hidden_PH in scored_windows(model, windows_NT, len(found)):
        targets_P = windows_NT[row, 1:]
        if row in kept:
            theirs_PH = baseline.hidden(row).to(head_VH.device)
            nll_P, kl_P, same_P = compare_positions(model, hidden_PH, theirs_PH, head_VH, targets_P)
            drifted = [kl_P.tolist(), float(same_P.double().mean())]
        else:
            nll_P, drifted = -model.log_likelihoods(hidden_PH, targets_P)[0], []
        found.append([float(nll_P.double().mean()), *drifted])
        if journal is not None and math.isfinite(found[row][0]):
            journal.add([(str(row), found[row])])
        progress(row + 1, len(windows_NT))
    nll_N = torch.tensor([nll for nll, *_ in found], dtype=torch.float64)
    kl_KP, same_K = (
        torch.tensor([found[row][part] for row in sorted(kept)], dtype=torch.float64)
        for part in (1, 2)
    )
    kl, kl_error = _mean_over_windows(kl_KP.mean(1))
    agreement, agreement_error = _mean_over_windows(same_K)
    drift = Drift(
        kl=kl,
        kl_error=kl_error,
        kl_99=float(numpy.quantile(kl_KP.numpy(), 0.99)),
        kl_99_interval=quantile_interval(kl_KP.numpy(), 0.99),
        kl_percentiles=tuple(numpy.percentile(kl_KP.numpy(), PERCENTILES).tolist()),
        agreement=agreement,
        agreement_error=agreement_error,
        windows=len(kl_KP),
        positions=kl_KP.numel(),
    )
    return Measured(Perplexity(*_mean_over_windows(nll_N), len(nll_N)), nll_N, drift)


def compare_positions(
    model: Decoder, ours_PH: Tensor, theirs_PH: Tensor, head_VH: Tensor, targets_P: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each position: the target's negative log-likelihood under `model` (float32, nats), the divergence of its
    distribution from the unquantized model's (float64, nats), and whether both have the same likeliest token; all [P].

    Two slabs of float32 logits [C, V] exist at one time, one of each model.
    """
    nlls, kls, same = [], [], []
    for chunk, ours_CV in model.logits(ours_PH):
        theirs_CV = linear(theirs_PH[chunk], head_VH).float().to(ours_CV.device)
        chosen_C = ours_CV.gather(1, targets_P[chunk, None].to(ours_CV.device)).squeeze(1)
        nlls.append(ours_CV.logsumexp(1) - chosen_C)
        kls.append(kl_divergence(theirs_CV, ours_CV))
        same.append(ours_CV.argmax(1) == theirs_CV.argmax(1))
    return torch.cat(nlls), torch.cat(kls), torch.cat(same)


def _mean_over_windows(value_N: Tensor) -> tuple[float, float]:
    """Mean and its standard error."""
    error = float(value_N.std() / math.sqrt(len(value_N))) if len(value_N) > 1 else math.nan
    return float(value_N.mean()), error


def _check_head(head_VH: Tensor, baseline: Baseline) -> None:
    shape, dtype = tuple(head_VH.shape), str(head_VH.dtype).removeprefix("torch.")
    if (shape, dtype) != ((baseline.vocab, baseline.hidden_size), baseline.dtype):
        raise IntegrityError(
            f"a head {list(shape)} in {dtype} is not that of the baseline, "
            f"[{baseline.vocab}, {baseline.hidden_size}] in {baseline.dtype}"
        )
