"""Qwen3: the plain decoder, with a norm of each query head and of each key head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from q3q.models.family import Family, ModelFacts, Parts
from q3q.models.tensor_files import Shape

if TYPE_CHECKING:
    from torch import Tensor


class Qwen3(Family):
    """Agrees with transformers' Qwen3ForCausalLM (tested)."""

    name: ClassVar[str] = "Qwen3"
    model_types: ClassVar[tuple[str, ...]] = ("qwen3",)
    defaults: ClassVar[Mapping[str, Any]] = {"head_dim": 128, "num_key_value_heads": 32}
    assumed: ClassVar[Mapping[str, Any]] = {
        "hidden_act": "silu",
        "attention_bias": False,
        "use_sliding_window": False,
    }

    def attention_shapes(self, facts: ModelFacts) -> dict[str, Shape]:
        return super().attention_shapes(facts) | {
            "self_attn.q_norm.weight": (facts.head_dim,),
            "self_attn.k_norm.weight": (facts.head_dim,),
        }

    def before_rope(
        self, block: Parts, query_BTND: Tensor, key_BTKD: Tensor
    ) -> tuple[Tensor, Tensor]:
        return (
            block.norm("self_attn.q_norm.weight", query_BTND),
            block.norm("self_attn.k_norm.weight", key_BTKD),
        )
