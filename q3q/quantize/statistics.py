"""What methods keep of a site's inputs, fed batch by batch, by one process or by the ranks of a gang.

Sums over calibration tokens are defined so that the number of ranks changes no bit of them. The calibration windows lie
in `LANES` lanes by their place alone (`lane_of`; a batch in that of its first window). Each lane sums its batches in
order; the total is lane 0 + lane 1 + ... in order. In a gang of any size, rank r is shown the batches of `lanes_of(r,
ranks)`, a run of lanes, with `SiteInput.first_window` set, the batches being those that one process would make:

    mine = method.observe()
    mine.keep_lanes()          # before the first batch
    mine.update(...)           # my lanes' batches, in order; perhaps none
    total = method.observe()
    for rank in range(ranks):  # in this order; a part is plain tensors and numbers and can be pickled
        total.absorb(mine if rank == me else received_from(rank))

Every rank that does so has what one process has that saw all. Or in a chain, which sends one matrix a hop in place of
all lanes: rank 0 absorbs its own part and hands `total` to rank 1, which absorbs its own, and so on; the last rank has
the whole. A part is used up by being absorbed.

Shapes: E experts (1 in a dense block), T tokens, I channels; M matrices: one an expert, or one for all.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, Self, overload

import torch
from torch import Tensor
from torch.linalg import vector_norm

from q3q.models.anatomy import SiteInput
from q3q.models.spool import Spool
from q3q.numerics.linalg import add_gram, add_upper, mirror

# An expert that fewer calibration tokens reached is rounded to nearest (its statistics would be noise) and named.
MIN_EXPERT_TOKENS = 128
# Sums over calibration windows are taken in so many parts, whoever takes them: the most ranks that can share a sum.
LANES = 8
# Experts' Hessians are handed out to be factored in chunks of so many bytes; bounds memory, changes nothing.
HESSIAN_BYTES = 2**27


class Statistics(Protocol):
    """An accumulator of one site's inputs; tokens_E: how many tokens each expert has seen."""

    @property
    def tokens_E(self) -> Tensor: ...

    def update(self, inputs: SiteInput) -> None: ...


class LaneStatistics(Statistics, Protocol):
    """Statistics that the ranks of a gang can take together, as this module's docstring says."""

    def keep_lanes(self) -> None:
        """Keep each lane's sum by itself, so that another rank can add it at its place."""
        ...

    def absorb(self, later: Self) -> None:
        """Take over what another rank saw, whose lanes all come after those absorbed so far; `later` is used up.

        Raises:
            ValueError: its lanes do not come later.
        """
        ...


def lane_of(window: int, windows: int) -> int:
    """The lane of a window by its place among all; with an unknown number of them (0) there is one lane."""
    return window * LANES // windows if windows else 0


def lanes_of(rank: int, ranks: int) -> range:
    """The lanes that one of several ranks sees; none for some, where there are more ranks than lanes."""
    return range(rank * LANES // ranks, (rank + 1) * LANES // ranks)


def starved_experts(tokens_E: Tensor) -> list[int]:
    """The experts that too few tokens reached; none in a dense block, whose tokens are as many as were asked for."""
    if len(tokens_E) == 1:
        return []
    return [e for e, tokens in enumerate(tokens_E.tolist()) if tokens < MIN_EXPERT_TOKENS]


class LaneSum:
    """A sum of tensors over lanes, in order. One process holds two of them at most: the total, and the current lane.

    add: adds its second argument to its first. lanes: what is not in the total yet, by lane: the current one or, where
    they are kept apart, all.
    """

    def __init__(self, add: Callable[[Tensor, Tensor], None]) -> None:
        self.lanes: dict[int, Tensor] = {}
        self.apart = False
        self._add = add
        self._total: Tensor | None = None
        self._last = 0  # no lane before it can be added any more
        self._spare: Tensor | None = None

    def of(self, lane: int, shape: Sequence[int], device: torch.device) -> tuple[Tensor, bool]:
        """The tensor that a batch of this lane is to be added to, and whether it is fresh, to be overwritten."""
        if lane in self.lanes:
            return self.lanes[lane], False
        if lane < max(self.lanes, default=self._last):
            raise ValueError(
                f"a batch of lane {lane} came after one of a later lane; show windows in order"
            )
        if not self.apart:
            self._add_up()
        self.lanes[lane] = (
            torch.zeros(*shape, device=device) if self._spare is None else self._spare
        )
        self._spare = None
        return self.lanes[lane], True

    def total(self) -> Tensor:
        """The sum of all lanes, itself and not a copy; to be read when all batches have been seen."""
        self._add_up()
        self._spare = None
        return torch.empty(0) if self._total is None else self._total

    def absorb(self, later: "LaneSum") -> None:
        """Add the lanes of another, or begin with its total; it is left without."""
        self._add_up()
        self._spare = None
        if self._total is None:
            self._total, self._last, later._total = later._total, later._last, None
        if later._total is not None or min(later.lanes, default=LANES) < self._last:
            raise ValueError("parts of a sum are absorbed in the order of their lanes")
        for lane in sorted(later.lanes):
            self.lanes[lane] = later.lanes.pop(lane)
            self._add_up()
            self._spare = None

    def _add_up(self) -> None:
        for lane in sorted(self.lanes):
            part = self.lanes.pop(lane)
            self._last = lane
            if self._total is None:
                self._total = part
            else:
                self._add(self._total, part)
                self._spare = part


@dataclass(frozen=True)
class Hessians:
    """Mean x x^T of some experts, to be factored; one matrix where they all read the same tokens.

    mean_MII: made for whoever asked, who may overwrite it; the identity for a starved expert, so that no column can
    make up for another. dead_diagonal_M: what the official code makes the diagonal where no token activates a column,
    on this mean's scale: its Hessian is 2 / windows * sum x x^T, and it takes 1.
    """

    experts: slice
    mean_MII: Tensor
    dead_diagonal_M: Tensor


class Gram:
    """Sum and mean of x x^T over each expert's tokens, float32: GPTQ's Hessian up to a factor.

    tokens_E: how many tokens each expert has seen. windows: in how many calibration windows they came.
    shared: all experts read the same tokens, so that one matrix serves them all and is kept once.
    """

    def __init__(self) -> None:
        self.tokens_E = torch.empty(0)
        self.windows = 0
        self.shared = True
        self._sum = LaneSum(add_upper)
        self._mirrored = True

    def update(self, inputs: SiteInput) -> None:
        for _ in self.feed(inputs):
            pass

    def feed(self, inputs: SiteInput) -> Iterator[Tensor]:
        """`update`, which hands out each tensor that it reads: one that is made on the way is made once."""
        lane = self.lane(inputs)
        read = inputs.experts[:1] if inputs.shared else inputs.experts
        for m, tokens_TI in enumerate(read):
            if m == 0:
                columns = tokens_TI.shape[-1]
                sum_MII, fresh = self._sum.of(lane, (len(read), columns, columns), tokens_TI.device)
            if not self.tokens_E.numel():
                self.shared = inputs.shared
                self.tokens_E = torch.zeros(len(inputs.experts), dtype=torch.int64)
            add_gram(sum_MII[m], tokens_TI.float(), fresh=fresh)
            if inputs.shared:
                self.tokens_E += len(tokens_TI)
            else:
                self.tokens_E[m] += len(tokens_TI)
            yield tokens_TI
        self.windows += inputs.windows
        self._mirrored = False

    def place(self, inputs: SiteInput) -> int:
        """Of a batch that comes next: the place of its first window among all."""
        return self.windows if inputs.first_window is None else inputs.first_window

    def lane(self, inputs: SiteInput) -> int:
        return lane_of(self.place(inputs), inputs.of_windows)

    def keep_lanes(self) -> None:
        self._sum.apart = True

    def absorb(self, later: "Gram") -> None:
        self._sum.absorb(later._sum)
        if later.tokens_E.numel():
            self.tokens_E = (
                self.tokens_E + later.tokens_E if self.tokens_E.numel() else later.tokens_E
            )
            self.shared = later.shared
        self.windows += later.windows
        self._mirrored = False

    @property
    def sum_EII(self) -> Tensor:
        """The sum of all; where it is shared, E views of one matrix."""
        sum_MII = self._sum.total()
        if not self._mirrored:
            mirror(sum_MII)
            self._mirrored = True
        return sum_MII.expand(len(self.tokens_E), -1, -1)

    def mean_EII(self, experts: slice = slice(None)) -> Tensor:
        """The mean of some experts' x x^T, zero for one that saw nothing; where it is shared, views of one matrix."""
        tokens_E = self.tokens_E[experts].clamp(min=1).to(self.sum_EII.device)
        if self.shared:
            return (self.sum_EII[:1] / tokens_E[0]).expand(len(tokens_E), -1, -1)
        return self.sum_EII[experts] / tokens_E[:, None, None]

    def hessians(self, starved: Sequence[int] = ()) -> Iterator[Hessians]:
        """The experts' Hessians, as many at a time as `HESSIAN_BYTES` hold; a shared one once, for all of them."""
        experts, _, columns = self.sum_EII.shape
        matrices = 1 if self.shared else experts
        dead_diagonal_E = self.windows / (2 * self.tokens_E.clamp(min=1)).to(self.sum_EII.device)
        chunk = max(1, HESSIAN_BYTES // (4 * columns**2))
        for first in range(0, matrices, chunk):
            some = slice(first, min(first + chunk, matrices))
            mean_MII = self.mean_EII(some)
            for e in starved:
                if some.start <= e < some.stop:
                    mean_MII[e - first].zero_().fill_diagonal_(1)
            yield Hessians(
                slice(0, experts) if self.shared else some, mean_MII, dead_diagonal_E[some]
            )

    def rescale(self, scale_EI: Tensor) -> None:
        """Make it the statistics of inputs divided by `scale` per channel."""
        sum_MII = self.sum_EII[:1] if self.shared else self.sum_EII
        for m, scale_I in enumerate(scale_EI[: len(sum_MII)]):
            sum_MII[m] /= scale_I[:, None] * scale_I


class Peak:
    """Largest |x| of each channel, float32: SmoothQuant's activation scales. A maximum is the same in any order.

    peak_EI: one row where all experts read the same tensor, else a row an expert, zero for one that saw no token.
    """

    def __init__(self) -> None:
        self.peak_EI = torch.empty(0)
        self.tokens_E = torch.empty(0)

    def update(self, inputs: SiteInput) -> None:
        counts, peaks = [], [] if inputs.whole_TI is None else [_peak(inputs.whole_TI)]
        for tokens_TI in inputs.experts:
            counts.append(len(tokens_TI))
            if inputs.whole_TI is None:
                peaks.append(_peak(tokens_TI))
        self._take(torch.tensor(counts), torch.stack(peaks))

    def keep_lanes(self) -> None:
        pass

    def absorb(self, later: "Peak") -> None:
        if later.tokens_E.numel():
            self._take(later.tokens_E, later.peak_EI)

    def _take(self, tokens_E: Tensor, peak_EI: Tensor) -> None:
        first = not self.tokens_E.numel()
        self.tokens_E = tokens_E if first else self.tokens_E + tokens_E
        self.peak_EI = peak_EI if first else torch.maximum(self.peak_EI, peak_EI)

    def rescale(self, scale_EI: Tensor) -> None:
        """Make it the statistics of inputs divided by `scale` per channel."""
        self.peak_EI = self.peak_EI / scale_EI


def _peak(tokens_TI: Tensor) -> Tensor:
    if not len(tokens_TI):
        return tokens_TI.new_zeros(tokens_TI.shape[-1], dtype=torch.float32)
    return tokens_TI.abs().amax(0).float()


class Kept:
    """A site's inputs as they came, for methods that run a piece of the block; their Gram matrices; mean |x|.

    Holds what the calibration tokens take at this site, in the model's dtype: tokens * channels, where experts are
    routed to also the tokens of each expert (experts per token times that much); beyond what `bound` allows, on disk.
    Where one linear reads them and every expert (or the dense block) reads all tokens, no piece is run that its Gram
    matrix cannot stand for, and only the sample is held: experts * twice the sample * channels at most.

    sample: evenly spaced tokens of each expert that `samples` gives, about so many (at least; at most all). taken: of
    what is not held whole, by expert.
    """

    def __init__(self, sample: int) -> None:
        self.gram = Gram()
        self.sample = sample
        self.taken: dict[int, list[Tensor]] = {}
        self._inputs = Spool()
        self._counts: list[
            list[int] | None
        ] = []  # of each of them: tokens by expert; None of a window that all read
        self._whole_tokens = 0
        self._absolute = LaneSum(_add)  # of |x|; one row where all experts read the same tensor
        self._scale_EI: Tensor | None = None  # what the inputs are to be divided by

    @property
    def tokens_E(self) -> Tensor:
        return self.gram.tokens_E

    def bound(self, memory: int | None) -> None:
        """Before the first batch: how many bytes of inputs may be in memory, None for all."""
        self._inputs = Spool(memory)

    def update(self, inputs: SiteInput) -> None:
        unrouted = inputs.unrouted or len(inputs.experts) == 1
        sampled = inputs.linears == 1 and unrouted and inputs.of_windows > 0
        place, lane = self.gram.place(inputs), self.gram.lane(inputs)
        sums = [] if inputs.whole_TI is None else [_sum_absolute(inputs.whole_TI)]
        apart = []  # what experts read, if that is not the whole
        for e, tokens_TI in enumerate(self.gram.feed(inputs)):
            if inputs.whole_TI is None:
                sums.append(_sum_absolute(tokens_TI))
            if sampled:
                stride = self._stride(len(tokens_TI) * inputs.of_windows // inputs.windows)
                before = place * len(tokens_TI) // inputs.windows
                self.taken.setdefault(e, []).append(tokens_TI[-before % stride :: stride].clone())
            elif not inputs.shared:
                apart.append(tokens_TI)
        if inputs.whole_TI is not None:
            self._whole_tokens += len(inputs.whole_TI)
            for window_TI in () if sampled else inputs.whole_TI.chunk(inputs.windows):
                self._keep(window_TI, None)
        if apart:
            self._keep(torch.cat(apart), list(map(len, apart)))
        sums_EI = torch.stack(sums)
        absolute_EI, fresh = self._absolute.of(lane, sums_EI.shape, sums_EI.device)
        if fresh:
            absolute_EI.copy_(sums_EI)
        else:
            absolute_EI += sums_EI

    def _keep(self, tokens_TI: Tensor, counts: list[int] | None) -> None:
        self._inputs.append(tokens_TI)
        self._counts.append(counts)

    def keep_lanes(self) -> None:
        self.gram.keep_lanes()
        self._absolute.apart = True

    def absorb(self, later: "Kept") -> None:
        self.gram.absorb(later.gram)
        self._absolute.absorb(later._absolute)
        self._whole_tokens += later._whole_tokens
        self._inputs.take(later._inputs)
        self._counts += later._counts
        for e, taken in later.taken.items():
            self.taken.setdefault(e, []).extend(taken)

    def windows(self) -> "Windows":
        """What all experts read, as it came."""
        return Windows(self._inputs, [i for i, counts in enumerate(self._counts) if counts is None])

    def _stride(self, tokens: int) -> int:
        return max(1, tokens // self.sample)

    def samples(self) -> list[Tensor]:
        """Of each expert, evenly spaced tokens of those that it reads, float32; one tensor for all that read the same.

        The inputs are gone through once: they may lie on disk.
        """
        taken_E: list[list[Tensor]] = [
            list(self.taken.get(e, [])) for e in range(len(self.tokens_E))
        ]
        some = [0] if self.gram.shared else range(len(taken_E))
        stride_E, start_E = (
            [self._stride(tokens) for tokens in self.tokens_E.tolist()],
            [0] * len(taken_E),
        )
        for tokens_TI, counts in zip(self._inputs, self._counts, strict=True):
            if (counts is None) != self.gram.shared:
                continue
            for e, read_TI in zip(some, tokens_TI.split(counts or [len(tokens_TI)]), strict=True):
                taken_E[e].append(read_TI[start_E[e] :: stride_E[e]].clone())
                start_E[e] = (start_E[e] - len(read_TI)) % stride_E[e]
        sample_E = [self._rescaled(torch.cat(taken_E[e]), e) for e in some]
        return sample_E * len(taken_E) if self.gram.shared else sample_E

    def _rescaled(self, sample_TI: Tensor, expert: int) -> Tensor:
        if self._scale_EI is not None:
            sample_TI = (sample_TI / self._scale_EI[expert if len(self._scale_EI) > 1 else 0]).to(
                sample_TI.dtype
            )
        return sample_TI.float()

    def mean_absolute_EI(self) -> Tensor:
        """Mean |x| of each channel; one row where all experts read the same tensor, else a row an expert."""
        tokens_E = (
            torch.tensor([self._whole_tokens]) if self._whole_tokens else self.tokens_E.clamp(min=1)
        )
        absolute_EI = self._absolute.total()
        return absolute_EI / tokens_E.to(absolute_EI.device)[:, None]

    def rescale(self, scale_EI: Tensor) -> None:
        """Make it the statistics of inputs divided by `scale` per channel (one row: the same for all)."""
        self.gram.rescale(scale_EI.expand(len(self.tokens_E), -1))
        self._absolute.total().div_(scale_EI)
        self._scale_EI = scale_EI if self._scale_EI is None else self._scale_EI * scale_EI


class Windows(Sequence[Tensor]):
    """Calibration windows at a site, [T, I] each, some of them perhaps on disk."""

    def __init__(self, spool: Spool, places: Sequence[int]) -> None:
        self._spool, self._places = spool, places

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, window: int) -> Tensor: ...

    @overload
    def __getitem__(self, window: slice) -> "Windows": ...

    def __getitem__(self, window: int | slice) -> "Tensor | Windows":
        if isinstance(window, slice):
            return Windows(self._spool, self._places[window])
        return self._spool[self._places[window]]


def _sum_absolute(tokens_TI: Tensor) -> Tensor:
    return vector_norm(tokens_TI, 1, dim=0, dtype=torch.float32)


def _add(total: Tensor, part: Tensor) -> None:
    total += part
