"""Linear algebra of the Hessian: its accumulation, damping and factors, batched over experts.

Shapes: E experts (1 in a dense block), T tokens, I channels, O out features.
"""

import torch
from torch import Tensor

from q3q.errors import NumericsError

# When a factorization fails, damping is raised tenfold this often, and the record says so.
DAMPING_RAISES = 2
# Triangular matrices up to this size are inverted by substitution, larger ones by halves.
TRIANGULAR_LEAF = 128
# Symmetric matrices are computed in panels of rows, each from its diagonal on: with four, 5/8 of the product's work.
PANELS, NARROWEST_PANEL = 4, 128
# Numbers at each end of a matrix that change places at a time; bounds memory, changes nothing.
REVERSED_AT_ONCE = 1 << 20


def all_finite(tensor: Tensor) -> bool:
    """Whether every number is. One that is none makes the extremes none; `isfinite` takes 15 to 30 times as long, and
    makes a copy and two masks."""
    return not tensor.numel() or all(bool(extreme.isfinite()) for extreme in torch.aminmax(tensor))


def add_gram(upper_II: Tensor, tokens_TI: Tensor, *, fresh: bool = False) -> None:
    """Add x x^T of each token to the upper triangle (and some of the lower one); `mirror` makes the matrix whole.

    fresh: what the matrix holds is not to be added to but overwritten.
    """
    for start, stop in _panels(len(upper_II)):
        upper_II[start:stop, start:].addmm_(
            tokens_TI[:, start:stop].T, tokens_TI[:, start:], beta=0 if fresh else 1
        )


def add_upper(total_EII: Tensor, upper_EII: Tensor) -> None:
    """Add a sum of `add_gram`'s to another, where it has been written."""
    for start, stop in _panels(total_EII.shape[-1]):
        total_EII[:, start:stop, start:] += upper_EII[:, start:stop, start:]


def mirror(upper_EII: Tensor) -> None:
    """Overwrite what lies below `add_gram`'s panels with what lies above them."""
    for start, stop in _panels(upper_EII.shape[-1]):
        upper_EII[:, stop:, start:stop] = upper_EII[:, start:stop, stop:].mT
        # Inside a panel both triangles were summed, by kernels that need not agree in the last bit.
        square = upper_EII[:, start:stop, start:stop]
        square.copy_(square.triu() + square.triu(1).mT)


def quadratic_form_E(weight_EOI: Tensor, symmetric_EII: Tensor) -> Tensor:
    """trace(W S W^T) of each expert: the squared norm of its outputs if S is the sum of x x^T [E]."""
    sums = []
    for weight_OI, symmetric_II in zip(weight_EOI, symmetric_EII, strict=True):
        total = weight_OI.new_zeros(())
        for start, stop in _panels(weight_OI.shape[1]):
            within = weight_OI[:, start:stop] @ symmetric_II[start:stop, start:]
            within[:, stop - start :] *= 2
            total = total + (within * weight_OI[:, start:]).sum()
        sums.append(total)
    return torch.stack(sums)


def _panels(columns: int) -> list[tuple[int, int]]:
    width = max(NARROWEST_PANEL, -(-columns // PANELS))
    return [(start, min(start + width, columns)) for start in range(0, columns, width)]


def invert_upper_triangular(upper_EII: Tensor) -> None:
    """In place, by halves: [[A, B], [0, C]]^-1 = [[A^-1, -A^-1 B C^-1], [0, C^-1]], so that most of it is products."""
    columns = upper_EII.shape[-1]
    if columns <= TRIANGULAR_LEAF:
        identity = torch.eye(columns, dtype=upper_EII.dtype, device=upper_EII.device).expand_as(
            upper_EII
        )
        upper_EII.copy_(torch.linalg.solve_triangular(upper_EII, identity, upper=True))
        return
    half = columns // 2
    first, last = slice(0, half), slice(half, columns)
    invert_upper_triangular(upper_EII[:, first, first])
    invert_upper_triangular(upper_EII[:, last, last])
    corner_EII = upper_EII[:, first, last]
    corner_EII.copy_(
        upper_EII[:, first, first] @ corner_EII
    )  # one product at a time: a quarter of the matrix
    corner_EII.copy_(corner_EII @ upper_EII[:, last, last]).neg_()


def reverse(matrix_EII: Tensor) -> None:
    """Reverse rows and columns of contiguous matrices in place: as one run of numbers, each is read backwards."""
    flat_EN = matrix_EII.view(len(matrix_EII), -1)
    half = flat_EN.shape[1] // 2
    for start in range(0, half, REVERSED_AT_ONCE):
        stop = min(start + REVERSED_AT_ONCE, half)
        front, back = (
            flat_EN[:, start:stop],
            flat_EN[:, flat_EN.shape[1] - stop : flat_EN.shape[1] - start],
        )
        kept = front.flip(1)
        front.copy_(back.flip(1))
        back.copy_(kept)


def inverse_upper_cholesky(hessian_EII: Tensor) -> tuple[Tensor, Tensor]:
    """Upper triangular U with H^-1 = U^T U, in the place of H, and which of the batch could not be factored (bool [E]).

    GPTQ's official code factors, inverts and factors again. H = R R^T with R upper is the Cholesky factorization of H
    with rows and columns reversed, and U = R^-1: the same matrix for one factorization and one triangular inverse, and
    all of it in the memory of H, which at 9728 columns is 0.4 GB.

    Args:
        hessian_EII: symmetric and contiguous. Overwritten.
    """
    reverse(hessian_EII)
    info_E = torch.empty(len(hessian_EII), dtype=torch.int32, device=hessian_EII.device)
    # LAPACK's matrices lie column by column: the upper factor that it writes is, row by row, the lower one.
    torch.linalg.cholesky_ex(hessian_EII.mT, upper=True, out=(hessian_EII.mT, info_E))
    reverse(hessian_EII)
    invert_upper_triangular(hessian_EII)
    finite_E = torch.tensor(
        [all_finite(factor_II) for factor_II in hessian_EII], device=hessian_EII.device
    )
    return hessian_EII, (info_E != 0) | ~finite_E


def damped_factor(
    hessian_EII: Tensor, damping: float, *, overwrite: bool = False
) -> tuple[Tensor, Tensor]:
    """Factor H + damping * mean(diag H) * I as `inverse_upper_cholesky` does.

    Args:
        hessian_EII: symmetric, float32, no zero on the diagonal.
        damping: share of the mean diagonal that is added to the diagonal, 0.01 in GPTQ.
        overwrite: put the factor in the place of the Hessian, which is not modified otherwise.

    Returns:
        The factor, and the damping that each matrix of the batch needed [E].

    Raises:
        NumericsError: a matrix cannot be factored even with damping raised tenfold `DAMPING_RAISES` times.
    """
    if not all_finite(hessian_EII):
        raise NumericsError(
            "the Hessian is not finite: calibration activations overflow or are not numbers"
        )
    mean_diagonal_E = hessian_EII.diagonal(dim1=-2, dim2=-1).mean(-1)
    damping_E = torch.full_like(mean_diagonal_E, damping)
    for _ in range(DAMPING_RAISES + 1):
        damped_EII = hessian_EII.clone(memory_format=torch.contiguous_format)
        damped_EII.diagonal(dim1=-2, dim2=-1).add_((damping_E * mean_diagonal_E)[:, None])
        factor_EII, failed_E = inverse_upper_cholesky(damped_EII)
        if not failed_E.any():
            return hessian_EII.copy_(factor_EII) if overwrite else factor_EII, damping_E
        damping_E = torch.where(failed_E, damping_E * 10, damping_E)
    raise NumericsError(
        f"the Hessian cannot be factored, even with damping {float(damping_E.max()) / 10:g}: "
        "give more calibration tokens or a larger method.damping"
    )
