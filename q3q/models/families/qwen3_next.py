"""Qwen3-Next: the hybrid with experts, whose delta rule's projections lie head by head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from q3q.models.anatomy import Site
from q3q.models.families.hybrid import Hybrid, sizes_of
from q3q.models.families.shared_expert import SharedExpert
from q3q.models.family import ModelFacts
from q3q.models.tensor_files import Shape

if TYPE_CHECKING:
    from torch import Tensor

QKVZ, BA = "linear_attn.in_proj_qkvz.weight", "linear_attn.in_proj_ba.weight"


class Qwen3Next(Hybrid, SharedExpert):
    """Agrees with transformers' Qwen3NextForCausalLM (tested)."""

    name: ClassVar[str] = "Qwen3-Next"
    model_types: ClassVar[tuple[str, ...]] = ("qwen3_next",)
    defaults: ClassVar[Mapping[str, Any]] = {
        **Hybrid.defaults,
        "num_key_value_heads": 2,
        "intermediate_size": 5632,
        "num_experts_per_tok": 10,
        "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512,
        "norm_topk_prob": True,
    }
    kept: ClassVar[Mapping[str, str]] = {**Hybrid.kept, **SharedExpert.kept}
    skipped: ClassVar[tuple[str, ...]] = ("*.in_proj_ba",)
    inner_site: ClassVar[Site] = Site("in", (QKVZ, BA), mixes_tokens=True, apart=(BA,))

    def inner_shapes(self, facts: ModelFacts) -> dict[str, Shape]:
        sizes = sizes_of(facts)
        return {
            QKVZ: (sizes.channels + sizes.values, facts.hidden),
            BA: (2 * sizes.value_heads, facts.hidden),
        }

    def inner_inputs(
        self, facts: ModelFacts, projected: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Each key head has, one behind the other, its query, its key, values, gates; b and a."""
        import torch

        sizes = sizes_of(facts)
        heads, each = sizes.key_heads, sizes.value_heads // sizes.key_heads
        widths = (sizes.key_dim, sizes.key_dim, each * sizes.value_dim, each * sizes.value_dim)
        *mixed, gate = projected[QKVZ].unflatten(-1, (heads, -1)).split(widths, dim=-1)
        rates = projected[BA].unflatten(-1, (heads, 2, each)).unbind(-2)
        return torch.cat([part.flatten(2) for part in (*mixed, *rates)], dim=-1), gate.flatten(2)
