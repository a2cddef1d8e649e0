"""Hybrids of a gated delta rule and gated attention: what Qwen3-Next, 3.5 and 3.6 have in common.

Most blocks mix tokens by the delta rule (`q3q.models.delta`), every fourth one by attention whose
output is gated. Norms' gains lie in files around 0. Positions are those of text: all three sections
of a multimodal rotary embedding (`mrope_section`) then turn by the same angle, as without sections.

Shapes: B windows, T tokens of one window, H hidden; X numbers of a token that the delta rule reads.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from q3q.models.anatomy import QKV, O, ScaleGroup, Site
from q3q.models.config_values import Values
from q3q.models.delta_sizes import DeltaSizes
from q3q.models.families.qwen3 import Qwen3
from q3q.models.family import Family, ModelFacts, Parts
from q3q.models.tensor_files import Shape

if TYPE_CHECKING:
    from torch import Tensor

    from q3q.models.attention import Attention
    from q3q.models.family import Stages, Turns

OUT = Site("out", ("linear_attn.out_proj.weight",))
WIDEST_CONVOLUTION = 64  # tokens; released models have 4


class Hybrid(Qwen3):
    """Agrees with transformers' decoder layers of these models (tested), of either kind.

    A family says which linears read a block's first norm (`inner_site`), and how their outputs
    become what the delta rule reads (`inner_inputs`).
    """

    defaults: ClassVar[Mapping[str, Any]] = {
        "head_dim": 256,
        "partial_rotary_factor": 0.25,
        "full_attention_interval": 4,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
    }
    assumed: ClassVar[Mapping[str, Any]] = {
        "hidden_act": "silu",
        "attention_bias": False,
        "attn_output_gate": True,
    }
    layer_types: ClassVar[tuple[str, ...]] = ("linear_attention", "full_attention")
    partial_rotary: ClassVar[bool] = True
    gain_offset: ClassVar[float] = 1.0
    kept: ClassVar[Mapping[str, str]] = {
        **Family.kept,
        "conv1d.weight": "a convolution's few weights, not those of a linear",
        "A_log": "a number a head, the delta rule's rate of forgetting",
        "dt_bias": "a number a head, beside it",
    }
    carried: ClassVar[tuple[str, ...]] = ("mtp.",)
    inner_site: ClassVar[Site]

    def facts(self, values: Values) -> ModelFacts:
        values = values.with_defaults(self.defaults)
        facts = super().facts(values)
        return replace(
            facts,
            recurrent=self._recurrent(values, facts.layers),
            delta=DeltaSizes(
                key_heads=values.count("linear_num_key_heads"),
                value_heads=values.count("linear_num_value_heads"),
                key_dim=values.count("linear_key_head_dim"),
                value_dim=values.count("linear_value_head_dim"),
                width=values.count("linear_conv_kernel_dim", most=WIDEST_CONVOLUTION),
            ),
        )

    def _recurrent(self, values: Values, layers: int) -> tuple[int, ...]:
        """Return the blocks with a delta rule."""
        kinds = values.items("layer_types")
        if not kinds:
            interval = values.count("full_attention_interval")
            return tuple(k for k in range(layers) if (k + 1) % interval)
        if len(kinds) != layers:
            raise values.wrong(f"layer_types names {len(kinds)} blocks of {layers}")
        return tuple(k for k, kind in enumerate(kinds) if kind == "linear_attention")

    # What a block is made of.

    def shapes(self, facts: ModelFacts, layer: int) -> dict[str, Shape]:
        if layer not in facts.recurrent:
            return super().shapes(facts, layer)
        return {
            "input_layernorm.weight": (facts.hidden,),
            **self.delta_shapes(facts),
            "post_attention_layernorm.weight": (facts.hidden,),
            **self.mlp_shapes(facts, layer),
        }

    def attention_shapes(self, facts: ModelFacts) -> dict[str, Shape]:
        """Each query head has rows of its gate behind its own."""
        query = (2 * facts.heads * facts.head_dim, facts.hidden)
        return super().attention_shapes(facts) | {"self_attn.q_proj.weight": query}

    def delta_shapes(self, facts: ModelFacts) -> dict[str, Shape]:
        sizes = sizes_of(facts)
        return {
            "linear_attn.dt_bias": (sizes.value_heads,),
            "linear_attn.A_log": (sizes.value_heads,),
            "linear_attn.conv1d.weight": (sizes.channels, 1, sizes.width),
            **self.inner_shapes(facts),
            "linear_attn.norm.weight": (sizes.value_dim,),
            "linear_attn.out_proj.weight": (facts.hidden, sizes.values),
        }

    @abstractmethod
    def inner_shapes(self, facts: ModelFacts) -> dict[str, Shape]:
        """Return the shapes of `inner_site`'s weights."""

    @abstractmethod
    def inner_inputs(
        self, facts: ModelFacts, projected: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Return what the delta rule reads [B, T, X], and the output's gate [B, T, N * V].

        Args:
            projected: outputs of `inner_site`'s linears, by the weights' names.
        """

    def mixing_sites(self, facts: ModelFacts, layer: int) -> tuple[Site, ...]:
        return (self.inner_site, OUT) if layer in facts.recurrent else (QKV, O)

    def mixing_scale_groups(self, facts: ModelFacts, layer: int) -> tuple[ScaleGroup, ...]:
        """The delta rule's norm has one gain for the channels of all heads, and so one scale."""
        if layer not in facts.recurrent:
            return super().mixing_scale_groups(facts, layer)
        sizes = sizes_of(facts)
        return (
            self.norm_group(self.inner_site, "input_layernorm.weight"),
            ScaleGroup(OUT, "linear_attn.norm.weight", sizes.value_heads, sizes.value_dim),
        )

    # How a block computes.

    def attention_stages(
        self, block: Parts, normed_BTH: Tensor, rope: Turns, attention: Attention
    ) -> Stages:
        if block.layer in block.facts.recurrent:
            return self.delta_stages(block, normed_BTH, attention)
        return self.gated_attention_stages(block, normed_BTH, rope, attention)

    def gated_attention_stages(
        self, block: Parts, normed_BTH: Tensor, rope: Turns, attention: Attention
    ) -> Stages:
        """Run attention; its context is multiplied by the sigmoid of a gate for each channel."""
        head_dim = block.facts.head_dim
        yield QKV, block.halt(normed_BTH)
        rounded = block.round_inputs(QKV, normed_BTH)
        gated_query, key, value = (block.linear(name, rounded) for name in QKV.weights)
        query, gate = gated_query.unflatten(-1, (-1, 2, head_dim)).unbind(-2)
        key, value = (x.unflatten(-1, (-1, head_dim)) for x in (key, value))
        query, key = self.before_rope(block, query, key)
        context = block.attend(query, key, value, rope, attention)
        context = context * attention.read(gate.flatten(2)).sigmoid()
        del normed_BTH, rounded, gated_query, query, gate, key, value
        yield O, block.halt(context)
        return block.linear(O.weights[0], block.round_inputs(O, context))

    def delta_stages(self, block: Parts, normed_BTH: Tensor, attention: Attention) -> Stages:
        """Run the delta rule; what it reads out is normed, and multiplied by silu of a gate."""
        from q3q.models.delta import GatedDelta, gated_norm

        sizes, site, weights = sizes_of(block.facts), self.inner_site, block.weights
        yield site, block.halt(normed_BTH)
        rounded = block.round_inputs(site, normed_BTH)
        projected = {
            name: block.linear(name, normed_BTH if name in block.unrounded else rounded)
            for name in site.weights
        }
        inputs_BTX, gate = self.inner_inputs(block.facts, projected)
        del normed_BTH, rounded, projected
        recurrence = GatedDelta(
            sizes,
            weights["linear_attn.conv1d.weight"][:, 0],
            weights["linear_attn.A_log"],
            weights["linear_attn.dt_bias"],
        )
        outputs = attention.read(attention.recur(recurrence, inputs_BTX))
        gate = attention.read(gate)
        del inputs_BTX, recurrence
        outputs, gate = (x.unflatten(-1, (-1, sizes.value_dim)) for x in (outputs, gate))
        gain = weights["linear_attn.norm.weight"]
        outputs = gated_norm(outputs, gate, gain, block.facts.rms_norm_eps).flatten(2)
        del gate
        yield OUT, block.halt(outputs)
        return block.linear(OUT.weights[0], block.round_inputs(OUT, outputs))

    # What a block keeps.

    def state_width(self, facts: ModelFacts, layer: int) -> int:
        return 0 if layer in facts.recurrent else super().state_width(facts, layer)

    def recurrent_width(self, facts: ModelFacts, layer: int) -> int:
        """Return the numbers that a row carries: the convolution's last inputs, and a matrix."""
        return sizes_of(facts).state if layer in facts.recurrent else 0

    def halted_width(self, facts: ModelFacts, layer: int) -> int:
        """With attention, the widest input is that of `o`; with a delta rule, that of `out`."""
        width = super().halted_width(facts, layer)
        if layer not in facts.recurrent:
            return width
        return max(width, facts.hidden + sizes_of(facts).values)


def sizes_of(facts: ModelFacts) -> DeltaSizes:
    """Return the sizes of a hybrid's delta rule."""
    assert facts.delta is not None  # `Hybrid.facts` reads it
    return facts.delta
