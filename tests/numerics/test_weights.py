"""Both kinds of stored weight: their values, their sizes, and their round trip through plain
tensors.
"""

from typing import Any

import pytest
import torch

from q3q.errors import NumericsError, ShapeError
from q3q.numerics import weights
from q3q.numerics.binary_weights import BinarizedWeight
from q3q.numerics.grid import into_groups, minmax_grid
from q3q.numerics.weights import (
    QuantizedWeight,
    numbers,
    pieces,
    refuse_unsound,
    round_to_grid,
    stored_weight,
)


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
    means_scales = [torch.rand(2, 6, 4, 4, generator=generator) for _ in range(2)]
    return BinarizedWeight(codes.flatten(2).to(torch.uint8), *means_scales)


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


@pytest.mark.parametrize("at_once", [1, 64, 200, 10**6])  # numbers: a row, two, an expert, all
def test_pieces_are_small_and_together_the_weight(weight, monkeypatch, at_once):
    monkeypatch.setattr(weights, "NUMBERS_AT_ONCE", at_once)
    whole, seen = weight.dequantize(), torch.zeros(2, 6, 32)
    for e, o, part in pieces(weight):
        assert part.shape.numel() <= max(at_once, 32)
        seen[e, o] += part.dequantize()
    assert torch.equal(seen, whole)
    assert torch.equal(numbers(weight, torch.float32), whole)
    assert [part.shape[1] for _, _, part in pieces(weight, most_rows=4)][:2] == [4, 2]


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


def one_weight(**changes):
    """Return codes 0 to 7 of 3 bits in two groups, exact for the weight that comes with them."""
    parts: dict[str, Any] = {
        "codes_EOI": torch.arange(8, dtype=torch.uint8).view(1, 1, 8),
        "scale_EOG": torch.tensor([[[0.5, 0.25]]]),
        "zero_EOG": torch.tensor([[[3.0, 4.0]]]),
        "bits": 3,
        "symmetric": False,
    }
    weight_EOI = QuantizedWeight(**parts).dequantize()
    return QuantizedWeight(**{**parts, **changes}), weight_EOI


def test_zero_points_that_are_no_codes_take_16_bits_and_survive():
    whole, _ = one_weight()
    assert whole.whole_zeros
    assert whole.storage_bits() == 8 * 3 + 2 * (16 + 3)
    for zero in ([3.5, 4.0], [3.0, 8.0], [-1.0, 0.0]):
        other, _ = one_weight(zero_EOG=torch.tensor([[zero]]))
        assert not other.whole_zeros
        assert other.storage_bits() == 8 * 3 + 2 * (16 + 16)
        back = stored_weight(other.to_tensors(), other.facts())
        assert torch.equal(back.dequantize(), other.dequantize())
    far, _ = one_weight(zero_EOG=torch.tensor([[[-1e6, 0.5]]]))
    assert far.largest_scale() == 1e6


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float32, torch.bfloat16])
def test_whole_codes_of_another_type_are_converted(dtype):
    codes = torch.arange(8).view(1, 1, 8)
    weight, weight_EOI = one_weight(codes_EOI=codes.to(dtype))
    assert weight.codes_EOI.dtype == torch.uint8
    assert torch.equal(weight.dequantize(), weight_EOI)


@pytest.mark.parametrize("wrong", [-1.0, 256.0, 2.5, float("nan"), float("inf")])
def test_codes_that_uint8_does_not_hold_are_refused(wrong):
    codes = torch.arange(8.0).view(1, 1, 8)
    codes[0, 0, 3] = wrong
    with pytest.raises(NumericsError, match=r"the code .* is not a whole number from 0 to 255"):
        one_weight(codes_EOI=codes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, None),
        ({"zero_EOG": torch.tensor([[[2.5, 4.75]]])}, None),
        ({"scale_EOG": torch.tensor([[[-0.5, 0.25]]])}, None),
        # What a cast makes of the code -1.
        ({"codes_EOI": torch.full((1, 1, 8), 255, dtype=torch.uint8)}, "a code is 255, and 3 bits"),
        ({"codes_EOI": torch.full((1, 1, 8), 8, dtype=torch.uint8)}, "hold 0 to 7"),
        ({"bits": 4}, "its codes have 4 bits, and bits=3 was asked for"),
        ({"symmetric": True}, "whose zero point is implied"),
        ({"scale_EOG": torch.tensor([[[0.0, 0.25]]])}, "a scale is 0 where the weights are not"),
        ({"scale_EOG": torch.tensor([[[float("inf"), 0.25]]])}, "a scale is not a finite number"),
        ({"zero_EOG": torch.tensor([[[3.0, float("nan")]]])}, "a zero point is not a finite"),
        ({"codes_EOI": torch.zeros(1, 2, 8, dtype=torch.uint8)}, r"its shape is \[1, 2, 8\]"),
    ],
)
def test_what_storing_would_change_is_refused(changes, says):
    if "codes_EOI" in changes and changes["codes_EOI"].shape[1] == 2:
        changes = changes | {name: torch.ones(1, 2, 2) for name in ("scale_EOG", "zero_EOG")}
    weight, weight_EOI = one_weight(**changes)
    if says is None:
        refuse_unsound(weight, weight_EOI, 3)
        return
    with pytest.raises(NumericsError, match=f"is not what would be stored: .*{says}"):
        refuse_unsound(weight, weight_EOI, 3)


def test_a_scale_of_zero_is_fine_where_all_weights_are_zero():
    weight, weight_EOI = one_weight(scale_EOG=torch.tensor([[[0.0, 0.25]]]))
    weight_EOI[..., :4] = 0
    refuse_unsound(weight, weight_EOI, 3)


@pytest.mark.parametrize("returned", [None, torch.zeros(1, 1, 8), (1, 2), {}])
def test_what_is_no_quantized_weight_is_refused(returned):
    with pytest.raises(NumericsError, match="return a QuantizedWeight"):
        refuse_unsound(returned, torch.zeros(1, 1, 8), 3)
