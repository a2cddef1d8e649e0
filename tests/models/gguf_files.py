"""GGUF files of small models, written with the gguf package alone, as llama.cpp's script does."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from safetensors.torch import load_file

ARCH = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "qwen3_moe": "qwen3moe"}


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder a Llama's q or k as convert_hf_to_gguf.py does."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
        .swapaxes(1, 2)
        .reshape(weight.shape)
    )


def stored(numbers: np.ndarray, kind: str) -> np.ndarray:
    """Quantize with the package where it can; else return random blocks with sound scales."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    try:
        return gguf.quants.quantize(numbers, gguf.GGMLQuantizationType[kind])
    except NotImplementedError:
        shape = (*numbers.shape[:-1], numbers.shape[-1] // block * size)
        return np.random.default_rng(0).integers(0, 64, shape, dtype=np.uint8)


def write_gguf(
    folder: Path,
    path: Path,
    kind: Callable[[str], str] = lambda name: "F32",
    change: Callable[[dict[str, np.ndarray]], None] = lambda tensors: None,
    **values: Any,
) -> Path:
    """Write a folder's model: `kind` of each tensor by GGUF's name; `change` what is written."""
    config = json.loads((folder / "config.json").read_text())
    arch, layers = ARCH[config["model_type"]], config["num_hidden_layers"]
    experts = config.get("num_experts") or config.get("num_local_experts")
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(layers)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    if arch == "qwen3moe":
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    for key, value in values.items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], layers)
    tensors: dict[str, np.ndarray] = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        numbers = tensor.float().numpy()
        if arch == "llama" and ".q_proj." in name:
            numbers = permuted(numbers, heads)
        if arch == "llama" and ".k_proj." in name:
            numbers = permuted(numbers, kv_heads)
        if ".mlp.experts." in name:
            part = name.split(".")
            all_of_them = ".".join([*part[:5], *part[6:]])
            tensors.setdefault(all_of_them, np.empty((experts, *numbers.shape), np.float32))
            tensors[all_of_them][int(part[5])] = numbers
        else:
            tensors[name] = numbers
    tensors = {
        names.get_name(name, (".weight", ".bias")) or name: one for name, one in tensors.items()
    }
    change(tensors)
    for name, numbers in tensors.items():
        type_of = kind(name) if numbers.ndim > 1 else "F32"
        data = stored(np.ascontiguousarray(numbers), type_of)
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[type_of])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
