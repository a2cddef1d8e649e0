"""A budget of bits, and how it is allotted over a model's linears: a part of what a trial is."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from q3q.errors import ConfigError

LINEAR, SITE, BLOCK = UNITS = ("linear", "site", "block")
KL, BLOCK_ERROR = MEASURES = ("kl", "block_error")
LIMITS = ("bits", "bytes", "uniform")
# Of the numbers that sensitivities are: raised when measuring or rounding changes.
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class BitBudget:
    """The most bits that a trial's quantized linears may take, and how they are allotted.

    One of the first three is given; codes, scales and zero points count, as a checkpoint stores
    them.

    bits: the mean of all quantized weights
    bytes: of the whole model, with what stays unquantized
    uniform: as many as the linears take if all have this width
    unit: what gets one width: a linear (that of all experts is one), a site (the linears that read
        one input) or a block
    widths: candidates for each unit, ascending
    measure: of a unit's sensitivity. kl: of the model's predictions from the unquantized model's
        when this unit alone is quantized; block_error: of the output of its block, relative to the
        output
    source, digest, samples, length, draw: the text's windows on which it is measured
    version: of the sensitivities' numbers
    """

    bits: float | None = None
    bytes: int | None = None
    uniform: int | None = None
    unit: str
    widths: tuple[int, ...]
    measure: str
    source: str
    digest: str
    samples: int
    length: int
    draw: str
    version: int = VERSION

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))  # a list, where it was JSON
        given = [key for key in LIMITS if getattr(self, key) is not None]
        if len(given) != 1:
            raise ConfigError(
                f"a budget is one of {', '.join(f'budget.{key}' for key in LIMITS)}; given: "
                f"{' and '.join(f'budget.{key}' for key in given) or 'none'}"
            )

    @property
    def given(self) -> tuple[str, Any]:
        """The limit as it was given: (`bits`, 3.5)."""
        return next((key, value) for key in LIMITS if (value := getattr(self, key)) is not None)

    @property
    def words(self) -> str:
        """Name the budget for people: `budget:3.5`, `budget:4.2GB`, `budget:w3`; and its unit."""
        key, value = self.given
        if key == "bits":
            limit = f"{value:g}"
        elif key == "uniform":
            limit = f"w{value}"
        else:
            limit = f"{value / 1e9:.6g}GB" if value >= 1e8 else f"{value / 1e6:.6g}MB"
        own = [] if self.unit == SITE else [self.unit]
        own += [] if self.measure == KL else [self.measure]
        return ":".join(["budget", limit, *own])

    def to_json(self) -> dict[str, Any]:
        facts = asdict(self) | {"widths": list(self.widths)}
        return {key: value for key, value in facts.items() if value is not None}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "BitBudget":
        return cls(**data)
