"""A weight whose scale 16 bits cannot hold: the line says which setting leaves it out."""

import re

import pytest
import torch

from q3q.config.patterns import linears, matching_linears
from q3q.errors import NumericsError
from q3q.quantize.ends import quantize_ends
from q3q.quantize.methods.awq import Awq
from q3q.quantize.walk import quantize_model
from q3q.spec import Scheme, Schemes
from tests.methods import built
from tests.nowhere import Nowhere
from tests.quantize.conftest import random_decoder


@pytest.mark.parametrize("method", [built("rtn"), built("awq")], ids=["rtn", "awq"])
@pytest.mark.parametrize("place", ["self_attn.k_proj.weight", "mlp.down_proj.weight"])
@torch.inference_mode()
def test_a_weight_too_large_for_16_bit_scales_is_left_out_as_the_line_says(method, place, windows):
    decoder = random_decoder("dense")
    decoder.blocks[1].weights[place][3, 5] = 1e9
    scheme = Scheme(bits=4, group_size=16, symmetric=False)
    seen = windows[:2] if isinstance(method, Awq) else None
    with pytest.raises(NumericsError) as refusal:
        quantize_model(decoder, method, scheme, seen, Nowhere())
    (setting,) = re.findall(r"\(skip=\[(\S+)\]\)", str(refusal.value))
    skipped = matching_linears(setting, linears(decoder.facts))
    decoder = random_decoder("dense")
    decoder.blocks[1].weights[place][3, 5] = 1e9
    blocks = quantize_model(decoder, method, Schemes(scheme, skip=skipped), seen, Nowhere())
    assert place not in blocks[1].quantized
    assert len(blocks[0].quantized) == 7


@torch.inference_mode()
def test_ends_too_large_for_16_bit_scales_are_left_out_as_the_line_says():
    decoder = random_decoder("dense")
    decoder.embedding_VH[3, 5] = 1e9
    scheme = Scheme(bits=4, group_size=16, symmetric=False)
    with pytest.raises(NumericsError) as refusal:
        quantize_ends(decoder, Schemes(scheme, head=scheme, embedding=scheme))
    assert "(head_bits=null embedding_bits=null)" in str(refusal.value)
