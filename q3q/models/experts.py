"""Experts in place of one MLP, for families that have them.

Experts are stacked: gate and up [E, I, H], down [E, H, I]. Each token's top-k experts read it; the
router stays unquantized and reads the unrounded tensor. So does the gate of an expert that all
tokens share.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from q3q.models.anatomy import (
    EXPERT_DOWN,
    EXPERT_GATE_UP,
    SHARED_DOWN,
    SHARED_GATE_UP,
    Computed,
    Site,
    SiteInput,
)
from q3q.models.block import Block, Stages
from q3q.numerics.grouped import GroupedRows, Groups, grouped_linear


def route(block: Block, tokens_TH: Tensor) -> tuple[Tensor, Tensor]:
    """Return each token's experts and their shares, both [T, top_k]."""
    probability = linear(tokens_TH, block.weights["mlp.gate.weight"]).float().softmax(-1)
    share, expert = probability.topk(block.facts.top_k, dim=-1)
    if block.facts.norm_topk_prob:
        share = share / share.sum(-1, keepdim=True)
    return expert, share.to(tokens_TH.dtype)


def routed_stages(block: Block, normed_BTH: Tensor, site: Site = EXPERT_GATE_UP) -> Stages:
    """Run what reads the site `gate_up` of a block with experts; see `Family.mlp_stages`."""
    facts, weights = block.facts, block.weights
    tokens_TH = normed_BTH.flatten(0, 1)
    expert_Tk, share_Tk = route(block, tokens_TH)
    # Readings (a token and one of its experts), sorted by expert, then by token.
    expert_R, reading_R = expert_Tk.flatten().sort(stable=True)
    groups = Groups.of_sorted(expert_R, facts.experts)
    del expert_Tk, expert_R
    inputs = GroupedRows(tokens_TH[reading_R // facts.top_k], groups)
    shown = [tokens_TH] * len(inputs) if block.every_expert else inputs
    yield site, SiteInput(tokens_TH, shown)
    gate, up = (weights[name] for name in site.weights)
    rounded_RH = block.round_inputs(site, inputs.rows_RI)
    gated_RI = block.gated(*(grouped_linear(rounded_RH, w, groups) for w in (gate, up)))
    del inputs, shown, rounded_RH
    down_inputs: Sequence[Tensor] = GroupedRows(gated_RI, groups)
    if block.every_expert:
        down_inputs = every_expert(block.round_inputs(site, tokens_TH), gate, up)
    yield EXPERT_DOWN, SiteInput(None, down_inputs, unrouted=block.every_expert)
    del down_inputs
    down = weights["mlp.experts.down_proj.weight"]
    part_RH = grouped_linear(block.round_inputs(EXPERT_DOWN, gated_RI), down, groups)
    part_RH *= share_Tk.flatten()[reading_R][:, None]
    return _summed(part_RH, reading_R, facts.top_k).view_as(normed_BTH)


def stages_with_shared(block: Block, normed_BTH: Tensor, site: Site, gate: str) -> Stages:
    """Run the routed experts, then the one that all tokens share, weighed by a sigmoid.

    Args:
        site: `gate_up` of the routed experts.
        gate: name of the shared expert's gate [1, H].
    """
    routed_BTH = yield from routed_stages(block, normed_BTH, site)
    yield SHARED_GATE_UP, block.halt(normed_BTH)
    share_BT1 = block.linear(gate, normed_BTH).sigmoid()
    rounded = block.round_inputs(SHARED_GATE_UP, normed_BTH)
    gated = block.gated(*(block.linear(name, rounded) for name in SHARED_GATE_UP.weights))
    del normed_BTH, rounded
    yield SHARED_DOWN, block.halt(gated)
    shared = block.linear(SHARED_DOWN.weights[0], block.round_inputs(SHARED_DOWN, gated))
    return routed_BTH.add_(shared.mul_(share_BT1))


def _summed(part_RH: Tensor, reading_R: Tensor, top_k: int) -> Tensor:
    """Add up each token's parts [T, H] in the order of its experts: no order of threads counts.

    Args:
        part_RH: sorted by expert, as `reading_R`, the number of each reading, token by token.
    """
    place_R = torch.empty_like(reading_R)
    place_R[reading_R] = torch.arange(len(reading_R), device=reading_R.device)
    place_Tk = place_R.view(-1, top_k).sort(dim=1).values
    first_T, *later = place_Tk.unbind(1)
    summed_TH = part_RH[first_T]
    for place_T in later:
        summed_TH += part_RH[place_T]
    return summed_TH


def every_expert(tokens_TH: Tensor, gate_EIH: Tensor, up_EIH: Tensor) -> Sequence[Tensor]:
    """Return each expert's input of down if all tokens went to it."""

    def gated(expert: int) -> Tensor:
        gated_TI = silu(linear(tokens_TH, gate_EIH[expert]), inplace=True)
        return gated_TI.mul_(linear(tokens_TH, up_EIH[expert]))

    return Computed(range(len(gate_EIH)), gated)
