"""BiLLM: one bit a weight, and a second for the columns that matter most.

Huang et al. 2024, arXiv 2402.04291, as Aaronhuang-778/BiLLM codes it. Shapes: E experts (1 in a
dense block), O out features, I in features, C columns of one block, K candidates for the number of
salient columns, T thresholds.

Binarizing n numbers replaces each by their mean m plus or minus their mean distance a from it. This
reduces the sum of their squared errors by n m^2 + n a^2, and each further pass on the remainder
does the same. So the fast searches rank candidates by these reductions and never form a candidate's
rounded weights: they need counts, sums, and sums of distances, which are differences of running
sums once the numbers are sorted.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from q3q.numerics.binary_weights import BinarizedWeight
from q3q.numerics.grid import into_groups
from q3q.numerics.weights import concatenate_experts
from q3q.quantize.method import Method, SiteTask
from q3q.quantize.methods.gptq import factored_columns
from q3q.quantize.methods.settings import BillmSettings
from q3q.quantize.statistics import Gram
from q3q.spec import Scheme

MOST_SALIENT = 50  # salient columns of a block are the first 1 to 49 of its 50 most salient ones
# Thresholds to try: these quantiles of |saliency|.
SHARES = torch.linspace(0.10, 0.90, 81, dtype=torch.float64)
# Numbers that a search holds at a time; bounds memory, changes nothing.
CHUNK = {"cpu": 2**20, "cuda": 2**23}


def billm_round_plain(
    weight_OI: Tensor,
    hessian_II: Tensor,
    block_size: int,
    *,
    damping: float = 0.01,
    metric: str = "hessian",
    dead_diagonal: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Binarize one linear by Algorithm 1 of BiLLM (arXiv 2402.04291), in the arguments' dtype.

    The plain algorithm, with its searches one candidate at a time (`plain_*` are the functions of
    Algorithm 2): tests compare `billm_round`, which trials run, with it.

    Returns:
        The binarized weight [O, I], and which columns are salient, bool [I].
    """
    weight_OI, hessian_II = weight_OI.clone(), hessian_II.clone()
    dead_I = hessian_II.diagonal() == 0  # no token activates these columns
    hessian_II[dead_I, dead_I], weight_OI[:, dead_I] = dead_diagonal, 0
    hessian_II.diagonal().add_(damping * hessian_II.diagonal().mean())  # H + lambda I
    factor_II = torch.linalg.cholesky(hessian_II.inverse(), upper=True)  # H^c
    binarized_OI, salient_I = torch.empty_like(weight_OI), torch.zeros_like(dead_I)
    for start in range(0, weight_OI.shape[1], block_size):
        block, rest = slice(start, start + block_size), slice(start + block_size, None)
        weight_OC, pivot_C = weight_OI[:, block], factor_II.diagonal()[block]
        saliency_OC = weight_OC**2 / pivot_C**2 if metric == "hessian" else weight_OC
        salient_OC = plain_salient(saliency_OC)
        small_OC, large_OC = plain_segments(saliency_OC, salient_OC)
        binarized_OI[:, block] = (
            plain_binary(weight_OC, salient_OC, passes=2)  # res_approximation
            + plain_binary(weight_OC, small_OC)
            + plain_binary(weight_OC, large_OC)
        )
        error_OC = (weight_OC - binarized_OI[:, block]) / pivot_C
        weight_OI[:, rest] -= error_OC @ factor_II[block, rest]  # block-wise error compensation
        salient_I[block] = salient_OC[0]
    return binarized_OI, salient_I


def plain_binary(x_OC: Tensor, mask_OC: Tensor, passes: int = 1) -> Tensor:
    """Binarize each row's masked numbers (Algorithm 2, binary); later passes do the remainder."""
    count_O1 = mask_OC.sum(1, keepdim=True).clamp(min=1)
    result_OC = torch.zeros_like(x_OC)
    for _ in range(passes):
        left_OC = x_OC - result_OC
        mean_O1 = (left_OC * mask_OC).sum(1, keepdim=True) / count_O1
        scale_O1 = ((left_OC - mean_O1).abs() * mask_OC).sum(1, keepdim=True) / count_O1
        result_OC = result_OC + ((left_OC - mean_O1).sign() * scale_O1 + mean_O1) * mask_OC
    return result_OC


def plain_salient(saliency_OC: Tensor) -> Tensor:
    """Mask the salient columns (Algorithm 2, salient): as many leading ones as cost least."""
    order_C = saliency_OC.abs().sum(0).argsort(descending=True, stable=True)
    lowest = math.inf
    for count in range(1, min(MOST_SALIENT, len(order_C))):
        mask_OC = torch.zeros_like(saliency_OC, dtype=torch.bool)
        mask_OC[:, order_C[:count]] = True
        both_OC = plain_binary(saliency_OC, mask_OC, 2) + plain_binary(saliency_OC, ~mask_OC, 2)
        cost = float((saliency_OC - both_OC).square().sum())
        if cost < lowest:
            lowest, best_OC = cost, mask_OC
    return best_OC


def plain_segments(saliency_OC: Tensor, salient_OC: Tensor) -> tuple[Tensor, Tensor]:
    """Mask the small and the large other weights (Algorithm 2, seg_search): the cheapest split."""
    magnitude_OC, lowest = saliency_OC.abs(), math.inf
    for border in (magnitude_OC * ~salient_OC).flatten().quantile(SHARES.to(saliency_OC)):
        small_OC = ~salient_OC & (magnitude_OC < border)
        large_OC = ~salient_OC & (magnitude_OC >= border)
        both_OC = plain_binary(saliency_OC, small_OC) + plain_binary(saliency_OC, large_OC)
        cost = float(((saliency_OC - both_OC) * ~salient_OC).square().sum())
        if cost < lowest:
            lowest, best = cost, (small_OC, large_OC)
    return best


class Billm(Method):
    """Observes all sites of a block before it quantizes any; passes on the binarized outputs.

    The linears of a site share its factor; each searches its own salient columns and thresholds.
    """

    settings: BillmSettings

    def observe(self) -> Gram:
        return Gram()

    def quantize(self, task: SiteTask, scheme: Scheme) -> BinarizedWeight:
        gram: Gram = task.statistics
        results = [
            billm_round(
                task.weight_EOI[hessians.experts],
                # The identity for a starved expert: saliency is then magnitude, and no column
                # absorbs another's error.
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
        damping_E = torch.cat([result.damping_E for result in results])
        task.note_damping(damping_E, self.settings.damping)
        return concatenate_experts([result.weight for result in results])


@dataclass(frozen=True)
class BillmResult:
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
) -> BillmResult:
    """Binarize by BiLLM's Algorithm 1 for all experts; later blocks absorb each block's error.

    Args:
        weight_EOI: not modified.
        hessian_EII: mean of x x^T over calibration tokens, up to a positive factor; or one for all.
        block_size: columns per block; must divide I.
        linears: rows of each linear; each has its own salient columns and threshold.
        damping: share of the mean Hessian diagonal that is added to the diagonal.
        metric: the saliency to search by, `hessian` (w^2 / diag(U)^2, U^T U = H^-1) or `magnitude`.
        dead_diagonal_E: diagonal entry of a column that no token activates: 1 in the official code,
            on the scale of its Hessian. It counts in the mean that damping is a share of.
        overwrite_hessian: use the Hessian's memory; otherwise it is not modified.

    Raises:
        ShapeError: the block size does not divide I.
        NumericsError: the Hessian cannot be factored.
    """
    into_groups(weight_EOI, block_size)  # raises ShapeError
    experts = len(weight_EOI)
    factored, damping_E = factored_columns(
        hessian_EII if overwrite_hessian else hessian_EII.clone(),
        damping,
        dead_diagonal_E,
        act_order=False,
    )
    weight_EOI = weight_EOI.masked_fill(factored.dead_EI[:, None, :], 0)
    factor_EII = factored.factor_EII.expand(experts, -1, -1)

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
        blocks.append(concatenate(parts, axis=1))
        # As in the official code, a block is binarized at once and absorbs none of its own errors.
        error_EOC = (block_EOC - blocks[-1].dequantize()) / pivot_E1C
        rows_ECI = factor_EII[:, columns, columns.stop :]
        weight_EOI[:, :, columns.stop :].baddbmm_(error_EOC, rows_ECI, alpha=-1)
    return BillmResult(concatenate(blocks, axis=2), damping_E.expand(experts))


def concatenate(parts: Sequence[BinarizedWeight], axis: int) -> BinarizedWeight:
    """Concatenate rows (axis 1) or blocks of columns (axis 2)."""
    return BinarizedWeight(
        torch.cat([part.codes_EOI for part in parts], axis),
        torch.cat([part.mean_EOG4 for part in parts], axis),
        torch.cat([part.scale_EOG4 for part in parts], axis),
    )


def binarize_block(weight_EOC: Tensor, salient_EC: Tensor, large_EOC: Tensor) -> BinarizedWeight:
    """Binarize one block, given its salient columns and the large ones of the other weights."""
    salient_E1C = salient_EC[:, None, :]
    groups = (~salient_E1C & ~large_EOC, ~salient_E1C & large_EOC, salient_E1C.expand_as(large_EOC))
    means, scales, sign_EOC = [], [], torch.zeros_like(large_EOC)
    for mask_EOC in groups:
        mean_EO, scale_EO, above_EOC = binarize(weight_EOC, mask_EOC)
        means.append(mean_EO)
        scales.append(scale_EO)
        sign_EOC |= above_EOC & mask_EOC
    once_EOC = mean_EO[..., None] + torch.where(above_EOC, 1.0, -1.0) * scale_EO[..., None]
    # The salient weights' remainder is binarized once more.
    mean_EO, scale_EO, above_EOC = binarize(weight_EOC - once_EOC, groups[-1])
    second_EOC = torch.where(salient_E1C, above_EOC, large_EOC)
    codes_EOC = sign_EOC + 2 * second_EOC + BinarizedWeight.SALIENT * salient_E1C
    mean_EO4, scale_EO4 = torch.stack([*means, mean_EO], -1), torch.stack([*scales, scale_EO], -1)
    return BinarizedWeight(codes_EOC.to(torch.uint8), mean_EO4[:, :, None], scale_EO4[:, :, None])


def binarize(x_EOC: Tensor, mask_EOC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the masked numbers' mean, their mean distance from it, and which are not below it.

    Both are 0 where the mask is empty. In the official code the sign of a number that equals the
    mean is 0; one bit has no third value, so it counts as above.
    """
    count_EO = mask_EOC.sum(-1).clamp(min=1)
    mean_EO = (x_EOC * mask_EOC).sum(-1) / count_EO
    centered_EOC = x_EOC - mean_EO[..., None]
    scale_EO = (centered_EOC.abs() * mask_EOC).sum(-1) / count_EO
    return mean_EO, scale_EO, centered_EOC >= 0


def salient_columns(saliency_EOC: Tensor) -> Tensor:
    """Choose the columns to binarize twice, bool [E, C]: the first k by sum, with the cheapest k.

    The cost is the squared error of binarizing the saliency itself, twice within the k columns and
    twice within the others; k is 1 to 49, less in a block of fewer columns.
    """
    experts, _, columns = saliency_EOC.shape
    limit = min(MOST_SALIENT, columns)
    order_EC = saliency_EOC.abs().sum(1).argsort(dim=1, descending=True, stable=True)
    ordered_EOC = saliency_EOC.gather(2, order_EC[:, None, :].expand_as(saliency_EOC))
    chunk = max(1, CHUNK[saliency_EOC.device.type] // (experts * limit * limit))
    gain_EK = torch.stack(
        [_gain_of_columns(part, limit).sum(1) for part in ordered_EOC.split(chunk, 1)]
    ).sum(0)
    count_E1 = gain_EK.argmax(1, keepdim=True) + 1
    first_C = torch.arange(columns, device=order_EC.device)
    return torch.zeros_like(order_EC, dtype=torch.bool).scatter_(1, order_EC, first_C < count_E1)


def _gain_of_columns(x_EOC: Tensor, limit: int) -> Tensor:
    """Compute by how much two passes reduce each row's squared error [E, O, K].

    The passes run over k = 1 .. limit - 1 leading columns, and over the others.
    """
    columns = x_EOC.shape[-1]
    k_K = torch.arange(1, limit, device=x_EOC.device)
    inside_KL = k_K[:, None] > torch.arange(limit, device=x_EOC.device)
    # Only the first `limit` columns can be on either side; the others are sorted once.
    leading_EO1L, others = x_EOC[..., None, :limit], SortedRows(x_EOC[..., limit:])

    def of_each_side(x_EOKL: Tensor, more_EOK: Tensor) -> Tensor:
        """Sum over each side [2, E, O, K]; more_EOK is the part of the columns beyond `limit`."""
        within_EOK = (x_EOKL * inside_KL).sum(-1)
        return torch.stack([within_EOK, x_EOKL.sum(-1) - within_EOK + more_EOK]).double()

    def per_number(value_2EOK: Tensor) -> Tensor:
        """Look up the value of the side that each number is on [E, O, K, L]."""
        inside_EOK, outside_EOK = value_2EOK.to(x_EOC.dtype)
        return torch.where(inside_KL, inside_EOK[..., None], outside_EOK[..., None])

    count_2K = torch.stack([k_K, columns - k_K]).double()[:, None, None, :]
    inside_EOK = x_EOC.double().cumsum(-1)[..., : limit - 1]
    total_EO1 = x_EOC.double().sum(-1, keepdim=True)
    mean_2EOK = torch.stack([inside_EOK, total_EO1 - inside_EOK]) / count_2K
    outside_EOK = mean_2EOK[1]
    centered_EOKL = leading_EO1L - per_number(mean_2EOK)
    above_EOKL = centered_EOKL > 0
    split_EOK = others.below(outside_EOK)
    distance_EOK = others.distance(others.first, others.count, outside_EOK)
    scale_2EOK = of_each_side(centered_EOKL.abs(), distance_EOK) / count_2K
    above_2EOK = of_each_side(above_EOKL, others.count - split_EOK)

    # The remainder is (x - mean) -+ scale; its mean follows from how many numbers lie above.
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
    """Choose the |saliency| below which other weights are small [E]: the cheapest quantile.

    The cost is the squared error of binarizing the saliency itself, small and large weights apart.
    """
    experts, _, columns = saliency_EOC.shape
    rest_EOC = saliency_EOC.masked_fill(salient_EC[:, None, :], 0)
    threshold_ET = _quantiles(rest_EOC.abs().flatten(1))
    gains = []
    chunk = max(1, CHUNK[saliency_EOC.device.type] // (experts * columns))
    for part_EOC in saliency_EOC.split(chunk, 1):
        numbers = SortedRows(part_EOC, salient_EC[:, None, :].expand_as(part_EOC))
        threshold_EOT = threshold_ET[:, None, :].expand(-1, part_EOC.shape[1], -1)
        threshold_EOT = threshold_EOT.double().contiguous()
        # In sorted order, the small numbers are those from `start` to before `stop`.
        start_EOT = numbers.below(-threshold_EOT, equal=True)
        stop_EOT = torch.maximum(numbers.below(threshold_EOT), start_EOT)
        first, end = numbers.first.expand_as(start_EOT), numbers.count.expand_as(start_EOT)
        small_EOT, small_sum_EOT = stop_EOT - start_EOT, numbers.sum(start_EOT, stop_EOT)
        large_EOT, large_sum_EOT = end - small_EOT, numbers.sum(first, end) - small_sum_EOT
        mean_EOT = small_sum_EOT / small_EOT.clamp(min=1)
        scale_EOT = numbers.distance(start_EOT, stop_EOT, mean_EOT) / small_EOT.clamp(min=1)
        gain_EOT = small_EOT * (mean_EOT.square() + scale_EOT.square())
        mean_EOT = large_sum_EOT / large_EOT.clamp(min=1)
        distance_EOT = numbers.distance(first, end, mean_EOT)
        distance_EOT -= numbers.distance(start_EOT, stop_EOT, mean_EOT)
        scale_EOT = distance_EOT / large_EOT.clamp(min=1)
        gain_EOT += large_EOT * (mean_EOT.square() + scale_EOT.square())
        gains.append(gain_EOT.sum(1))
    best_E1 = torch.stack(gains).sum(0).argmax(1, keepdim=True)
    return threshold_ET.gather(1, best_E1).squeeze(1)


def _quantiles(x_EN: Tensor) -> Tensor:
    """Compute numpy.quantile at SHARES, interpolated linearly between neighbours [E, T]."""
    sorted_EN = x_EN.sort(1).values
    place_T = SHARES.to(x_EN.device) * (x_EN.shape[1] - 1)
    low_ET, high_ET = sorted_EN[:, place_T.floor().long()], sorted_EN[:, place_T.ceil().long()]
    return torch.lerp(low_ET, high_ET, place_T.frac().to(x_EN.dtype))


class SortedRows:
    """Rows of numbers in ascending order with running sums in float64, for sums over ranges.

    first, count: places [E, O, 1] where a row's numbers begin and end, before the excluded ones.
    """

    def __init__(self, x_EOC: Tensor, excluded_EOC: Tensor | None = None) -> None:
        if excluded_EOC is None:
            excluded_EOC = torch.zeros_like(x_EOC, dtype=torch.bool)
        self.sorted_EOC = x_EOC.masked_fill(excluded_EOC, torch.inf).sort(-1).values.double()
        sums_EOC = self.sorted_EOC.masked_fill(self.sorted_EOC == torch.inf, 0).cumsum(-1)
        self.sums_EON = torch.nn.functional.pad(sums_EOC, (1, 0))
        self.count = (~excluded_EOC).sum(-1, keepdim=True)
        self.first = torch.zeros_like(self.count)

    def below(self, limit_EOT: Tensor, *, equal: bool = False) -> Tensor:
        """Count the row's numbers below each limit; with `equal`, below or at it."""
        return torch.searchsorted(self.sorted_EOC, limit_EOT, right=equal)

    def sum(self, start_EOT: Tensor, stop_EOT: Tensor) -> Tensor:
        """Sum the numbers from place `start` to before `stop`."""
        return self.sums_EON.gather(-1, stop_EOT) - self.sums_EON.gather(-1, start_EOT)

    def distance(self, start: Tensor, stop: Tensor, center_EOT: Tensor) -> Tensor:
        """Sum |x - center| over the numbers from place `start` to before `stop`."""
        start_EOT, stop_EOT = start.expand_as(center_EOT), stop.expand_as(center_EOT)
        middle_EOT = self.below(center_EOT).clamp(start_EOT, stop_EOT)
        upper_EOT = self.sum(middle_EOT, stop_EOT) - center_EOT * (stop_EOT - middle_EOT)
        return upper_EOT - (self.sum(start_EOT, middle_EOT) - center_EOT * (middle_EOT - start_EOT))
