"""One interface to every kind of levels: how a group's grid is chosen, and rounding to it.

A method rounds through `Levels` and so works with every format; whole numbers are one of them.

Shapes: E experts (1 in a dense block), O out features, I in features, G groups, S columns per
group, B blocks of rows that share a scale.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from q3q.errors import ShapeError
from q3q.number_formats import BLOCKS, FLOATS, BlockFormat, NumberFormat
from q3q.numerics.block_grids import (
    divided,
    range_grid,
    range_grid_of_bounds,
    searched_grid,
    stored_grid,
)
from q3q.numerics.block_weights import BlockWeight
from q3q.numerics.float_weights import FloatWeight
from q3q.numerics.floats import (
    e4m3_scale,
    encode,
    float_scale,
    global_factor,
    nearest_,
    power_scale,
    scale_codes,
)
from q3q.numerics.grid import (
    MSE_POWER,
    MSE_SHRINKS,
    MSE_STEPS,
    Grid,
    absmax_grid,
    awq_grid,
    awq_grid_of_range,
    into_groups,
    minmax_grid,
    on_grid,
    to_codes,
)
from q3q.numerics.weights import QuantizedWeight

StoredLevels = QuantizedWeight | FloatWeight | BlockWeight
# The ranges that a search tries, as parts of the largest weight. Of scales that are powers of two
# only four: neighbours of the scale that the format would take.
SHARES = tuple(1 - step / MSE_STEPS for step in range(MSE_SHRINKS))
POWER_SHARES = (1.0, 2.0, 0.5, 0.25)
FOUR_OVER_SIX = (1.0, 1.5)  # scales with which a group's largest weight becomes 6 or 4


class Levels(ABC):
    """The numbers that codes stand for, up to a scale and a zero point per group.

    Grids have the shape of the groups [E, O, G, S], but 1 in the place of S.
    """

    bits: int

    @abstractmethod
    def minmax(self, weight_EOGS: Tensor, *, mse: bool = False) -> Grid:
        """Take the grid that covers each group, as GPTQ and rounding to nearest do.

        Args:
            mse: the range with the least sum of errors to the power 2.4 instead.
        """

    @abstractmethod
    def awq(self, weight_EOGS: Tensor, bounds: tuple[Tensor, Tensor] | None = None) -> Grid:
        """Take AWQ's grid of each group, from its least and largest weight, if not given."""

    @abstractmethod
    def absmax(self, weight_EOGS: Tensor) -> Grid:
        """Take SmoothQuant's grid of each group, even around zero."""

    @abstractmethod
    def on_grid(self, weight: Tensor, grid: Grid) -> Tensor:
        """Round each weight to the nearest point of its grid."""

    @abstractmethod
    def to_codes(self, weight: Tensor, grid: Grid) -> Tensor:
        """Return each weight's nearest code."""

    @abstractmethod
    def stored(self, codes_EOI: Tensor, grid: Grid, group_EI: Tensor | None = None) -> StoredLevels:
        """Return codes, uint8, with their grids [E, O, G] as they are stored."""

    def rounded(self, weight_EOGS: Tensor, grid: Grid) -> StoredLevels:
        """Round each weight to the nearest point of its group's grid."""
        codes_EOI = self.to_codes(weight_EOGS, grid).flatten(2).to(torch.uint8)
        return self.stored(codes_EOI, Grid(grid.scale.squeeze(-1), grid.zero.squeeze(-1)))

    @property
    def fixed(self) -> bool:
        """True if a row's grids depend on other rows, and so are taken before it is rounded."""
        return False

    def of(self, peaks: "RowPeaks") -> "Levels":
        """Return these levels for linears with these largest weights."""
        return self

    def part(self, experts: slice, rows: slice) -> "Levels":
        """Return the levels of some experts' rows."""
        return self

    def as_one_linear(self) -> "Levels":
        """Return the levels of all experts' rows, one below the other, as one linear's."""
        return self


@dataclass(frozen=True)
class IntegerLevels(Levels):
    """Whole numbers 0 to 2**bits - 1, less a zero point."""

    bits: int
    symmetric: bool

    def minmax(self, weight_EOGS: Tensor, *, mse: bool = False) -> Grid:
        return minmax_grid(weight_EOGS, self.bits, symmetric=self.symmetric, mse=mse)

    def awq(self, weight_EOGS: Tensor, bounds: tuple[Tensor, Tensor] | None = None) -> Grid:
        if bounds is not None:
            return awq_grid_of_range(*bounds, self.bits, symmetric=self.symmetric)
        return awq_grid(weight_EOGS, self.bits, symmetric=self.symmetric)

    def absmax(self, weight_EOGS: Tensor) -> Grid:
        return absmax_grid(weight_EOGS, self.bits)

    def on_grid(self, weight: Tensor, grid: Grid) -> Tensor:
        return on_grid(weight, grid, self.bits)

    def to_codes(self, weight: Tensor, grid: Grid) -> Tensor:
        return to_codes(weight, grid, self.bits)

    def stored(self, codes_EOI: Tensor, grid: Grid, group_EI: Tensor | None = None) -> StoredLevels:
        return QuantizedWeight(codes_EOI, *grid, self.bits, self.symmetric, group_EI)


@dataclass(frozen=True)
class RowPeaks:
    """The largest |w| of each column in each block of rows that share a scale.

    columns_EBI: float32
    block_O: each row's block
    linear_B: each block's linear; linears that are run as one share their global factor
    """

    columns_EBI: Tensor
    block_O: Tensor

    @classmethod
    def measured(cls, weight_EOI: Tensor, ends: Iterable[int], block_rows: int) -> "RowPeaks":
        """Measure linears that lie below each other.

        Args:
            ends: the row where each of them ends.
            block_rows: rows that share a scale, -1 for a whole linear; at the end of a linear a
                block may have fewer.
        """
        columns, sizes, start = [], [], 0
        for stop in ends:
            rows = weight_EOI[:, start:stop]
            for block in rows.split(stop - start if block_rows == -1 else block_rows, 1):
                columns.append(torch.maximum(block.amax(1), -block.amin(1)).float())
                sizes.append(block.shape[1])
            start = stop
        block_O = torch.repeat_interleave(torch.tensor(sizes)).to(weight_EOI.device)
        return cls(torch.stack(columns, 1), block_O)

    @classmethod
    def joined(cls, parts: Sequence["RowPeaks"]) -> "RowPeaks":
        """Return the peaks of linears that lie below each other, from those of each."""
        starts = accumulate((part.columns_EBI.shape[1] for part in parts), initial=0)
        blocks = [part.block_O + start for part, start in zip(parts, starts, strict=False)]
        return cls(torch.cat([part.columns_EBI for part in parts], 1), torch.cat(blocks))

    def times(self, scale_EI: Tensor) -> "RowPeaks":
        """Return the peaks of weights whose columns are multiplied by positive numbers."""
        return replace(self, columns_EBI=self.columns_EBI * scale_EI[:, None])

    def ranges(self, group_size: int) -> Tensor:
        """Return the largest |w| of each row's block of groups [E, O, G]."""
        return into_groups(self.columns_EBI, group_size).amax(-1)[:, self.block_O]

    def of_linear(self) -> Tensor:
        """Return the largest |w| of all linears, for each row [E, O]."""
        peak_E1 = self.columns_EBI.amax((1, 2))[:, None]
        return peak_E1.expand(-1, len(self.block_O))


@dataclass(frozen=True)
class FloatLevels(Levels):
    """The numbers of a floating-point format, even around zero.

    group_rows: rows that share a scale; not 1 only where `range_EOG` says what they share
    four_over_six: of E4M3 scales: each group's largest weight becomes 6 or 4, whichever gives the
        smaller squared error (arXiv 2512.02010)
    global_EO: of E4M3 scales: the factor of each row's linear
    range_EOG: the largest |w| of each row's block; None if it is the group's own
    """

    form: NumberFormat
    group_size: int
    group_rows: int = 1
    four_over_six: bool = False
    global_EO: Tensor | None = None
    range_EOG: Tensor | None = None

    @property
    def bits(self) -> int:  # type: ignore[override]
        return self.form.bits

    @property
    def fixed(self) -> bool:
        return self.group_rows != 1

    @property
    def needs_peaks(self) -> bool:
        """True if rows share something, so that `of` must be told their largest weights."""
        return self.fixed or self.form.scale == "e4m3"

    def peaks(self, weight_EOI: Tensor, ends: Iterable[int]) -> RowPeaks:
        """Measure what `of` must be told, of linears that lie below each other.

        Args:
            ends: the row where each of them ends.
        """
        # A factor needs only its linears' largest weights: peaks of each row would be as many
        # numbers as there are weights.
        return RowPeaks.measured(weight_EOI, ends, self.group_rows if self.fixed else -1)

    def of(self, peaks: RowPeaks) -> "FloatLevels":
        factor_EO = None
        if self.form.scale == "e4m3":
            factor_EO = global_factor(
                peaks.of_linear(), self.form, four_over_six=self.four_over_six
            )
        range_EOG = peaks.ranges(self.group_size) if self.fixed else None
        return replace(self, global_EO=factor_EO, range_EOG=range_EOG)

    def part(self, experts: slice, rows: slice) -> "FloatLevels":
        return self._with(lambda tensor: tensor[experts, rows])

    def as_one_linear(self) -> "FloatLevels":
        return self._with(lambda tensor: tensor.flatten(0, 1)[None])

    def _with(self, change: Callable[[Tensor], Tensor]) -> "FloatLevels":
        both = (self.global_EO, self.range_EOG)
        factor, ranges = (None if tensor is None else change(tensor) for tensor in both)
        return replace(self, global_EO=factor, range_EOG=ranges)

    def minmax(self, weight_EOGS: Tensor, *, mse: bool = False) -> Grid:
        largest = weight_EOGS.abs().amax(-1, keepdim=True) if self.range_EOG is None else None
        return self._grid(weight_EOGS, largest, mse=mse)

    def awq(self, weight_EOGS: Tensor, bounds: tuple[Tensor, Tensor] | None = None) -> Grid:
        if bounds is None or self.range_EOG is not None:
            return self.minmax(weight_EOGS)
        return self._grid(weight_EOGS, torch.maximum(-bounds[0], bounds[1]))

    def absmax(self, weight_EOGS: Tensor) -> Grid:
        return self.minmax(weight_EOGS)

    def on_grid(self, weight: Tensor, grid: Grid) -> Tensor:
        return nearest_(weight / grid.scale, self.form).mul_(grid.scale)

    def to_codes(self, weight: Tensor, grid: Grid) -> Tensor:
        return encode(nearest_(weight / grid.scale, self.form), self.form)

    def stored(self, codes_EOI: Tensor, grid: Grid, group_EI: Tensor | None = None) -> FloatWeight:
        scale_EOG = grid.scale.float()
        if self.global_EO is not None:  # what was divided by the factor is an E4M3 number again
            scale_EOG = e4m3_scale(scale_EOG * self.global_EO[..., None])
        stored_EOG = scale_codes(scale_EOG, self.form.scale)
        factor_EO = None if self.global_EO is None else self.global_EO.float()
        return FloatWeight(
            codes_EOI, stored_EOG, self.form.name, self.group_rows, factor_EO, group_EI
        )

    def _grid(self, weight_EOGS: Tensor, largest: Tensor | None, *, mse: bool = False) -> Grid:
        """Take the scale of the largest weight or, of several, that with the least error."""
        if largest is None:
            assert self.range_EOG is not None
            largest = self.range_EOG[..., None]
        shares: tuple[float, ...] = (1.0,)
        if self.four_over_six:
            shares = FOUR_OVER_SIX
        elif mse:
            shares = POWER_SHARES if self.form.scale == "e8m0" else SHARES
        power = 2 if self.four_over_six else MSE_POWER
        best = self._scale(largest, shares[0])
        if len(shares) > 1:
            lowest = torch.full_like(best, torch.inf)
            for share in shares:
                scale = self._scale(largest, share)
                error_EOGS = self.on_grid(weight_EOGS, self._with_scale(scale)).sub_(weight_EOGS)
                cost = error_EOGS.abs_().pow_(power).sum(-1, keepdim=True)
                better = cost < lowest
                lowest, best = torch.where(better, cost, lowest), torch.where(better, scale, best)
        return self._with_scale(best)

    def _with_scale(self, scale: Tensor) -> Grid:
        return Grid(scale, scale.new_zeros(()).expand_as(scale))

    def _scale(self, largest: Tensor, share: float) -> Tensor:
        if self.form.scale == "float":
            return float_scale(largest * share, self.form)
        if self.form.scale == "e8m0":
            return power_scale(largest * share, self.form)
        assert self.global_EO is not None, "E4M3 scales need the linears' largest weights"
        factor = self.global_EO[..., None, None]
        return e4m3_scale(factor * (largest / self.form.largest * share)) / factor


@dataclass(frozen=True)
class BlockLevels(Levels):
    """Whole numbers in GGUF's blocks, whose groups share what their scales are multiples of.

    A grid's `zero` is here the offset, in units of the weights: of a group without a scale the
    offset is all that is left. All groups of a row come together, as their scales are rounded in
    blocks.
    """

    form: BlockFormat

    @property
    def bits(self) -> int:  # type: ignore[override]
        return self.form.bits

    def minmax(self, weight_EOGS: Tensor, *, mse: bool = False) -> Grid:
        return stored_grid(searched_grid(weight_EOGS, self.form), self.form)

    def awq(self, weight_EOGS: Tensor, bounds: tuple[Tensor, Tensor] | None = None) -> Grid:
        if bounds is not None and self.form.offsets:
            return stored_grid(range_grid_of_bounds(*bounds, self.form), self.form)
        return stored_grid(range_grid(weight_EOGS, self.form), self.form)

    def absmax(self, weight_EOGS: Tensor) -> Grid:
        return self.awq(weight_EOGS)

    def on_grid(self, weight: Tensor, grid: Grid) -> Tensor:
        return self._steps(weight, grid).mul_(grid.scale).sub_(grid.zero)

    def to_codes(self, weight: Tensor, grid: Grid) -> Tensor:
        return self._steps(weight, grid).add_(self.form.middle)

    def stored(self, codes_EOI: Tensor, grid: Grid, group_EI: Tensor | None = None) -> BlockWeight:
        if group_EI is not None:
            raise ShapeError(f"groups of {self.form.name} are runs of neighbours")
        codes_EOI = codes_EOI.to(torch.uint8)
        if self.form.groups == 1:
            offset_EOG = grid.zero.half() if self.form.offsets else None
            return BlockWeight(
                codes_EOI, grid.scale.half(), self.form.name, block_offset_EOB=offset_EOG
            )
        shared_EOB, scale_EOG = divided(grid.scale, self.form)
        weight = BlockWeight(codes_EOI, shared_EOB.half(), self.form.name, scale_EOG.to(torch.int8))
        if not self.form.offsets:
            return weight
        shared_EOB, offset_EOG = divided(grid.zero, self.form)
        return replace(
            weight, block_offset_EOB=shared_EOB.half(), offset_EOG=offset_EOG.to(torch.int8)
        )

    def _steps(self, weight: Tensor, grid: Grid) -> Tensor:
        """Return each weight's nearest code less the middle one."""
        # Nothing but the offset is left where the scale is 0: any code will do.
        divisor = grid.scale.masked_fill(grid.scale == 0, torch.inf)
        low, high = -self.form.middle, 2**self.form.bits - 1 - self.form.middle
        return ((weight + grid.zero) / divisor).round_().clamp_(low, high)


def levels_of(
    name: str,
    bits: int,
    group_size: int,
    *,
    symmetric: bool,
    group_rows: int = 1,
    four_over_six: bool = False,
) -> Levels:
    """Return a scheme's levels; what rows share is yet to be measured (`Levels.of`)."""
    if name in BLOCKS:
        return BlockLevels(BLOCKS[name])
    if name not in FLOATS:
        return IntegerLevels(bits, symmetric)
    return FloatLevels(FLOATS[name], group_size, group_rows, four_over_six)
