"""What all kinds of quantized weights have in common: tensors, a few plain values, their files.

Shapes: E experts (1 in a dense block), O out features, I in features.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

GROUP = "group"  # the tensor that all rows share: each column's group, where it lies apart


@dataclass(frozen=True)
class StoredWeight(ABC):
    """A weight [E, O, I] as a checkpoint would store it.

    codes_EOI: uint8.
    """

    codes_EOI: Tensor

    kind: ClassVar[str]
    TENSORS: ClassVar[Mapping[str, str]]  # fields that hold tensors, or None, by names in files
    OMITTED: ClassVar[tuple[str, ...]] = ()  # other fields, which are not filed if they are False

    @property
    def shape(self) -> torch.Size:
        return self.codes_EOI.shape

    @property
    @abstractmethod
    def code_bits(self) -> int:
        """The bits that hold any code."""

    @abstractmethod
    def dequantize(self) -> Tensor:
        """Return the weight as numbers [E, O, I], float32."""

    @abstractmethod
    def storage_bits(self) -> int:
        """Return the total number of bits that a packed checkpoint needs."""

    @abstractmethod
    def largest_scale(self) -> float:
        """Return the largest magnitude among the numbers that are stored in 16 bits."""

    def nominal_bits(self) -> int:
        """Return the bits of the codes alone, as papers count them."""
        return self.codes_EOI.numel() * self.code_bits

    def too_fine(self) -> bool:
        """Return True if a group holds more different values than its bits can represent."""
        return bool(self.codes_EOI.numel()) and int(self.codes_EOI.amax()) >= 2**self.code_bits

    def to(self, device: torch.device | str) -> Self:
        """Return the weight on another device."""
        return self._with(lambda name, tensor: tensor.to(device))

    def rows(self, start: int, stop: int) -> Self:
        """Return output rows start .. stop - 1 alone."""
        return self._with(lambda name, part: part if name == GROUP else part[:, start:stop])

    def experts(self, start: int, stop: int) -> Self:
        """Return experts start .. stop - 1 alone."""
        return self._with(lambda name, tensor: tensor[start:stop])

    def to_tensors(self) -> dict[str, Tensor]:
        """Return plain tensors; `stored_weight` restores the weight from them and `facts`."""
        # A copy of what linears of a site share: safetensors refuses shared memory.
        return {
            name: (tensor.clone() if name == GROUP else tensor).contiguous()
            for name, tensor in self._tensors().items()
        }

    def facts(self) -> dict[str, Any]:
        """Return plain values, among them `kind`."""
        plain = [part.name for part in fields(self) if part.name not in self.TENSORS.values()]
        values = {name: getattr(self, name) for name in plain}
        return {"kind": self.kind} | {
            name: value for name, value in values.items() if value or name not in self.OMITTED
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Self:
        """Restore the weight; facts may say more than its fields."""
        parts = {field: tensors[name] for name, field in cls.TENSORS.items() if name in tensors}
        plain = {part.name: facts[part.name] for part in fields(cls) if part.name in facts}
        return cls(**parts, **plain)

    def _tensors(self) -> dict[str, Tensor]:
        named = {name: getattr(self, field) for name, field in self.TENSORS.items()}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def _with(self, change: Callable[[str, Tensor], Tensor]) -> Self:
        parts = {self.TENSORS[n]: change(n, tensor) for n, tensor in self._tensors().items()}
        return replace(self, **parts)
