"""Quantized weights: codes, and the few numbers per group that turn them back into weights.

Four kinds of `StoredWeight`: points of a uniform grid (`QuantizedWeight`), small floating-point
numbers (`float_weights.FloatWeight`), GGUF's blocks (`block_weights.BlockWeight`), and BiLLM's
signs (`binary_weights.BinarizedWeight`). Shapes: E experts (1 in a dense block), O out features, I
in features, G groups, S columns per group.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor

from q3q.errors import NumericsError, ShapeError
from q3q.number_formats import FLOATS, GGUF, INT
from q3q.numerics.binary_weights import BinarizedWeight
from q3q.numerics.block_weights import BlockWeight
from q3q.numerics.float_weights import GROUP_INDEX_BITS, FloatWeight
from q3q.numerics.grid import Grid, into_groups, to_codes
from q3q.numerics.linalg import all_finite
from q3q.numerics.stored import GROUP
from q3q.numerics.stored import StoredWeight as StoredWeight  # noqa: PLC0414

SCALE_BITS = 16  # as every deployed format stores them
# Weights that are dequantized at one time, through float32 or 64-bit indices: 64 MB.
NUMBERS_AT_ONCE = 1 << 23

Weight = TypeVar("Weight", bound=StoredWeight)


@dataclass(frozen=True)
class QuantizedWeight(StoredWeight):
    """Codes on a uniform grid: weight ~ scale * (code - zero), per row and group of columns.

    codes_EOI: uint8; whole numbers of another type are converted.
    scale_EOG: float32.
    zero_EOG: float32. Whole ones from 0 to the largest code are stored as codes are, others (HQQ's)
        as 16-bit numbers.
    bits: bits per code.
    symmetric: zero points are implied: the middle code.
    group_EI: int32, each column's group; None if groups are runs of neighbours (no act-order).
    """

    scale_EOG: Tensor
    zero_EOG: Tensor
    bits: int
    symmetric: bool
    group_EI: Tensor | None = None

    kind: ClassVar[str] = "grid"
    TENSORS: ClassVar[Mapping[str, str]] = {
        "codes": "codes_EOI",
        "scale": "scale_EOG",
        "zero": "zero_EOG",
        GROUP: "group_EI",
    }

    def __post_init__(self) -> None:
        if self.codes_EOI.ndim != 3 or self.scale_EOG.shape != self.zero_EOG.shape:
            shapes = [tuple(t.shape) for t in (self.codes_EOI, self.scale_EOG, self.zero_EOG)]
            raise ShapeError("codes {}, scale {}, zero {} do not fit".format(*shapes))
        if self.codes_EOI.dtype != torch.uint8:
            object.__setattr__(self, "codes_EOI", _as_codes(self.codes_EOI))

    @property
    def code_bits(self) -> int:
        return self.bits

    @property
    def whole_zeros(self) -> bool:
        """True if every zero point is a code, as the packed formats store it."""
        zero_EOG = self.zero_EOG
        return torch.equal(zero_EOG.round().clamp(0, 2**self.bits - 1), zero_EOG)

    def dequantize(self) -> Tensor:
        codes_EOI = self.codes_EOI.float()  # converted first: torch is slow where types are mixed
        if self.group_EI is None:
            codes_EOGS = codes_EOI.unflatten(2, (self.scale_EOG.shape[2], -1))
            codes_EOGS.sub_(self.zero_EOG[..., None]).mul_(self.scale_EOG[..., None])
            return codes_EOGS.flatten(2)
        index = self.group_EI.long()[:, None, :].expand(self.codes_EOI.shape)
        return codes_EOI.sub_(self.zero_EOG.gather(2, index)).mul_(self.scale_EOG.gather(2, index))

    def storage_bits(self) -> int:
        """Count codes, 16-bit scales, zero points unless implied, and the group index.

        A zero point that is no code takes 16 bits, as a scale does.
        """
        total = self.codes_EOI.numel() * self.bits + self.scale_EOG.numel() * SCALE_BITS
        if not self.symmetric:
            total += self.zero_EOG.numel() * (self.bits if self.whole_zeros else SCALE_BITS)
        if self.group_EI is not None:
            total += self.group_EI.numel() * GROUP_INDEX_BITS
        return total

    def largest_scale(self) -> float:
        stored = [self.scale_EOG] if self.whole_zeros else [self.scale_EOG, self.zero_EOG]
        return max(float(numbers.abs().amax()) for numbers in stored)

    def unsound(self, weight_EOI: Tensor) -> str | None:
        """Return why these are no codes of this weight that can be stored; None if they are.

        A method's own code may have cast codes that uint8 does not hold, which wrap around in
        silence, or divided by a scale of 0.
        """
        top, middle = 2**self.bits - 1, 2 ** (self.bits - 1)
        for name, numbers in (("scale", self.scale_EOG), ("zero point", self.zero_EOG)):
            if not all_finite(numbers):
                return f"a {name} is not a finite number"
        if self.codes_EOI.numel() and (largest := int(self.codes_EOI.amax())) > top:
            return (
                f"a code is {largest}, and {self.bits} bits hold 0 to {top}: clamp codes before "
                "they become uint8, where those below 0 and above 255 wrap around"
            )
        if self.symmetric and not bool((self.zero_EOG == middle).all()):
            return (
                "it is symmetric, whose zero point is implied, the middle code "
                f"{middle}, and has another: return symmetric=False to store zero points"
            )
        if bool((self.scale_EOG == 0).any()):
            empty = replace(
                self, codes_EOI=torch.ones_like(self.codes_EOI), zero_EOG=self.zero_EOG * 0
            )
            if bool(((empty.dequantize() == 0) & (weight_EOI != 0)).any()):
                return "a scale is 0 where the weights are not"
        return None

    def too_fine(self) -> bool:
        return super().too_fine() and self.most_levels_in_a_group() > 2**self.bits

    def most_levels_in_a_group(self) -> int:
        """Return the largest number of different values among weights that share a scale."""
        if self.group_EI is None:
            codes = self.codes_EOI.unflatten(2, (self.scale_EOG.shape[2], -1))
            used = torch.zeros(*codes.shape[:3], 256, dtype=torch.bool, device=codes.device)
            used.scatter_(3, codes.long(), True)
        else:
            codes = self.group_EI.long()[:, None, :] * 256 + self.codes_EOI.long()
            shape = (*codes.shape[:2], 256 * self.scale_EOG.shape[2])
            used = torch.zeros(shape, dtype=torch.bool, device=codes.device)
            used = used.scatter_(2, codes, True).unflatten(2, (-1, 256))
        return int(used.sum(-1).max())


def stored_weight(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> StoredWeight:
    """Restore the weight that `to_tensors` and `facts` describe."""
    kinds = (QuantizedWeight, FloatWeight, BlockWeight, BinarizedWeight)
    kind: type[StoredWeight] = next(kind for kind in kinds if kind.kind == facts["kind"])
    return kind.from_tensors(tensors, facts)


def _as_codes(codes_EOI: Tensor) -> Tensor:
    """Return codes as uint8.

    Raises:
        NumericsError: one of them is not a whole number from 0 to 255.
    """
    wide_EOI = codes_EOI.float()
    whole_EOI = wide_EOI.clamp(0, 255).to(torch.uint8)
    wrong = wide_EOI[whole_EOI != wide_EOI]
    if wrong.numel():
        raise NumericsError(f"the code {float(wrong[0]):g} is not a whole number from 0 to 255")
    return whole_EOI


def refuse_unsound(weight: object, weight_EOI: Tensor, bits: int, form: str = INT) -> None:
    """Refuse what a method returned if storing it would change it.

    Args:
        weight: what it returned for `weight_EOI`.
        bits: of a code, as the scheme asks.
        form: the format of codes, likewise.

    Raises:
        NumericsError: it is no quantized weight, or of another shape or more bits, or its codes,
            scales and zero points cannot be stored.
    """
    if isinstance(weight, Tensor) or not hasattr(weight, "dequantize"):
        problem: str | None = f"{type(weight).__name__} is not codes: return a QuantizedWeight"
    elif not isinstance(weight, QuantizedWeight | FloatWeight | BlockWeight):
        return
    elif (own := INT if isinstance(weight, QuantizedWeight) else weight.format) != form:
        problem = f"its codes are {own}, and format={form} was asked for"
    elif weight.shape != weight_EOI.shape:
        problem = f"its shape is {list(weight.shape)}, the weight's {list(weight_EOI.shape)}"
    elif weight.code_bits > bits:
        problem = f"its codes have {weight.code_bits} bits, and bits={bits} was asked for"
    else:
        problem = weight.unsound(weight_EOI)
    if problem:
        raise NumericsError(f"what the method returned is not what would be stored: {problem}")


def numbers(weight: StoredWeight, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Dequantize a weight [E, O, I] in `dtype`, piece by piece, to bound memory."""
    out_EOI = torch.empty(weight.shape, dtype=dtype, device=device)
    for e, o, part in pieces(weight):
        out_EOI[e, o] = part.to(device).dequantize()
    return out_EOI


def pieces(
    weight: StoredWeight, most_rows: int | None = None
) -> Iterator[tuple[slice, slice, StoredWeight]]:
    """Yield pieces of `NUMBERS_AT_ONCE` weights at most: their experts, their rows, their codes.

    Args:
        most_rows: cut rows after so many, however many numbers these are.
    """
    experts, rows, columns = weight.shape
    row_step = most_rows or max(1, NUMBERS_AT_ONCE // columns)
    expert_step = max(1, NUMBERS_AT_ONCE // (min(rows, row_step) * columns))
    for e in range(0, experts, expert_step):
        few = weight.experts(e, min(e + expert_step, experts))
        for o in range(0, rows, row_step):
            part = few.rows(o, min(o + row_step, rows))
            yield slice(e, e + expert_step), slice(o, o + row_step), part


def concatenate_experts(parts: Sequence[Weight]) -> Weight:
    """Concatenate several experts' weights, which have one kind and one scheme."""
    if len(parts) == 1:
        return parts[0]
    tensors = [part.to_tensors() for part in parts]
    joined = {name: torch.cat([part[name] for part in tensors]) for name in tensors[0]}
    return cast(Weight, stored_weight(joined, parts[0].facts()))


def round_to_grid(
    weight_EOI: Tensor, grid: Grid, bits: int, group_size: int, *, symmetric: bool
) -> QuantizedWeight:
    """Round each weight to the nearest point of its group's grid (grid shape [E, O, G, 1]).

    Zero points need not be whole numbers.
    """
    codes_EOI = to_codes(into_groups(weight_EOI, group_size), grid, bits).flatten(2)
    scale_EOG, zero_EOG = (part.squeeze(-1) for part in grid)
    return QuantizedWeight(codes_EOI.to(torch.uint8), scale_EOG, zero_EOG, bits, symmetric)


def with_scales(weight: StoredWeight, types: str | None) -> StoredWeight:
    """Round the scales as the export format stores them: what is evaluated is what is exported.

    types: dtypes to round to in turn, such as `bfloat16 float16`; `gguf` rounds offsets too, as
        its type of four bits with offsets has them; None leaves the scales unchanged.
    """
    if types is None:
        return weight
    if types == GGUF:
        return _as_in_gguf(weight)

    def as_stored(scale_EOG: Tensor) -> Tensor:
        for name in types.split():
            scale_EOG = scale_EOG.to(getattr(torch, name))
        return scale_EOG.float()

    if isinstance(weight, QuantizedWeight):
        return replace(weight, scale_EOG=as_stored(weight.scale_EOG))
    if isinstance(weight, FloatWeight) and FLOATS[weight.format].scale == "float":
        return replace(weight, stored_scale_EOG=as_stored(weight.stored_scale_EOG))
    if isinstance(weight, FloatWeight) and FLOATS[weight.format].scale == "e4m3":
        return replace(weight, narrow=True)
    return weight


def _as_in_gguf(weight: StoredWeight) -> StoredWeight:
    """Return whole numbers with zero points with offsets, scale * zero, all rounded to float16."""
    if not isinstance(weight, QuantizedWeight):
        return weight
    if weight.symmetric:
        return with_scales(weight, "float16")
    scale_EOG = weight.scale_EOG.half()
    offset_EOG = (scale_EOG.float() * weight.zero_EOG).half()
    return BlockWeight(weight.codes_EOI, scale_EOG, "q4_1", block_offset_EOB=offset_EOG)


Rowwise = TypeVar("Rowwise", bound=QuantizedWeight | FloatWeight | BlockWeight)


def concatenate_rows(parts: Sequence[Rowwise]) -> Rowwise:
    """Concatenate the rows of weights that read one input and so share a grouping of columns."""
    tensors = [part.to_tensors() for part in parts]
    rows = (name for name in tensors[0] if name != GROUP)
    joined = {name: torch.cat([part[name] for part in tensors], 1) for name in rows}
    return cast(Rowwise, stored_weight({**tensors[0], **joined}, parts[0].facts()))


def split_experts(weight: Rowwise, experts: int) -> Rowwise:
    """Split one linear's rows into several experts, which share its grouping of columns."""
    tensors = weight.to_tensors()
    split = {
        name: tensor.expand(experts, -1) if name == GROUP else tensor[0].unflatten(0, (experts, -1))
        for name, tensor in tensors.items()
    }
    return cast(Rowwise, stored_weight(split, weight.facts()))
