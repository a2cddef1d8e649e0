"""Qwen3-MoE's decoder block: the same attention, and experts in place of one MLP.

Experts are stacked: gate and up [E, I, H], down [E, H, I]. Each token is read by its top-k experts; the router stays
as it is and reads the unquantized tensor.
"""

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from q3q.models.anatomy import EXPERT_DOWN, EXPERT_GATE_UP, QKV, O, ScaleGroup, Site, SiteInput
from q3q.models.qwen3 import Qwen3Block, Stages


class Qwen3MoeBlock(Qwen3Block):
    """Agrees with transformers' Qwen3MoeDecoderLayer (tested)."""

    sites: ClassVar[tuple[Site, ...]] = (QKV, O, EXPERT_GATE_UP, EXPERT_DOWN)

    def route(self, tokens_TH: Tensor) -> tuple[Tensor, Tensor]:
        """Each token's experts and their shares, both [T, top_k]."""
        probability = linear(tokens_TH, self.weights["mlp.gate.weight"]).float().softmax(-1)
        share, expert = probability.topk(self.facts.top_k, dim=-1)
        if self.facts.norm_topk_prob:
            share = share / share.sum(-1, keepdim=True)
        return expert, share.to(tokens_TH.dtype)

    def mlp_stages(self, normed_BTH: Tensor) -> Stages:
        tokens_TH = normed_BTH.flatten(0, 1)
        expert_Tk, share_Tk = self.route(tokens_TH)
        reads = [(expert_Tk == e).nonzero(as_tuple=True) for e in range(self.facts.experts)]
        inputs = [tokens_TH[token] for token, _ in reads]
        yield EXPERT_GATE_UP, SiteInput(tokens_TH, inputs)
        gate, up = (self.weights[name] for name in EXPERT_GATE_UP.weights)
        gated = [silu(linear(seen, gate[e])) * linear(seen, up[e]) for e, seen in enumerate(map(self.seen, inputs))]
        yield EXPERT_DOWN, SiteInput(None, gated)
        down = self.weights["mlp.experts.down_proj.weight"]
        mixed_TH = torch.zeros_like(tokens_TH)
        for e, (token, place) in enumerate(reads):
            part = linear(self.seen(gated[e]), down[e]) * share_Tk[token, place, None]
            mixed_TH.index_add_(0, token, part.to(mixed_TH.dtype))
        return mixed_TH.view_as(normed_BTH)

    @property
    def scale_groups(self) -> tuple[ScaleGroup, ...]:
        """One scale for all experts' gate and up (and the router); one per expert between its up and down."""
        attention = super().scale_groups[:2]
        return (
            *attention,
            ScaleGroup(EXPERT_GATE_UP, "post_attention_layernorm.weight"),
            ScaleGroup(EXPERT_DOWN, "mlp.experts.up_proj.weight"),
        )
