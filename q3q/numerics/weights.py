"""Quantized weights: codes, and the few numbers per group that turn them back into weights.

Two kinds behind one protocol: points of a uniform grid (`QuantizedWeight`), and BiLLM's signs (`BinarizedWeight`).
Shapes: E experts (1 in a dense block), O out features, I in features, G groups, S columns per group.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from q3q.errors import ShapeError
from q3q.numerics.grid import Grid, into_groups, to_codes

SCALE_BITS = 16  # as every deployed format stores them
GROUP_INDEX_BITS = 32
NUMBERS_AT_ONCE = 1 << 23  # weights that are wide (float32, or 64-bit indices) at one time: 64 MB


class StoredWeight(Protocol):
    """A weight [E, O, I] as a checkpoint would store it; what the walk, block checkpoints and checks ask of it."""

    kind: ClassVar[str]

    @property
    def shape(self) -> torch.Size: ...

    def dequantize(self) -> Tensor:
        """The weight as numbers [E, O, I], float32."""

    def to(self, device: torch.device | str) -> "StoredWeight":
        """The same on another device."""

    def rows(self, start: int, stop: int) -> "StoredWeight":
        """The same for output rows start .. stop - 1 alone."""

    def storage_bits(self) -> int:
        """Bits that a packed checkpoint of it needs, all told."""

    def nominal_bits(self) -> int:
        """Bits as papers count them: those of the codes alone."""

    def largest_scale(self) -> float:
        """Largest magnitude among the numbers that are stored in 16 bits."""

    def too_fine(self) -> bool:
        """Whether a group holds more different values than its bits can tell apart."""

    def to_tensors(self) -> dict[str, Tensor]:
        """As plain tensors, for safetensors; with `facts`, all that `stored_weight` needs to make it again."""

    def facts(self) -> dict[str, Any]:
        """Plain values, among them `kind`."""


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

    kind: ClassVar[str] = "grid"

    def __post_init__(self) -> None:
        if self.codes_EOI.ndim != 3 or self.scale_EOG.shape != self.zero_EOG.shape:
            raise ShapeError(
                f"codes {tuple(self.codes_EOI.shape)}, scale {tuple(self.scale_EOG.shape)} do not fit"
            )

    @property
    def shape(self) -> torch.Size:
        return self.codes_EOI.shape

    def dequantize(self) -> Tensor:
        codes_EOI = self.codes_EOI.float()  # first of all: torch is slow where types are mixed
        if self.group_EI is None:
            codes_EOGS = codes_EOI.unflatten(2, (self.scale_EOG.shape[2], -1))
            return (
                codes_EOGS.sub_(self.zero_EOG[..., None]).mul_(self.scale_EOG[..., None]).flatten(2)
            )
        index = self.group_EI.long()[:, None, :].expand(self.codes_EOI.shape)
        return codes_EOI.sub_(self.zero_EOG.gather(2, index)).mul_(self.scale_EOG.gather(2, index))

    def to(self, device: torch.device | str) -> "QuantizedWeight":
        moved = {name: tensor.to(device) for name, tensor in self.to_tensors().items()}
        return self.from_tensors(moved, self.facts())

    def rows(self, start: int, stop: int) -> "QuantizedWeight":
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

    def nominal_bits(self) -> int:
        return self.codes_EOI.numel() * self.bits

    def largest_scale(self) -> float:
        return float(self.scale_EOG.abs().amax())

    def too_fine(self) -> bool:
        within = int(self.codes_EOI.amax()) < 2**self.bits if self.codes_EOI.numel() else True
        return not within and self.most_levels_in_a_group() > 2**self.bits

    def most_levels_in_a_group(self) -> int:
        """Largest number of different values among the weights that share a scale."""
        if self.group_EI is None:
            codes = self.codes_EOI.unflatten(2, (self.scale_EOG.shape[2], -1))
            used = torch.zeros(*codes.shape[:3], 256, dtype=torch.bool, device=codes.device)
            used.scatter_(3, codes.long(), True)
        else:
            experts, rows, _ = self.codes_EOI.shape
            groups = self.scale_EOG.shape[2]
            used = torch.zeros(
                experts, rows, groups * 256, dtype=torch.bool, device=self.codes_EOI.device
            )
            used.scatter_(2, self.group_EI.long()[:, None, :] * 256 + self.codes_EOI.long(), True)
            used = used.unflatten(2, (groups, 256))
        return int(used.sum(-1).max())

    def to_tensors(self) -> dict[str, Tensor]:
        tensors = {"codes": self.codes_EOI, "scale": self.scale_EOG, "zero": self.zero_EOG}
        if self.group_EI is not None:
            tensors["group"] = self.group_EI.clone()  # linears of a site share it; a file may not
        return {name: tensor.contiguous() for name, tensor in tensors.items()}

    def facts(self) -> dict[str, Any]:
        return {"kind": self.kind, "bits": self.bits, "symmetric": self.symmetric}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
    ) -> "QuantizedWeight":
        return cls(
            tensors["codes"],
            tensors["scale"],
            tensors["zero"],
            facts["bits"],
            facts["symmetric"],
            tensors.get("group"),
        )


@dataclass(frozen=True)
class BinarizedWeight:
    """BiLLM's (arXiv 2402.04291): each weight is its group's mean, plus or minus its group's scale.

    Each row of each block of S neighbouring columns has three groups: *small* and *large*, told apart weight by weight,
    and *salient*, the same columns in all rows of a linear, whose remainder is binarized once more.

    codes_EOI: uint8; bit 0 is the sign, bit 1 says large, or of a salient weight the remainder's sign; bit 2 salient.
    mean_EOG4, scale_EOG4: float32, of small, large, salient, and the salient's remainder.
    """

    codes_EOI: Tensor
    mean_EOG4: Tensor
    scale_EOG4: Tensor

    kind: ClassVar[str] = "binarized"
    SALIENT: ClassVar[int] = 4  # codes from here on

    def __post_init__(self) -> None:
        if (
            self.mean_EOG4.shape != self.scale_EOG4.shape
            or self.mean_EOG4.shape[:2] != self.codes_EOI.shape[:2]
        ):
            raise ShapeError(
                f"codes {tuple(self.codes_EOI.shape)}, means {tuple(self.mean_EOG4.shape)} do not fit"
            )

    @property
    def shape(self) -> torch.Size:
        return self.codes_EOI.shape

    def dequantize(self) -> Tensor:
        signs_2 = torch.tensor([-1.0, 1.0], device=self.mean_EOG4.device)
        value_EOG42 = self.mean_EOG4[..., None] + signs_2 * self.scale_EOG4[..., None]
        once_EOG4 = value_EOG42[..., :2, :].flatten(-2)
        twice_EOG4 = (value_EOG42[..., 3, :, None] + value_EOG42[..., 2, None, :]).flatten(-2)
        level_EOG8 = torch.cat([once_EOG4, twice_EOG4], dim=-1)
        codes_EOGS = self.codes_EOI.unflatten(2, (self.mean_EOG4.shape[2], -1))
        return level_EOG8.gather(-1, codes_EOGS.long()).flatten(2)

    def to(self, device: torch.device | str) -> "BinarizedWeight":
        return BinarizedWeight(
            self.codes_EOI.to(device), self.mean_EOG4.to(device), self.scale_EOG4.to(device)
        )

    def rows(self, start: int, stop: int) -> "BinarizedWeight":
        return BinarizedWeight(
            self.codes_EOI[:, start:stop],
            self.mean_EOG4[:, start:stop],
            self.scale_EOG4[:, start:stop],
        )

    def storage_bits(self) -> int:
        """Of one linear: two bits a weight (a sign, and which group or the second sign), 8 numbers of 16 bits for each
        row of a block, and a bit a column for the salient ones. With blocks of 128 columns, 3 bits a weight.
        """
        experts, _, columns = self.codes_EOI.shape
        return (
            2 * self.codes_EOI.numel() + 2 * self.mean_EOG4.numel() * SCALE_BITS + experts * columns
        )

    def nominal_bits(self) -> int:
        """As BiLLM's paper counts: a bit a weight, and one more for salient ones.

        The published code counts the salient share of each linear's last block only; this counts all blocks.
        """
        return self.codes_EOI.numel() + int((self.codes_EOI >= self.SALIENT).sum())

    def largest_scale(self) -> float:
        return max(float(self.scale_EOG4.amax()), float(self.mean_EOG4.abs().amax()))

    def too_fine(self) -> bool:
        """Of one linear: a code of more than three bits, or a column that is salient in some of its rows only."""
        salient_EOI = self.codes_EOI >= self.SALIENT
        return bool((self.codes_EOI > 7).any()) or not torch.equal(
            salient_EOI.all(1), salient_EOI.any(1)
        )

    def to_tensors(self) -> dict[str, Tensor]:
        tensors = {"codes": self.codes_EOI, "mean": self.mean_EOG4, "scale": self.scale_EOG4}
        return {name: tensor.contiguous() for name, tensor in tensors.items()}

    def facts(self) -> dict[str, Any]:
        return {"kind": self.kind}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]
    ) -> "BinarizedWeight":
        return cls(tensors["codes"], tensors["mean"], tensors["scale"])


def stored_weight(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> StoredWeight:
    """The weight that `to_tensors` and `facts` describe."""
    kinds = {kind.kind: kind for kind in (QuantizedWeight, BinarizedWeight)}
    made: StoredWeight = kinds[facts["kind"]].from_tensors(tensors, facts)
    return made


def numbers(weight: StoredWeight, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """The weight [E, O, I] as numbers in `dtype`, a few rows at a time: in float32 the whole may be too large."""
    experts, rows, columns = weight.shape
    out_EOI = torch.empty(weight.shape, dtype=dtype, device=device)
    at_once = max(1, NUMBERS_AT_ONCE // (experts * columns))
    for start in range(0, rows, at_once):
        part = weight.rows(start, min(start + at_once, rows))
        out_EOI[:, start : start + at_once] = part.to(device).dequantize()
    return out_EOI


def concatenate_experts(parts: Sequence[StoredWeight]) -> StoredWeight:
    """Several experts' weights, of one kind and scheme, as one."""
    if len(parts) == 1:
        return parts[0]
    tensors = [part.to_tensors() for part in parts]
    return stored_weight(
        {name: torch.cat([each[name] for each in tensors]) for name in tensors[0]}, parts[0].facts()
    )


def round_to_grid(
    weight_EOI: Tensor, grid: Grid, bits: int, group_size: int, *, symmetric: bool
) -> QuantizedWeight:
    """Round each weight to the nearest point of its group's grid (grid shape [E, O, G, 1])."""
    codes_EOGS = to_codes(into_groups(weight_EOI, group_size), grid, bits)
    return QuantizedWeight(
        codes_EOGS.flatten(2).to(torch.uint8),
        grid.scale.squeeze(-1),
        grid.zero.squeeze(-1),
        bits,
        symmetric,
    )


def with_scales(weight: StoredWeight, types: str | None) -> StoredWeight:
    """The same codes, their scales rounded to each of these types in turn (`bfloat16 float16`); None: left as they are.

    As a format will store them, so that what is evaluated is what is exported.
    """
    if types is None or not isinstance(weight, QuantizedWeight):
        return weight
    scale_EOG = weight.scale_EOG
    for name in types.split():
        scale_EOG = scale_EOG.to(getattr(torch, name))
    return replace(weight, scale_EOG=scale_EOG.float())


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
