"""Small random checkpoints on disk, to load with transformers and with q3q; token windows."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

VOCABULARY = 97


def save_random(folder, *, seed=0, sharpness=1.2, skewed=False, dead=(), starved=None, **config):
    """Save a model whose weights are wide, and whose norms and channels are of unequal size.

    skewed: positive weights four times as large as negative ones.
    dead: channels that both norms switch off.
    starved: the expert that the routers hardly ever choose.
    """
    torch.manual_seed(seed)
    kind = config.pop("model_type", "qwen3_moe" if "num_experts" in config else "qwen3")
    settings = AutoConfig.for_model(kind, vocab_size=VOCABULARY, **config)
    theirs = AutoModelForCausalLM.from_config(settings)
    with torch.no_grad():
        for name, weight in theirs.named_parameters():
            if "norm" in name:
                weight.copy_(1 + 0.3 * torch.randn_like(weight))
                if "layernorm" in name:
                    weight[::13] *= 4  # outlier channels, as trained models have
                    weight[list(dead)] = 0
            elif name.endswith(".bias"):
                weight.copy_(torch.randn_like(weight) * 0.3)
            elif "layers" in name:
                weight.copy_(torch.randn_like(weight) * sharpness / weight.shape[-1] ** 0.5)
                if name.endswith("mlp.gate.weight") and starved is not None:
                    others = [e for e in range(len(weight)) if e != starved]
                    weight[starved] = weight[others].mean(
                        0
                    )  # so always below one of them, and mostly below two
                if skewed:
                    weight.copy_(torch.where(weight > 0, weight, weight / 4))
            else:
                weight.copy_(torch.randn_like(weight) * 0.3)
    theirs.save_pretrained(folder)
    return folder


SHAPE = dict(
    hidden_size=64,
    num_attention_heads=6,  # heads x head_dim = 96, not hidden
    num_key_value_heads=2,
    head_dim=16,
    intermediate_size=160,
    num_hidden_layers=2,
    max_position_embeddings=128,
    tie_word_embeddings=True,
)
WIDE = {
    **SHAPE,
    "hidden_size": 128,
    "head_dim": 32,
    "intermediate_size": 192,
}  # every width a multiple of 64
MOE = dict(num_experts=5, num_experts_per_tok=2, moe_intermediate_size=64, norm_topk_prob=True)
# The first block has attention, the second a delta rule.
HYBRID: dict[str, Any] = dict(
    layer_types=["full_attention", "linear_attention"],
    linear_num_key_heads=2,
    linear_num_value_heads=6,
    linear_key_head_dim=24,
    linear_value_head_dim=16,
)
BESIDE_SHARED = {**MOE, "num_experts": 3, "shared_expert_intermediate_size": 96}
# Of other families: their own model_type, and what is special about them.
RELATIVES: dict[str, dict[str, Any]] = {
    "qwen2": dict(model_type="qwen2"),
    "llama": dict(
        model_type="llama",
        num_attention_heads=4,
        head_dim=24,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=False,
        rope_parameters=dict(
            rope_type="llama3",
            rope_theta=500_000.0,
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=64,
        ),
    ),
    "mistral": dict(model_type="mistral", sliding_window=None, tie_word_embeddings=False),
    "qwen3.5": dict(model_type="qwen3_5_text", **HYBRID),
    "qwen3.5-moe": dict(model_type="qwen3_5_moe_text", **HYBRID, **BESIDE_SHARED),
    "qwen3-next": dict(model_type="qwen3_next", **HYBRID, **BESIDE_SHARED),
}


def windows_of(count, length, seed, vocabulary=VOCABULARY):
    """Token windows in which some tokens are much more frequent than others."""
    generator = torch.Generator().manual_seed(seed)
    return (vocabulary * torch.rand(count, length, generator=generator) ** 2).long()
