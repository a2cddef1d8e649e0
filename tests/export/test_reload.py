"""The proof: strangers load the checkpoint and find what was evaluated; what differs is named."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from q3q.export import reload
from q3q.export.proof import PASSED, float32_logits, prove, relative_errors, worst_weight
from q3q.models.checkpoint import Checkpoint


def strangers_view(made, model):
    """As `prove`, but in this process: (who loaded it, worst weight, its difference, the logits' error)."""
    with torch.inference_mode():
        loaded, who = reload.load(made.path)
        ids = torch.arange(24).view(1, 24)
        loaded(ids[:, :1])
        found = {name: reload.sketch(tensor) for name, tensor in reload.weights_on_disk(loaded)}
        for module in loaded.modules():
            module.quantization_enabled = False
        reload.in_float32(loaded)
        error = relative_errors(float32_logits(model, ids, None), loaded(ids).logits.float()).max()
    return who, *worst_weight(made.sketches(), found), float(error)


SETTINGS = [
    ("hf", {}, {}, "transformers"),
    ("compressed_tensors", {"symmetric": True}, {}, "with compressed-tensors"),
    ("compressed_tensors", {"bits": 3}, {}, "dequantize=True"),
    ("compressed_tensors", {"bits": 8, "group_size": -1, "symmetric": True}, {}, "with compressed-tensors"),
    ("gptq", {"bits": 2}, {"act_order": True}, "plain unpacker of `gptq`"),
    ("gptq", {"bits": 8, "symmetric": True, "group_size": -1}, {}, "plain unpacker of `gptq`"),
    ("awq", {}, {}, "plain unpacker of `awq`"),
]


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize(("name", "scheme", "how", "loader"), SETTINGS)
def test_public_loaders_and_plain_unpackers_find_the_same_model(
    checkpoint, spec_of, export, tmp_path, name, scheme, how, loader, moe
):
    if name == "compressed_tensors":
        pytest.importorskip("compressed_tensors")
    original = checkpoint(moe=moe, tied=moe)
    made, model = export(original, spec_of(original, name, tmp_path / "out", **scheme), **how)
    who, worst, difference, error = strangers_view(made, model)
    if moe and "dequantize" in loader:
        loader = "plain unpacker of `compressed-tensors`"  # which transformers' fused experts have no zero points for
    assert loader in who
    assert difference < 1e-11, worst
    assert error < 1e-4


def test_mixed_settings_are_config_groups_that_the_public_loader_follows(checkpoint, spec_of, export, tmp_path):
    pytest.importorskip("compressed_tensors")
    original = checkpoint()
    spec = spec_of(original, "compressed_tensors", tmp_path / "out", symmetric=True)
    overrides = {"blocks.0.mlp.down_proj": {"bits": 8}, "blocks.1.self_attn.q_proj": {"group_size": 32}}
    spec = replace(spec, overrides=overrides, skip=("blocks.1.self_attn.o_proj",))
    made, model = export(original, spec)
    who, worst, difference, error = strangers_view(made, model)
    assert "with compressed-tensors" in who
    assert difference < 1e-11, worst
    assert error < 1e-4
    for k, block in enumerate(model.blocks):
        assert all(torch.equal(block.weights[n], t) for n, t in Checkpoint(made.path).block(k).items())


def test_one_changed_code_is_found_and_its_site_named(checkpoint, spec_of, export, tmp_path):
    original = checkpoint()
    made, model = export(original, spec_of(original, "gptq", tmp_path / "out"))
    name = "model.layers.1.self_attn.v_proj.qweight"
    shard = made.path / json.loads((made.path / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(shard)
    tensors[name][0, 0] ^= 1
    save_file(tensors, shard, metadata={"format": "pt"})
    check = prove(made.path, model, made.sketches()).check
    assert check.name == PASSED
    assert not check.passed
    assert "worst site blocks.1.self_attn.v_proj" in check.detail


def test_a_checkpoint_that_does_not_load_fails_with_the_loaders_words(checkpoint, spec_of, export, tmp_path):
    original = checkpoint()
    made, model = export(original, spec_of(original, "hf", tmp_path / "out"))
    (made.path / "config.json").write_text("{}")
    check = prove(made.path, model, made.sketches()).check
    assert not check.passed
    assert "it cannot be loaded: " in check.detail


def test_the_other_process_cannot_import_q3q(tmp_path):
    """Wherever it is installed: the script forbids it before it adds a single folder to look in."""
    code = (
        f"import runpy, sys; sys.argv = ['reload', 'a', 'b', 'c', {str(tmp_path)!r}]\n"
        f"try: runpy.run_path({reload.__file__!r}, run_name='__main__')\n"
        "except ImportError: pass\n"
        "try: import q3q\n"
        "except ImportError: print('forbidden')"
    )
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "forbidden"
