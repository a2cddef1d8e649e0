"""Put a GGUF file together: the model's facts, its tokenizer, and its tensors one at a time."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType, RopeScalingType
from torch import Tensor

from q3q.errors import ExportError
from q3q.export.gguf_layout import architecture_of
from q3q.export.gguf_vocabulary import Vocabulary, add_vocabulary
from q3q.models.facts import ModelFacts
from q3q.models.gguf_file import (
    EXPERTS,
    FREQUENCIES,
    LLAMA3,
    LLAMA3_KEY,
    TURNED,
    gguf_names,
)
from q3q.models.rope import frequencies
from q3q.models.tensor_files import ITEM_BYTES, StoredTensor

_EXPERT = re.compile(r"(.*\.mlp\.experts\.)\d+\.(.*)")
# llama.cpp's own words for files, by the type of most weights.
_FILE_TYPES = {
    "q8_0": LlamaFileType.MOSTLY_Q8_0,
    "q6_k": LlamaFileType.MOSTLY_Q6_K,
    "q5_k": LlamaFileType.MOSTLY_Q5_K_S,
    "q4_k": LlamaFileType.MOSTLY_Q4_K_S,
    "q3_k": LlamaFileType.MOSTLY_Q3_K_S,
    "q2_k": LlamaFileType.MOSTLY_Q2_K,
    "q4_1": LlamaFileType.MOSTLY_Q4_1,
    "q4_0": LlamaFileType.MOSTLY_Q4_0,
}


@dataclass(frozen=True)
class GgufContent:
    """A tensor by llama.cpp's name.

    parts: what is stored of it; of experts a part each
    type: of `gguf.GGMLQuantizationType`
    heads: of a Llama's q and k, whose rows are reordered; 0: of others
    """

    name: str
    parts: Sequence[StoredTensor]
    type: str
    heads: int = 0

    @property
    def byte_shape(self) -> tuple[int, ...]:
        """Its shape where the last axis counts bytes."""
        *rows, last = self.parts[0].shape
        shape = (*rows, last * ITEM_BYTES.get(self.type, 1))
        return shape if len(self.parts) == 1 else (len(self.parts), *shape)

    def read(self) -> Tensor:
        """Read it as bytes, shaped `byte_shape`."""
        parts = []
        for part in self.parts:
            numbers = part.read()
            if self.type == "F32":
                numbers = numbers.float()
            if self.heads:
                halves = numbers.unflatten(0, (self.heads, 2, -1))
                numbers = halves.transpose(1, 2).flatten(0, 2)
            parts.append(numbers.contiguous().view(torch.uint8))
        return torch.stack(parts).view(self.byte_shape)


def tensors_of(
    facts: ModelFacts, stored: Mapping[str, StoredTensor], kinds: Mapping[str, str]
) -> Iterator[GgufContent]:
    """Yield a model's tensors; norms, biases and routers are written in float32.

    Args:
        stored: by transformers' names, each expert's apart.
        kinds: the types of linears that lie in blocks, by transformers' names.
    """
    arch = architecture_of(facts)
    assert arch is not None
    names = gguf_names(arch, facts.layers)
    for name, tensor in stored.items():
        base, parts, kind = name, [tensor], kinds.get(name, tensor.dtype)
        if (match := _EXPERT.fullmatch(name)) is not None:
            if f"{EXPERTS}0." not in name:  # the first one stands for all
                continue
            base = match[1] + match[2]
            parts = [
                stored[name.replace(f"{EXPERTS}0.", f"{EXPERTS}{e}.")] for e in range(facts.experts)
            ]
        module, _, end = base.rpartition(".")
        if name not in kinds and (len(tensor.shape) == 1 or module.endswith("mlp.gate")):
            kind = "F32"
        heads = 0
        if arch == "llama" and module.endswith(TURNED):
            heads = facts.heads if module.endswith(TURNED[0]) else facts.kv_heads
        yield GgufContent(f"{names[module]}.{end}", parts, kind.upper(), heads)


def write_model(
    path: Path,
    facts: ModelFacts,
    vocabulary: Vocabulary,
    tensors: Iterable[GgufContent],
    *,
    name: str,
    most: str,
) -> None:
    """Write a GGUF file; memory holds one tensor at a time.

    Args:
        most: the type of most linears.

    Raises:
        ExportError: the disk is full, or does not take the file.
    """
    arch = architecture_of(facts)
    assert arch is not None
    writer = GGUFWriter(path, arch)
    writer.add_name(name)
    writer.add_quantization_version(2)
    writer.add_file_type(_FILE_TYPES[most])
    _add_facts(writer, facts)
    add_vocabulary(writer, vocabulary)
    contents = list(tensors)
    bytes_type = torch.empty(0, dtype=torch.uint8).numpy().dtype
    factors = _frequency_factors(facts)
    if factors is not None:
        size, kind = 4 * len(factors), GGMLQuantizationType.F32
        writer.add_tensor_info(FREQUENCIES, (size,), bytes_type, size, raw_dtype=kind)
    for content in contents:
        kind = GGMLQuantizationType[content.type]
        shape, size = content.byte_shape, torch.Size(content.byte_shape).numel()
        writer.add_tensor_info(content.name, shape, bytes_type, size, raw_dtype=kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors.numpy())
        for content in contents:
            writer.write_tensor_data(content.read().numpy())
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        writer.close()


def _frequency_factors(facts: ModelFacts) -> Tensor | None:
    """Return what Llama 3's rule divides each frequency by, float32; None for other rules."""
    if facts.rope_scaling is None or facts.rope_scaling.kind != "llama3":
        return None
    plain, stretched = (
        frequencies(facts.rotary_dim, facts.rope_theta, scaling, "cpu")
        for scaling in (None, facts.rope_scaling)
    )
    return plain / stretched


def _add_facts(writer: GGUFWriter, facts: ModelFacts) -> None:
    writer.add_block_count(facts.layers)
    writer.add_context_length(facts.max_positions)
    writer.add_embedding_length(facts.hidden)
    writer.add_feed_forward_length(facts.intermediate)
    writer.add_head_count(facts.heads)
    writer.add_head_count_kv(facts.kv_heads)
    writer.add_key_length(facts.head_dim)
    writer.add_value_length(facts.head_dim)
    writer.add_rope_dimension_count(facts.rotary_dim)
    writer.add_rope_freq_base(facts.rope_theta)
    writer.add_layer_norm_rms_eps(facts.rms_norm_eps)
    writer.add_vocab_size(facts.vocab)
    if facts.experts:
        writer.add_expert_count(facts.experts)
        writer.add_expert_used_count(facts.top_k)
        writer.add_expert_feed_forward_length(facts.moe_intermediate)
    scaling = facts.rope_scaling
    if scaling is None or scaling.kind == "dynamic":  # plain up to the context's length
        return
    if scaling.kind == "llama3":  # llama.cpp reads the factors alone
        rule = (scaling.low, scaling.high, scaling.original, scaling.factor)
        for key, value in zip((*LLAMA3, "factor"), rule, strict=True):
            writer.add_float32(LLAMA3_KEY + key, value)
        return
    writer.add_rope_scaling_type(RopeScalingType(scaling.kind))
    writer.add_rope_scaling_factor(scaling.factor)
    if scaling.kind == "yarn":
        writer.add_rope_scaling_orig_ctx_len(scaling.original)
