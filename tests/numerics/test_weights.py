"""Both kinds of stored weight: their values, their sizes, and their round trip through plain
tensors.
"""

import pytest
import torch

from q3q.errors import ShapeError
from q3q.numerics.grid import into_groups, minmax_grid
from q3q.numerics.weights import BinarizedWeight, QuantizedWeight, round_to_grid, stored_weight


def grid_weight() -> QuantizedWeight:
    values = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(0))
    return round_to_grid(
        values, minmax_grid(into_groups(values, 8), 3, symmetric=False), 3, 8, symmetric=False
    )


def binarized_weight() -> BinarizedWeight:
    """2 experts, 6 rows, 4 blocks of 8 columns; each block's columns 1 and 5 are salient."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(4, (2, 6, 4, 8), generator=generator)
    codes[..., [1, 5]] += 4
    numbers = [torch.rand(2, 6, 4, 4, generator=generator) for _ in range(2)]
    return BinarizedWeight(codes.flatten(2).to(torch.uint8), *numbers)


@pytest.fixture(params=[grid_weight, binarized_weight], ids=["grid", "binarized"])
def weight(request):
    return request.param()


def test_it_round_trips_through_plain_tensors(weight):
    back = stored_weight(weight.to_tensors(), weight.facts())
    assert type(back) is type(weight)
    assert torch.equal(back.dequantize(), weight.dequantize())
    assert torch.equal(weight.to("cpu").dequantize(), weight.dequantize())


def test_rows_are_rows(weight):
    part = weight.rows(1, 4)
    assert part.shape == (2, 3, 32)
    assert torch.equal(part.dequantize(), weight.dequantize()[:, 1:4])


def test_storage_counts_everything_and_nominal_bits_the_codes(weight):
    if weight.kind == "grid":  # 3 bits a code; 48 groups with a 16-bit scale and a 3-bit zero point
        assert weight.storage_bits() == 384 * 3 + 48 * (16 + 3)
        assert weight.nominal_bits() == 384 * 3
    else:  # 2 bits a weight, 48 groups of 4 means and 4 scales, a bit a column; 1 in 4 is salient
        assert weight.storage_bits() == 384 * 2 + 48 * 8 * 16 + 2 * 32
        assert weight.nominal_bits() == 384 + 96


def test_billms_true_bits_are_about_three_at_its_own_block_size():
    codes, numbers = torch.zeros(1, 512, 256, dtype=torch.uint8), torch.ones(1, 512, 2, 4)
    weight = BinarizedWeight(codes, numbers, numbers)
    assert weight.storage_bits() / codes.numel() == 3 + 1 / 512
    assert weight.nominal_bits() / codes.numel() == 1


def test_what_each_code_of_a_binarized_weight_stands_for():
    mean = torch.tensor([1.0, 10.0, 100.0, 1000.0]).view(1, 1, 1, 4)
    scale = torch.tensor([0.1, 0.2, 0.3, 0.4]).view(1, 1, 1, 4)
    codes = torch.arange(8, dtype=torch.uint8).view(1, 1, 8)
    small, large = [0.9, 1.1], [9.8, 10.2]
    salient = [
        100 - 0.3 + 1000 - 0.4,
        100 + 0.3 + 1000 - 0.4,
        100 - 0.3 + 1000 + 0.4,
        100 + 0.3 + 1000 + 0.4,
    ]
    expected = torch.tensor([[[*small, *large, *salient]]])
    torch.testing.assert_close(BinarizedWeight(codes, mean, scale).dequantize(), expected)


def test_more_levels_than_the_bits_allow_are_noticed(weight):
    assert not weight.too_fine()
    weight.codes_EOI[0, 0, :] = torch.arange(32) if weight.kind == "grid" else 8
    assert weight.too_fine() == (
        weight.kind == "binarized"
    )  # 32 codes, eight in each group of three bits
    if weight.kind == "grid":
        assert QuantizedWeight(
            weight.codes_EOI, weight.scale_EOG, weight.zero_EOG, 2, False
        ).too_fine()


def test_a_column_that_is_salient_in_some_rows_only_is_noticed():
    weight = binarized_weight()
    weight.codes_EOI[1, 2, 0] += 4
    assert weight.too_fine()


def test_the_largest_number_stored_in_16_bits_is_found(weight):
    numbers = weight.scale_EOG if weight.kind == "grid" else weight.mean_EOG4
    numbers[1, 2, 3] = -1e6
    assert weight.largest_scale() == 1e6


def test_tensors_that_do_not_fit_are_refused():
    numbers = torch.ones(1, 4, 2, 4)
    with pytest.raises(ShapeError, match="do not fit"):
        BinarizedWeight(torch.zeros(1, 5, 16, dtype=torch.uint8), numbers, numbers)
