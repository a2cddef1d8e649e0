"""Read a GGUF file's tensors as numbers, by the gguf package's own reader and dequantizer."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# llama.cpp's names of tensors -> transformers'.
GGUF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}


def gguf_in(folder: Path) -> Path | None:
    return next(folder.glob("*.gguf"), None)


def numbers_in_gguf(
    path: Path, config: dict[str, Any], dtype: "torch.dtype"
) -> Iterator[tuple[str, "Tensor"]]:
    """Yield (transformers' name, weight as numbers) of llama.cpp's file.

    Experts lie in one tensor. The rows of a Llama's q and k lie in pairs, dimension j beside
    dimension j + head_dim / 2, where transformers has halves.
    """
    import torch
    from gguf import GGUFReader
    from gguf.quants import dequantize

    heads = {
        "q_proj": config["num_attention_heads"],
        "k_proj": config.get("num_key_value_heads") or config["num_attention_heads"],
    }
    for tensor in GGUFReader(path).tensors:
        place, _, end = tensor.name.rpartition(".")
        block, _, part = place.removeprefix("blk.").partition(".")
        if place == "rope_freqs":
            continue
        name = GGUF_NAMES[part] if place.startswith("blk.") else GGUF_NAMES[place]
        numbers = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        kind = name.rpartition(".")[2]
        if config["model_type"] == "llama" and kind in heads:
            pairs = numbers.unflatten(0, (heads[kind], -1, 2))
            numbers = torch.cat([pairs[:, :, 0], pairs[:, :, 1]], 1).flatten(0, 1)
        numbers = numbers.to(dtype)
        prefix = f"model.layers.{block}." if place.startswith("blk.") else ""
        if "{}" in name:
            for e, matrix in enumerate(numbers):
                yield f"{prefix}{name.format(e)}.{end}", matrix
        else:
            yield f"{prefix}{name}.{end}", numbers
