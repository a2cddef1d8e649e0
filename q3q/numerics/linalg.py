"""Linear algebra of the Hessian: damping and factors, batched over experts."""

import torch
from torch import Tensor

from q3q.errors import NumericsError

# When a factorization fails, damping is raised tenfold this often, and the record says so.
DAMPING_RAISES = 2


def inverse_upper_cholesky(hessian_EII: Tensor) -> tuple[Tensor, Tensor]:
    """Upper triangular U with H^-1 = U^T U, and which of the batch could not be factored (bool [E]).

    GPTQ's official code factors, inverts and factors again. H = R R^T with R upper is the Cholesky factorization of H
    with rows and columns reversed, and U = R^-1: the same matrix for one factorization and one triangular solve.
    """
    lower, info = torch.linalg.cholesky_ex(hessian_EII.flip(-1, -2))
    upper = lower.flip(-1, -2)
    identity = torch.eye(upper.shape[-1], dtype=upper.dtype, device=upper.device).expand_as(upper)
    inverse = torch.linalg.solve_triangular(upper, identity, upper=True)
    failed = (info != 0) | ~torch.isfinite(inverse).all(-1).all(-1)
    return inverse, failed


def damped_factor(hessian_EII: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """Factor H + damping * mean(diag H) * I as `inverse_upper_cholesky` does.

    Args:
        hessian_EII: symmetric, float32, no zero on the diagonal. Not modified.
        damping: share of the mean diagonal that is added to the diagonal, 0.01 in GPTQ.

    Returns:
        The factor, and the damping that each matrix of the batch needed [E].

    Raises:
        NumericsError: a matrix cannot be factored even with damping raised tenfold `DAMPING_RAISES` times.
    """
    if not torch.isfinite(hessian_EII).all():
        raise NumericsError("the Hessian is not finite: calibration activations overflow or are not numbers")
    mean_diagonal_E = hessian_EII.diagonal(dim1=-2, dim2=-1).mean(-1)
    identity_II = torch.eye(hessian_EII.shape[-1], dtype=hessian_EII.dtype, device=hessian_EII.device)
    damping_E = torch.full_like(mean_diagonal_E, damping)
    for _ in range(DAMPING_RAISES + 1):
        damped_EII = hessian_EII + (damping_E * mean_diagonal_E)[:, None, None] * identity_II
        factor_EII, failed_E = inverse_upper_cholesky(damped_EII)
        if not failed_E.any():
            return factor_EII, damping_E
        damping_E = torch.where(failed_E, damping_E * 10, damping_E)
    raise NumericsError(
        f"the Hessian cannot be factored, even with damping {float(damping_E.max()) / 10:g}: "
        "give more calibration tokens or a larger method.damping"
    )
