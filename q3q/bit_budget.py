"""A budget of bits, and how it is allotted over a model's linears: a part of what a trial is."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from q3q.canonical import Json, without_none
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
    bytes: of the whole model, with what stays unquantized, and of the cache that counts
    uniform: as many as the linears take if all have this width
    unit: what gets one width: a linear (that of all experts is one), a site (the linears that read
        one input) or a block
    widths: candidates for each unit, ascending
    measure: of a unit's sensitivity. kl: of the model's predictions from the unquantized model's
        when this unit alone is quantized; block_error: of the output of its block, relative to the
        output
    source, digest, samples, length, draw: the text's windows on which it is measured
    context: tokens of the one text whose cache of keys and values counts; None: it does not
    cache: bytes of that cache, its scales included
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
    context: int | None = None
    cache: int | None = None
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
        """Name the budget for people: `budget:3.5`, `budget:w3`, `budget:4.2GB:cache@32768`.

        Its unit follows, unless it is a site.
        """
        key, value = self.given
        limit = {"bits": f"{value:g}", "uniform": f"w{value}"}.get(key) or _size(value, "")
        own = [] if self.context is None else [f"cache@{self.context}"]
        own += [] if self.unit == SITE else [self.unit]
        own += [] if self.measure == KL else [self.measure]
        return ":".join(["budget", limit, *own])

    @property
    def about(self) -> str:
        """Say what the name means: `widths by sensitivity; the model takes at most 4.2 GB`."""
        key, value = self.given
        limit = {
            "bits": f"{value:g} bits a weight at most, scales counted",
            "uniform": f"the bytes of {value} bits for all at most",
        }.get(key) or f"the model takes at most {_size(value, ' ')}"
        if self.cache is not None:
            limit = (
                f"the model and the cache of a text of {self.context:,} tokens "
                f"({_size(self.cache, ' ')}) take at most {_size(value, ' ')}"
            )
        return f"each {self.unit} has a width by its sensitivity, {limit}"

    def to_json(self) -> Json:
        return without_none(asdict(self) | {"widths": list(self.widths)})

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "BitBudget":
        return cls(**data)


def _size(count: float, between: str) -> str:
    """Return bytes as `4.2GB` or `12MB`."""
    number, unit = (count / 1e9, "GB") if count >= 1e8 else (count / 1e6, "MB")
    return f"{number:.6g}{between}{unit}"
