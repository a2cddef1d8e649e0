"""The GPU's own code agrees with its plain twin; whole methods and trials run on a GPU.

Needs an NVIDIA GPU. Elsewhere other tests cover the twins, and the kernels in Triton's interpreter.
"""

from typing import Any

import numpy as np
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM

from benchmarks import gpu_checks
from q3q.config.model import DEMO_MODELS
from q3q.data.texts import load_text
from q3q.data.windows import consecutive_windows, encoder
from q3q.evaluate.budget import TokenBudget
from q3q.evaluate.harness.lm import HarnessLM
from q3q.evaluate.perplexity import perplexity
from q3q.evaluate.scoring import Request, score
from q3q.models.checkpoint import Checkpoint, load_tokenizer
from q3q.models.decoder import load_decoder
from q3q.models.softmax import (
    VarlenLayout,
    attend,
    attend_plain,
    attend_varlen,
    attend_varlen_plain,
    supports_varlen,
)
from q3q.models.streaming import StreamedDecoder
from q3q.numerics.divergence import kl_divergence
from q3q.numerics.kernels.compiler import compiler_fault
from q3q.quantize.kernels.columns import block_solver, solve_block_plain
from q3q.quantize.walk import quantize_model
from q3q.sweep.gpus import usable_gpus
from tests.evaluate.test_harness import adversarial, instances
from tests.evaluate.test_prefixes import random_texts, requests_of
from tests.quantize.test_gang import CASES, InMemory, facts_of
from tests.quantize.test_kernels import problem

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
GPU = torch.device("cuda")
BF16 = torch.bfloat16


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(GPU, dtype)


def test_the_driver_lists_what_torch_sees_and_triton_compiles_for_it():
    assert [gpu.name for gpu in usable_gpus()] == [
        torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())
    ]
    assert compiler_fault() is None


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_varlen_attention_equals_its_plain_twin(causal, dtype):
    queries, keys = [1, 70, 3, 200, 1], [5, 70, 64, 331, 1]
    query_ends, key_ends = (
        torch.tensor([0, *np.cumsum(each)], dtype=torch.int32, device=GPU)
        for each in (queries, keys)
    )
    query = draw(16, sum(queries), 128, dtype=dtype).transpose(
        0, 1
    )  # as a block gives them: heads first
    key, value = (
        draw(sum(keys), 8, 128, seed=1, dtype=dtype),
        draw(sum(keys), 8, 128, seed=2, dtype=dtype),
    )
    layout = VarlenLayout(query_ends, key_ends, (max(queries), max(keys)), causal)
    assert supports_varlen(GPU, dtype)
    context, logsum = attend_varlen(query, key, value, layout)
    expected, expected_logsum = attend_varlen_plain(
        query.float(), key.float(), value.float(), layout
    )
    torch.testing.assert_close(context.float(), expected, rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(logsum, expected_logsum, rtol=1e-3, atol=2e-3)


@pytest.mark.parametrize("wide", [1, 33, 256])
@pytest.mark.parametrize("causal", [True, False])
def test_float32_attention_equals_its_plain_twin(wide, causal):
    query, key, value = (
        draw(2, 8, wide, 64),
        draw(2, 4, wide, 64, seed=1),
        draw(2, 4, wide, 64, seed=2),
    )
    for found, expected in zip(
        attend(query, key, value, None, causal),
        attend_plain(query, key, value, None, causal),
        strict=True,
    ):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("columns", [5, 4096, 4097, 151936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fused_sum_equals_the_plain_one(columns, dtype):
    from q3q.numerics.kernels.fused import logsum_fused
    from q3q.numerics.kernels.logsum import logsum_plain

    logits = (draw(70, columns) * 5).to(dtype)
    logits[3, 2:] = -torch.inf
    before = logits.clone()
    logsum, highest = logsum_fused(logits)
    assert torch.equal(logits, before)
    expected, expected_highest = logsum_plain(logits.clone())
    torch.testing.assert_close(logsum, expected, rtol=1e-6, atol=1e-5)
    assert torch.equal(highest, expected_highest)
    logits[5, 1] = torch.nan
    assert logsum_fused(logits)[0].isnan().tolist() == [row == 5 for row in range(70)]


def test_log_likelihoods_are_those_of_whole_logits():
    model = load_decoder(Checkpoint(DEMO_MODELS / "dense"), BF16, GPU)
    hidden = draw(1100, model.facts.hidden, dtype=BF16)
    rows = torch.arange(1100).repeat_interleave(2)
    targets = torch.randint(
        0, model.facts.vocab, (2200,), generator=torch.Generator().manual_seed(1)
    )
    targets[:50] = (hidden @ model.head_VH.T)[rows[:50].to(GPU)].argmax(1).cpu()
    found, greedy = model.log_likelihoods(hidden, targets, rows)
    logits = (hidden @ model.head_VH.T).float()[rows.to(GPU)]
    expected = logits.log_softmax(1)[torch.arange(2200, device=GPU), targets.to(GPU)]
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=2e-2)
    assert (
        greedy[:50].float().mean() > 0.9
    )  # products of other shapes may round a tie the other way


def test_divergence_equals_the_cpus():
    p, q = draw(300, 5000), draw(300, 5000, seed=1)
    torch.testing.assert_close(
        kl_divergence(p, q).cpu(), kl_divergence(p.cpu(), q.cpu()), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize(
    "shape", [(1, 128, 300, 1), (3, 128, 96, 4), (2, 24, 21, 3), (1, 128, 96, 4, "mxfp4")]
)
def test_the_fused_columns_equal_the_plain_loop(shape):
    *tensors, grid_of, levels = problem(*shape)
    weight, factor, scale, zero = (tensor.to(GPU) for tensor in tensors)
    plain, plain_error = solve_block_plain(weight.clone(), factor, scale, zero, grid_of, levels)
    fused, fused_error = block_solver(GPU, levels)(weight, factor, scale, zero, grid_of, levels)
    same = (
        (fused == plain).all(1, keepdim=True).expand_as(fused)
    )  # a tie decides all that comes after it in a row
    assert same.double().mean() > 0.95
    torch.testing.assert_close(fused_error[same], plain_error[same], rtol=1e-3, atol=1e-4)


@torch.inference_mode()
def test_every_fast_path_agrees_with_its_twin():
    """At the sizes of real models; `benchmarks/gpu_day.py` prints the same checks."""
    found = [gpu_checks.result(name, GPU, gpu_checks.LARGE) for name in gpu_checks.CHECKS]
    assert [(result.name, result.detail) for result in found if not result.passed] == []


@torch.inference_mode()
def test_a_moe_block_forwards_without_waiting_for_the_device():
    model = load_decoder(Checkpoint(DEMO_MODELS / "moe"), BF16, GPU)
    x = model.embed(held_out("moe")[:2])
    block, rope = model.blocks[0], model.rope
    block(x, rope)
    fast = torch.cuda.get_device_capability() in ((9, 0), (10, 0))  # others' fallback waits once
    torch.cuda.set_sync_debug_mode("error" if fast else "default")
    try:
        block(x, rope)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("kind", ["dense", "moe"])
@torch.inference_mode()
def test_scores_of_the_tape_are_those_of_whole_texts(kind):
    """float32: compare with a CPU; bfloat16: with its own forward of each text, up to rounding."""
    requests = requests_of(random_texts(1, count=60, most=120))
    on_cpu = load_decoder(Checkpoint(DEMO_MODELS / kind), torch.float32)
    expected = scored(on_cpu, requests)
    wide = scored(load_decoder(Checkpoint(DEMO_MODELS / kind), torch.float32, GPU), requests)
    assert np.abs(wide - expected).max() < (1e-3 if kind == "dense" else 0.05)
    narrow = load_decoder(Checkpoint(DEMO_MODELS / kind), BF16, GPU)
    found, alone = scored(narrow, requests), scored_alone(narrow, requests)
    assert np.median(np.abs(found - alone)) < 0.1
    assert np.abs(found - alone).max() < (1.5 if kind == "dense" else 6)
    assert np.abs(found - expected).mean() < 2 * np.abs(alone - expected).mean() + 0.02


def scored(model, requests):
    found = dict(
        pair for ended, _ in score(model, requests, TokenBudget(700, most=700)) for pair in ended
    )
    return np.array([found[number].log_likelihood for number in range(len(requests))])


def scored_alone(model, requests):
    scores = []
    for request in requests:
        hidden = model.hidden(torch.from_numpy(request.inputs.astype(np.int64))[None])[
            0, -len(request.targets) :
        ]
        scores.append(
            float(
                model.log_likelihoods(hidden, torch.from_numpy(request.targets.astype(np.int64)))[
                    0
                ].sum()
            )
        )
    return np.array(scores)


def calibration(kind, samples=8, length=256):
    tokenizer = load_tokenizer(DEMO_MODELS / kind)
    return consecutive_windows(
        encoder(tokenizer)(load_text("demo", split="calibration").joined), length, samples
    )


def held_out(kind):
    tokenizer = load_tokenizer(DEMO_MODELS / kind)
    return consecutive_windows(
        encoder(tokenizer)(load_text("demo", split="evaluation").joined), 256, 8
    )


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("case", CASES)
@torch.inference_mode()
def test_a_method_is_worth_the_same_on_both(kind, case):
    """Errors are compared, not codes: another order of sums decides a tie, and inputs diverge."""
    method, scheme = CASES[case]
    worth = []
    for device in ("cpu", "cuda"):
        model = load_decoder(Checkpoint(DEMO_MODELS / kind), torch.float32, device)
        quantize_model(model, method, scheme, calibration(kind), InMemory())
        worth.append(perplexity(model, held_out(kind)).nll)
    assert worth[1] == pytest.approx(worth[0], rel=0.02)


@torch.inference_mode()
def test_rounding_to_nearest_gives_a_cpus_codes():
    """Except a scale's last bit (CUDA divides by a number by multiplying) and ties on it."""
    method, scheme = CASES["rtn"]
    cpu, gpu = (
        quantize_model(
            load_decoder(Checkpoint(DEMO_MODELS / "moe"), BF16, device),
            method,
            scheme,
            None,
            InMemory(),
        )
        for device in ("cpu", "cuda")
    )
    for ours, theirs in zip(gpu, cpu, strict=True):
        tensors, expected = facts_of(ours)[0], facts_of(theirs)[0]
        for name, tensor in expected.items():
            same = torch.isclose(tensors[name].float(), tensor.float(), rtol=1e-6, atol=0)
            assert same.double().mean() > 0.999, name


@pytest.mark.parametrize("kind", ["dense", "moe"])
@torch.inference_mode()
def test_streamed_and_resident_and_resumed_give_the_same_bits(kind):
    """A trial that was killed goes on to the bits that it would have had, on a GPU too."""
    method, scheme = CASES["gptq"]
    checkpoint, windows, whole = Checkpoint(DEMO_MODELS / kind), calibration(kind), InMemory()
    resident = load_decoder(checkpoint, BF16, GPU)
    quantize_model(resident, method, scheme, windows, whole)
    half = InMemory()
    half.blocks = {k: whole.blocks[k] for k in range(len(whole.blocks) // 2)}
    again, streamed = InMemory(), InMemory()
    quantize_model(load_decoder(checkpoint, BF16, GPU), method, scheme, windows, half)
    quantize_model(load_decoder(checkpoint, BF16, GPU), method, scheme, windows, again)
    model = StreamedDecoder(checkpoint, BF16, GPU, activations=2**24)
    quantize_model(model, method, scheme, windows, streamed)
    for name, other in (("again", again), ("resumed", half), ("streamed", streamed)):
        for k, block in whole.blocks.items():
            mine, theirs = facts_of(block)[0], facts_of(other.blocks[k])[0]
            assert [key for key in mine if not torch.equal(mine[key], theirs[key])] == [], (name, k)
    ids = held_out(kind)
    assert perplexity(model, ids).nll == perplexity(resident, ids).nll


@pytest.mark.parametrize(
    ("dtype", "median", "most"), [(torch.float32, 2e-5, 2e-3), (BF16, 0.06, 0.6)]
)
def test_scores_equal_hflms(dtype, median, most):
    folder = DEMO_MODELS / "dense"
    tokenizer = load_tokenizer(folder)
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    theirs.to(GPU)
    hflm = HFLM(
        pretrained=theirs, tokenizer=tokenizer, batch_size=8, max_length=512, logits_cache=False
    )
    ours = HarnessLM(load_decoder(Checkpoint(folder), dtype, GPU), tokenizer, max_length=512)
    pairs = [pair for pair in adversarial()[:-1] if len(pair[0]) < 700]
    found, expected = (
        ours.loglikelihood(instances(pairs)),
        hflm.loglikelihood(instances(pairs), disable_tqdm=True),
    )
    differences = [
        abs(a - b) / max(1.0, abs(b) / 20) for (a, _), (b, _) in zip(found, expected, strict=True)
    ]
    assert np.median(differences) <= median
    assert max(differences) <= most
    texts = [(context, {"until": ["\n"], "max_gen_toks": 12}) for context, _ in pairs[:6]]
    if dtype == torch.float32:
        asked = instances(texts, "generate_until")
        assert ours.generate_until(asked) == hflm.generate_until(asked, disable_tqdm=True)


@torch.inference_mode()
def test_running_out_of_a_gpus_memory_halves_the_batches():
    """For real: the process may take little more than the model."""
    model = load_decoder(Checkpoint(DEMO_MODELS / "dense"), BF16, GPU)
    requests = [
        Request(row.numpy().astype(np.int32)[:-1], row.numpy().astype(np.int32)[-1:], "t")
        for row in torch.randint(0, 4096, (64, 500), generator=torch.Generator().manual_seed(0))
    ]
    expected = scored(model, requests)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(GPU).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 90 * 2**20) / total)
    try:
        budget = TokenBudget(32000, most=32000)
        found = dict(pair for ended, _ in score(model, requests, budget) for pair in ended)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert budget.tokens < 32000
    scores = np.array([found[number].log_likelihood for number in range(len(requests))])
    assert np.abs(scores - expected).max() < 0.5
