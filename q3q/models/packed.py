"""Packed checkpoints' layouts of a linear: compressed-tensors' integers, GPTQ's and AWQ's.

A weight is scale * (code - zero), with the scale and zero of its column's group. Names, shapes and
bytes need no torch, so a plan or a refusal costs milliseconds. `packed_floats` has the layouts of
floats, and `published` reads the configs that say which linear has which layout.

Shapes: O out features, I in features, G groups.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from q3q.errors import CheckpointError
from q3q.number_formats import INT
from q3q.scheme import ActScales, InputRounding

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, ...]
# A stored tensor's dtypes, the one to write first, and its shape; -1 for a length that varies.
Part = tuple[tuple[str, ...], Shape]
# Safetensors' names of dtypes.
WORDS, SCALES = ("I32",), ("F16", "BF16", "F32")


@dataclass(frozen=True)
class Layout(ABC):
    """A linear's tensors on disk, and how its input is rounded when it runs.

    group_size: columns that share a scale; -1 for the whole row
    act_bits: of the linear's input; None if it is not rounded
    act_format: what these are numbers of, a name in `number_formats`
    act_group_size: channels of a token that share a scale; -1 for all
    act_scales: where the input's scales come from
    """

    bits: int
    group_size: int
    symmetric: bool
    act_bits: int | None = None
    act_format: str = INT
    act_group_size: int = -1
    act_scales: ActScales = "dynamic"

    marker: ClassVar[str]  # a tensor that only a packed linear has
    own_scales: ClassVar[bool] = False  # scales are stored in the model's dtype, not in float16
    optional: ClassVar[tuple[str, ...]] = ()  # parts that some writers leave out
    scale_parts: ClassVar[tuple[str, ...]] = ("weight_scale",)  # parts that hold scales
    # Scales are magnitudes. Of whole numbers, which reach one further below zero than above,
    # some writers (auto-round) store negative ones.
    unsigned: ClassVar[bool] = False

    def groups(self, columns: int) -> int:
        return 1 if self.group_size == -1 else columns // self.group_size

    @abstractmethod
    def parts(self, rows: int, columns: int) -> dict[str, Part]:
        """Return each tensor's dtypes and shape, by its name's end."""

    @property
    def inputs(self) -> InputRounding | None:
        """How the linear's input is rounded, without the stored number; None if it is not."""
        if self.act_bits is None:
            return None
        return InputRounding(self.act_bits, self.act_format, self.act_group_size, self.act_scales)

    @property
    def input_parts(self) -> tuple[str, ...]:
        """Names' ends of the stored numbers that say how inputs are rounded."""
        return {"stored": ("input_scale",), "factor": ("input_global_scale",)}.get(
            self.act_scales, ()
        )

    def input_number(self, stored: float) -> float:
        """Return the input's scale, or its factor, from the stored number."""
        return stored

    def pack(
        self, codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor, group_I: Tensor | None
    ) -> dict[str, Tensor]:
        """Return the tensors; the scales keep scale_OG's dtype.

        Args:
            group_I: each column's group; None if groups are runs of neighbours.
        """
        raise NotImplementedError(f"q3q does not write {type(self).__name__}")

    @abstractmethod
    def unpack(self, parts: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        """Return the dequantized weight [O, I], float32."""

    def fault(self, parts: Mapping[str, Tensor], rows: int, columns: int) -> str | None:
        """Say which part's numbers contradict the others or the config; None if none do."""
        return None


@dataclass(frozen=True)
class PackedInts(Layout):
    """compressed-tensors' `pack-quantized`: codes packed along columns, zero points along rows."""

    marker: ClassVar[str] = "weight_packed"
    own_scales: ClassVar[bool] = True

    def parts(self, rows: int, columns: int) -> dict[str, Part]:
        parts: dict[str, Part] = {
            "weight_packed": (WORDS, (rows, _words(columns, self.bits))),
            "weight_scale": (SCALES, (rows, self.groups(columns))),
            "weight_shape": (("I64", "I32"), (2,)),
        }
        if not self.symmetric:
            parts["weight_zero_point"] = (WORDS, (_words(rows, self.bits), self.groups(columns)))
        return parts

    def pack(
        self, codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor, group_I: Tensor | None
    ) -> dict[str, Tensor]:
        import torch

        from q3q.numerics.packing import pack_bits

        _refuse_group_index(group_I)
        packed = {
            "weight_packed": pack_bits(codes_OI, self.bits),
            "weight_scale": scale_OG,
            "weight_shape": torch.tensor(codes_OI.shape),
        }
        if not self.symmetric:
            packed["weight_zero_point"] = pack_bits(zero_OG.T.to(torch.uint8), self.bits).T
        return packed

    def unpack(self, parts: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        from q3q.numerics.packing import unpack_bits

        codes_OI = unpack_bits(parts["weight_packed"], self.bits, columns)
        if self.symmetric:
            return _times(codes_OI, parts["weight_scale"], 2 ** (self.bits - 1))
        zero_GO = unpack_bits(parts["weight_zero_point"].T, self.bits, rows)
        return _times(codes_OI, parts["weight_scale"], zero_GO.T)

    def fault(self, parts: Mapping[str, Tensor], rows: int, columns: int) -> str | None:
        shape = parts["weight_shape"].tolist()
        if shape == [rows, columns]:
            return None
        return f"weight_shape says {shape}, and config.json {[rows, columns]}"


@dataclass(frozen=True)
class PlainInts(Layout):
    """compressed-tensors' `int-quantized`: signed bytes, symmetric."""

    marker: ClassVar[str] = "weight_scale"
    own_scales: ClassVar[bool] = True

    def parts(self, rows: int, columns: int) -> dict[str, Part]:
        return {
            "weight": (("I8",), (rows, columns)),
            "weight_scale": (SCALES, (rows, self.groups(columns))),
        }

    def pack(
        self, codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor, group_I: Tensor | None
    ) -> dict[str, Tensor]:
        import torch

        _refuse_group_index(group_I)
        middle = 2 ** (self.bits - 1)
        if not bool((zero_OG == middle).all()):
            raise ValueError("this layout has no place for zero points")
        signed_OI = codes_OI.to(torch.int16) - middle
        return {"weight": signed_OI.to(torch.int8), "weight_scale": scale_OG}

    def unpack(self, parts: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        return _times(parts["weight"], parts["weight_scale"], 0)


@dataclass(frozen=True)
class GptqWords(Layout):
    """AutoGPTQ's and GPTQModel's, transposed: codes along columns, zero points along rows."""

    # Subtracted from each zero point before it is stored: 1 in the first version (`gptq`), which
    # cannot store zero point 0, and 0 in the second (`gptq_v2`).
    below: int = 0

    marker: ClassVar[str] = "qweight"
    optional: ClassVar[tuple[str, ...]] = ("g_idx",)
    scale_parts: ClassVar[tuple[str, ...]] = ("scales",)

    def parts(self, rows: int, columns: int) -> dict[str, Part]:
        groups = self.groups(columns)
        return {
            "qweight": (WORDS, (_words(columns, self.bits), rows)),
            "qzeros": (WORDS, (groups, _words(rows, self.bits))),
            "scales": (SCALES, (groups, rows)),
            "g_idx": (WORDS, (columns,)),
        }

    def pack(
        self, codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor, group_I: Tensor | None
    ) -> dict[str, Tensor]:
        import torch

        from q3q.numerics.packing import pack_bits

        columns = codes_OI.shape[1]
        if group_I is None:
            group_I = torch.arange(columns) // (columns // scale_OG.shape[1])
        zero_GO = (zero_OG.T.to(torch.int64) - self.below) & (2**self.bits - 1)
        return {
            "qweight": pack_bits(codes_OI, self.bits).T,
            "qzeros": pack_bits(zero_GO, self.bits),
            "scales": scale_OG.T,
            "g_idx": group_I.to(torch.int32),
        }

    def unpack(self, parts: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        from q3q.numerics.packing import unpack_bits

        codes_OI = unpack_bits(parts["qweight"].T, self.bits, columns)
        # A zero point stored below 0 reads as the highest code; adding wraps it round again.
        zero_GO = (unpack_bits(parts["qzeros"], self.bits, rows) + self.below) & (2**self.bits - 1)
        return _times(codes_OI, parts["scales"].T, zero_GO.T, parts.get("g_idx"))

    def fault(self, parts: Mapping[str, Tensor], rows: int, columns: int) -> str | None:
        if (group_I := parts.get("g_idx")) is None:
            return None
        groups, low, high = len(parts["scales"]), int(group_I.min()), int(group_I.max())
        if low >= 0 and high < groups:
            return None
        return f"g_idx names groups {low} to {high}, and there are {groups}"


@dataclass(frozen=True)
class AwqWords(Layout):
    """AutoAWQ's `gemm`: codes and zero points packed along the rows, eight at a time in ORDER."""

    marker: ClassVar[str] = "qweight"
    scale_parts: ClassVar[tuple[str, ...]] = ("scales",)
    ORDER: ClassVar[tuple[int, ...]] = (0, 2, 4, 6, 1, 3, 5, 7)

    def parts(self, rows: int, columns: int) -> dict[str, Part]:
        groups = self.groups(columns)
        return {
            "qweight": (WORDS, (columns, _words(rows, self.bits))),
            "qzeros": (WORDS, (groups, _words(rows, self.bits))),
            "scales": (SCALES, (groups, rows)),
        }

    def pack(
        self, codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor, group_I: Tensor | None
    ) -> dict[str, Tensor]:
        import torch

        from q3q.numerics.packing import pack_bits

        _refuse_group_index(group_I)

        def interleaved(codes_xO: Tensor) -> Tensor:
            runs_xn8 = codes_xO.to(torch.uint8).unflatten(-1, (-1, len(self.ORDER)))
            return pack_bits(runs_xn8[..., list(self.ORDER)].flatten(-2), self.bits)

        return {
            "qweight": interleaved(codes_OI.T),
            "qzeros": interleaved(zero_OG.T),
            "scales": scale_OG.T,
        }

    def unpack(self, parts: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        from q3q.numerics.packing import unpack_bits

        places = [self.ORDER.index(k) for k in range(len(self.ORDER))]

        def straight(words_xW: Tensor) -> Tensor:
            runs_xn8 = unpack_bits(words_xW, self.bits, rows).unflatten(-1, (-1, len(places)))
            return runs_xn8[..., places].flatten(-2)

        return _times(straight(parts["qweight"]).T, parts["scales"].T, straight(parts["qzeros"]).T)


def input_parts(layout: Layout) -> dict[str, Part]:
    """Return the parts of a layout that hold the scale of its input."""
    return dict.fromkeys(layout.input_parts, (SCALES, (1,)))


def doubts_of(layout: Layout, parts: Mapping[str, Tensor], linear: str) -> Iterator[str]:
    """Yield lines about scales of zero, which make zeros of all weights that share them, and
    about negative ones where the layout's scales are magnitudes.

    Raises:
        CheckpointError: a scale is no number, or most of them are zero.
    """
    for name in layout.scale_parts:
        scale = parts[name]
        if not scale.is_floating_point() or scale.dtype.itemsize == 1:
            scale = scale.float()
        if not bool(scale.isfinite().all()):
            raise CheckpointError(f"{linear}.{name} holds numbers that are not finite: damaged")
        zeros = scale.numel() - int(scale.count_nonzero())
        if 2 * zeros > scale.numel():
            raise CheckpointError(f"{linear}.{name}: {zeros} of {scale.numel()} scales are zero")
        if zeros:
            yield f"{linear}.{name}: {zeros} of {scale.numel()} scales are zero"
        if layout.unsigned and (below := int((scale < 0).sum())):
            yield (
                f"{linear}.{name}: {below} of {scale.numel()} scales are negative, and the "
                "format's are magnitudes"
            )


def _words(count: int, bits: int) -> int:
    return -(-count * bits // 32)


def _times(
    codes_OI: Tensor, scale_OG: Tensor, zero: Tensor | int, group_I: Tensor | None = None
) -> Tensor:
    """Return scale * (code - zero) in float32, where a 16-bit scale times a code is exact."""
    columns, groups = codes_OI.shape[1], scale_OG.shape[1]

    def per_column(number_OG: Tensor) -> Tensor:
        if group_I is None:
            return number_OG.float().repeat_interleave(columns // groups, dim=1)
        return number_OG.float()[:, group_I.long()]

    zero_OI = zero if isinstance(zero, int) else per_column(zero)
    return per_column(scale_OG) * (codes_OI.float() - zero_OI)


def _refuse_group_index(group_I: Tensor | None) -> None:
    if group_I is not None:
        raise ValueError("this layout has no place for a group index")
