"""Factors of inputs' scales: what calibration finds, stores, and evaluation computes with."""

import math
from dataclasses import replace

import pytest
import torch

from q3q.errors import IntegrityError, NumericsError
from q3q.models.adjust import RoundedInputs
from q3q.number_formats import FLOATS
from q3q.numerics.stored_scales import floats_below_factor
from q3q.quantize.block_file import decode, encode
from q3q.quantize.walk import quantize_model
from q3q.spec import Scheme, Schemes
from tests.methods import built
from tests.nowhere import Nowhere
from tests.quantize.conftest import copy

NVFP4 = Scheme(
    bits=4,
    format="nvfp4",
    group_size=16,
    symmetric=True,
    act_bits=4,
    act_format="nvfp4",
    act_group_size=16,
    act_scales="calibrated",
)
METHODS = ("rtn", "gptq", "awq", "smoothquant")


def seen(block, x_BTH, rope):
    """The block's output, and the largest number that each of its sites reads."""
    run, largest = block.stages(x_BTH, rope), dict[str, float]()
    while True:
        try:
            site, inputs = next(run)
        except StopIteration as end:
            return end.value, largest
        tensors = [inputs.all_TI] if inputs.all_TI is not None else list(inputs.experts)
        largest[site.name] = max(float(t.abs().max()) for t in tensors if t.numel())


@pytest.mark.parametrize("name", METHODS)
@torch.inference_mode()
def test_a_peak_is_the_largest_number_that_the_quantized_block_reads(decoder, windows, name):
    original, plain = copy(decoder), copy(decoder)
    results = quantize_model(decoder, built(name), NVFP4, windows, Nowhere())
    for k, result in enumerate(results):
        # AWQ and SmoothQuant calibrate each block on the original ones before it.
        before = original if name in ("awq", "smoothquant") else decoder
        x_BTH = before.embed(windows)
        for block in before.blocks[:k]:
            x_BTH = block(x_BTH, before.rope)
        _, largest = seen(decoder.blocks[k], x_BTH, decoder.rope)
        assert result.peaks == pytest.approx(largest, rel=1e-5)
        assert decode(k, (stored := encode(result)).tensors, stored.facts).peaks == result.peaks
    dynamic = replace(NVFP4, act_scales="dynamic")
    others = quantize_model(plain, built(name), dynamic, windows, Nowhere())
    for ours, theirs in zip(results, others, strict=True):  # looking on changes nothing
        assert theirs.peaks == {}
        assert "peaks" not in encode(theirs).facts
        for weight, codes in theirs.quantized.items():
            again = ours.quantized[weight].to_tensors()
            assert all(torch.equal(part, again[key]) for key, part in codes.to_tensors().items())


@torch.inference_mode()
def test_inputs_are_rounded_below_the_factor_and_only_where_it_was_asked_for(decoder, windows):
    overrides = {f"blocks.{k}.self_attn.o_proj": {"act_scales": "dynamic"} for k in range(2)}
    schemes = Schemes(NVFP4, overrides)
    results = quantize_model(decoder, built("rtn"), schemes, windows, Nowhere())
    assert "o" not in results[0].peaks
    assert "o" in [site.name for site in decoder.blocks[0].sites]
    peaks = {"blocks.0.qkv": 3.0, "blocks.0.gate_up": 0.5, "blocks.0.down": 7.0}
    block = decoder.blocks[0]
    otherwise = dict.fromkeys(overrides, replace(NVFP4, act_scales="dynamic").inputs)
    RoundedInputs(NVFP4.inputs, frozenset(), otherwise, peaks)(0, block)
    sites = {site.name: site for site in block.sites}
    x = 4 * torch.randn(5, 48, generator=torch.Generator().manual_seed(0))
    for name, peak in (("qkv", 3.0), ("gate_up", 0.5), ("down", 7.0)):
        factor = float(448 * 6.0 / torch.tensor(peak))
        expected = floats_below_factor(x, FLOATS["nvfp4"], 16, factor)
        assert torch.equal(block.round_inputs(sites[name], x), expected)
    # Numbers above the calibrated peak are cut off where E4M3's scales end.
    cut = block.round_inputs(sites["gate_up"], torch.full((1, 16), 9.0))
    assert cut.unique().tolist() == [pytest.approx(0.5, rel=1e-6)]
    with pytest.raises(IntegrityError, match=r"blocks\.1\.qkv: no factor was stored"):
        RoundedInputs(NVFP4.inputs, frozenset(), otherwise, peaks)(1, decoder.blocks[1])


@torch.inference_mode()
def test_an_expert_without_tokens_has_its_siblings_factor_and_infinity_is_refused(moe_decoder):
    block = moe_decoder.blocks[0]
    router = torch.zeros_like(block.weights["mlp.gate.weight"])
    moe_decoder.blocks[0] = block.with_weights({"mlp.gate.weight": router})  # ties: experts 0 and 1
    windows = torch.randint(61, (2, 20), generator=torch.Generator().manual_seed(1))
    result, *_ = quantize_model(copy(moe_decoder), built("rtn"), NVFP4, windows, Nowhere())
    assert result.peaks.keys() == {site.name for site in block.sites}
    assert all(0 < peak < math.inf for peak in result.peaks.values())
    moe_decoder.embedding_VH = torch.full_like(moe_decoder.embedding_VH, math.inf)
    with pytest.raises(NumericsError, match=r"blocks\.0\.qkv: calibration activations are not"):
        quantize_model(moe_decoder, built("rtn"), NVFP4, windows, Nowhere())


@torch.inference_mode()
def test_a_block_made_anew_without_windows_is_not_stored_without_factors(decoder):
    with pytest.raises(IntegrityError, match=r"blocks.0.*without calibration tokens"):
        quantize_model(decoder, built("rtn"), NVFP4, None, Nowhere())
