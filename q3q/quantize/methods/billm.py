"""BiLLM: one bit a weight, and a second for the columns that matter most.

Huang et al. 2024, arXiv 2402.04291, as Aaronhuang-778/BiLLM codes it. Shapes: E experts (1 in a dense block), O out
features, I in features, C columns of one block, K candidates for the number of salient columns, T thresholds.

Binarizing a set of n numbers leaves each as its set's mean m, plus or minus the mean distance a from it. That takes
n m^2 + n a^2 off their squared error, and so does each further pass on what remains. So a candidate is judged by what
its passes take off, and no candidate's rounded weights are ever formed: the searches need counts, sums and sums of
distances, and of sorted numbers those are differences of running sums.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from q3q.numerics.grid import into_groups
from q3q.numerics.linalg import damped_factor
from q3q.numerics.weights import BinarizedWeight
from q3q.quantize.method import Method, SiteTask
from q3q.quantize.methods.settings import BillmSettings
from q3q.quantize.statistics import Gram
from q3q.spec import Scheme

MOST_SALIENT = 50  # salient columns of a block are the first 1 to 49 of its 50 most salient ones
SHARES = torch.linspace(
    0.10, 0.90, 81, dtype=torch.float64
)  # thresholds tried: these quantiles of |saliency|
CHUNK = {
    "cpu": 2**20,
    "cuda": 2**23,
}  # numbers that a search holds at a time; bounds memory, changes nothing


class Billm(Method):
    """All sites of a block are observed with its original weights; the next block sees the binarized block's outputs.

    The linears of a site share its factor; each searches its own salient columns and thresholds.
    """

    def __init__(self, settings: BillmSettings) -> None:
        self.settings = settings

    def observe(self) -> Gram:
        return Gram()

    def quantize(self, task: SiteTask, scheme: Scheme) -> BinarizedWeight:
        gram: Gram = task.statistics
        solved = [
            billm_round(
                task.weight_EOI[hessians.experts],
                # A starved expert's is the identity: saliency is magnitude, and no column makes up for another's error.
                hessians.mean_MII,
                scheme.group_size,
                linears=task.rows.values(),
                damping=self.settings.damping,
                metric=self.settings.salient_metric,
                dead_diagonal_E=hessians.dead_diagonal_M,
                overwrite_hessian=True,
            )
            for hessians in gram.hessians(task.starved_experts())
        ]
        task.note_damping(torch.cat([part.damping_E for part in solved]), self.settings.damping)
        return _joined([part.weight for part in solved], 0)


@dataclass(frozen=True)
class Solved:
    """The binarized weight, and the damping that each expert's Hessian needed."""

    weight: BinarizedWeight
    damping_E: Tensor


def billm_round(
    weight_EOI: Tensor,
    hessian_EII: Tensor,
    block_size: int,
    *,
    linears: Iterable[slice] = (slice(None),),
    damping: float = 0.01,
    metric: str = "hessian",
    dead_diagonal_E: Tensor | None = None,
    overwrite_hessian: bool = False,
) -> Solved:
    """Algorithm 1 of BiLLM for every expert at once: binarize block by block; later blocks absorb each block's error.

    Args:
        weight_EOI: not modified.
        hessian_EII: mean of x x^T over calibration tokens, up to a positive factor; a single one serves all experts.
        block_size: columns per block; must divide I.
        linears: rows of each linear, which has salient columns and a threshold of its own.
        metric: what the searches look at, w^2 / diag(U)^2 (hessian; U^T U = H^-1) or w itself (magnitude).
        dead_diagonal_E: what the diagonal becomes where no token activates a column: 1 in the official code, on the
            scale of its Hessian. It weighs in the mean that damping is a share of.
        overwrite_hessian: its memory may be used; otherwise it is not modified.

    Raises:
        ShapeError: the block size does not divide I. NumericsError: the Hessian cannot be factored.
    """
    into_groups(weight_EOI, block_size)  # refuses a size that does not divide
    experts = len(weight_EOI)
    hessian_EII = hessian_EII if overwrite_hessian else hessian_EII.clone()
    diagonal_EI = hessian_EII.diagonal(dim1=1, dim2=2)
    dead_EI = diagonal_EI == 0
    weight_EOI = weight_EOI.masked_fill(dead_EI[:, None, :], 0)
    one_E = diagonal_EI.new_ones(len(diagonal_EI)) if dead_diagonal_E is None else dead_diagonal_E
    diagonal_EI.copy_(torch.where(dead_EI, one_E[:, None].to(diagonal_EI), diagonal_EI))
    factor_EII, damping_E = damped_factor(hessian_EII, damping, overwrite=True)
    factor_EII, damping_E = factor_EII.expand(experts, -1, -1), damping_E.expand(experts)

    blocks = []
    for start in range(0, weight_EOI.shape[2], block_size):
        columns = slice(start, start + block_size)
        block_EOC = weight_EOI[:, :, columns]
        pivot_E1C = factor_EII.diagonal(dim1=1, dim2=2)[:, None, columns]
        saliency_EOC = block_EOC.square() / pivot_E1C.square() if metric == "hessian" else block_EOC
        parts = []
        for rows in linears:
            salient_EC = salient_columns(saliency_EOC[:, rows])
            threshold_E = split_threshold(saliency_EOC[:, rows], salient_EC)
            large_EOC = saliency_EOC[:, rows].abs() >= threshold_E[:, None, None]
            parts.append(binarize_block(block_EOC[:, rows], salient_EC, large_EOC))
        blocks.append(_joined(parts, 1))
        # As coded there, a block's columns do not make up for each other: all of it is binarized at once.
        wrong_EOC = (block_EOC - blocks[-1].dequantize()) / pivot_E1C
        weight_EOI[:, :, columns.stop :].baddbmm_(
            wrong_EOC, factor_EII[:, columns, columns.stop :], alpha=-1
        )
    return Solved(_joined(blocks, 2), damping_E)


def _joined(parts: Sequence[BinarizedWeight], axis: int) -> BinarizedWeight:
    """Experts, rows, or blocks of columns, one after the other."""
    return BinarizedWeight(
        torch.cat([part.codes_EOI for part in parts], axis),
        torch.cat([part.mean_EOG4 for part in parts], axis),
        torch.cat([part.scale_EOG4 for part in parts], axis),
    )


def binarize_block(weight_EOC: Tensor, salient_EC: Tensor, large_EOC: Tensor) -> BinarizedWeight:
    """One block of columns, given which are salient and which of the other weights are large."""
    salient_E1C = salient_EC[:, None, :]
    groups = (~salient_E1C & ~large_EOC, ~salient_E1C & large_EOC, salient_E1C.expand_as(large_EOC))
    means, scales, sign_EOC = [], [], torch.zeros_like(large_EOC)
    for mask_EOC in groups:
        mean_EO, scale_EO, above_EOC = binarize(weight_EOC, mask_EOC)
        means.append(mean_EO)
        scales.append(scale_EO)
        sign_EOC |= above_EOC & mask_EOC
    once_EOC = mean_EO[..., None] + torch.where(above_EOC, 1.0, -1.0) * scale_EO[..., None]
    mean_EO, scale_EO, above_EOC = binarize(
        weight_EOC - once_EOC, groups[-1]
    )  # what is left of the salient ones
    second_EOC = torch.where(salient_E1C, above_EOC, large_EOC)
    codes_EOC = sign_EOC + 2 * second_EOC + BinarizedWeight.SALIENT * salient_E1C
    mean_EO4, scale_EO4 = torch.stack([*means, mean_EO], -1), torch.stack([*scales, scale_EO], -1)
    return BinarizedWeight(codes_EOC.to(torch.uint8), mean_EO4[:, :, None], scale_EO4[:, :, None])


def binarize(x_EOC: Tensor, mask_EOC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's masked numbers by their mean and mean distance from it (0 of none), and which of them lie above.

    The official code gives a number that equals the mean the sign 0; one bit has no third value, so it counts as above.
    """
    count_EO = mask_EOC.sum(-1).clamp(min=1)
    mean_EO = (x_EOC * mask_EOC).sum(-1) / count_EO
    centered_EOC = x_EOC - mean_EO[..., None]
    scale_EO = (centered_EOC.abs() * mask_EOC).sum(-1) / count_EO
    return mean_EO, scale_EO, centered_EOC >= 0


def salient_columns(saliency_EOC: Tensor) -> Tensor:
    """Which columns are binarized twice, bool [E, C]: the first k by column sum, for the k that costs least.

    A candidate's cost is the squared error of binarizing `saliency` itself, twice within the k columns and twice within
    the others; k is 1 to 49, less in a block of fewer columns.
    """
    experts, _, columns = saliency_EOC.shape
    limit = min(MOST_SALIENT, columns)
    order_EC = saliency_EOC.abs().sum(1).argsort(dim=1, descending=True, stable=True)
    ordered_EOC = saliency_EOC.gather(2, order_EC[:, None, :].expand_as(saliency_EOC))
    chunk = max(1, CHUNK[saliency_EOC.device.type] // (experts * limit * limit))
    taken_EK = torch.stack(
        [_taken_by_columns(part, limit).sum(1) for part in ordered_EOC.split(chunk, 1)]
    ).sum(0)
    count_E1 = taken_EK.argmax(1, keepdim=True) + 1
    first_C = torch.arange(columns, device=order_EC.device)
    return torch.zeros_like(order_EC, dtype=torch.bool).scatter_(1, order_EC, first_C < count_E1)


def _taken_by_columns(x_EOC: Tensor, limit: int) -> Tensor:
    """Squared error that two passes take off each row [E, O, K]; k = 1 .. limit - 1 leading columns, and the others."""
    columns = x_EOC.shape[-1]
    k_K = torch.arange(1, limit, device=x_EOC.device)
    inside_KL = k_K[:, None] > torch.arange(limit, device=x_EOC.device)
    # Only these columns change sides; the others are always among the rest, and looked up.
    leading_EO1L, others = x_EOC[..., None, :limit], SortedRows(x_EOC[..., limit:])

    def of_each_side(x_EOKL: Tensor, more_EOK: Tensor) -> Tensor:
        """Sums over both sides [2, E, O, K]."""
        within_EOK = (x_EOKL * inside_KL).sum(-1)
        return torch.stack([within_EOK, x_EOKL.sum(-1) - within_EOK + more_EOK]).double()

    def per_number(value_2EOK: Tensor) -> Tensor:
        """The value of the side that each number is on [E, O, K, L]."""
        inside_EOK, outside_EOK = value_2EOK.to(x_EOC.dtype)
        return torch.where(inside_KL, inside_EOK[..., None], outside_EOK[..., None])

    count_2K = torch.stack([k_K, columns - k_K]).double()[:, None, None, :]
    inside_EOK = x_EOC.double().cumsum(-1)[..., : limit - 1]
    mean_2EOK = (
        torch.stack([inside_EOK, x_EOC.double().sum(-1, keepdim=True) - inside_EOK]) / count_2K
    )
    outside_EOK = mean_2EOK[1]
    centered_EOKL = leading_EO1L - per_number(mean_2EOK)
    above_EOKL = centered_EOKL > 0
    split_EOK = others.below(outside_EOK)
    scale_2EOK = (
        of_each_side(centered_EOKL.abs(), others.distance(others.first, others.count, outside_EOK))
        / count_2K
    )
    above_2EOK = of_each_side(above_EOKL, others.count - split_EOK)

    # What remains is (x - mean) -+ scale, whose mean follows from how many numbers lie above.
    mean2_2EOK = scale_2EOK * (1 - 2 * above_2EOK / count_2K)
    shift_EOKL = torch.where(
        above_EOKL, per_number(scale_2EOK + mean2_2EOK), per_number(mean2_2EOK - scale_2EOK)
    )
    upper_EOK, lower_EOK = (outside_EOK + mean2_2EOK[1] + sign * scale_2EOK[1] for sign in (1, -1))
    distance_EOK = others.distance(others.first, split_EOK, lower_EOK)
    distance_EOK += others.distance(split_EOK, others.count, upper_EOK)
    scale2_2EOK = of_each_side((centered_EOKL - shift_EOKL).abs(), distance_EOK) / count_2K
    passes = (mean_2EOK, scale_2EOK, mean2_2EOK, scale2_2EOK)
    return (count_2K * sum(number.square() for number in passes)).sum(0)


def split_threshold(saliency_EOC: Tensor, salient_EC: Tensor) -> Tensor:
    """Below which |saliency| a weight that is not salient is small [E]: the quantile that costs least.

    A candidate's cost is the squared error of binarizing `saliency` itself, once among the small, once among the large.
    """
    experts, _, columns = saliency_EOC.shape
    rest_EOC = saliency_EOC.masked_fill(salient_EC[:, None, :], 0)
    threshold_ET = _quantiles(rest_EOC.abs().flatten(1))
    taken = []
    for part_EOC in saliency_EOC.split(
        max(1, CHUNK[saliency_EOC.device.type] // (experts * columns)), 1
    ):
        numbers = SortedRows(part_EOC, salient_EC[:, None, :].expand_as(part_EOC))
        threshold_EOT = (
            threshold_ET[:, None, :].expand(-1, part_EOC.shape[1], -1).double().contiguous()
        )
        start_EOT = numbers.below(-threshold_EOT, equal=True)  # the small are those from here on,
        stop_EOT = torch.maximum(numbers.below(threshold_EOT), start_EOT)  # to here
        first, end = numbers.first.expand_as(start_EOT), numbers.count.expand_as(start_EOT)
        small_EOT, small_sum_EOT = stop_EOT - start_EOT, numbers.sum(start_EOT, stop_EOT)
        large_EOT, large_sum_EOT = end - small_EOT, numbers.sum(first, end) - small_sum_EOT
        mean_EOT = small_sum_EOT / small_EOT.clamp(min=1)
        scale_EOT = numbers.distance(start_EOT, stop_EOT, mean_EOT) / small_EOT.clamp(min=1)
        taken_EOT = small_EOT * (mean_EOT.square() + scale_EOT.square())
        mean_EOT = large_sum_EOT / large_EOT.clamp(min=1)
        distance_EOT = numbers.distance(first, end, mean_EOT) - numbers.distance(
            start_EOT, stop_EOT, mean_EOT
        )
        scale_EOT = distance_EOT / large_EOT.clamp(min=1)
        taken_EOT += large_EOT * (mean_EOT.square() + scale_EOT.square())
        taken.append(taken_EOT.sum(1))
    best_E1 = torch.stack(taken).sum(0).argmax(1, keepdim=True)
    return threshold_ET.gather(1, best_E1).squeeze(1)


def _quantiles(x_EN: Tensor) -> Tensor:
    """numpy.quantile at SHARES: between two neighbours in order, in proportion [E, T]."""
    sorted_EN = x_EN.sort(1).values
    place_T = SHARES.to(x_EN.device) * (x_EN.shape[1] - 1)
    low_ET, high_ET = sorted_EN[:, place_T.floor().long()], sorted_EN[:, place_T.ceil().long()]
    return torch.lerp(low_ET, high_ET, place_T.frac().to(x_EN.dtype))


class SortedRows:
    """Rows of numbers in ascending order with running sums (float64), for sums over any stretch of a row.

    left_out: numbers that take no part. first, count: the places [E, O, 1] where a row's numbers begin and end.
    """

    def __init__(self, x_EOC: Tensor, left_out_EOC: Tensor | None = None) -> None:
        left_out = (
            torch.zeros_like(x_EOC, dtype=torch.bool) if left_out_EOC is None else left_out_EOC
        )
        self.sorted_EOC = x_EOC.masked_fill(left_out, torch.inf).sort(-1).values.double()
        sums_EOC = self.sorted_EOC.masked_fill(self.sorted_EOC == torch.inf, 0).cumsum(-1)
        self.sums_EON = torch.nn.functional.pad(sums_EOC, (1, 0))
        self.count = (~left_out).sum(-1, keepdim=True)
        self.first = torch.zeros_like(self.count)

    def below(self, limit_EOT: Tensor, *, equal: bool = False) -> Tensor:
        """How many numbers of the row lie below each limit, or at it."""
        return torch.searchsorted(self.sorted_EOC, limit_EOT, right=equal)

    def sum(self, start_EOT: Tensor, stop_EOT: Tensor) -> Tensor:
        """Of the numbers from place `start` to before `stop`."""
        return self.sums_EON.gather(-1, stop_EOT) - self.sums_EON.gather(-1, start_EOT)

    def distance(self, start: Tensor, stop: Tensor, center_EOT: Tensor) -> Tensor:
        """Sum of |x - center| over the numbers from place `start` to before `stop`."""
        start_EOT, stop_EOT = start.expand_as(center_EOT), stop.expand_as(center_EOT)
        middle_EOT = self.below(center_EOT).clamp(start_EOT, stop_EOT)
        upper_EOT = self.sum(middle_EOT, stop_EOT) - center_EOT * (stop_EOT - middle_EOT)
        return upper_EOT - (self.sum(start_EOT, middle_EOT) - center_EOT * (middle_EOT - start_EOT))
