"""Experts: each one's codes are its own, and every way of calibrating them does what it says."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from torch.nn.functional import linear, silu

from benchmarks import moe
from q3q.config import resolve, schema
from q3q.errors import ConfigError, NumericsError
from q3q.evaluate.integrity import check_weights
from q3q.models.adjust import set_route
from q3q.models.decoder import Decoder
from q3q.numerics import weights
from q3q.numerics.linalg import damped_factor
from q3q.numerics.weights import QuantizedWeight
from q3q.quantize import sites, statistics, walk
from q3q.quantize.methods import awq, gptq
from q3q.quantize.methods.settings import SETTINGS, GptqSettings
from q3q.quantize.sites import stack_rows
from q3q.quantize.statistics import MIN_EXPERT_TOKENS, Gram, Peak, StoredInputs
from q3q.quantize.walk import quantize_model
from q3q.spec import Scheme
from tests.composed import compose
from tests.methods import built
from tests.nowhere import Nowhere
from tests.quantize.conftest import random_decoder

CONF = Path(__file__).parents[2] / "conf"
GATE, UP, DOWN = (f"mlp.experts.{name}_proj.weight" for name in ("gate", "up", "down"))


METHODS = [name for name, settings in SETTINGS.items() if settings.quantizes]


def scheme_for(name):
    bits = 3 if 3 in SETTINGS[name].bits else SETTINGS[name].bits[0]
    return Scheme(bits=bits, group_size=16, symmetric=SETTINGS[name].default_symmetric)


def first_block(decoder):
    return Decoder(
        decoder.facts, decoder.embedding_VH, decoder.norm_H, decoder.head_VH, decoder.blocks[:1]
    )


def quantized(decoder, name, windows, every_expert=False, **settings):
    """Quantize the first block; return its result and the block with the new weights."""
    alone = first_block(decoder)
    alone.blocks[0] = alone.blocks[0].with_weights({})
    alone.blocks[0].every_expert = every_expert
    method = built(name, **settings)
    reads = windows if method.settings.observes() else None
    [result] = quantize_model(alone, method, scheme_for(name), reads, Nowhere())
    return result, alone.blocks[0]


@pytest.fixture
def many(windows):
    return torch.randint(61, (32, 40), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("touched", [GATE, DOWN])
@pytest.mark.parametrize("name", METHODS)
@torch.inference_mode()
def test_one_weight_of_one_expert_changes_that_experts_codes_alone(
    moe_decoder, many, name, touched
):
    weight = moe_decoder.blocks[0].weights[touched].clone()
    weight[2, 5, 7] += 3 * weight.std()
    other = first_block(moe_decoder)
    other.blocks[0] = other.blocks[0].with_weights({touched: weight})
    before, after = (
        quantized(decoder, name, many)[0].quantized for decoder in (moe_decoder, other)
    )
    assert not torch.equal(before[touched].codes_EOI[2], after[touched].codes_EOI[2])
    for linear_name in before:
        for e, (old, new) in enumerate(
            zip(before[linear_name].codes_EOI, after[linear_name].codes_EOI, strict=True)
        ):
            its_own = linear_name in (GATE, UP, DOWN) and e == 2
            assert its_own or torch.equal(old, new), (linear_name, e)


@pytest.mark.parametrize("every_expert", [False, True])
@torch.inference_mode()
def test_the_router_stays_as_it_is(moe_decoder, many, every_expert):
    result, block = quantized(moe_decoder, "gptq", many, every_expert)
    assert torch.equal(
        block.weights["mlp.gate.weight"], moe_decoder.blocks[0].weights["mlp.gate.weight"]
    )
    assert not [name for name in result.quantized if "gate.weight" in name]


def observed(decoder, windows, every_expert):
    """Return the inputs of each site of the original first block, and its output."""
    block = decoder.blocks[0].with_weights({})
    block.every_expert = every_expert
    stages = block.stages(decoder.embed(windows), decoder.rope)
    seen: dict[str, Any] = {}
    while True:
        try:
            site, inputs = next(stages)
        except StopIteration as end:
            return seen, end.value
        seen[site.name] = inputs


@torch.inference_mode()
def test_every_expert_is_shown_every_token_and_the_output_is_still_the_routers(moe_decoder, many):
    routed, expected = observed(moe_decoder, many, False)
    seen, output = observed(moe_decoder, many, True)
    assert torch.equal(output, expected)
    tokens, weights = routed["gate_up"].all_TI, moe_decoder.blocks[0].weights
    assert seen["gate_up"].shared
    assert not routed["gate_up"].shared
    assert sum(map(len, routed["gate_up"].experts)) == moe_decoder.facts.top_k * len(tokens)
    for e in range(4):
        torch.testing.assert_close(seen["gate_up"].experts[e], tokens)
        gated = silu(linear(tokens, weights[GATE][e])) * linear(tokens, weights[UP][e])
        torch.testing.assert_close(seen["down"].experts[e], gated)


@torch.inference_mode()
def test_every_expert_on_every_token_equals_solving_each_as_a_dense_linear(
    moe_decoder, many, gptq_in_doubles
):
    """GPTQ with route=all against one Hessian after the other, of all tokens, written out."""
    result, _ = quantized(moe_decoder, "gptq", many, every_expert=True, true_sequential=False)
    hessians = [hessian for _, hessian in gptq_in_doubles]
    seen, _ = observed(moe_decoder, many, False)
    tokens, weights = seen["gate_up"].all_TI, moe_decoder.blocks[0].weights
    for e in range(4):
        middle = silu(tokens @ weights[GATE][e].T) * (tokens @ weights[UP][e].T)
        for name, x, hessian in (
            (GATE, tokens, hessians[2]),
            (UP, tokens, hessians[2]),
            (DOWN, middle, hessians[3][e : e + 1]),
        ):
            torch.testing.assert_close(hessian[0], x.T @ x / len(x), rtol=1e-4, atol=1e-4)
            alone = gptq.gptq_round(
                weights[name][e : e + 1], hessian, scheme_for("gptq"), act_order=True
            ).weight
            ours = result.quantized[name]
            assert isinstance(ours, QuantizedWeight)
            assert isinstance(alone, QuantizedWeight)
            assert torch.equal(ours.codes_EOI[e], alone.codes_EOI[0])
            assert ours.group_EI is not None
            assert alone.group_EI is not None
            assert torch.equal(ours.group_EI[e], alone.group_EI[0])
    assert result.notes["blocks.0.gate_up"] == {"tokens_per_expert": [len(tokens)] * 4}


@pytest.mark.parametrize("sample", [100, 2000])  # of 1280 tokens: some, or all
@torch.inference_mode()
def test_awq_on_every_token_holds_a_sample_and_chooses_what_it_would_from_all(
    moe_decoder, many, monkeypatch, sample
):
    monkeypatch.setattr(awq, "CLIP_TOKENS", sample)
    bounded, _ = quantized(moe_decoder, "awq", many, every_expert=True)
    update, kept_all = StoredInputs.update, []

    def keep_all(self, inputs):
        update(self, replace(inputs, unrouted=False))
        kept_all.append(not self.sampled)

    monkeypatch.setattr(StoredInputs, "update", keep_all)
    whole, _ = quantized(moe_decoder, "awq", many, every_expert=True)
    assert kept_all.count(True) > kept_all.count(False) > 0  # o has one linear in any block
    for name, weight in whole.quantized.items():
        assert torch.equal(weight.codes_EOI, bounded.quantized[name].codes_EOI)
        assert torch.equal(weight.scale_EOG, bounded.quantized[name].scale_EOG)


@torch.inference_mode()
def test_one_shared_hessian_is_kept_and_factored_once(moe_decoder, many, monkeypatch):
    gram, factored = Gram(), []
    gram.update(observed(moe_decoder, many, True)[0]["gate_up"])
    assert gram.shared
    assert gram.sum_EII.shape == (4, 32, 32)
    assert gram.sum_EII.untyped_storage().nbytes() == 4 * 32 * 32

    def counted(hessian, *how, **more):
        factored.append(len(hessian))
        return damped_factor(hessian, *how, **more)

    monkeypatch.setattr(gptq, "damped_factor", counted)
    quantized(moe_decoder, "gptq", many, every_expert=True)
    assert factored == [1, 1, 1, 4]  # qkv, o, all experts' gate and up, each expert's down


@torch.inference_mode()
def test_chunks_of_experts_and_of_rows_change_nothing(
    moe_decoder, many, monkeypatch, gptq_in_doubles
):
    whole, _ = quantized(moe_decoder, "gptq", many)
    monkeypatch.setattr(statistics, "HESSIAN_BYTES", 2 * 4 * 32 * 32)
    monkeypatch.setattr(gptq, "CPU_ROWS", 24)
    parts, _ = quantized(moe_decoder, "gptq", many)
    for name, weight in whole.quantized.items():
        assert torch.equal(weight.codes_EOI, parts.quantized[name].codes_EOI)
        assert torch.equal(weight.group_EI, parts.quantized[name].group_EI)


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("every_expert", [False, True])
@pytest.mark.parametrize(
    ("name", "settings"),
    [("awq", {"v_to_o": True}), ("smoothquant", {"o_and_down": True}), ("billm", {})],
)
@torch.inference_mode()
def test_chunks_of_experts_share_a_scale_and_change_nothing(
    many, monkeypatch, name, settings, every_expert, passes
):
    decoder = random_decoder("moe", experts=6)
    whole, block = quantized(decoder, name, many, every_expert, **settings)
    monkeypatch.setattr(sites, "CHUNK_BYTES", 1)  # two experts at least
    monkeypatch.setattr(walk, "CHUNK_BYTES", 1)
    monkeypatch.setattr(walk, "OBSERVED_BYTES", 3 // passes)
    observe, observations = walk._observe, []

    def counted(original, chunks, *arguments, **options):
        observations.append(len(chunks))
        return observe(original, chunks, *arguments, **options)

    monkeypatch.setattr(walk, "_observe", counted)
    parts, same_block = quantized(decoder, name, many, every_expert, **settings)
    assert len(observations) == passes
    assert sum(observations) == 2 + 2 * 3  # qkv and o; three chunks of gate and up, and of down
    for linear_name, weight in whole.quantized.items():
        tensors, expected = parts.quantized[linear_name].to_tensors(), weight.to_tensors()
        assert all(torch.equal(tensors[key], expected[key]) for key in expected), linear_name
    for weight_name, weight in block.weights.items():
        assert torch.equal(weight, same_block.weights[weight_name]), weight_name
    assert parts.notes == whole.notes
    assert parts.changed.keys() == whole.changed.keys()
    assert [error.experts for error in parts.errors] == [error.experts for error in whole.errors]


@torch.inference_mode()
def test_the_integrity_check_widens_a_few_experts_at_a_time(moe_decoder, many, monkeypatch):
    result, block = quantized(moe_decoder, "gptq", many)
    checked = first_block(moe_decoder)
    checked.blocks[0] = block
    dequantize, sizes = QuantizedWeight.dequantize, []

    def noted(self):
        sizes.append(self.shape.numel())
        return dequantize(self)

    monkeypatch.setattr(QuantizedWeight, "dequantize", noted)
    monkeypatch.setattr(weights, "NUMBERS_AT_ONCE", 100)
    finite, *others = reversed(check_weights(checked, [result.quantized]))
    assert finite.passed
    assert [check.name for check in others if not check.passed] == [
        "every targeted weight is quantized"  # the second block's are not
    ]
    assert max(sizes) <= 100
    assert sum(sizes) == sum(weight.shape.numel() for weight in result.quantized.values())
    block.weights[DOWN][3, -1, -1] += 1
    wrong = [check for check in check_weights(checked, [result.quantized]) if not check.passed]
    assert DOWN.removesuffix(".weight") in wrong[-1].detail


@torch.inference_mode()
def test_tokens_are_counted_for_each_expert_and_starved_ones_named(moe_decoder, windows):
    gate = moe_decoder.blocks[0].weights["mlp.gate.weight"].clone()
    gate[2] = 0
    gate[[0, 1, 3]] *= 50
    moe_decoder.blocks[0] = moe_decoder.blocks[0].with_weights({"mlp.gate.weight": gate})
    windows = windows[:8]
    routed = observed(moe_decoder, windows, False)[0]["gate_up"]
    counts = [len(tokens) for tokens in routed.experts]
    assert min(counts) < MIN_EXPERT_TOKENS < max(counts)
    result, _ = quantized(moe_decoder, "gptq", windows, true_sequential=False)
    note = result.notes["blocks.0.gate_up"]
    assert note["tokens_per_expert"] == counts
    assert note["starved_experts"] == [
        e for e, count in enumerate(counts) if count < MIN_EXPERT_TOKENS
    ]
    assert "tokens_per_expert" not in result.notes["blocks.0.down"]


@torch.inference_mode()
def test_fewer_tokens_than_columns_are_noted_with_the_rank(decoder, windows, kind):
    few = windows[:1, :24]  # 24 tokens for 32, 48 and (dense) 48 columns
    alone = first_block(decoder)
    [result] = quantize_model(alone, built("gptq"), scheme_for("gptq"), few, Nowhere())
    assert result.notes["qkv.fewer_tokens_than_columns"] == {"rank": 24, "columns": 32}
    assert result.notes["o.fewer_tokens_than_columns"] == {"rank": 24, "columns": 48}
    if kind == "moe":
        note = result.notes["blocks.0.gate_up"]
        lowest = min(note["tokens_per_expert"])
        assert note["fewer_tokens_than_columns"] == {
            "experts": 4,
            "lowest_rank": lowest,
            "columns": 32,
        }
    else:
        assert result.notes["down.fewer_tokens_than_columns"] == {"rank": 24, "columns": 48}
    enough = quantize_model(
        first_block(decoder), built("gptq"), scheme_for("gptq"), windows, Nowhere()
    )
    assert not [key for key in enough[0].notes if key.endswith("fewer_tokens_than_columns")]


@torch.inference_mode()
def test_activations_that_overflow_are_refused_wherever_they_are_made(moe_decoder, many):
    up = moe_decoder.blocks[0].weights[UP].clone()
    up[1] = 3e38
    moe_decoder.blocks[0] = moe_decoder.blocks[0].with_weights({UP: up})
    for every_expert in (False, True):
        with pytest.raises(NumericsError, match=r"down.*activations are not finite"):
            quantized(moe_decoder, "gptq", many, every_expert, true_sequential=False)


@torch.inference_mode()
def test_experts_solved_in_one_batch_equal_experts_solved_one_by_one(
    moe_decoder, many, gptq_in_doubles
):
    block = moe_decoder.blocks[0]
    inputs = observed(moe_decoder, many, False)[0]["gate_up"]
    gram = Gram()
    gram.update(inputs)
    [site] = [site for site in block.sites if site.name == "gate_up"]
    weight, _ = stack_rows(block.weights, site)
    scheme, order = scheme_for("gptq"), GptqSettings().act_order
    together = gptq.gptq_round(weight, gram.mean_EII(), scheme, act_order=order).weight
    for e, tokens in enumerate(inputs.experts):
        hessian = gram.mean_EII()[e : e + 1]
        torch.testing.assert_close(
            hessian[0], tokens.T @ tokens / len(tokens), rtol=1e-4, atol=1e-4
        )
        alone = gptq.gptq_round(weight[e : e + 1], hessian, scheme, act_order=order).weight
        assert torch.equal(together.codes_EOI[e], alone.codes_EOI[0])


def test_a_gpus_calls_do_not_grow_with_the_number_of_experts():
    few, many = (moe.observing_calls(experts, tokens=512) for experts in (16, 64))
    assert many["one by one"].operators > 2 * few["one by one"].operators
    assert many["together"].operators < few["together"].operators + 100  # some more padded runs
    assert many["together"].operators < many["one by one"].operators / 2
    # Each site's one look for what is not finite, and the experts' numbers of tokens.
    assert few["together"].waits == many["together"].waits == 5


@torch.inference_mode()
def test_experts_together_give_what_they_give_one_by_one(moe_decoder, many):
    """The calls of a GPU, made on this processor; sums may differ in a last bit."""
    block, x, rope = moe_decoder.blocks[0], moe_decoder.embed(many), moe_decoder.rope
    alone, output = moe.observe(block, x, rope), block(x, rope)
    with moe.as_on_a_gpu():
        together = moe.observe(block, x, rope)
        torch.testing.assert_close(block(x, rope), output, rtol=1e-5, atol=1e-5)
        peak, stored = Peak(), StoredInputs(10)
        peak.update(observed(moe_decoder, many, False)[0]["down"])
        stored.update(observed(moe_decoder, many, False)[0]["down"])
    for site, gram in alone.items():
        assert torch.equal(together[site].tokens_E, gram.tokens_E)
        assert together[site].shared == gram.shared
        torch.testing.assert_close(
            together[site].sum_EII, gram.sum_EII, rtol=1e-4, atol=1e-4 * float(gram.sum_EII.max())
        )
    down = observed(moe_decoder, many, False)[0]["down"]
    for e, tokens in enumerate(down.experts):
        torch.testing.assert_close(peak.peak_EI[e], tokens.abs().amax(0), rtol=1e-5, atol=1e-6)
        mean = stored.mean_absolute_EI()[e]
        torch.testing.assert_close(mean, tokens.abs().mean(0), rtol=1e-4, atol=1e-5)


def test_the_route_is_part_of_what_a_trial_is_where_there_are_experts():
    schema.register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        specs = {
            (model, route): resolve.trial_from(
                compose(
                    "config",
                    [
                        "method=gptq",
                        "calibration=demo",
                        f"model={model}",
                        f"calibration.route={route}",
                    ],
                )
            )
            for model in ("demo", "demo_moe")
            for route in ("top_k", "all")
        }
        with pytest.raises(
            ConfigError, match=r"calibration\.route=al is not known; did you mean all"
        ):
            resolve.trial_from(compose("config", ["method=gptq", "calibration.route=al"]))
    assert specs["demo", "top_k"].id == specs["demo", "all"].id
    dense, moe = (specs[name, "all"].spec.calibration for name in ("demo", "demo_moe"))
    assert dense is not None
    assert dense.route is None
    assert specs["demo_moe", "top_k"].id != specs["demo_moe", "all"].id
    assert moe is not None
    assert moe.route == "all"


def test_a_trial_shows_its_experts_what_its_spec_says(moe_decoder):
    spec: Any = SimpleNamespace(calibration=SimpleNamespace(route="all"))
    set_route(moe_decoder, spec)
    assert all(block.with_weights({}).every_expert for block in moe_decoder.blocks)
    for calibration in (SimpleNamespace(route="top_k"), None):
        spec = SimpleNamespace(calibration=calibration)
        set_route(moe_decoder, spec)
        assert not any(block.every_expert for block in moe_decoder.blocks)


@pytest.mark.parametrize("name", ["rtn", "gptq"])
@torch.inference_mode()
def test_each_experts_error_is_on_record_and_together_they_are_the_sites(moe_decoder, many, name):
    result, block = quantized(moe_decoder, name, many)
    original = moe_decoder.blocks[0].weights[DOWN].double()
    wrong = (original - block.weights[DOWN].double()).square().sum((1, 2))
    [down] = [error for error in result.errors if error.linear + ".weight" == DOWN]
    assert len(down.experts) == len(original)
    each = (wrong / original.square().sum((1, 2))).sqrt()
    if name == "rtn":
        assert down.experts == pytest.approx(each.tolist(), rel=1e-3)
        assert down.output_error is None
    else:  # weighed by the inputs that each expert saw
        assert min(down.experts) <= down.output_error <= max(down.experts)
        assert down.experts != pytest.approx(each.tolist(), rel=1e-3)
    assert all(error.experts is None for error in result.errors if "experts" not in error.linear)
