"""A decoder block: its weights, and the parts of which its family composes a forward.

The stages between sites are the only forward in q3q. They agree with transformers' decoder layers
(tested), which run a block in one opaque piece.

Shapes: B windows, T tokens of one window, H hidden, N query heads, K key-value heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from copy import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from q3q.models.anatomy import ScaleGroup, Site, SiteInput, bias_of
from q3q.models.attention import CAUSAL, Attention
from q3q.models.family import ModelFacts
from q3q.models.kv_cache import KvRounding
from q3q.models.rope import frequencies
from q3q.number_formats import FLOATS
from q3q.numerics.floats import floats_per_token
from q3q.numerics.grid import absmax_per_token
from q3q.numerics.kernels.norm import rms_norm
from q3q.numerics.stored_scales import (
    floats_below_factor,
    floats_by_scale,
    ints_but_outliers,
    ints_by_scale,
)
from q3q.scheme import InputRounding

if TYPE_CHECKING:
    from q3q.models.family import Turns

Weights = Mapping[str, Tensor]
Stages = Generator[tuple[Site, SiteInput], None, Tensor]


class Rope:
    """Rotary position embedding (arXiv 2104.09864): positions [...] to cos and sin [..., 1, D].

    D is the part of a head that positions turn. The first half of sin is negated, as `rotate`
    expects. The result for the last tensor of positions is cached, as the next block often has the
    same positions.
    """

    def __init__(self, facts: ModelFacts, device: torch.device | str = "cpu") -> None:
        scaling = facts.rope_scaling
        self._frequencies = frequencies(facts.rotary_dim, facts.rope_theta, scaling, device)
        self._amplitude = 1.0 if scaling is None else scaling.amplitude
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if self._last is None or self._last[0] is not positions or self._last[1].dtype != dtype:
            angles = positions[..., None].float() * self._frequencies
            angles = angles.unsqueeze(-2)  # the same for every head
            cos, sin = angles.cos(), angles.sin()
            if self._amplitude != 1:
                cos, sin = cos * self._amplitude, sin * self._amplitude
            cos, sin = cos.to(dtype), sin.to(dtype)
            self._last = positions, torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        return self._last[1:]


def rotate(x_BTND: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each head's first dimensions, as many as `cos` has; the others stay."""
    turned = cos.shape[-1]
    if turned < x_BTND.shape[-1]:
        rest = x_BTND[..., turned:]
        return torch.cat((rotate(x_BTND[..., :turned], cos, sin), rest), dim=-1)
    low, high = x_BTND.chunk(2, dim=-1)
    return (x_BTND * cos).add_(torch.cat((high, low), dim=-1).mul_(sin))


class Block:
    """One decoder block: its weights (by names without the layer's prefix) and its forward.

    `stages` yields each site with its input, and reads the site's weights only after that. A caller
    that quantizes them between two stages gets sequential quantization from one forward pass.

    rounding: how every site's input is fake-quantized per token; None for no rounding.
    own_rounding: by site, how its input is rounded where the above does not say it; it takes
        its place.
    unrounded: names of sites whose input is never rounded, because their weights are unquantized,
        and of weights that stay unquantized beside others of their site (`Site.apart`).
    kv: how the cache stores keys and values that tokens attend to; None: as they are.
    every_expert: the sites show every token to every expert (calibration.route=all), not only to
        the experts that the router picks. The block's output always follows the router.
    """

    def __init__(self, facts: ModelFacts, layer: int, weights: Weights) -> None:
        self.facts, self.layer = facts, layer
        self.weights = dict(weights)
        self.rounding: InputRounding | None = None
        self.own_rounding: Mapping[str, InputRounding] = {}
        self.unrounded: frozenset[str] = frozenset()
        self.every_expert = False
        self.kv: KvRounding | None = None
        self.sites: tuple[Site, ...] = facts.sites(layer)

    def with_weights(self, changed: Weights) -> Block:
        """Return a copy of the block with some weights replaced."""
        block = copy(self)
        block.weights = {**self.weights, **changed}
        return block

    def __call__(self, x_BTH: Tensor, rope: Turns, attention: Attention = CAUSAL) -> Tensor:
        return finish(self.stages(x_BTH, rope, attention))

    def stages(self, x_BTH: Tensor, rope: Turns, attention: Attention = CAUSAL) -> Stages:
        """Run the forward, halting before each site is read; the generator returns [B, T, H].

        Args:
            attention: the tokens that each token sees; by default each row is a text of its own.
        """
        return self.facts.family.stages(self, x_BTH, rope, attention)

    def attention_stages(
        self, normed_BTH: Tensor, rope: Turns, attention: Attention = CAUSAL
    ) -> Stages:
        return self.facts.family.attention_stages(self, normed_BTH, rope, attention)

    def mlp_stages(self, normed_BTH: Tensor) -> Stages:
        return self.facts.family.mlp_stages(self, normed_BTH)

    # The parts that a family composes: see `q3q.models.family.Parts`.

    def norm(self, gain: str, x_xH: Tensor) -> Tensor:
        offset = self.facts.family.gain_offset
        return rms_norm(x_xH, self.weights[gain], self.facts.rms_norm_eps, offset)

    def linear(self, weight: str, x_xI: Tensor) -> Tensor:
        return linear(x_xI, self.weights[weight], self.weights.get(bias_of(weight)))

    def halt(self, inputs_BTI: Tensor) -> SiteInput:
        tokens_TI = inputs_BTI.flatten(0, 1)
        return SiteInput(tokens_TI, [tokens_TI])

    def round_inputs(self, site: Site, inputs: Tensor) -> Tensor:
        """Return a site's input as its linears read it, fake-quantized if the block rounds it."""
        if (stored := self.own_rounding.get(site.name)) is not None:
            return rounded_as(inputs, stored)
        if self.rounding is None or site.name in self.unrounded:
            return inputs
        return rounded_as(inputs, self.rounding)

    def attend(
        self, query_BTND: Tensor, key_BTKD: Tensor, value_BTKD: Tensor, rope: Turns, see: Attention
    ) -> Tensor:
        positions = see.positions(query_BTND.shape[1], query_BTND.device)
        cos, sin = rope(positions, query_BTND.dtype)
        query_BNTD = rotate(query_BTND, cos, sin).transpose(1, 2)
        key_BKTD = rotate(key_BTKD, cos, sin).transpose(1, 2)
        value_BKTD, kv = value_BTKD.transpose(1, 2), self.kv
        if kv is not None and not kv.late:
            key_BKTD, value_BKTD, kv = kv.keys(key_BKTD), kv.values(value_BKTD), None
        context_BNTD = see(query_BNTD, key_BKTD, value_BKTD, kv)
        return see.read(context_BNTD.transpose(1, 2).flatten(2))

    def gated(self, gate_xI: Tensor, up_xI: Tensor) -> Tensor:
        return silu(gate_xI, inplace=True).mul_(up_xI)

    # What others ask of a block.

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.weights.values())).dtype

    @property
    def device(self) -> torch.device:
        return next(iter(self.weights.values())).device

    @property
    def halted_width(self) -> int:
        """Return the most numbers per token that a halted run holds, its input included."""
        return self.facts.family.halted_width(self.facts, self.layer)

    @property
    def share_read(self) -> float:
        """Return the share of all tokens that each linear of the MLP is shown."""
        if self.every_expert or not self.facts.sparse(self.layer):
            return 1.0
        return self.facts.top_k / self.facts.experts

    @property
    def scale_groups(self) -> tuple[ScaleGroup, ...]:
        """Return the scale groups, in AWQ's order."""
        return self.facts.family.scale_groups(self.facts, self.layer)


def rounded_as(inputs: Tensor, rounding: InputRounding) -> Tensor:
    """Return a site's input rounded by scales of its own, or as its checkpoint's loader does it."""
    form, number = FLOATS.get(rounding.format), rounding.number
    if rounding.scales == "outliers":
        return ints_but_outliers(inputs, rounding.bits)
    if number is None:
        if form is not None:
            return floats_per_token(inputs, form, rounding.group_size)
        return absmax_per_token(inputs, rounding.bits, rounding.group_size)
    if form is None:
        return ints_by_scale(inputs, rounding.bits, number)
    if rounding.scales == "factor":
        return floats_below_factor(inputs, form, rounding.group_size, number)
    return floats_by_scale(inputs, form, number)


def finish(stages: Stages) -> Tensor:
    """Run the rest of a staged forward and return its value."""
    while True:
        try:
            next(stages)
        except StopIteration as end:
            return end.value
