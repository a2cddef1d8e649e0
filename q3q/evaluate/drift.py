"""One pass for a quantized model's perplexity and its predictions' drift from the original's.

Drift is measured where perplexity is: at the T - 1 positions of a window that predict one of its
tokens, over the whole vocabulary with its padding. Shapes: N windows, T tokens of one, P = T - 1
positions, H hidden, V vocabulary, C positions whose logits exist at a time.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor
from torch.nn.functional import linear

from q3q.errors import IntegrityError
from q3q.evaluate.baseline import Baseline
from q3q.evaluate.compare import NORMAL_95, quantile_interval
from q3q.evaluate.journal import Journal
from q3q.evaluate.perplexity import scored_windows
from q3q.evaluation import CONFIDENCE
from q3q.models.decoder import Decoder
from q3q.numerics.divergence import kl_divergence
from q3q.reporter import Steps, no_steps

PERCENTILES = (1, 10, 25, 50, 75, 90, 99.9)  # over positions, beside the 99th


@dataclass(frozen=True)
class Bin:
    """The positions at which the original is as confident as this, and the drift there.

    low, high: of the likeliest token's probability, in percent; from low on, below high
    share: of all positions
    kl: mean over these positions, nats, with its 95 % interval
    flips: share of these positions where the models have different likeliest tokens
    """

    low: int
    high: int
    share: float
    kl: float
    kl_interval: tuple[float, float]
    flips: float

    @property
    def name(self) -> str:
        return f"kl_confident_{self.low}_{self.high}"

    def metrics(self, text: str) -> dict[str, float]:
        ends = f"confident_{self.low}_{self.high}/{text}"
        return {f"kl_{ends}": self.kl, f"flips_{ends}": self.flips, f"share_{ends}": self.share}


@dataclass(frozen=True)
class Drift:
    """KL(unquantized || quantized) of the next token, nats, and agreement on the likeliest token.

    Errors are standard errors of the means over windows, since positions of one window are not
    independent; nan for a single window. If the model's logits are not finite, neither is kl.

    kl: mean over positions.
    kl_99: 99th percentile over positions.
    kl_99_interval: its 95 % interval, see `compare.quantile_interval`.
    kl_percentiles: `PERCENTILES` over positions.
    agreement: share of positions where both models have the same likeliest token.
    by_confidence: the same by the original's confidence, where it was asked for.
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
    by_confidence: tuple[Bin, ...] = ()

    def metrics(self, text: str) -> dict[str, float]:
        percentiles = zip(PERCENTILES, self.kl_percentiles, strict=True)
        bins = [confidence_bin.metrics(text) for confidence_bin in self.by_confidence]
        return {
            **{name: value for own in bins for name, value in own.items()},
            f"kl/{text}": self.kl,
            f"kl_p99/{text}": self.kl_99,
            f"top1_agreement/{text}": self.agreement,
            **{f"kl_p{p:g}/{text}": kl for p, kl in percentiles},
        }

    def intervals(self, text: str) -> dict[str, tuple[float, float]]:
        """Return 95 % intervals, cut to possible values."""
        kl, agreement = NORMAL_95 * self.kl_error, NORMAL_95 * self.agreement_error
        low, high = max(0.0, self.agreement - agreement), min(1.0, self.agreement + agreement)
        return {
            f"kl/{text}": (max(0.0, self.kl - kl), self.kl + kl),
            f"kl_p99/{text}": self.kl_99_interval,
            f"top1_agreement/{text}": (low, high),
            **{
                f"{confidence_bin.name}/{text}": confidence_bin.kl_interval
                for confidence_bin in self.by_confidence
            },
        }


@dataclass(frozen=True)
class PerplexityAndDrift:
    """The results of one pass over a text.

    nll_N: each window's mean negative log-likelihood, float64, nats per token.
    kl: mean KL of each window that the baseline keeps, by the window's number.
    """

    nll_N: Tensor
    drift: Drift
    kl: Mapping[int, float]


def perplexity_and_drift(
    model: Decoder,
    windows_NT: Tensor,
    baseline: Baseline,
    head_VH: Tensor,
    steps: Steps = no_steps,
    journal: Journal | None = None,
    *,
    confident: bool = False,
) -> PerplexityAndDrift:
    """Run a quantized model over the windows once: perplexity on all, drift on the baseline's.

    Args:
        windows_NT: token ids, the same as the baseline's.
        baseline: the unquantized model's final hidden states.
        head_VH: the unquantized model's own head, which turns the states into logits again.
        steps: receives the windows done and in all.
        journal: this model's on these windows: its results are not computed again, new ones added.
        confident: measure the drift by the original's confidence, too.

    Raises:
        IntegrityError: the baseline has another vocabulary or other tokens, the head does not fit
            it, or its files have changed.
    """
    baseline.check_fits(model, windows_NT)
    _check_head(head_VH, baseline)
    kept = frozenset(baseline.rows)
    # Each window's nll, then its kl [P] and agreement if the baseline keeps it; then its
    # confidence [P] and where the likeliest tokens are the same, if they are asked for.
    results = [] if journal is None else journal.consecutive()
    for row, hidden_PH in scored_windows(model, windows_NT, len(results)):
        targets_P = windows_NT[row, 1:]
        if row in kept:
            theirs_PH = baseline.hidden(row).to(head_VH.device)
            nll_P, kl_P, same_P, sure_P = compare_positions(
                model, hidden_PH, theirs_PH, head_VH, targets_P
            )
            drifted = [kl_P.tolist(), float(same_P.double().mean())]
            if confident:
                drifted += [sure_P.tolist(), same_P.int().tolist()]
        else:
            nll_P, drifted = -model.log_likelihoods(hidden_PH, targets_P)[0], []
        results.append([float(nll_P.double().mean()), *drifted])
        if journal is not None and math.isfinite(results[row][0]):
            journal.add([(str(row), results[row])])
        steps(row + 1, len(windows_NT))
    nll_N = torch.tensor([nll for nll, *_ in results], dtype=torch.float64)
    kl_KP, same_K = (
        torch.tensor([results[row][part] for row in sorted(kept)], dtype=torch.float64)
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
        by_confidence=_bins(kl_KP, [results[row] for row in sorted(kept)]) if confident else (),
    )
    by_window = dict(zip(sorted(kept), kl_KP.mean(1).tolist(), strict=True))
    return PerplexityAndDrift(nll_N, drift, by_window)


def compare_positions(
    model: Decoder, ours_PH: Tensor, theirs_PH: Tensor, head_VH: Tensor, targets_P: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compare both models' next-token distributions at each position.

    At a time, logits [C, V] of each model exist in float32.

    Returns:
        All [P]: the target's negative log-likelihood under `model` (float32, nats), the divergence
        of its distribution from the unquantized model's (float64, nats), True where both have the
        same likeliest token, and that token's probability in the unquantized model.
    """
    nlls, kls, same, sure = [], [], [], []
    for chunk, ours_CV in model.logits(ours_PH):
        theirs_CV = linear(theirs_PH[chunk], head_VH).float().to(ours_CV.device)
        chosen_C = ours_CV.gather(1, targets_P[chunk, None].to(ours_CV.device)).squeeze(1)
        nlls.append(ours_CV.logsumexp(1) - chosen_C)
        kls.append(kl_divergence(theirs_CV, ours_CV))
        highest = theirs_CV.max(1)
        same.append(ours_CV.argmax(1) == highest.indices)
        sure.append((highest.values - theirs_CV.logsumexp(1)).exp())
    return torch.cat(nlls), torch.cat(kls), torch.cat(same), torch.cat(sure)


def _bins(kl_KP: Tensor, results: Sequence[Sequence[Any]]) -> tuple[Bin, ...]:
    """Return the drift in each bin of confidence that has positions.

    A bin's mean is a ratio of two sums over windows; its error is that of a ratio estimator
    (Cochran, Sampling Techniques, 1977, section 2.11), as positions of one window are not
    independent.
    """
    sure_KP = torch.tensor([result[3] for result in results], dtype=torch.float64)
    flip_KP = 1 - torch.tensor([result[4] for result in results], dtype=torch.float64)
    bins = []
    for low, high in CONFIDENCE:
        inside_KP = (sure_KP >= low / 100) & ((sure_KP < high / 100) | (high == 100))
        count_K = inside_KP.sum(1, dtype=torch.float64)
        if not (total := float(count_K.sum())):
            continue
        kl_K = (kl_KP * inside_KP).sum(1)
        kl, windows = float(kl_K.sum()) / total, len(count_K)
        error = math.nan
        if windows > 1:
            residual_K = kl_K - kl * count_K
            error = math.sqrt(windows / (windows - 1) * float(residual_K.square().sum())) / total
        reach = NORMAL_95 * error
        flips = float((flip_KP * inside_KP).sum()) / total
        share = total / inside_KP.numel()
        bins.append(Bin(low, high, share, kl, (max(0.0, kl - reach), kl + reach), flips))
    return tuple(bins)


def _mean_over_windows(value_N: Tensor) -> tuple[float, float]:
    """Return the mean and its standard error, nan for a single window."""
    error = float(value_N.std() / math.sqrt(len(value_N))) if len(value_N) > 1 else math.nan
    return float(value_N.mean()), error


def _check_head(head_VH: Tensor, baseline: Baseline) -> None:
    shape, dtype = tuple(head_VH.shape), str(head_VH.dtype).removeprefix("torch.")
    if (shape, dtype) != ((baseline.vocab, baseline.hidden_size), baseline.dtype):
        raise IntegrityError(
            f"a head {list(shape)} in {dtype} is not the baseline's, "
            f"[{baseline.vocab}, {baseline.hidden_size}] in {baseline.dtype}"
        )
