"""Llama 2 and 3, SmolLM2, and others of this shape: the plain decoder."""

from collections.abc import Mapping
from typing import Any, ClassVar

from q3q.models.anatomy import DOWN, GATE_UP, QKV, O
from q3q.models.config_values import Values
from q3q.models.family import Family


class Llama(Family):
    """Agrees with transformers' LlamaForCausalLM (tested), with biases too."""

    name: ClassVar[str] = "Llama"
    model_types: ClassVar[tuple[str, ...]] = ("llama",)
    defaults: ClassVar[Mapping[str, Any]] = {"max_position_embeddings": 2048}

    def biased(self, values: Values) -> tuple[str, ...]:
        attention = (*QKV.weights, *O.weights) if values.flag("attention_bias") else ()
        mlp = (*GATE_UP.weights, *DOWN.weights) if values.flag("mlp_bias") else ()
        return (*attention, *mlp)
