"""Mistral 7B and others of its shape, without sliding window (from version 0.2 on)."""

from collections.abc import Mapping
from typing import Any, ClassVar

from q3q.models.config_values import Values
from q3q.models.family import Family, ModelFacts


class Mistral(Family):
    """Agrees with transformers' MistralForCausalLM (tested)."""

    name: ClassVar[str] = "Mistral"
    model_types: ClassVar[tuple[str, ...]] = ("mistral",)
    defaults: ClassVar[Mapping[str, Any]] = {
        "max_position_embeddings": 131_072,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
    }

    def facts(self, values: Values) -> ModelFacts:
        window = values.with_defaults(self.defaults).config["sliding_window"]
        if window is not None:
            raise values.wrong(
                f"sliding_window={window!r} is not supported: q3q lets each token see all before "
                "it. Version 0.2 of Mistral 7B, and later ones, have none"
            )
        return super().facts(values)
