"""Qwen3-MoE's decoder block: the same attention, and experts in place of one MLP.

Experts are stacked: gate and up [E, I, H], down [E, H, I]. Each token's top-k experts read it; the
router stays unquantized and reads the unrounded tensor.
"""

from collections.abc import Sequence
from typing import ClassVar, overload

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from q3q.errors import NumericsError
from q3q.models.anatomy import EXPERT_DOWN, EXPERT_GATE_UP, QKV, O, ScaleGroup, Site, SiteInput
from q3q.models.qwen3 import Qwen3Block, Stages, Weights
from q3q.numerics.linalg import all_finite


class Qwen3MoeBlock(Qwen3Block):
    """A decoder block with experts; agrees with transformers' Qwen3MoeDecoderLayer (tested).

    every_expert: the sites show every token to every expert (calibration.route=all), not only to
        the experts that the router picks. The block's output always follows the router.
    """

    every_expert: bool = False
    sites: ClassVar[tuple[Site, ...]] = (QKV, O, EXPERT_GATE_UP, EXPERT_DOWN)

    def route(self, tokens_TH: Tensor) -> tuple[Tensor, Tensor]:
        """Return each token's experts and their shares, both [T, top_k]."""
        probability = linear(tokens_TH, self.weights["mlp.gate.weight"]).float().softmax(-1)
        share, expert = probability.topk(self.facts.top_k, dim=-1)
        if self.facts.norm_topk_prob:
            share = share / share.sum(-1, keepdim=True)
        return expert, share.to(tokens_TH.dtype)

    @property
    def halted_width(self) -> int:
        hidden, inner = self.facts.hidden, max(self.facts.hidden, self.facts.moe_intermediate)
        attention = self.facts.heads * self.facts.head_dim
        return hidden + max(attention, hidden + self.facts.top_k * inner)

    def with_weights(self, changed: Weights) -> "Qwen3MoeBlock":
        block = super().with_weights(changed)
        assert isinstance(block, Qwen3MoeBlock)
        block.every_expert = self.every_expert
        return block

    def mlp_stages(self, normed_BTH: Tensor) -> Stages:
        tokens_TH = normed_BTH.flatten(0, 1)
        expert_Tk, share_Tk = self.route(tokens_TH)
        # Readings (a token and one of its experts), sorted by expert, then by token.
        counts = torch.bincount(expert_Tk.flatten(), minlength=self.facts.experts).tolist()
        reading_R = expert_Tk.flatten().argsort(stable=True)
        token_R = reading_R // self.facts.top_k
        inputs = list(tokens_TH[token_R].split(counts))
        shown = [tokens_TH] * len(inputs) if self.every_expert else inputs
        yield EXPERT_GATE_UP, SiteInput(tokens_TH, shown)
        gate, up = (self.weights[name] for name in EXPERT_GATE_UP.weights)
        rounded_inputs = (self.round_inputs(EXPERT_GATE_UP, tokens) for tokens in inputs)
        gated = [
            silu(linear(rounded, gate[e])) * linear(rounded, up[e])
            for e, rounded in enumerate(rounded_inputs)
        ]
        del inputs, shown
        all_gated = EveryExpert(self.round_inputs(EXPERT_GATE_UP, tokens_TH), gate, up)
        down_inputs = all_gated if self.every_expert else gated
        yield EXPERT_DOWN, SiteInput(None, down_inputs, unrouted=self.every_expert)
        down = self.weights["mlp.experts.down_proj.weight"]
        mixed_TH = torch.zeros_like(tokens_TH)
        shares = share_Tk.flatten()[reading_R].split(counts)
        # One expert at a time: all at once, a GPU would add a token's parts in any order.
        for e, token in enumerate(token_R.split(counts)):
            part = linear(self.round_inputs(EXPERT_DOWN, gated[e]), down[e]) * shares[e][:, None]
            mixed_TH.index_add_(0, token, part.to(mixed_TH.dtype))
        return mixed_TH.view_as(normed_BTH)

    @property
    def scale_groups(self) -> tuple[ScaleGroup, ...]:
        """One scale for all experts' gate and up (and the router), one per expert for its down."""
        return (
            *super().scale_groups[:2],
            ScaleGroup(EXPERT_GATE_UP, "post_attention_layernorm.weight"),
            ScaleGroup(EXPERT_DOWN, "mlp.experts.up_proj.weight"),
        )


class EveryExpert(Sequence[Tensor]):
    """Each expert's input of down if all tokens went to it.

    An entry is computed when it is read, as all at once would not fit.
    """

    def __init__(self, tokens_TH: Tensor, gate_EIH: Tensor, up_EIH: Tensor, first: int = 0) -> None:
        self._tokens, self._gate, self._up, self._first = tokens_TH, gate_EIH, up_EIH, first

    def __len__(self) -> int:
        return len(self._gate)

    @overload
    def __getitem__(self, expert: int) -> Tensor: ...

    @overload
    def __getitem__(self, expert: slice) -> "EveryExpert": ...

    def __getitem__(self, expert: int | slice) -> "Tensor | EveryExpert":
        if isinstance(expert, slice):
            first = self._first + expert.indices(len(self))[0]
            return EveryExpert(self._tokens, self._gate[expert], self._up[expert], first)
        gated_TI = silu(linear(self._tokens, self._gate[expert]))
        gated_TI = gated_TI * linear(self._tokens, self._up[expert])
        if not all_finite(gated_TI):
            where = f"{EXPERT_DOWN.name}, expert {self._first + expert}"
            raise NumericsError(f"{where}: calibration activations are not finite")
        return gated_TI
