"""Relative errors of a site's quantized weights and of their outputs, for the record."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.linalg import vector_norm

from q3q.errors import NumericsError
from q3q.numerics.linalg import quadratic_form_E
from q3q.quantize.statistics import Gram
from q3q.record import SiteError


@dataclass(frozen=True)
class SquaredErrors:
    """Squared norms of some experts' weights W and of their errors W - Q; float32 on the CPU.

    error_E: |W - Q|^2
    weight_E: |W|^2
    outputs: the same two of the outputs over all calibration tokens; None without a Gram matrix
    """

    error_E: Tensor
    weight_E: Tensor
    outputs: tuple[Tensor, Tensor] | None

    @classmethod
    def of(cls, weight_EOI: Tensor, rounded_EOI: Tensor, gram: Gram | None) -> "SquaredErrors":
        """Measure one linear's errors; `rounded_EOI` is overwritten."""
        error_EOI = torch.sub(weight_EOI, rounded_EOI, out=rounded_EOI)
        outputs = None
        if gram is not None:
            sum_EII = gram.sum_EII
            outputs = (
                quadratic_form_E(error_EOI, sum_EII).cpu(),
                quadratic_form_E(weight_EOI, sum_EII).cpu(),
            )
        error_E, weight_E = (
            torch.stack([vector_norm(part_OI).square() for part_OI in part_EOI]).cpu()
            for part_EOI in (error_EOI, weight_EOI)
        )
        return cls(error_E, weight_E, outputs)


def site_error(block: int, site: str, name: str, parts: Sequence[SquaredErrors]) -> SiteError:
    """Return one linear's errors over all experts, of the whole and of each.

    Args:
        parts: of each chunk of experts, in order.

    Raises:
        NumericsError: weights that are all zero were rounded to something else, or an error is not
            a number.
    """
    error_E = torch.cat([part.error_E for part in parts]).double()
    weight_E = torch.cat([part.weight_E for part in parts]).double()
    outputs_of_parts = [part.outputs for part in parts if part.outputs is not None]
    outputs = [torch.cat(squares).double() for squares in zip(*outputs_of_parts, strict=True)]
    linear = name.removesuffix(".weight")
    weight_error_E = _root_ratio(error_E, weight_E)
    weight_error = float(_root_ratio(error_E.sum(), weight_E.sum()))
    if not (math.isfinite(weight_error) and bool(weight_error_E.isfinite().all())):
        raise NumericsError(
            f"blocks.{block}.{linear}: the error of its quantized weights, relative to the "
            "weights, is not a finite number: the method rounds weights that are all zero to "
            "something else, or returns NaN"
        )
    error_E, output_error = weight_error_E, None
    if outputs:
        # Without outputs that it could be relative to, an expert's error is its weights'.
        output_error_E = _root_ratio(*outputs)
        error_E = torch.where(output_error_E.isfinite(), output_error_E, weight_error_E)
        total = float(_root_ratio(*(part_E.sum() for part_E in outputs)))
        output_error = total if math.isfinite(total) else None
    experts = tuple(float(f"{error:.4g}") for error in error_E.tolist())
    return SiteError(
        block=block,
        site=site,
        linear=linear,
        weight_error=weight_error,
        output_error=output_error,
        experts=experts if len(experts) > 1 else None,
    )


def _root_ratio(part: Tensor, whole: Tensor) -> Tensor:
    """Return sqrt(part / whole), and 0 where both are 0; inf and nan are not hidden."""
    part, whole = part.clamp(min=0), whole.clamp(min=0)
    return torch.where((part == 0) & (whole == 0), 0.0, (part / whole).sqrt())
