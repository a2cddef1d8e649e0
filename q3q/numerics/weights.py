"""A quantized weight: integer codes, and the scales and zero points that turn them back into numbers.

Shapes: E experts (1 in a dense block), O out features, I in features, G groups, S columns per group.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from q3q.errors import ShapeError
from q3q.numerics.grid import Grid, into_groups, to_codes

SCALE_BITS = 16  # as every deployed format stores them
GROUP_INDEX_BITS = 32


@dataclass(frozen=True)
class QuantizedWeight:
    """weight ~ scale * (code - zero), scale and zero those of the column's group.

    codes_EOI: uint8. scale_EOG, zero_EOG: float32 (zero points are whole numbers). group_EI: int32, the group of each
    column where groups are not runs of neighbours (GPTQ's act-order), else None. symmetric: zero points are implied.
    """

    codes_EOI: Tensor
    scale_EOG: Tensor
    zero_EOG: Tensor
    bits: int
    symmetric: bool
    group_EI: Tensor | None = None

    def __post_init__(self) -> None:
        if self.codes_EOI.ndim != 3 or self.scale_EOG.shape != self.zero_EOG.shape:
            raise ShapeError(f"codes {tuple(self.codes_EOI.shape)}, scale {tuple(self.scale_EOG.shape)} do not fit")

    @property
    def shape(self) -> torch.Size:
        return self.codes_EOI.shape

    def dequantize(self) -> Tensor:
        """The weight as numbers [E, O, I], float32."""
        experts, rows, columns = self.codes_EOI.shape
        if self.group_EI is None:
            codes_EOGS = self.codes_EOI.unflatten(2, (self.scale_EOG.shape[2], -1))
            return (self.scale_EOG[..., None] * (codes_EOGS - self.zero_EOG[..., None])).flatten(2)
        index = self.group_EI.long()[:, None, :].expand(experts, rows, columns)
        return self.scale_EOG.gather(2, index) * (self.codes_EOI - self.zero_EOG.gather(2, index))

    def to(self, device: torch.device | str) -> "QuantizedWeight":
        """The same on another device."""
        moved = {name: tensor.to(device) for name, tensor in self.to_tensors().items()}
        return self.from_tensors(moved, self.facts())

    def rows(self, start: int, stop: int) -> "QuantizedWeight":
        """The same for output rows start .. stop - 1 alone."""
        return QuantizedWeight(
            self.codes_EOI[:, start:stop],
            self.scale_EOG[:, start:stop],
            self.zero_EOG[:, start:stop],
            self.bits,
            self.symmetric,
            self.group_EI,
        )

    def storage_bits(self) -> int:
        """Bits that a packed checkpoint needs: codes, 16-bit scales, zero points unless implied, group index."""
        total = self.codes_EOI.numel() * self.bits + self.scale_EOG.numel() * SCALE_BITS
        if not self.symmetric:
            total += self.zero_EOG.numel() * self.bits
        if self.group_EI is not None:
            total += self.group_EI.numel() * GROUP_INDEX_BITS
        return total

    def most_levels_in_a_group(self) -> int:
        """Largest number of different values among the weights that share a scale."""
        if self.group_EI is None:
            codes = self.codes_EOI.unflatten(2, (self.scale_EOG.shape[2], -1))
            used = torch.zeros(*codes.shape[:3], 256, dtype=torch.bool, device=codes.device)
            used.scatter_(3, codes.long(), True)
        else:
            experts, rows, _ = self.codes_EOI.shape
            groups = self.scale_EOG.shape[2]
            used = torch.zeros(experts, rows, groups * 256, dtype=torch.bool, device=self.codes_EOI.device)
            used.scatter_(2, self.group_EI.long()[:, None, :] * 256 + self.codes_EOI.long(), True)
            used = used.unflatten(2, (groups, 256))
        return int(used.sum(-1).max())

    def to_tensors(self) -> dict[str, Tensor]:
        """As plain tensors, for safetensors."""
        tensors = {"codes": self.codes_EOI, "scale": self.scale_EOG, "zero": self.zero_EOG}
        if self.group_EI is not None:
            tensors["group"] = self.group_EI.clone()  # linears of a site share it; a file may not
        return {name: tensor.contiguous() for name, tensor in tensors.items()}

    def facts(self) -> dict[str, Any]:
        return {"bits": self.bits, "symmetric": self.symmetric}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], facts: dict[str, Any]) -> "QuantizedWeight":
        return cls(
            tensors["codes"], tensors["scale"], tensors["zero"], facts["bits"], facts["symmetric"], tensors.get("group")
        )


def round_to_grid(weight_EOI: Tensor, grid: Grid, bits: int, group_size: int, *, symmetric: bool) -> QuantizedWeight:
    """Round each weight to the nearest point of its group's grid (grid shape [E, O, G, 1])."""
    codes_EOGS = to_codes(into_groups(weight_EOI, group_size), grid, bits)
    return QuantizedWeight(
        codes_EOGS.flatten(2).to(torch.uint8), grid.scale.squeeze(-1), grid.zero.squeeze(-1), bits, symmetric
    )


def concatenate_rows(parts: list[QuantizedWeight]) -> QuantizedWeight:
    """Several weights of one input, and so one grouping of columns, as one."""
    first = parts[0]
    return QuantizedWeight(
        torch.cat([part.codes_EOI for part in parts], 1),
        torch.cat([part.scale_EOG for part in parts], 1),
        torch.cat([part.zero_EOG for part in parts], 1),
        first.bits,
        first.symmetric,
        first.group_EI,
    )
