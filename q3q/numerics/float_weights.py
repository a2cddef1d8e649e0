"""Weights whose codes are small floating-point numbers, with their groups' scales.

Shapes: E experts (1 in a dense block), O out features, I in features, G groups, S columns per
group.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from q3q.number_formats import FLOATS, GLOBAL_SCALE_BITS, SCALE_BITS, NumberFormat
from q3q.numerics.floats import decode, scale_numbers
from q3q.numerics.linalg import all_finite
from q3q.numerics.stored import GROUP, StoredWeight

GROUP_INDEX_BITS = 32


@dataclass(frozen=True)
class FloatWeight(StoredWeight):
    """Codes of a floating-point format: weight ~ level(code) * scale, per row and group of columns.

    codes_EOI: uint8, the format's own bit patterns.
    stored_scale_EOG: as on disk: float32, or uint8 codes of E8M0 or E4M3.
    format: a name of `number_formats.FLOATS`.
    group_rows: rows that share a scale, which each of them has; -1: all rows of the linear.
    global_EO: float32, of E4M3 scales: the factor that they were stored times, of each row's
        linear, so that rows of several linears can lie below each other; else None.
    group_EI: int32, each column's group; None if groups are runs of neighbours (no act-order).
    narrow: the numbers are bfloat16, to which loaders of NVFP4 round them, whatever the model's.
    """

    stored_scale_EOG: Tensor
    format: str
    group_rows: int = 1
    global_EO: Tensor | None = None
    group_EI: Tensor | None = None
    narrow: bool = False

    kind: ClassVar[str] = "float"
    TENSORS: ClassVar[Mapping[str, str]] = {
        "codes": "codes_EOI",
        "scale": "stored_scale_EOG",
        "global": "global_EO",
        GROUP: "group_EI",
    }
    OMITTED: ClassVar[tuple[str, ...]] = ("narrow",)

    @property
    def _form(self) -> NumberFormat:
        return FLOATS[self.format]

    @property
    def code_bits(self) -> int:
        return self._form.bits

    @property
    def scale_EOG(self) -> Tensor:
        """What a level is multiplied by, float32."""
        scale_EOG = scale_numbers(self.stored_scale_EOG, self._form.scale)
        return scale_EOG if self.global_EO is None else scale_EOG / self.global_EO[..., None]

    def dequantize(self) -> Tensor:
        """Return the numbers in float32."""
        weight_EOI = self._times_scales()
        return weight_EOI.to(torch.bfloat16).float() if self.narrow else weight_EOI

    def _times_scales(self) -> Tensor:
        level_EOI, scale_EOG = decode(self.codes_EOI, self._form), self.scale_EOG
        if self.group_EI is None:
            level_EOGS = level_EOI.unflatten(2, (scale_EOG.shape[2], -1))
            return level_EOGS.mul_(scale_EOG[..., None]).flatten(2)
        index = self.group_EI.long()[:, None, :].expand(self.shape)
        return level_EOI.mul_(scale_EOG.gather(2, index))

    def storage_bits(self) -> int:
        """Count the codes and scales of one linear, its global factor, and the group index."""
        experts, rows, groups = self.stored_scale_EOG.shape
        scales = experts * groups * (1 if self.group_rows == -1 else -(-rows // self.group_rows))
        total = self.nominal_bits() + scales * SCALE_BITS[self._form.scale]
        if self.global_EO is not None:
            total += experts * GLOBAL_SCALE_BITS
        if self.group_EI is not None:
            total += self.group_EI.numel() * GROUP_INDEX_BITS
        return total

    def largest_scale(self) -> float:
        """Return the largest scale that is stored in 16 bits; 8-bit scales fit by their nature."""
        return float(self.stored_scale_EOG.amax()) if self._form.scale == "float" else 1.0

    def unsound(self, weight_EOI: Tensor) -> str | None:
        """Return why these are no codes of this weight that can be stored; None if they are."""
        if not all_finite(self.scale_EOG):
            return "a scale is not a finite number"
        if not bool((self.scale_EOG > 0).all()):
            return "a scale is not above 0"
        if self.too_fine() or not all_finite(decode(self.codes_EOI, self._form)):
            return f"a code is not a number of {self.format}"
        return None
