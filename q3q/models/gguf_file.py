"""A model in GGUF files: its config.json as transformers would write it, and its tensors by the
names that transformers gives them. torch only where numbers are read.

A file without a head has it tied to the embedding. llama.cpp refuses a file with a tensor too many,
and so does this.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from q3q.errors import CheckpointError
from q3q.models.gguf_header import (
    ARCHITECTURES,
    FIRST,
    SPLIT,
    GgufEntry,
    GgufHeader,
    GgufValue,
    read_gguf_header,
    stored_size,
)
from q3q.models.gguf_tensors import PLAIN, GgufTensor
from q3q.models.gguf_tokenizer import GgufTokenizer

SUFFIX = ".gguf"
TURNED = ("self_attn.q_proj", "self_attn.k_proj")  # whose rows a Llama's file reorders
EXPERTS = "mlp.experts."
# A block's tensors without `.weight` and `.bias`; of experts one tensor for all of them.
BLOCK_PARTS = (
    "input_layernorm",
    *(f"self_attn.{part}_proj" for part in "qkvo"),
    "self_attn.q_norm",
    "self_attn.k_norm",
    "post_attention_layernorm",
    *(f"mlp.{part}_proj" for part in ("gate", "up", "down")),
    "mlp.gate",
    *(f"{EXPERTS}{part}_proj" for part in ("gate", "up", "down")),
)
OUTER_PARTS = ("model.embed_tokens", "model.norm", "lm_head")
# Llama 3's stretched frequencies lie in the file as a factor of each, not as the rule's settings.
FREQUENCIES = "rope_freqs.weight"
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
LLAMA3_KEY = "q3q.llama3."  # begins their names in q3q's own files
SAME_FACTOR = 1e-3  # relative; a factor is stored as float32, and was computed in other orders


@dataclass(frozen=True)
class GgufModel:
    """What a model's GGUF files hold.

    config: as transformers' config.json has it
    tensors: by transformers' names; each expert's apart
    """

    path: Path
    header: GgufHeader
    config: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]

    @property
    def tokenizer(self) -> GgufTokenizer | None:
        """What the file says of its tokenizer; None if it has none."""
        return GgufTokenizer.of(self.header.values)

    @property
    def quantized(self) -> str | None:
        """The types of tensors that do not hold plain numbers, `Q4_K, Q6_K`; None if all do."""
        types = sorted({tensor.type for tensor in self.tensors.values()} - {*PLAIN})
        return ", ".join(types) or None


def gguf_of(source: Path) -> Path | None:
    """Return the GGUF file that a path means: itself, or a folder's only weights; else None.

    Raises:
        CheckpointError: the folder holds several models.
    """
    if source.suffix == SUFFIX and source.is_file():
        return source
    if not source.is_dir() or any(source.glob("*.safetensors")):
        return None
    models = [
        file
        for file in sorted(source.glob(f"*{SUFFIX}"))
        if (match := SPLIT.search(file.name)) is None or match[1] == FIRST
    ]
    if len(models) > 1:
        raise CheckpointError(
            f"{source} holds several models ({models[0].name}, {models[1].name}): give one file"
        )
    return models[0] if models else None


def open_gguf(path: Path) -> GgufModel:
    """Open a model's GGUF file, the first one of several; no weight is read.

    Raises:
        CheckpointError: a file is missing or damaged, of an architecture that q3q does not run, or
            has tensors that a model of this kind does not have.
    """
    header = read_gguf_header(path)
    reader = _Values(path, header.values)
    arch = reader.word("general.architecture")
    if arch not in ARCHITECTURES:
        raise CheckpointError(
            f"{path} holds a model of the architecture {arch!r}; q3q reads GGUF files of "
            f"{', '.join(ARCHITECTURES)}"
        )
    if arch != "qwen3moe" and reader.count(f"{arch}.expert_count", 0):
        raise CheckpointError(
            f"{path}: a {arch} with experts (Mixtral's kind), which q3q does not run"
        )
    config = _config(reader, arch, header.tensors)
    tensors = _named(path, arch, config, header.tensors)
    return GgufModel(path, header, config, tensors)


@functools.cache
def gguf_names(arch: str, layers: int) -> Mapping[str, str]:
    """Return llama.cpp's names of tensors by transformers' names, without `.weight` and `.bias`."""
    from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, get_tensor_name_map

    kinds = {name: kind for kind, name in MODEL_ARCH_NAMES.items()}
    llama_names = get_tensor_name_map(MODEL_ARCH(kinds[arch]), layers)
    of_blocks = (f"model.layers.{k}.{part}" for k in range(layers) for part in BLOCK_PARTS)
    ours = (*OUTER_PARTS, *of_blocks)
    return {part: name for part in ours if (name := llama_names.get_name(part)) is not None}


def _named(
    path: Path, arch: str, config: Mapping[str, Any], entries: Mapping[str, GgufEntry]
) -> dict[str, GgufTensor]:
    """Return the files' tensors by transformers' names."""
    names = {theirs: ours for ours, theirs in gguf_names(arch, config["num_hidden_layers"]).items()}
    heads = {TURNED[0]: "num_attention_heads", TURNED[1]: "num_key_value_heads"}
    tensors: dict[str, GgufTensor] = {}
    surplus = []
    for stored, entry in entries.items():
        base, _, end = stored.rpartition(".")
        if stored == FREQUENCIES:
            continue
        if base not in names or end not in ("weight", "bias"):
            surplus.append(stored)
            continue
        kind, size = stored_size(entry, stored)
        tensor = GgufTensor(entry.file, "F32", entry.shape, entry.start, kind, stored, size)
        name = f"{names[base]}.{end}"
        part = ".".join(names[base].split(".")[3:])  # in its block
        if arch == "llama" and part in TURNED:
            tensor = replace(tensor, heads=config[heads[part]])
            if tensor.shape[0] % (2 * tensor.heads):
                raise CheckpointError(
                    f"{path}: {stored} has {tensor.shape[0]} rows, which {tensor.heads} heads do "
                    "not divide into pairs"
                )
        if part.startswith(EXPERTS):
            tensors |= _experts(name, tensor)
        else:
            tensors[name] = tensor
    if surplus:
        more = f" and {len(surplus) - 1} more" if len(surplus) > 1 else ""
        raise CheckpointError(
            f"{path} has tensors that no {arch} has: {surplus[0]}{more}. llama.cpp refuses it too"
        )
    return tensors


def _experts(name: str, stacked: GgufTensor) -> dict[str, GgufTensor]:
    """Return each expert's part of a stacked tensor [E, O, I]."""
    experts, size = stacked.shape[0], stacked.size // stacked.shape[0]
    return {
        name.replace(EXPERTS, f"{EXPERTS}{e}."): replace(
            stacked, shape=stacked.shape[1:], start=stacked.start + e * size, size=size
        )
        for e in range(experts)
    }


def _config(reader: _Values, arch: str, entries: Mapping[str, GgufEntry]) -> dict[str, Any]:
    """Return config.json as transformers has it."""

    def key(name: str) -> str:
        return f"{arch}.{name}"

    heads = reader.count(key("attention.head_count"))
    hidden = reader.count(key("embedding_length"))
    head_dim = reader.count(key("attention.key_length"), hidden // heads)
    layers = reader.count(key("block_count"))
    embedding = entries.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{reader.path}: token_embd.weight, the embedding, is missing")
    config: dict[str, Any] = {
        "model_type": ARCHITECTURES[arch],
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": reader.count(key("feed_forward_length")),
        "num_attention_heads": heads,
        "num_key_value_heads": reader.count(key("attention.head_count_kv"), heads),
        "head_dim": head_dim,
        "vocab_size": embedding.shape[0],
        "tie_word_embeddings": "output.weight" not in entries,
        "rms_norm_eps": reader.number(key("attention.layer_norm_rms_epsilon")),
        "rope_theta": reader.number(key("rope.freq_base"), 10_000.0),
        "max_position_embeddings": reader.count(key("context_length")),
        "partial_rotary_factor": reader.count(key("rope.dimension_count"), head_dim) / head_dim,
        "dtype": "float32",  # in which llama.cpp computes what it dequantizes
    }
    if reader.count(key("attention.value_length"), head_dim) != head_dim:
        raise CheckpointError(
            f"{reader.path}: keys and values of different lengths, which q3q does not run"
        )
    if arch == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in entries
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in entries
    if arch == "qwen3moe":
        config |= {
            "num_experts": reader.count(key("expert_count")),
            "num_experts_per_tok": reader.count(key("expert_used_count")),
            "moe_intermediate_size": reader.count(key("expert_feed_forward_length")),
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    if (scaling := _scaling(reader, arch, config, entries)) is not None:
        config["rope_scaling"] = scaling
    return config


def _scaling(
    reader: _Values, arch: str, config: Mapping[str, Any], entries: Mapping[str, GgufEntry]
) -> dict[str, Any] | None:
    """Return how frequencies are stretched; None if they are plain."""
    if FREQUENCIES in entries:
        return _llama3(reader, config, entries[FREQUENCIES])
    kind = reader.word(f"{arch}.rope.scaling.type", "none")
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        raise CheckpointError(f"{reader.path}: rope.scaling.type={kind} is not supported")
    scaling: dict[str, Any] = {
        "rope_type": kind,
        "factor": reader.number(f"{arch}.rope.scaling.factor"),
    }
    if kind == "yarn":
        original = reader.count(
            f"{arch}.rope.scaling.original_context_length", config["max_position_embeddings"]
        )
        scaling["original_max_position_embeddings"] = original
    return scaling


def _llama3(reader: _Values, config: Mapping[str, Any], entry: GgufEntry) -> dict[str, Any]:
    """Return Llama 3's rule whose factors a file holds.

    Only q3q's own files say its settings; of others they are those of all released models.
    """
    kind, size = stored_size(entry, FREQUENCIES)
    stored = GgufTensor(entry.file, "F32", entry.shape, entry.start, kind, FREQUENCIES, size)
    factors = stored.read().flatten().tolist()
    rule = {key: reader.number(LLAMA3_KEY + key, value) for key, value in LLAMA3.items()}
    rule["original_max_position_embeddings"] = int(rule["original_max_position_embeddings"])
    factor = reader.number(f"{LLAMA3_KEY}factor", max(factors))
    ours = llama3_factors(config["head_dim"], config["rope_theta"], factor, *rule.values())
    if len(ours) != len(factors) or any(
        not math.isclose(one, other, rel_tol=SAME_FACTOR)
        for one, other in zip(ours, factors, strict=True)
    ):
        raise CheckpointError(
            f"{reader.path}: its {FREQUENCIES} are not those of Llama 3's rule, which q3q would "
            "compute"
        )
    return {"rope_type": "llama3", "factor": factor, **rule}


def llama3_factors(
    head_dim: int,
    theta: float,
    factor: float,
    low: float,
    high: float,
    original: float,
) -> list[float]:
    """Return what each of Llama 3's frequencies is divided by, [head_dim / 2]."""

    def of(frequency: float) -> float:
        wavelength = 2 * math.pi / frequency
        if wavelength < original / high:
            return 1.0
        if wavelength > original / low:
            return factor
        blend = (original / wavelength - low) / (high - low)
        return 1 / ((1 - blend) / factor + blend)

    return [of(theta ** (-k / head_dim)) for k in range(0, head_dim, 2)]


@dataclass(frozen=True)
class _Values:
    """The values of a file's head, each of the type that makes sense."""

    path: Path
    table: Mapping[str, GgufValue]

    def word(self, key: str, default: str | None = None) -> str:
        value = self._given(key, default)
        if not isinstance(value, str):
            raise self._wrong(key, value, "a word")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """Return a whole number; of a list, which has one for each block, the one that all have."""
        value = self._given(key, default)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        if type(value) is not int or value < 0:
            raise self._wrong(key, value, "a whole number, the same for all blocks")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return a float32 as the shortest decimal that means it: 1e-6 as config.json has it."""
        import numpy as np

        value = self._given(key, default)
        if not isinstance(value, float | int) or not math.isfinite(value):
            raise self._wrong(key, value, "a finite number")
        return float(str(np.float32(value)))

    def _given(self, key: str, default: GgufValue | None) -> GgufValue:
        value = self.table.get(key, default)
        if value is None:
            raise CheckpointError(f"{self.path}: the value {key} is missing")
        return value

    def _wrong(self, key: str, value: object, expected: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {key}={str(value)[:40]}; {expected} was expected")
