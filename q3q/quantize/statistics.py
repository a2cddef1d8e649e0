"""Statistics of a site's inputs that methods ask for, accumulated batch by batch.

Sums are taken in lanes, which the ranks of a gang share (`quantize.lanes`).

Shapes: E experts (1 if dense), T tokens, I channels; M matrices: one an expert, or one for all.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.linalg import vector_norm

from q3q.models.anatomy import Computed, SiteInput
from q3q.models.spool import Spool
from q3q.numerics.grouped import GroupedRows, padded_runs, pads_groups
from q3q.numerics.linalg import add_gram, add_grams, add_upper, mirror
from q3q.quantize.lanes import LaneSum, lane_of

# An expert that fewer calibration tokens reach has statistics of noise: it is rounded to nearest.
MIN_EXPERT_TOKENS = 128
# Bytes of experts' Hessians handed out at a time; bounds memory and changes no number.
HESSIAN_BYTES = 2**27


class Statistics(Protocol):
    """An accumulator of one site's inputs."""

    @property
    def tokens_E(self) -> Tensor:
        """Tokens that each expert has read."""

    def update(self, inputs: SiteInput) -> None: ...


def starved_experts(tokens_E: Tensor) -> list[int]:
    """Return the experts that too few tokens reached; none in a dense block, which reads all."""
    few = tokens_E < MIN_EXPERT_TOKENS
    return few.nonzero().flatten().tolist() if len(tokens_E) > 1 else []


@dataclass(frozen=True)
class Hessians:
    """Mean x x^T of some experts, to be factored; one matrix if they all read the same tokens.

    Attributes:
        experts: the experts that the matrices belong to.
        mean_MII: the caller's own, to overwrite at will; the identity for a starved expert, so that
            no column can compensate for another.
        dead_diagonal_M: diagonal entry for a column that no token activates. The official code's
            Hessian is 2 / windows * sum x x^T, and it sets 1; this is that 1 on the mean's scale.
    """

    experts: slice
    mean_MII: Tensor
    dead_diagonal_M: Tensor


class Gram:
    """Sum and mean of x x^T over each expert's tokens, float32: GPTQ's Hessian up to a factor.

    Attributes:
        tokens_E: tokens that each expert has read.
        windows: calibration windows seen.
        shared: all experts read the same tokens, so one matrix serves them all and is stored once.
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
        """Update, and yield each tensor once it is added: lazily made tensors are made once."""
        lane = self.lane(inputs)
        read = inputs.experts[:1] if inputs.shared else inputs.experts
        if isinstance(read, GroupedRows) and pads_groups(read.rows_RI.device):
            self.shared = False
            self._count(len(read), torch.tensor(read.groups.counts))
            columns = read.rows_RI.shape[-1]
            shape = len(read), columns, columns
            sum_MII, fresh = self._sum.accumulator(lane, shape, read.rows_RI.device)
            for run, tokens_nTI in padded_runs(read):
                add_grams(sum_MII[run], tokens_nTI, fresh=fresh)
            yield from read
        else:
            yield from self._feed_one_by_one(inputs, read, lane)
        self.windows += inputs.windows
        self._mirrored = False

    def _feed_one_by_one(
        self, inputs: SiteInput, read: Sequence[Tensor], lane: int
    ) -> Iterator[Tensor]:
        counts = []
        for m, tokens_TI in enumerate(read):
            if m == 0:
                shape = len(read), tokens_TI.shape[-1], tokens_TI.shape[-1]
                sum_MII, fresh = self._sum.accumulator(lane, shape, tokens_TI.device)
            add_gram(sum_MII[m], tokens_TI, fresh=fresh)
            counts.append(len(tokens_TI))
            yield tokens_TI
        self.shared = inputs.shared
        self._count(len(inputs.experts), torch.tensor(counts))

    def _count(self, experts: int, tokens_M: Tensor) -> None:
        if not self.tokens_E.numel():
            self.tokens_E = torch.zeros(experts, dtype=torch.int64)
        self.tokens_E = self.tokens_E + tokens_M

    def first_window(self, inputs: SiteInput) -> int:
        """Return the index among all windows of the next batch's first window."""
        return self.windows if inputs.first_window is None else inputs.first_window

    def lane(self, inputs: SiteInput) -> int:
        return lane_of(self.first_window(inputs), inputs.total_windows)

    def keep_lanes(self) -> None:
        self._sum.separate = True

    def absorb(self, later: "Gram") -> None:
        self._sum.absorb(later._sum)
        if later.tokens_E.numel():
            first = not self.tokens_E.numel()
            self.tokens_E = later.tokens_E if first else self.tokens_E + later.tokens_E
            self.shared = later.shared
        self.windows += later.windows
        self._mirrored = False

    @property
    def sum_EII(self) -> Tensor:
        """The sum over all tokens; if shared, E views of one matrix."""
        sum_MII = self._sum.total()
        if not self._mirrored:
            mirror(sum_MII)
            self._mirrored = True
        return sum_MII.expand(len(self.tokens_E), -1, -1)

    def mean_EII(self, experts: slice = slice(None)) -> Tensor:
        """Return some experts' mean x x^T, zero for an expert without tokens; views if shared."""
        tokens_E = self.tokens_E[experts].clamp(min=1).to(self.sum_EII.device)
        if self.shared:
            return (self.sum_EII[:1] / tokens_E[0]).expand(len(tokens_E), -1, -1)
        return self.sum_EII[experts] / tokens_E[:, None, None]

    def hessians(self, starved: Sequence[int] = ()) -> Iterator[Hessians]:
        """Yield the experts' Hessians, `HESSIAN_BYTES` at a time; a shared one once, for all."""
        experts, _, columns = self.sum_EII.shape
        matrices = 1 if self.shared else experts
        dead_diagonal_E = self.windows / (2 * self.tokens_E.clamp(min=1)).to(self.sum_EII.device)
        count = max(1, HESSIAN_BYTES // (4 * columns**2))
        for first in range(0, matrices, count):
            chunk = slice(first, min(first + count, matrices))
            mean_MII = self.mean_EII(chunk)
            for e in starved:
                if chunk.start <= e < chunk.stop:
                    mean_MII[e - first].zero_().fill_diagonal_(1)
            readers = slice(0, experts) if self.shared else chunk
            yield Hessians(readers, mean_MII, dead_diagonal_E[chunk])

    def rescale(self, scale_EI: Tensor) -> None:
        """Turn these into the statistics of the inputs divided by `scale` per channel."""
        sum_MII = self.sum_EII[:1] if self.shared else self.sum_EII
        for m, scale_I in enumerate(scale_EI[: len(sum_MII)]):
            sum_MII[m] /= scale_I[:, None] * scale_I


class Peak:
    """Largest |x| of each channel, float32: SmoothQuant's activation scales.

    A maximum is the same in any order, so there are no lanes to keep.

    Attributes:
        peak_EI: one row if all experts read one tensor, else one an expert (zero without tokens).
        tokens_E: tokens that each expert has read.
    """

    def __init__(self) -> None:
        self.peak_EI = torch.empty(0)
        self.tokens_E = torch.empty(0)

    def update(self, inputs: SiteInput) -> None:
        read, peaks = inputs.experts, [] if inputs.all_TI is None else [_peak(inputs.all_TI)]
        if isinstance(read, GroupedRows) and (peaks or pads_groups(read.rows_RI.device)):
            counts = read.groups.counts
            if not peaks:
                for _, tokens_nTI in padded_runs(read):
                    peaks += _peak(tokens_nTI).unbind()
        else:
            counts = []
            for tokens_TI in read:
                counts.append(len(tokens_TI))
                if inputs.all_TI is None:
                    peaks.append(_peak(tokens_TI))
        self._merge(torch.tensor(counts), torch.stack(peaks))

    def keep_lanes(self) -> None:
        pass

    def absorb(self, later: "Peak") -> None:
        if later.tokens_E.numel():
            self._merge(later.tokens_E, later.peak_EI)

    def _merge(self, tokens_E: Tensor, peak_EI: Tensor) -> None:
        first = not self.tokens_E.numel()
        self.tokens_E = tokens_E if first else self.tokens_E + tokens_E
        self.peak_EI = peak_EI if first else torch.maximum(self.peak_EI, peak_EI)

    def rescale(self, scale_EI: Tensor) -> None:
        """Turn these into the statistics of the inputs divided by `scale` per channel."""
        self.peak_EI = self.peak_EI / scale_EI


def _peak(tokens_xTI: Tensor) -> Tensor:
    if not tokens_xTI.shape[-2]:
        shape = *tokens_xTI.shape[:-2], tokens_xTI.shape[-1]
        return tokens_xTI.new_zeros(shape, dtype=torch.float32)
    return tokens_xTI.abs().amax(-2).float()


class StoredInputs:
    """A site's inputs, their Gram matrices and mean |x|, for methods that run a piece of the block.

    Holds all calibration tokens at this site in the model's dtype: tokens * channels and, where
    experts are routed to, also each expert's tokens (experts per token times as many). What exceeds
    `bound` lies on disk. If one linear reads them and every expert (or the dense block) reads all
    tokens, their Gram matrix stands for any piece that would be run, and only a sample is held: at
    most experts * twice the sample * channels.

    Args:
        sample_size: evenly spaced tokens of an expert that `samples` returns at least, if it can.

    Attributes:
        sampled: tokens sampled from inputs that are not stored, by expert.
        keeps_windows: store the inputs of each window for `windows`; False for a chunk of experts
            that is not the first, as all chunks have the same.
    """

    keeps_windows = True

    def __init__(self, sample_size: int) -> None:
        self.gram = Gram()
        self.sample_size = sample_size
        self.sampled: dict[int, list[Tensor]] = {}
        self._inputs = Spool()
        # Tokens by expert in each stored input; None for a window that all experts read.
        self._counts: list[list[int] | None] = []
        self._window_tokens = 0
        self._absolute = LaneSum(
            Tensor.add_
        )  # of |x|; one row where all experts read the same tensor
        self._scale_EI: Tensor | None = None  # divides the inputs

    @property
    def tokens_E(self) -> Tensor:
        return self.gram.tokens_E

    def bound(self, memory: int | None, pinned: int = 0) -> None:
        """Set, before the first batch, how many bytes of inputs may lie in memory (None: all).

        Args:
            pinned: bytes of main memory for those of a GPU beyond.
        """
        self._inputs = Spool(memory, pinned=pinned)

    def update(self, inputs: SiteInput) -> None:
        unrouted = inputs.unrouted or len(inputs.experts) == 1
        only_sample = inputs.linears == 1 and unrouted and inputs.total_windows > 0
        first_window, lane = self.gram.first_window(inputs), self.gram.lane(inputs)
        routed, sums = [], []
        read = inputs.experts
        together = isinstance(read, GroupedRows) and pads_groups(read.rows_RI.device)
        for e, tokens_TI in enumerate(self.gram.feed(inputs)):
            if inputs.all_TI is None and not together:
                sums.append(_sum_absolute(tokens_TI))
            if only_sample:
                self._sample(e, tokens_TI, first_window, inputs)
            elif not inputs.shared:
                routed.append(tokens_TI)
        if inputs.all_TI is None and isinstance(read, GroupedRows) and together:
            for _, tokens_nTI in padded_runs(read):
                sums += _sum_absolute(tokens_nTI).unbind()
        if inputs.all_TI is not None:
            sums.append(_sum_absolute(inputs.all_TI))
            self._window_tokens += len(inputs.all_TI)
            if not only_sample and (self.keeps_windows or inputs.shared):
                for window_TI in inputs.all_TI.chunk(inputs.windows):
                    self._store(window_TI, None)
        if routed:
            self._store(torch.cat(routed), list(map(len, routed)))
        sums_EI = torch.stack(sums)
        absolute_EI, fresh = self._absolute.accumulator(lane, sums_EI.shape, sums_EI.device)
        if fresh:
            absolute_EI.copy_(sums_EI)
        else:
            absolute_EI += sums_EI

    def _sample(self, e: int, tokens_TI: Tensor, first_window: int, inputs: SiteInput) -> None:
        """Take every n-th token, counted over all windows of the calibration."""
        tokens = len(tokens_TI)
        stride = self._stride(tokens * inputs.total_windows // inputs.windows)
        earlier = first_window * tokens // inputs.windows
        self.sampled.setdefault(e, []).append(tokens_TI[-earlier % stride :: stride].clone())

    def _store(self, tokens_TI: Tensor, counts: list[int] | None) -> None:
        self._inputs.append(tokens_TI)
        self._counts.append(counts)

    def keep_lanes(self) -> None:
        self.gram.keep_lanes()
        self._absolute.separate = True

    def absorb(self, later: "StoredInputs") -> None:
        self.gram.absorb(later.gram)
        self._absolute.absorb(later._absolute)
        self._window_tokens += later._window_tokens
        self._inputs.take(later._inputs)
        self._counts += later._counts
        for e, sampled in later.sampled.items():
            self.sampled.setdefault(e, []).extend(sampled)

    def windows(self) -> Sequence[Tensor]:
        """Return the windows that all experts read, [T, I] each; some may lie on disk."""
        whole = [i for i, counts in enumerate(self._counts) if counts is None]
        return Computed(whole, self._inputs.__getitem__)

    def _stride(self, tokens: int) -> int:
        return max(1, tokens // self.sample_size)

    def samples(self) -> list[Tensor]:
        """Return evenly spaced tokens of each expert, float32.

        Experts that read the same share one tensor. The inputs, perhaps on disk, are read once.
        """
        sampled_E = [list(self.sampled.get(e, [])) for e in range(len(self.tokens_E))]
        stride_E = [self._stride(tokens) for tokens in self.tokens_E.tolist()]
        start_E = [0] * len(sampled_E)
        readers = [0] if self.gram.shared else range(len(sampled_E))
        for tokens_TI, counts in zip(self._inputs, self._counts, strict=True):
            if (counts is None) != self.gram.shared:
                continue
            parts = tokens_TI.split(counts or [len(tokens_TI)])
            for e, part_TI in zip(readers, parts, strict=True):
                sampled_E[e].append(part_TI[start_E[e] :: stride_E[e]].clone())
                start_E[e] = (start_E[e] - len(part_TI)) % stride_E[e]
        sample_E = [self._rescaled(torch.cat(sampled_E[e]), e) for e in readers]
        return sample_E * len(sampled_E) if self.gram.shared else sample_E

    def _rescaled(self, sample_TI: Tensor, expert: int) -> Tensor:
        if self._scale_EI is not None:
            scale_I = self._scale_EI[expert if len(self._scale_EI) > 1 else 0]
            sample_TI = (sample_TI / scale_I).to(sample_TI.dtype)
        return sample_TI.float()

    def mean_absolute_EI(self) -> Tensor:
        """Return each channel's mean |x|: one row if all experts read the same tensor, else E."""
        windows = self._window_tokens
        tokens_E = torch.tensor([windows]) if windows else self.tokens_E.clamp(min=1)
        absolute_EI = self._absolute.total()
        return absolute_EI / tokens_E.to(absolute_EI.device)[:, None]

    def rescale(self, scale_EI: Tensor) -> None:
        """Turn these into the statistics of the inputs divided by `scale` per channel.

        One row of scales serves all experts.
        """
        self.gram.rescale(scale_EI.expand(len(self.tokens_E), -1))
        self._absolute.total().div_(scale_EI)
        self._scale_EI = scale_EI if self._scale_EI is None else self._scale_EI * scale_EI


def _sum_absolute(tokens_xTI: Tensor) -> Tensor:
    return vector_norm(tokens_xTI, 1, dim=-2, dtype=torch.float32)
