"""A model's facts, read from its config.json: shapes, counts and sizes, without torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from q3q.errors import CheckpointError
from q3q.models.packed import Packing, read_packing
from q3q.models.tensor_files import Shape

_FAMILY = ("qwen3", "qwen3_moe")
# q3q's forward assumes these; another value would be computed wrongly, in silence.
_FIXED = {"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False}
DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
EXPORT_KEY = "q3q"  # in the config.json of q3q's own exports
OWN_FOLDER = "For a folder of your own: model=local model.path=DIR"


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(". ")


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """The facts in a Qwen3's config.json. Sizes count elements; a dense model has 0 experts."""

    model_type: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int  # heads * head_dim differs from hidden in 0.6B, 4B, 32B and both MoEs
    intermediate: int
    vocab: int
    tied: bool
    experts: int
    top_k: int
    moe_intermediate: int
    mlp_only_layers: tuple[int, ...]
    decoder_sparse_step: int
    norm_topk_prob: bool
    rms_norm_eps: float
    rope_theta: float
    max_positions: int
    dtype: str
    packing: Packing | None = None  # of its linears, None for plain numbers
    quantized: str | None = None  # by what, even if stored as plain numbers again

    def sparse(self, layer: int) -> bool:
        """Return True if this block routes its tokens to experts."""
        return (
            self.experts > 0
            and layer not in self.mlp_only_layers
            and (layer + 1) % self.decoder_sparse_step == 0
        )

    def block_shapes(self, layer: int) -> dict[str, Shape]:
        """Return names and shapes of a block's tensors, as `Checkpoint.block` gives them."""
        hidden, head = self.hidden, self.head_dim
        shapes: dict[str, Shape] = {
            "input_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (self.heads * head, hidden),
            "self_attn.k_proj.weight": (self.kv_heads * head, hidden),
            "self_attn.v_proj.weight": (self.kv_heads * head, hidden),
            "self_attn.o_proj.weight": (hidden, self.heads * head),
            "self_attn.q_norm.weight": (head,),
            "self_attn.k_norm.weight": (head,),
            "post_attention_layernorm.weight": (hidden,),
        }
        if self.sparse(layer):
            shapes["mlp.gate.weight"] = (self.experts, hidden)
            inner = self.moe_intermediate
            shapes["mlp.experts.gate_proj.weight"] = (self.experts, inner, hidden)
            shapes["mlp.experts.up_proj.weight"] = (self.experts, inner, hidden)
            shapes["mlp.experts.down_proj.weight"] = (self.experts, hidden, inner)
        else:
            shapes["mlp.gate_proj.weight"] = (self.intermediate, hidden)
            shapes["mlp.up_proj.weight"] = (self.intermediate, hidden)
            shapes["mlp.down_proj.weight"] = (hidden, self.intermediate)
        return shapes

    @property
    def columns(self) -> dict[str, tuple[int, ...]]:
        """Return each site's input columns; two widths only where dense and sparse blocks mix."""
        sparse = {self.sparse(k) for k in range(self.layers)}
        inner = {self.moe_intermediate if experts else self.intermediate for experts in sparse}
        return {
            "qkv": (self.hidden,),
            "o": (self.heads * self.head_dim,),
            "gate_up": (self.hidden,),
            "down": tuple(sorted(inner)),
        }

    @property
    def linear_parameters(self) -> int:
        """Count the weights of linears: all in the blocks but norms and routers."""
        return sum(
            math.prod(shape)
            for layer in range(self.layers)
            for name, shape in self.block_shapes(layer).items()
            if name.endswith("_proj.weight")
        )

    @property
    def embedding_parameters(self) -> int:
        """Count embedding and head; one matrix if tied."""
        return self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        shapes = (shape for k in range(self.layers) for shape in self.block_shapes(k).values())
        return sum(map(math.prod, shapes)) + self.embedding_parameters + self.hidden

    def block_bytes(self, layer: int, dtype: str | None = None) -> int:
        """Return the bytes of a block's weights in `dtype`; None: in the checkpoint's."""
        count = sum(map(math.prod, self.block_shapes(layer).values()))
        return DTYPE_BYTES[dtype or self.dtype] * count

    def weight_bytes(self, dtype: str | None = None) -> int:
        """Return the bytes of all weights in `dtype`; None: in the checkpoint's."""
        return DTYPE_BYTES[dtype or self.dtype] * self.parameters


def read_facts(source: Path | Mapping[str, Any]) -> ModelFacts:
    """Read the facts of a model folder, or of its parsed config.json (transformers 4 or 5).

    Raises:
        CheckpointError: there is no readable config.json, or it is not of a Qwen3, of one that is
            quantized in a way that q3q cannot read, or of a kind that q3q cannot run.
    """
    if isinstance(source, Mapping):
        where, config = "the config", source
    else:
        where, config = str(source), read_json(source / "config.json")

    def wrong(complaint: str) -> CheckpointError:
        return CheckpointError(f"{where}: {complaint}")

    model_type = config.get("model_type")
    if model_type not in _FAMILY:
        raise wrong(f"not a Qwen3 but {model_type!r}. q3q runs model_type {' and '.join(_FAMILY)}")
    packing = None
    if (quantized := config.get("quantization_config")) is not None:
        try:
            packing = read_packing(quantized)
        except CheckpointError as error:
            raise wrong(str(error)) from error
    for key, only in _FIXED.items():
        if config.get(key, only) != only:
            raise wrong(f"{key}={config[key]!r} is not supported, only {only!r}")
    if set(config.get("layer_types") or ()) - {"full_attention"}:
        raise wrong("layer_types other than full_attention are not supported")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise wrong(f"rope_type={rope_type!r} is not supported, only 'default'")

    def count(key: str, default: int | None = None) -> int:
        value = config.get(key)
        value = default if value is None else value
        if type(value) is not int or value < 1:
            raise wrong(
                f"config.json gives {key}={value!r}; a whole number of 1 or more was expected"
            )
        return value

    hidden, heads = count("hidden_size"), count("num_attention_heads")
    moe = model_type == "qwen3_moe"
    # transformers 5 renames num_experts when it saves.
    experts_key = "num_experts" if "num_experts" in config else "num_local_experts"
    facts = ModelFacts(
        model_type=model_type,
        layers=count("num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=count("num_key_value_heads"),
        # The defaults of transformers' two classes.
        head_dim=count("head_dim", hidden // heads if moe else 128),
        intermediate=count("intermediate_size"),
        vocab=count("vocab_size"),
        tied=bool(config.get("tie_word_embeddings", False)),
        experts=count(experts_key) if moe else 0,
        top_k=count("num_experts_per_tok") if moe else 0,
        moe_intermediate=count("moe_intermediate_size") if moe else 0,
        mlp_only_layers=tuple(config.get("mlp_only_layers") or ()) if moe else (),
        decoder_sparse_step=count("decoder_sparse_step", 1) if moe else 1,
        norm_topk_prob=bool(config.get("norm_topk_prob", False)) and moe,
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope_theta=float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0),
        max_positions=count("max_position_embeddings", 32_768),
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
        packing=packing,
        quantized=packing.method if packing else _made_by_q3q(config.get(EXPORT_KEY)),
    )
    if facts.heads % facts.kv_heads:
        raise wrong(
            f"{facts.heads} attention heads cannot share {facts.kv_heads} key/value heads evenly"
        )
    if facts.top_k > facts.experts:
        raise wrong(f"num_experts_per_tok={facts.top_k} of only {facts.experts} experts")
    if facts.dtype not in DTYPE_BYTES:
        raise wrong(f"dtype {facts.dtype!r} is not supported, only {', '.join(DTYPE_BYTES)}")
    return facts


def _made_by_q3q(marker: Any) -> str | None:
    return f"by q3q: {marker.get('name')}" if isinstance(marker, dict) else None


def read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path.parent}: no {path.name} there, so not a model folder. {OWN_FOLDER}"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} does not hold a table of settings")
    return content


def number_of_tensors(names: list[str]) -> str:
    return f"{len(names)} tensor{'s are' if len(names) > 1 else ' is'}"
