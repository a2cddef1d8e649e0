"""Small random checkpoints on disk, and quantized blocks of them."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from q3q.export.formats import stored_scales
from q3q.models.adjust import set_activations
from q3q.models.checkpoint import Checkpoint
from q3q.models.decoder import load_block, load_decoder
from q3q.models.disk_names import disk_shapes
from q3q.models.facts import read_facts
from q3q.number_formats import FLOATS, INT
from q3q.numerics.grid import into_groups
from q3q.numerics.weights import with_scales
from q3q.placement import Trial
from q3q.quantize.block import QuantizedBlock
from q3q.quantize.method import levels_for
from q3q.spec import Scheme
from tests.specs import evaluation_of, exporter_of, make_trial, model_of

DEMO = Path(__file__).parents[2] / "q3q" / "models" / "demo" / "dense"
CONFIG = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_attention_heads": 4,  # heads x head_dim = 64, not hidden
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
}
MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
}


KINDS: dict[str, dict[str, Any]] = {
    "dense": {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]},
    "moe": {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], **MOE},
    "qwen2": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]},
    "llama": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": True,
        "mlp_bias": True,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
}


def make_checkpoint(
    folder: Path,
    *,
    moe: bool = False,
    kind: str = "",
    tied: bool = True,
    dtype: str = "bfloat16",
    **sizes: int,
) -> Checkpoint:
    config = {
        **CONFIG,
        **KINDS[kind or ("moe" if moe else "dense")],
        **sizes,
        "tie_word_embeddings": tied,
        "torch_dtype": dtype,
    }
    facts, generator = read_facts(config), torch.Generator().manual_seed(0)

    def weight(name, shape):
        numbers = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        return (1 + 0.3 * numbers if "norm" in name else 1.5 * numbers).to(getattr(torch, dtype))

    shapes = {
        "model.embed_tokens.weight": (facts.vocab, facts.hidden),
        "model.norm.weight": (facts.hidden,),
    }
    if not tied:
        shapes["lm_head.weight"] = (facts.vocab, facts.hidden)
    for k in range(facts.layers):
        shapes |= {
            f"model.layers.{k}.{name}": shape for name, shape in disk_shapes(facts, k).items()
        }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(
        {name: weight(name, shape) for name, shape in shapes.items()}, folder / "model.safetensors"
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(DEMO / name, folder / name)
    return Checkpoint(folder)


@pytest.fixture
def checkpoint(tmp_path):
    return lambda **kind: make_checkpoint(tmp_path / "original", **kind)


def trial_of(checkpoint, export, path, **scheme) -> Trial:
    dtype = checkpoint.facts.dtype
    settings = {"group_size": 16, "scales": stored_scales(export, dtype), **scheme}
    if "format" in settings:
        form, act = FLOATS.get(settings["format"]), FLOATS.get(settings.get("act_format", INT))
        own = {} if form is None else {"bits": form.bits, "group_size": form.group_size or -1}
        own |= {} if act is None else {"act_bits": act.bits, "act_group_size": act.group_size or -1}
        settings = {"scheme": Scheme(**{**settings, "symmetric": True, **own, **scheme})}
    return make_trial(
        **settings,
        model=model_of("tiny", dtype),
        evaluation=evaluation_of(),
        export=export,
        storage=path.parent,
        placement={"export": path, "command": "python launch.py method=rtn"},
    )


def apart(weight, seed):
    """The same codes, but columns that share a group lie apart, as act-order leaves them."""
    columns, groups = weight.shape[2], weight.scale_EOG.shape[2]
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(seed))
    group_I = (torch.arange(columns) // (columns // groups))[order].to(torch.int32)
    return replace(weight, group_EI=group_I.expand(weight.shape[0], -1))


def quantized_blocks(checkpoint, trial, *, act_order=False, leave=()):
    """Every block rounded to nearest as the spec says, and the model as it would be evaluated."""
    model = load_decoder(checkpoint, getattr(torch, trial.spec.model.dtype))
    assert isinstance(model.blocks, list)
    blocks = []
    for k, block in enumerate(model.blocks):
        result = quantized_block(block, k, trial, act_order=act_order, leave=leave)
        model.blocks[k] = block.with_weights(result.numbers(block.dtype, block.device))
        blocks.append(result)
    peaks = {}
    for block in blocks:
        peaks |= block.full_peaks
    set_activations(model, trial.spec, peaks)
    return blocks, model


def quantized_block(block, k, trial, *, act_order=False, leave=()):
    quantized = {}
    for name in (name for site in block.sites for name in site.weights):
        scheme = trial.spec.schemes.of(f"blocks.{k}.{name.removesuffix('.weight')}")
        if scheme is None or (k, name) in leave:
            continue
        weight = block.weights[name].float()
        weight = weight if weight.ndim == 3 else weight[None]
        levels, groups = levels_for(scheme, weight), into_groups(weight, scheme.group_size)
        stored = with_scales(levels.rounded(groups, levels.minmax(groups)), scheme.scales)
        quantized[name] = apart(stored, k) if act_order else stored
    changed = {"input_layernorm.weight": block.weights["input_layernorm.weight"] * 1.25}
    scheme = trial.spec.scheme
    peaks = {site.name: 2.0 + 1 / 3 * k for site in block.sites} if scheme.calibrates_inputs else {}
    return QuantizedBlock(k, quantized, changed, [], peaks=peaks)


def one_block(checkpoint, trial):
    """The first, without a model around it."""
    return quantized_block(
        load_block(checkpoint, 0, getattr(torch, trial.spec.model.dtype)), 0, trial
    )


def export(checkpoint, trial, **how):
    """(exporter that has published, the model as evaluated)."""
    blocks, model = quantized_blocks(checkpoint, trial, **how)
    exporter = exporter_of(trial, checkpoint)
    for block in blocks:
        exporter.store(block)
    exporter.finish(model)
    exporter.publish("# card\n")
    return exporter, model


@pytest.fixture
def exported(checkpoint, tmp_path):
    """Return exported(format, **scheme): the exporter, which has published, and the model.

    kind: of the checkpoint. how: as of `export`.
    """

    def make(name, *, kind=None, how=None, **scheme):
        original = checkpoint(**(kind or {}))
        trial = trial_of(original, name, tmp_path / "out", **scheme)
        return export(original, trial, **(how or {}))

    return make


@pytest.fixture(name="trial_of")
def fixture_trial_of():
    return trial_of


@pytest.fixture(name="quantized_blocks")
def fixture_quantized_blocks():
    return quantized_blocks


@pytest.fixture(name="export")
def fixture_export():
    return export
