"""Hybrids: the delta rule and its state, scales through norms around 0, and what is refused."""

import json
import re
from dataclasses import replace
from functools import partial

import pytest
import torch

from q3q.config.patterns import linears
from q3q.config.schema import OverrideConfig
from q3q.config.schemes import resolve_schemes
from q3q.errors import CheckpointError, ConfigError
from q3q.models import delta
from q3q.models.anatomy import QKV, ScaleGroup
from q3q.models.block import Rope
from q3q.models.checkpoint import Checkpoint
from q3q.models.decoder import load_decoder
from q3q.models.delta import GatedDelta, delta_rule, delta_rule_plain
from q3q.models.delta_sizes import DeltaSizes
from q3q.models.facts import read_facts
from q3q.models.streaming import StreamedDecoder
from q3q.quantize.methods.settings import AwqSettings, RtnSettings, SmoothQuantSettings
from q3q.quantize.scales import migrate_scale, storable
from q3q.quantize.walk import quantize_model
from q3q.spec import Scheme, Schemes
from tests.composed import compose
from tests.methods import built
from tests.models.families import HYBRIDS, build, build_seeing, save_seeing
from tests.nowhere import Nowhere

SIZES = DeltaSizes(key_heads=2, value_heads=6, key_dim=10, value_dim=7, width=3)


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def heads(rows, tokens):
    """Return queries, keys, values, decays, rates and the matrices before them."""
    keys = rows, tokens, SIZES.key_heads, SIZES.key_dim
    each = rows, tokens, SIZES.value_heads
    return (
        drawn(*keys),
        drawn(*keys, seed=1),
        drawn(*each, SIZES.value_dim, seed=2),
        -drawn(*each, seed=3).exp(),
        drawn(*each, seed=4).sigmoid(),
        drawn(rows, SIZES.value_heads, SIZES.key_dim, SIZES.value_dim, seed=5),
    )


@pytest.mark.parametrize(("tokens", "chunk"), [(1, 64), (2, 64), (64, 64), (150, 64), (23, 4)])
def test_chunks_are_the_plain_recurrence(tokens, chunk):
    query, key, value, decay, rate, before = heads(2, tokens)
    parts = query, key, value, decay, rate, before
    ours, matrix = delta_rule(*parts, chunk)
    expected, expected_matrix = delta_rule_plain(*parts)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(matrix, expected_matrix, rtol=0, atol=1e-5)


def test_many_rows_are_computed_a_few_at_a_time(monkeypatch):
    parts, few_at_a_time = heads(11, 9), partial(delta_rule, chunk=4)
    expected, expected_matrix = few_at_a_time(*parts)
    monkeypatch.setattr(delta, "PIECE_TOKENS", 16)  # a chunk of four rows
    seen: list[int] = []
    plain = delta._in_chunks

    def watched(of_heads, *rest):
        seen.append(len(of_heads[0]))
        return plain(of_heads, *rest)

    monkeypatch.setattr(delta, "_in_chunks", watched)
    ours, matrix = few_at_a_time(*parts)
    assert max(seen) == 4
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(matrix, expected_matrix, rtol=0, atol=1e-5)


@pytest.mark.parametrize("gain", [1.0, 0.1])
def test_a_gain_around_0_takes_over_the_scale_that_its_file_can_hold(gain):
    group = ScaleGroup(QKV, "norm", offset=1.0)
    stored = (gain * (1 + 0.1 * drawn(64)) - 1).bfloat16()
    scale = drawn(1, 64, seed=1).exp()
    near = storable(stored, group, scale)
    weights = {"norm": stored, **{name: torch.ones(2, 64) for name in QKV.weights}}
    changed = migrate_scale(weights, group, near)
    effective = (changed["norm"].float() + 1) * changed[QKV.weights[0]][0]
    torch.testing.assert_close(effective, stored.float() + 1, rtol=1e-6, atol=0)
    torch.testing.assert_close(near, scale, rtol=0.5, atol=0)
    assert storable(stored, replace(group, offset=0.0), scale) is scale
    vanishing = torch.full((1, 64), 1e9)
    assert torch.equal(storable(stored, group, vanishing), torch.ones(1, 64))


def test_a_key_that_is_written_again_is_replaced_and_forgetting_is_the_decay():
    """With rate 1 a matrix gives back the last value of a key; without a write it only fades."""
    key = torch.zeros(1, 3, 1, 4)
    key[..., 0] = 1.0
    value = drawn(1, 3, 1, 5)
    decay, rate = torch.zeros(1, 3, 1), torch.tensor([1.0, 1.0, 0.0])[None, :, None]
    decay[:, 2] = -2.0
    outputs, matrix = delta_rule(key, key, value, decay, rate)
    read = outputs[0, :, 0] * 4**0.5  # queries are divided by the root of their size
    torch.testing.assert_close(read[:2], value[0, :2, 0], rtol=1e-4, atol=1e-5)
    faded = value[0, 1, 0] * torch.tensor(-2.0).exp()
    torch.testing.assert_close(read[2], faded, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(matrix[0, 0, 0], faded, rtol=1e-4, atol=1e-5)


def test_many_rows_are_computed_a_piece_at_a_time_with_the_same_result(monkeypatch):
    parts = heads(3, 200)
    whole = delta_rule(*parts)
    monkeypatch.setattr("q3q.models.delta.PIECE_TOKENS", 64)
    for one, other in zip(delta_rule(*parts), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


@pytest.fixture
def recurrence():
    return GatedDelta(
        SIZES,
        drawn(SIZES.channels, SIZES.width),
        drawn(SIZES.value_heads, seed=1) * 0.3,
        drawn(SIZES.value_heads, seed=2),
    )


def inputs_of(rows, tokens):
    return drawn(rows, tokens, SIZES.channels + 2 * SIZES.value_heads, seed=7)


@pytest.mark.parametrize("cuts", [(1,), (2, 3), (70, 71, 140)])
def test_a_text_in_pieces_is_the_text_in_one(recurrence, cuts):
    inputs = inputs_of(2, 150)
    expected, last = recurrence(inputs)
    pieces, state = [], None
    for piece in inputs.tensor_split(cuts, dim=1):
        outputs, state = recurrence(piece, state)
        pieces.append(outputs)
    assert state is not None
    torch.testing.assert_close(torch.cat(pieces, 1), expected, rtol=0, atol=1e-5)
    for one, other in zip(state, last, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
    assert sum(part[0].numel() for part in last) == SIZES.state


def test_padding_changes_no_state(recurrence):
    """Whatever lies there, and whether a row has fewer tokens than the convolution is wide."""
    inputs, lengths = inputs_of(4, 90), torch.tensor([90, 1, 2, 66])
    _, before = recurrence(inputs_of(4, 5))
    for b, length in enumerate(lengths):
        inputs[b, length:] = torch.nan
    outputs, state = recurrence(inputs, before, lengths)
    for b, length in enumerate(lengths):
        own = tuple(part[b : b + 1] for part in before)
        expected, last = recurrence(inputs[b : b + 1, :length], own)
        torch.testing.assert_close(outputs[b, :length], expected[0], rtol=0, atol=1e-5)
        for one, other in zip(state, last, strict=True):
            torch.testing.assert_close(one[b], other[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", HYBRIDS)
@torch.inference_mode()
def test_scales_leave_the_function_alone(kind, tmp_path):
    """Gains are stored around 0, and a norm feeds what is not quantized, too."""
    build(kind).save_pretrained(tmp_path)
    decoder = load_decoder(Checkpoint(tmp_path), torch.float32)
    x = drawn(2, 9, 32)
    for block in decoder.blocks:
        expected = block(x, decoder.rope)
        for group in block.scale_groups:
            columns = block.weights[group.site.weights[0]].shape[-1]
            experts = 6 if block.weights[group.producer].ndim == 3 else 1
            shape = experts, columns // group.repeat // group.head_dim, 1, group.head_dim
            scale = drawn(*shape).exp().expand(-1, -1, group.repeat, -1).reshape(experts, -1)
            scaled = block.with_weights(migrate_scale(block.weights, group, scale))
            away = (scaled(x, decoder.rope) - expected).abs().max()
            assert away < 2e-5 * expected.abs().max(), group


@pytest.mark.parametrize("kind", HYBRIDS)
@torch.inference_mode()
def test_methods_that_scale_take_what_stays_unquantized_along(kind, tmp_path):
    """A block errs about as without scales; were one reader of a norm left behind, by its size."""
    build(kind, tied=False).save_pretrained(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    original = load_decoder(checkpoint, torch.float32)
    windows = torch.randint(97, (3, 40), generator=torch.Generator().manual_seed(1))
    left_out = {
        f"blocks.{k}.{name.removesuffix('.weight')}"
        for k, block in enumerate(original.blocks)
        for site in block.sites
        for name in site.apart
    }
    schemes = Schemes(Scheme(bits=8, group_size=-1, symmetric=True), skip=left_out)

    def errors(method):
        decoder = load_decoder(checkpoint, torch.float32)
        blocks = quantize_model(decoder, method, schemes, windows, Nowhere())
        x, found = decoder.embed(windows), []
        for block, before in zip(decoder.blocks, original.blocks, strict=True):
            expected = before(x, decoder.rope)
            away = (block(x, decoder.rope) - expected).norm() / (expected - x).norm()
            found.append(float(away))
            x = expected
        return sum(found), {name for block in blocks for name in block.changed}

    plain, changed = errors(built("smoothquant", smooth=False))
    assert not changed
    apart = {name for block in original.blocks for site in block.sites for name in site.apart}
    for method in (
        built("awq", v_to_o=True, grid=4, clip=False),
        built("smoothquant", o_and_down=True),
    ):
        scaled, changed = errors(method)
        norms = {"input_layernorm.weight", "post_attention_layernorm.weight"}
        assert {*norms, *apart, "linear_attn.norm.weight"} <= changed
        if kind != "qwen3.5":
            assert {"mlp.gate.weight", "mlp.shared_expert_gate.weight"} <= changed
        assert scaled < 3 * plain


@pytest.mark.parametrize("settings", [RtnSettings(), AwqSettings(), SmoothQuantSettings()])
def test_small_projections_stay_unquantized_unless_skip_is_given(settings):
    """Even where the rest of their site is rounded, or takes a scale."""
    facts = read_facts(build("qwen3.5").config.to_dict())
    act_bits = 8 if settings.name == "smoothquant" else None
    config = compose("config", ["bits=8", "group_size=-1", "symmetric=true"])

    def resolved(skip):
        config.skip, config.act_bits = skip, act_bits
        schemes, rules = resolve_schemes(config, settings, facts)
        assert schemes is not None
        return schemes.skip, rules

    left = {f"blocks.{k}.linear_attn.in_proj_{part}" for k in (0, 1, 3) for part in "ba"}
    skipped, rules = resolved(None)
    assert set(skipped) == left
    assert rules == {}
    assert resolved([]) == ((), {"skip": []})
    config.overrides["*.in_proj_b"] = OverrideConfig(bits=4)
    with pytest.raises(ConfigError, match=r"in_proj_b names only layers that stay in 16 bits"):
        resolved(None)
    config.overrides.clear()
    assert set(resolved(["blocks.2"])[0]) == {
        name for name in linears(facts) if name.startswith("blocks.2.")
    }


def test_what_a_row_carries_is_counted():
    facts = read_facts(build("qwen3.5").config.to_dict())
    family = facts.family
    assert facts.recurrent == (0, 1, 3)
    assert [family.state_width(facts, k) for k in range(4)] == [0, 0, 2 * 2 * 16, 0]
    state = 2 * (2 * 2 * 10 + 6 * 6) + 6 * 10 * 6  # two tokens of the convolution, six matrices
    assert [family.recurrent_width(facts, k) for k in range(4)] == [state, state, 0, state]


CONFIG = dict(
    model_type="qwen3_5_text",
    vocab_size=97,
    hidden_size=32,
    num_attention_heads=4,
    intermediate_size=48,
    num_hidden_layers=2,
    head_dim=16,
)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"layer_types": ["linear_attention", "mamba"]}, "other than linear_attention and full_at"),
        ({"layer_types": ["linear_attention"]}, "layer_types names 1 blocks of 2"),
        ({"attn_output_gate": False}, "attn_output_gate=False is not supported"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"linear_num_value_heads": 24}, "24 value heads .* cannot share 16 key heads evenly"),
        ({"linear_conv_kernel_dim": 0}, "linear_conv_kernel_dim=0; a whole number of 1 or more"),
        ({"partial_rotary_factor": 0.2}, "0.2 of head_dim=16 is 3 dimensions: .* must be even"),
        ({"partial_rotary_factor": 1.5}, "1.5 is more than a whole head"),
        ({"partial_rotary_factor": 0.01}, "is 0 dimensions: rotary positions turn pairs"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type='longrope' is not supported"),
        ({"model_type": "qwen3_5"}, "it has no text_config"),
    ],
)
def test_what_the_forward_does_not_compute_is_refused(change, complaint):
    with pytest.raises(CheckpointError, match=complaint):
        read_facts({**CONFIG, **change})


def test_sections_of_a_multimodal_rotary_embedding_change_nothing_for_text():
    sections = {"mrope_section": [1, 1, 0], "mrope_interleaved": True}
    plain = {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 0.25}
    with_them = read_facts({**CONFIG, "rope_parameters": {**plain, **sections}})
    assert with_them == read_facts({**CONFIG, "rope_parameters": plain})
    positions = torch.arange(7)
    cos, _ = Rope(with_them)(positions, torch.float32)
    assert cos.shape == (7, 1, 4)


@pytest.mark.parametrize("kind", ["qwen3.5", "qwen3.5 moe"])
@torch.inference_mode()
def test_a_text_part_is_that_of_a_model_that_sees_images(kind, tmp_path):
    theirs = build_seeing(kind)
    carried = save_seeing(theirs, tmp_path)
    ids = torch.randint(97, (2, 30), generator=torch.Generator().manual_seed(1))
    checkpoint = Checkpoint(tmp_path)
    (remark,) = checkpoint.remarks
    assert re.match(r"model\.visual and mtp \(\d+ tensors\) are neither run nor quantized", remark)
    assert checkpoint.facts.carried_bytes == carried
    ours = load_decoder(checkpoint, torch.float32)
    expected = ours.hidden(ids)
    their_logits = theirs(input_ids=ids).logits.flatten(0, 1)
    logits = torch.cat([part for _, part in ours.logits(expected.flatten(0, 1))])
    assert (logits - their_logits).abs().max() < 1e-5 * their_logits.abs().max()
    assert torch.equal(StreamedDecoder(checkpoint, torch.float32).hidden(ids), expected)
    config = json.loads((tmp_path / "config.json").read_text())
    # As transformers saves the text part alone, under its long names.
    (tmp_path / "config.json").write_text(json.dumps(config["text_config"]))
    alone = load_decoder(Checkpoint(tmp_path), torch.float32)
    assert torch.equal(alone.hidden(ids), expected)
    # As it saves a model whose outer config alone says that its ends are tied.
    tied = config | {"tie_word_embeddings": True}
    tied["text_config"] = config["text_config"] | {"tie_word_embeddings": False}
    assert read_facts(tied).tied
    config["text_config"]["linear_value_head_dim"] = 7
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"of a shape that config\.json does not imply"):
        Checkpoint(tmp_path)


# The text parts' numbers as their model cards give them: hidden, layers, heads, key-value heads,
# intermediate (an expert's), experts, value heads of the delta rule, vocabulary; all untied.
CARDS = {
    "Qwen3.6-27B": ("qwen3_5_text", 5120, 64, 24, 4, 17408, 0, 48, 248_320, 26.90),
    "Qwen3.6-35B-A3B": ("qwen3_5_moe_text", 2048, 40, 16, 2, 512, 256, 32, 248_320, 34.66),
    "Qwen3-Next-80B-A3B": ("qwen3_next", 2048, 48, 16, 2, 512, 512, 32, 151_936, 79.67),
}


@pytest.mark.parametrize("card", CARDS)
def test_released_sizes_are_counted_from_config_json(card):
    kind, hidden, layers, heads, kv_heads, inner, experts, values, vocab, billions = CARDS[card]
    config = {
        "model_type": kind,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "linear_num_value_heads": values,
        "vocab_size": vocab,
        "intermediate_size": inner,
        "torch_dtype": "bfloat16",
        **({"num_experts": experts, "moe_intermediate_size": inner} if experts else {}),
    }
    facts = read_facts(config)
    assert facts.parameters / 1e9 == pytest.approx(billions, abs=0.01)
    assert facts.rotary_dim == 64
    assert len(facts.recurrent) == layers * 3 // 4
    # A row's state is as large as the keys and values of so many tokens in all its attention.
    carried = sum(facts.family.recurrent_width(facts, k) for k in facts.recurrent)
    each = sum(facts.family.state_width(facts, k) for k in range(layers))
    assert carried == len(facts.recurrent) * (3 * (2 * 16 * 128 + values * 128) + values * 128**2)
    assert each == layers // 4 * 2 * kv_heads * 256
    assert all(width % 128 == 0 for widths in facts.columns.values() for width in widths)
