"""Qwen3.5 and 3.6 with experts: the hybrid, alone or as the text part of one that sees images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

from q3q.models.config_values import Values
from q3q.models.families.qwen3_5 import Qwen35Text, SeesImages
from q3q.models.families.shared_expert import SharedExpert
from q3q.models.family import ModelFacts


class Qwen35MoeText(Qwen35Text, SharedExpert):
    """Agrees with transformers' Qwen3_5MoeForCausalLM (tested)."""

    name: ClassVar[str] = "Qwen3.5-MoE"
    model_types: ClassVar[tuple[str, ...]] = ("qwen3_5_moe_text",)
    defaults: ClassVar[Mapping[str, Any]] = {
        **Qwen35Text.defaults,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
    }
    kept: ClassVar[Mapping[str, str]] = {**Qwen35Text.kept, **SharedExpert.kept}

    def facts(self, values: Values) -> ModelFacts:
        """Every block has experts, and their shares always sum to 1."""
        shared = values.with_defaults(self.defaults).count("shared_expert_intermediate_size")
        fixed = {"mlp_only_layers": [], "decoder_sparse_step": 1, "norm_topk_prob": True}
        completed = {**values.config, **fixed, "intermediate_size": shared}
        return super().facts(replace(values, config=completed))


class Qwen35Moe(SeesImages, Qwen35MoeText):
    """Agrees with the text part of transformers' Qwen3_5MoeForConditionalGeneration (tested)."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen3_5_moe",)
