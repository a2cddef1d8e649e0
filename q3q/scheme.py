"""How a model's linears are stored: bits, groups and the format of codes, of weights and inputs."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Literal

from q3q.canonical import Json
from q3q.errors import ConfigError, IncompatibleError
from q3q.number_formats import (
    ACT_FORMATS,
    BLOCKS,
    FLOATS,
    FORMATS,
    INT,
    own_form,
    short_name,
)

# Of a scheme, absent where they have their default: they are newer than the first records.
SELDOM_OF_SCHEME = (
    *("format", "group_rows", "four_over_six", "act_format", "act_group_size", "act_scales"),
)


# Of a scheme: what changes nothing in the quantized blocks. `act_scales` is not among them, as
# blocks keep the factors that calibration finds.
ACTIVATION_KEYS = ("act_bits", "act_format", "act_group_size")
DYNAMIC, CALIBRATED = "dynamic", "calibrated"
ACT_SCALES = (DYNAMIC, CALIBRATED)  # of act_scales


# Where the scales of rounded inputs come from: from the numbers themselves, as they are read; one
# stored number, for all of them; a stored factor above each group's own scale (NVFP4); or from the
# numbers, but those beyond a threshold stay as they are (LLM.int8).
ActScales = Literal["dynamic", "stored", "factor", "outliers"]


@dataclass(frozen=True)
class InputRounding:
    """How a linear's input is rounded when it runs.

    group_size: channels of a token that share a scale; -1: all
    number: the stored scale or factor, where `scales` says that there is one
    """

    bits: int
    format: str = INT
    group_size: int = -1
    scales: ActScales = "dynamic"
    number: float | None = None


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How numbers are stored.

    bits: of a weight's code
    group_size: neighbouring input columns that share a scale, -1 for the whole row
    symmetric: codes lie evenly around zero
    act_bits: of each quantized linear's input (dynamic, per token); None leaves it in 16 bits
    scales: types that scales are rounded to in turn (`bfloat16 float16`), as an export stores
        them; None leaves them in float32
    format: of codes, a name of `number_formats`; each floating-point one has its own `bits`
    group_rows: neighbouring rows that share a scale, -1 for all rows of a linear
    four_over_six: each group's largest weight becomes 6 or 4, whichever errs less (nvfp4)
    act_format, act_group_size: of each quantized linear's input, likewise
    act_scales: of the input: `dynamic`, from each token's own numbers; or `calibrated`, below one
        factor for each site, taken from the largest number of the calibration tokens (nvfp4)
    """

    bits: int
    group_size: int
    symmetric: bool
    act_bits: int | None = None
    scales: str | None = None
    format: str = INT
    group_rows: int = 1
    four_over_six: bool = False
    act_format: str = INT
    act_group_size: int = -1
    act_scales: str = DYNAMIC

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ConfigError(f"bits={self.bits} is out of range: give 1 to 8")
        if self.group_size != -1 and self.group_size < 1:
            raise ConfigError(
                f"group_size={self.group_size}: give a positive number of columns, or -1 for whole "
                "rows"
            )
        if self.act_bits is not None and not 2 <= self.act_bits <= 16:
            raise ConfigError(f"act_bits={self.act_bits} is out of range: give 2 to 16, or null")
        for key, name, known in (
            ("format", self.format, FORMATS),
            ("act_format", self.act_format, ACT_FORMATS),
            ("act_scales", self.act_scales, ACT_SCALES),
        ):
            if name not in known:
                raise ConfigError(f"{key}={name} is not known. Choose from: {', '.join(known)}")
        for key in ("group_rows", "act_group_size"):
            if (size := getattr(self, key)) != -1 and size < 1:
                raise ConfigError(f"{key}={size}: give a positive number, or -1 for all")
        for misfit in self._misfits():
            raise IncompatibleError(misfit)

    def _misfits(self) -> Iterator[str]:
        """Yield in a line each why these numbers are not those of their formats."""
        form, size = own_form(self.format), self.group_size
        if form is None and (self.group_rows != 1 or self.four_over_six):
            key = "four_over_six=true" if self.four_over_six else f"group_rows={self.group_rows}"
            able = "nvfp4" if self.four_over_six else "fp8_e4m3 or format=fp8_e5m2"
            yield f"{key} has no effect with format=int; it is for format={able}"
        if form is not None:
            if self.bits != form.bits:
                yield f"bits={self.bits}: numbers of format={form.name} have {form.bits} bits"
            if form.name in BLOCKS:
                if self.symmetric == BLOCKS[form.name].offsets:
                    has = "offsets" if self.symmetric else "no offsets"
                    given = str(self.symmetric).lower()
                    yield f"symmetric={given}: groups of format={form.name} have {has}"
            elif not self.symmetric:
                yield (
                    f"symmetric=false: format={form.name} is even around zero; only format=int has "
                    "zero points"
                )
            if form.group_size not in (None, size):
                yield f"group_size={size}: groups of format={form.name} have {form.group_size}"
            if self.group_rows != 1 and form.group_size is not None:
                yield f"group_rows={self.group_rows}: groups of format={form.name} lie in one row"
            if self.four_over_six and form.scale != "e4m3":
                yield f"four_over_six=true is for format=nvfp4, not for format={form.name}"
        yield from self._input_misfits()

    def _input_misfits(self) -> Iterator[str]:
        """Yield the same of how inputs are rounded."""
        act, act_size = FLOATS.get(self.act_format), self.act_group_size
        if act is not None and self.act_bits != act.bits:
            yield f"act_bits={self.act_bits}: numbers of act_format={act.name} have {act.bits}"
        if self.act_bits is None and act_size != -1:
            yield f"act_group_size={act_size} has no effect without act_format= or act_bits="
        if act is not None and act.group_size not in (None, act_size):
            yield (
                f"act_group_size={act_size}: groups of act_format={act.name} have {act.group_size}"
            )
        if self.calibrates_inputs and (act is None or act.scale != "e4m3"):
            yield (
                "act_scales=calibrated is for act_format=nvfp4, whose scales lie below a factor, "
                f"not for act_format={self.act_format}"
            )

    def to_json(self) -> Json:
        """Return plain JSON; newer settings where they differ from their defaults alone."""
        own = {part.name: part.default for part in fields(self)}
        return {
            key: value
            for key, value in asdict(self).items()
            if key not in SELDOM_OF_SCHEME or value != own[key]
        }

    @property
    def inputs(self) -> InputRounding | None:
        """How each quantized linear's input is rounded; None leaves it in 16 bits."""
        if self.act_bits is None:
            return None
        scales: ActScales = "factor" if self.calibrates_inputs else "dynamic"
        return InputRounding(self.act_bits, self.act_format, self.act_group_size, scales)

    @property
    def calibrates_inputs(self) -> bool:
        """True if rounding the inputs takes a number that calibration finds."""
        return self.act_scales == CALIBRATED

    @property
    def codes(self) -> str:
        """Name the codes for people: `w4`, `fp8`, `nvfp4 4/6`."""
        if self.format == INT:
            return f"w{self.bits}"
        choice = " 4/6" if self.four_over_six else ""
        return short_name(self.format) + choice

    @property
    def activations(self) -> str:
        """Name what activations are rounded to: `a8`, `afp8`, `anvfp4`; nothing if they are not.

        `anvfp4 calibrated` has a factor from calibration.
        """
        if self.act_bits is None:
            return ""
        name = str(self.act_bits) if self.act_format == INT else short_name(self.act_format)
        act = FLOATS.get(self.act_format)
        own = self.act_group_size == -1 or (act is not None and act.group_size is not None)
        source = f" {CALIBRATED}" if self.calibrates_inputs else ""
        return f"a{name}" + ("" if own else f"g{self.act_group_size}") + source

    @property
    def own_groups(self) -> bool:
        """True if the format fixes which columns share a scale: runs of `group_size` neighbours.

        Its files have no place for the group of each column.
        """
        form = own_form(self.format)
        return form is not None and form.group_size is not None

    @property
    def groups(self) -> str:
        """Name what shares a scale: `g128`, `pc` (a row), `pt` (a linear), `128x128`."""
        if self.group_rows == 1:
            return "pc" if self.group_size == -1 else f"g{self.group_size}"
        if self.group_rows == self.group_size == -1:
            return "pt"
        sides = (self.group_rows, self.group_size)
        return "x".join("all" if side == -1 else str(side) for side in sides)


@dataclass(frozen=True)
class Schemes:
    """The scheme of every linear, by its full name (`blocks.3.mlp.down_proj`).

    overrides: what differs from the base
    skip: linears that stay as they are
    head, embedding: None leaves them in 16 bits
    """

    base: Scheme
    overrides: Mapping[str, Json] = field(default_factory=dict)
    skip: Collection[str] = ()
    head: Scheme | None = None
    embedding: Scheme | None = None

    def of(self, linear: str) -> Scheme | None:
        """Return None for a linear that is not quantized."""
        if linear in self.skip:
            return None
        changes = self.overrides.get(linear)
        return replace(self.base, **changes) if changes else self.base

    @property
    def calibrates_inputs(self) -> bool:
        """True if rounding the inputs of some linears takes numbers that calibration finds."""
        own = (changes.get("act_scales") == CALIBRATED for changes in self.overrides.values())
        return self.base.calibrates_inputs or any(own)
