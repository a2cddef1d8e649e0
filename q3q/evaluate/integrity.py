"""Checks that a trial must pass to count."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from q3q.models.decoder import Decoder
from q3q.numerics.linalg import all_finite
from q3q.numerics.weights import StoredWeight, pieces
from q3q.record import Check

ROWS = 16384  # whose levels are counted at a time: a vocabulary has ten times as many


def check_weights(
    model: Decoder,
    quantized: Sequence[Mapping[str, StoredWeight]],
    *,
    ends: Mapping[str, StoredWeight] | None = None,
    skip: Collection[str] = (),
) -> list[Check]:
    """Check that the evaluated weights are the quantized ones, all, and no finer than their bits.

    Goes block by block, so that neither the model nor its codes need be in memory at once.

    Args:
        quantized: each block's codes by weight name; empty for an unquantized model.
        ends: codes of `embedding` and `head`, if these were quantized.
        skip: linears (`blocks.0.mlp.down_proj`) that were left out on purpose.
    """
    ends = ends or {}
    not_finite, missing, different, too_fine = [], [], [], []  # names of the offenders
    count, expected = 0, model.facts.linear_parameters

    def compare(where: str, parts: Iterable[tuple[Tensor, Tensor]], code: StoredWeight) -> None:
        if not all(torch.equal(*both) for both in parts):
            different.append(where)
        if any(part.too_fine() for _, _, part in pieces(code, most_rows=ROWS)):
            too_fine.append(where)

    for k in range(len(model.blocks)):
        block = model.blocks[k]
        bad = (name for name, weight in block.weights.items() if not all_finite(weight))
        not_finite += [f"blocks.{k}.{name}" for name in bad]
        codes = quantized[k] if quantized else {}
        for name in (name for site in block.sites for name in site.weights):
            where, weight = f"blocks.{k}.{name.removesuffix('.weight')}", block.weights[name]
            if where in skip:
                expected -= weight.numel()
            if (where in skip) == (name in codes):
                missing.append(where + (" (which was to be left out)" if where in skip else ""))
            if name in codes:
                count += codes[name].shape.numel()
                compare(where, _pieces(weight, codes[name]), codes[name])
        del block, codes  # free them before the next ones are read
    if not all_finite(model.norm_H):
        not_finite.append("final norm")
    for end in ("embedding",) if model.tied else ("embedding", "head"):
        if not all(all_finite(rows_RH) for rows_RH in model.rows(end)):
            not_finite.append(end)
        if end in ends:
            compare(end, _rows(model.rows(end), ends[end]), ends[end])
    finite = _check("all weights are finite", not_finite)
    if not quantized:
        return [finite]
    if count != expected:
        missing.append(f"{expected - count} of {expected} weights")
    if model.facts.tied and not model.tied:
        different.append("head, which is tied to the embedding")
    return [
        _check("every targeted weight is quantized", missing),
        _check("the weights evaluated are the codes' values", different),
        _check("no group has more levels than its bits allow", too_fine),
        finite,
    ]


def _pieces(weight: Tensor, code: StoredWeight) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the weight as evaluated and as its codes dequantize, piece by piece."""
    weight_EOI = weight.view(code.shape)
    for e, o, part in pieces(code):
        yield weight_EOI[e, o], part.to(weight.device).dequantize().to(weight.dtype)


def _rows(parts: Iterable[Tensor], code: StoredWeight) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield `_pieces` of a matrix that comes in parts, some rows each."""
    start = 0
    for part_RH in parts:
        yield from _pieces(part_RH, code.rows(start, start + len(part_RH)))
        start += len(part_RH)


def _check(name: str, offenders: list[str]) -> Check:
    more = f" and {len(offenders) - 5} more" if len(offenders) > 5 else ""
    return Check(name=name, passed=not offenders, detail=", ".join(offenders[:5]) + more)
