"""The formats in which codes of weights and activations are numbers, as data. Imports no torch.

A code's number is a level of its format times its group's scale. The levels of `int` are whole
numbers, of `bits` bits; those of the others are small floating-point numbers, whose bits are given.
"""

from dataclasses import dataclass
from typing import Literal

# How a group's scale is stored: in 16 bits; as a power of two (E8M0: 8 bits of exponent); or as an
# 8-bit float (E4M3) below a factor that the whole linear shares, a float32.
ScaleType = Literal["float", "e8m0", "e4m3"]
SCALE_BITS = {"float": 16, "e8m0": 8, "e4m3": 8}
GLOBAL_SCALE_BITS = 32
INT = "int"


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
FORMATS = (INT, *FLOATS)


def short_name(name: str) -> str:
    """Return a format's name in labels: the common kind of fp8 is just `fp8`."""
    return "fp8" if name == "fp8_e4m3" else name
