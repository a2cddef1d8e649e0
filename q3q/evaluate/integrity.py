"""The checks that a trial must pass to count."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from q3q.models.decoder import Decoder
from q3q.numerics.linalg import all_finite
from q3q.numerics.weights import StoredWeight
from q3q.record import Check

ROWS = 16384  # compared at a time: a vocabulary is long, and no float32 copy of it all need exist


def check_weights(
    model: Decoder,
    quantized: Sequence[Mapping[str, StoredWeight]],
    *,
    ends: Mapping[str, StoredWeight] | None = None,
    skip: Collection[str] = (),
) -> list[Check]:
    """Is what will be evaluated what was quantized, all of it, and nothing more precise?

    Block by block, so that neither model nor codes need be in memory as a whole.

    Args:
        model: the decoder as evaluated. quantized: codes by weight name, a dictionary a block; empty for a model that
            was left as it is, which must still be finite. ends: codes of `embedding` and `head`, those that were
            quantized. skip: linears (`blocks.0.mlp.down_proj`) that were left out on purpose.
    """
    ends = ends or {}
    endless, missing, different, too_fine = [], [], [], []  # names of what is wrong, and how
    count, wanted = 0, model.facts.linear_parameters

    def compare(where: str, parts: Iterable[tuple[Tensor, Tensor]], code: StoredWeight) -> None:
        if not all(torch.equal(*both) for both in parts):
            different.append(where)
        if any(part.too_fine() for part in _by_rows(code)):
            too_fine.append(where)

    for k in range(len(model.blocks)):
        block = model.blocks[k]
        endless += [
            f"blocks.{k}.{name}" for name, weight in block.weights.items() if not all_finite(weight)
        ]
        codes = quantized[k] if quantized else {}
        for name in (name for site in block.sites for name in site.weights):
            where, weight = f"blocks.{k}.{name.removesuffix('.weight')}", block.weights[name]
            if where in skip:
                wanted -= weight.numel()
            if (where in skip) == (name in codes):
                missing.append(where + (" (which was to be left out)" if where in skip else ""))
            if name in codes:
                count += codes[name].shape.numel()
                compare(where, _pieces(weight, codes[name]), codes[name])
        del block, codes  # before the next ones are read
    if not all_finite(model.norm_H):
        endless.append("final norm")
    for end in ("embedding",) if model.tied else ("embedding", "head"):
        if not all(all_finite(rows_RH) for rows_RH in model.rows(end)):
            endless.append(end)
        if end in ends:
            compare(end, _rows(model.rows(end), ends[end]), ends[end])
    finite = _check("all weights are finite", endless)
    if not quantized:
        return [finite]
    if count != wanted:
        missing.append(f"{wanted - count} of {wanted} weights")
    if model.facts.tied and not model.tied:
        different.append("head, which is tied to the embedding")
    return [
        _check("every targeted weight is quantized", missing),
        _check("the weights evaluated are the codes' values", different),
        _check("no group has more levels than its bits allow", too_fine),
        finite,
    ]


def _by_rows(code: StoredWeight) -> Iterator[StoredWeight]:
    for start in range(0, code.shape[1], ROWS):
        yield code.rows(start, start + ROWS)


def _pieces(weight: Tensor, code: StoredWeight) -> Iterator[tuple[Tensor, Tensor]]:
    """The weight as evaluated and as its codes say, rows by rows."""
    parts_EOI = weight.view(code.shape).split(ROWS, dim=1)
    for part_EOI, part in zip(parts_EOI, _by_rows(code), strict=True):
        yield part_EOI, part.to(weight.device).dequantize().to(weight.dtype)


def _rows(parts: Iterable[Tensor], code: StoredWeight) -> Iterator[tuple[Tensor, Tensor]]:
    """`_pieces` of a matrix that comes some rows after the other."""
    start = 0
    for part_RH in parts:
        yield from _pieces(part_RH, code.rows(start, start + len(part_RH)))
        start += len(part_RH)


def _check(name: str, offenders: list[str]) -> Check:
    shown = ", ".join(offenders[:5]) + (
        f" and {len(offenders) - 5} more" if len(offenders) > 5 else ""
    )
    return Check(name=name, passed=not offenders, detail=shown)
