"""Every released Qwen3 shape goes through every method.

The table is what each model's config.json says (tests/models/test_checkpoint.py counts it). The
checkpoints here keep its heads and their sharing, whether the head is tied, and the ratios of all
widths, so that heads x head_dim differs from hidden exactly where it does in the released model.
Widths are a sixteenth (of the largest models a thirty-second), layers one or two, experts and the
vocabulary few.
"""

import math
from typing import NamedTuple

import pytest
import torch

from q3q.evaluate.integrity import check_weights
from q3q.evaluate.perplexity import perplexity
from q3q.models.checkpoint import Checkpoint
from q3q.models.decoder import load_decoder
from q3q.quantize.block import QuantizedBlock
from q3q.quantize.ledger import Ledger, sizes
from q3q.quantize.walk import quantize_model
from q3q.spec import Scheme
from tests.fidelity.checkpoints import save_random, windows_of
from tests.methods import built
from tests.nowhere import Nowhere


class Released(NamedTuple):
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    tied: bool
    experts: int = 0
    moe_intermediate: int = 0

    def config(self, width: int = 1, layers: int = 0, experts: int = 0, top_k: int = 8) -> dict:
        config = dict(
            hidden_size=self.hidden // width,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=128 // width,
            intermediate_size=self.intermediate // width,
            num_hidden_layers=layers or self.layers,
            max_position_embeddings=40_960,
            tie_word_embeddings=self.tied,
        )
        if self.experts:
            config |= dict(
                num_experts=experts or self.experts,
                num_experts_per_tok=top_k,
                moe_intermediate_size=self.moe_intermediate // width,
                norm_topk_prob=True,
            )
        return config


FAMILY = {
    "0.6B": Released(28, 1024, 16, 8, 3072, True),
    "1.7B": Released(28, 2048, 16, 8, 6144, True),
    "4B": Released(36, 2560, 32, 8, 9728, True),
    "8B": Released(36, 4096, 32, 8, 12288, False),
    "14B": Released(40, 5120, 40, 8, 17408, False),
    "32B": Released(64, 5120, 64, 8, 25600, False),
    "30B-A3B": Released(48, 2048, 32, 4, 6144, False, 128, 768),
    "235B-A22B": Released(94, 4096, 64, 4, 12288, False, 128, 1536),
}
GROUP = 16  # divides every width below
METHODS = {
    "none": (None, None),
    "rtn": (lambda: built("rtn"), Scheme(bits=4, group_size=GROUP, symmetric=False)),
    "gptq": (lambda: built("gptq"), Scheme(bits=4, group_size=GROUP, symmetric=False)),
    "awq": (
        lambda: built("awq", v_to_o=True, grid=4),
        Scheme(bits=4, group_size=GROUP, symmetric=False),
    ),
    "smoothquant": (
        lambda: built("smoothquant", o_and_down=True),
        Scheme(bits=4, group_size=-1, symmetric=True, act_bits=8),
    ),
    "billm": (lambda: built("billm"), Scheme(bits=1, group_size=GROUP, symmetric=False)),
}


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    made = {}

    def folder(size):
        if size not in made:
            large = FAMILY[size].hidden >= 4096
            config = FAMILY[size].config(
                32 if large else 16, layers=1 if large else 2, experts=6, top_k=2
            )
            made[size] = save_random(tmp_path_factory.mktemp(size), sharpness=0.7, **config)
        return made[size]

    return folder


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", FAMILY)
@torch.inference_mode()
def test_every_shape_goes_through_every_method(folder_of, size, method):
    checkpoint = Checkpoint(folder_of(size))
    decoder = load_decoder(checkpoint, torch.float32)
    kept = {k: dict(block.weights) for k, block in enumerate(decoder.blocks)}
    windows = windows_of(2, 24, seed=3)
    build, scheme = METHODS[method]
    blocks: list[QuantizedBlock] = []
    if build is not None:
        assert scheme is not None
        blocks = quantize_model(
            decoder, build(), scheme, windows if method != "rtn" else None, Nowhere()
        )
        for block in decoder.blocks:
            block.rounding = scheme.inputs
    assert math.isfinite(perplexity(decoder, windows_of(1, 24, seed=4)).nll)
    failed = [
        check
        for check in check_weights(decoder, [block.quantized for block in blocks])
        if not check.passed
    ]
    assert not failed

    facts = checkpoint.facts
    ledger = Ledger()
    for quantized in blocks:
        ledger.add(quantized)
    found = sizes(checkpoint, ledger, {})
    linears = 0 if build is None else facts.linear_parameters
    assert found["share_quantized"] == linears / facts.parameters
    assert sum(
        weight.numel() for block in decoder.blocks for weight in block.weights.values()
    ) == sum(
        math.prod(shape) for k in range(facts.layers) for shape in facts.block_shapes(k).values()
    )
    for k, block in enumerate(decoder.blocks):
        for name, weight in block.weights.items():
            same = torch.equal(weight, kept[k][name])
            if name.endswith("_proj.weight"):
                assert same == (build is None), name
            elif method in ("none", "rtn", "gptq", "billm"):
                assert same, name
    if method == "rtn":
        assert (
            found["bits_per_weight"] == 4 + (16 + 4) / GROUP
        )  # a code; a scale and a zero point a group
