"""A quantized block, and the sink that the walk hands it to."""

from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from q3q.models.qwen3 import Qwen3Block
from q3q.numerics.weights import (
    StoredWeight,
    numbers,
)
from q3q.record import SiteError


@dataclass
class QuantizedBlock:
    """What quantizing one block gave: codes by weight name, exchanged weights that stay numbers (norms), and facts."""

    index: int
    quantized: dict[str, StoredWeight]
    changed: dict[str, Tensor]
    errors: list[SiteError]
    notes: dict[str, Any] = field(default_factory=dict)

    def weights_for(self, block: Qwen3Block) -> dict[str, Tensor]:
        """The block's exchanged weights as numbers in its own dtype and shapes."""
        norm = block.weights["input_layernorm.weight"]
        return self.numbers(norm.dtype, norm.device)

    def numbers(self, dtype: torch.dtype, device: torch.device | str) -> dict[str, Tensor]:
        """The exchanged weights as numbers, shaped as a block's: experts stacked, others plain matrices."""
        weights = {name: weight.to(device, dtype) for name, weight in self.changed.items()}
        for name, quantized in self.quantized.items():
            weight_EOI = numbers(quantized, dtype, device)
            weights[name] = weight_EOI if ".experts." in name else weight_EOI[0]
        return weights

    def parked(self) -> "QuantizedBlock":
        """The same in main memory, so that a whole model's codes do not fill a GPU."""
        quantized = {name: weight.to("cpu") for name, weight in self.quantized.items()}
        changed = {name: weight.cpu() for name, weight in self.changed.items()}
        return replace(self, quantized=quantized, changed=changed)


class BlockSink(Protocol):
    """Where quantized blocks go, and come from: when a killed trial goes on, and when a streamed model needs one."""

    def load(self, index: int) -> QuantizedBlock | None: ...

    def store(self, block: QuantizedBlock) -> None: ...
