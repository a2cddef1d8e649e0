"""Codes of a few bits, packed without gaps into 32-bit words, as checkpoint formats store them.

A word's lowest bits hold its first code, and a code may straddle two words (3, 5, 6, 7 bits). Eight
codes of b bits fill exactly b bytes, so packing and unpacking handle eight codes in one 64-bit
number. Hosts are little-endian.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

RUN = 8  # codes that together fill whole bytes


def pack_bits(codes_xN: Tensor, bits: int) -> Tensor:
    """Pack [..., N] codes 0 .. 2**bits - 1 into int32 words [..., ceil(N * bits / 32)].

    bits is 1 to 8. Unused bits of the last word are 0.
    """
    count = codes_xN.shape[-1]
    runs_xn8 = pad(codes_xN, (0, -count % RUN)).unflatten(-1, (-1, RUN))
    number_xn = runs_xn8[..., 0].to(torch.int64)
    for k in range(1, RUN):
        number_xn |= runs_xn8[..., k].to(torch.int64) << (k * bits)
    bytes_xn8 = number_xn.contiguous().view(torch.uint8).unflatten(-1, (-1, 8))
    bytes_xB = _of_length(bytes_xn8[..., :bits].flatten(-2), -(-count * bits // 32) * 4)
    return bytes_xB.contiguous().view(torch.int32)


def unpack_bits(words_xW: Tensor, bits: int, count: int) -> Tensor:
    """Unpack the first `count` codes [..., count], uint8, of int32 words."""
    runs = -(-count // RUN)
    bytes_xB = _of_length(words_xW.contiguous().view(torch.uint8), runs * bits)
    eight_xn8 = pad(bytes_xB.unflatten(-1, (runs, bits)), (0, 8 - bits))
    number_xn = eight_xn8.contiguous().view(torch.int64).squeeze(-1)
    mask = 2**bits - 1
    codes = [((number_xn >> (k * bits)) & mask).to(torch.uint8) for k in range(RUN)]
    return torch.stack(codes, dim=-1).flatten(-2)[..., :count]


def _of_length(bytes_xB: Tensor, length: int) -> Tensor:
    return pad(bytes_xB, (0, max(0, length - bytes_xB.shape[-1])))[..., :length]
