"""Qwen3-MoE's decoder block: the same attention, and experts in place of one MLP.

Experts are stacked: gate and up [E, I, H], down [E, H, I]. Each token's top-k experts read it; the
router stays unquantized and reads the unrounded tensor.
"""

from collections.abc import Sequence
from typing import ClassVar, overload

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from q3q.models.anatomy import EXPERT_DOWN, EXPERT_GATE_UP, QKV, O, ScaleGroup, Site, SiteInput
from q3q.models.block import Block, Stages, Weights
from q3q.numerics.grouped import GroupedRows, Groups, grouped_linear


class ExpertBlock(Block):
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

    @property
    def share_read(self) -> float:
        return 1.0 if self.every_expert else self.facts.top_k / self.facts.experts

    def with_weights(self, changed: Weights) -> "ExpertBlock":
        block = super().with_weights(changed)
        assert isinstance(block, ExpertBlock)
        block.every_expert = self.every_expert
        return block

    def mlp_stages(self, normed_BTH: Tensor) -> Stages:
        tokens_TH = normed_BTH.flatten(0, 1)
        expert_Tk, share_Tk = self.route(tokens_TH)
        # Readings (a token and one of its experts), sorted by expert, then by token.
        expert_R, reading_R = expert_Tk.flatten().sort(stable=True)
        groups = Groups.of_sorted(expert_R, self.facts.experts)
        del expert_Tk, expert_R
        inputs = GroupedRows(tokens_TH[reading_R // self.facts.top_k], groups)
        shown = [tokens_TH] * len(inputs) if self.every_expert else inputs
        yield EXPERT_GATE_UP, SiteInput(tokens_TH, shown)
        gate, up = (self.weights[name] for name in EXPERT_GATE_UP.weights)
        rounded_RH = self.round_inputs(EXPERT_GATE_UP, inputs.rows_RI)
        gated_RI = silu(grouped_linear(rounded_RH, gate, groups), inplace=True)
        gated_RI *= grouped_linear(rounded_RH, up, groups)
        del inputs, shown, rounded_RH
        down_inputs: Sequence[Tensor] = GroupedRows(gated_RI, groups)
        if self.every_expert:
            down_inputs = EveryExpert(self.round_inputs(EXPERT_GATE_UP, tokens_TH), gate, up)
        yield EXPERT_DOWN, SiteInput(None, down_inputs, unrouted=self.every_expert)
        del down_inputs
        down = self.weights["mlp.experts.down_proj.weight"]
        part_RH = grouped_linear(self.round_inputs(EXPERT_DOWN, gated_RI), down, groups)
        part_RH *= share_Tk.flatten()[reading_R][:, None]
        return self._summed(part_RH, reading_R).view_as(normed_BTH)

    def _summed(self, part_RH: Tensor, reading_R: Tensor) -> Tensor:
        """Add up each token's parts [T, H] in the order of its experts: no order of threads counts.

        Args:
            part_RH: sorted by expert, as `reading_R`, the number of each reading, token by token.
        """
        place_R = torch.empty_like(reading_R)
        place_R[reading_R] = torch.arange(len(reading_R), device=reading_R.device)
        place_Tk = place_R.view(-1, self.facts.top_k).sort(dim=1).values
        first_T, *later = place_Tk.unbind(1)
        summed_TH = part_RH[first_T]
        for place_T in later:
            summed_TH += part_RH[place_T]
        return summed_TH

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

    def __init__(self, tokens_TH: Tensor, gate_EIH: Tensor, up_EIH: Tensor) -> None:
        self._tokens, self._gate, self._up = tokens_TH, gate_EIH, up_EIH

    def __len__(self) -> int:
        return len(self._gate)

    @overload
    def __getitem__(self, expert: int) -> Tensor: ...

    @overload
    def __getitem__(self, expert: slice) -> "EveryExpert": ...

    def __getitem__(self, expert: int | slice) -> "Tensor | EveryExpert":
        if isinstance(expert, slice):
            return EveryExpert(self._tokens, self._gate[expert], self._up[expert])
        gated_TI = silu(linear(self._tokens, self._gate[expert]), inplace=True)
        return gated_TI.mul_(linear(self._tokens, self._up[expert]))
