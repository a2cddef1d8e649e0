"""A model's facts, read from its config.json: shapes, counts and sizes, without torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from q3q.errors import CheckpointError
from q3q.models.model_json import read_json
from q3q.models.packed import Packing, read_packing
from q3q.models.tensor_files import Shape

_FAMILY = ("qwen3", "qwen3_moe")
# q3q's forward assumes these; another value would be computed wrongly, in silence.
_FIXED = {"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False}
DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
EXPORT_KEY = "q3q"  # in the config.json of q3q's own exports
# Above all that was ever released, and small enough that a plan's arithmetic, which goes from layer
# to layer and from expert to expert, takes no time.
MOST_LAYERS, MOST_EXPERTS, MOST_MATRICES, MOST = 10_000, 10_000, 1_000_000, 2**31
MOST_NUMBER = 1e30  # of those that need not be whole
LONGEST = 300  # characters of a complaint, which quotes what the file says


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
    says_dtype: bool = field(default=True, compare=False)  # False: float32 is the default
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
        shown = complaint if len(complaint) <= LONGEST else f"{complaint[: LONGEST - 1]}…"
        return CheckpointError(f"{where}: {shown}")

    values = _Values(config, wrong)
    model_type = _family(values)
    packing = None
    if config.get("quantization_config") is not None:
        section = values.table("quantization_config")
        try:
            packing = read_packing(section)
        except CheckpointError as error:
            raise wrong(str(error)) from error
    rope = values.table("rope_parameters") or values.table("rope_scaling")
    hidden, heads = values.count("hidden_size"), values.count("num_attention_heads")
    layers = values.count("num_hidden_layers", most=MOST_LAYERS)
    moe = model_type == "qwen3_moe"
    # transformers 5 renames num_experts when it saves.
    experts_key = "num_experts" if "num_experts" in config else "num_local_experts"
    experts = values.count(experts_key, most=MOST_EXPERTS) if moe else 0
    if layers * experts > MOST_MATRICES:
        raise wrong(f"{layers} layers of {experts} experts each are more than any model has")
    dense_layers = [k for k in values.items("mlp_only_layers") if type(k) is int] if moe else []
    theta = rope if rope.get("rope_theta") is not None else config
    facts = ModelFacts(
        model_type=model_type,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=values.count("num_key_value_heads"),
        # The defaults of transformers' two classes.
        head_dim=values.count("head_dim", hidden // heads if moe else 128),
        intermediate=values.count("intermediate_size"),
        vocab=values.count("vocab_size"),
        tied=values.flag("tie_word_embeddings"),
        experts=experts,
        top_k=values.count("num_experts_per_tok") if moe else 0,
        moe_intermediate=values.count("moe_intermediate_size") if moe else 0,
        mlp_only_layers=tuple(sorted({*dense_layers} & {*range(layers)})),
        decoder_sparse_step=values.count("decoder_sparse_step", 1) if moe else 1,
        norm_topk_prob=values.flag("norm_topk_prob") and moe,
        rms_norm_eps=values.positive("rms_norm_eps", 1e-6),
        rope_theta=_Values(theta, wrong).positive("rope_theta", 10_000.0),
        max_positions=values.count("max_position_embeddings", 32_768),
        dtype=str(config.get("dtype") or config.get("torch_dtype") or "float32"),
        says_dtype=bool(config.get("dtype") or config.get("torch_dtype")),
        packing=packing,
        quantized=packing.method if packing else _made_by_q3q(config.get(EXPORT_KEY)),
    )
    _refuse_misfits(facts, wrong)
    return facts


@dataclass(frozen=True)
class _Values:
    """Values of a config.json, each of the type and within the bounds that make sense.

    wrong: makes the error that is raised where one is not
    """

    config: Mapping[str, Any]
    wrong: Callable[[str], CheckpointError]

    def count(self, key: str, default: int | None = None, most: int = MOST) -> int:
        value = self._given(key, default)
        if type(value) is not int or not 1 <= value <= most:
            bound = "of 1 or more" if type(value) is not int or value < 1 else f"up to {most}"
            raise self._unexpected(key, value, f"a whole number {bound}")
        return value

    def positive(self, key: str, default: float) -> float:
        value = self._given(key, default)
        if type(value) not in (int, float) or not 0 < value <= MOST_NUMBER:
            raise self._unexpected(key, value, "a finite number above 0")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self._given(key, False)
        if type(value) is not bool:
            raise self._unexpected(key, value, "true or false")
        return value

    def table(self, key: str) -> Mapping[str, Any]:
        value = self._given(key, {})
        if not isinstance(value, Mapping):
            raise self._unexpected(key, value, "a table")
        return value

    def items(self, key: str) -> list[Any]:
        value = self._given(key, [])
        if not isinstance(value, list):
            raise self._unexpected(key, value, "a list")
        return value

    def _given(self, key: str, default: Any) -> Any:
        value = self.config.get(key)
        return default if value is None else value

    def _unexpected(self, key: str, value: Any, expected: str) -> CheckpointError:
        shown = repr(value)
        shown = shown if len(shown) <= 40 else f"{shown[:39]}…"
        return self.wrong(f"config.json gives {key}={shown}; {expected} was expected")


def _family(values: _Values) -> str:
    """Return the model_type; refuse what is no Qwen3, and what q3q's forward does not compute."""
    config, wrong = values.config, values.wrong
    model_type = config.get("model_type")
    if model_type not in _FAMILY:
        raise wrong(f"not a Qwen3 but {model_type!r}. q3q runs model_type {' and '.join(_FAMILY)}")
    for key, only in _FIXED.items():
        if config.get(key, only) != only:
            raise wrong(f"{key}={config[key]!r} is not supported, only {only!r}")
    if any(kind != "full_attention" for kind in values.items("layer_types")):
        raise wrong("layer_types other than full_attention are not supported")
    rope = values.table("rope_parameters") or values.table("rope_scaling")
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise wrong(f"rope_type={rope_type!r} is not supported, only 'default'")
    return str(model_type)


def _refuse_misfits(facts: ModelFacts, wrong: Callable[[str], CheckpointError]) -> None:
    """Refuse values that do not fit each other."""
    if facts.heads % facts.kv_heads:
        raise wrong(
            f"{facts.heads} attention heads cannot share {facts.kv_heads} key/value heads evenly"
        )
    if facts.head_dim % 2:
        raise wrong(f"head_dim={facts.head_dim}: rotary positions turn pairs, so it must be even")
    if facts.top_k > facts.experts:
        raise wrong(f"num_experts_per_tok={facts.top_k} of only {facts.experts} experts")
    if facts.dtype not in DTYPE_BYTES:
        raise wrong(f"dtype {facts.dtype!r} is not supported, only {', '.join(DTYPE_BYTES)}")


def _made_by_q3q(marker: Any) -> str | None:
    return f"by q3q: {marker.get('name')}" if isinstance(marker, dict) else None


def number_of_tensors(names: list[str]) -> str:
    return f"{len(names)} tensor{'s are' if len(names) > 1 else ' is'}"
