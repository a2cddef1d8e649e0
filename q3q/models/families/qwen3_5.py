"""Qwen3.5 and 3.6, dense: the hybrid, alone or as the text part of a model that sees images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from q3q.models.anatomy import Site
from q3q.models.config_values import Values
from q3q.models.families.hybrid import Hybrid, sizes_of
from q3q.models.family import Family, ModelFacts
from q3q.models.tensor_files import Shape

if TYPE_CHECKING:
    from torch import Tensor

QKV, Z, B, A = (f"linear_attn.in_proj_{part}.weight" for part in ("qkv", "z", "b", "a"))
TIED = "tie_word_embeddings"
ABOVE = ("dtype", "torch_dtype")  # also given outside of `text_config`


class Qwen35Text(Hybrid):
    """Agrees with transformers' Qwen3_5ForCausalLM (tested)."""

    name: ClassVar[str] = "Qwen3.5"
    model_types: ClassVar[tuple[str, ...]] = ("qwen3_5_text",)
    defaults: ClassVar[Mapping[str, Any]] = {**Hybrid.defaults, "num_key_value_heads": 4}
    skipped: ClassVar[tuple[str, ...]] = ("*.in_proj_b", "*.in_proj_a")
    inner_site: ClassVar[Site] = Site("in", (QKV, Z, B, A), mixes_tokens=True, apart=(B, A))

    def inner_shapes(self, facts: ModelFacts) -> dict[str, Shape]:
        sizes = sizes_of(facts)
        return {
            QKV: (sizes.channels, facts.hidden),
            Z: (sizes.values, facts.hidden),
            B: (sizes.value_heads, facts.hidden),
            A: (sizes.value_heads, facts.hidden),
        }

    def inner_inputs(
        self, facts: ModelFacts, projected: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        import torch

        return torch.cat([projected[name] for name in (QKV, B, A)], dim=-1), projected[Z]


class SeesImages(Family):
    """A text model within one that sees images: its facts and its tensors lie one level deeper.

    The vision tower is neither run nor quantized.
    """

    block_prefix: ClassVar[str] = "model.language_model.layers.{}."
    embedding: ClassVar[str] = "model.language_model.embed_tokens.weight"
    final_norm: ClassVar[str] = "model.language_model.norm.weight"
    carried: ClassVar[tuple[str, ...]] = ("mtp.", "model.visual.")

    def facts(self, values: Values) -> ModelFacts:
        text_values = {
            key: value for key, value in values.table("text_config").items() if value is not None
        }
        if not text_values:
            raise values.wrong("it has no text_config, which says what its text part is")
        above = {key: values.config[key] for key in ABOVE if key in values.config}
        # transformers writes the inner one out as false where only the outer one was set.
        inner = replace(values, config=text_values)
        tied = values.flag(TIED) or inner.flag(TIED)
        return super().facts(replace(values, config=above | text_values | {TIED: tied}))


class Qwen35(SeesImages, Qwen35Text):
    """Agrees with the text part of transformers' Qwen3_5ForConditionalGeneration (tested)."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen3_5",)
