"""Weights in GGUF's block types: codes, and the scales and offsets of groups and of their blocks.

Shapes: E experts (1 in a dense block), O out features, I in features, G groups, B blocks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from q3q.number_formats import BLOCKS, BlockFormat
from q3q.numerics.linalg import all_finite
from q3q.numerics.stored import StoredWeight


@dataclass(frozen=True)
class BlockWeight(StoredWeight):
    """Codes of a block type: weight ~ scale * (code - middle) - offset, per row and group.

    codes_EOI: uint8, from 0.
    block_scale_EOB, block_offset_EOB: float16; offsets None where the type has none.
    scale_EOG, offset_EOG: int8, what a group's are times its block's; None in blocks of one group.
    format: a name of `number_formats.BLOCKS`.
    """

    block_scale_EOB: Tensor
    format: str
    scale_EOG: Tensor | None = None
    block_offset_EOB: Tensor | None = None
    offset_EOG: Tensor | None = None

    kind: ClassVar[str] = "block"
    TENSORS: ClassVar[Mapping[str, str]] = {
        "codes": "codes_EOI",
        "block_scale": "block_scale_EOB",
        "scale": "scale_EOG",
        "block_offset": "block_offset_EOB",
        "offset": "offset_EOG",
    }

    @property
    def form(self) -> BlockFormat:
        return BLOCKS[self.format]

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

    def storage_bits(self) -> int:
        return self.codes_EOI.numel() // self.form.block * self.form.block_bits

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
