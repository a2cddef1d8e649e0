"""What methods keep of a site's inputs, fed batch by batch.

Shapes: E experts (1 in a dense block), T tokens, I channels.
"""

from typing import Protocol

import torch
from torch import Tensor

from q3q.models.anatomy import SiteInput


class Statistics(Protocol):
    """An accumulator of one site's inputs; tokens_E: how many tokens each expert has seen."""

    @property
    def tokens_E(self) -> Tensor: ...

    def update(self, inputs: SiteInput) -> None: ...


class Gram:
    """Mean of x x^T over each expert's tokens, float32: GPTQ's Hessian up to a factor that cancels.

    sum_EII: the sum so far. tokens_E: how many tokens each expert has seen.
    """

    def __init__(self) -> None:
        self.sum_EII = torch.empty(0)
        self.tokens_E = torch.empty(0)

    def update(self, inputs: SiteInput) -> None:
        first = inputs.experts[0]
        if not self.tokens_E.numel():
            experts, columns = len(inputs.experts), first.shape[-1]
            self.sum_EII = torch.zeros(experts, columns, columns, device=first.device)
            self.tokens_E = torch.zeros(experts, dtype=torch.int64)
        for e, tokens_TI in enumerate(inputs.experts):
            wide_TI = tokens_TI.float()
            self.sum_EII[e].addmm_(wide_TI.T, wide_TI)
            self.tokens_E[e] += len(tokens_TI)

    def mean_EII(self) -> Tensor:
        """Zero for an expert that saw nothing."""
        return self.sum_EII / self.tokens_E.clamp(min=1).to(self.sum_EII.device)[:, None, None]

    def rescale(self, scale_EI: Tensor) -> None:
        """Make it the statistics of inputs divided by `scale` per channel."""
        self.sum_EII = self.sum_EII / (scale_EI[:, :, None] * scale_EI[:, None, :])


class Kept:
    """The inputs themselves (for methods that search by running a piece of the block), and their Gram matrices."""

    def __init__(self) -> None:
        self.gram = Gram()
        self.batches: list[SiteInput] = []

    @property
    def tokens_E(self) -> Tensor:
        return self.gram.tokens_E

    def update(self, inputs: SiteInput) -> None:
        self.gram.update(inputs)
        self.batches.append(inputs)

    def expert_tokens(self, expert: int) -> Tensor:
        """All tokens that one expert reads [T, I]."""
        return torch.cat([batch.experts[expert] for batch in self.batches])

    def mean_absolute_EI(self) -> Tensor:
        """Mean |x| of each channel; one row where all experts read the same tensor, else a row an expert."""
        if self.batches[0].whole_TI is not None:
            whole = torch.cat([batch.whole_TI for batch in self.batches if batch.whole_TI is not None])
            return whole.float().abs().mean(0, keepdim=True)
        return torch.stack(
            [self.expert_tokens(e).float().abs().sum(0) / max(int(n), 1) for e, n in enumerate(self.tokens_E)]
        )

    def rescale(self, scale_EI: Tensor) -> None:
        """Divide the inputs by `scale` per channel (one row: the same for all)."""
        self.gram.rescale(scale_EI.expand(len(self.tokens_E), -1))

        def divided(tokens_TI: Tensor, e: int) -> Tensor:
            return (tokens_TI / scale_EI[e if len(scale_EI) > 1 else 0]).to(tokens_TI.dtype)

        self.batches = [
            SiteInput(
                None if batch.whole_TI is None else divided(batch.whole_TI, 0),
                [divided(tokens, e) for e, tokens in enumerate(batch.experts)],
            )
            for batch in self.batches
        ]
