"""Small random models of every family, made by transformers, with odd shapes."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

COMMON: dict[str, Any] = dict(
    vocab_size=97,
    hidden_size=32,
    num_attention_heads=4,  # heads x head_dim = 48, not hidden
    num_key_value_heads=2,
    head_dim=12,
    intermediate_size=48,
    num_hidden_layers=3,
    max_position_embeddings=64,
    initializer_range=0.2,
)
MOE: dict[str, Any] = dict(
    num_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    norm_topk_prob=True,
    mlp_only_layers=[1],
)


def rope(kind: str, **values: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 5000.0, **values}}


LLAMA3 = rope(
    "llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=16)
DELTA: dict[str, Any] = dict(
    head_dim=16,
    num_hidden_layers=4,
    full_attention_interval=3,  # blocks 0, 1 and 3 have a delta rule
    linear_num_key_heads=2,
    linear_num_value_heads=6,
    linear_key_head_dim=10,
    linear_value_head_dim=6,
    linear_conv_kernel_dim=3,
    **rope("default", partial_rotary_factor=0.375),
)
SHARED: dict[str, Any] = dict(
    num_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=20,
)
# Rows and columns of a hybrid's linears that fill 32-bit words with 4-bit codes.
WHOLE_WORDS: dict[str, int] = dict(
    hidden_size=32,
    shared_expert_intermediate_size=24,
    linear_key_head_dim=12,
    linear_value_head_dim=8,
    head_dim=16,
)
HYBRIDS: dict[str, dict[str, Any]] = {
    "qwen3.5": dict(model_type="qwen3_5_text", **DELTA),
    "qwen3.5 moe": dict(model_type="qwen3_5_moe_text", **DELTA, **SHARED),
    "qwen3-next": dict(
        model_type="qwen3_next", **DELTA, **SHARED, norm_topk_prob=False, mlp_only_layers=[1]
    ),
}
KINDS: dict[str, dict[str, Any]] = {
    "dense": dict(model_type="qwen3", num_attention_heads=6, head_dim=8),
    "moe": dict(model_type="qwen3_moe", num_attention_heads=6, head_dim=8, **MOE),
    "qwen2": dict(model_type="qwen2"),
    "llama": dict(model_type="llama"),
    "llama, biases": dict(model_type="llama", attention_bias=True, mlp_bias=True),
    "mistral": dict(model_type="mistral", sliding_window=None),
    "linear rope": dict(model_type="llama", **rope("linear", factor=3.0)),
    "llama3 rope": dict(model_type="llama", **LLAMA3),
    "yarn": dict(model_type="qwen2", **YARN),
    **HYBRIDS,
    "qwen3.5, yarn": {
        **HYBRIDS["qwen3.5"],
        **rope(
            "yarn",
            factor=4.0,
            original_max_position_embeddings=16,
            partial_rotary_factor=0.5,
        ),
    },
    "yarn, unrounded": dict(
        model_type="qwen3",
        **rope(
            "yarn",
            factor=6.0,
            original_max_position_embeddings=20,
            beta_fast=9.0,
            beta_slow=0.5,
            mscale=1.5,
            mscale_all_dim=0.7,
            truncate=False,
        ),
    ),
}


def build(kind: str, tied: bool = True, **sizes: int) -> Any:
    """Return transformers' model, in evaluation mode, every tensor of it random."""
    torch.manual_seed(0)
    settings = {**COMMON, **KINDS[kind], "tie_word_embeddings": tied, **sizes}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings)).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "norm" in name or name.endswith((".bias", "dt_bias")):
                tensor.add_(torch.randn_like(tensor) * 0.3)
    return model


def nest(folder: Path) -> None:
    """Make a text model's folder one of a model that sees images and predicts several tokens."""
    text = json.loads((folder / "config.json").read_text())
    outer = {"model_type": text["model_type"].removesuffix("_text"), "text_config": text}
    (folder / "config.json").write_text(json.dumps(outer))
    tensors = {
        name.replace("model.", "model.language_model.", 1): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    generator = torch.Generator().manual_seed(0)
    tensors["model.visual.blocks.0.attn.qkv.weight"] = torch.randn(6, 4, generator=generator).half()
    tensors["mtp.layers.0.mlp.up_proj.weight"] = torch.randn(5, 3, generator=generator)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
