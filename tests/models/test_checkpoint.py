import dataclasses
import json
import os
import random
import shutil
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from q3q.errors import CheckpointError
from q3q.models import checkpoint as checkpoints
from q3q.models import tensor_files
from q3q.models.checkpoint import Checkpoint, load_tokenizer
from q3q.models.facts import read_facts
from q3q.models.hub import (
    bytes_to_download,
    fetch_facts,
    fetch_file,
    is_downloaded,
    locate,
    resolve_revision,
)
from q3q.models.published.readers import read_packing
from q3q.report.paper import PARAMETERS
from tests.hub import COMMIT, serving, use

SMALL: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,  # heads x head_dim = 48 differs from hidden
}
EXPERTS, INNER = 4, 20


def dense(tied):
    torch.manual_seed(0)
    config = Qwen3Config(**SMALL, intermediate_size=40, tie_word_embeddings=tied)
    return shaken(Qwen3ForCausalLM(config).bfloat16())


def moe():
    torch.manual_seed(1)
    config = Qwen3MoeConfig(
        **SMALL,
        intermediate_size=40,
        moe_intermediate_size=INNER,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        mlp_only_layers=[1],
        norm_topk_prob=True,
    )
    return shaken(Qwen3MoeForCausalLM(config).bfloat16())


def shaken(model):
    """Norms start as ones, all alike: make every tensor tell-tale."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Models, and the folders transformers saved them to. Tests that damage a folder copy it."""
    root = tmp_path_factory.mktemp("models")
    made = {"tied": dense(tied=True), "untied": dense(tied=False), "moe": moe()}
    for name, model in made.items():
        model.save_pretrained(root / name)
        model.save_pretrained(root / f"{name}_sharded", max_shard_size="6KB")
    return root, made


@pytest.fixture
def broken(saved, tmp_path):
    """A private copy of a saved folder."""

    def copy(name):
        return Path(shutil.copytree(saved[0] / name, tmp_path / name))

    return copy


def expected_block(model, k):
    """Block `k` of a transformers model under our names: its experts are fused there."""
    state = dict(model.model.layers[k].state_dict())
    if "mlp.experts.gate_up_proj" in state:
        gate_up = state.pop("mlp.experts.gate_up_proj")
        state["mlp.experts.gate_proj.weight"] = gate_up[:, :INNER]
        state["mlp.experts.up_proj.weight"] = gate_up[:, INNER:]
        state["mlp.experts.down_proj.weight"] = state.pop("mlp.experts.down_proj")
    return state


def assert_same(block, expected):
    assert block.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(block[name], tensor), name


@pytest.mark.parametrize("layout", ["", "_sharded"])
@pytest.mark.parametrize("name", ["tied", "untied", "moe"])
def test_blocks_are_those_of_transformers(saved, name, layout):
    root, made = saved
    checkpoint, model = Checkpoint(root / (name + layout)), made[name]
    assert len(list(checkpoint.folder.glob("*.safetensors"))) > 5 or not layout
    for k in range(3):
        block = checkpoint.block(k)
        assert_same(block, expected_block(model, k))
        assert {
            key: tuple(tensor.shape) for key, tensor in block.items()
        } == checkpoint.facts.block_shapes(k)
        assert all(tensor.is_contiguous() for tensor in block.values())
    assert torch.equal(checkpoint.embedding(), model.model.embed_tokens.weight)
    assert torch.equal(checkpoint.final_norm(), model.model.norm.weight)
    assert torch.equal(checkpoint.head(), model.lm_head.weight)
    assert torch.equal(checkpoint.head(), checkpoint.embedding()) == (name == "tied")


def test_fused_and_per_expert_layouts_read_alike(saved, broken):
    root, made = saved
    folder = broken("moe")
    fused = {name: tensor.clone() for name, tensor in made["moe"].state_dict().items()}
    assert "model.layers.0.mlp.experts.gate_up_proj" in fused
    save_file(fused, folder / "model.safetensors")
    on_disk = load_file(root / "moe" / "model.safetensors")
    assert "model.layers.0.mlp.experts.3.gate_proj.weight" in on_disk
    for k in range(3):
        assert_same(Checkpoint(folder).block(k), Checkpoint(root / "moe").block(k))
        for checkpoint in (Checkpoint(folder), Checkpoint(root / "moe")):
            for name, tensor in checkpoint.block(k).items():
                matrices = list(tensor) if "experts" in name else [tensor]
                for e, matrix in enumerate(matrices):
                    assert torch.equal(checkpoint.matrix(k, name, e), matrix), name


@pytest.mark.parametrize("layout", ["", "_sharded"])
def test_experts_are_read_several_at_a_time_each_into_its_place(saved, layout, monkeypatch):
    folder, name = saved[0] / f"moe{layout}", "mlp.experts.up_proj.weight"
    files = [load_file(shard) for shard in folder.glob("*.safetensors")]
    on_disk = {key: tensor for file in files for key, tensor in file.items()}
    experts = [on_disk[f"model.layers.0.mlp.experts.{e}.up_proj.weight"] for e in range(EXPERTS)]
    expected, each, plain = torch.stack(experts), experts[0].nbytes, os.preadv
    monkeypatch.setattr(tensor_files, "READ_AT_ONCE", each)
    monkeypatch.setattr(tensor_files, "readers", lambda: 3)
    monkeypatch.setattr(checkpoints, "_CONVERTED_AT_ONCE", expected.numel() - 5)
    reads: list[threading.Thread] = []

    def meeting(*arguments):
        """Let the first reads go on when three have begun, or fail."""
        reads.append(threading.current_thread())
        if len(reads) <= 3:
            together.wait()
        return plain(*arguments)

    def wide(checkpoint):
        return checkpoint.block(0, torch.float32, [name])[name].bfloat16()

    def stored(checkpoint):
        return checkpoint.block(0, names=[name])[name]

    def part(checkpoint):  # of a gang's rank
        return checkpoint.block_part(0, name, 7, expected.numel() - 9)

    monkeypatch.setattr(os, "preadv", meeting)
    for read in (stored, wide, part):
        reads.clear()
        together = threading.Barrier(3, timeout=60)
        found = read(Checkpoint(folder)).flatten()
        first = 7 if read is part else 0
        assert torch.equal(found, expected.flatten()[first:][: len(found)])
        assert len(found) == expected.numel() - (9 if read is part else 0)
        assert len(set(reads[:3])) == 3


def test_experts_keep_their_order_beyond_ten(broken):
    """Names sort 10 before 2, experts do not."""
    folder = broken("moe")
    config = json.loads((folder / "config.json").read_text())
    config["num_local_experts"] = 12
    (folder / "config.json").write_text(json.dumps(config))
    state = load_file(folder / "model.safetensors")
    for k in (0, 2):
        prefix = f"model.layers.{k}.mlp"
        state[f"{prefix}.gate.weight"] = torch.zeros(12, 32, dtype=torch.bfloat16)
        for e in range(12):
            for matrix, shape in {
                "gate_proj": (INNER, 32),
                "up_proj": (INNER, 32),
                "down_proj": (32, INNER),
            }.items():
                state[f"{prefix}.experts.{e}.{matrix}.weight"] = torch.full(
                    shape, float(e), dtype=torch.bfloat16
                )
    save_file(state, folder / "model.safetensors")
    block = Checkpoint(folder).block(2)
    for matrix in ("gate_proj", "up_proj", "down_proj"):
        assert block[f"mlp.experts.{matrix}.weight"].float().mean(dim=(1, 2)).tolist() == list(
            range(12)
        )


def test_a_block_comes_in_the_dtype_asked_for(saved):
    checkpoint = Checkpoint(saved[0] / "moe")
    block, wide = checkpoint.block(0), checkpoint.block(0, torch.float32)
    assert {tensor.dtype for tensor in block.values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in wide.values()} == {torch.float32}
    assert_same({name: tensor.bfloat16() for name, tensor in wide.items()}, block)


def test_writing_into_what_was_read_changes_no_file(broken):
    folder = broken("untied")
    before = (folder / "model.safetensors").read_bytes()
    Checkpoint(folder).block(0)["self_attn.q_proj.weight"].zero_()
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("k", [-1, 3])
def test_a_block_that_is_not_there(saved, k):
    with pytest.raises(IndexError, match=f"block {k} of 3"):
        Checkpoint(saved[0] / "tied").block(k)


def test_opening_and_checking_imports_no_torch(saved):
    code = (
        "import sys; from pathlib import Path; from q3q.models.checkpoint import Checkpoint;"
        f"Checkpoint(Path({str(saved[0] / 'moe_sharded')!r})).digest();"
        "print([name for name in ('torch', 'transformers', 'safetensors') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=os.getcwd()
    )
    assert done.stdout.strip() == "[]"


# layers, hidden, heads, kv heads, intermediate, tied, (experts, top k, moe intermediate); then
# billions of parameters in the linears, in embedding and head, and in all. head_dim 128, vocabulary
# 151,936 (the released config.json files).
FAMILY = {
    "0.6B": (28, 1024, 16, 8, 3072, True, None, 0.4404, 0.1556, 0.596),
    "1.7B": (28, 2048, 16, 8, 6144, True, None, 1.4093, 0.3112, 1.7206),
    "4B": (36, 2560, 32, 8, 9728, True, None, 3.6333, 0.389, 4.0225),
    "8B": (36, 4096, 32, 8, 12288, False, None, 6.9458, 1.2447, 8.1907),
    "14B": (40, 5120, 40, 8, 17408, False, None, 13.2121, 1.5558, 14.7683),
    "32B": (64, 5120, 64, 8, 25600, False, None, 31.2056, 1.5558, 32.7621),
    "30B-A3B": (48, 2048, 32, 4, 6144, False, (128, 8, 768), 29.897, 0.6223, 30.5321),
    "235B-A22B": (94, 4096, 64, 4, 12288, False, (128, 8, 1536), 233.7989, 1.2447, 235.0936),
}


def released_config(size):
    layers, hidden, heads, kv_heads, intermediate, tied, experts, *_ = FAMILY[size]
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "max_position_embeddings": 40960,
        "max_window_layers": layers,
        "model_type": "qwen3",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "vocab_size": 151936,
    }
    if experts:
        config |= {
            "model_type": "qwen3_moe",
            "num_experts": experts[0],
            "num_experts_per_tok": experts[1],
            "moe_intermediate_size": experts[2],
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
        }
    return config


@pytest.mark.parametrize("size", FAMILY)
def test_facts_of_the_released_models(size):
    layers, hidden, heads, _, intermediate, tied, experts, linears, embeddings, total = FAMILY[size]
    facts = read_facts(released_config(size))
    assert facts.linear_parameters / 1e9 == pytest.approx(linears, abs=6e-5)
    assert facts.embedding_parameters / 1e9 == pytest.approx(embeddings, abs=6e-5)
    assert facts.parameters / 1e9 == pytest.approx(total, abs=6e-5)
    assert facts.parameters == PARAMETERS.get(f"Qwen3-{size}", facts.parameters)
    assert facts.weight_bytes() == 2 * facts.parameters
    assert facts.weight_bytes("float32") == 4 * facts.parameters
    assert facts.columns == {
        "qkv": (hidden,),
        "o": (heads * 128,),
        "gate_up": (hidden,),
        "down": (experts[2] if experts else intermediate,),
    }
    assert (facts.rope_theta, facts.rms_norm_eps, facts.max_positions) == (1e6, 1e-6, 40960)
    assert (facts.tied, facts.norm_topk_prob, facts.dtype) == (
        tied,
        experts is not None,
        "bfloat16",
    )
    assert {facts.sparse(k) for k in range(layers)} == {experts is not None}


@pytest.mark.parametrize("name", ["tied", "untied", "moe"])
def test_facts_count_what_transformers_counts(saved, name):
    root, made = saved
    facts = read_facts(root / name)
    assert facts.parameters == sum(p.numel() for p in made[name].parameters())
    assert facts.rope_theta == made[name].config.rope_parameters["rope_theta"]
    blocks = sum(facts.block_bytes(k) for k in range(facts.layers))
    assert blocks == 2 * sum(p.numel() for p in made[name].model.layers.parameters())


@pytest.mark.parametrize(
    ("mlp_only", "step"), [([], 1), ([], 2), ([1, 2], 1), ([3], 2), ([0, 1, 2, 3], 1)]
)
def test_which_blocks_are_sparse(mlp_only, step):
    config = Qwen3MoeConfig(
        **SMALL | {"num_hidden_layers": 4},
        intermediate_size=40,
        moe_intermediate_size=INNER,
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        mlp_only_layers=mlp_only,
        decoder_sparse_step=step,
    )
    with torch.device("meta"):
        layers = Qwen3MoeForCausalLM(config).model.layers
    facts = read_facts(config.to_dict())
    assert [facts.sparse(k) for k in range(4)] == [
        hasattr(layer.mlp, "experts") for layer in layers
    ]
    widths = {INNER if facts.sparse(k) else 40 for k in range(4)}
    assert facts.columns["down"] == tuple(sorted(widths))


def test_both_spellings_of_a_config_say_the_same():
    old = released_config("30B-A3B")
    new = dict(old)
    new["dtype"] = new.pop("torch_dtype")
    new["num_local_experts"] = new.pop("num_experts")
    new["rope_parameters"] = {"rope_type": "default", "rope_theta": new.pop("rope_theta")}
    del new["rope_scaling"]
    assert read_facts(new) == read_facts(old)
    assert read_facts(new | {"rope_scaling": {"type": "default"}}) == read_facts(old)
    assert dataclasses.replace(read_facts(new), rope_theta=1e4) != read_facts(old)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"model_type": "lama"}, "model_type 'lama' is of no family that q3q runs"),
        ({"model_type": "lama"}, "the nearest name is llama. docs/FAMILY_GUIDE.md"),
        ({"model_type": "gemma3_text"}, "mistral. docs/FAMILY_GUIDE.md"),  # and none is near
        ({"model_type": ["qwen3"]}, "is of no family"),
        ({"model_type": "qwen3" * 10**6}, "docs/FAMILY_GUIDE.md"),
        ({"model_type": None}, "config.json has no model_type, which names a model's family. q3q"),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}},
            "quantized already (gptq), and its config lacks 'sym'",
        ),
        (
            {"quantization_config": {"quant_method": "hqq"}},
            "quantized already (hqq), which q3q",
        ),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"use_sliding_window": True}, "use_sliding_window=True is not supported"),
        (
            {"rope_scaling": {"rope_type": "proportional", "factor": 4.0}},
            "rope_type='proportional' is not supported, only default, linear, llama3, yarn, dyn",
        ),
        ({"rope_scaling": {"type": "linear"}}, "factor=None; a finite number above 0"),
        ({"rope_scaling": {"type": "linear", "factor": -2}}, "factor=-2"),
        (
            {"rope_scaling": dict(type="llama3", factor=8, low_freq_factor=4, high_freq_factor=4)},
            "low_freq_factor=4 must be below high_freq_factor=4",
        ),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "differ between layers"),
        (
            {"rope_parameters": {"rope_type": "default"}, "rope_scaling": {"type": "yarn"}},
            "rope_parameters and rope_scaling are both given, and differ: keep one of them",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported"),
        ({"model_type": "mistral", "sliding_window": 4096}, "sliding_window=4096 is not supported"),
        ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window=True"),
        ({"model_type": "llama", "hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"model_type": "llama", "mlp_bias": "yes"}, "mlp_bias='yes'; true or false"),
        ({"hidden_size": None}, "hidden_size=None"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"vocab_size": "many"}, "vocab_size='many'"),
        ({"num_key_value_heads": 7}, "cannot share 7 key/value heads"),
        ({"torch_dtype": "int8"}, "dtype 'int8' is not supported"),
    ],
)
def test_a_config_that_q3q_cannot_run_is_refused(change, complaint):
    with pytest.raises(CheckpointError) as refusal:
        read_facts(released_config("8B") | change)
    assert complaint in str(refusal.value)
    assert "\n" not in str(refusal.value)


def refuse(folder, *parts):
    with pytest.raises(CheckpointError) as refusal:
        Checkpoint(folder)
    for part in parts:
        assert part in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_folder_that_holds_no_model(tmp_path):
    refuse(tmp_path / "nowhere", "nowhere is not a folder", "model.path=DIR")
    refuse(tmp_path, "no config.json")
    (tmp_path / "config.json").write_text("{]")
    refuse(tmp_path, "config.json is not JSON")
    (tmp_path / "config.json").write_text(json.dumps(released_config("0.6B")))
    refuse(tmp_path, "no model.safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    refuse(tmp_path, "pytorch_model.bin", "pickled")


@pytest.mark.parametrize("keep", [0.0, 0.001, 0.1, 0.9, 0.999])
def test_a_truncated_shard_is_named(broken, keep):
    folder = broken("tied_sharded")
    shard = folder / sorted(path.name for path in folder.glob("*.safetensors"))[3]
    content = shard.read_bytes()
    shard.write_bytes(content[: int(keep * len(content))])
    refuse(folder, shard.name, "damaged")
    shard.write_bytes(content + b"\0")
    refuse(folder, shard.name, "damaged")
    shard.unlink()
    refuse(folder, shard.name, "missing")


def test_a_flipped_bit_in_a_header_is_never_misread(broken):
    """Each flip is refused, or did not matter: never another exception, never other tensors."""
    folder = broken("tied")
    file = folder / "model.safetensors"
    content, block = file.read_bytes(), Checkpoint(folder).block(2)
    header = 8 + struct.unpack("<Q", content[:8])[0]
    refused, rounds = 0, random.Random(0).sample(range(8 * header), 400)
    for bit in [*range(64), *rounds]:
        flipped = bytearray(content[:header])
        flipped[bit // 8] ^= 1 << bit % 8
        with file.open("r+b") as opened:
            opened.write(flipped)
        try:
            survivor = Checkpoint(folder)
        except CheckpointError:
            refused += 1
        else:
            assert_same(survivor.block(2), block)
    assert refused > 0.9 * (64 + len(rounds))


@pytest.mark.parametrize(
    "spans", [[(0, 8), (0, 8), (8, 16)], [(0, 8), (12, 20)], [(4, 12), (12, 20)], [(8, 16), (0, 8)]]
)
def test_tensors_lie_side_by_side(tmp_path, spans):
    """In any order, but never over each other, nor with room between them for what nobody reads."""
    (tmp_path / "config.json").write_text(json.dumps(released_config("0.6B")))
    entries = {
        f"t{i}": {"dtype": "F32", "shape": [2], "data_offsets": span}
        for i, span in enumerate(spans)
    }
    header = json.dumps(entries).encode()
    size = max(end for _, end in spans)
    (tmp_path / "model.safetensors").write_bytes(
        struct.pack("<Q", len(header)) + header + bytes(size)
    )
    side_by_side = sorted(spans) == [(0, 8), (8, 16)]
    refuse(tmp_path, "tensors are missing" if side_by_side else "overlap or leave gaps")


def rewritten(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")
    return folder


def test_missing_and_misshapen_tensors_are_named_and_counted(broken):
    def lose(state):
        for k in range(3):
            del state[f"model.layers.{k}.self_attn.q_norm.weight"]

    refuse(
        rewritten(broken("tied"), lose),
        "3 tensors are missing",
        "model.layers.0.self_attn.q_norm.weight",
    )

    def bend(state):
        state["model.layers.1.mlp.up_proj.weight"] = torch.zeros(41, 32, dtype=torch.bfloat16)

    refuse(
        rewritten(broken("untied"), bend),
        "1 tensor is of a shape",
        "layers.1.mlp.up_proj",
        "[41, 32]",
        "[40, 32]",
    )

    def lose_one_expert(state):
        del state["model.layers.2.mlp.experts.3.down_proj.weight"]

    refuse(
        rewritten(broken("moe"), lose_one_expert),
        "1 tensor is missing",
        "layers.2.mlp.experts.3.down_proj",
    )


def test_weights_that_are_not_floats_are_refused(broken):
    def quantize(state):
        state["model.layers.0.mlp.up_proj.weight"] = torch.zeros(40, 32, dtype=torch.int8)

    refuse(
        rewritten(broken("tied"), quantize),
        "not stored as floats",
        "layers.0.mlp.up_proj.weight",
        "I8",
    )


@pytest.mark.parametrize(
    "shard", ["../evil.safetensors", "/etc/passwd", "..", "a/../../evil.safetensors", "x\\y"]
)
def test_an_index_cannot_lead_out_of_its_folder(broken, shard):
    folder = broken("tied_sharded")
    shutil.copy(next(folder.glob("*.safetensors")), folder.parent / "evil.safetensors")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"]["model.norm.weight"] = shard
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    refuse(folder, repr(shard), "not a file name")


@pytest.mark.parametrize("content", ["[]", "{}", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}'])
def test_an_index_that_is_none(broken, content):
    folder = broken("tied_sharded")
    (folder / "model.safetensors.index.json").write_text(content)
    refuse(folder, "model.safetensors.index.json")


def test_a_quantized_folder_is_refused(broken):
    folder = broken("tied")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "awq"}})
    )
    refuse(folder, "quantized already (awq)")


PACKED: dict[str, dict[str, Any]] = {
    "gptq": {
        "bits": 4,
        "group_size": 8,
        "sym": True,
        "modules_in_block_to_quantize": [["1.mlp.d"]],
    },
    "compressed-tensors": {
        "format": "pack-quantized",
        "config_groups": {
            "one": {
                "targets": ["re:.*1.mlp.down_proj"],
                "weights": {
                    "num_bits": 4,
                    "type": "int",
                    "strategy": "group",
                    "group_size": 8,
                    "symmetric": True,
                },
            }
        },
    },
}


@pytest.mark.parametrize(
    ("method", "part", "numbers", "said"),
    [
        ("gptq", "g_idx", [0, 5], r"g_idx names groups 0 to 5, and there are 5"),
        ("gptq", "g_idx", [-1, 4], r"g_idx names groups -1 to 4"),
        ("gptq", "g_idx", [0, 4], None),
        ("compressed-tensors", "weight_shape", [40, 32], r"weight_shape says \[40, 32\], and con"),
        ("compressed-tensors", "weight_shape", [32, 40], None),
    ],
)
def test_a_packed_linear_that_contradicts_itself_is_refused(broken, method, part, numbers, said):
    folder, name = broken("tied"), "model.layers.1.mlp.down_proj"
    settings = {"quant_method": method, **PACKED[method]}
    layout = read_packing(settings).of(name)
    assert layout is not None
    tensors = load_file(folder / "model.safetensors")
    rows, columns = tensors.pop(f"{name}.weight").shape
    codes = torch.ones(rows, columns, dtype=torch.uint8)
    scale, zero = torch.ones(rows, 5, dtype=torch.float16), torch.full((rows, 5), 8.0)
    parts = {
        key: tensor.contiguous() for key, tensor in layout.pack(codes, scale, zero, None).items()
    }
    parts[part][: len(numbers)] = torch.tensor(numbers)
    save_file(
        tensors | {f"{name}.{key}": parts[key] for key in parts}, folder / "model.safetensors"
    )
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    checkpoint = Checkpoint(folder)
    if said is None:
        assert checkpoint.block(1)["mlp.down_proj.weight"].shape == (rows, columns)
        return
    with pytest.raises(CheckpointError, match=rf"{name}\.{said}"):
        checkpoint.block(1)


@pytest.mark.parametrize("lacking", [0, 2])
def test_scales_of_a_cache_are_read_and_missing_ones_named(broken, lacking):
    folder = broken("tied")
    names = [f"model.layers.{k}.self_attn.{end}_scale" for k in range(3) for end in "kv"]
    scales = {name: torch.tensor([0.5 + k]) for k, name in enumerate(names)}
    for name in names[1 : 1 + lacking]:
        del scales[name]
    rewritten(folder, lambda tensors: tensors.update(scales))
    cache = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    settings = {"quant_method": "compressed-tensors", "config_groups": {}, "kv_cache_scheme": cache}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    checkpoint = Checkpoint(folder)
    assert checkpoint.facts.input_numbers["model.layers.2.v"] == 5.5
    assert set(scales) <= set(checkpoint.bits_on_disk())
    said = f"the files lack 2 of 6, first {names[1]}: these are 1"
    assert [said in remark for remark in checkpoint.remarks] == [True] * (lacking > 0)


def test_the_digest_changes_with_any_byte_that_matters_and_with_no_other(broken, tmp_path):
    folder = broken("tied_sharded")
    digest = Checkpoint(folder).digest()
    assert len(digest) == 64

    (folder / "README.md").write_text("a model")
    assert Checkpoint(folder).digest() == digest
    moved = shutil.copytree(folder, tmp_path / "elsewhere")
    assert Checkpoint(moved).digest() == digest

    (folder / "tokenizer_config.json").write_text("{}")
    with_tokenizer = Checkpoint(folder).digest()
    shard = sorted(folder.glob("*.safetensors"))[-1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with_weights = Checkpoint(folder).digest()
    own: dict[str, Any] = {"quant_algo": "MIXED_PRECISION", "quantized_layers": {}}
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": own}))
    with_settings = Checkpoint(folder).digest()
    own["kv_cache_quant_algo"] = "FP8"  # changes what is computed
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": own}))
    found = {digest, with_tokenizer, with_weights, with_settings, Checkpoint(folder).digest()}
    assert len(found) == 5


def test_a_file_is_hashed_once_until_it_changes(broken, tmp_path, monkeypatch):
    folder, cache = broken("tied_sharded"), tmp_path / "cache"
    digest = Checkpoint(folder).digest(cache)
    assert digest == Checkpoint(folder).digest()

    opened = []
    plain_open = Path.open

    def counting_open(path, mode="r", *args, **kwargs):
        opened.append(path.name)
        return plain_open(path, mode, *args, **kwargs)

    checkpoint = Checkpoint(folder)
    monkeypatch.setattr(Path, "open", counting_open)
    assert checkpoint.digest(cache) == digest
    assert not [name for name in opened if name.endswith(".safetensors")]

    shard = sorted(folder.glob("*.safetensors"))[-1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    os.utime(shard, ns=(0, shard.stat().st_mtime_ns + 1_000_000))
    opened.clear()
    assert checkpoint.digest(cache) != digest
    assert [name for name in opened if name.endswith(".safetensors")] == [shard.name]
    assert not (folder / "digests.json").exists()


def another_digit(memo):
    facts = json.loads(memo.read_text())
    entry = next(facts[name] for name in facts if name.endswith(".safetensors"))
    entry[2] = entry[2][:-1] + ("0" if entry[2][-1] != "0" else "1")
    memo.write_text(json.dumps(facts))


def an_old_one(memo):
    """As it was before it had a checksum and all of a file's state; with a digest that is wrong."""
    facts = json.loads(memo.read_text())
    old = {name: [*facts[name][:2], "0" * 64] for name in facts if name != "sha256"}
    memo.write_text(json.dumps(old))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda memo: memo.write_text("half a memo {"), True),
        (lambda memo: memo.write_text("null"), True),
        (another_digit, True),
        (lambda memo: (memo.unlink(), memo.mkdir()), True),
        (lambda memo: (memo.unlink(), memo.symlink_to(memo.name)), True),
        (lambda memo: (memo.unlink(), memo.symlink_to("nowhere")), True),
        (an_old_one, False),
    ],
)
def test_a_damaged_memo_counts_as_empty_and_is_written_anew(broken, tmp_path, capfd, damage, said):
    folder, cache = broken("tied"), tmp_path / "cache"
    digest, memo = Checkpoint(folder).digest(cache), cache / "digests.json"
    good = memo.read_bytes()
    damage(memo)
    assert Checkpoint(folder).digest(cache) == digest
    assert memo.read_bytes() == good
    assert (f"{memo} " in capfd.readouterr().err) == said
    assert os.path.lexists(f"{memo}.damaged") == said


def test_a_file_that_was_replaced_with_its_size_and_time_kept_is_read_again(broken, tmp_path):
    folder, cache = broken("tied"), tmp_path / "cache"
    digest, file = Checkpoint(folder).digest(cache), folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    status = file.stat()
    for replace in (lambda new: file.write_bytes(new.read_bytes()), lambda new: new.replace(file)):
        (new := tmp_path / "new").write_bytes(content)
        replace(new)
        os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert (file.stat().st_size, file.stat().st_mtime_ns) == (
            status.st_size,
            status.st_mtime_ns,
        )
        assert Checkpoint(folder).digest(cache) != digest
        digest = Checkpoint(folder).digest(cache)
        content[-1] ^= 2


def save_tokenizer(folder, tokens):
    vocabulary = {chr(97 + i): i for i in range(tokens)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


def test_the_tokenizer_of_a_folder(broken):
    folder = broken("tied")
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        load_tokenizer(folder)
    save_tokenizer(folder, tokens=20)
    tokenizer = load_tokenizer(folder)
    assert tokenizer.is_fast
    assert tokenizer("cab")["input_ids"] == [2, 0, 1]
    save_tokenizer(folder, tokens=60)
    with pytest.raises(CheckpointError, match="60 tokens, the embedding only 48 rows"):
        load_tokenizer(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        load_tokenizer(folder)


NOT_FETCHED = ("pytorch_model.bin", "consolidated.safetensors")


@pytest.fixture
def hub(saved, tmp_path, monkeypatch):
    """A Hub at this machine, and an empty local cache."""
    served = shutil.copytree(saved[0] / "tied_sharded", tmp_path / "served")
    save_tokenizer(served, tokens=20)
    for name in NOT_FETCHED:
        (served / name).write_bytes(b"\x80 not to be fetched")
    with serving({"models/owner/tiny": served}) as served_hub:
        use(served_hub, tmp_path, monkeypatch)
        yield served_hub


def test_a_hub_id_is_downloaded_without_pickles_and_then_needs_no_network(hub, saved):
    assert resolve_revision("owner/tiny") == COMMIT
    assert not [path for path in hub.asked if path.endswith(".safetensors")]
    assert (
        fetch_facts("owner/tiny", COMMIT)
        == fetch_facts("owner/tiny")
        == read_facts(saved[0] / "tied")
    )

    folder = locate("owner/tiny", COMMIT)
    assert not [path for path in hub.asked if path.endswith(NOT_FETCHED)]
    assert torch.equal(Checkpoint(folder).embedding(), Checkpoint(saved[0] / "tied").embedding())
    assert load_tokenizer(folder).is_fast

    hub.close()
    assert resolve_revision("owner/tiny") == COMMIT
    assert (
        fetch_facts("owner/tiny", COMMIT)
        == fetch_facts("owner/tiny")
        == read_facts(saved[0] / "tied")
    )
    assert (
        locate("owner/tiny", COMMIT)
        == locate("owner/tiny")
        == locate("owner/tiny", offline=True)
        == folder
    )


def test_a_plan_knows_that_modelopt_quantized_a_hub_model_in_a_file_beside_its_config(hub):
    served = hub.repositories["models/owner/tiny"]
    settings = {"quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": None}}
    (served / "hf_quant_config.json").write_text(json.dumps(settings))
    for revision in (None, COMMIT):
        assert fetch_facts("owner/tiny", revision).quantized == "modelopt"
    assert not [path for path in hub.asked if path.endswith(".safetensors")]
    hub.close()
    assert fetch_facts("owner/tiny").quantized == "modelopt"


def test_a_file_of_a_hub_model_is_there_or_is_not_or_cannot_be_asked_for(hub):
    settings = fetch_file("owner/tiny", "tokenizer_config.json", COMMIT)
    assert settings is not None
    served = hub.repositories["models/owner/tiny"]
    assert settings.read_bytes() == (served / "tokenizer_config.json").read_bytes()
    assert fetch_file("owner/tiny", "chat_template.jinja", COMMIT) is None
    hub.close()
    assert fetch_file("owner/tiny", "tokenizer_config.json", COMMIT) == settings
    assert fetch_file("owner/tiny", "chat_template.jinja", COMMIT) is None
    with pytest.raises(CheckpointError, match=r"owner/tiny.*nor available from the Hub"):
        fetch_file("owner/tiny", "generation_config.json", COMMIT)


def test_what_is_to_be_downloaded_is_known_before_it_is(hub):
    served = hub.repositories["models/owner/tiny"]
    sizes = [path.stat().st_size for path in served.iterdir() if path.name not in NOT_FETCHED]
    assert bytes_to_download("owner/tiny") == sum(sizes)
    fetch_facts("owner/tiny")
    config = (served / "config.json").stat().st_size
    assert bytes_to_download("owner/tiny", COMMIT) == sum(sizes) - config
    assert not is_downloaded("owner/tiny", COMMIT)
    locate("owner/tiny", COMMIT)
    assert bytes_to_download("owner/tiny") == 0
    hub.close()
    assert is_downloaded("owner/tiny", COMMIT)
    assert bytes_to_download("owner/tiny") == 0


def test_a_config_alone_is_no_model_where_there_is_no_network(hub):
    fetch_facts("owner/tiny")
    hub.close()
    for ask in (locate, bytes_to_download):
        with pytest.raises(CheckpointError, match=r"owner/tiny.*nor available from the Hub"):
            ask("owner/tiny")


def test_half_a_download_without_network_is_refused_without_a_retry(hub, monkeypatch):
    folder = locate("owner/tiny", COMMIT)
    sorted(folder.glob("*.safetensors"))[2].unlink()
    hub.close()
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)  # between the Hub client's retries
    with pytest.raises(CheckpointError, match=r"owner/tiny.*model=local model\.path=DIR"):
        locate("owner/tiny", COMMIT)
    assert waits == []


def test_a_hub_without_an_answer_is_not_retried_and_the_error_says_how_to_go_on(hub, monkeypatch):
    hub.close()
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)  # between the Hub client's retries
    for ask in (resolve_revision, locate, fetch_facts):
        with pytest.raises(
            CheckpointError, match=r"owner/tiny.*model=local model\.path=DIR"
        ) as refusal:
            ask("owner/tiny")
        assert "\n" not in str(refusal.value)
    assert waits == []


def test_a_model_that_the_hub_does_not_have(hub):
    for ask in (resolve_revision, locate, fetch_facts):
        with pytest.raises(CheckpointError, match=r"owner/missing.*it has no such model"):
            ask("owner/missing")


def test_a_commit_is_its_own_revision_and_a_folder_its_own_place(hub, saved):
    assert resolve_revision("owner/tiny", "f" * 40) == "f" * 40
    assert locate(str(saved[0] / "tied")) == saved[0] / "tied"
    assert hub.asked == []


@pytest.mark.parametrize(
    "source", ["/no/such/folder", "./nowhere", "nowhere", "a/b/c", "../up", ""]
)
def test_neither_folder_nor_hub_id(hub, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="neither a folder nor a Hub id"):
        locate(source)
    assert hub.asked == []


def test_a_folder_has_no_revision(saved):
    with pytest.raises(CheckpointError, match="is a folder, which has no revision"):
        locate(str(saved[0] / "tied"), "main")


def test_a_file_is_not_a_folder(saved):
    with pytest.raises(CheckpointError, match="is a file"):
        locate(str(saved[0] / "tied" / "model.safetensors"))
