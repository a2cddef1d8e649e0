"""The bytes of GGUF's block types, as ggml-common.h and ggml-quants.c of llama.cpp lay them out.

Shapes: O out features, N blocks of all rows, S columns of a block, G groups of a block.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from q3q.numerics.block_weights import BlockWeight
from q3q.numerics.weights import QuantizedWeight


def pack_rows(weight: BlockWeight) -> Tensor:
    """Return the rows of one linear's weight [1, O, I] as a file holds them, uint8 [O, bytes]."""
    rows = weight.shape[1]
    codes_NS = weight.codes_EOI[0].reshape(-1, weight.form.block)
    return torch.cat(_LAYOUTS[weight.format](weight, codes_NS), 1).view(rows, -1)


def in_blocks(weight: QuantizedWeight) -> BlockWeight:
    """Return whole numbers even around zero, of 4 or 8 bits and float16 scales, as a type's."""
    return BlockWeight(weight.codes_EOI, weight.scale_EOG.half(), f"q{weight.bits}_0")


def _half(numbers_EOB: Tensor | None) -> Tensor:
    """Return a float16 of each block as two bytes [N, 2]."""
    assert numbers_EOB is not None
    return numbers_EOB[0].contiguous().view(-1, 1).view(torch.uint8)


def _of_groups(numbers_EOG: Tensor | None, groups: int) -> Tensor:
    """Return the whole numbers of each block's groups, int16 [N, G]."""
    assert numbers_EOG is not None
    return numbers_EOG[0].reshape(-1, groups).to(torch.int16)


def _interleaved(codes_NS: Tensor, run: int, bits: int) -> Tensor:
    """Pack codes of `bits` bits; a byte holds codes that are `run` apart, the lowest first."""
    per_byte = 8 // bits
    codes = codes_NS.unflatten(1, (-1, per_byte, run))
    packed = codes[:, :, 0].clone()
    for k in range(1, per_byte):
        packed |= codes[:, :, k] << (bits * k)
    return packed.flatten(1)


def _q8_0(weight: BlockWeight, codes_NS: Tensor) -> list[Tensor]:
    signed = (codes_NS.to(torch.int16) - weight.form.middle).to(torch.int8)
    return [_half(weight.block_scale_EOB), signed.view(torch.uint8)]


def _q4_0(weight: BlockWeight, codes_NS: Tensor) -> list[Tensor]:
    return [_half(weight.block_scale_EOB), _interleaved(codes_NS, 16, 4)]


def _q4_1(weight: BlockWeight, codes_NS: Tensor) -> list[Tensor]:
    assert weight.block_offset_EOB is not None
    scale, least = _half(weight.block_scale_EOB), _half(-weight.block_offset_EOB)
    return [scale, least, _interleaved(codes_NS, 16, 4)]


def _scales_of_6_bits(scale_N8: Tensor, offset_N8: Tensor) -> Tensor:
    """Pack eight scales and eight offsets of 6 bits into 12 bytes.

    The last four of each lie in four bits of the last bytes, and in the free two of the first ones.
    """
    first = scale_N8[:, :4] | ((scale_N8[:, 4:] >> 4) << 6)
    second = offset_N8[:, :4] | ((offset_N8[:, 4:] >> 4) << 6)
    last = (scale_N8[:, 4:] & 15) | ((offset_N8[:, 4:] & 15) << 4)
    return torch.cat([first, second, last], 1).to(torch.uint8)


def _q4_k(weight: BlockWeight, codes_NS: Tensor) -> list[Tensor]:
    scales = _scales_of_6_bits(_of_groups(weight.scale_EOG, 8), _of_groups(weight.offset_EOG, 8))
    shared = [_half(weight.block_scale_EOB), _half(weight.block_offset_EOB)]
    return [*shared, scales, _interleaved(codes_NS, 32, 4)]


def _q5_k(weight: BlockWeight, codes_NS: Tensor) -> list[Tensor]:
    *before, low = _q4_k(weight, codes_NS & 15)
    return [*before, _interleaved(codes_NS >> 4, 32, 1), low]


def _q6_k(weight: BlockWeight, codes_NS: Tensor) -> list[Tensor]:
    low = (codes_NS & 15).unflatten(1, (2, 2, 64))  # a byte holds codes that lie 64 apart
    scales = _of_groups(weight.scale_EOG, 16).to(torch.int8).view(torch.uint8)
    return [
        (low[:, :, 0] | (low[:, :, 1] << 4)).flatten(1),
        _interleaved(codes_NS >> 4, 32, 2),
        scales,
        _half(weight.block_scale_EOB),
    ]


def _q3_k(weight: BlockWeight, codes_NS: Tensor) -> list[Tensor]:
    scale_NG = _of_groups(weight.scale_EOG, 16) + 32
    low = (scale_NG[:, :8] & 15) | ((scale_NG[:, 8:] & 15) << 4)
    high_N44 = (scale_NG >> 4).unflatten(1, (4, 4))  # a byte holds those of groups 4 apart
    high = sum(high_N44[:, k] << (2 * k) for k in range(4))
    assert isinstance(high, Tensor)
    return [
        _interleaved(codes_NS >> 2, 32, 1),
        _interleaved(codes_NS & 3, 32, 2),
        torch.cat([low, high], 1).to(torch.uint8),
        _half(weight.block_scale_EOB),
    ]


def _q2_k(weight: BlockWeight, codes_NS: Tensor) -> list[Tensor]:
    scales = _of_groups(weight.scale_EOG, 16) | (_of_groups(weight.offset_EOG, 16) << 4)
    return [
        scales.to(torch.uint8),
        _interleaved(codes_NS, 32, 2),
        _half(weight.block_scale_EOB),
        _half(weight.block_offset_EOB),
    ]


_LAYOUTS: Mapping[str, Callable[[BlockWeight, Tensor], list[Tensor]]] = {
    "q8_0": _q8_0,
    "q6_k": _q6_k,
    "q5_k": _q5_k,
    "q4_k": _q4_k,
    "q3_k": _q3_k,
    "q2_k": _q2_k,
    "q4_1": _q4_1,
    "q4_0": _q4_0,
}
