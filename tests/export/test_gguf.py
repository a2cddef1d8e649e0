"""A GGUF file holds what was evaluated: read by the gguf package, and by q3q's own reader."""

import json
from dataclasses import replace
from typing import Any

import gguf
import pytest
import torch

from q3q.errors import ExportError, IncompatibleError
from q3q.export.formats import refuse_unsupported
from q3q.export.gguf_layout import type_of
from q3q.export.gguf_vocabulary import vocabulary_of
from q3q.export.proof import compare_reload, reload_inputs, runs_of
from q3q.export.reload import script
from q3q.models.checkpoint import Checkpoint, load_tokenizer
from q3q.models.decoder import load_decoder
from q3q.models.facts import read_facts
from q3q.models.gguf_file import open_gguf
from q3q.models.gguf_tokenizer import splitter_of
from q3q.number_formats import BLOCKS
from q3q.numerics.grid import into_groups
from q3q.numerics.weights import with_scales
from q3q.quantize.block import QuantizedBlock
from q3q.quantize.method import plain_levels
from q3q.spec import Scheme
from tests.export.conftest import DEMO, make_checkpoint, trial_of
from tests.specs import exporter_of

WIDE: dict[str, Any] = {
    "vocab_size": 4096,
    "head_dim": 64,
    "hidden_size": 256,
    "intermediate_size": 512,
    "moe_intermediate_size": 256,
}
INTS = {
    "w4 sym": {"bits": 4, "symmetric": True, "group_size": 32},
    "w4 asym": {"bits": 4, "symmetric": False, "group_size": 32},
    "w8 sym": {"bits": 8, "symmetric": True, "group_size": 32},
}


def scheme_of(name):
    if name in INTS:
        return INTS[name]
    form = BLOCKS[name]
    own = {"bits": form.bits, "group_size": form.group_size, "symmetric": not form.offsets}
    return {"format": name, **own}


def gguf_trial(original, path, name):
    own = scheme_of(name)
    scheme = Scheme(**own, scales=None if "format" in own else "gguf")
    return trial_of(original, "gguf", path, scheme=scheme)


@torch.inference_mode()
def exported(folder, kind, name, *, tied=True, dtype="float32"):
    """Return the exporter, which has published, and the model as evaluated."""
    original = make_checkpoint(folder / "original", kind=kind, tied=tied, dtype=dtype, **WIDE)
    trial = gguf_trial(original, folder / "out", name)
    model = load_decoder(original, getattr(torch, dtype))
    exporter = exporter_of(trial, original)
    assert isinstance(model.blocks, list)
    for k, block in enumerate(model.blocks):
        quantized = {}
        for weight_name in (one for site in block.sites for one in site.weights):
            scheme = trial.spec.schemes.of(f"blocks.{k}.{weight_name.removesuffix('.weight')}")
            levels, weight = plain_levels(scheme), block.weights[weight_name].float()
            weight = weight if weight.ndim == 3 else weight[None]
            groups = into_groups(weight, scheme.group_size)
            codes = levels.rounded(groups, levels.minmax(groups))
            quantized[weight_name] = with_scales(codes, scheme.scales)
        changed = {"input_layernorm.weight": block.weights["input_layernorm.weight"] * 1.25}
        result = QuantizedBlock(k, quantized, changed, [])
        model.blocks[k] = block.with_weights(result.numbers(block.dtype, block.device))
        exporter.store(result)
    exporter.finish(model)
    return exporter, model


QUICK = [("llama", "q4_k"), ("moe", "q6_k")]
REST = [
    *(("dense", name) for name in (*BLOCKS, *INTS)),
    ("moe", "q4_k"),
    ("llama", "w4 asym"),
    ("qwen2", "q5_k"),
]
EACH = [*QUICK, *(pytest.param(*one, marks=pytest.mark.slow) for one in REST)]


@pytest.mark.parametrize(("kind", "name"), EACH)
@torch.inference_mode()
def test_the_package_reads_the_weights_and_transformers_their_logits(tmp_path, kind, name):
    exporter, model = exported(tmp_path, kind, name, tied=kind != "qwen2")
    runs = runs_of(model)
    findings, tensors = script.findings(exporter.folder, reload_inputs(model, runs))
    result = compare_reload(model, runs, findings, tensors)
    assert result.check.passed, result.check.detail
    assert "gguf" in result.loader
    ours = open_gguf(exporter.folder / "model.gguf")
    wanted = type_of(Scheme(**scheme_of(name)))
    assert wanted is not None
    linears = {tensor.type for key, tensor in ours.tensors.items() if "proj.weight" in key}
    assert linears == {wanted.upper()}
    assert not list(exporter.folder.glob("*.safetensors*"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "llama", "moe"])
def test_the_file_is_a_checkpoint_with_the_same_numbers(tmp_path, kind):
    exporter, model = exported(tmp_path, kind, "q5_k")
    again = Checkpoint(exporter.folder)
    assert replace(again.facts, quantized=None) == replace(
        exporter.checkpoint.facts, carried_bytes=0
    )
    for k, block in enumerate(model.blocks):
        for name, weight in again.block(k).items():
            assert torch.equal(weight, block.weights[name]), name
    assert torch.equal(again.embedding(), model.embedding_VH)


@torch.inference_mode()
def test_a_changed_byte_is_found_and_named(tmp_path):
    exporter, model = exported(tmp_path, "dense", "q4_k")
    path = exporter.folder / "model.gguf"
    tensor = open_gguf(path).tensors["model.layers.1.self_attn.v_proj.weight"]
    content = bytearray(path.read_bytes())
    content[tensor.start + 100] ^= 1
    path.write_bytes(content)
    runs = runs_of(model)
    found = compare_reload(
        model, runs, *script.findings(exporter.folder, reload_inputs(model, runs))
    )
    assert not found.check.passed
    assert "blocks.1.self_attn.v_proj" in found.check.detail


def test_sizes_are_those_of_the_file(tmp_path):
    exporter, _ = exported(tmp_path, "dense", "q4_k", dtype="bfloat16")
    sizes = exporter.sizes()
    assert sizes["bits_per_weight"] == 4.5
    reader = gguf.GGUFReader(exporter.folder / "model.gguf")
    assert sizes["export_bytes"] == sum(tensor.n_bytes for tensor in reader.tensors)
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["token_embd.weight"] == "BF16"
    assert types["output_norm.weight"] == types["blk.0.attn_q_norm.weight"] == "F32"


def test_the_tokenizer_is_the_models_own(tmp_path):
    exporter, _ = exported(tmp_path, "dense", "q8_0")
    written, own = (
        open_gguf(exporter.folder / "model.gguf").tokenizer,
        load_tokenizer(DEMO),
    )
    assert written is not None
    assert (written.kind, written.splitter, written.begins) == ("gpt2", "gpt-2", False)
    assert written.tokens[:61] == tuple(own.convert_ids_to_tokens(list(range(61))))
    assert written.eos == own.eos_token_id
    assert list(written.differences(own)) == []
    assert list(replace(written, splitter="llama-bpe").differences(own)) == [
        "texts are cut by llama-bpe instead of gpt-2"
    ]
    assert list(replace(written, splitter=None).differences(own)) == [
        "texts are cut by no named rule instead of gpt-2"
    ]
    assert list(replace(written, begins=True).differences(own)) == ["texts begin with a bos token"]
    assert list(replace(written, begins=None).differences(own)) == []


def backend(before, **model):
    return {"pre_tokenizer": before, "model": {"type": "BPE", **model}}


def test_a_tokenizer_that_llamacpp_lacks_is_refused_before_anything_runs(tmp_path):
    original = make_checkpoint(tmp_path / "original", kind="dense", **WIDE)
    path = original.folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["pre_tokenizer"]["use_regex"] = False
    path.write_text(json.dumps(tokenizer))
    trial = gguf_trial(original, tmp_path / "out", "q4_k")
    with pytest.raises(ExportError, match="cuts texts as Qwen's"):
        exporter_of(trial, original)


def test_tokenizers_are_known_by_their_rule():
    words = r"[^\r\n\p{L}\p{N}]?\p{L}+"
    rest = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    level = {"type": "ByteLevel", "use_regex": False}

    def split(digits):
        rule = rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|{words}|{digits}|{rest}"
        steps = [{"type": "Split", "pattern": {"Regex": rule}}, level]
        return backend({"type": "Sequence", "pretokenizers": steps})

    digits = {"type": "Digits", "individual_digits": True}
    gpt2 = {"type": "ByteLevel", "use_regex": True}
    assert splitter_of(split(r"\p{N}")) == "qwen2"
    assert splitter_of(split(r"\p{N}{1,3}")) == "llama-bpe"
    assert splitter_of(split(r"\p{N}{1,2}")) is None
    assert splitter_of(backend({"type": "Sequence", "pretokenizers": [digits, gpt2]})) == "smollm"
    assert splitter_of(backend(gpt2)) == "gpt-2"
    assert splitter_of(backend(gpt2, byte_fallback=True)) is None  # SentencePiece's


@pytest.mark.parametrize(
    ("kind", "scheme", "complaint"),
    [
        (
            "dense",
            {"bits": 4, "symmetric": True, "group_size": 64},
            "symmetric bits=4 group_size=64",
        ),
        ("dense", {"bits": 3, "symmetric": False, "group_size": 32}, "it takes format=q8_0"),
        ("dense", {"bits": 8, "symmetric": False, "group_size": 32}, "asymmetric bits=8"),
        ("moe", {"norm_topk_prob": False}, "norm_topk_prob=false"),
        ("moe", {"mlp_only_layers": (1,)}, "blocks without experts"),
        ("hybrid", {}, "the Qwen3.5 family .it takes llama, qwen2, qwen3, qwen3_moe."),
    ],
)
def test_what_a_file_cannot_hold_is_refused(tmp_path, kind, scheme, complaint):
    original = make_checkpoint(tmp_path / "original", moe=kind == "moe", **WIDE)
    own = Scheme(**(scheme if "bits" in scheme else scheme_of("q4_k")))
    trial = trial_of(original, "gguf", tmp_path / "out", scheme=own)
    facts = original.facts
    if kind == "hybrid":
        from tests.models.families import COMMON, HYBRIDS

        facts = read_facts({**COMMON, **HYBRIDS["qwen3.5"], "hidden_act": "silu"})
    elif kind == "moe":
        changes: dict[str, Any] = scheme
        facts = replace(facts, **changes)
    with pytest.raises(IncompatibleError, match=complaint):
        refuse_unsupported("gguf", trial.spec, facts)


def test_a_vocabulary_names_rows_without_a_token():
    tokenizer = load_tokenizer(DEMO)
    made = vocabulary_of(tokenizer, 4100, (0, 7))
    assert len(made.tokens) == len(made.types) == 4100
    assert made.tokens[4099] == "[PAD4099]"
    assert made.types[0] == 3
    assert made.special["eot"] == 7
