"""Small random models of every family, made by transformers, with odd shapes."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

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
    # The delta rule gives about 5e-3 here, and next to nothing for some tokens: its norm, with
    # 1e-6, would enlarge their rounding errors up to a thousand times.
    rms_norm_eps=1e-2,
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
VISION: dict[str, int] = dict(
    depth=1,
    hidden_size=8,
    intermediate_size=8,
    num_heads=2,
    patch_size=2,
    out_hidden_size=COMMON["hidden_size"],
    num_position_embeddings=4,
)
KINDS: dict[str, dict[str, Any]] = {
    "dense": dict(model_type="qwen3", num_attention_heads=6, head_dim=8),
    "moe": dict(model_type="qwen3_moe", num_attention_heads=6, head_dim=8, **MOE),
    "qwen2": dict(model_type="qwen2"),
    "llama": dict(model_type="llama"),
    "llama, biases": dict(model_type="llama", attention_bias=True, mlp_bias=True),
    "mistral": dict(model_type="mistral", sliding_window=None),
    "linear rope": dict(model_type="llama", **rope("linear", factor=3.0)),
    "dynamic rope": dict(model_type="llama", **rope("dynamic", factor=3.0)),
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
    return drawn(AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings)))


def drawn(model: Any) -> Any:
    """Return a model, in evaluation mode, whose gains and biases differ too."""
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "norm" in name or name.endswith((".bias", "dt_bias")):
                tensor.add_(torch.randn_like(tensor) * 0.3)
    return model.eval()


def build_seeing(kind: str, *, tied: bool = True, **sizes: Any) -> Any:
    """Return transformers' model that sees images, whose text part is of a hybrid's kind."""
    torch.manual_seed(0)
    text = {**COMMON, **KINDS[kind], "tie_word_embeddings": tied, **sizes}
    outer = text["model_type"].removesuffix("_text")
    settings = AutoConfig.for_model(
        outer, text_config=text, vision_config=VISION, tie_word_embeddings=tied
    )
    return drawn(AutoModelForImageTextToText.from_config(settings))


def save_seeing(model: Any, folder: Path) -> int:
    """Save it as released ones are, which also predict several tokens.

    Returns:
        The bytes of the tensors that are not of the text part.
    """
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["mtp.layers.0.mlp.up_proj.weight"] = torch.randn(5, 3).half()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    beside = ("model.visual.", "mtp.")
    return sum(tensor.nbytes for name, tensor in tensors.items() if name.startswith(beside))
