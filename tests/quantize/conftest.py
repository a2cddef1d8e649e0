"""A small random decoder of each kind, and calibration windows for it."""

from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from q3q.models.block import Block
from q3q.models.decoder import Decoder
from q3q.models.facts import read_facts
from q3q.quantize.methods import gptq

CONFIG = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_attention_heads": 6,  # heads x head_dim = 48, not hidden
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "hidden_act": "silu",
}
MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "norm_topk_prob": True,
}


@pytest.fixture(params=["dense", "moe"])
def kind(request):
    return request.param


BIASED = {"model_type": "llama", "attention_bias": True, "mlp_bias": True}


@pytest.fixture
def decoder(kind):
    return random_decoder(kind)


def random_decoder(kind: str, seed: int = 0, experts: int = 4) -> Decoder:
    kinds: dict[str, dict[str, Any]] = {
        "dense": {"model_type": "qwen3"},
        "moe": {**MOE, "model_type": "qwen3_moe", "num_experts": experts},
        "biased": BIASED,
    }
    facts = read_facts({**CONFIG, **kinds[kind]})
    generator = torch.Generator().manual_seed(seed)

    def weight(name, shape):
        if "norm" in name:
            return 1 + 0.3 * torch.randn(shape, generator=generator)
        return torch.randn(shape, generator=generator) * 1.5 / shape[-1] ** 0.5

    blocks = [
        Block(
            facts, k, {name: weight(name, shape) for name, shape in facts.block_shapes(k).items()}
        )
        for k in range(facts.layers)
    ]
    embedding = torch.randn(facts.vocab, facts.hidden, generator=generator)
    return Decoder(facts, embedding, torch.ones(facts.hidden), embedding, blocks)


@pytest.fixture
def moe_decoder():
    return random_decoder("moe")


def copy(decoder):
    """Return the same model, whose blocks can be replaced."""
    return replace(decoder, blocks=list(decoder.blocks))


@pytest.fixture
def windows():
    return torch.randint(61, (12, 40), generator=torch.Generator().manual_seed(1))


@contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@pytest.fixture
def doubles():
    """Make float64 the default dtype.

    Processors sum in different orders. In float32 that moves a weight by some 1e-6 of a step, and
    one in some ten thousand across the midpoint of two codes; in float64 by 1e-15, and none.
    """
    with default_dtype(torch.float64):
        yield


@pytest.fixture
def gptq_in_doubles(monkeypatch):
    """Make GPTQ solve in float64; return the list of the (weight, Hessian) pairs it solves."""
    solve, problems = gptq.gptq_round, []

    def solve_in_doubles(weight_EOI, hessian_EII, *settings, **options):
        problems.append((weight_EOI, hessian_EII.clone()))
        with default_dtype(torch.float64):
            return solve(weight_EOI.double(), hessian_EII.double(), *settings, **options)

    monkeypatch.setattr(gptq, "gptq_round", solve_in_doubles)
    return problems
