"""The grids of GGUF's block types, chosen as llama.cpp's quantizer chooses them.

Source: ggml-quants.c of llama.cpp (quantize_row_*_ref). It adds up in another order, so a grid here
may differ from its in the last bits.

Shapes: G groups of a row, S columns of a group, J groups of a block.
"""

import torch
from torch import Tensor

from q3q.number_formats import BlockFormat
from q3q.numerics.grid import Grid

SMALLEST = 1e-15  # a group whose weights are all smaller has a scale of 0
# Of types with offsets: tried ranges are those with `first` to `last` steps more, 0.1 apart.
SEARCHES = {"q4_k": (-1.0, 20), "q5_k": (-0.5, 15), "q2_k": (-0.5, 15)}
SHARES = tuple(0.1 * step for step in range(-9, 10) if step)  # q6_k: steps more, likewise
Q3_ROUNDS = 5


def range_grid(weight_xGS: Tensor, form: BlockFormat) -> Grid:
    """Take the grid of each group's range, before scales are rounded [..., G, 1]."""
    if form.name == "q8_0":
        largest = weight_xGS.abs().amax(-1, keepdim=True)
        return Grid(largest / (form.middle - 1), torch.zeros_like(largest))
    if form.offsets:
        return range_grid_of_bounds(
            weight_xGS.amin(-1, keepdim=True), weight_xGS.amax(-1, keepdim=True), form
        )
    scale = extreme(weight_xGS) / -form.middle
    return Grid(scale, torch.zeros_like(scale))


def range_grid_of_bounds(low: Tensor, high: Tensor, form: BlockFormat) -> Grid:
    """Take the grid of ranges: offsets of `q4_1` have any sign, others lie at or below zero."""
    if form.groups > 1:
        low = low.clamp(max=0)
    return Grid((high - low) / (2**form.bits - 1), -low)


def searched_grid(weight_xGS: Tensor, form: BlockFormat) -> Grid:
    """Take llama.cpp's grid of each group, before scales are rounded [..., G, 1]."""
    if form.name in SEARCHES:
        return _with_offsets(weight_xGS, form)
    if form.name == "q6_k":
        return _symmetric(weight_xGS, form)
    if form.name == "q3_k":
        return _step_by_step(weight_xGS, form)
    return range_grid(weight_xGS, form)


def extreme(numbers_xS: Tensor) -> Tensor:
    """Return the number of the largest magnitude, with its sign, along the last axis [..., 1]."""
    return numbers_xS.gather(-1, numbers_xS.abs().argmax(-1, keepdim=True))


def stored_grid(grid: Grid, form: BlockFormat) -> Grid:
    """Round scales and offsets [..., G, 1] to what a file holds: of a block together."""
    if form.groups == 1:
        return Grid(*(part.half().float() for part in grid))
    scale = _in_blocks(grid.scale.squeeze(-1), form)[..., None]
    if not form.offsets:
        return Grid(scale, torch.zeros_like(scale))
    return Grid(scale, _in_blocks(grid.zero.squeeze(-1), form)[..., None])


def _in_blocks(numbers_xG: Tensor, form: BlockFormat) -> Tensor:
    """Round scales or offsets to whole multiples of a float16 of their block."""
    numbers_xBJ, low, high = numbers_xG.unflatten(-1, (-1, form.groups)), 0, form.scale_top
    if form.offsets:
        largest = numbers_xBJ.amax(-1, keepdim=True).clamp(min=0)
        shared = largest / form.scale_top
    else:
        largest, low, high = extreme(numbers_xBJ), form.scale_top, -form.scale_top - 1
        shared = (1 / (form.scale_top / _or_infinite(largest))).masked_fill(largest == 0, 0)
    steps = form.scale_top / _or_infinite(largest)
    whole_xBJ = (numbers_xBJ * steps).round().clamp(low, high)
    return (shared.half().float() * whole_xBJ).flatten(-2)


def divided(numbers_xG: Tensor, form: BlockFormat) -> tuple[Tensor, Tensor]:
    """Split what `stored_grid` returned into its parts.

    The group of the largest magnitude has the whole number `scale_top`, so this is exact.

    Returns:
        A number of each block [..., B], float32 that is a float16, and whole numbers [..., G].
    """
    numbers_xBJ = numbers_xG.unflatten(-1, (-1, form.groups))
    shared = extreme(numbers_xBJ) / form.scale_top
    whole_xBJ = (numbers_xBJ / _or_infinite(shared)).round()
    return shared.squeeze(-1), whole_xBJ.flatten(-2)


def _or_infinite(numbers: Tensor) -> Tensor:
    """Return divisors by which everything becomes 0 where they are 0."""
    return numbers.masked_fill(numbers == 0, torch.inf)


def _with_offsets(weight_xGS: Tensor, form: BlockFormat) -> Grid:
    """Search the range whose codes, fitted by weighted least squares, err least.

    `make_qkx2_quants`: of `q2_k` by the weighted sum of |error|, of others of its square.
    """
    top, by_size = 2**form.bits - 1, form.name == "q2_k"
    sizes = weight_xGS.abs()
    weights = sizes if by_size else weight_xGS.square().mean(-1, keepdim=True).sqrt() + sizes

    def total(numbers: Tensor) -> Tensor:
        return numbers.sum(-1, keepdim=True)

    def cost(scale: Tensor, low: Tensor, codes: Tensor) -> Tensor:
        error = (scale * codes).add_(low).sub_(weight_xGS)
        return total(weights * (error.abs_() if by_size else error.square_()))

    low = weight_xGS.amin(-1, keepdim=True).clamp(max=0)
    high = weight_xGS.amax(-1, keepdim=True)

    def codes_of(steps: float, low: Tensor) -> Tensor:
        return ((weight_xGS - low) * (steps / _or_infinite(high - low))).round_().clamp_(0, top)

    scale, best_low = (high - low) / top, low
    lowest = cost(scale, low, codes_of(top, low))
    sum_w, sum_x = total(weights), total(weights * weight_xGS)
    first, count = SEARCHES[form.name]
    for step in range(count + 1):
        codes = codes_of(first + 0.1 * step + top, best_low)  # of the best range so far
        weighted = weights * codes
        sum_l, sum_l2, sum_xl = (
            total(part) for part in (weighted, weighted * codes, weighted * weight_xGS)
        )
        determinant = sum_w * sum_l2 - sum_l * sum_l
        sound = determinant > 0
        divided_by = torch.where(sound, determinant, 1.0)
        tried = (sum_w * sum_xl - sum_x * sum_l) / divided_by
        tried_low = (sum_l2 * sum_x - sum_l * sum_xl) / divided_by
        above = tried_low > 0
        tried = torch.where(above, sum_xl / sum_l2.clamp(min=SMALLEST), tried)
        tried_low = tried_low.masked_fill(above, 0)
        tried_cost = cost(tried, tried_low, codes)
        better = sound & (tried_cost < lowest)
        lowest = torch.where(better, tried_cost, lowest)
        scale, best_low = (
            torch.where(better, new, old) for new, old in ((tried, scale), (tried_low, best_low))
        )
    return Grid(scale, -best_low)


def _symmetric(weight_xGS: Tensor, form: BlockFormat) -> Grid:
    """Search the scale whose codes, fitted by least squares weighted with w**2, explain most.

    `make_qx_quants` with `rmse_type` 1.
    """
    weights, largest = weight_xGS.square(), extreme(weight_xGS)
    low, high = -form.middle, form.middle - 1

    def fitted(steps: float) -> tuple[Tensor, Tensor]:
        codes = (weight_xGS * (-steps / _or_infinite(largest))).round_().clamp_(low, high)
        weighted = weights * codes
        return (weighted * weight_xGS).sum(-1, keepdim=True), (weighted * codes).sum(
            -1, keepdim=True
        )

    sum_xl, sum_l2 = fitted(form.middle)
    scale = sum_xl / _or_infinite(sum_l2)
    best = scale * sum_xl
    for more in SHARES:
        sum_xl, sum_l2 = fitted(form.middle + more)
        better = (sum_l2 > 0) & (sum_xl * sum_xl > best * sum_l2)
        tried = sum_xl / _or_infinite(sum_l2)
        scale, best = torch.where(better, tried, scale), torch.where(better, tried * sum_xl, best)
    return _without_tiny(Grid(scale, torch.zeros_like(scale)), largest)


def _step_by_step(weight_xGS: Tensor, form: BlockFormat) -> Grid:
    """Move one code after the other while the least-squares fit, weighted with w**2, gets better.

    `make_q3_quants`.
    """
    weights, largest = weight_xGS.square(), extreme(weight_xGS)
    low, high = -form.middle, form.middle - 1
    steps = -form.middle / _or_infinite(largest)
    codes = (weight_xGS * steps).round_().clamp_(low, high)
    sum_xl, sum_l2 = ((weights * codes * other).sum(-1) for other in (weight_xGS, codes))
    for _ in range(Q3_ROUNDS):
        before = codes.clone()
        for s in range(weight_xGS.shape[-1]):
            x, w, code = weight_xGS[..., s], weights[..., s], codes[..., s]
            less_xl, less_l2 = sum_xl - w * x * code, sum_l2 - w * code * code
            usable = less_xl > 0
            new = (x * less_l2 / torch.where(usable, less_xl, 1.0)).round_().clamp_(low, high)
            new_xl, new_l2 = less_xl + w * x * new, less_l2 + w * new * new
            better = usable & (new != code) & (new_l2 > 0)
            better &= new_xl * new_xl * sum_l2 > sum_xl * sum_xl * new_l2
            codes[..., s] = torch.where(better, new, code)
            sum_xl, sum_l2 = (
                torch.where(better, new_one, old)
                for new_one, old in ((new_xl, sum_xl), (new_l2, sum_l2))
            )
        if torch.equal(codes, before):
            break
    scale = (sum_xl / _or_infinite(sum_l2))[..., None]
    return _without_tiny(Grid(scale, torch.zeros_like(scale)), largest)


def _without_tiny(grid: Grid, largest: Tensor) -> Grid:
    return Grid(grid.scale.masked_fill(largest.abs() < SMALLEST, 0), grid.zero)
