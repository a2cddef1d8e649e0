"""A cache of rounded keys and values is read as a server would read it, however tokens are run."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from q3q.config.model import DEMO_MODELS
from q3q.data.texts import load_text
from q3q.data.windows import consecutive_windows, encoder
from q3q.evaluate import generation, prefixes
from q3q.evaluate.budget import TokenBudget
from q3q.evaluate.perplexity import perplexity
from q3q.evaluate.scoring import Request, pack_requests, score
from q3q.evaluate.tree_pass import run_tree
from q3q.kv_scheme import KvScheme
from q3q.models import softmax
from q3q.models.adjust import set_cache
from q3q.models.attention import CAUSAL
from q3q.models.checkpoint import Checkpoint, load_tokenizer
from q3q.models.decoder import load_decoder
from q3q.models.kv_cache import KvRounding
from q3q.models.streaming import StreamedDecoder
from q3q.number_formats import FLOATS
from q3q.numerics.divergence import kl_divergence
from q3q.numerics.floats import floats_per_token
from q3q.numerics.grid import Grid, absmax_per_token, on_grid
from tests.evaluate.test_prefixes import random_texts, requests_of
from tests.models.families import build
from tests.specs import make_spec

KIVI = KvScheme(bits=2, scales="channel", chunk=8, group_size=32, window=5)
SCHEMES = [
    KvScheme(bits=4),
    KvScheme(bits=3, group_size=16, window=6),
    KvScheme(bits=2, scales="channel", chunk=8, group_size=32),
    KIVI,
    KvScheme(bits=8, format="fp8_e4m3", scales="fixed", window=1),
    KvScheme(bits=4, format="nvfp4", group_size=16),
]
LATE = [scheme for scheme in SCHEMES if scheme.late]
names = pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)


def fixed(tokens):
    return TokenBudget(tokens, most=tokens)


@pytest.fixture(scope="module")
def whole():
    """Two blocks of the demo model in float64, where no tie hides a wrong token."""
    decoder = load_decoder(Checkpoint(DEMO_MODELS / "dense"), torch.float64)
    return replace(decoder, blocks=list(decoder.blocks)[:2])


@pytest.fixture
def decoder(whole):
    return replace(whole, blocks=[copy.copy(block) for block in whole.blocks])


def rounded(decoder, scheme):
    decoder.round_cache(None if scheme is None else KvRounding(scheme))
    return decoder


def rows_of(decoder, tree):
    """Yield each text's positions in the tree, and its states when it runs by itself."""
    for text, positions in zip(tree.texts, tree.positions(), strict=True):
        yield positions.copy(), decoder.hidden(torch.from_numpy(text.astype(np.int64))[None])[0]


# What is stored.


def test_codes_are_those_of_numerics():
    states = torch.randn(2, 3, 16, 64, generator=torch.Generator().manual_seed(0))
    groups = states.unflatten(-1, (-1, 32))
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    grid = Grid((high - low) / 15, torch.zeros_like(low))
    own = KvRounding(KvScheme(bits=4, group_size=32))
    expected = (on_grid(groups - low, grid, 4) + low).flatten(-2)
    assert torch.equal(own.keys(states), expected)
    assert torch.equal(own.values(states), expected)

    symmetric = KvRounding(KvScheme(bits=8, symmetric=True))
    assert torch.equal(symmetric.keys(states), absmax_per_token(states, 8))
    for name in ("fp8_e5m2", "mxfp4", "nvfp4"):
        form = FLOATS[name]
        size = form.group_size or 16
        own = KvRounding(KvScheme(bits=form.bits, format=name, group_size=size))
        assert torch.equal(own.values(states), floats_per_token(states, form, size))
    fp8 = KvRounding(KvScheme(bits=8, format="fp8_e4m3", scales="fixed"), 0.5, 2.0)
    for scale, round_ in ((0.5, fp8.keys), (2.0, fp8.values)):
        assert torch.equal(round_(states), (states / scale).to(torch.float8_e4m3fn).float() * scale)

    channel = KvRounding(KvScheme(bits=2, scales="channel", chunk=8))
    by_channel = states.unflatten(-2, (2, 8)).transpose(-1, -2)
    low, high = by_channel.amin(-1, keepdim=True), by_channel.amax(-1, keepdim=True)
    grid = Grid((high - low) / 3, torch.zeros_like(low))
    expected = (on_grid(by_channel - low, grid, 2) + low).transpose(-1, -2).flatten(-3, -2)
    assert torch.equal(channel.keys(states), expected)


def test_a_fixed_scale_that_a_checkpoint_brings_stays_if_fixed_ones_are_asked_for(decoder):
    fp8 = KvScheme(bits=8, format="fp8_e4m3", scales="fixed")
    own = KvRounding(fp8, key_scale=0.5, value_scale=3.0)
    decoder.blocks[1].kv = own
    set_cache(decoder, replace(make_spec("none"), kv=fp8))
    assert [block.kv for block in decoder.blocks] == [KvRounding(fp8), own]
    set_cache(decoder, replace(make_spec("none"), kv=replace(fp8, window=4)))
    assert decoder.blocks[1].kv == replace(own, scheme=replace(fp8, window=4))
    set_cache(decoder, replace(make_spec("none"), kv=KIVI))
    assert decoder.blocks[1].kv == KvRounding(KIVI)


def test_numbers_that_are_all_equal_stay():
    same = torch.full((1, 4, 8), -3.7)
    assert torch.equal(KvRounding(KvScheme(bits=2)).keys(same), same)
    assert KvRounding(KvScheme(bits=2)).keys(torch.tensor([[1.0, torch.inf]])).isnan().any()


# Which token reads what.


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: scheme.name)
def test_a_row_reads_what_a_server_that_takes_token_by_token_has_stored(scheme):
    """The plain twin: one token at a time is written, rounded once it is due, and then read."""
    random = torch.Generator().manual_seed(1)
    heads, kv_heads, tokens, size = 4, 2, 37, 32
    query, key, value = (
        torch.randn(1, count, tokens, size, generator=random, dtype=torch.float64)
        for count in (heads, kv_heads, kv_heads)
    )
    kv = KvRounding(scheme)
    if kv.late:
        found = CAUSAL(query, key, value, kv)
    else:
        found = CAUSAL(query, kv.keys(key), kv.values(value))
    cache_key, cache_value, stored = key.clone(), value.clone(), 0
    for t in range(tokens):
        stop = scheme.rounded(t + 1)
        if stop > stored:
            cache_key[:, :, stored:stop] = kv.keys(key[:, :, stored:stop])
            cache_value[:, :, stored:stop] = kv.values(value[:, :, stored:stop])
            stored = stop
        seen_key = cache_key[0, :, : t + 1].repeat_interleave(2, 0)
        seen_value = cache_value[0, :, : t + 1].repeat_interleave(2, 0)
        shares = torch.einsum("nd,npd->np", query[0, :, t], seen_key / size**0.5).softmax(-1)
        expected = torch.einsum("np,npd->nd", shares, seen_value)
        torch.testing.assert_close(found[0, :, t], expected, rtol=1e-9, atol=1e-9)
    assert stored == tokens - scheme.window - (tokens - scheme.window) % scheme.chunk


@names
@torch.inference_mode()
def test_a_tree_reads_what_rows_read(decoder, scheme, monkeypatch):
    texts = random_texts(1, count=9, most=40)
    expected = None
    for worth, budget, scores in ((1, 7, 1 << 22), (50, 60, 500), (10**9, 5000, 1 << 22)):
        monkeypatch.setattr(prefixes, "WORTH_SHARING", worth)
        monkeypatch.setattr(softmax, "STORED_SCORES", scores)
        rounded(decoder, scheme)
        tree, _ = pack_requests(requests_of(texts), chunk=decoder.chunk)
        hidden_TH = torch.cat([h for _, _, h in run_tree(decoder, tree, fixed(budget))])
        expected = expected or list(rows_of(decoder, tree))
        for positions, states in expected:
            torch.testing.assert_close(hidden_TH[positions], states, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", LATE, ids=lambda scheme: scheme.name)
@torch.inference_mode()
def test_generated_texts_score_as_they_were_generated(decoder, scheme, monkeypatch):
    """Each token is the likeliest one where the text is scored, whichever rows ran beside it."""
    monkeypatch.setattr(generation, "LEAST_CACHE_BYTES", 1 << 18)  # a few rows at a time
    rounded(decoder, scheme)
    texts = sorted(
        {text.tobytes(): text for text in random_texts(5, count=8, most=30)}.values(),
        key=lambda text: text.tolist(),
    )
    found = dict(generation.generate(decoder, texts, 20, lambda tokens: False, fixed(64)))
    requests = [
        Request(np.concatenate((text, found[row][:-1])).astype(np.int32), np.array(found[row]), "t")
        for row, text in enumerate(texts)
    ]
    scores = dict(pair for ended, _ in score(decoder, requests, fixed(100)) for pair in ended)
    assert all(scores[row].greedy for row in range(len(texts)))
    exact = rounded(decoder, None)
    assert found != dict(generation.generate(exact, texts, 20, lambda tokens: False, fixed(64)))


@torch.inference_mode()
def test_a_window_as_long_as_the_text_rounds_nothing(decoder):
    ids = torch.arange(40)[None]
    expected = rounded(decoder, None).hidden(ids)
    found = rounded(decoder, KvScheme(bits=2, window=40)).hidden(ids)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(rounded(decoder, KvScheme(bits=2, window=39)).hidden(ids), expected)


@torch.inference_mode()
def test_sixteen_bits_are_the_model_as_it_is_bit_for_bit(decoder):
    ids, spec = torch.arange(40)[None], make_spec("rtn", 4)
    expected = decoder.hidden(ids)
    set_cache(decoder, spec)
    assert decoder.kv is None
    assert torch.equal(decoder.hidden(ids), expected)
    set_cache(decoder, replace(spec, kv=KIVI))
    assert not torch.allclose(decoder.hidden(ids), expected)
    assert torch.equal(rounded(decoder, None).hidden(ids), expected)


@pytest.mark.parametrize("scheme", [SCHEMES[0], KIVI], ids=lambda scheme: scheme.name)
@torch.inference_mode()
def test_a_streamed_model_reads_the_same_bit_for_bit(scheme):
    checkpoint = Checkpoint(DEMO_MODELS / "moe")
    models = load_decoder(checkpoint, torch.float32), StreamedDecoder(checkpoint, torch.float32)
    ids = [torch.arange(30)[None], torch.arange(40, 80)[None]]
    resident, streamed = (list(rounded(model, scheme).states(ids)) for model in models)
    assert all(map(torch.equal, resident, streamed))
    texts = random_texts(2, count=6, most=20)
    trees = []
    for model in models:
        tree, _ = pack_requests(requests_of(texts), chunk=model.chunk)
        trees.append(torch.cat([h for _, _, h in run_tree(model, tree, fixed(50))]))
    assert torch.equal(*trees)


@torch.inference_mode()
def test_of_a_hybrid_the_attention_alone_has_a_cache(tmp_path):
    build("qwen3-next").save_pretrained(tmp_path)
    model = load_decoder(Checkpoint(tmp_path), torch.float32)
    first = model.blocks[0]
    assert 0 in model.facts.recurrent
    assert len(model.facts.recurrent) < model.facts.layers
    x_BTH = model.embed(torch.arange(12)[None])
    expected = first(x_BTH.clone(), model.rope)
    texts = [(text % 97).astype(np.int32) for text in random_texts(3, count=8, most=30)]
    plain = model.hidden(torch.arange(12)[None])
    rounded(model, replace(KIVI, group_size=-1))
    assert torch.equal(first(x_BTH.clone(), model.rope), expected)
    assert not torch.allclose(model.hidden(torch.arange(12)[None]), plain)
    tree, _ = pack_requests(requests_of(texts), states=8, chunk=model.chunk)
    hidden_TH = torch.cat([hidden for _, _, hidden in run_tree(model, tree, fixed(50))])
    for positions, states in rows_of(model, tree):
        torch.testing.assert_close(hidden_TH[positions], states, rtol=1e-3, atol=1e-3)


@torch.inference_mode()
def test_fewer_bits_diverge_further():
    folder = DEMO_MODELS / "dense"
    model = load_decoder(Checkpoint(folder), torch.float32)
    ids = encoder(load_tokenizer(folder))(load_text("demo", split="evaluation").joined[:8000])
    windows = consecutive_windows(ids, 128, 3)
    base = (model.hidden(windows) @ model.head_VH.T).flatten(0, 1)
    for options in ({}, {"scales": "channel", "chunk": 32}, {"window": 32, "group_size": 32}):
        found = []
        for bits in (8, 4, 3, 2):
            rounded(model, KvScheme(bits=bits, **options))
            logits = (model.hidden(windows) @ model.head_VH.T).flatten(0, 1)
            found.append(float(kl_divergence(base, logits).mean()))
        assert 0 < found[0] < found[1] < found[2] < found[3], (options, found)
    rounded(model, KvScheme(bits=2, window=64))
    assert (
        perplexity(model, windows).nll < perplexity(rounded(model, KvScheme(bits=2)), windows).nll
    )
