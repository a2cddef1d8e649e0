"""A GGUF file is read as the numbers that llama.cpp computes with, or refused in one line."""

import json
import shutil
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from q3q.config.model import resolve_model
from q3q.errors import CheckpointError
from q3q.models.checkpoint import Checkpoint
from q3q.models.facts import read_facts
from q3q.models.gguf_file import open_gguf
from q3q.models.gguf_header import ARCHITECTURES, read_gguf_header
from q3q.models.likeness import compare_weights
from q3q.models.rope import frequencies
from tests.composed import compose
from tests.export.conftest import DEMO
from tests.models.families import COMMON, KINDS
from tests.models.gguf_files import write_gguf

SIZES = dict(hidden_size=256, intermediate_size=512, head_dim=64, num_hidden_layers=2)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """Return a function that makes a small model's folder of a kind, once."""
    made = {}

    def make(kind, **changes):
        key = kind, json.dumps(changes)
        if key not in made:
            torch.manual_seed(0)
            more: dict[str, Any] = {"mlp_only_layers": []} if "moe" in kind else {}
            settings = {**COMMON, **KINDS[kind], **more, **changes}
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings)).eval()
            with torch.no_grad():
                for name, tensor in model.named_parameters():
                    if name.endswith(".bias"):
                        tensor.add_(torch.randn_like(tensor) * 0.3)
            made[key] = tmp_path_factory.mktemp("model")
            model.save_pretrained(made[key])
        return made[key]

    return make


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["dense", "moe", "qwen2", "llama", "llama, biases"])
def test_a_file_with_plain_numbers_is_the_model_itself(folder_of, tmp_path, kind, tied):
    folder = folder_of(kind, tie_word_embeddings=tied)
    original, ours = (
        Checkpoint(path) for path in (folder, write_gguf(folder, tmp_path / "m.gguf"))
    )
    assert ours.facts == original.facts
    assert ours.facts.quantized is None
    for k in range(original.facts.layers):
        blocks = original.block(k), ours.block(k)
        assert blocks[0].keys() == blocks[1].keys()
        for name, tensor in blocks[0].items():
            assert torch.equal(blocks[1][name], tensor), name
            stretch = original.block_part(k, name, 3, 29), ours.block_part(k, name, 3, 29)
            assert torch.equal(*stretch), name
    assert torch.equal(original.embedding(), ours.embedding())
    assert torch.equal(original.rows("model.embed_tokens.weight", 5, 4), ours.embedding()[5:9])
    assert torch.equal(original.head(), ours.head())
    assert torch.equal(original.final_norm(), ours.final_norm())


def test_a_file_is_a_model_if_its_tokenizer_lies_beside_it(folder_of, tmp_path):
    path = write_gguf(folder_of("llama", **SIZES), tmp_path / "m.gguf", lambda name: "Q8_0")
    config = compose(
        "config", ["model=local", f"model.path={path}", f"storage={tmp_path / 'runs'}"]
    )
    with pytest.raises(CheckpointError, match=r"tokenizer.json: .* the original's beside the GGUF"):
        resolve_model(config)
    shutil.copy(DEMO / "tokenizer.json", tmp_path)
    model, place, facts = resolve_model(config)
    assert (model.name, place, facts.quantized) == ("m.gguf", path, "Q8_0")


QUANTIZED = [kind.name for kind in gguf.quants._type_traits if kind.name != "BF16"]


@pytest.mark.parametrize("kind", QUANTIZED)
def test_every_type_is_read_as_the_package_dequantizes_it(folder_of, tmp_path, kind):
    folder = folder_of("llama", **SIZES)
    path = write_gguf(folder, tmp_path / "m.gguf", lambda name: kind)
    checkpoint = Checkpoint(path)
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    value, query = (stored[f"blk.1.attn_{part}.weight"] for part in ("v", "q"))
    block = checkpoint.block(1)
    numbers = gguf.quants.dequantize(value.data, value.tensor_type)
    assert np.array_equal(block["self_attn.v_proj.weight"].numpy(), numbers)
    turned = gguf.quants.dequantize(query.data, query.tensor_type)
    straight = turned.reshape(4, 32, 2, 256).swapaxes(1, 2).reshape(256, 256)
    assert np.array_equal(block["self_attn.q_proj.weight"].numpy(), straight)
    assert checkpoint.facts.quantized == kind
    bits = checkpoint.bits_on_disk()["model.layers.1.self_attn.v_proj.weight"]
    assert bits == 8 * value.n_bytes


def test_factors_of_no_known_rule_are_refused(folder_of, tmp_path):
    folder = folder_of("llama3 rope")
    factors = np.arange(1, 7, dtype=np.float32)
    path = write_gguf(
        folder, tmp_path / "m.gguf", change=lambda all: all.update({"rope_freqs.weight": factors})
    )
    with pytest.raises(CheckpointError, match=r"rope_freqs.weight are not those of Llama 3's rule"):
        Checkpoint(path)


def test_llama3s_factors_give_its_rule(folder_of, tmp_path):
    rule = dict(rope_type="llama3", rope_theta=500000.0, factor=32.0, low_freq_factor=1.0)
    rule |= dict(high_freq_factor=4.0, original_max_position_embeddings=8192)
    folder = folder_of("llama", rope_parameters=rule, max_position_embeddings=131072)
    facts = read_facts(folder)
    assert facts.rope_scaling is not None
    assert facts.rope_scaling.kind == "llama3"
    plain, stretched = (
        frequencies(facts.head_dim, facts.rope_theta, scaling, "cpu")
        for scaling in (None, facts.rope_scaling)
    )
    factors = (plain / stretched).numpy()
    assert 1 in factors
    assert factors.max() > 1
    path = write_gguf(
        folder, tmp_path / "m.gguf", change=lambda all: all.update({"rope_freqs.weight": factors})
    )
    assert Checkpoint(path).facts == facts


def test_the_head_is_read_as_the_package_reads_it(folder_of, tmp_path):
    values: dict[str, Any] = {
        "tokenizer.ggml.tokens": ["a", "b"],
        "list": [1, 2, 3],
        "yes": True,
        "real": 0.5,
    }
    path = write_gguf(folder_of("dense"), tmp_path / "m.gguf", **values)
    ours, theirs = read_gguf_header(path), gguf.GGUFReader(path)
    fields = {
        name: field.contents()
        for name, field in theirs.fields.items()
        if not name.startswith("GGUF.")
    }
    assert ours.values == fields
    assert {name: (entry.start, list(entry.shape)) for name, entry in ours.tensors.items()} == {
        tensor.name: (tensor.data_offset, tensor.shape.tolist()[::-1]) for tensor in theirs.tensors
    }


def test_split_files_are_read_together(folder_of, tmp_path):
    folder, names = folder_of("dense"), []
    for k in range(2):
        path = tmp_path / f"m-{k + 1:05d}-of-00002.gguf"

        def half(tensors, k=k):
            for name in list(tensors)[1 - k :: 2]:
                del tensors[name]

        values: dict[str, Any] = {"split.count": 2, "split.no": k}
        write_gguf(folder, path, change=half, **values)
        names.append(path)
    ours, original = (Checkpoint(path).block(2) for path in (names[0], folder))
    assert torch.equal(ours["mlp.up_proj.weight"], original["mlp.up_proj.weight"])
    with pytest.raises(CheckpointError, match="give the first one"):
        Checkpoint(names[1])
    names[1].unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        Checkpoint(names[0])


def drop(name):
    return lambda tensors: tensors.pop(name)


def add(name):
    return lambda tensors: tensors.update({name: np.zeros(3, np.float32)})


def test_missing_and_surplus_tensors_are_named(folder_of, tmp_path):
    folder, path = folder_of("dense"), tmp_path / "m.gguf"
    for change, complaint in {
        drop("blk.1.ffn_up.weight"): "1 tensor is missing, first model.layers.1.mlp.up_proj.weight",
        drop("token_embd.weight"): "token_embd.weight, the embedding, is missing",
        add("blk.1.attn_sinks.weight"): "tensors that no qwen3 has: blk.1.attn_sinks.weight",
        add("blk.0.attn_q.bias"): None,
    }.items():
        write_gguf(folder, path, change=change)
        if complaint is None:
            assert any("self_attn.q_proj.bias" in remark for remark in Checkpoint(path).remarks)
            continue
        with pytest.raises(CheckpointError, match=complaint):
            Checkpoint(path)


def test_a_torn_or_foreign_file_is_refused(folder_of, tmp_path):
    path = write_gguf(folder_of("dense"), tmp_path / "m.gguf")
    content = path.read_bytes()
    for damage, complaint in {
        content[:-40]: "is damaged: it has .* bytes, and .* ends at",
        content[:600]: "is damaged: its head ends too early",
        content[:9]: "is damaged: its head ends too early",
        b"": "not a GGUF file",
        b"PK" + content[2:]: "not a GGUF file",
        content[:4] + b"\x09" + content[5:]: "of version 9",
    }.items():
        path.write_bytes(damage)
        with pytest.raises(CheckpointError, match=complaint):
            Checkpoint(path)


def test_another_architecture_is_refused_with_the_list(folder_of, tmp_path):
    path = write_gguf(folder_of("dense"), tmp_path / "m.gguf")
    path.write_bytes(path.read_bytes().replace(b"qwen3", b"gemma"))
    with pytest.raises(CheckpointError, match=f"'gemma'; q3q reads .*{', '.join(ARCHITECTURES)}"):
        open_gguf(path)


def test_an_unknown_type_is_refused(folder_of, tmp_path):
    path = write_gguf(folder_of("llama", **SIZES), tmp_path / "m.gguf", lambda name: "Q8_0")
    name = b"blk.0.ffn_up.weight"
    content = bytearray(path.read_bytes())
    at = content.index(name) + len(name) + 4 + 16  # axes, and two of them
    content[at : at + 4] = (99).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"blk.0.ffn_up.weight is of type 99"):
        Checkpoint(path)


def test_blocks_of_zeros_are_doubted_and_most_of_a_linear_refused(folder_of, tmp_path):
    folder = folder_of("moe", **SIZES, moe_intermediate_size=256)
    path = write_gguf(
        folder, tmp_path / "m.gguf", lambda name: "Q4_0" if "_exps" in name else "F32"
    )
    name = "model.layers.0.mlp.experts.3.up_proj.weight"
    tensor = open_gguf(path).tensors[name]
    content, blocks = bytearray(path.read_bytes()), tensor.size // 18

    def compared(zeros):
        for k in range(zeros):
            content[tensor.start + 18 * k : tensor.start + 18 * k + 2] = b"\x00\x00"
        path.write_bytes(content)
        checkpoint = Checkpoint(path)
        return compare_weights(checkpoint, Checkpoint(folder)), list(checkpoint.doubts)

    likeness, doubts = compared(3)
    assert doubts == [f"{name}: 3 of {blocks} blocks of Q4_0 are zero"]
    assert likeness.unlike == {}
    assert likeness.largest is not None
    assert 0 < likeness.largest[1] < 0.2
    with pytest.raises(CheckpointError, match=f"{name}: {blocks // 2 + 1} of {blocks} blocks of"):
        compared(blocks // 2 + 1)


def test_scales_that_are_no_numbers_are_named_and_zero_ones_counted(folder_of, tmp_path):
    path = write_gguf(folder_of("llama", **SIZES), tmp_path / "m.gguf", lambda name: "Q4_0")
    tensor = open_gguf(path).tensors["model.layers.0.mlp.up_proj.weight"]
    content = bytearray(path.read_bytes())
    content[tensor.start : tensor.start + 2] = b"\x00\x00"
    path.write_bytes(content)
    assert tensor.zero_blocks(tensor.read()) == (1, 512 * 256 / 32)
    content[tensor.start + 18 : tensor.start + 20] = b"\xff\x7f"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"scale of its Q4_0 blocks in blk.0.ffn_up.weight"):
        Checkpoint(path).block(0)
