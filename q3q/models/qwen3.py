"""Qwen3's decoder block as stages between its sites: the only forward of ours.

Shapes: B windows, T tokens of one, H hidden, N query heads, K key-value heads, D head_dim. heads * head_dim need not be
hidden. Agrees with transformers' Qwen3DecoderLayer (tested), which runs a block as one opaque piece.
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
    """Root-mean-square norm, computed in float32 and returned in the input's dtype, as transformers does."""
    wide = x_xH.float()
    return gain_H * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x_xH.dtype)


class Rope:
    """Rotary position embedding (arXiv 2104.09864): cos and sin [T, 1, D] of positions [T]; of [B, T], [B, T, 1, D].

    The first half of sin is negated, as `rotate` takes it. What the last tensor of positions gave is kept: the next
    block often has the same.
    """

    def __init__(self, facts: "ModelFacts", device: torch.device | str = "cpu") -> None:
        exponents = (
            torch.arange(0, facts.head_dim, 2, dtype=torch.int64, device=device).float()
            / facts.head_dim
        )
        self._frequencies = 1.0 / (facts.rope_theta**exponents)
        self._last: tuple[Tensor, Tensor, Tensor] | None = None

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if self._last is None or self._last[0] is not positions or self._last[1].dtype != dtype:
            angles = (positions[..., None].float() * self._frequencies).unsqueeze(
                -2
            )  # the same for every head
            cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
            self._last = positions, torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        return self._last[1:]


def rotate(x_BTND: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x_BTND.chunk(2, dim=-1)
    return (x_BTND * cos).add_(torch.cat((high, low), dim=-1).mul_(sin))


class Qwen3Block:
    """One decoder block: its weights (names without the layer's prefix) and its forward.

    `stages` yields every site with its input and takes up the weights anew after each: whoever quantizes a site's
    weights between two stages gets sequential quantization from one forward pass.
    act_bits: fake-quantize the input of every site per token; None leaves activations alone. unrounded: names of sites
    whose input stays as it is all the same, because their weights do.
    """

    sites: ClassVar[tuple[Site, ...]] = (QKV, O, GATE_UP, DOWN)

    def __init__(self, facts: "ModelFacts", weights: Weights, act_bits: int | None = None) -> None:
        self.facts = facts
        self.weights = dict(weights)
        self.act_bits = act_bits
        self.unrounded: frozenset[str] = frozenset()

    def with_weights(self, changed: Weights) -> "Qwen3Block":
        """The same block with some weights exchanged."""
        block = type(self)(self.facts, {**self.weights, **changed}, self.act_bits)
        block.unrounded = self.unrounded
        return block

    def __call__(self, x_BTH: Tensor, rope: Rope, attention: Attention = CAUSAL) -> Tensor:
        return finish(self.stages(x_BTH, rope, attention))

    def stages(self, x_BTH: Tensor, rope: Rope, attention: Attention = CAUSAL) -> Stages:
        """The block's forward, halting before each site is read; its value is the block's output [B, T, H].

        attention: what each token sees; by default each row is one text from its beginning.
        """
        eps = self.facts.rms_norm_eps
        attended_BTH = yield from self.attention_stages(
            rms_norm(x_BTH, self.weights["input_layernorm.weight"], eps), rope, attention
        )
        x_BTH = attention.read(x_BTH) + attended_BTH
        del attended_BTH
        mlp_BTH = yield from self.mlp_stages(
            rms_norm(x_BTH, self.weights["post_attention_layernorm.weight"], eps)
        )
        return x_BTH + mlp_BTH

    def attention_stages(
        self, normed_BTH: Tensor, rope: Rope, attention: Attention = CAUSAL
    ) -> Stages:
        yield QKV, _whole(normed_BTH)
        seen = self.seen(QKV, normed_BTH)
        query, key, value = (
            linear(seen, self.weights[name]).unflatten(-1, (-1, self.facts.head_dim))
            for name in QKV.weights
        )
        query = rms_norm(query, self.weights["self_attn.q_norm.weight"], self.facts.rms_norm_eps)
        key = rms_norm(key, self.weights["self_attn.k_norm.weight"], self.facts.rms_norm_eps)
        cos, sin = rope(
            attention.positions(normed_BTH.shape[1], normed_BTH.device), normed_BTH.dtype
        )
        context_BNTD = attention(
            rotate(query, cos, sin).transpose(1, 2),
            rotate(key, cos, sin).transpose(1, 2),
            value.transpose(1, 2),
        )
        context = attention.read(context_BNTD.transpose(1, 2).flatten(2))
        del (
            normed_BTH,
            seen,
            query,
            key,
            value,
            context_BNTD,
        )  # halted, a run holds what is still to be used
        yield O, _whole(context)
        return linear(self.seen(O, context), self.weights["self_attn.o_proj.weight"])

    def mlp_stages(self, normed_BTH: Tensor) -> Stages:
        yield GATE_UP, _whole(normed_BTH)
        seen = self.seen(GATE_UP, normed_BTH)
        gated = silu(linear(seen, self.weights["mlp.gate_proj.weight"]), inplace=True)
        gated *= linear(seen, self.weights["mlp.up_proj.weight"])
        del normed_BTH, seen
        yield DOWN, _whole(gated)
        return linear(self.seen(DOWN, gated), self.weights["mlp.down_proj.weight"])

    def seen(self, site: Site, inputs: Tensor) -> Tensor:
        """A site's input as its linears see it."""
        if self.act_bits is None or site.name in self.unrounded:
            return inputs
        return absmax_per_token(inputs, self.act_bits)

    @property
    def widest(self) -> int:
        """Numbers that a run holds for each token while it is halted, at most; it has its input to itself."""
        hidden = self.facts.hidden
        return hidden + max(hidden, self.facts.heads * self.facts.head_dim, self.facts.intermediate)

    @property
    def scale_groups(self) -> tuple[ScaleGroup, ...]:
        """In the order AWQ treats them. v -> o needs each value channel repeated for the query heads that read it."""
        return (
            ScaleGroup(QKV, "input_layernorm.weight"),
            ScaleGroup(
                O,
                "self_attn.v_proj.weight",
                self.facts.heads // self.facts.kv_heads,
                self.facts.head_dim,
            ),
            ScaleGroup(GATE_UP, "post_attention_layernorm.weight"),
            ScaleGroup(DOWN, "mlp.up_proj.weight"),
        )


def finish(stages: Stages) -> Tensor:
    """Run what is left of a staged forward and return its value."""
    while True:
        try:
            next(stages)
        except StopIteration as end:
            value: Tensor = end.value
            return value


def _whole(inputs_BTI: Tensor) -> SiteInput:
    tokens_TI = inputs_BTI.flatten(0, 1)
    return SiteInput(tokens_TI, [tokens_TI])
