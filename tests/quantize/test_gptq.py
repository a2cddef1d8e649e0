"""Laws of GPTQ, and its production path against a plain transcription of the official loops."""

import pytest
import torch

from q3q.errors import NumericsError
from q3q.models.anatomy import SiteInput
from q3q.numerics.grid import into_groups, minmax_grid
from q3q.numerics.linalg import damped_factor, inverse_upper_cholesky
from q3q.numerics.weights import round_to_grid
from q3q.quantize.method import SiteTask
from q3q.quantize.methods.gptq import Gptq, gptq_round
from q3q.quantize.methods.settings import GptqSettings
from q3q.quantize.statistics import Gram
from q3q.spec import Scheme


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


def plain_gptq(W, H, bits, groupsize, symmetric, percdamp, blocksize, actorder, static_groups):
    """The official loops for one 2-D weight, in float64, written from their description; returns Q and codes."""
    W, H = W.double().clone(), H.double().clone()
    rows, columns = W.shape
    top = 2**bits - 1

    def find_params(x):
        low = torch.minimum(x.min(1).values, torch.zeros(1, dtype=torch.float64))
        high = torch.maximum(x.max(1).values, torch.zeros(1, dtype=torch.float64))
        if symmetric:
            high = torch.maximum(low.abs(), high)
            low = -high
        for r in range(len(low)):
            if low[r] == 0 and high[r] == 0:
                low[r], high[r] = -1, 1
        scale = (high - low) / top
        zero = torch.full_like(scale, (top + 1) / 2) if symmetric else torch.round(-low / scale)
        return scale, zero

    scale, zero = find_params(W) if groupsize == -1 else (None, None)
    dead = torch.diag(H) == 0
    H[dead, dead] = 1
    W[:, dead] = 0
    statics = None
    if groupsize != -1 and static_groups:
        statics = [find_params(W[:, g : g + groupsize]) for g in range(0, columns, groupsize)]
    perm = torch.arange(columns)
    if actorder:
        perm = torch.argsort(torch.diag(H), descending=True, stable=True)
        W, H = W[:, perm], H[perm][:, perm]
    damp = percdamp * torch.mean(torch.diag(H))
    H[range(columns), range(columns)] += damp
    Hinv = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)), upper=True)
    Q, codes = torch.zeros_like(W), torch.zeros_like(W)
    for i1 in range(0, columns, blocksize):
        i2 = min(i1 + blocksize, columns)
        W1, Err1 = W[:, i1:i2].clone(), torch.zeros(rows, i2 - i1, dtype=torch.float64)
        for i in range(i2 - i1):
            if groupsize != -1:
                if statics is not None:
                    scale, zero = statics[perm[i1 + i] // groupsize]
                elif (i1 + i) % groupsize == 0:
                    scale, zero = find_params(W[:, i1 + i : i1 + i + groupsize])
            w, d = W1[:, i], Hinv[i1 + i, i1 + i]
            code = torch.clamp(torch.round(w / scale) + zero, 0, top)
            q = scale * (code - zero)
            codes[:, i1 + i], Q[:, i1 + i] = code, q
            err = (w - q) / d
            for j in range(i, i2 - i1):
                W1[:, j] -= err * Hinv[i1 + i, i1 + j]
            Err1[:, i] = err
        W[:, i2:] -= Err1 @ Hinv[i1:i2, i2:]
    back = torch.argsort(perm)
    return Q[:, back], codes[:, back]


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("static_groups", [True, False])
@pytest.mark.parametrize("group_size", [-1, 16, 64])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("block_size", [16, 48])
def test_equals_the_official_loops(act_order, static_groups, group_size, symmetric, block_size):
    weight, hessian = problem()
    hessian[0, :, 5] = hessian[0, 5, :] = 0  # a column that no token ever activates
    s = scheme(3, group_size, symmetric)
    ours = gptq_round(
        weight, hessian, s, block_size=block_size, act_order=act_order, static_groups=static_groups
    ).weight
    expected, codes = plain_gptq(
        weight[0], hessian[0], 3, group_size, symmetric, 0.01, block_size, act_order, static_groups
    )
    agree = (ours.codes_EOI[0] == codes).double().mean()
    assert agree > 0.995  # float32 against float64: a tie may fall the other way
    same = (ours.codes_EOI[0] == codes).all(1)
    torch.testing.assert_close(
        ours.dequantize()[0][same].double(), expected[same], rtol=1e-3, atol=1e-4
    )


def test_a_dead_columns_one_weighs_in_damping_on_the_official_scale():
    """2/windows * sum x x^T with a dead diagonal of 1, against the mean over tokens that the method works with."""
    x = torch.randn(6, 40, 64, generator=torch.Generator().manual_seed(0)) * 0.1
    x[:, :, 5:40] = 0
    gram, weight = Gram(), problem()[0]
    for part in x.split(4):
        gram.update(SiteInput(part.flatten(0, 1), [part.flatten(0, 1)], windows=len(part)))
    official = 2 / 6 * x.flatten(0, 1).T @ x.flatten(0, 1)
    ours = Gptq(GptqSettings(damping=0.5)).quantize(SiteTask(0, "qkv", weight, {}, gram), scheme())
    _, codes = plain_gptq(weight[0], official, 3, 16, False, 0.5, 128, True, False)
    off_scale = gptq_round(weight, gram.mean_EII(), scheme(), damping=0.5, act_order=True).weight
    live = official.diagonal() > 0  # a group of zeros has its zero point halfway between two codes
    assert (ours.codes_EOI[0] == codes)[:, live].double().mean() > 0.995
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


def test_rows_are_independent_given_the_hessian():
    weight, hessian = problem(rows=20)
    together = gptq_round(weight, hessian, scheme(), act_order=True).weight
    for rows in (slice(0, 7), slice(7, 20)):
        alone = gptq_round(weight[:, rows], hessian, scheme(), act_order=True).weight
        assert torch.equal(together.codes_EOI[:, rows], alone.codes_EOI)
        assert torch.equal(together.scale_EOG[:, rows], alone.scale_EOG)


def test_experts_solved_together_equal_experts_solved_alone():
    weight, hessian = problem(experts=3)
    together = gptq_round(weight, hessian, scheme(), act_order=True).weight
    for e in range(3):
        alone = gptq_round(weight[e : e + 1], hessian[e : e + 1], scheme(), act_order=True).weight
        assert (together.codes_EOI[e] == alone.codes_EOI[0]).double().mean() > 0.995


def test_inputs_are_not_modified():
    weight, hessian = problem()
    before = weight.clone(), hessian.clone()
    gptq_round(weight, hessian, scheme(), act_order=True)
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])


def test_the_factor_is_that_of_the_official_three_steps():
    _, hessian = problem(experts=2)
    hessian = hessian + 0.1 * torch.eye(64)
    factor, failed = inverse_upper_cholesky(hessian.clone())
    official = torch.linalg.cholesky(
        torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True
    )
    assert not failed.any()
    torch.testing.assert_close(factor, official, rtol=1e-3, atol=1e-4)


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
