"""Round embedding and head to nearest, some rows at a time."""

from collections.abc import Iterable

from torch import Tensor

from q3q.errors import NumericsError
from q3q.models.decoder import Decoder
from q3q.numerics.grid import into_groups, minmax_grid
from q3q.numerics.linalg import all_finite
from q3q.numerics.weights import (
    QuantizedWeight,
    StoredWeight,
    concatenate_rows,
    round_to_grid,
)
from q3q.quantize.scales import check_scales
from q3q.spec import Scheme, Schemes


def quantize_ends(model: Decoder, schemes: Schemes) -> dict[str, StoredWeight]:
    """Round the embedding and the head to nearest in place, those that `schemes` wants so; codes by name.

    To nearest whatever the method: none of the papers treats them, an embedding is looked up and so has no inputs to
    weigh its errors by, and a head that is tied to it must be the same tensor. Tied, they are rounded once and filed
    under `embedding`.
    """
    wanted = {"embedding": schemes.embedding, "head": None if model.tied else schemes.head}
    codes: dict[str, StoredWeight] = {
        end: round_rows(model.rows(end), scheme, end)
        for end, scheme in wanted.items()
        if scheme is not None
    }
    if codes:
        model.exchange_ends(codes)
    return codes


def round_rows(parts: Iterable[Tensor], scheme: Scheme, where: str) -> QuantizedWeight:
    """A large matrix, given some rows after the other, rounded to nearest on GPTQ's min-max grid, as one expert
    [1, V, H]; on the CPU."""
    rounded = []
    for rows_RH in parts:
        wide_1RH = rows_RH.float()[None]
        if not all_finite(wide_1RH):
            raise NumericsError(f"{where}: the checkpoint's weights are not finite")
        grid = minmax_grid(
            into_groups(wide_1RH, scheme.group_size), scheme.bits, symmetric=scheme.symmetric
        )
        part = round_to_grid(
            wide_1RH, grid, scheme.bits, scheme.group_size, symmetric=scheme.symmetric
        )
        check_scales(part, wide_1RH, where)
        rounded.append(part.to("cpu"))
    return concatenate_rows(rounded)
