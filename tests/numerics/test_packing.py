"""Bits packed into words: against a plain bit string, and back."""

import pytest
import torch

from q3q.numerics.packing import pack_bits, unpack_bits


def plain_words(codes, bits):
    """Write every code's bits one after the other, lowest first, and cut the string into words."""
    string = "".join(format(code, f"0{bits}b")[::-1] for code in codes)
    string += "0" * (-len(string) % 32)
    words = [int(string[k : k + 32][::-1], 2) for k in range(0, len(string), 32)]
    return [word - 2**32 if word >= 2**31 else word for word in words]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 8, 21, 32, 96])
def test_words_hold_the_codes_bit_by_bit(bits, count):
    codes = torch.randint(2**bits, (3, count), generator=torch.Generator().manual_seed(bits)).to(
        torch.uint8
    )
    packed = pack_bits(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.tolist() == [plain_words(row, bits) for row in codes.tolist()]
    assert torch.equal(unpack_bits(packed, bits, count), codes)


def test_leading_axes_and_strides_do_not_matter():
    codes = torch.randint(16, (2, 5, 24), generator=torch.Generator().manual_seed(0)).to(
        torch.uint8
    )
    packed = pack_bits(codes.mT, 4)
    assert torch.equal(unpack_bits(packed, 4, 5), codes.mT)
