"""The proof: strangers load the checkpoint and find what was evaluated; what differs is named."""

import copy
import json
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from q3q.errors import ExportError
from q3q.export import proof
from q3q.export.proof import PASSED, compare_reload, prove, reload_inputs, runs_of
from q3q.export.reload import running, script, unpackers
from q3q.export.tensors import expected_bytes
from q3q.kv_scheme import KvScheme
from q3q.models.checkpoint import Checkpoint
from q3q.models.decoder import load_decoder
from q3q.models.streaming import StreamedDecoder
from tests.reloading import reload_here
from tests.specs import exporter_of, respecified

W8A8 = {"bits": 8, "group_size": -1, "symmetric": True, "act_bits": 8}


def strangers_view(made, model, *, logits=True):
    """`prove`, but in this process."""
    with torch.inference_mode():
        runs = runs_of(model) if logits else {}
        return compare_reload(
            model,
            runs,
            *script.findings(made.folder, reload_inputs(model, runs) if logits else None),
        )


CT, GPTQ = "with compressed-tensors", "plain unpacker of `gptq`"
SETTINGS = [
    ("hf", {}, {}, "transformers"),
    *(("compressed_tensors", {"bits": bits, "symmetric": True}, {}, CT) for bits in (3, 4, 8)),
    *(("compressed_tensors", {"bits": bits}, {}, "dequantize=True") for bits in (2, 4, 7)),
    ("compressed_tensors", {"bits": 8, "group_size": -1, "symmetric": True}, {}, CT),
    ("compressed_tensors", W8A8, {}, CT),
    *(
        ("gptq", {"bits": bits, "symmetric": symmetric}, {"act_order": act_order}, GPTQ)
        for bits, symmetric, act_order in (
            *((2, False, False), (3, False, True), (3, True, False), (4, True, True)),
            *((4, False, True), (8, False, False)),
        )
    ),
    ("gptq", {"bits": 8, "symmetric": True, "group_size": -1}, {}, GPTQ),
    ("awq", {}, {}, "plain unpacker of `awq`"),
    ("awq", {"symmetric": True, "group_size": -1}, {}, "plain unpacker of `awq`"),
]


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize(("name", "scheme", "how", "loader"), SETTINGS)
def test_public_loaders_and_plain_unpackers_find_the_same_model(
    exported, name, scheme, how, loader, moe
):
    if name == "compressed_tensors":
        pytest.importorskip("compressed_tensors")
    made, model = exported(name, kind={"moe": moe, "tied": moe}, how=how, **scheme)
    result = strangers_view(made, model)
    if moe and (scheme == W8A8 or "dequantize" in loader):
        # transformers' fused experts have no room for either
        loader = "plain unpacker of `compressed-tensors`"
    assert loader in result.loader
    assert result.check.passed, result.check.detail
    assert result.logit_error < 1e-4


UNPACKED = "dequantize=True"
PLAIN = "plain unpacker of `compressed-tensors`"
BLOCKS = {"group_size": 16, "group_rows": 24}
FP8, FP8_BLOCKS = {"act_format": "fp8_e4m3"}, {"act_format": "fp8_e4m3", "act_group_size": 32}
NVFP4 = {"act_format": "nvfp4", "act_scales": "calibrated"}


@pytest.mark.parametrize(
    ("moe", "dtype", "scheme", "loader"),
    [
        (False, "bfloat16", {"format": "fp8_e4m3", "group_rows": -1}, CT),
        (False, "float32", {"format": "fp8_e4m3", **FP8}, CT),
        (True, "bfloat16", {"format": "fp8_e4m3", **FP8}, CT),
        (False, "bfloat16", {"format": "fp8_e4m3", **BLOCKS, **FP8_BLOCKS}, CT),
        (True, "bfloat16", {"format": "fp8_e4m3", **BLOCKS}, PLAIN),
        (False, "bfloat16", {"format": "mxfp8", "act_format": "mxfp8"}, CT),
        (False, "float16", {"format": "mxfp6", "act_format": "mxfp8"}, UNPACKED),
        (False, "bfloat16", {"format": "mxfp4", "act_format": "mxfp4"}, CT),
        (True, "float32", {"format": "mxfp4", "act_format": "mxfp4"}, PLAIN),
        (False, "bfloat16", {"format": "nvfp4"}, CT),
        (False, "float32", {"format": "nvfp4"}, UNPACKED),
        (False, "bfloat16", {"format": "nvfp4", **NVFP4}, CT),
        (False, "float32", {"format": "nvfp4", **NVFP4}, UNPACKED),
        (True, "bfloat16", {"format": "nvfp4", **NVFP4}, PLAIN),
    ],
)
def test_floats_come_back_with_the_inputs_that_are_rounded(exported, moe, dtype, scheme, loader):
    pytest.importorskip("compressed_tensors")
    kind = {"moe": moe, "tied": moe, "dtype": dtype}
    made, model = exported("compressed_tensors", kind=kind, **scheme)
    result = strangers_view(made, model)
    assert loader in result.loader
    assert result.check.passed, result.check.detail
    assert result.logit_error < 1e-4
    read = load_decoder(Checkpoint(made.path), getattr(torch, dtype))
    for ours, theirs in zip(model.blocks, read.blocks, strict=True):
        for name, weight in ours.weights.items():
            assert torch.equal(weight, theirs.weights[name]), name
        assert (ours.rounding, ours.own_rounding) == (theirs.rounding, theirs.own_rounding)
    if "act_scales" in scheme:  # a stored factor that is another one is found
        site, how = next(iter(model.blocks[1].own_rounding.items()))
        model.blocks[1].own_rounding |= {site: replace(how, number=2 * how.number)}
        check = strangers_view(made, model, logits=False).check
        assert "is rounded below the factor" in check.detail


def test_a_cache_in_fp8_is_in_the_config_and_changes_no_plain_forward(
    checkpoint, trial_of, export, tmp_path
):
    pytest.importorskip("compressed_tensors")
    original = checkpoint()
    trial = trial_of(original, "compressed_tensors", tmp_path / "out", symmetric=True)
    kv = KvScheme(bits=8, format="fp8_e4m3", scales="fixed")
    made, model = export(original, respecified(trial, kv=kv))
    result = strangers_view(made, model)
    assert "with compressed-tensors" in result.loader
    assert result.check.passed, result.check.detail
    packed = json.loads((made.path / "config.json").read_text())["quantization_config"]
    scheme = packed["kv_cache_scheme"]
    assert (scheme["type"], scheme["num_bits"], scheme["strategy"]) == ("float", 8, "tensor")
    index = json.loads((made.path / "model.safetensors.index.json").read_text())["weight_map"]
    for name in ("model.layers.0.self_attn.k_scale", "model.layers.1.self_attn.v_scale"):
        assert load_file(made.path / index[name])[name].tolist() == [1.0]
    assert made.sizes()["export_bytes"] == expected_bytes(made.spec, original.facts)
    packing = Checkpoint(made.path).facts.packing
    assert packing is not None
    assert packing.kv is not None


def test_several_formats_in_one_checkpoint_are_told_apart(checkpoint, trial_of, export, tmp_path):
    pytest.importorskip("compressed_tensors")
    original = checkpoint()
    trial = trial_of(original, "compressed_tensors", tmp_path / "out", symmetric=True)
    sites = {
        "qkv": [f"self_attn.{name}_proj" for name in "qkv"],
        "gate_up": ["mlp.gate_proj", "mlp.up_proj"],
    }
    own = {
        "qkv": {"format": "fp8_e4m3", "bits": 8, "group_size": -1, "act_bits": 8}
        | {"act_format": "fp8_e4m3"},
        "gate_up": {"format": "mxfp4", "bits": 4, "group_size": 32},
    }
    overrides = {
        f"blocks.{k}.{name}": own[site]
        for k in range(2)
        for site, names in sites.items()
        for name in names
    }
    overrides["blocks.1.mlp.down_proj"] = {"format": "nvfp4"}
    made, model = export(original, respecified(trial, overrides=overrides))
    packed = json.loads((made.path / "config.json").read_text())["quantization_config"]
    assert packed["format"] == "mixed-precision"
    assert sorted(group["format"] for group in packed["config_groups"].values()) == [
        "float-quantized",
        "mxfp4-pack-quantized",
        "nvfp4-pack-quantized",
        "pack-quantized",
    ]
    result = strangers_view(made, model)
    assert "with compressed-tensors" in result.loader
    assert result.check.passed, result.check.detail
    made_otherwise = vllms_group(packed, "model.layers.0.self_attn.qkv_proj", "QKVParallelLinear")
    assert made_otherwise["input_activations"]["strategy"] == "token"
    for block in model.blocks:  # whoever does not round what the config says is found out
        block.own_rounding = {}
    assert "activations are rounded to" in strangers_view(made, model).check.detail


@pytest.mark.parametrize(
    ("kind", "name", "scheme", "loader"),
    [
        ("qwen2", "hf", {}, "transformers"),
        ("qwen2", "compressed_tensors", {"symmetric": True}, CT),
        ("llama", "compressed_tensors", {}, "dequantize=True"),
        ("llama", "compressed_tensors", W8A8, CT),
        ("llama", "gptq", {"symmetric": True}, GPTQ),
        ("qwen2", "awq", {}, "plain unpacker of `awq`"),
    ],
)
def test_other_families_come_back_with_their_biases(exported, kind, name, scheme, loader):
    pytest.importorskip("compressed_tensors")
    made, model = exported(name, kind={"kind": kind, "tied": kind == "qwen2"}, **scheme)
    result = strangers_view(made, model)
    assert loader in result.loader
    assert result.check.passed, result.check.detail
    assert result.logit_error < 1e-4
    biases = {
        (k, linear): tensor
        for k, block in enumerate(model.blocks)
        for linear, tensor in block.weights.items()
        if linear.endswith(".bias")
    }
    assert biases
    for (k, linear), tensor in biases.items():
        assert torch.equal(Checkpoint(made.path).block(k)[linear], tensor)
        tensor.add_(1)  # a bias that is another is noticed
    noticed = compare_reload(model, {}, *script.findings(made.folder, None))
    assert not noticed.check.passed
    assert "_proj.bias" in noticed.check.detail


def test_mixed_settings_are_config_groups_that_the_public_loader_follows(
    checkpoint, trial_of, export, tmp_path
):
    pytest.importorskip("compressed_tensors")
    original = checkpoint()
    trial = trial_of(original, "compressed_tensors", tmp_path / "out", symmetric=True)
    qkv = [f"blocks.1.self_attn.{name}_proj" for name in "qkv"]
    overrides = {
        "blocks.0.mlp.down_proj": {"bits": 8},
        **{name: {"group_size": 32} for name in qkv},
    }
    trial = respecified(trial, overrides=overrides, skip=("blocks.1.self_attn.o_proj",))
    made, model = export(original, trial)
    result = strangers_view(made, model)
    assert "with compressed-tensors" in result.loader
    assert result.check.passed, result.check.detail
    for k, block in enumerate(model.blocks):
        assert all(
            torch.equal(block.weights[n], t) for n, t in Checkpoint(made.path).block(k).items()
        )

    packed = json.loads((made.path / "config.json").read_text())["quantization_config"]
    assert (
        vllms_group(packed, "model.layers.1.self_attn.qkv_proj", "QKVParallelLinear")["weights"][
            "group_size"
        ]
        == 32
    )
    assert (
        vllms_group(packed, "model.layers.0.self_attn.qkv_proj", "QKVParallelLinear")["weights"][
            "group_size"
        ]
        == 16
    )
    assert (
        vllms_group(packed, "model.layers.0.mlp.down_proj", "RowParallelLinear")["weights"][
            "num_bits"
        ]
        == 8
    )


def test_what_skip_leaves_out_of_asymmetric_weights_the_public_loader_leaves_alone(
    checkpoint, trial_of, export, tmp_path
):
    pytest.importorskip("compressed_tensors")
    original = checkpoint()
    trial = trial_of(original, "compressed_tensors", tmp_path / "out", bits=3)
    made, model = export(
        original, respecified(trial, skip=("blocks.0.mlp.down_proj", "blocks.1.self_attn.o_proj"))
    )
    result = strangers_view(made, model)
    assert "dequantize=True" in result.loader
    assert result.check.passed, result.check.detail


def vllms_group(packed, name, kind):
    """Return a linear's group as vLLM finds it: by name, else class, else its parts' names."""
    targets = {
        target: group for group in packed["config_groups"].values() for target in group["targets"]
    }
    parts = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    if name in targets:
        return targets[name]
    if result := [target for target in targets if target.lower() in kind.lower()]:
        return targets[result[0]]
    joined = name.rpartition(".")[2]
    of_parts = [targets[name.replace(joined, part)] for part in parts[joined]]
    assert all(group == of_parts[0] for group in of_parts)
    return of_parts[0]


def test_one_changed_code_is_found_and_its_site_named(exported):
    made, model = exported("gptq")
    name = "model.layers.1.self_attn.v_proj.qweight"
    shard = (
        made.path
        / json.loads((made.path / "model.safetensors.index.json").read_text())["weight_map"][name]
    )
    tensors = load_file(shard)
    tensors[name][0, 0] ^= 1
    save_file(tensors, shard, metadata={"format": "pt"})
    check = prove(made.path, model).check
    assert check.name == PASSED
    assert not check.passed
    assert "worst site blocks.1.self_attn.v_proj" in check.detail


def test_a_checkpoint_that_does_not_load_fails_with_the_loaders_words(exported):
    made, model = exported("hf")
    (made.path / "config.json").write_text("{}")
    check = prove(made.path, model).check
    assert not check.passed
    assert "it cannot be loaded: " in check.detail


@pytest.mark.parametrize("streamed", [False, True])
def test_a_file_of_other_codes_is_found_whoever_wrote_it(
    checkpoint, trial_of, quantized_blocks, tmp_path, streamed
):
    """As left by an attempt whose codes were lost: file and facts agree, and the model differs."""
    original = checkpoint()
    trial = trial_of(original, "gptq", tmp_path / "out")
    blocks, model = quantized_blocks(original, trial)
    if streamed:
        model = StreamedDecoder(original, torch.bfloat16)
        for block in blocks:
            of_block = model.blocks[block.index]
            model.exchange(
                block.index,
                None,
                partial(block.numbers, of_block.dtype, of_block.device),
            )
    exporter = proof_ready(trial, original, blocks, model)
    assert strangers_view(exporter, model, logits=not streamed).check.passed

    name = "self_attn.v_proj.weight"
    other = blocks[1].quantized[name]
    stale = replace(
        blocks[1],
        quantized={**blocks[1].quantized, name: replace(other, codes_EOI=15 - other.codes_EOI)},
    )
    exporter.store(stale)
    exporter.finish(model)
    result = strangers_view(exporter, model, logits=not streamed)
    assert "worst site blocks.1.self_attn.v_proj" in result.check.detail


def proof_ready(trial, original, blocks, model):
    exporter = exporter_of(trial, original)
    for block in blocks:
        exporter.store(block)
    exporter.finish(model)
    return exporter


def other_top(bits):
    def round_otherwise(model, packed, factors):
        groups = copy.deepcopy(packed["config_groups"])
        for group in groups.values():
            group["input_activations"]["num_bits"] = bits
        reload_round(model, {**packed, "config_groups": groups}, factors)

    return round_otherwise


def left_out(*patterns):
    return lambda model, packed, factors: reload_round(
        model, {**packed, "ignore": [*packed["ignore"], *patterns]}, factors
    )


reload_round = running.round_activations


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize(
    ("rounding", "block"),
    [
        (other_top(7), "blocks."),
        (left_out(r"re:.*layers\.1\.self_attn\.o_proj"), "blocks.1"),
        (left_out(r"re:.*layers\.0\..*(gate|up)_proj"), "blocks.0"),
        (left_out(r"re:.*layers\.1\..*down_proj"), "blocks.1"),
    ],
)
def test_activations_that_are_rounded_otherwise_are_found(
    exported, monkeypatch, rounding, block, moe
):
    pytest.importorskip("compressed_tensors")
    made, model = exported("compressed_tensors", kind={"moe": moe, "tied": moe}, **W8A8)
    monkeypatch.setattr(script, "round_activations", rounding)
    check = strangers_view(made, model).check
    assert f"worst site {block}" in check.detail
    assert "where rounded activations differ" in check.detail


def test_what_skip_leaves_out_reads_its_input_unrounded_everywhere(
    checkpoint, trial_of, export, tmp_path
):
    pytest.importorskip("compressed_tensors")
    original = checkpoint()
    skip = ("blocks.0.mlp.gate_proj", "blocks.0.mlp.up_proj", "blocks.1.self_attn.o_proj")
    trial = respecified(
        trial_of(original, "compressed_tensors", tmp_path / "out", **W8A8), skip=skip
    )
    made, model = export(original, trial)
    model.blocks[0].unrounded, model.blocks[1].unrounded = frozenset({"gate_up"}), frozenset({"o"})
    result = strangers_view(made, model)
    assert result.check.passed, result.check.detail
    read, ids = load_decoder(Checkpoint(made.path), torch.bfloat16), torch.arange(20)[None]
    assert torch.equal(read.hidden(ids), model.hidden(ids))
    model.blocks[1].unrounded = frozenset()
    assert "blocks.1" in strangers_view(made, model).check.detail


def test_where_logits_alone_differ_the_site_is_named(exported):
    made, model = exported("hf")
    config = json.loads((made.path / "config.json").read_text())
    (made.path / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-2}))
    check = strangers_view(made, model).check
    assert re.search(
        r"logits differ by .*; worst site blocks\.[01]\.\w+, where plain activations differ",
        check.detail,
    )


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "ended by signal 9"),
        ("import time; time.sleep(60)", "no answer in 1 s"),
        (
            "import sys; print('MemoryError: 5 GB', file=sys.stderr); "
            f"sys.exit({script.EXIT_SHORTAGE})",
            "MemoryError: 5 GB",
        ),
    ],
)
def test_what_comes_to_no_end_proves_nothing(exported, tmp_path, monkeypatch, code, why):
    made, model = exported("hf")
    (tmp_path / "script.py").write_text(code)
    monkeypatch.setattr(proof, "PROGRAM", tmp_path / "script.py")
    if "no answer" in why:
        monkeypatch.setattr(proof, "SECONDS", 1.0)
    with pytest.raises(
        ExportError, match=rf"written but not proved: .*{why}.*the same command continues"
    ):
        prove(made.path, model)


@pytest.mark.parametrize(
    ("error", "short"),
    [
        (MemoryError(), True),
        (
            RuntimeError(
                "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"
            ),
            True,
        ),
        (OSError(28, "No space left on device"), True),
        (
            SafetensorError(
                "Error while serializing: I/O error: No space left on device (os error 28)"
            ),
            True,
        ),
        (SafetensorError("Error while deserializing header: header too large"), False),
        (SafetensorError("I/O error: No such file or directory (os error 2)"), False),
        (OSError("config.json is not what it should be"), False),
        (RuntimeError("size mismatch"), False),
    ],
)
def test_a_machine_that_is_too_small_says_nothing_of_the_checkpoint(error, short):
    assert script.is_shortage(error) is short


def test_where_what_the_loader_is_given_finds_no_room_nothing_is_proved(exported, monkeypatch):
    made, model = exported("hf")

    def full(tensors, path):
        raise SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )

    monkeypatch.setattr(proof, "save_file", full)
    with (
        torch.inference_mode(),
        pytest.raises(ExportError, match=r"not proved: .*No space left.*the same command"),
    ):
        prove(made.path, model)


GPTQMODEL = """
class BACKEND:
    TORCH = AWQ_TORCH = None
class GPTQModel:
    @staticmethod
    def load(folder, **how):
        raise {error}
"""


@pytest.fixture
def gptqmodel(tmp_path, monkeypatch):
    """A package of that name that raises when it is to load."""

    def make(error):
        (tmp_path / "gptqmodel.py").write_text(GPTQMODEL.format(error=error))
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, "gptqmodel", raising=False)

    return make


def test_what_gptqmodel_does_not_load_it_is_not_asked(exported, gptqmodel):
    """Its kernels take some group sizes; other checkpoints pass without it."""
    made, model = exported("gptq")
    gptqmodel("NotImplementedError('only supports [-1, 32]:\\n group_size = 16')")
    result = strangers_view(made, model)
    assert result.check.passed, result.check.detail
    assert result.loader.endswith(
        "(GPTQModel does not load it: only supports [-1, 32]: group_size = 16)"
    )
    gptqmodel("MemoryError('for it')")  # which another try may have
    with pytest.raises(MemoryError):
        strangers_view(made, model)


def test_without_memory_for_a_second_model_weights_alone_are_compared(exported, monkeypatch):
    made, model = exported("awq")
    calls = []
    monkeypatch.setattr(proof, "unclaimed_memory", lambda: proof.PROCESS_BYTES)

    def reload_by_hand(folder, inputs, out, seconds, gpu):
        calls.append(str(inputs))
        reload_here(folder, inputs, out, seconds, gpu)

    monkeypatch.setattr(proof, "_reload", reload_by_hand)
    with torch.inference_mode():
        result = prove(made.path, model)
    assert calls == ["weights"]
    assert result.check.passed, result.check.detail
    assert result.logit_error is None


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_plain_unpacker_reads_bit_after_bit(bits):
    words = torch.randint(
        -(2**31), 2**31, (3, 7), dtype=torch.int32, generator=torch.Generator().manual_seed(bits)
    )
    count = 7 * 32 // bits
    result = unpackers.stream(words, bits, count)
    assert result.shape == (3, count)
    for row, codes in zip(words.tolist(), result.tolist(), strict=True):
        number = sum((word % 2**32) << (32 * k) for k, word in enumerate(row))
        assert codes == [(number >> (bits * k)) % 2**bits for k in range(count)]


def test_the_other_process_cannot_import_q3q(tmp_path):
    """Even if one of its package folders has q3q; it can import other packages from there."""
    for name in ("q3q", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    code = (
        f"import runpy, sys; sys.argv = ['reload', 'a', 'b', 'c', {str(tmp_path)!r}]\n"
        f"try: runpy.run_path({str(proof.PROGRAM / '__main__.py')!r}, run_name='__main__')\n"
        "except ImportError as error: assert 'torch' in str(error)\n"
        "import other\n"
        "try: import q3q\n"
        "except ImportError: print('forbidden')"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "forbidden"
