"""Round inputs by scales that a checkpoint stores; pure functions on tensors.

Shapes: x any, I channels, G groups of channels.
"""

import torch
from torch import Tensor

from q3q.number_formats import FLOATS, NumberFormat
from q3q.numerics.floats import global_factor, nearest_
from q3q.numerics.grid import absmax_per_token, into_groups

OUTLIER = 6.0  # bitsandbytes' llm_int8_threshold
# compressed-tensors' in place of a scale that E4M3 rounds to zero. Its numbers all become zero.
NO_SCALE = 0.125


def floats_by_scale(inputs_xI: Tensor, form: NumberFormat, scale: float) -> Tensor:
    """Round to a floating-point format with one scale for all numbers. Computed in float32."""
    wide = inputs_xI.float()
    number = wide.new_tensor(scale)
    return nearest_(wide / number, form).mul_(number).to(inputs_xI.dtype)


def ints_by_scale(inputs_xI: Tensor, bits: int, scale: float) -> Tensor:
    """Round to signed whole numbers with one scale for all. Computed in float32."""
    wide, most = inputs_xI.float(), 2 ** (bits - 1)
    number = wide.new_tensor(scale)
    return (wide / number).round_().clamp_(-most, most - 1).mul_(number).to(inputs_xI.dtype)


def floats_below_factor(
    inputs_xI: Tensor, form: NumberFormat, group_size: int, factor: float
) -> Tensor:
    """Round to a format whose groups' scales are E4M3 numbers, stored times a factor.

    Source: calculate_qparams and fake_quantize of compressed-tensors. Computed in float32.
    """
    groups_xGS = into_groups(inputs_xI.float(), group_size)
    number = groups_xGS.new_tensor(factor)
    wanted_xG1 = number * (groups_xGS.abs().amax(-1, keepdim=True) / form.largest)
    scale_xG1 = nearest_(wanted_xG1, FLOATS["fp8_e4m3"])
    scale_xG1 = torch.where(scale_xG1 == 0, NO_SCALE, scale_xG1) / number
    rounded_xGS = nearest_(groups_xGS / scale_xG1, form).mul_(scale_xG1)
    return rounded_xGS.flatten(-2).to(inputs_xI.dtype)


def input_factor(peak: float, form: str, dtype: torch.dtype) -> float:
    """Return the factor of an input's scales from the largest number that calibration showed.

    Computed in the model's dtype, as llm-compressor does, but in float32 for float16, in which the
    factor of small inputs is infinite. It is 1 for an input of zeros.
    """
    wide = torch.float32 if dtype == torch.float16 else dtype
    return float(global_factor(torch.tensor(peak, dtype=wide), FLOATS[form]))


def ints_but_outliers(inputs_xI: Tensor, bits: int) -> Tensor:
    """Round each token's numbers to whole ones, but those of OUTLIER or more stay (LLM.int8)."""
    large = inputs_xI.abs() >= OUTLIER
    rounded = absmax_per_token(inputs_xI.masked_fill(large, 0), bits, -1)
    return torch.where(large, inputs_xI, rounded)
