"""The formats in which codes of weights and activations are numbers, as data. Imports no torch.

A code's number is a level of its format times its group's scale. The levels of `int` are whole
numbers, of `bits` bits; those of `FLOATS` are small floating-point numbers, whose bits are given.
`BLOCKS` are the types of llama.cpp's GGUF files: whole numbers again, whose scales share a scale.
"""

from dataclasses import dataclass
from typing import Literal

# How a group's scale is stored: in 16 bits; as a power of two (E8M0: 8 bits of exponent); or as an
# 8-bit float (E4M3) below a factor that the whole linear shares, a float32.
ScaleType = Literal["float", "e8m0", "e4m3"]
SCALE_BITS = {"float": 16, "e8m0": 8, "e4m3": 8}
GLOBAL_SCALE_BITS = 32
INT = "int"
GGUF = "gguf"  # of what the scales of whole numbers are rounded to: as GGUF's types have them


@dataclass(frozen=True)
class NumberFormat:
    """A floating-point format of codes, and the scales that go with it.

    A code's highest bit is its sign; then come `exponent` bits and `mantissa` bits. Levels are
    2**-bias * 2**max(e, 1) * (m / 2**mantissa, plus 1 unless e is 0).

    largest: the largest level. Fp8's codes above it are infinite or no numbers, and never written.
    scale: how scales are stored
    group_size: the only one that the format has; None: any, and blocks of rows and columns too
    carry: of power-of-two scales; a group whose largest significand (1 to 2) reaches it takes the
        next larger scale
    about: for people
    """

    name: str
    exponent: int
    mantissa: int
    largest: float
    scale: ScaleType
    about: str
    group_size: int | None = None
    carry: float = 2.0

    @property
    def bits(self) -> int:
        return 1 + self.exponent + self.mantissa

    @property
    def bias(self) -> int:
        return (1 << (self.exponent - 1)) - 1

    @property
    def smallest_normal(self) -> float:
        """The smallest level whose step is relative to it; below, steps are equal."""
        return 2.0 ** (1 - self.bias)


# MX formats: OCP Microscaling Formats (MX) Specification 1.0. Power-of-two scales are chosen as
# compressed-tensors chooses them; the specification's own example never carries.
FLOATS: dict[str, NumberFormat] = {
    form.name: form
    for form in (
        NumberFormat("fp8_e4m3", 4, 3, 448.0, "float", "8-bit floats, 3 bits of mantissa"),
        NumberFormat("fp8_e5m2", 5, 2, 57344.0, "float", "8-bit floats, 2 bits of mantissa"),
        NumberFormat("mxfp8", 4, 3, 448.0, "e8m0", "E4M3, a power of two per 32", 32, 1.75),
        NumberFormat("mxfp6", 2, 3, 7.5, "e8m0", "E2M3, a power of two per 32", 32, 1.9375),
        NumberFormat("mxfp4", 2, 1, 6.0, "e8m0", "E2M1, a power of two per 32", 32, 1.75),
        NumberFormat("nvfp4", 2, 1, 6.0, "e4m3", "E2M1, an E4M3 scale per 16", 16),
    )
}


@dataclass(frozen=True)
class BlockFormat:
    """A type of llama.cpp's: a block of columns with numbers of their own, bit for bit as in files.

    A weight is scale * (code - middle) - offset. Each group of columns has a scale and perhaps an
    offset. Those of the groups in a block are whole numbers of `scale_bits` times a float16 of the
    block; in a block of one group they are that float16.

    group_size: columns of a group
    groups: of a block
    middle: the code of zero; 0 where groups have offsets
    scale_top: what the group of the largest scale has, of a scale of `scale_bits`; 0: one group
    instead: the format of linears whose columns do not fill whole blocks; nothing: there is none
    about: for people
    """

    name: str
    bits: int
    group_size: int
    groups: int
    middle: int
    scale_bits: int
    scale_top: int
    instead: str
    about: str
    scale: Literal["block"] = "block"

    @property
    def offsets(self) -> bool:
        """True if groups have offsets, so that codes need not lie evenly around zero."""
        return self.middle == 0

    @property
    def block(self) -> int:
        """Columns of a block."""
        return self.group_size * self.groups

    @property
    def block_bits(self) -> int:
        """Bits of a block with all its scales."""
        kinds = 2 if self.offsets else 1
        return self.block * self.bits + kinds * (self.groups * self.scale_bits + 16)


# As ggml-quants.c of llama.cpp defines them.
BLOCKS: dict[str, BlockFormat] = {
    form.name: form
    for form in (
        BlockFormat("q8_0", 8, 32, 1, 128, 0, 0, "", "GGUF's, 8 bits, a scale per 32"),
        BlockFormat("q6_k", 6, 16, 16, 32, 8, -128, "q8_0", "GGUF's, 6 bits, blocks of 256"),
        BlockFormat("q5_k", 5, 32, 8, 0, 6, 63, "q8_0", "GGUF's, 5 bits, blocks of 256"),
        BlockFormat("q4_k", 4, 32, 8, 0, 6, 63, "q4_1", "GGUF's, 4 bits, blocks of 256"),
        BlockFormat("q3_k", 3, 16, 16, 4, 6, -32, "q4_0", "GGUF's, 3 bits, blocks of 256"),
        BlockFormat("q2_k", 2, 16, 16, 0, 4, 15, "q4_0", "GGUF's, 2 bits, blocks of 256"),
        BlockFormat("q4_1", 4, 32, 1, 0, 0, 0, "", "GGUF's, 4 bits, a scale and an offset per 32"),
        BlockFormat("q4_0", 4, 32, 1, 8, 0, 0, "", "GGUF's, 4 bits, a scale per 32"),
    )
}
ACT_FORMATS = (INT, *FLOATS)
FORMATS = (INT, *FLOATS, *BLOCKS)


def own_form(name: str) -> NumberFormat | BlockFormat | None:
    """Return a format that says itself how many bits a code has; None for whole numbers."""
    return FLOATS.get(name) or BLOCKS.get(name)


def short_name(name: str) -> str:
    """Return a format's name in labels: the common kind of fp8 is just `fp8`."""
    return "fp8" if name == "fp8_e4m3" else name
