"""Levels of small floating-point formats: rounding, codes and scales; pure functions on tensors.

Codes are the formats' own bit patterns, as torch's float8 dtypes and checkpoints have them.
"""

import math
from functools import cache

import torch
from torch import Tensor

from q3q.number_formats import FLOATS, NumberFormat, ScaleType
from q3q.numerics.grid import into_groups

E4M3 = FLOATS["fp8_e4m3"]
E8M0_BIAS = 127
SMALLEST_FLOAT_SCALE = 2.0**-126
# NVFP4's global factor lets the largest group's scale be the largest E4M3 number. With a choice of
# 4 or 6 it is 256 instead, so that 3/2 of it is a number too (arXiv 2512.02010).
LARGEST_SCALE, LARGEST_SCALE_OF_FOUR = 448.0, 256.0
# Of a float: where its exponent lies, by the width of its type.
_EXPONENTS = {
    torch.float32: (torch.int32, 0xFF << 23, 23, 127),
    torch.float64: (torch.int64, 0x7FF << 52, 52, 1023),
}


def nearest_(steps: Tensor, form: NumberFormat) -> Tensor:
    """Round numbers to the nearest level in place, ties to even; beyond the largest, to it.

    steps: float32 or float64. A number's sign stays, a zero's too; NaN stays NaN.
    """
    step = _power(steps.clamp_(-form.largest, form.largest), form).mul_(2.0**-form.mantissa)
    return steps.div_(step).round_().mul_(step)


def encode(levels: Tensor, form: NumberFormat) -> Tensor:
    """Return the codes, uint8, of numbers that are levels."""
    integer, _, shift, bias = _EXPONENTS[levels.dtype]
    power = _power(levels, form)
    binade = (power.view(integer) >> shift).sub_(bias + 1 - form.bias)  # 0 with the subnormals
    magnitude = levels.abs().div_(power).mul_(2**form.mantissa).to(integer)
    sign = torch.signbit(levels).to(integer) << (form.bits - 1)
    return magnitude.add_(binade << form.mantissa).add_(sign).to(torch.uint8)


def decode(codes: Tensor, form: NumberFormat) -> Tensor:
    """Return codes' levels in float32; NaN for codes above the largest level."""
    return _levels(form.name, codes.device)[codes.int()]


def float_scale(largest: Tensor, form: NumberFormat) -> Tensor:
    """Return the scale with which the largest number becomes the largest level; 1 for zeros.

    It is at least the smallest normal float32: that of the tiniest numbers would become 0, which
    nothing can be divided by.
    """
    scale = (largest / form.largest).clamp(min=SMALLEST_FLOAT_SCALE)
    return torch.where(largest > 0, scale, 1.0)


def power_scale(largest: Tensor, form: NumberFormat) -> Tensor:
    """Return the power of two that the format takes as the scale of these groups; 1 for zeros.

    Infinity for a group that has an infinite number.

    Source: generate_mx_scales of compressed-tensors. The largest number may exceed the largest
    level, to which it is then rounded.
    """
    significand, exponent = torch.frexp(largest)  # significand 1/2 to 1
    exponent = exponent - math.frexp(form.largest)[1] + (2 * significand >= form.carry)
    exponent = exponent.clamp_(-E8M0_BIAS, E8M0_BIAS)
    scale = torch.where(largest > 0, torch.ldexp(torch.ones_like(largest), exponent), 1.0)
    # frexp gives infinity no exponent. An infinite scale makes its group NaN, as in other formats,
    # so that activations that overflowed are noticed.
    return torch.where(largest.isinf(), largest, scale)


def e4m3_scale(wanted: Tensor) -> Tensor:
    """Return the E4M3 number nearest to each wanted scale; at least the smallest, 1 for zeros."""
    smallest = E4M3.smallest_normal * 2.0**-E4M3.mantissa
    return torch.where(wanted > 0, nearest_(wanted.clone(), E4M3).clamp_(min=smallest), 1.0)


def global_factor(peak: Tensor, form: NumberFormat, *, four_over_six: bool = False) -> Tensor:
    """Return the factor that scales are stored times, from the largest weight of a linear.

    Source: generate_gparam of compressed-tensors. 1 for a linear of zeros.
    """
    top = LARGEST_SCALE_OF_FOUR if four_over_six else LARGEST_SCALE
    factor = top * form.largest / peak
    return torch.where(factor.isfinite() & (peak > 0), factor, 1.0)


def scale_codes(scale: Tensor, kind: ScaleType) -> Tensor:
    """Return stored scales as they lie on disk: E4M3 and E8M0 as uint8, others as they are."""
    if kind == "e4m3":
        return encode(scale, E4M3)
    if kind == "e8m0":
        return torch.frexp(scale).exponent.add_(E8M0_BIAS - 1).to(torch.uint8)
    return scale


def scale_numbers(codes: Tensor, kind: ScaleType) -> Tensor:
    """Return the numbers, float32, of what `scale_codes` returned."""
    if kind == "e4m3":
        return decode(codes, E4M3)
    if kind == "e8m0":
        return torch.ldexp(torch.ones_like(codes, dtype=torch.float32), codes.int() - E8M0_BIAS)
    return codes


def floats_per_token(inputs_xI: Tensor, form: NumberFormat, group_size: int) -> Tensor:
    """Round activations to a floating-point format with scales of each token's own groups.

    As with whole numbers, nothing depends on other tokens: the factor of E4M3 scales is a token's,
    where servers take one per layer from calibration. Computed in float32.

    Args:
        group_size: channels of a token that share a scale; -1: all.
    """
    groups_xGS = into_groups(inputs_xI.float(), group_size)
    largest_xG1 = groups_xGS.abs().amax(-1, keepdim=True)
    if form.scale == "float":
        scale_xG1 = float_scale(largest_xG1, form)
    elif form.scale == "e8m0":
        scale_xG1 = power_scale(largest_xG1, form)
    else:
        factor_x11 = global_factor(largest_xG1.amax(-2, keepdim=True), form)
        scale_xG1 = e4m3_scale(factor_x11 * (largest_xG1 / form.largest)) / factor_x11
    rounded_xGS = nearest_(groups_xGS / scale_xG1, form).mul_(scale_xG1)
    return rounded_xGS.flatten(-2).to(inputs_xI.dtype)


def floats_at(inputs: Tensor, form: NumberFormat, scale: float) -> Tensor:
    """Round numbers to a floating-point format with one given scale; beyond it, to the largest."""
    return nearest_(inputs.float() / scale, form).mul_(scale).to(inputs.dtype)


def _power(numbers: Tensor, form: NumberFormat) -> Tensor:
    """Return 2**floor(log2 |x|), but no less than the smallest normal level."""
    integer, mask, _, _ = _EXPONENTS[numbers.dtype]
    return (numbers.view(integer) & mask).view(numbers.dtype).clamp_(min=form.smallest_normal)


@cache
def _levels(name: str, device: torch.device) -> Tensor:
    """Return every code's number, float32."""
    form = FLOATS[name]
    code = torch.arange(2**form.bits)
    exponent = (code >> form.mantissa) & (2**form.exponent - 1)
    fraction = (code & (2**form.mantissa - 1)) / 2**form.mantissa
    significand = fraction + (exponent > 0)
    level = torch.ldexp(significand, exponent.clamp(min=1) - form.bias)
    level = torch.where(level > form.largest, torch.nan, level)
    return torch.where(code >> (form.bits - 1) > 0, -level, level).float().to(device)
