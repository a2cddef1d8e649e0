"""Laws of rounding to a grid."""

import pytest
import torch

from q3q.errors import ShapeError
from q3q.numerics.grid import (
    Grid,
    absmax_per_token,
    awq_grid,
    into_groups,
    minmax_grid,
    on_grid,
    to_codes,
)
from q3q.numerics.weights import QuantizedWeight, concatenate_rows, round_to_grid


def test_a_hand_made_row():
    # range -1 .. 2 in 2 bits: scale 1, zero point 1, so the points are -1, 0, 1, 2
    row = torch.tensor([[-1.0, 0.4, 0.6, 2.0]])
    grid = minmax_grid(row, 2, symmetric=False)
    assert (grid.scale.item(), grid.zero.item()) == (1.0, 1.0)
    assert on_grid(row, grid, 2).tolist() == [[-1.0, 0.0, 1.0, 2.0]]


def test_the_range_is_forced_to_include_zero_in_gptqs_grid_and_not_in_awqs():
    row = torch.tensor([[3.0, 6.0]])
    assert minmax_grid(row, 2, symmetric=False).scale.item() == 2.0
    assert awq_grid(row, 2, symmetric=False).scale.item() == 1.0


def test_a_group_of_zeros_stays_zero():
    row = torch.zeros(1, 4)
    for symmetric in (True, False):
        for grid in (
            minmax_grid(row, 3, symmetric=symmetric),
            awq_grid(row, 3, symmetric=symmetric),
        ):
            assert on_grid(row, grid, 3).abs().max() == 0


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("make", [minmax_grid, awq_grid])
def test_rounding_is_idempotent_and_within_half_a_step(bits, symmetric, make):
    rows = torch.randn(5, 64, generator=torch.Generator().manual_seed(bits))
    grid = make(rows, bits, symmetric=symmetric)
    once = on_grid(rows, grid, bits)
    assert torch.allclose(on_grid(once, grid, bits), once, atol=1e-6)
    # A zero point rounded to a whole number shifts the range by up to half a step: one step at its
    # very ends.
    assert ((rows - once).abs() <= grid.scale * 1.01).all()
    codes = to_codes(rows, grid, bits)
    assert codes.min() >= 0
    assert codes.max() <= 2**bits - 1


def test_the_mse_grid_is_never_worse_by_its_own_measure():
    rows = torch.randn(16, 128, generator=torch.Generator().manual_seed(0)) ** 3
    plain, searched = (minmax_grid(rows, 3, symmetric=False, mse=mse) for mse in (False, True))
    costs = [(on_grid(rows, grid, 3) - rows).abs().pow(2.4).sum(1) for grid in (plain, searched)]
    assert (costs[1] <= costs[0]).all()
    assert (costs[1] < 0.9 * costs[0]).any()


def test_activations_are_rounded_per_token_and_left_untouched():
    tokens = torch.tensor([[1.0, -127.0], [0.1, 12.7]])
    before = tokens.clone()
    rounded = absmax_per_token(tokens, 8)
    assert torch.equal(tokens, before)
    torch.testing.assert_close(rounded, tokens)
    assert absmax_per_token(torch.tensor([[0.4, -127.0]]), 8)[0, 0] == 0


def test_a_group_size_that_does_not_divide_is_refused_with_those_that_do():
    with pytest.raises(
        ShapeError, match=r"group_size=100 does not divide 96 input columns.*\[16, 32\]"
    ):
        into_groups(torch.zeros(2, 96), 100)


def weight(seed: int = 0) -> QuantizedWeight:
    values = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(seed))
    return round_to_grid(
        values, minmax_grid(into_groups(values, 8), 3, symmetric=False), 3, 8, symmetric=False
    )


def test_a_quantized_weight_round_trips_through_plain_tensors():
    weights = weight()
    back = QuantizedWeight.from_tensors(weights.to_tensors(), weights.facts())
    assert torch.equal(back.dequantize(), weights.dequantize())
    assert torch.equal(
        concatenate_rows([weights.rows(0, 2), weights.rows(2, 6)]).dequantize(),
        weights.dequantize(),
    )


def test_a_group_index_says_which_scale_is_whose():
    weights = weight()
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    index = (torch.arange(32) // 8)[order].to(torch.int32).expand(2, 32)
    shuffled = QuantizedWeight(
        weights.codes_EOI[:, :, order], weights.scale_EOG, weights.zero_EOG, 3, False, index
    )
    assert torch.equal(shuffled.dequantize(), weights.dequantize()[:, :, order])
    assert shuffled.most_levels_in_a_group() == weights.most_levels_in_a_group()


def test_storage_counts_codes_scales_and_zero_points():
    # 2 x 6 x 32 codes of 3 bits, 2 x 6 x 4 groups with a 16-bit scale and a 3-bit zero point
    assert weight().storage_bits() == 384 * 3 + 48 * (16 + 3)


def test_levels_in_a_group_are_counted():
    codes = torch.tensor([[[0, 1, 2, 3, 4, 4, 4, 4]]], dtype=torch.uint8)
    ones = torch.ones(1, 1, 2)
    assert QuantizedWeight(codes, ones, ones, 2, False).most_levels_in_a_group() == 4


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_codes_are_the_nearest_also_where_zero_points_are_no_whole_numbers(bits):
    generator = torch.Generator().manual_seed(bits)
    weight = torch.randn(32, 16, generator=generator)
    scale = torch.rand(32, 1, generator=generator) + 0.1
    zero = 2**bits * torch.rand(32, 1, generator=generator) - 0.5
    levels = torch.arange(2.0**bits)
    points = scale[..., None] * (levels - zero[..., None])  # [32, 1, levels]
    nearest = (weight[..., None] - points).abs().amin(-1)
    off = (on_grid(weight, Grid(scale, zero), bits) - weight).abs()
    assert torch.allclose(off, nearest, rtol=1e-4, atol=1e-5)
    codes = round_to_grid(
        weight[None], Grid(scale[None, ..., None], zero[None, ..., None]), bits, 16, symmetric=False
    )
    assert torch.equal(codes.dequantize()[0], on_grid(weight, Grid(scale, zero), bits))
    assert not torch.equal(zero, zero.round())


def test_whole_zero_points_give_the_bits_of_the_official_order_of_operations():
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(64, 64, generator=generator) * 4).round() / 2  # many ties
    zero = torch.randint(16, (64, 1), generator=generator).float()
    grid = Grid(torch.ones(64, 1), zero)
    assert torch.equal(to_codes(weight, grid, 4), (weight.round() + zero).clamp(0, 15))
    far = Grid(torch.full((64, 1), 1e-3), -torch.full((64, 1), 1e7))  # whole, as all that large
    assert torch.equal(to_codes(weight, far, 4), ((weight / 1e-3).round() + far.zero).clamp(0, 15))
