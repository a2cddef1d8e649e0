"""Hybrids' exports, read by strangers: delta rules, shared experts, and parts that are not run."""

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from q3q.models.adjust import set_activations
from q3q.models.checkpoint import Checkpoint
from tests.export.test_reload import CT, W8A8, strangers_view
from tests.models.families import WHOLE_WORDS, build, build_seeing, save_seeing
from tests.specs import respecified

SYMMETRIC = {"group_size": 4, "symmetric": True}
WORDS = {"group_size": 8, "symmetric": True}
UNPACKER = "plain unpacker of `compressed-tensors`"


@pytest.mark.parametrize(
    ("kind", "nested", "name", "scheme", "loader"),
    [
        ("qwen3.5", False, "compressed_tensors", W8A8, CT),
        ("qwen3.5", True, "compressed_tensors", SYMMETRIC, CT),
        ("qwen3.5 moe", True, "hf", SYMMETRIC, "transformers"),
        ("qwen3.5 moe", True, "compressed_tensors", W8A8, UNPACKER),
        ("qwen3-next", False, "hf", SYMMETRIC, "transformers"),
        ("qwen3-next", False, "compressed_tensors", SYMMETRIC, CT),
        ("qwen3.5", True, "gptq", WORDS, "plain unpacker of `gptq`"),
        ("qwen3-next", False, "awq", WORDS, "plain unpacker of `awq`"),
    ],
)
def test_hybrids_come_back_whole(trial_of, export, tmp_path, kind, nested, name, scheme, loader):
    pytest.importorskip("compressed_tensors")
    folder = tmp_path / "original"
    sizes: dict[str, Any] = WHOLE_WORDS if name in ("gptq", "awq") else {}
    carried = 0
    if nested:
        carried = save_seeing(build_seeing(kind, **sizes), folder)
    else:
        build(kind, tied=False, **sizes).save_pretrained(folder)
    original = Checkpoint(folder)
    skip = tuple(
        f"blocks.{k}.{weight.removesuffix('.weight')}"
        for k in range(original.facts.layers)
        for site in original.facts.sites(k)
        for weight in site.apart
    )
    assert skip
    trial = respecified(trial_of(original, name, tmp_path / "out", **scheme), skip=skip)
    made, model = export(original, trial)
    set_activations(model, trial.spec)
    result = strangers_view(made, model)
    assert loader in result.loader
    assert result.check.passed, result.check.detail
    assert result.logit_error < 1e-4
    alone = strangers_view(made, model, logits=False)  # weight by weight, whatever else lies there
    assert alone.check.passed, alone.check.detail
    again = Checkpoint(made.path)
    assert again.carried == original.carried
    assert bool(again.carried) == nested
    for tensor in again.carried:
        kept, given = (c.read([tensor])[tensor] for c in (again, original))
        assert kept.dtype == given.dtype
        assert torch.equal(kept, given)
    config = json.loads((made.path / "config.json").read_text())
    assert ("text_config" in config) == nested
    held = sum(
        t.nbytes for file in made.path.glob("*.safetensors") for t in load_file(file).values()
    )
    assert made.sizes()["export_bytes"] == held
    assert made.sizes()["model_bytes"] == held - carried
