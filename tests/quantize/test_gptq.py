"""Laws of GPTQ, and its fast path against the plain algorithm."""

import pytest
import torch

from q3q.errors import NumericsError
from q3q.models.anatomy import SiteInput
from q3q.numerics.grid import into_groups, minmax_grid, to_codes
from q3q.numerics.levels import IntegerLevels
from q3q.numerics.linalg import damped_factor, inverse_upper_cholesky
from q3q.numerics.weights import QuantizedWeight, round_to_grid
from q3q.quantize.method import SiteTask
from q3q.quantize.methods.gptq import gptq_round, gptq_round_plain
from q3q.quantize.statistics import Gram
from q3q.spec import Scheme
from tests.methods import built


def scheme(bits=3, group_size=16, symmetric=False):
    return Scheme(bits=bits, group_size=group_size, symmetric=symmetric)


def rtn(weight_EOI, s):
    grid = minmax_grid(into_groups(weight_EOI, s.group_size), s.bits, symmetric=s.symmetric)
    return round_to_grid(weight_EOI, grid, s.bits, s.group_size, symmetric=s.symmetric)


def problem(experts=1, rows=12, columns=64, rank=24, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(experts, rows, columns, generator=generator)
    inputs = torch.randn(experts, 400, rank, generator=generator) @ torch.randn(
        experts, rank, columns, generator=generator
    )
    inputs = inputs + 0.1 * torch.randn(experts, 400, columns, generator=generator)
    return weight, inputs.transpose(1, 2) @ inputs / 400


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("static_groups", [True, False])
@pytest.mark.parametrize("group_size", [-1, 16, 64])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("block_size", "mse"), [(16, False), (48, False), (48, True)])
def test_equals_the_plain_algorithm(
    doubles, monkeypatch, act_order, static_groups, group_size, symmetric, block_size, mse
):
    weight, hessian = problem()
    hessian[0, :, 5] = hessian[0, 5, :] = 0  # a column that no token activates
    options = dict(
        damping=0.02,
        block_size=block_size,
        act_order=act_order,
        static_groups=static_groups,
        mse=mse,
    )
    s = scheme(3, group_size, symmetric)
    fast = gptq_round(weight, hessian, s, dead_diagonal_E=torch.tensor([3.0]), **options).weight
    columns = []

    def observed(levels, column_O1, grid):
        columns.append(column_O1 / grid.scale)
        return to_codes(column_O1, grid, levels.bits)

    monkeypatch.setattr(IntegerLevels, "to_codes", observed)
    rounded, codes = gptq_round_plain(weight[0], hessian[0], s, dead_diagonal=3.0, **options)
    differs = fast.codes_EOI[0] != codes
    same = ~differs.any(1)
    if symmetric:
        # The lowest weight of a group is halfway between two codes, even in float64: where its grid
        # comes from weights that earlier columns updated, a last bit decides, and with it all later
        # columns of the row.
        diagonal = hessian[0].diagonal().clone()
        diagonal[5] = 3.0
        order = diagonal.argsort(descending=True, stable=True) if act_order else torch.arange(64)
        differs, steps = differs[:, order], torch.cat(columns, 1)
        first = differs & (differs.cumsum(1) == 1)
        assert ((steps - steps.floor() - 0.5).abs()[first] < 1e-9).all()
    else:
        assert same.all()
    torch.testing.assert_close(
        fast.dequantize()[0][same].double(), rounded[same], rtol=1e-6, atol=0
    )


def test_a_dead_columns_one_weighs_in_damping_on_the_official_scale(gptq_in_doubles):
    """The official Hessian is 2/windows * sum x x^T; the method works with the mean over tokens.

    The inputs are 32nds of whole numbers, whose sums are exact in any order.
    """
    x = (3 * torch.randn(6, 40, 64, generator=torch.Generator().manual_seed(0))).round() / 32
    x[:, :, 5:40] = 0
    gram, weight = Gram(), problem()[0]
    for part in x.split(4):
        gram.update(SiteInput(part.flatten(0, 1), [part.flatten(0, 1)], windows=len(part)))
    official = 2 / 6 * (x.flatten(0, 1).T @ x.flatten(0, 1)).double()
    fast = built("gptq", damping=0.5).quantize(SiteTask(0, "qkv", weight, {}, gram), scheme())
    _, codes = gptq_round_plain(weight[0].double(), official, scheme(), damping=0.5, act_order=True)
    [(_, hessian)] = gptq_in_doubles
    off_scale = gptq_round(weight, hessian, scheme(), damping=0.5, act_order=True).weight
    live = official.diagonal() > 0  # a group of zeros has its zero point halfway between two codes
    assert torch.equal(fast.codes_EOI[0][:, live], codes[:, live].to(torch.uint8))
    assert (off_scale.codes_EOI[0] == codes)[:, live].double().mean() < 0.98


def test_is_rounding_when_inputs_are_independent():
    weight, _ = problem()
    for order in (True, False):
        solved = gptq_round(weight, torch.eye(64)[None], scheme(), act_order=order).weight
        assert torch.equal(solved.codes_EOI, rtn(weight, scheme()).codes_EOI)


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_beats_rounding_when_inputs_are_correlated(act_order, seed):
    weight, hessian = problem(seed=seed)

    def cost(rounded):
        wrong = rounded.dequantize() - weight
        return float(((wrong @ hessian) * wrong).sum())

    assert cost(gptq_round(weight, hessian, scheme(), act_order=act_order).weight) < 0.6 * cost(
        rtn(weight, scheme())
    )


def test_rows_are_independent_given_the_hessian(doubles):
    weight, hessian = problem(rows=20)
    joint = gptq_round(weight, hessian, scheme(), act_order=True).weight
    assert isinstance(joint, QuantizedWeight)
    for rows in (slice(0, 7), slice(7, 20)):
        alone = gptq_round(weight[:, rows], hessian, scheme(), act_order=True).weight
        assert isinstance(alone, QuantizedWeight)
        assert torch.equal(joint.codes_EOI[:, rows], alone.codes_EOI)
        torch.testing.assert_close(joint.scale_EOG[:, rows], alone.scale_EOG)


def test_experts_solved_together_equal_experts_solved_alone(doubles):
    weight, hessian = problem(experts=3)
    joint = gptq_round(weight, hessian, scheme(), act_order=True).weight
    for e in range(3):
        alone = gptq_round(weight[e : e + 1], hessian[e : e + 1], scheme(), act_order=True).weight
        assert torch.equal(joint.codes_EOI[e], alone.codes_EOI[0])


def test_inputs_are_not_modified():
    weight, hessian = problem()
    before = weight.clone(), hessian.clone()
    gptq_round(weight, hessian, scheme(), act_order=True)
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])


def test_the_factor_is_that_of_the_official_three_steps(doubles):
    _, hessian = problem(experts=2)
    hessian = hessian + 0.1 * torch.eye(64)
    factor, failed = inverse_upper_cholesky(hessian.clone())
    official = torch.linalg.cholesky(
        torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True
    )
    assert not failed.any()
    torch.testing.assert_close(factor, official, rtol=1e-7, atol=1e-9)


def test_damping_is_raised_only_where_it_must_and_says_so():
    good, bad = torch.eye(4), torch.eye(4)
    bad[0, 1] = bad[1, 0] = 1.05  # indefinite until a tenth of the mean diagonal is added
    _, damping = damped_factor(torch.stack([good, bad]), 0.01)
    torch.testing.assert_close(damping, torch.tensor([0.01, 0.1]))


def test_a_hopeless_hessian_raises():
    hopeless = -torch.eye(4)[None]
    with pytest.raises(NumericsError, match="cannot be factored"):
        damped_factor(hopeless, 0.01)
    with pytest.raises(NumericsError, match="not finite"):
        damped_factor(torch.full((1, 4, 4), float("nan")), 0.01)
