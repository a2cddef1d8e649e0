"""Weights in GGUF's block types: codes, and the scales and offsets of groups and of their blocks.

Shapes: E experts (1 in a dense block), O out features, I in features, G groups, B blocks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from q3q.number_formats import BLOCKS, BlockFormat
from q3q.numerics.linalg import all_finite


@dataclass(frozen=True)
class BlockWeight:
    """Codes of a block type: weight ~ scale * (code - middle) - offset, per row and group.

    codes_EOI: uint8, from 0.
    block_scale_EOB, block_offset_EOB: float16; offsets None where the type has none.
    scale_EOG, offset_EOG: int8, what a group's are times its block's; None in blocks of one group.
    format: a name of `number_formats.BLOCKS`.
    """

    codes_EOI: Tensor
    block_scale_EOB: Tensor
    format: str
    scale_EOG: Tensor | None = None
    block_offset_EOB: Tensor | None = None
    offset_EOG: Tensor | None = None

    kind: ClassVar[str] = "block"
    BY_ROW: ClassVar[tuple[str, ...]] = (
        "codes",
        "block_scale",
        "scale",
        "block_offset",
        "offset",
    )

    @property
    def form(self) -> BlockFormat:
        return BLOCKS[self.format]

    @property
    def shape(self) -> torch.Size:
        return self.codes_EOI.shape

    @property
    def code_bits(self) -> int:
        return self.form.bits

    def dequantize(self) -> Tensor:
        """Multiply and subtract in float32, each rounded, as llama.cpp does."""
        codes_EOGS = self.codes_EOI.float().unflatten(2, (-1, self.form.group_size))
        scale_EOG = self._of_groups(self.block_scale_EOB, self.scale_EOG)
        numbers_EOGS = codes_EOGS.sub_(self.form.middle).mul_(scale_EOG[..., None])
        if self.block_offset_EOB is not None:
            offset_EOG = self._of_groups(self.block_offset_EOB, self.offset_EOG)
            numbers_EOGS.sub_(offset_EOG[..., None])
        return numbers_EOGS.flatten(2)

    def _of_groups(self, shared_EOB: Tensor, whole_EOG: Tensor | None) -> Tensor:
        shared_EOG = shared_EOB.float().repeat_interleave(self.form.groups, -1)
        return shared_EOG if whole_EOG is None else shared_EOG.mul_(whole_EOG)

    def to(self, device: torch.device | str) -> "BlockWeight":
        moved = {name: tensor.to(device) for name, tensor in self._tensors().items()}
        return self.from_tensors(moved, self.facts())

    def rows(self, start: int, stop: int) -> "BlockWeight":
        kept = {name: tensor[:, start:stop] for name, tensor in self._tensors().items()}
        return self.from_tensors(kept, self.facts())

    def experts(self, start: int, stop: int) -> "BlockWeight":
        kept = {name: tensor[start:stop] for name, tensor in self._tensors().items()}
        return self.from_tensors(kept, self.facts())

    def storage_bits(self) -> int:
        return self.codes_EOI.numel() // self.form.block * self.form.block_bits

    def nominal_bits(self) -> int:
        return self.codes_EOI.numel() * self.code_bits

    def largest_scale(self) -> float:
        shared = [self.block_scale_EOB, self.block_offset_EOB]
        return max(float(part.abs().amax()) for part in shared if part is not None)

    def unsound(self, weight_EOI: Tensor) -> str | None:
        """Return why these are no codes that can be stored; None if they are."""
        for part in (self.block_scale_EOB, self.block_offset_EOB):
            if part is not None and not all_finite(part.float()):
                return "a block's scale or offset is beyond float16"
        if self.too_fine():
            return f"a code is not a number of {self.format}"
        return None

    def too_fine(self) -> bool:
        return bool(self.codes_EOI.numel()) and int(self.codes_EOI.amax()) >= 2**self.code_bits

    def to_tensors(self) -> dict[str, Tensor]:
        return {name: tensor.contiguous() for name, tensor in self._tensors().items()}

    def facts(self) -> dict[str, Any]:
        return {"kind": self.kind, "format": self.format}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> "BlockWeight":
        return cls(
            tensors["codes"],
            tensors["block_scale"],
            facts["format"],
            tensors.get("scale"),
            tensors.get("block_offset"),
            tensors.get("offset"),
        )

    def _tensors(self) -> dict[str, Tensor]:
        values = (
            self.codes_EOI,
            self.block_scale_EOB,
            self.scale_EOG,
            self.block_offset_EOB,
            self.offset_EOG,
        )
        named = zip(self.BY_ROW, values, strict=True)
        return {name: tensor for name, tensor in named if tensor is not None}
