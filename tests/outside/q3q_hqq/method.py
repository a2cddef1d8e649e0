"""Half-quadratic quantization (Badri and Shaji, 2023: Half-Quadratic Quantization of Large Machine
Learning Models), from the paper's equations.

It looks for the zero point z that minimizes |W - s (Q - z)|_p with p < 1, which outliers weigh
little in, for the codes Q = round(W / s + z). Half-quadratic splitting alternates between the
error E (a shrinkage, eq. 5) and z (a mean, eq. 9).
"""

import torch

from q3q.numerics.grid import Grid, into_groups, minmax_grid, on_grid, to_codes
from q3q.numerics.weights import round_to_grid
from q3q.quantize.method import Method


def shrink(error, beta, p):
    """Return the minimizer over E of |E|_p^p + beta / 2 |E - error|^2, approximately."""
    size = error.abs()
    return error.sign() * (size - size.clamp(min=1e-12).pow(p - 1) / beta).clamp(min=0)


def half_quadratic_grid(groups_EOGS, scheme, settings):
    grid, beta = minmax_grid(groups_EOGS, scheme.bits, symmetric=False), settings.beta
    best, least = grid, torch.inf
    for _ in range(settings.steps):
        rounded_EOGS = on_grid(groups_EOGS, grid, scheme.bits)
        cost = float((groups_EOGS - rounded_EOGS).abs().mean())
        if cost >= least:
            break
        best, least = grid, cost
        error_EOGS = shrink(groups_EOGS - rounded_EOGS, beta, settings.p)
        codes_EOGS = to_codes(groups_EOGS, grid, scheme.bits)
        steps_EOGS = (groups_EOGS - error_EOGS) / grid.scale
        grid = Grid(grid.scale, (codes_EOGS - steps_EOGS).mean(-1, keepdim=True))
        beta *= settings.kappa
    return best


class Hqq(Method):
    def quantize(self, task, scheme):
        groups_EOGS = into_groups(task.weight_EOI, scheme.group_size)
        grid = half_quadratic_grid(groups_EOGS, scheme, self.settings)
        return round_to_grid(
            task.weight_EOI, grid, scheme.bits, scheme.group_size, symmetric=scheme.symmetric
        )
