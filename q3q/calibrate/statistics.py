"""What methods keep of a site's inputs, fed batch by batch.

Shapes: E experts (1 in a dense block), T tokens, I channels.
"""

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor
from torch.linalg import vector_norm

from q3q.models.anatomy import SiteInput
from q3q.numerics.linalg import add_gram, mirror

# An expert that fewer calibration tokens reached is rounded to nearest (its statistics would be noise) and named.
MIN_EXPERT_TOKENS = 128


class Statistics(Protocol):
    """An accumulator of one site's inputs; tokens_E: how many tokens each expert has seen."""

    @property
    def tokens_E(self) -> Tensor: ...

    def update(self, inputs: SiteInput) -> None: ...


def starved_experts(tokens_E: Tensor) -> list[int]:
    """The experts that too few tokens reached; none in a dense block, whose tokens are as many as were asked for."""
    if len(tokens_E) == 1:
        return []
    return [e for e, tokens in enumerate(tokens_E.tolist()) if tokens < MIN_EXPERT_TOKENS]


class Gram:
    """Sum and mean of x x^T over each expert's tokens, float32: GPTQ's Hessian up to a factor.

    tokens_E: how many tokens each expert has seen. windows: in how many calibration windows they came.
    shared: all experts read the same tokens, so that one matrix serves them all and is kept once.
    """

    def __init__(self) -> None:
        self.tokens_E = torch.empty(0)
        self.windows = 0
        self.shared = True
        self._sum_MII = torch.empty(0)  # M matrices: one an expert, or one for all
        self._mirrored = True

    def update(self, inputs: SiteInput) -> None:
        read = inputs.experts[:1] if inputs.shared else inputs.experts
        for m, tokens_TI in enumerate(read):
            if not self.tokens_E.numel():
                columns = tokens_TI.shape[-1]
                self.shared = inputs.shared
                self._sum_MII = torch.zeros(len(read), columns, columns, device=tokens_TI.device)
                self.tokens_E = torch.zeros(len(inputs.experts), dtype=torch.int64)
            add_gram(self._sum_MII[m], tokens_TI.float())
            if inputs.shared:
                self.tokens_E += len(tokens_TI)
            else:
                self.tokens_E[m] += len(tokens_TI)
        self.windows += inputs.windows
        self._mirrored = False

    @property
    def sum_EII(self) -> Tensor:
        """The sum so far; where it is shared, E views of one matrix."""
        if not self._mirrored:
            mirror(self._sum_MII)
            self._mirrored = True
        return self._sum_MII.expand(len(self.tokens_E), -1, -1)

    def mean_EII(self, experts: slice = slice(None)) -> Tensor:
        """The mean of some experts' x x^T, zero for one that saw nothing; where it is shared, views of one matrix."""
        tokens_E = self.tokens_E[experts].clamp(min=1).to(self._sum_MII.device)
        if self.shared:
            return (self.sum_EII[:1] / tokens_E[0]).expand(len(tokens_E), -1, -1)
        return self.sum_EII[experts] / tokens_E[:, None, None]

    def rescale(self, scale_EI: Tensor) -> None:
        """Make it the statistics of inputs divided by `scale` per channel."""
        matrices = len(self._sum_MII)
        scale_MI = scale_EI[:matrices]
        self._sum_MII = self.sum_EII[:matrices] / (scale_MI[:, :, None] * scale_MI[:, None, :])


class Peak:
    """Largest |x| of each channel, float32: SmoothQuant's activation scales.

    peak_EI: one row where all experts read the same tensor, else a row an expert, zero for one that saw no token.
    """

    def __init__(self) -> None:
        self.peak_EI = torch.empty(0)
        self.tokens_E = torch.empty(0)

    def update(self, inputs: SiteInput) -> None:
        counts, peaks = [], [] if inputs.whole_TI is None else [_peak(inputs.whole_TI)]
        for tokens_TI in inputs.experts:
            counts.append(len(tokens_TI))
            if inputs.whole_TI is None:
                peaks.append(_peak(tokens_TI))
        tokens_E, peak_EI = torch.tensor(counts), torch.stack(peaks)
        first = not self.tokens_E.numel()
        self.tokens_E = tokens_E if first else self.tokens_E + tokens_E
        self.peak_EI = peak_EI if first else torch.maximum(self.peak_EI, peak_EI)

    def rescale(self, scale_EI: Tensor) -> None:
        """Make it the statistics of inputs divided by `scale` per channel."""
        self.peak_EI = self.peak_EI / scale_EI


def _peak(tokens_TI: Tensor) -> Tensor:
    if not len(tokens_TI):
        return tokens_TI.new_zeros(tokens_TI.shape[-1], dtype=torch.float32)
    return tokens_TI.abs().amax(0).float()


class Kept:
    """A site's inputs as they came, for methods that run a piece of the block; their Gram matrices; mean |x|.

    Holds what the calibration tokens take at this site, in the model's dtype: tokens * channels, where experts are
    routed to also the tokens of each expert (experts per token times that much). Where one linear reads them in a dense
    block, no piece is run that its Gram matrix cannot stand for, and only the sample is held.

    sample: evenly spaced tokens of each expert that `sample_TI` gives, about so many (at least; at most all).
    """

    def __init__(self, sample: int) -> None:
        self.gram = Gram()
        self.sample = sample
        self.batches: list[SiteInput] = []
        self._sampled: list[Tensor] = []
        self._whole_tokens = 0
        self._absolute_EI = torch.empty(0)  # sum of |x|; one row where all experts read the same tensor
        self._scale_EI: Tensor | None = None  # what the inputs are to be divided by

    @property
    def tokens_E(self) -> Tensor:
        return self.gram.tokens_E

    def update(self, inputs: SiteInput) -> None:
        inputs = replace(inputs, experts=list(inputs.experts))  # made once
        self.gram.update(inputs)
        if inputs.linears == 1 and len(inputs.experts) == 1 and inputs.of_windows:
            tokens_TI = inputs.experts[0]
            stride = self._stride(len(tokens_TI) * inputs.of_windows // inputs.windows)
            start = (len(tokens_TI) - int(self.tokens_E)) % stride
            self._sampled.append(tokens_TI[start::stride].clone())
        else:
            self.batches.append(inputs)
        self._whole_tokens += 0 if inputs.whole_TI is None else len(inputs.whole_TI)
        read = inputs.experts if inputs.whole_TI is None else [inputs.whole_TI]
        sums_EI = torch.stack([vector_norm(tokens_TI, 1, dim=0, dtype=torch.float32) for tokens_TI in read])
        self._absolute_EI = self._absolute_EI + sums_EI if self._absolute_EI.numel() else sums_EI

    def whole_TI(self) -> Tensor:
        """The tokens of a site that all experts read, as they came."""
        return torch.cat([batch.whole_TI for batch in self.batches if batch.whole_TI is not None])

    def _stride(self, tokens: int) -> int:
        return max(1, tokens // self.sample)

    def sample_TI(self, expert: int) -> Tensor:
        """Evenly spaced tokens of those that one expert reads, float32."""
        stride = self._stride(int(self.tokens_E[expert]))
        taken, start = list(self._sampled), 0
        for batch in self.batches:
            tokens_TI = batch.experts[expert]
            taken.append(tokens_TI[start::stride])
            start = (start - len(tokens_TI)) % stride
        sample_TI = torch.cat(taken)
        if self._scale_EI is not None:
            sample_TI = (sample_TI / self._scale_EI[expert if len(self._scale_EI) > 1 else 0]).to(sample_TI.dtype)
        return sample_TI.float()

    def mean_absolute_EI(self) -> Tensor:
        """Mean |x| of each channel; one row where all experts read the same tensor, else a row an expert."""
        tokens_E = torch.tensor([self._whole_tokens]) if self._whole_tokens else self.tokens_E.clamp(min=1)
        return self._absolute_EI / tokens_E.to(self._absolute_EI.device)[:, None]

    def rescale(self, scale_EI: Tensor) -> None:
        """Make it the statistics of inputs divided by `scale` per channel (one row: the same for all)."""
        self.gram.rescale(scale_EI.expand(len(self.tokens_E), -1))
        self._absolute_EI = self._absolute_EI / scale_EI
        self._scale_EI = scale_EI if self._scale_EI is None else self._scale_EI * scale_EI
