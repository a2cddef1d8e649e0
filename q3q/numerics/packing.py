"""Codes of a few bits, packed without gaps into 32-bit words, as checkpoint formats store them.

A word's lowest bits hold its first code, and a code may straddle two words (3, 5, 6, 7 bits). Eight
codes of b bits fill exactly b bytes, so packing and unpacking handle eight codes in one 64-bit
number: in three steps, neighbouring bytes, then pairs, then fours of them, move together or apart.
Hosts are little-endian.
"""

import torch
from torch import Tensor

RUN = 8  # codes that together fill whole bytes
# Numbers that are treated at a time: they stay in a core's cache, and a GPU has enough to do.
_CPU_PIECE, _GPU_PIECE = 1 << 17, 1 << 25
# The types whose numbers are exactly as long as a run of so many bits a code.
_RUN_TYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def pack_bits(codes_xN: Tensor, bits: int) -> Tensor:
    """Pack [..., N] codes 0 .. 2**bits - 1 into int32 words [..., ceil(N * bits / 32)].

    bits is 1 to 8. Unused bits of the last word are 0.
    """
    *leading, count = codes_xN.shape
    runs = -(-count // RUN)
    number_xn = torch.zeros(*leading, runs, dtype=torch.int64, device=codes_xN.device)
    number_xn.view(torch.uint8)[..., :count] = codes_xN
    for piece_n, upper_n in _pieces(number_xn):
        for shift, low, high in _steps(bits):
            torch.bitwise_right_shift(piece_n, shift, out=upper_n)
            piece_n.bitwise_and_(low)
            piece_n.bitwise_or_(upper_n.bitwise_and_(high))
    if bits in _RUN_TYPES:
        bytes_xB = number_xn.to(_RUN_TYPES[bits]).view(torch.uint8)
    else:
        bytes_xB = number_xn.view(torch.uint8).unflatten(-1, (-1, RUN))[..., :bits].flatten(-2)
    return _of_length(bytes_xB, -(-count * bits // 32) * 4).view(torch.int32)


def unpack_bits(words_xW: Tensor, bits: int, count: int) -> Tensor:
    """Unpack the first `count` codes [..., count], uint8, of int32 words."""
    runs = -(-count // RUN)
    bytes_xB = _of_length(words_xW.contiguous().view(torch.uint8), runs * bits)
    if bits in _RUN_TYPES:
        number_xn = bytes_xB.view(_RUN_TYPES[bits]).to(torch.int64, copy=True)
    else:
        shape = *words_xW.shape[:-1], runs
        number_xn = torch.zeros(shape, dtype=torch.int64, device=words_xW.device)
        bytes_xn8 = number_xn.view(torch.uint8).unflatten(-1, (-1, RUN))
        bytes_xn8[..., :bits] = bytes_xB.unflatten(-1, (-1, bits))
    for piece_n, upper_n in _pieces(number_xn):
        for shift, low, high in reversed(_steps(bits)):
            torch.bitwise_and(piece_n, high, out=upper_n)
            piece_n.bitwise_and_(low)
            piece_n.bitwise_or_(upper_n.bitwise_left_shift_(shift))
    return number_xn.view(torch.uint8)[..., :count]


def _steps(bits: int) -> list[tuple[int, int, int]]:
    """Return the three steps' shifts, with the masks of each pair's lower and upper part, moved."""
    steps = []
    for half in (1, 2, 4):  # bytes of a pair's parts
        used = half * bits
        low = sum((2**used - 1) << lane for lane in range(0, 64, 16 * half))
        steps.append((8 * half - used, low, low << used))
    return steps if bits < 8 else []


def _pieces(number_xn: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return pieces of the numbers, each with memory of its length, the same for all."""
    step = _CPU_PIECE if number_xn.device.type == "cpu" else _GPU_PIECE
    pieces = number_xn.view(-1).split(step)
    spare = torch.empty_like(pieces[0])
    return [(piece_n, spare[: len(piece_n)]) for piece_n in pieces]


def _of_length(bytes_xB: Tensor, length: int) -> Tensor:
    """Return contiguous bytes, cut to a length or filled up with zeros, aligned for any type."""
    if bytes_xB.shape[-1] == length and not bytes_xB.storage_offset() % RUN:
        return bytes_xB.contiguous()
    fitted_xB = bytes_xB.new_zeros(*bytes_xB.shape[:-1], length)
    kept = min(length, bytes_xB.shape[-1])
    fitted_xB[..., :kept] = bytes_xB[..., :kept]
    return fitted_xB
