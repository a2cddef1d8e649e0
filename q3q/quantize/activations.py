"""Calibration activations between two blocks, and the statistics that a rank takes of them.

Shapes: B windows, T tokens of a window, H hidden, I channels of a site's input.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from q3q.errors import ConfigError, NumericsError
from q3q.models.anatomy import Computed, Site, SiteInput
from q3q.models.block import Block, Rope
from q3q.models.decoder import Decoder
from q3q.models.footprint import Device, batch_tokens
from q3q.models.spool import Spool
from q3q.numerics.grouped import GroupedRows
from q3q.numerics.linalg import FiniteCheck
from q3q.quantize.lanes import lane_of, lanes_of
from q3q.quantize.method import Method
from q3q.quantize.statistics import Statistics, StoredInputs
from q3q.team import SOLO, Team

# The part of the memory for activations that those between two blocks may take. The rest is for
# halted runs or, for a method that stores inputs, for its spools inside a block.
HIDDEN_SHARE = 1 / 3
# Spools that such a method fills at the same time: the inputs of qkv, of gate and up, and of routed
# experts' down, and the outputs that a piece's outputs are compared with.
SPOOLS_PER_BLOCK = 4


@dataclass(frozen=True)
class Activations:
    """A block's inputs on this rank: the batches of calibration windows that lie in its lanes.

    hidden: [B, T, H] a batch
    first_windows: each batch's first window, as an index among all windows
    windows: number of windows of all ranks; 0 for a method that observes nothing
    length: tokens of a window
    room: bytes that halted runs, or inputs that a method stores, may take inside a block; None for
        no limit. It changes no bit.
    pinned: bytes of main memory that such inputs may take beyond
    """

    hidden: Spool
    first_windows: Sequence[int] = ()
    windows: int = 0
    length: int = 0
    room: int | None = None
    pinned: int = 0
    team: Team = SOLO

    def number_windows(self, inputs: SiteInput, b: int, windows: int) -> SiteInput:
        """Return batch b's input at a site with the windows that it belongs to."""
        return replace(
            inputs, windows=windows, total_windows=self.windows, first_window=self.first_windows[b]
        )

    def spool(self) -> Spool:
        """Return an empty spool for tensors as large as a site's inputs."""
        return Spool(self._spool_bytes, pinned=self.pinned // SPOOLS_PER_BLOCK)

    @property
    def _spool_bytes(self) -> int | None:
        return None if self.room is None else self.room // SPOOLS_PER_BLOCK

    def _new_statistics(self, method: Method) -> Any:
        statistics = method.observe()
        if isinstance(statistics, StoredInputs):
            statistics.bound(self._spool_bytes, self.pinned // SPOOLS_PER_BLOCK)
        return statistics

    def new_statistics(self, method: Method, experts: slice = slice(0, 0)) -> Statistics | None:
        """Return the method's accumulator for this rank's batches at one site.

        Args:
            experts: the chunk that it is for; the first one's keeps the windows for all.

        Raises:
            ConfigError: ranks cannot share the method's statistics.
        """
        statistics: Statistics | None = self._new_statistics(method)
        if isinstance(statistics, StoredInputs):
            statistics.keeps_windows = experts.start == 0
        if statistics is not None and self.team.size > 1:
            if not hasattr(statistics, "keep_lanes"):
                raise ConfigError(
                    f"{type(method).__name__}'s statistics cannot be taken by several ranks "
                    "together: run it with cluster.gpus_per_trial=1 and cluster.ranks_per_trial=1"
                )
            statistics.keep_lanes()
        return statistics

    def add_up(self, method: Method, statistics: Any, owner: int | None = None) -> Any:
        """Return the sum of all ranks' statistics on the owner, None on the other ranks.

        Args:
            statistics: this rank's; used up.
            owner: None for all ranks.
        """
        if statistics is None or self.team.size == 1:
            return statistics

        def add(total: Any, later: Any) -> Any:
            total = self._new_statistics(method) if total is None else total
            total.absorb(later)
            return total

        return self.team.fold(statistics, add, owner)


def activations_of(model: Decoder, windows_BT: Tensor | None) -> Activations:
    """Return the first block's inputs; None for a method that observes nothing."""
    team = model.team
    if windows_BT is None:
        return Activations(Spool(), team=team)
    windows, length = windows_BT.shape
    device: Device = "cuda" if model.device.type == "cuda" else "cpu"
    dtype = str(model.norm_H.dtype).removeprefix("torch.")
    rows = max(1, batch_tokens(model.facts, dtype, device) // length)
    lanes = lanes_of(team.rank, team.size)
    first_windows = [start for start in range(0, windows, rows) if lane_of(start, windows) in lanes]
    batches = [windows_BT[start : start + rows] for start in first_windows]
    hidden_bytes, room, beyond = None, None, 0
    if model.activations is not None:
        hidden_bytes = int(model.activations * HIDDEN_SHARE)
        tokens = sum(map(len, batches)) * length
        size = tokens * model.facts.hidden * model.norm_H.element_size()
        room = model.activations - min(size, hidden_bytes)
        # Twice, as pieces of pinned memory do not end where tensors do.
        beyond = min(model.pinned, 2 * max(0, size - hidden_bytes))
    hidden = Spool(hidden_bytes, pinned=beyond)
    hidden.extend(model.embed_batches(batches))
    left = model.pinned - beyond
    return Activations(hidden, first_windows, windows, length, room, left, team)


def pass_through(block: Block, hidden: Spool, rope: Rope) -> None:
    """Replace a block's inputs by its outputs."""
    for b in range(len(hidden)):
        hidden[b] = block(hidden[b], rope)


def show_inputs(
    statistics: Statistics | None, site: Site, inputs: SiteInput, experts: slice, check: FiniteCheck
) -> None:
    """Update some experts' statistics with one batch's input at their site.

    Args:
        statistics: None to check the input alone.
        check: notes whether the input is finite; see `refuse_infinite`.
    """
    shown = inputs.experts if len(inputs.experts) == 1 else inputs.experts[experts]
    if inputs.all_TI is not None:
        check.note(inputs.all_TI)
    elif isinstance(shown, GroupedRows):
        check.note(shown.rows_RI)
    else:
        shown = _noted(shown, check)
    if statistics is not None:
        statistics.update(replace(inputs, experts=shown, linears=len(site.weights)))


def refuse_infinite(check: FiniteCheck, site: Site, index: int) -> None:
    """Raise NumericsError if an input that was shown to a block's site was not finite.

    Asked once, after all batches: each question would make a GPU's queue run dry.
    """
    if not check.passed():
        raise NumericsError(f"blocks.{index}.{site.name}: calibration activations are not finite")


def _noted(tensors: Sequence[Tensor], check: FiniteCheck) -> Sequence[Tensor]:
    """Return tensors that are computed when they are read, and noted in a check then."""

    def read(index: int) -> Tensor:
        tensor = tensors[index]
        check.note(tensor)
        return tensor

    return Computed(range(len(tensors)), read)
