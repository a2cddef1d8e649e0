"""Qwen3's decoder block as stages between its sites: the only forward in q3q.

It agrees with transformers' Qwen3DecoderLayer (tested), which runs a block in one opaque piece.

Shapes: B windows, T tokens of one window, H hidden, N query heads, K key-value heads, D head_dim.
heads * head_dim need not be hidden.
"""

from collections.abc import Generator, Mapping
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from q3q.models.anatomy import DOWN, GATE_UP, QKV, O, ScaleGroup, Site, SiteInput
from q3q.models.attention import CAUSAL, Attention
from q3q.numerics.grid import absmax_per_token

if TYPE_CHECKING:
    from q3q.models.facts import ModelFacts

Weights = Mapping[str, Tensor]
Stages = Generator[tuple[Site, SiteInput], None, Tensor]


def rms_norm(x_xH: Tensor, gain_H: Tensor, eps: float) -> Tensor:
    """Compute the root-mean-square norm in float32; return the input's dtype, as transformers."""
    wide = x_xH.float()
    scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
    normed = wide * scale if x_xH.dtype == torch.float32 else wide.mul_(scale)
    return normed.to(x_xH.dtype).mul_(gain_H)


class Rope:
    """Rotary position embedding (arXiv 2104.09864): positions [...] to cos and sin [..., 1, D].

    The first half of sin is negated, as `rotate` expects. The result for the last tensor of
    positions is cached, as the next block often has the same positions.
    """

    def __init__(self, facts: "ModelFacts", device: torch.device | str = "cpu") -> None:
        even = torch.arange(0, facts.head_dim, 2, dtype=torch.int64, device=device).float()
        self._frequencies = 1.0 / (facts.rope_theta ** (even / facts.head_dim))
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if self._last is None or self._last[0] is not positions or self._last[1].dtype != dtype:
            angles = positions[..., None].float() * self._frequencies
            angles = angles.unsqueeze(-2)  # the same for every head
            cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
            self._last = positions, torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        return self._last[1:]


def rotate(x_BTND: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x_BTND.chunk(2, dim=-1)
    return (x_BTND * cos).add_(torch.cat((high, low), dim=-1).mul_(sin))


class Qwen3Block:
    """One decoder block: its weights (by names without the layer's prefix) and its forward.

    `stages` yields each site with its input, and reads the site's weights only after that. A caller
    that quantizes them between two stages gets sequential quantization from one forward pass.

    act_bits: bits to which every site's input is fake-quantized per token; None for no rounding.
    unrounded: names of sites whose input is never rounded, because their weights are unquantized.
    """

    sites: ClassVar[tuple[Site, ...]] = (QKV, O, GATE_UP, DOWN)

    def __init__(self, facts: "ModelFacts", weights: Weights, act_bits: int | None = None) -> None:
        self.facts = facts
        self.weights = dict(weights)
        self.act_bits = act_bits
        self.unrounded: frozenset[str] = frozenset()

    def with_weights(self, changed: Weights) -> "Qwen3Block":
        """Return a copy of the block with some weights replaced."""
        block = type(self)(self.facts, {**self.weights, **changed}, self.act_bits)
        block.unrounded = self.unrounded
        return block

    def __call__(self, x_BTH: Tensor, rope: Rope, attention: Attention = CAUSAL) -> Tensor:
        return finish(self.stages(x_BTH, rope, attention))

    def stages(self, x_BTH: Tensor, rope: Rope, attention: Attention = CAUSAL) -> Stages:
        """Run the forward, halting before each site is read; the generator returns [B, T, H].

        Args:
            attention: the tokens that each token sees; by default each row is a text of its own.
        """
        eps = self.facts.rms_norm_eps
        attended_BTH = yield from self.attention_stages(
            rms_norm(x_BTH, self.weights["input_layernorm.weight"], eps), rope, attention
        )
        x_BTH = attended_BTH.add_(attention.read(x_BTH))
        del attended_BTH
        mlp_BTH = yield from self.mlp_stages(
            rms_norm(x_BTH, self.weights["post_attention_layernorm.weight"], eps)
        )
        return mlp_BTH.add_(x_BTH)

    def attention_stages(
        self, normed_BTH: Tensor, rope: Rope, attention: Attention = CAUSAL
    ) -> Stages:
        yield QKV, _dense_input(normed_BTH)
        rounded = self.round_inputs(QKV, normed_BTH)
        query, key, value = (
            linear(rounded, self.weights[name]).unflatten(-1, (-1, self.facts.head_dim))
            for name in QKV.weights
        )
        query = rms_norm(query, self.weights["self_attn.q_norm.weight"], self.facts.rms_norm_eps)
        key = rms_norm(key, self.weights["self_attn.k_norm.weight"], self.facts.rms_norm_eps)
        positions = attention.positions(normed_BTH.shape[1], normed_BTH.device)
        cos, sin = rope(positions, normed_BTH.dtype)
        context_BNTD = attention(
            rotate(query, cos, sin).transpose(1, 2),
            rotate(key, cos, sin).transpose(1, 2),
            value.transpose(1, 2),
        )
        context = attention.read(context_BNTD.transpose(1, 2).flatten(2))
        # While it is halted, a run holds only what it still needs.
        del normed_BTH, positions, rounded, query, key, value, context_BNTD
        yield O, _dense_input(context)
        return linear(self.round_inputs(O, context), self.weights["self_attn.o_proj.weight"])

    def mlp_stages(self, normed_BTH: Tensor) -> Stages:
        yield GATE_UP, _dense_input(normed_BTH)
        rounded = self.round_inputs(GATE_UP, normed_BTH)
        gated = silu(linear(rounded, self.weights["mlp.gate_proj.weight"]), inplace=True)
        gated *= linear(rounded, self.weights["mlp.up_proj.weight"])
        del normed_BTH, rounded
        yield DOWN, _dense_input(gated)
        return linear(self.round_inputs(DOWN, gated), self.weights["mlp.down_proj.weight"])

    def round_inputs(self, site: Site, inputs: Tensor) -> Tensor:
        """Return a site's input as its linears read it, fake-quantized if the block rounds it."""
        if self.act_bits is None or site.name in self.unrounded:
            return inputs
        return absmax_per_token(inputs, self.act_bits)

    @property
    def halted_width(self) -> int:
        """Return the most numbers per token that a halted run holds, its input included."""
        hidden = self.facts.hidden
        return hidden + max(hidden, self.facts.heads * self.facts.head_dim, self.facts.intermediate)

    @property
    def share_read(self) -> float:
        """Return the share of all tokens that each linear of the MLP is shown."""
        return 1.0

    @property
    def scale_groups(self) -> tuple[ScaleGroup, ...]:
        """Return the scale groups, in AWQ's order.

        v -> o repeats each value channel for the query heads that read it.
        """
        repeat = self.facts.heads // self.facts.kv_heads
        return (
            ScaleGroup(QKV, "input_layernorm.weight"),
            ScaleGroup(O, "self_attn.v_proj.weight", repeat, self.facts.head_dim),
            ScaleGroup(GATE_UP, "post_attention_layernorm.weight"),
            ScaleGroup(DOWN, "mlp.up_proj.weight"),
        )


def finish(stages: Stages) -> Tensor:
    """Run the rest of a staged forward and return its value."""
    while True:
        try:
            next(stages)
        except StopIteration as end:
            value: Tensor = end.value
            return value


def _dense_input(inputs_BTI: Tensor) -> SiteInput:
    tokens_TI = inputs_BTI.flatten(0, 1)
    return SiteInput(tokens_TI, [tokens_TI])
