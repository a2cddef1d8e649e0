"""Weights and inputs that are all zero, as pruning and depth expansion leave them."""

import math
from dataclasses import replace

import pytest
import torch

from q3q.quantize.methods.build import build_method
from q3q.quantize.walk import quantize_model
from q3q.spec import Scheme
from tests.nowhere import Nowhere
from tests.quantize.conftest import random_decoder
from tests.specs import make_spec

NAMES = {
    "a block that adds nothing": ("self_attn.o_proj", "mlp.down_proj"),
    "pruned attention": ("self_attn.v_proj", "self_attn.o_proj"),
    "dead queries": ("self_attn.q_proj", "self_attn.k_proj"),
    "a dead MLP": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
}


@pytest.mark.parametrize("method", ["rtn", "gptq", "awq", "smoothquant", "billm"])
@pytest.mark.parametrize("what", NAMES)
def test_what_is_zero_stays_zero_and_has_no_error(what, method, windows):
    model = random_decoder("dense")
    assert isinstance(model.blocks, list)
    block = model.blocks[1]
    names = [f"{name}.weight" for name in NAMES[what]]
    model.blocks[1] = block.with_weights(
        {name: torch.zeros_like(block.weights[name]) for name in names}
    )
    scheme = Scheme(bits=1 if method == "billm" else 4, group_size=16, symmetric=False)
    if method == "smoothquant":
        scheme = replace(scheme, group_size=-1, symmetric=True, act_bits=8)
    spec = make_spec(method, scheme=scheme)
    blocks = quantize_model(model, build_method(spec), scheme, windows, Nowhere())
    with torch.inference_mode():
        assert all(bool(w.isfinite().all()) for b in model.blocks for w in b.weights.values())
    for name in names:
        assert not blocks[1].quantized[name].dequantize().any()
    for site in (site for block in blocks for site in block.errors):
        assert math.isfinite(site.weight_error)
        assert site.output_error is None or math.isfinite(site.output_error)
        if site.block == 1 and f"{site.linear}.weight" in names:
            assert site.weight_error == 0
            assert not site.output_error
