"""Qwen3-MoE: Qwen3's attention, and experts in place of the MLP of some or all blocks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, cast

from q3q.models.anatomy import EXPERT_DOWN, EXPERT_GATE_UP, ScaleGroup, Site
from q3q.models.config_values import MOST_EXPERTS, MOST_MATRICES, Values
from q3q.models.families.qwen3 import Qwen3
from q3q.models.family import Family, ModelFacts, Parts
from q3q.models.tensor_files import Shape

if TYPE_CHECKING:
    from torch import Tensor

    from q3q.models.block import Block
    from q3q.models.family import Stages


class Qwen3Moe(Qwen3):
    """Agrees with transformers' Qwen3MoeForCausalLM (tested)."""

    name: ClassVar[str] = "Qwen3-MoE"
    model_types: ClassVar[tuple[str, ...]] = ("qwen3_moe",)
    defaults: ClassVar[Mapping[str, Any]] = {"num_key_value_heads": 4}
    kept: ClassVar[Mapping[str, str]] = {
        **Family.kept,
        "mlp.gate.weight": "the router: few weights, which decide where a token goes",
    }

    def facts(self, values: Values) -> ModelFacts:
        facts = super().facts(values)
        # transformers 5 renames num_experts when it saves.
        key = "num_experts" if "num_experts" in values.config else "num_local_experts"
        experts = values.count(key, most=MOST_EXPERTS)
        if facts.layers * experts > MOST_MATRICES:
            raise values.wrong(
                f"{facts.layers} layers of {experts} experts each are more than any model has"
            )
        dense = {k for k in values.items("mlp_only_layers") if type(k) is int}
        top_k = values.count("num_experts_per_tok")
        if top_k > experts:
            raise values.wrong(f"num_experts_per_tok={top_k} of only {experts} experts")
        return replace(
            facts,
            experts=experts,
            top_k=top_k,
            moe_intermediate=values.count("moe_intermediate_size"),
            mlp_only_layers=tuple(sorted(dense & {*range(facts.layers)})),
            decoder_sparse_step=values.count("decoder_sparse_step", 1),
            norm_topk_prob=values.flag("norm_topk_prob"),
        )

    def mlp_shapes(self, facts: ModelFacts, layer: int) -> dict[str, Shape]:
        if not facts.sparse(layer):
            return super().mlp_shapes(facts, layer)
        experts, hidden, inner = facts.experts, facts.hidden, facts.moe_intermediate
        return {
            "mlp.gate.weight": (experts, hidden),
            "mlp.experts.gate_proj.weight": (experts, inner, hidden),
            "mlp.experts.up_proj.weight": (experts, inner, hidden),
            "mlp.experts.down_proj.weight": (experts, hidden, inner),
        }

    def mlp_sites(self, facts: ModelFacts, layer: int) -> tuple[Site, ...]:
        if not facts.sparse(layer):
            return super().mlp_sites(facts, layer)
        return EXPERT_GATE_UP, EXPERT_DOWN

    def mlp_scale_groups(self, facts: ModelFacts, layer: int) -> tuple[ScaleGroup, ...]:
        """One scale for all experts' gate and up (and the router), one per expert for its down."""
        if not facts.sparse(layer):
            return super().mlp_scale_groups(facts, layer)
        return (
            self.norm_group(EXPERT_GATE_UP, "post_attention_layernorm.weight"),
            ScaleGroup(EXPERT_DOWN, "mlp.experts.up_proj.weight"),
        )

    def mlp_stages(self, block: Parts, normed_BTH: Tensor) -> Stages:
        if not block.facts.sparse(block.layer):
            return super().mlp_stages(block, normed_BTH)
        from q3q.models.experts import routed_stages

        return routed_stages(cast("Block", block), normed_BTH)

    def halted_width(self, facts: ModelFacts, layer: int) -> int:
        if not facts.sparse(layer):
            return super().halted_width(facts, layer)
        hidden, inner = facts.hidden, max(facts.hidden, facts.moe_intermediate)
        return hidden + max(facts.heads * facts.head_dim, hidden + facts.top_k * inner)
