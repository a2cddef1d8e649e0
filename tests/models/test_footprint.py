"""The memory that a model needs, from a config alone."""

import subprocess
import sys
from dataclasses import replace

import pytest

from q3q.errors import ConfigError
from q3q.models.facts import read_facts
from q3q.models.footprint import (
    LOADERS,
    MORE_TOKENS,
    MORE_TOKENS_BYTES,
    MethodMemory,
    batch_tokens,
    bytes_of,
    choose,
    need,
    token_bytes,
)
from q3q.quantize.methods.settings import AwqSettings, GptqSettings, RtnSettings

RTN, GPTQ, AWQ = (kind().memory() for kind in (RtnSettings, GptqSettings, AwqSettings))
FOUR_B = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 2560,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 9728,
    "num_hidden_layers": 36,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
MOE = {
    **FOUR_B,
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
    "tie_word_embeddings": False,
}


@pytest.mark.parametrize("method", [None, RTN, GPTQ])
def test_eight_gigabytes_stream_through_a_third_of_that(method):
    facts = read_facts(FOUR_B)
    third = min(facts.weight_bytes() // 3, 2_500_000_000)
    assert need(facts, "bfloat16", method=method, loader="streamed") <= third
    assert choose(facts, "bfloat16", method=method, memory=third) == "streamed"
    assert choose(facts, "bfloat16", method=method, memory=16 * 10**9) == "resident"
    assert need(facts, "bfloat16", method=method, loader="resident") > facts.weight_bytes()


def test_a_gang_shares_a_model_that_is_too_large_for_one_rank():
    facts = read_facts(MOE)
    resident = need(facts, "bfloat16", method=GPTQ, loader="resident", device="cuda")
    needs = [
        need(facts, "bfloat16", method=GPTQ, loader="sharded", ranks=n, device="cuda")
        for n in (2, 4, 8)
    ]
    assert resident > needs[0] > needs[1] > needs[2] > facts.weight_bytes() // 8
    assert (
        need(facts, "bfloat16", method=GPTQ, loader="streamed", device="cuda")
        < facts.weight_bytes() // 4
    )


@pytest.mark.parametrize("loader", ["resident", "streamed", "sharded"])
def test_a_quantized_head_beside_the_original_takes_as_much_again(loader):
    facts = read_facts(FOUR_B)
    one, two = (
        need(facts, "bfloat16", method=RTN, loader=loader, ranks=2, heads=n) for n in (1, 2)
    )
    head = 2 * facts.vocab * facts.hidden
    # Streamed, the head is read after the blocks, and a block takes more to quantize than one head.
    assert 0 < two - one < head if loader == "streamed" else two - one == head


def test_experts_that_come_in_chunks_need_less_than_all_at_once():
    facts = read_facts(MOE)
    chunked, unchunked = (
        need(facts, "bfloat16", method=MethodMemory(chunks_experts=chunks), loader="streamed")
        for chunks in (True, False)
    )
    assert unchunked > chunked + 2 * 10**9
    # What observes all sites of a block together takes several chunks in one pass.
    awq = need(facts, "bfloat16", method=AWQ, loader="streamed")
    assert chunked < awq < unchunked


def test_a_gpu_takes_more_tokens_at_a_time_where_experts_divide_them():
    dense, moe = read_facts(FOUR_B), read_facts(MOE)
    usual = batch_tokens(dense, "bfloat16", "cuda")
    assert batch_tokens(moe, "bfloat16", "cpu") == batch_tokens(dense, "bfloat16", "cpu")
    more = batch_tokens(moe, "bfloat16", "cuda")
    assert usual < more <= MORE_TOKENS * usual
    assert more * token_bytes(moe, "bfloat16") <= MORE_TOKENS_BYTES
    wide = replace(moe, hidden=4 * moe.hidden)
    assert batch_tokens(wide, "bfloat16", "cuda") == usual


def test_235b_with_awq_fits_a_gang_of_eight_gpus_of_80_gb():
    config = {"hidden_size": 4096, "num_hidden_layers": 94, "num_attention_heads": 64}
    config |= {"num_key_value_heads": 4, "moe_intermediate_size": 1536}
    facts = read_facts(MOE | config)
    for method in (GPTQ, AWQ):
        needed = need(facts, "bfloat16", method=method, loader="sharded", ranks=8, device="cuda")
        assert needed < 78.7e9


def test_what_fits_nowhere_is_refused_with_what_would():
    with pytest.raises(
        ConfigError,
        match=r"does not fit into 1\.0 GB: streamed it needs 2\.\d GB, resident 1\d\.\d GB",
    ):
        choose(read_facts(FOUR_B), "bfloat16", method=GPTQ, memory=10**9)
    with pytest.raises(
        ConfigError,
        match=r"loader=mapped is not known\. Choose from: auto, resident, streamed, sharded",
    ):
        need(read_facts(FOUR_B), "bfloat16", method=RTN, loader="mapped")


@pytest.mark.parametrize(
    ("size", "count"),
    [
        ("2.5GB", 25 * 10**8),
        ("8GiB", 2**33),
        ("8g", 8 * 10**9),
        ("512 MiB", 2**29),
        (4096, 4096),
        ("4096", 4096),
    ],
)
def test_sizes(size, count):
    assert bytes_of(size) == count


@pytest.mark.parametrize("size", ["", "GB", "2.5 gigabytes", "-1GB", "0", "1e9", "8iB"])
def test_what_is_no_size(size):
    with pytest.raises(ConfigError, match=r"memory=.* is not a size: give bytes such as 2\.5GB"):
        bytes_of(size)


def test_it_is_arithmetic_without_torch():
    code = "import sys, q3q.models.footprint; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert LOADERS == ("resident", "streamed", "sharded")
