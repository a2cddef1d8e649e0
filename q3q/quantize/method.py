"""The interface that every quantization method implements: three hooks; only the last is required.

A method sees one site or one scale group at a time; the walk deals with loops, devices and memory.

Shapes: E experts (1 in a dense block), O out features of all the site's weights, one below the
other, I in features; T tokens of a window.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from q3q.models.anatomy import ScaleGroup
from q3q.models.spool import Spool
from q3q.numerics.levels import FloatLevels, Levels, levels_of
from q3q.numerics.weights import StoredWeight
from q3q.quantize.methods.settings import MethodSettings
from q3q.quantize.statistics import Statistics, starved_experts
from q3q.spec import Scheme


@dataclass
class SiteTask:
    """One site to quantize.

    weight_EOI: float32
    rows: each weight's rows of it, by name
    statistics: the accumulator that the method's `observe` returned; None if it returned None
    notes: facts for the record (a raised damping, starved experts), which the method adds
    first_expert: index of the first of these experts among all of the site's
    scores: weights whose outputs are multiplied with each other, as queries with keys
    levels: of these rows, where they share scales with others; see `levels_for`
    """

    block: int
    site: str
    weight_EOI: Tensor
    rows: dict[str, slice]
    statistics: Any
    notes: dict[str, Any] = field(default_factory=dict)
    first_expert: int = 0
    scores: tuple[str, ...] = ()
    levels: Levels | None = None

    def levels_for(self, scheme: Scheme) -> Levels:
        """Return what this site's codes stand for."""
        if self.levels is not None:
            return self.levels
        return levels_for(scheme, self.weight_EOI, [rows.stop for rows in self.rows.values()])

    def starved_experts(self) -> list[int]:
        """Return and note the experts that too few calibration tokens reached.

        Every method rounds them to nearest.
        """
        starved = starved_experts(self.statistics.tokens_E)
        if starved:
            self.notes["starved_experts"] = [self.first_expert + e for e in starved]
        return starved

    def note_damping(self, damping_E: Tensor, damping: float) -> None:
        """Note the experts whose Hessian took more damping to factor than the setting says."""
        dampings = enumerate(damping_E.tolist(), start=self.first_expert)
        raised = {e: applied for e, applied in dampings if applied > damping * 1.01}
        if raised:
            self.notes["damping_raised"] = raised


@dataclass
class ScaleTask:
    """One scale group to rebalance.

    weights: the block's original weights, by name
    statistics: as in `SiteTask`
    windows: the site's input, [T, I] per calibration window; may lie on disk
    row: tokens in one row of `run`'s input: a window's in attention, 1 in an MLP
    run: computes the output of the piece of the block that reads the site's input, for rows
        [R, row, I], with some of its weights replaced
    spool: makes a spool for tensors as large as the input
    apply: shifts a scale [E or 1, I] from the producer to its readers
    experts: the experts to find a scale for, where each has its own, and whose statistics these
        are; E is their number
    share: of the tokens, how many each reader of the input reads on average
    most_tokens: so many tokens may run at the same time; None for no limit
    """

    group: ScaleGroup
    weights: Mapping[str, Tensor]
    statistics: Any
    windows: Sequence[Tensor]
    row: int
    run: Callable[[Tensor, Mapping[str, Tensor]], Tensor]
    spool: Callable[[], Spool]
    apply: Callable[[Tensor], None]
    experts: slice = field(default_factory=lambda: slice(None))
    share: float = 1.0
    most_tokens: int | None = None


def levels_for(scheme: Scheme, weight_EOI: Tensor, ends: Sequence[int] = ()) -> Levels:
    """Return what a scheme's codes stand for, with all that these rows share.

    Args:
        ends: the row where each of the linears ends that lie below each other; none for one linear.
    """
    levels = plain_levels(scheme)
    if not isinstance(levels, FloatLevels) or not levels.needs_peaks:
        return levels
    ends = ends or [weight_EOI.shape[1]]
    return levels.of(levels.peaks(weight_EOI, ends))


def plain_levels(scheme: Scheme) -> Levels:
    """Return what a scheme's codes stand for, before it is known what rows share."""
    return levels_of(
        scheme.format,
        scheme.bits,
        scheme.group_size,
        symmetric=scheme.symmetric,
        group_rows=scheme.group_rows,
        four_over_six=scheme.four_over_six,
    )


class Method(ABC):
    """One post-training quantization method.

    settings: its knobs, and what the plan knows of it as well
    passes_on_quantized: the next block is calibrated on the quantized block's outputs; otherwise on
        the original block's
    search_windows: calibration windows that variants are tried on
    """

    settings: MethodSettings
    passes_on_quantized: ClassVar[bool] = True
    search_windows: int = 8

    def __init__(self, settings: MethodSettings) -> None:
        self.settings = settings

    @property
    def sequential(self) -> bool:
        """True if each site is quantized before the next one is observed."""
        return self.settings.sequential

    def variants(self) -> dict[str, "Method"]:
        """Return the method's variants by name; `quantize.search` picks one of them.

        Empty, as here, if there is nothing to search.
        """
        return {}

    def observe(self) -> Statistics | None:
        """Return a fresh accumulator of one site's inputs; None if the method reads no text."""
        return None

    def rebalance(self, task: ScaleTask, scheme: Scheme) -> None:  # noqa: B027  (optional)
        """Shift scale from a producer to its readers; the block's function stays the same."""

    @property
    def rebalances(self) -> bool:
        """True if the method implements `rebalance`."""
        return type(self).rebalance is not Method.rebalance

    @property
    def chunks_experts(self) -> bool:
        """True if a site's experts may be observed and quantized some at a time."""
        return self.settings.takes_chunks()

    def row_step(self, device: torch.device) -> int | None:
        """Return the step in which the ranks of a gang may divide a dense site's rows.

        Given the same statistics, runs of a multiple of so many rows (the last may have fewer) can
        be quantized apart without changing a bit. None: only all rows together.
        """
        return None

    @abstractmethod
    def quantize(self, task: SiteTask, scheme: Scheme) -> StoredWeight:
        """Return the codes of one site's weights; `task.weight_EOI` is not modified."""
