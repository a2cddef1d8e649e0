"""The checks that a trial must pass to count."""

from collections.abc import Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from q3q.models.decoder import Decoder
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

    Args:
        model: the decoder as evaluated. quantized: codes by weight name, a dictionary a block; empty for a model that
            was left as it is, which must still be finite. ends: codes of `embedding` and `head`, those that were
            quantized. skip: linears (`blocks.0.mlp.down_proj`) that were left out on purpose.
    """
    ends = ends or {}
    ends_VH = {"embedding": model.embedding_VH, "head": model.head_VH}
    weights = {**ends_VH, "final norm": model.norm_H}
    weights |= {f"blocks.{k}.{name}": w for k, block in enumerate(model.blocks) for name, w in block.weights.items()}
    finite = _check("all weights are finite", [name for name, w in weights.items() if not torch.isfinite(w).all()])
    if not quantized:
        return [finite]
    missing, left_out, pairs = [], 0, []
    for k, (block, codes) in enumerate(zip(model.blocks, quantized, strict=True)):
        for name in (name for site in block.sites for name in site.weights):
            where = f"blocks.{k}.{name.removesuffix('.weight')}"
            if where in skip:
                left_out += block.weights[name].numel()
            if (where in skip) == (name in codes):
                missing.append(where + (" (which was to be left out)" if where in skip else ""))
            if name in codes:
                pairs.append((where, block.weights[name], codes[name]))
    wanted = model.facts.linear_parameters - left_out
    count = sum(code.shape.numel() for _, _, code in pairs)
    if count != wanted:
        missing.append(f"{wanted - count} of {wanted} weights")
    pairs += [(name, ends_VH[name], code) for name, code in ends.items()]
    different = [
        where for where, weight, code in pairs if not all(torch.equal(*both) for both in _pieces(weight, code))
    ]
    if model.facts.tied and model.head_VH is not model.embedding_VH:
        different.append("head, which is tied to the embedding")
    too_fine = [where for where, _, code in pairs if any(part.too_fine() for part in _by_rows(code))]
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


def _check(name: str, offenders: list[str]) -> Check:
    shown = ", ".join(offenders[:5]) + (f" and {len(offenders) - 5} more" if len(offenders) > 5 else "")
    return Check(name=name, passed=not offenders, detail=shown)
