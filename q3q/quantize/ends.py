"""Round the embedding and the head to nearest, some rows at a time."""

from collections.abc import Iterable

from torch import Tensor

from q3q.errors import NumericsError
from q3q.models.decoder import Decoder
from q3q.numerics.grid import into_groups, minmax_grid
from q3q.numerics.linalg import all_finite
from q3q.numerics.weights import QuantizedWeight, StoredWeight, concatenate_rows, round_to_grid
from q3q.quantize.sites import check_scales
from q3q.spec import Scheme, Schemes


def quantize_ends(model: Decoder, schemes: Schemes) -> dict[str, StoredWeight]:
    """Round the ends that `schemes` names to nearest in place; return their codes by end.

    To nearest whatever the method: no paper treats the ends, an embedding is looked up and has no
    inputs to weigh its errors by, and a tied head must be the same tensor. Tied ends are rounded
    once, as `embedding`.
    """
    scheme_of = {"embedding": schemes.embedding, "head": None if model.tied else schemes.head}
    codes: dict[str, StoredWeight] = {
        end: round_rows(
            model.rows(end),
            scheme,
            end,
            "head_bits=null embedding_bits=null" if model.tied else f"{end}_bits=null",
        )
        for end, scheme in scheme_of.items()
        if scheme is not None
    }
    if codes:
        model.exchange_ends(codes)
    return codes


def round_rows(parts: Iterable[Tensor], scheme: Scheme, end: str, remedy: str) -> QuantizedWeight:
    """Round a large matrix to nearest on GPTQ's min-max grid, as one expert [1, V, H], on the CPU.

    Args:
        parts: its rows in order, [R, H] each.
        remedy: the settings that leave it in 16 bits, for an error.

    Raises:
        NumericsError: a weight is not finite, or needs a scale above 16 bits; the end is named.
    """
    rounded = []
    for rows_RH in parts:
        wide_1RH = rows_RH.float()[None]
        if not all_finite(wide_1RH):
            raise NumericsError(f"{end}: the checkpoint's weights are not finite")
        groups = into_groups(wide_1RH, scheme.group_size)
        grid = minmax_grid(groups, scheme.bits, symmetric=scheme.symmetric)
        part = round_to_grid(
            wide_1RH, grid, scheme.bits, scheme.group_size, symmetric=scheme.symmetric
        )
        check_scales(part, wide_1RH, end, remedy)
        rounded.append(part.to("cpu"))
    return concatenate_rows(rounded)
