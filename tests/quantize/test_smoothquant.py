"""Laws of SmoothQuant, and its walk over blocks against the plain algorithm."""

import pytest
import torch

from q3q.quantize.block_store import BlockStore
from q3q.quantize.methods.settings import SmoothQuantSettings
from q3q.quantize.methods.smoothquant import SmoothQuant, smoothquant_round_plain
from q3q.quantize.statistics import MIN_EXPERT_TOKENS
from q3q.quantize.walk import quantize_model
from q3q.spec import Scheme
from tests.methods import built
from tests.nowhere import Nowhere
from tests.quantize.conftest import copy

SCHEME = Scheme(bits=4, group_size=-1, symmetric=True, act_bits=8)


def with_outliers(decoder, channels=(3, 17), factor=30.0):
    """What SmoothQuant is for: a few channels that all norms blow up."""
    for k, block in enumerate(decoder.blocks):
        changed = {}
        for name in ("input_layernorm.weight", "post_attention_layernorm.weight"):
            changed[name] = block.weights[name].clone()
            changed[name][list(channels)] *= factor
        decoder.blocks[k] = block.with_weights(changed)
    return decoder


def plain_round(w, bits):
    """quantize_weight_per_channel_absmax."""
    out = torch.empty_like(w)
    for r in range(len(w)):
        scale = max(float(w[r].abs().max()), 1e-5) / (2 ** (bits - 1) - 1)
        out[r] = torch.round(w[r] / scale) * scale
    return out


def inputs_of(decoder, windows):
    """Each site's input, of each block of the original model."""
    x, found = decoder.embed(windows), []
    for block in decoder.blocks:
        stages, seen = block.stages(x, decoder.rope), {}
        while True:
            try:
                site, inputs = next(stages)
            except StopIteration as end:
                x = end.value
                break
            seen[site.name] = inputs
        found.append(seen)
    return found


@pytest.mark.parametrize("alpha", [0.5, 0.85])
@torch.inference_mode()
def test_a_walk_equals_the_plain_algorithm(decoder, windows, kind, alpha):
    """A router is smoothed with all experts, as in the official code's Mixtral branch, but not
    rounded.
    """
    original = copy(with_outliers(decoder))
    inputs = inputs_of(original, windows)
    results = quantize_model(decoder, built("smoothquant", alpha=alpha), SCHEME, windows, Nowhere())
    for old, new, seen, result in zip(
        original.blocks, decoder.blocks, inputs, results, strict=True
    ):
        unrounded = dict(old.weights)
        expected = {
            name: plain_round(weight.flatten(0, -2), 4).view_as(weight)
            if name in result.quantized
            else weight
            for name, weight in old.weights.items()
        }
        experts = "experts." if kind == "moe" else ""
        gate_up = [f"mlp.{experts}{part}_proj.weight" for part in ("gate", "up")]
        for site, norm, names in (
            ("qkv", "input_layernorm.weight", [f"self_attn.{part}_proj.weight" for part in "qkv"]),
            ("gate_up", "post_attention_layernorm.weight", gate_up),
        ):
            router = ["mlp.gate.weight"] if kind == "moe" and site == "gate_up" else []
            readers = [old.weights[name] for name in (*names, *router)]
            matrices = [weight.flatten(0, -2).double() for weight in readers]
            scale, smoothed, rounded = smoothquant_round_plain(
                matrices, seen[site].all_TI.double(), SCHEME, alpha=alpha
            )
            expected[norm] = (old.weights[norm] / scale).float()
            for name, weight, on_grid in zip(names, smoothed, rounded, strict=False):
                unrounded[name] = weight.view_as(old.weights[name])
                expected[name] = on_grid.float().view_as(old.weights[name])
            for name in router:
                expected[name] = smoothed[-1].float()
        for name, weight in expected.items():
            wrong = (new.weights[name] - weight).abs() > 1e-4 * weight.abs() + 1e-5
            if name in result.quantized:  # a tie may fall the other way
                steps = unrounded[name] / (unrounded[name].abs().amax(-1, keepdim=True) / 7)
                assert ((steps - steps.floor() - 0.5).abs()[wrong] < 1e-3).all(), name
            else:
                assert not wrong.any(), name


@pytest.mark.parametrize("o_and_down", [False, True])
@torch.inference_mode()
def test_smoothing_leaves_the_models_function_unchanged(
    decoder, windows, kind, o_and_down, monkeypatch
):
    settings = SmoothQuantSettings(o_and_down=o_and_down)
    original = with_outliers(decoder)
    smoothed = copy(original)
    # What the walk stores are the smoothed weights themselves, so that nothing but scales has
    # moved.
    monkeypatch.setattr(
        "q3q.numerics.levels.IntegerLevels.rounded",
        lambda levels, weight_EOGS, grid: Exact(weight_EOGS.flatten(2)),
    )
    quantize_model(smoothed, SmoothQuant(settings), SCHEME, windows, Nowhere())
    torch.testing.assert_close(
        smoothed.hidden(windows), original.hidden(windows), rtol=2e-3, atol=2e-3
    )
    moved = {
        name
        for name, weight in smoothed.blocks[0].weights.items()
        if not torch.allclose(weight, original.blocks[0].weights[name])
    }
    experts = "experts." if kind == "moe" else ""
    by_norms = {f"self_attn.{part}_proj.weight" for part in "qkv"} | {
        f"mlp.{experts}gate_proj.weight"
    }
    by_norms |= {
        f"mlp.{experts}up_proj.weight",
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
    }
    by_norms |= {"mlp.gate.weight"} if kind == "moe" else set()
    others = {"self_attn.o_proj.weight", f"mlp.{experts}down_proj.weight"}
    assert moved == by_norms | (others if o_and_down else set())
    down = smoothed.blocks[0].weights[f"mlp.{experts}down_proj.weight"]
    if kind == "moe" and o_and_down:  # each expert its own scale
        ratio = down / original.blocks[0].weights["mlp.experts.down_proj.weight"]
        assert not torch.allclose(ratio[0, 0], ratio[1, 0])


class Exact:
    """A weight that no rounding has touched, as far as the walk asks."""

    def __init__(self, weight):
        self.weight = weight

    def dequantize(self):
        return self.weight

    def rows(self, start, stop):
        return Exact(self.weight[:, start:stop])

    def to(self, device):
        return self

    def largest_scale(self):
        return 0.0


def output_error(original, settings, windows, scheme):
    rounded = copy(original)
    quantize_model(
        rounded, SmoothQuant(settings), scheme, windows if settings.observes() else None, Nowhere()
    )
    for block in rounded.blocks:
        block.rounding = scheme.inputs
    return float((rounded.hidden(windows) - original.hidden(windows)).square().mean())


@torch.inference_mode()
def test_smoothing_helps_where_channels_stick_out(decoder, windows):
    decoder.blocks = with_outliers(decoder).blocks[:1]
    scheme = Scheme(bits=8, group_size=-1, symmetric=True, act_bits=6)
    smooth, plain = (
        output_error(decoder, SmoothQuantSettings(smooth=on), windows, scheme)
        for on in (True, False)
    )
    assert smooth < 0.5 * plain  # over eight seeds of each kind the ratio is 0.13 to 0.34


@pytest.mark.parametrize("group_size", [-1, 16])
@torch.inference_mode()
def test_without_smoothing_it_is_absmax_rounding_and_reads_nothing(decoder, windows, group_size):
    settings = SmoothQuantSettings(smooth=False)
    method = SmoothQuant(settings)
    assert method.observe() is None
    assert not settings.observes()
    original = copy(decoder)
    scheme = Scheme(bits=4, group_size=group_size, symmetric=True, act_bits=8)
    results = quantize_model(decoder, method, scheme, None, Nowhere())
    for old, new, result in zip(original.blocks, decoder.blocks, results, strict=True):
        for name, weight in old.weights.items():
            expected = weight
            if name in result.quantized:
                groups = weight.reshape(-1, weight.shape[-1] if group_size == -1 else group_size)
                expected = plain_round(groups, 4).view_as(weight)
            torch.testing.assert_close(new.weights[name], expected)


@torch.inference_mode()
def test_an_expert_that_few_tokens_reach_is_left_unsmoothed_between_up_and_down_and_named(
    moe_decoder, windows
):
    weights = dict(moe_decoder.blocks[0].weights)
    settings = SmoothQuantSettings(o_and_down=True)
    results = quantize_model(moe_decoder, SmoothQuant(settings), SCHEME, windows[:6], Nowhere())
    tokens = results[0].notes["blocks.0.gate_up"]["tokens_per_expert"]
    starved = [e for e in range(4) if tokens[e] < MIN_EXPERT_TOKENS]
    assert 0 < len(starved) < 4
    assert min(tokens) > 0
    assert results[0].notes["blocks.0.down"]["starved_experts"] == starved
    name = "mlp.experts.down_proj.weight"
    for e in range(4):
        plain = plain_round(weights[name][e], 4)
        assert torch.allclose(moe_decoder.blocks[0].weights[name][e], plain) == (e in starved)


@torch.inference_mode()
def test_a_killed_walk_goes_on_with_the_smoothed_norms(decoder, windows, tmp_path):
    original = with_outliers(decoder)
    whole, resumed = copy(original), copy(original)
    with BlockStore(tmp_path) as store:
        quantize_model(whole, built("smoothquant"), SCHEME, windows, store)
    for path in tmp_path.glob("block_001*"):
        path.unlink()
    store = BlockStore(tmp_path)
    quantize_model(resumed, built("smoothquant"), SCHEME, windows, store)
    assert store.reused == 1
    for a, b in zip(whole.blocks, resumed.blocks, strict=True):
        assert all(torch.equal(a.weights[name], b.weights[name]) for name in a.weights)


def test_what_makes_no_sense_is_refused_in_one_line():
    settings = SmoothQuantSettings()
    assert "symmetric=false makes no sense" in (
        settings.clash(Scheme(bits=8, group_size=-1, symmetric=False)) or ""
    )
    assert "cannot do bits=1; it takes 2 to 8" in (
        settings.clash(Scheme(bits=1, group_size=-1, symmetric=True)) or ""
    )
    assert settings.clash(SCHEME) is None
    assert "method.alpha has 1.5" in (SmoothQuantSettings(alpha=1.5).problem() or "")
    assert "method.alpha_grid has -1" in (SmoothQuantSettings(alpha_grid=[0.5, -1]).problem() or "")
    assert "drop one" in (SmoothQuantSettings(search=True, smooth=False).problem() or "")
    assert "method.alpha_grid=[]" in (
        SmoothQuantSettings(search=True, alpha_grid=[]).problem() or ""
    )
    assert "search_windows=0" in (SmoothQuantSettings(search_windows=0).problem() or "")
    assert settings.problem() is None


def test_knobs_without_effect_are_no_part_of_what_a_trial_is():
    def knobs(act_bits=8, **given):
        return SmoothQuantSettings(**given).knobs(
            Scheme(bits=8, group_size=-1, symmetric=True, act_bits=act_bits)
        )

    assert knobs(smooth=False, alpha=0.9) == knobs(smooth=False) != knobs()
    assert knobs(search_windows=3) == knobs() != knobs(alpha=0.9)
    assert (
        knobs(search=True, alpha=0.9) == knobs(search=True) != knobs(search=True, search_windows=3)
    )
    # Weights do not depend on how activations are quantized later, but for an alpha that is
    # searched.
    assert knobs(act_bits=4) == knobs()
    assert knobs(act_bits=4, search=True) != knobs(search=True)
