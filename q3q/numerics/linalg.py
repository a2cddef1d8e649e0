"""The Hessian's accumulation, damping and factors, batched over experts.

Shapes: E experts (1 in a dense block), T tokens, I channels, O out features.
"""

import torch
from torch import Tensor

from q3q.errors import NumericsError

# How often damping is raised tenfold when a factorization fails; the record notes it.
DAMPING_RAISES = 2
# Triangular matrices up to this size are inverted by substitution, larger ones by halves.
TRIANGULAR_LEAF = 128
# Panels of rows, each from its diagonal on, of a symmetric product: four take 5/8 of its work.
PANELS, NARROWEST_PANEL = 4, 128
# Numbers at each end of a matrix that are swapped at a time; bounds memory, changes nothing.
REVERSED_AT_ONCE = 1 << 20


def all_finite(tensor: Tensor) -> bool:
    """Return True if all entries are finite.

    aminmax propagates NaN and infinity; `isfinite` takes 15 to 30 times as long and makes copies.
    """
    return not tensor.numel() or all(bool(extreme.isfinite()) for extreme in torch.aminmax(tensor))


class FiniteCheck:
    """A check of many tensors without a device sync for each: kept on their device, read once."""

    def __init__(self) -> None:
        self._noted: Tensor | None = None

    def note(self, tensor: Tensor) -> None:
        """Note whether all of the tensor's entries are finite."""
        if not tensor.numel():
            return
        low, high = torch.aminmax(tensor)
        # A number minus itself is 0; infinity and NaN give NaN, which stays in the sum.
        noted = (high - high) + (low - low)
        self._noted = noted if self._noted is None else self._noted + noted

    def passed(self) -> bool:
        """Return True if all entries noted so far were finite; waits for the device."""
        return self._noted is None or bool(self._noted == 0)


def multiplies_16_bits(tokens_xTI: Tensor) -> bool:
    """Return True if products of these numbers are taken as they are and added in float32.

    A product of two bfloat16 numbers (8 significant bits each), or of two float16 numbers (11), is
    exact in float32 (24), so that a GPU's tensor cores lose nothing.
    """
    return (
        tokens_xTI.device.type == "cuda"
        and tokens_xTI.dtype in (torch.bfloat16, torch.float16)
        and torch.version.hip is None
    )


def add_gram(upper_II: Tensor, tokens_TI: Tensor, *, fresh: bool = False) -> None:
    """Add each token's x x^T to the upper triangle; `mirror` completes the matrix.

    The twin of 16-bit products converts the tokens to float32 first: the same products, which are
    added up in another order.

    fresh: overwrite the matrix instead of adding to it.
    """
    narrow = multiplies_16_bits(tokens_TI)
    tokens_TI = tokens_TI if narrow else tokens_TI.float()
    for start, stop in _panels(len(upper_II)):
        factors, panel = (tokens_TI[:, start:stop].T, tokens_TI[:, start:]), upper_II[start:stop]
        if narrow:
            _accumulate(panel[:, start:], torch.mm(*factors, out_dtype=torch.float32), fresh)
        else:
            panel[:, start:].addmm_(*factors, beta=0 if fresh else 1)


def add_grams(upper_EII: Tensor, tokens_ETI: Tensor, *, fresh: bool = False) -> None:
    """Do what `add_gram` does for several matrices at once; rows of zeros add nothing."""
    narrow = multiplies_16_bits(tokens_ETI)
    tokens_ETI = tokens_ETI if narrow else tokens_ETI.float()
    for start, stop in _panels(upper_EII.shape[-1]):
        factors = tokens_ETI[:, :, start:stop].mT, tokens_ETI[:, :, start:]
        part = torch.bmm(*factors, out_dtype=torch.float32) if narrow else torch.bmm(*factors)
        _accumulate(upper_EII[:, start:stop, start:], part, fresh)


def _accumulate(total: Tensor, part: Tensor, fresh: bool) -> None:
    if fresh:
        total.copy_(part)
    else:
        total += part


def add_upper(total_EII: Tensor, upper_EII: Tensor) -> None:
    """Add one sum of `add_gram` to another, where `add_gram` has written."""
    for start, stop in _panels(total_EII.shape[-1]):
        total_EII[:, start:stop, start:] += upper_EII[:, start:stop, start:]


def mirror(upper_EII: Tensor) -> None:
    """Complete a symmetric matrix: copy the entries above `add_gram`'s panels to below them."""
    for start, stop in _panels(upper_EII.shape[-1]):
        upper_EII[:, stop:, start:stop] = upper_EII[:, start:stop, stop:].mT
        # A panel's square has both triangles; their sums may differ in the last bit.
        square = upper_EII[:, start:stop, start:stop]
        square.copy_(square.triu() + square.triu(1).mT)


def quadratic_form_E(weight_EOI: Tensor, symmetric_EII: Tensor) -> Tensor:
    """Compute each expert's trace(W S W^T) [E]: outputs' squared norm if S = sum x x^T."""
    sums = []
    for weight_OI, symmetric_II in zip(weight_EOI, symmetric_EII, strict=True):
        total = weight_OI.new_zeros(())
        for start, stop in _panels(weight_OI.shape[1]):
            product = weight_OI[:, start:stop] @ symmetric_II[start:stop, start:]
            product[:, stop - start :] *= 2
            total = total + (product * weight_OI[:, start:]).sum()
        sums.append(total)
    return torch.stack(sums)


def _panels(columns: int) -> list[tuple[int, int]]:
    width = max(NARROWEST_PANEL, -(-columns // PANELS))
    return [(start, min(start + width, columns)) for start in range(0, columns, width)]


def invert_upper_triangular(upper_EII: Tensor) -> None:
    """Invert in place by halves, so that most of the work is products.

    [[A, B], [0, C]]^-1 = [[A^-1, -A^-1 B C^-1], [0, C^-1]].
    """
    columns = upper_EII.shape[-1]
    if columns <= TRIANGULAR_LEAF:
        identity = torch.eye(columns, dtype=upper_EII.dtype, device=upper_EII.device)
        identity = identity.expand_as(upper_EII)
        upper_EII.copy_(torch.linalg.solve_triangular(upper_EII, identity, upper=True))
        return
    first, last = slice(0, columns // 2), slice(columns // 2, columns)
    invert_upper_triangular(upper_EII[:, first, first])
    invert_upper_triangular(upper_EII[:, last, last])
    corner_EII = upper_EII[:, first, last]
    # One product at a time: each needs a quarter of the matrix besides.
    corner_EII.copy_(upper_EII[:, first, first] @ corner_EII)
    corner_EII.copy_(corner_EII @ upper_EII[:, last, last]).neg_()


def reverse(matrix_EII: Tensor) -> None:
    """Reverse the rows and the columns of contiguous matrices in place."""
    flat_EN = matrix_EII.view(len(matrix_EII), -1)  # both reversals reverse this one run of numbers
    count = flat_EN.shape[1]
    for start in range(0, count // 2, REVERSED_AT_ONCE):
        stop = min(start + REVERSED_AT_ONCE, count // 2)
        front, back = flat_EN[:, start:stop], flat_EN[:, count - stop : count - start]
        reversed_front = front.flip(1)
        front.copy_(back.flip(1))
        back.copy_(reversed_front)


def inverse_upper_cholesky(hessian_EII: Tensor) -> tuple[Tensor, Tensor]:
    """Overwrite H with the upper triangular U for which H^-1 = U^T U.

    GPTQ's official code factors, inverts and factors again. H = R R^T with R upper is the Cholesky
    factorization of H with rows and columns reversed, and U = R^-1: the same matrix for one
    factorization and one triangular inverse, all in the memory of H (0.4 GB at 9728 columns).

    Args:
        hessian_EII: symmetric and contiguous. Overwritten.

    Returns:
        U, and which of the batch could not be factored (bool [E]).
    """
    reverse(hessian_EII)
    info_E = torch.empty(len(hessian_EII), dtype=torch.int32, device=hessian_EII.device)
    # LAPACK stores matrices by columns: the upper factor that it writes is the lower one by rows.
    torch.linalg.cholesky_ex(hessian_EII.mT, upper=True, out=(hessian_EII.mT, info_E))
    reverse(hessian_EII)
    invert_upper_triangular(hessian_EII)
    finite_E = torch.tensor(list(map(all_finite, hessian_EII)), device=hessian_EII.device)
    return hessian_EII, (info_E != 0) | ~finite_E


def damped_factor(
    hessian_EII: Tensor, damping: float, *, overwrite: bool = False
) -> tuple[Tensor, Tensor]:
    """Factor H + damping * mean(diag H) * I as `inverse_upper_cholesky` does.

    Args:
        hessian_EII: symmetric, float32, no zero on the diagonal.
        damping: share of the mean diagonal that is added to the diagonal, 0.01 in GPTQ.
        overwrite: write the factor to the Hessian's memory; otherwise the Hessian is not modified.

    Returns:
        The factor, and the damping that each matrix needed [E].

    Raises:
        NumericsError: a matrix cannot be factored after `DAMPING_RAISES` tenfold raises of damping.
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
