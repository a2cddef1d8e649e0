"""Load a checkpoint with its format's public loader, or as a plain model of unpacked weights."""

import re
from collections.abc import Iterator
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .configs import (
    AS_IT_IS,
    INNER,
    UNPACKED,
    UNPACKER,
    groups_of,
    has_experts,
    read_config,
    reading_of,
    text_of,
)
from .gguf_file import gguf_in
from .unpackers import Parts, numbers_on_disk

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def load(folder: Path) -> tuple[Any, str]:
    """Return the model in evaluation mode, and its loader's description."""
    import transformers

    config = read_config(folder)
    packed = config.get("quantization_config")
    loader = f"transformers {transformers.__version__}"
    from_pretrained = transformers.AutoModelForCausalLM.from_pretrained
    load_public = partial(from_pretrained, folder, dtype="auto", local_files_only=True)
    if gguf_in(folder) is not None:
        loader = f"{UNPACKER} of `gguf` (gguf {version('gguf')}), run by {loader}"
        return load_unpacked(folder, config, {}).eval(), loader
    if packed is None:
        return load_public().eval(), loader
    method = packed["quant_method"]
    reading = None
    if method == "compressed-tensors":
        experts = has_experts(config)
        reading = reading_of(groups_of(packed), experts=experts, dtype=config["dtype"])
    if reading is None:
        loader = f"{UNPACKER} of `{method}`, run by {loader}"
        return load_unpacked(folder, config, packed).eval(), loader
    import compressed_tensors

    loader += f" with compressed-tensors {compressed_tensors.__version__}"
    if reading == AS_IT_IS:
        return load_public().eval(), loader
    unpack = transformers.CompressedTensorsConfig(dequantize=True)
    return load_public(quantization_config=unpack).eval(), f"{loader} ({UNPACKED})"


def load_unpacked(folder: Path, config: dict[str, Any], packed: dict[str, Any]) -> Any:
    """Return a plain transformers model with the unpacked weights."""
    import torch
    import transformers

    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    dtype = getattr(torch, config["dtype"])
    settings = transformers.AutoConfig.for_model(**plain)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(settings, dtype=dtype)
    weights = dict(numbers_on_disk(folder, config))
    if "text_config" in config:
        weights = {name.replace(INNER, "model.", 1): tensor for name, tensor in weights.items()}
    other = model._keys_to_ignore_on_load_unexpected or ()  # of parts that this class leaves out
    for name in [name for name in weights if any(re.match(part, name) for part in other)]:
        del weights[name]
    if has_experts(config):
        fuse_experts(weights, text_of(config))
    if text_of(config).get("tie_word_embeddings"):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    if missing or unexpected:
        raise SystemExit(f"the checkpoint lacks {missing[:3]} or has {unexpected[:3]} too many")
    # Rotary frequencies, which are no weights, were made on `meta` too.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    return model


def fuse_experts(weights: Parts, config: dict[str, Any]) -> None:
    """Stack the experts' matrices as transformers 5 has them, gate over up."""
    import torch

    count = config.get("num_experts") or config["num_local_experts"]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}.mlp.experts."
        if prefix + "0.gate_proj.weight" not in weights:
            continue
        gate, up, down = (
            torch.stack([weights.pop(f"{prefix}{e}.{name}_proj.weight") for e in range(count)])
            for name in ("gate", "up", "down")
        )
        weights[prefix + "gate_up_proj"] = torch.cat([gate, up], dim=1)
        weights[prefix + "down_proj"] = down


def load_by_gptqmodel(folder: Path, dtype: "torch.dtype") -> Any:
    """Load the model on GPTQModel's plain kernels, which run in 16 bits."""
    import torch
    from gptqmodel import BACKEND, GPTQModel

    method = read_config(folder)["quantization_config"]["quant_method"]
    backend = BACKEND.TORCH if method == "gptq" else BACKEND.AWQ_TORCH
    dtype = torch.float16 if dtype == torch.float32 else dtype
    return GPTQModel.load(str(folder), device="cpu", dtype=dtype, backend=backend).model


def weights_on_disk(model: Any, config: dict[str, Any]) -> Iterator[tuple[str, "Tensor"]]:
    """Yield (name on disk, weight) for each parameter that a checkpoint stores as numbers."""
    for name, tensor in model.state_dict().items():
        inner = "text_config" in config and name.startswith("model.")
        full = name.replace("model.", INNER, 1) if inner else name
        if name.endswith((".weight", ".bias", ".A_log", ".dt_bias")):
            yield full, tensor
        elif name.endswith(("mlp.experts.gate_up_proj", "mlp.experts.down_proj")):
            prefix, _, which = full.rpartition(".")
            for e, matrix in enumerate(tensor):
                if which == "down_proj":
                    yield f"{prefix}.{e}.down_proj.weight", matrix
                else:
                    gate, up = matrix.chunk(2)
                    yield f"{prefix}.{e}.gate_proj.weight", gate
                    yield f"{prefix}.{e}.up_proj.weight", up
