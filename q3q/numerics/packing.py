"""Codes of a few bits, packed without gaps into 32-bit words, as every checkpoint format stores them.

A word's lowest bits hold its first code, and a code may straddle two words (3, 5, 6, 7 bits). Eight codes of b bits
fill b bytes exactly, whatever b is: both ways go through eight codes in one 64-bit number. Hosts are little-endian.
"""

import torch
from torch import Tensor

RUN = 8  # codes that fill whole bytes together


def pack_bits(codes_xN: Tensor, bits: int) -> Tensor:
    """[..., N] codes 0 .. 2**bits - 1 as int32 words [..., ceil(N * bits / 32)]; what is over in the last one is 0.

    bits: 1 to 8.
    """
    count = codes_xN.shape[-1]
    padded = torch.nn.functional.pad(codes_xN, (0, -count % RUN))
    runs_xn8 = padded.unflatten(-1, (-1, RUN))
    number_xn = runs_xn8[..., 0].to(torch.int64)
    for k in range(1, RUN):
        number_xn |= runs_xn8[..., k].to(torch.int64) << (k * bits)
    bytes_xB = (
        number_xn.contiguous().view(torch.uint8).unflatten(-1, (-1, 8))[..., :bits].flatten(-2)
    )
    needed = -(-count * bits // 32) * 4
    bytes_xB = torch.nn.functional.pad(bytes_xB, (0, max(0, needed - bytes_xB.shape[-1])))[
        ..., :needed
    ]
    return bytes_xB.contiguous().view(torch.int32)


def unpack_bits(words_xW: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes [..., count], uint8, of packed int32 words."""
    bytes_xB = words_xW.contiguous().view(torch.uint8)
    runs = -(-count // RUN)
    bytes_xB = torch.nn.functional.pad(bytes_xB, (0, max(0, runs * bits - bytes_xB.shape[-1])))[
        ..., : runs * bits
    ]
    eight_xn8 = torch.nn.functional.pad(bytes_xB.unflatten(-1, (runs, bits)), (0, 8 - bits))
    number_xn = eight_xn8.contiguous().view(torch.int64).squeeze(-1)
    mask = 2**bits - 1
    codes = [((number_xn >> (k * bits)) & mask).to(torch.uint8) for k in range(RUN)]
    return torch.stack(codes, dim=-1).flatten(-2)[..., :count]
