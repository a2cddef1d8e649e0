"""Laws of BiLLM, and its fast path against the plain algorithm."""

import pytest
import torch

from q3q.errors import NumericsError, ShapeError
from q3q.evaluate.integrity import check_weights
from q3q.numerics.binary_weights import BinarizedWeight
from q3q.quantize.block_store import BlockStore
from q3q.quantize.methods.billm import SortedRows, billm_round, billm_round_plain
from q3q.quantize.methods.settings import BillmSettings
from q3q.quantize.walk import quantize_model
from q3q.spec import Scheme
from tests.fidelity.plain import billm_linear
from tests.methods import built
from tests.nowhere import Nowhere

SCHEME = Scheme(bits=1, group_size=16, symmetric=False)


def problem(experts=1, rows=12, columns=128, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(experts, rows, columns, generator=generator, dtype=dtype)
    weight = (
        weight * (0.3 + torch.rand(experts, 1, columns, generator=generator, dtype=dtype)) + 0.1
    )
    mixing = torch.randn(experts, 40, columns, generator=generator, dtype=dtype)
    inputs = torch.randn(experts, 400, 40, generator=generator, dtype=dtype) @ mixing
    inputs = inputs + torch.randn(experts, 400, columns, generator=generator, dtype=dtype)
    return weight, inputs.transpose(1, 2) @ inputs / 400


@pytest.mark.parametrize("metric", ["hessian", "magnitude"])
@pytest.mark.parametrize("block_size", [16, 64, 128])
def test_equals_the_plain_algorithm(metric, block_size):
    weight, hessian = problem(seed=block_size)
    hessian[0, :, 5] = hessian[0, 5, :] = 0  # a column that no token activates
    fast = billm_round(
        weight,
        hessian,
        block_size,
        damping=0.02,
        metric=metric,
        dead_diagonal_E=torch.tensor([3.0]),
    ).weight
    binarized, salient = billm_round_plain(
        weight[0], hessian[0], block_size, damping=0.02, metric=metric, dead_diagonal=3.0
    )
    assert torch.equal((fast.codes_EOI[0] >= 4).all(0), salient)
    torch.testing.assert_close(fast.dequantize()[0], binarized, rtol=1e-9, atol=1e-9)


def test_float32_differs_from_float64_where_a_tie_explains_it_only():
    """In the first block to differ; what the searches see in later ones follows from it."""
    weight, hessian = problem(rows=32, columns=256, seed=7)
    exact, single = (
        billm_round(weight.to(d), hessian.to(d), 128).weight for d in (torch.float64, torch.float32)
    )
    _, _, nearest_OB = billm_linear(weight[0], hessian[0], 0.01, 128, "hessian")
    differs_OB = (exact.codes_EOI != single.codes_EOI)[0].unflatten(1, (-1, 128)).any(2)
    for block in torch.where(differs_OB.any(0))[0][:1]:
        assert (nearest_OB[differs_OB[:, block], block] < 1e-4).all()


def test_linears_of_a_site_and_experts_are_as_if_each_were_alone():
    weight, hessian = problem(experts=3, rows=20)
    linears = (slice(0, 8), slice(8, 20))
    together = billm_round(weight, hessian, 64, linears=linears).weight
    assert not torch.equal(
        together.codes_EOI[:, 0] >= 4, together.codes_EOI[:, 8] >= 4
    )  # each linear its own columns
    for e in range(3):
        for rows in linears:
            alone = billm_round(weight[e : e + 1, rows], hessian[e : e + 1], 64).weight
            assert torch.equal(together.codes_EOI[e, rows], alone.codes_EOI[0])
            torch.testing.assert_close(together.dequantize()[e, rows], alone.dequantize()[0])
    shared = billm_round(weight, hessian[:1], 64).weight  # experts that all read the same tokens
    assert torch.equal(
        shared.codes_EOI[2], billm_round(weight[2:], hessian[:1], 64).weight.codes_EOI[0]
    )


def test_searching_in_pieces_changes_nothing(monkeypatch):
    weight, hessian = problem(experts=2, rows=30)
    whole = billm_round(weight, hessian, 64).weight
    monkeypatch.setattr("q3q.quantize.methods.billm.CHUNK", {"cpu": 2 * 50 * 50 * 7})
    assert torch.equal(billm_round(weight, hessian, 64).weight.codes_EOI, whole.codes_EOI)


@torch.inference_mode()
def test_factoring_a_few_experts_at_a_time_changes_nothing(moe_decoder, windows, monkeypatch):
    """With 4 experts of which a chunk takes one or two."""
    block = list(moe_decoder.blocks)
    quantize_model(moe_decoder, built("billm"), SCHEME, windows, Nowhere())
    whole = moe_decoder.blocks
    moe_decoder.blocks = block
    monkeypatch.setattr("q3q.quantize.statistics.HESSIAN_BYTES", 4 * 32 * 32)
    quantize_model(moe_decoder, built("billm"), SCHEME, windows, Nowhere())
    for a, b in zip(whole, moe_decoder.blocks, strict=True):
        assert all(torch.equal(a.weights[name], b.weights[name]) for name in a.weights)


def test_sums_over_sorted_rows_are_plain_sums():
    x = torch.randn(1, 3, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    excluded = torch.zeros(1, 3, 9, dtype=torch.bool)
    excluded[..., [2, 6]] = True
    rows = SortedRows(x, excluded)
    center = torch.tensor([-5.0, -0.3, 0.2, 7.0], dtype=torch.float64).expand(1, 3, 4).contiguous()
    included = x[~excluded].view(1, 3, 7)
    expected = (included[..., None, :] - center[..., None]).abs()
    torch.testing.assert_close(rows.distance(rows.first, rows.count, center), expected.sum(-1))
    stop = torch.full((1, 3, 4), 5)
    stretch = (included.sort(-1).values[..., None, :5] - center[..., None]).abs()
    torch.testing.assert_close(rows.distance(rows.first, stop, center), stretch.sum(-1))


@pytest.mark.parametrize("metric", ["hessian", "magnitude"])
@pytest.mark.parametrize("seed", range(3))
def test_costs_far_less_than_naive_binarization(metric, seed):
    weight, hessian = problem(seed=seed, dtype=torch.float32)
    groups = weight.unflatten(2, (-1, 64))
    naive = (groups.sign() * groups.abs().mean(-1, keepdim=True)).flatten(2)
    ours = billm_round(weight, hessian, 64, metric=metric).weight.dequantize()
    cost = [
        float((((rounded - weight) @ hessian) * (rounded - weight)).sum())
        for rounded in (ours, naive)
    ]
    assert cost[0] < 0.5 * cost[1]


def test_a_row_of_one_value_is_kept_exactly():
    weight, hessian = problem(dtype=torch.float32)
    weight[0, 3] = 0.25
    rounded = billm_round(weight, torch.eye(128)[None], 64, metric="magnitude").weight.dequantize()
    torch.testing.assert_close(rounded[0, 3], weight[0, 3])
    assert torch.isfinite(
        billm_round(torch.zeros(1, 4, 128), hessian, 64).weight.dequantize()
    ).all()


def test_impossible_input_is_refused():
    weight, hessian = problem(dtype=torch.float32)
    with pytest.raises(ShapeError, match="group_size=48 does not divide 128"):
        billm_round(weight, hessian, 48)
    with pytest.raises(NumericsError, match="not finite"):
        billm_round(weight, hessian.fill_(torch.inf), 64)


@torch.inference_mode()
def test_a_walk_gives_one_bit_weights_and_goes_on_after_a_kill(decoder, windows, tmp_path):
    class DiesAfterOne(BlockStore):
        def store(self, block):
            if self.folder.exists():
                raise KeyboardInterrupt
            super().store(block)
            self.settle()

    def again():
        return type(decoder)(
            decoder.facts,
            decoder.embedding_VH,
            decoder.norm_H,
            decoder.head_VH,
            list(decoder.blocks),
        )

    whole, broken, resumed = again(), again(), again()
    results = quantize_model(whole, built("billm"), SCHEME, windows, BlockStore(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        quantize_model(broken, built("billm"), SCHEME, windows, DiesAfterOne(tmp_path / "broken"))
    assert all(
        check.passed for check in check_weights(whole, [result.quantized for result in results])
    )
    store = BlockStore(tmp_path / "broken")
    quantize_model(resumed, built("billm"), SCHEME, windows, store)
    assert store.reused == 1
    for block, other, result in zip(whole.blocks, resumed.blocks, results, strict=True):
        assert all(torch.equal(block.weights[name], other.weights[name]) for name in block.weights)
        assert set(result.quantized) == {name for site in block.sites for name in site.weights}
        for name, weight in result.quantized.items():
            assert isinstance(weight, BinarizedWeight)
            assert not weight.too_fine()
            for values in weight.dequantize().unflatten(2, (-1, 16)).flatten(0, 2):
                assert len(values.unique()) <= 2 + 2 + 4
            assert torch.equal(
                block.weights[name], weight.dequantize().view_as(block.weights[name])
            )


@torch.inference_mode()
def test_the_next_block_is_calibrated_on_binarized_outputs(decoder, windows):
    first, block = decoder.blocks[0], decoder.blocks[1]
    quantize_model(decoder, built("billm"), SCHEME, windows, Nowhere())
    alone = type(decoder)(
        decoder.facts, decoder.embedding_VH, decoder.norm_H, decoder.head_VH, [block]
    )
    entrance = decoder.blocks[0](decoder.embed(windows), decoder.rope)
    assert not torch.equal(entrance, first(decoder.embed(windows), decoder.rope))
    alone.embed = lambda ids: entrance[: len(ids)]
    quantize_model(alone, built("billm"), SCHEME, windows, Nowhere())
    for name in block.weights:
        assert torch.equal(alone.blocks[0].weights[name], decoder.blocks[1].weights[name])


@torch.inference_mode()
def test_an_expert_with_few_tokens_is_binarized_without_a_hessian_and_named(moe_decoder, windows):
    weights = dict(moe_decoder.blocks[0].weights)
    gate = torch.zeros_like(weights["mlp.gate.weight"])  # ties: always the same two
    moe_decoder.blocks[0] = moe_decoder.blocks[0].with_weights({"mlp.gate.weight": gate})
    results = quantize_model(moe_decoder, built("billm"), SCHEME, windows, Nowhere())
    starved = results[0].notes["blocks.0.gate_up"]["starved_experts"]
    assert len(starved) == 2
    assert results[0].notes["blocks.0.down"]["starved_experts"] == starved
    name = "mlp.experts.down_proj.weight"
    identity = torch.eye(16)[None]
    for e in starved:
        alone = billm_round(weights[name][e : e + 1], identity, 16).weight.dequantize()[0]
        assert torch.equal(moe_decoder.blocks[0].weights[name][e], alone)
        assert alone.abs().max() > 0


def test_what_makes_no_sense_is_refused_in_one_line():
    settings = BillmSettings()
    assert settings.clash(SCHEME) is None
    assert "cannot do bits=4; it takes 1" in (
        settings.clash(Scheme(bits=4, group_size=128, symmetric=False)) or ""
    )
    assert "group_size=-1 makes no sense" in (
        settings.clash(Scheme(bits=1, group_size=-1, symmetric=False)) or ""
    )
    assert "symmetric=true makes no sense" in (
        settings.clash(Scheme(bits=1, group_size=128, symmetric=True)) or ""
    )
    assert "choose from: hessian, magnitude" in (
        BillmSettings(salient_metric="entropy").problem() or ""
    )
    assert "method.damping=0" in (BillmSettings(damping=0).problem() or "")
    assert settings.problem() is None
