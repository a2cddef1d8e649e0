"""Experts beside one that every token reads, whose output a gate of one number weighs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar, cast

from q3q.models.anatomy import (
    EXPERT_DOWN,
    EXPERT_GATE_UP,
    SHARED_DOWN,
    SHARED_GATE_UP,
    ScaleGroup,
    Site,
)
from q3q.models.config_values import Values
from q3q.models.families.qwen3_moe import Qwen3Moe
from q3q.models.family import ModelFacts, Parts
from q3q.models.tensor_files import Shape

if TYPE_CHECKING:
    from torch import Tensor

    from q3q.models.block import Block
    from q3q.models.family import Stages

GATE = "mlp.shared_expert_gate.weight"
ROUTED_GATE_UP = replace(EXPERT_GATE_UP, unquantized=(*EXPERT_GATE_UP.unquantized, GATE))


class SharedExpert(Qwen3Moe):
    """Qwen3-MoE's experts and a shared one, which has sites of its own: it sees every token."""

    kept: ClassVar[Mapping[str, str]] = {
        **Qwen3Moe.kept,
        GATE: "one row, which weighs a whole expert",
    }

    def facts(self, values: Values) -> ModelFacts:
        shared = values.with_defaults(self.defaults).count("shared_expert_intermediate_size")
        return replace(super().facts(values), shared_intermediate=shared)

    def mlp_shapes(self, facts: ModelFacts, layer: int) -> dict[str, Shape]:
        shapes = super().mlp_shapes(facts, layer)
        if not facts.sparse(layer):
            return shapes
        hidden, inner = facts.hidden, facts.shared_intermediate
        return {
            **shapes,
            "mlp.shared_expert.gate_proj.weight": (inner, hidden),
            "mlp.shared_expert.up_proj.weight": (inner, hidden),
            "mlp.shared_expert.down_proj.weight": (hidden, inner),
            GATE: (1, hidden),
        }

    def mlp_sites(self, facts: ModelFacts, layer: int) -> tuple[Site, ...]:
        if not facts.sparse(layer):
            return super().mlp_sites(facts, layer)
        return ROUTED_GATE_UP, EXPERT_DOWN, SHARED_GATE_UP, SHARED_DOWN

    def mlp_scale_groups(self, facts: ModelFacts, layer: int) -> tuple[ScaleGroup, ...]:
        """One scale for all that reads the norm, the shared expert and both gates included."""
        groups = super().mlp_scale_groups(facts, layer)
        if not facts.sparse(layer):
            return groups
        gain = "post_attention_layernorm.weight"
        return (
            self.norm_group(ROUTED_GATE_UP, gain, also=(SHARED_GATE_UP,)),
            groups[1],
            ScaleGroup(SHARED_DOWN, "mlp.shared_expert.up_proj.weight"),
        )

    def mlp_stages(self, block: Parts, normed_BTH: Tensor) -> Stages:
        if not block.facts.sparse(block.layer):
            return super().mlp_stages(block, normed_BTH)
        from q3q.models.experts import stages_with_shared

        return stages_with_shared(cast("Block", block), normed_BTH, ROUTED_GATE_UP, GATE)

    def halted_width(self, facts: ModelFacts, layer: int) -> int:
        """While the shared expert runs, the others' sum waits."""
        width = super().halted_width(facts, layer)
        if not facts.sparse(layer):
            return width
        return max(width, 2 * facts.hidden + max(facts.hidden, facts.shared_intermediate))
