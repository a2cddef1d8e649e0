"""Packed checkpoints' layouts of a linear whose codes are small floating-point numbers.

compressed-tensors' kinds, FP8 as Qwen and DeepSeek release it, and NVIDIA ModelOpt's. A weight is
its code's level times its group's scale (`number_formats`), and of NVFP4 times a linear's factor.

Shapes: O out features, I in features, G groups of columns, R runs of rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from q3q.models.packed import SCALES, Layout, Part, Shape
from q3q.number_formats import FLOATS, NumberFormat

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BYTES = ("U8",)
# Safetensors' names of the dtypes of one-byte floats, by the format.
FLOAT_BYTES = {
    "fp8_e4m3": ("F8_E4M3",),
    "fp8_e5m2": ("F8_E5M2",),
    "mxfp8": ("F8_E4M3",),
}
POWERS = ("U8", "F8_E8M0")  # dtypes of E8M0 scales


@dataclass(frozen=True)
class FloatLayout(Layout):
    """A linear's codes in a floating-point format.

    format: a name in `number_formats.FLOATS`
    group_rows: rows that share a scale; -1 for all
    """

    format: str = "fp8_e4m3"
    group_rows: int = 1

    own_scales: ClassVar[bool] = True
    unsigned: ClassVar[bool] = True

    @property
    def form(self) -> NumberFormat:
        return FLOATS[self.format]

    def scale_shape(self, rows: int, columns: int) -> Shape:
        """Return the shape of the scales; the last group of a row may be short."""
        if self.group_rows == -1:
            return (1,)
        groups = 1 if self.group_size == -1 else -(-columns // self.group_size)
        return -(-rows // self.group_rows), groups

    def pack_floats(
        self, codes_OI: Tensor, scale_OG: Tensor, factor: Tensor | None
    ) -> dict[str, Tensor]:
        """Return the tensors of codes that are the format's own bit patterns, uint8.

        Args:
            scale_OG: each row's, as stored: floats, which keep their dtype, or uint8 codes.
            factor: [1], that E4M3 scales are stored times.
        """
        raise NotImplementedError(f"q3q does not write {type(self).__name__}")

    def _shared_scales(self, scale_OG: Tensor) -> Tensor:
        """Return one scale for each run of rows that share it."""
        if self.group_rows == -1:
            return scale_OG[:1, 0]
        return scale_OG[:: self.group_rows]


@dataclass(frozen=True)
class PlainFloats(FloatLayout):
    """One byte a code: compressed-tensors' `float-quantized`, `naive-quantized`, `mxfp8-quantized`.

    scale_name: `weight_scale`, and `weight_scale_inv` in Qwen's and DeepSeek's releases
    """

    scale_name: str = "weight_scale"

    marker: ClassVar[str] = "weight_scale"

    @property
    def scale_parts(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.scale_name,) if self.form.scale == "float" else ()

    def parts(self, rows: int, columns: int) -> dict[str, Part]:
        scales = POWERS if self.form.scale == "e8m0" else SCALES
        return {
            "weight": (FLOAT_BYTES[self.format], (rows, columns)),
            self.scale_name: (scales, self.scale_shape(rows, columns)),
        }

    def pack_floats(
        self, codes_OI: Tensor, scale_OG: Tensor, factor: Tensor | None
    ) -> dict[str, Tensor]:
        return {
            "weight": codes_OI.view(_torch_dtype(FLOAT_BYTES[self.format])),
            self.scale_name: self._shared_scales(scale_OG),
        }

    def unpack(self, parts: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        scale_RG = parts[self.scale_name]
        scale_RG = _powers(scale_RG) if self.form.scale == "e8m0" else scale_RG.float()
        level_OI = parts["weight"].float()
        return level_OI.mul_(_per_number(scale_RG, rows, columns, self))


@dataclass(frozen=True)
class PackedFloats(FloatLayout):
    """Codes of 4 or 6 bits, packed along columns, the first into the lowest bits.

    compressed-tensors' `nvfp4-pack-quantized`, `mxfp4-pack-quantized`, `mxfp6-pack-quantized`.
    """

    marker: ClassVar[str] = "weight_packed"

    @property
    def scale_parts(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("weight_scale", self.factor_name) if self.form.scale == "e4m3" else ()

    # Names of the tensors, which ModelOpt calls otherwise.
    codes_name: ClassVar[str] = "weight_packed"
    factor_name: ClassVar[str] = "weight_global_scale"
    narrow: ClassVar[bool] = True  # the format's own loader returns bfloat16, whatever the model's

    def parts(self, rows: int, columns: int) -> dict[str, Part]:
        scales = {"e4m3": ("F8_E4M3",), "e8m0": POWERS}[self.form.scale]
        parts: dict[str, Part] = {
            self.codes_name: (BYTES, (rows, columns * self.bits // 8)),
            "weight_scale": (scales, self.scale_shape(rows, columns)),
        }
        if self.form.scale == "e4m3":
            parts[self.factor_name] = (("F32",), (1,))
        return parts

    def pack_floats(
        self, codes_OI: Tensor, scale_OG: Tensor, factor: Tensor | None
    ) -> dict[str, Tensor]:
        parts = {self.codes_name: _packed(codes_OI, self.bits), "weight_scale": scale_OG}
        if factor is not None:
            parts["weight_scale"] = scale_OG.view(_torch_dtype(("F8_E4M3",)))
            parts[self.factor_name] = factor
        return parts

    def unpack(self, parts: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        import torch

        level_OI = _levels(parts[self.codes_name], self.form, columns)
        scale_OG = parts["weight_scale"]
        if self.form.scale == "e8m0":
            scale_OG = _powers(scale_OG)
        else:
            scale_OG = self.with_factor(scale_OG.float(), parts[self.factor_name].float())
        weight_OI = level_OI.mul_(_per_number(scale_OG, rows, columns, self))
        return weight_OI.to(torch.bfloat16).float() if self.narrow else weight_OI

    def with_factor(self, scale_OG: Tensor, factor: Tensor) -> Tensor:
        """Return the scales without the factor that they are stored times."""
        return scale_OG / factor


@dataclass(frozen=True)
class ModelOptFp4(PackedFloats):
    """NVIDIA ModelOpt's NVFP4: scales are multiplied by a number that the linear shares."""

    marker: ClassVar[str] = "weight_scale_2"
    codes_name: ClassVar[str] = "weight"
    factor_name: ClassVar[str] = "weight_scale_2"
    narrow: ClassVar[bool] = False

    def pack_floats(
        self, codes_OI: Tensor, scale_OG: Tensor, factor: Tensor | None
    ) -> dict[str, Tensor]:
        raise NotImplementedError("q3q does not write ModelOpt's NVFP4")

    @property
    def input_parts(self) -> tuple[str, ...]:
        return ("input_scale",) if self.act_scales == "factor" else super().input_parts

    def input_number(self, stored: float) -> float:
        # Stored is what compressed-tensors divides by, where this is what it multiplies by.
        return 1 / stored if self.act_scales == "factor" else stored

    def with_factor(self, scale_OG: Tensor, factor: Tensor) -> Tensor:
        return scale_OG * factor


def _levels(packed_OB: Tensor, form: NumberFormat, columns: int) -> Tensor:
    """Return the levels [O, I], float32, of codes packed into bytes."""
    import torch

    from q3q.numerics.floats import decode

    if form.bits == 4:
        codes = torch.stack((packed_OB & 15, packed_OB >> 4), dim=-1)
    else:  # four codes of 6 bits in three bytes
        bytes_Ox3 = packed_OB.unflatten(-1, (-1, 3)).int()
        word = bytes_Ox3[..., 0] | bytes_Ox3[..., 1] << 8 | bytes_Ox3[..., 2] << 16
        codes = torch.stack([word >> shift & 63 for shift in (0, 6, 12, 18)], dim=-1)
    return decode(codes.flatten(-2)[:, :columns], form)


def _packed(codes_OI: Tensor, bits: int) -> Tensor:
    """Return codes of 4 or 6 bits packed into bytes, uint8."""
    import torch

    if bits == 4:
        return codes_OI[:, ::2] | codes_OI[:, 1::2] << 4
    four_Ox4 = codes_OI.unflatten(-1, (-1, 4)).int()
    word = sum((four_Ox4[..., k] << 6 * k for k in range(1, 4)), four_Ox4[..., 0])
    parts = torch.stack([word >> shift & 255 for shift in (0, 8, 16)], dim=-1)
    return parts.flatten(-2).to(torch.uint8)


def _torch_dtype(types: tuple[str, ...]) -> torch.dtype:
    import torch

    return {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}[types[0]]


def _powers(exponents: Tensor) -> Tensor:
    """Return E8M0 scales, float32."""
    import torch

    from q3q.numerics.floats import scale_numbers

    return scale_numbers(exponents.view(torch.uint8), "e8m0")


def _per_number(scale_RG: Tensor, rows: int, columns: int, layout: FloatLayout) -> Tensor:
    """Return what multiplies each number: a scale alone, or one for each row and column."""
    if layout.group_rows == -1:
        return scale_RG.reshape(())
    if layout.group_size != -1:
        scale_RG = scale_RG.repeat_interleave(layout.group_size, dim=1)[:, :columns]
    if layout.group_rows > 1:
        scale_RG = scale_RG.repeat_interleave(layout.group_rows, dim=0)[:rows]
    return scale_RG
