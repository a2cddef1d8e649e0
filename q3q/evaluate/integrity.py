"""The checks that a trial must pass to count."""

from collections.abc import Sequence

import torch

from q3q.models.decoder import Decoder
from q3q.numerics.weights import QuantizedWeight
from q3q.record import Check


def check_weights(model: Decoder, quantized: Sequence[dict[str, QuantizedWeight]]) -> list[Check]:
    """Is what will be evaluated what was quantized, all of it, and nothing more precise?

    Args:
        model: the decoder as evaluated. quantized: codes by weight name, a dictionary a block; empty for a model that
            was left as it is, which must still be finite.
    """
    missing, different, too_fine, not_finite = [], [], [], []
    for name, weight in (("embedding", model.embedding_VH), ("final norm", model.norm_H), ("head", model.head_VH)):
        if not torch.isfinite(weight).all():
            not_finite.append(name)
    for k, block in enumerate(model.blocks):
        not_finite += [f"blocks.{k}.{name}" for name, w in block.weights.items() if not torch.isfinite(w).all()]
    finite = _check("all weights are finite", not_finite)
    if not quantized:
        return [finite]
    for k, (block, codes) in enumerate(zip(model.blocks, quantized, strict=True)):
        for site in block.sites:
            for name in site.weights:
                where = f"blocks.{k}.{name.removesuffix('.weight')}"
                if name not in codes:
                    missing.append(where)
                    continue
                weight = block.weights[name]
                code = codes[name].to(weight.device)
                if not torch.equal(weight, code.dequantize().view(weight.shape).to(weight.dtype)):
                    different.append(where)
                if code.most_levels_in_a_group() > 2**code.bits:
                    too_fine.append(where)
    count = sum(code.codes_EOI.numel() for codes in quantized for code in codes.values())
    if count != model.facts.linear_parameters:
        missing.append(f"{model.facts.linear_parameters - count} of {model.facts.linear_parameters} weights")
    return [
        _check("every targeted weight is quantized", missing),
        _check("the weights evaluated are the codes' values", different),
        _check("no group has more than 2^bits levels", too_fine),
        finite,
    ]


def _check(name: str, offenders: list[str]) -> Check:
    shown = ", ".join(offenders[:5]) + (f" and {len(offenders) - 5} more" if len(offenders) > 5 else "")
    return Check(name=name, passed=not offenders, detail=shown)
