"""Calibration activations between two blocks and at a site, in memory or spooled to disk."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from q3q.errors import ConfigError, NumericsError
from q3q.models.anatomy import Site, SiteInput
from q3q.models.decoder import Decoder
from q3q.models.qwen3 import Qwen3Block, Rope, Stages, finish
from q3q.models.spool import Spool
from q3q.numerics.linalg import all_finite
from q3q.quantize.method import Method
from q3q.quantize.statistics import Kept, Statistics, lane_of, lanes_of
from q3q.team import SOLO, Team

# Calibration tokens that go through a block together: on a CPU so few that what lies between two sites stays in cache.
BATCH_TOKENS = {"cpu": 2048, "cuda": 8192}
# Of the memory for activations, the share that is for those between two blocks; the rest is for halted runs.
SPOOL_SHARE = 1 / 3
# Of that rest each of so many has a part, where a method keeps inputs: those of qkv, of gate and up, and of routed
# experts' down, and what is compared with a piece's outputs.
KEPT_AT_ONCE = 4


@dataclass(frozen=True)
class Activations:
    """What flows into a block on this rank, of what flows into it on all: the batches of its lanes.

    hidden: [B, T, H], batch by batch. first: of each batch, the place of its first window among all. windows: of all
    ranks together, 0 for a method that observes nothing. length: tokens of one. room: bytes that runs may hold which
    are halted inside a block, or a method of the inputs that it keeps, None for any; more changes no bit.
    """

    hidden: Spool
    first: Sequence[int] = ()
    windows: int = 0
    length: int = 0
    room: int | None = None
    team: Team = SOLO

    @classmethod
    def of_all(cls, hidden: Spool, room: int | None = None) -> "Activations":
        """All batches, in their order."""
        counts = [len(x_BTH) for x_BTH in hidden]
        length = hidden[0].shape[1] if counts else 0
        return cls(hidden, [sum(counts[:b]) for b in range(len(counts))], sum(counts), length, room)

    def placed(self, inputs: SiteInput, b: int, windows: int) -> SiteInput:
        """What batch b brings, and where it belongs."""
        return replace(inputs, windows=windows, of_windows=self.windows, first_window=self.first[b])

    def spool(self) -> Spool:
        """For what a method keeps at a site that is as large as its inputs."""
        return Spool(self._each)

    @property
    def _each(self) -> int | None:
        return None if self.room is None else self.room // KEPT_AT_ONCE

    def _fresh(self, method: Method) -> Any:
        statistics = method.observe()
        if isinstance(statistics, Kept):
            statistics.bound(self._each)
        return statistics

    def observing(self, method: Method) -> Statistics | None:
        statistics: Statistics | None = self._fresh(method)
        if statistics is not None and self.team.size > 1:
            if not hasattr(statistics, "keep_lanes"):
                raise ConfigError(
                    f"{type(method).__name__}'s statistics cannot be taken by several ranks together: run it with "
                    "cluster.gpus_per_trial=1 and cluster.ranks_per_trial=1"
                )
            statistics.keep_lanes()
        return statistics

    def together(self, method: Method, seen: Any, owner: int | None = None) -> Any:
        """What all ranks saw, on the one that asked for it (None: on all); None where it is not."""
        if seen is None or self.team.size == 1:
            return seen

        def add(total: Any, later: Any) -> Any:
            total = self._fresh(method) if total is None else total
            total.absorb(later)
            return total

        return self.team.along(seen, add, owner)


def activations_of(model: Decoder, windows_BT: Tensor | None) -> Activations:
    """What flows into the first block."""
    team = model.team
    if windows_BT is None:
        return Activations(Spool(), team=team)
    rows = max(1, BATCH_TOKENS.get(model.device.type, BATCH_TOKENS["cpu"]) // windows_BT.shape[1])
    windows, lanes = len(windows_BT), lanes_of(team.rank, team.size)
    first = [start for start in range(0, windows, rows) if lane_of(start, windows) in lanes]
    batches = [windows_BT[start : start + rows] for start in first]
    size = (
        sum(map(len, batches))
        * windows_BT.shape[1]
        * model.facts.hidden
        * model.norm_H.element_size()
    )
    most = None if model.activations is None else int(model.activations * SPOOL_SHARE)
    hidden = Spool(most)
    for x_BTH in model.embedded(batches):
        hidden.append(x_BTH)
    room = (
        None if model.activations is None or most is None else model.activations - min(size, most)
    )
    return Activations(hidden, first, windows, windows_BT.shape[1], room, team)


def pass_through(block: Qwen3Block, hidden: Spool, rope: Rope) -> None:
    for b in range(len(hidden)):
        hidden[b] = block(hidden[b], rope)


class Runs:
    """A block's runs over all batches, halted at a site. As many as `room` holds; the others run anew when they are
    wanted, from the block's input up to the site, through whatever weights are there by then: to the same bits.
    """

    def __init__(self, block: Qwen3Block, share: Activations, rope: Rope) -> None:
        self._block, self._share, self._hidden, self._rope = block, share, share.hidden, rope
        self._halted: list[_Halted] = []
        room, hidden = share.room, share.hidden
        for x_BTH in hidden:
            size = x_BTH.numel() // x_BTH.shape[-1] * block.widest * x_BTH.element_size()
            if room is not None and (room := room - size) < 0:
                break
            self._halted.append(_Halted(block.stages(x_BTH, rope)))

    def at(self, site: Site) -> Iterator[SiteInput]:
        """What each batch brings to the site. Sites are gone through in order; the same one may be asked for again."""
        for b in range(len(self._hidden)):
            if b < len(self._halted):
                halted = self._halted[b]
                halted.move(site)
                assert halted.inputs is not None
                inputs, count = halted.inputs, len(self._hidden[b])
            else:
                x_BTH = self._hidden[b]
                run, count = self._block.stages(x_BTH, self._rope), len(x_BTH)
                inputs = advance_runs(run, site)
            yield self._share.placed(inputs, b, count)

    def finish(self) -> None:
        """Put the block's outputs in the place of its inputs."""
        for b in range(len(self._hidden)):
            if b < len(self._halted):
                self._hidden[b] = self._halted[b].finish()
            else:
                self._hidden[b] = self._block(self._hidden[b], self._rope)


class _Halted:
    """One run, and what it brought to the site where it stands."""

    def __init__(self, run: Stages) -> None:
        self._run = run
        self._at: Site | None = None
        self.inputs: SiteInput | None = None

    def move(self, site: Site) -> None:
        if self._at != site:
            self.inputs = None  # or it would be kept while the run makes the next one
            self._at, self.inputs = site, advance_runs(self._run, site)

    def finish(self) -> Tensor:
        self.inputs = None
        return finish(self._run)


def advance_runs(run: Stages, site: Site) -> SiteInput:
    """Let a run go on until it halts at the site."""
    while True:
        reached, inputs = next(run)
        if reached == site:
            return inputs


def show_inputs(
    statistics: Statistics | None, site: Site, inputs: SiteInput, experts: slice, index: int
) -> None:
    """Show some of a site's experts what one batch brings them. statistics: None if nobody looks."""
    some = inputs.experts if len(inputs.experts) == 1 else inputs.experts[experts]
    # Experts' inputs that are made on the way are checked where they are made.
    checked = some if isinstance(some, list) else []
    for tokens_TI in checked if inputs.whole_TI is None else [inputs.whole_TI]:
        if not all_finite(tokens_TI):
            raise NumericsError(
                f"blocks.{index}.{site.name}: calibration activations are not finite"
            )
    if statistics is not None:
        statistics.update(replace(inputs, experts=some, linears=len(site.weights)))
