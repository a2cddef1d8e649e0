"""The walk: what each method sees, what is passed on, and that a resumed walk ends with the same
bits.
"""

import pytest
import torch

from q3q.errors import IncompatibleError, NumericsError
from q3q.numerics.grid import awq_grid, into_groups, on_grid
from q3q.numerics.weights import QuantizedWeight
from q3q.quantize.block_store import BlockStore
from q3q.quantize.ends import quantize_ends
from q3q.quantize.methods.awq import Awq
from q3q.quantize.methods.gptq import gptq_round
from q3q.quantize.methods.settings import AwqSettings
from q3q.quantize.sites import stack_rows
from q3q.quantize.statistics import MIN_EXPERT_TOKENS, Gram
from q3q.quantize.walk import quantize_model
from q3q.spec import Scheme, Schemes
from tests.methods import built
from tests.nowhere import Nowhere
from tests.quantize.conftest import copy

SCHEME = Scheme(bits=3, group_size=16, symmetric=False)
METHODS = {
    "rtn": lambda: built("rtn"),
    "gptq": lambda: built("gptq"),
    "gptq_whole": lambda: built("gptq", true_sequential=False, act_order=False),
    "awq": lambda: built("awq"),
    "awq_v_to_o": lambda: built("awq", v_to_o=True),
}


class DiesAfter(BlockStore):
    """A store whose process dies after some blocks."""

    def __init__(self, folder, blocks):
        super().__init__(folder)
        self.left = blocks

    def store(self, block):
        if not self.left:
            self.settle()
            raise KeyboardInterrupt
        self.left -= 1
        super().store(block)


@pytest.mark.parametrize("name", METHODS)
@torch.inference_mode()
def test_every_weight_of_every_site_is_quantized_and_inputs_untouched(decoder, windows, name):
    before = [{k: w.clone() for k, w in block.weights.items()} for block in decoder.blocks]
    original = list(decoder.blocks)
    results = quantize_model(
        decoder, METHODS[name](), SCHEME, windows if name != "rtn" else None, Nowhere()
    )
    for block, old, weights, result in zip(decoder.blocks, original, before, results, strict=True):
        assert set(result.quantized) == {weight for site in block.sites for weight in site.weights}
        for weight, quantized in result.quantized.items():
            assert isinstance(quantized, QuantizedWeight)
            assert quantized.most_levels_in_a_group() <= 8
            assert torch.equal(
                block.weights[weight], quantized.dequantize().view_as(block.weights[weight])
            )
        assert all(torch.equal(old.weights[k], weights[k]) for k in weights)
    if name in ("rtn", "gptq"):
        for block, weights in zip(decoder.blocks, before, strict=True):
            others = weights.keys() - results[0].quantized.keys()
            assert all(torch.equal(block.weights[k], weights[k]) for k in others)


@pytest.mark.parametrize("name", METHODS)
@torch.inference_mode()
def test_a_killed_walk_goes_on_and_ends_with_the_same_bits(decoder, windows, name, tmp_path):
    windows = windows if name != "rtn" else None
    whole, broken = copy(decoder), copy(decoder)
    quantize_model(whole, METHODS[name](), SCHEME, windows, Nowhere())
    with pytest.raises(KeyboardInterrupt):
        quantize_model(broken, METHODS[name](), SCHEME, windows, DiesAfter(tmp_path, 1))
    resumed = copy(decoder)
    store = BlockStore(tmp_path)
    assert store.load(0) is not None
    assert store.load(1) is None
    quantize_model(resumed, METHODS[name](), SCHEME, windows, store)
    for a, b in zip(whole.blocks, resumed.blocks, strict=True):
        assert a.weights.keys() == b.weights.keys()
        assert all(torch.equal(a.weights[k], b.weights[k]) for k in a.weights)


@torch.inference_mode()
def test_a_damaged_block_checkpoint_is_not_taken(decoder, tmp_path):
    store = BlockStore(tmp_path)
    quantize_model(decoder, METHODS["rtn"](), SCHEME, None, store)
    store.settle()
    path = tmp_path / "block_000.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert store.load(0) is None
    assert store.load(1) is not None
    assert not path.exists()  # put aside
    assert path.with_name("block_000.safetensors.damaged").read_bytes() == content
    assert store.load(0) is None


@torch.inference_mode()
def test_true_sequential_gptq_equals_running_the_whole_block_again_for_each_site(decoder, windows):
    """The official driver re-runs the layer before each group of linears; one staged pass must give
    the same.
    """
    block, rope = decoder.blocks[0], decoder.rope
    x = decoder.embed(windows)
    official = block.with_weights({})
    for index, site in enumerate(block.sites):
        stages = official.stages(x, rope)
        for _ in range(index + 1):
            _, inputs = next(stages)
        gram = Gram()
        gram.update(inputs)
        weight, rows = stack_rows(official.weights, site)
        for name, part in rows.items():  # linear by linear, as there
            solved = gptq_round(weight[:, part], gram.mean_EII(), SCHEME, act_order=True).weight
            official.weights[name] = solved.dequantize().view_as(official.weights[name])
    quantize_model(decoder, built("gptq"), SCHEME, windows, Nowhere())
    # The method rounds starved experts to nearest, and this twin does not.
    for name in ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.o_proj.weight"):
        assert torch.equal(decoder.blocks[0].weights[name], official.weights[name])
    if "mlp.down_proj.weight" in official.weights:
        for name in official.weights:
            assert torch.equal(decoder.blocks[0].weights[name], official.weights[name])


@pytest.mark.parametrize(("name", "quantized_inputs"), [("gptq", True), ("awq", False)])
@torch.inference_mode()
def test_what_is_passed_on_is_what_the_methods_own_code_passes_on(
    decoder, windows, name, quantized_inputs
):
    """The last block comes out as if alone behind a quantized (GPTQ) or original (AWQ) block."""
    first = copy(decoder)
    quantize_model(first, METHODS[name](), SCHEME, windows, Nowhere())
    entrance = first.blocks[0] if quantized_inputs else decoder.blocks[0]
    x = entrance(decoder.embed(windows), decoder.rope)
    alone = copy(decoder)
    alone.blocks = [decoder.blocks[1]]
    alone.embed = lambda ids: x[: len(ids)]
    quantize_model(alone, METHODS[name](), SCHEME, windows, Nowhere())
    for weight in decoder.blocks[1].weights:
        assert torch.equal(alone.blocks[0].weights[weight], first.blocks[1].weights[weight])


@torch.inference_mode()
def test_an_expert_that_no_token_reaches_is_rounded_and_named_not_zeroed(moe_decoder, windows):
    decoder = moe_decoder
    weights = dict(decoder.blocks[0].weights)
    weights["mlp.gate.weight"] = weights["mlp.gate.weight"].clone()
    weights["mlp.gate.weight"][2] = 0
    weights["mlp.gate.weight"][[0, 1, 3]] *= 50
    decoder.blocks[0] = decoder.blocks[0].with_weights(weights)
    twin = copy(decoder)
    few = windows[:4]
    results = quantize_model(decoder, built("gptq", act_order=False), SCHEME, few, Nowhere())
    quantize_model(twin, built("rtn"), SCHEME, None, Nowhere())
    starved = results[0].notes["blocks.0.gate_up"]["starved_experts"]
    assert 2 in starved
    name = "mlp.experts.down_proj.weight"
    for e in starved:
        assert torch.equal(decoder.blocks[0].weights[name][e], twin.blocks[0].weights[name][e])
        assert decoder.blocks[0].weights[name][e].abs().max() > 0


@pytest.mark.parametrize("clip", [True, False])
@torch.inference_mode()
def test_awq_gives_an_expert_that_few_tokens_reach_no_scale_and_no_clipping_of_its_own(
    moe_decoder, windows, clip
):
    original = moe_decoder.blocks[0]
    results = quantize_model(moe_decoder, built("awq", clip=clip), SCHEME, windows[:6], Nowhere())
    notes = results[0].notes
    tokens = notes["blocks.0.gate_up"]["tokens_per_expert"]
    starved = [e for e in range(4) if tokens[e] < MIN_EXPERT_TOKENS]
    assert 0 < len(starved) < 4
    assert min(tokens) > 0
    assert (
        notes["blocks.0.gate_up"]["starved_experts"]
        == notes["blocks.0.down"]["starved_experts"]
        == starved
    )
    name = "mlp.experts.down_proj.weight"
    groups = into_groups(original.weights[name], SCHEME.group_size)
    rounded = on_grid(
        groups, awq_grid(groups, SCHEME.bits, symmetric=SCHEME.symmetric), SCHEME.bits
    ).flatten(-2)
    plain = {e for e in range(4) if torch.equal(moe_decoder.blocks[0].weights[name][e], rounded[e])}
    assert (
        plain == set(starved) if clip else set(starved) <= plain < set(range(4))
    )  # a scale of 1 may be the best
    # Gate and up have the scale that all experts share, and range up to their largest weight.
    norm = "post_attention_layernorm.weight"
    scaled = original.weights["mlp.experts.gate_proj.weight"] * (
        original.weights[norm] / results[0].changed[norm]
    )
    groups = into_groups(scaled, SCHEME.group_size)
    grid = awq_grid(groups, SCHEME.bits, symmetric=SCHEME.symmetric)
    rounded = on_grid(groups, grid, SCHEME.bits).flatten(-2)
    steps = (groups / grid.scale).flatten(-2)
    from_tie = (steps - steps.floor() - 0.5).abs()
    quantized = moe_decoder.blocks[0].weights["mlp.experts.gate_proj.weight"]
    for e in range(4):
        differs = ~torch.isclose(quantized[e], rounded[e], rtol=1e-4)
        if e in starved or not clip:
            assert (from_tie[e][differs] < 1e-3).all()  # the scale's last bits decide a tie
        else:
            assert (from_tie[e][differs] > 0.01).any()


def test_weights_that_are_not_finite_are_refused_by_name(decoder):
    name = "self_attn.o_proj.weight"
    broken = decoder.blocks[1].weights[name].clone()
    broken[0, 0] = float("nan")
    decoder.blocks[1] = decoder.blocks[1].with_weights({name: broken})
    with pytest.raises(NumericsError, match=r"blocks\.1\.o: .* not finite"):
        quantize_model(decoder, METHODS["rtn"](), SCHEME, None, Nowhere())


def test_activations_that_are_not_finite_are_refused_by_name(decoder, windows):
    decoder.embedding_VH[windows[0, 0]] = float("inf")
    with pytest.raises(
        NumericsError, match=r"blocks\.0\.qkv: calibration activations are not finite"
    ):
        quantize_model(decoder, METHODS["gptq"](), SCHEME, windows, Nowhere())


@pytest.mark.parametrize("name", ["rtn", "gptq", "awq"])
@torch.inference_mode()
def test_an_outlier_whose_scale_does_not_fit_16_bits_is_refused_by_name(decoder, windows, name):
    weight = decoder.blocks[1].weights["self_attn.k_proj.weight"].clone()
    weight[0, 0] = 1e7
    decoder.blocks[1] = decoder.blocks[1].with_weights({"self_attn.k_proj.weight": weight})
    method = built("awq", scale=False, clip=False) if name == "awq" else METHODS[name]()
    with pytest.raises(
        NumericsError, match=r"blocks\.1\.self_attn\.k_proj: its largest weight, .* 65504 at most"
    ):
        quantize_model(decoder, method, SCHEME, windows if name != "rtn" else None, Nowhere())


@pytest.mark.parametrize("name", METHODS)
@torch.inference_mode()
def test_a_site_of_zeros_stays_zero(decoder, windows, name):
    site = decoder.blocks[0].sites[-1]
    zeros = {weight: torch.zeros_like(decoder.blocks[0].weights[weight]) for weight in site.weights}
    decoder.blocks[0] = decoder.blocks[0].with_weights(zeros)
    quantize_model(decoder, METHODS[name](), SCHEME, windows if name != "rtn" else None, Nowhere())
    for weight in site.weights:
        assert not decoder.blocks[0].weights[weight].any()


Q, K, V = (f"self_attn.{part}_proj.weight" for part in "qkv")


@pytest.mark.parametrize("name", ["rtn", "gptq", "gptq_whole"])
@torch.inference_mode()
def test_a_linear_with_a_scheme_of_its_own_comes_out_as_if_all_had_that_scheme(
    decoder, windows, name
):
    """Rows are independent given the statistics, so splitting a site by rows is exact.

    The first site sees the same inputs in all walks.
    """
    windows = windows if name != "rtn" else None
    mixed, coarse, fine = copy(decoder), copy(decoder), copy(decoder)
    overrides = {"blocks.0.self_attn.k_proj": {"bits": 6, "group_size": 8, "symmetric": True}}
    results = quantize_model(mixed, METHODS[name](), Schemes(SCHEME, overrides), windows, Nowhere())
    quantize_model(coarse, METHODS[name](), SCHEME, windows, Nowhere())
    quantize_model(
        fine, METHODS[name](), Scheme(bits=6, group_size=8, symmetric=True), windows, Nowhere()
    )
    assert torch.equal(mixed.blocks[0].weights[Q], coarse.blocks[0].weights[Q])
    assert torch.equal(mixed.blocks[0].weights[V], coarse.blocks[0].weights[V])
    assert torch.equal(mixed.blocks[0].weights[K], fine.blocks[0].weights[K])
    assert not torch.equal(mixed.blocks[0].weights[K], coarse.blocks[0].weights[K])
    for result, bits in zip(results, (6, 3), strict=False):
        quantized = result.quantized[K]
        assert isinstance(quantized, QuantizedWeight)
        assert quantized.bits == bits


@pytest.mark.parametrize("name", METHODS)
@torch.inference_mode()
def test_linears_that_are_left_out_keep_the_blocks_function_and_the_others_are_quantized(
    decoder, windows, name, tmp_path
):
    windows = windows if name != "rtn" else None
    linears = {
        f"blocks.{k}.{weight.removesuffix('.weight')}"
        for k in range(2)
        for weight in decoder.blocks[k].weights
    }
    everything = Schemes(SCHEME, skip=linears)
    original = copy(decoder)
    same = copy(decoder)
    results = quantize_model(same, METHODS[name](), everything, windows, BlockStore(tmp_path))
    assert not any(result.quantized or result.errors for result in results)
    for block, untouched in zip(same.blocks, original.blocks, strict=True):
        assert all(torch.equal(block.weights[key], untouched.weights[key]) for key in block.weights)
    down = [
        weight for site in decoder.blocks[0].sites if site.name == "down" for weight in site.weights
    ]
    others = Schemes(SCHEME, skip={name for name in linears if "down" in name or ".1." in name})
    results = quantize_model(decoder, METHODS[name](), others, windows, Nowhere())
    assert set(results[0].quantized) | set(down) == {
        w for site in decoder.blocks[0].sites for w in site.weights
    }
    assert all(
        torch.equal(decoder.blocks[0].weights[weight], original.blocks[0].weights[weight])
        for weight in down
    )


@torch.inference_mode()
def test_a_producer_that_is_left_out_keeps_the_scale_that_its_reader_was_given(
    decoder, windows, tmp_path
):
    """AWQ shifts scale from up_proj to down_proj. If up_proj is left out, its shifted weights must
    still reach the disk.
    """
    up = next(
        weight
        for site in decoder.blocks[0].sites
        if site.name == "gate_up"
        for weight in site.weights[1:]
    )
    gate_up = {
        f"blocks.0.{w.removesuffix('.weight')}" for w in (up, up.replace("up_proj", "gate_proj"))
    }
    near_exact = Schemes(Scheme(bits=8, group_size=8, symmetric=False), skip=gate_up)
    decoder.blocks = decoder.blocks[:1]
    before = decoder.blocks[0]
    x, twin = decoder.embed(windows), copy(decoder)
    quantize_model(decoder, built("awq", clip=False), near_exact, windows, BlockStore(tmp_path))
    assert not torch.equal(decoder.blocks[0].weights[up], before.weights[up])
    expected, output = before(x, decoder.rope), decoder.blocks[0](x, decoder.rope)
    assert (output - expected).norm() < 0.05 * expected.norm()
    quantize_model(
        twin, built("awq", clip=False), near_exact, windows, BlockStore(tmp_path)
    )  # all from disk
    assert torch.equal(twin.blocks[0](x, twin.rope), output)


@torch.inference_mode()
def test_the_scale_search_receives_the_scheme_of_its_site(decoder, windows):
    bits: dict[str, list[int]] = {}

    class Listening(Awq):
        def rebalance(self, task, scheme):
            bits.setdefault(task.group.site.name, []).append(scheme.bits)

    names = [w.removesuffix(".weight") for w in decoder.blocks[0].sites[3].weights]
    schemes = Schemes(
        SCHEME,
        {f"blocks.1.{name}": {"bits": 7} for name in names},
        skip={"blocks.0.self_attn.o_proj"},
    )
    quantize_model(decoder, Listening(AwqSettings(clip=False)), schemes, windows, Nowhere())
    assert bits == {"qkv": [3, 3], "o": [3], "gate_up": [3, 3], "down": [3, 7]}
    uneven = Schemes(SCHEME, {"blocks.0.self_attn.q_proj": {"bits": 7}})
    with pytest.raises(IncompatibleError, match=r"blocks\.0\.qkv: .* one setting"):
        quantize_model(decoder, built("awq"), uneven, windows, Nowhere())


@torch.inference_mode()
def test_head_and_embedding_are_rounded_once_where_they_are_tied_and_apart_where_not(decoder):
    eight, four = (Scheme(bits=bits, group_size=16, symmetric=True) for bits in (8, 4))
    original = decoder.embedding_VH.clone()
    tied = copy(decoder)
    codes = quantize_ends(tied, Schemes(SCHEME, head=eight, embedding=eight))
    assert list(codes) == ["embedding"]
    assert tied.head_VH is tied.embedding_VH
    assert torch.equal(tied.embedding_VH, codes["embedding"].dequantize()[0])
    step = original.unflatten(1, (-1, 16)).abs().amax(-1) * 2 / 255
    assert (
        (tied.embedding_VH - original).unflatten(1, (-1, 16)).abs().amax(-1) <= 1.001 * step
    ).all()

    apart = copy(decoder)
    apart.head_VH = decoder.embedding_VH * 2
    codes = quantize_ends(apart, Schemes(SCHEME, head=four))
    assert list(codes) == ["head"]
    assert torch.equal(apart.embedding_VH, original)
    assert torch.equal(apart.head_VH, codes["head"].dequantize()[0])
    assert quantize_ends(apart, Schemes(SCHEME)) == {}


@pytest.mark.parametrize("wrong", [float("nan"), 1e9])
def test_an_embedding_that_cannot_be_rounded_is_refused_by_name(decoder, wrong):
    decoder.embedding_VH[3, 3] = wrong
    with pytest.raises(NumericsError, match=r"^embedding: "):
        quantize_ends(decoder, Schemes(SCHEME, embedding=SCHEME, head=SCHEME))
