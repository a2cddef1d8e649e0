"""Qwen2 and Qwen2.5: the plain decoder, with biases of q, k and v."""

from collections.abc import Mapping
from typing import Any, ClassVar

from q3q.models.anatomy import QKV
from q3q.models.config_values import Values
from q3q.models.family import Family


class Qwen2(Family):
    """Agrees with transformers' Qwen2ForCausalLM (tested)."""

    name: ClassVar[str] = "Qwen2"
    model_types: ClassVar[tuple[str, ...]] = ("qwen2",)
    defaults: ClassVar[Mapping[str, Any]] = {"num_key_value_heads": 32}
    assumed: ClassVar[Mapping[str, Any]] = {"hidden_act": "silu", "use_sliding_window": False}

    def biased(self, values: Values) -> tuple[str, ...]:
        return QKV.weights
