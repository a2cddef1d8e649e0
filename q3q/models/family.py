"""A family of models, and the facts of one of its models. Without torch, so that a plan takes none.

`Family` is a plain decoder: attention, then an MLP, each behind a norm and beside a residual. A
family's own file says what is different (docs/FAMILY_GUIDE.md).

Shapes: B windows, T tokens of one window, H hidden, N query heads, K key-value heads, D head_dim.
heads * head_dim need not be hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from q3q.models.anatomy import DOWN, GATE_UP, QKV, O, ScaleGroup, Site, SiteInput, bias_of
from q3q.models.config_values import MOST_LAYERS, Values
from q3q.models.delta_sizes import DeltaSizes
from q3q.models.rope import RopeScaling, read_rope, rotary_share
from q3q.models.tensor_files import Shape

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from q3q.models.attention import Attention
    from q3q.models.published.packing import Packing

    Turns = Callable[[Tensor, torch.dtype], tuple[Tensor, Tensor]]  # `q3q.models.block.Rope`
    Stages = Generator[tuple[Site, SiteInput], None, Tensor]

DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """The facts in a model's config.json. Sizes count elements; a dense model has 0 experts."""

    family: Family
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int  # heads * head_dim differs from hidden in Qwen3's 0.6B, 4B, 32B and both MoEs
    intermediate: int
    vocab: int
    tied: bool
    biased: tuple[str, ...] = ()  # linears of a block with a bias: `self_attn.q_proj.weight`
    experts: int = 0
    top_k: int = 0
    moe_intermediate: int = 0
    mlp_only_layers: tuple[int, ...] = ()
    decoder_sparse_step: int = 1
    norm_topk_prob: bool = False
    shared_intermediate: int = 0  # of an expert that every token reads; 0: there is none
    recurrent: tuple[int, ...] = ()  # blocks with a delta rule in place of attention
    delta: DeltaSizes | None = None
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    rotary_share: float = 1.0  # of a head's dimensions, the first ones, that positions turn
    max_positions: int
    dtype: str
    says_dtype: bool = field(default=True, compare=False)  # False: float32 is the default
    packing: Packing | None = None  # of its linears, None for plain numbers
    # By linear on disk: the scale or factor by which its input is rounded (`InputRounding`);
    # known once the weights' files are open.
    input_numbers: Mapping[str, float] = field(default_factory=dict, compare=False)
    quantized: str | None = None  # by what, even if stored as plain numbers again
    # Of parts that exports take over; known once the weights' files are open.
    carried_bytes: int = field(default=0, compare=False)

    def sparse(self, layer: int) -> bool:
        """Return True if this block routes its tokens to experts."""
        return (
            self.experts > 0
            and layer not in self.mlp_only_layers
            and (layer + 1) % self.decoder_sparse_step == 0
        )

    @property
    def rotary_dim(self) -> int:
        """The first dimensions of a head, which rotary positions turn."""
        return int(self.head_dim * self.rotary_share)

    def block_shapes(self, layer: int) -> dict[str, Shape]:
        """Return names and shapes of a block's tensors, as `Checkpoint.block` gives them."""
        return self.family.shapes(self, layer)

    def sites(self, layer: int) -> tuple[Site, ...]:
        return self.family.sites(self, layer)

    def linears(self, layer: int) -> dict[str, str]:
        """Return the name of the site of each tensor of a block that is quantized by default."""
        return {name: site.name for site in self.sites(layer) for name in site.weights}

    def routers(self) -> tuple[str, ...]:
        """Return the weights that read a site and stay unquantized, of all blocks."""
        names = (name for k in range(self.layers) for s in self.sites(k) for name in s.unquantized)
        return tuple(dict.fromkeys(names))

    @property
    def columns(self) -> dict[str, tuple[int, ...]]:
        """Return each site's input columns; several widths where blocks differ."""
        widths: dict[str, set[int]] = {}
        for layer in range(self.layers):
            shapes = self.block_shapes(layer)
            for site in self.sites(layer):
                widths.setdefault(site.name, set()).add(shapes[site.weights[0]][-1])
        return {site: tuple(sorted(numbers)) for site, numbers in widths.items()}

    @property
    def linear_parameters(self) -> int:
        """Count the weights of linears: all in the blocks but norms, biases and routers."""
        count = 0
        for layer in range(self.layers):
            shapes = self.block_shapes(layer)
            count += sum(math.prod(shapes[name]) for name in self.linears(layer))
        return count

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

    def on_disk(self, layer: int, name: str) -> str:
        """Return the name in files of one of a block's tensors."""
        return self.family.block_prefix.format(layer) + name


class Parts(Protocol):
    """A block as its family's forward sees it: `q3q.models.block.Block`."""

    facts: ModelFacts
    layer: int
    weights: dict[str, Tensor]
    unrounded: frozenset[str]

    def norm(self, gain: str, x_xH: Tensor) -> Tensor:
        """Return the root-mean-square norm with the gain of this name."""

    def linear(self, weight: str, x_xI: Tensor) -> Tensor:
        """Return the product with the weight of this name, plus its bias if it has one."""

    def halt(self, inputs_BTI: Tensor) -> SiteInput:
        """Return what a forward yields with a site that reads these inputs."""

    def round_inputs(self, site: Site, inputs: Tensor) -> Tensor:
        """Return a site's input as its linears read it, fake-quantized if the block rounds it."""

    def attend(
        self, query_BTND: Tensor, key_BTKD: Tensor, value_BTKD: Tensor, rope: Turns, see: Attention
    ) -> Tensor:
        """Return each query's context [B, T, N * D], after the rotary embedding of q and k."""

    def gated(self, gate_xI: Tensor, up_xI: Tensor) -> Tensor:
        """Return silu(gate) * up, written over both."""

    def attention_stages(self, normed_BTH: Tensor, rope: Turns, attention: Attention) -> Stages:
        """Run the family's `attention_stages`."""

    def mlp_stages(self, normed_BTH: Tensor) -> Stages:
        """Run the family's `mlp_stages`."""


@dataclass(frozen=True)
class Family:
    """A family of models; the base is a plain decoder. It has no state: two of a class are equal.

    Attributes:
        name: for people, in messages.
        model_types: config.json's words for it.
        defaults: what transformers' class fills in where config.json has no such key.
        assumed: values of config.json that the forward takes for granted; others are refused.
        layer_types: kinds of blocks that the forward computes, in config.json's words.
        partial_rotary: positions may turn a part of each head (`partial_rotary_factor`).
        gain_offset: what the forward adds to a norm's gain: 1 where files hold gains around 0.
        kept: why tensors of a block stay unquantized, by the end of their name.
        skipped: patterns of linears that stay unquantized unless `skip` is given, as published
            recipes leave them.
        carried: beginnings of names in files of parts that are neither run nor quantized; exports
            take them over as they are.
        block_prefix, embedding, final_norm, head: names in files.
    """

    name: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    defaults: ClassVar[Mapping[str, Any]] = {}
    assumed: ClassVar[Mapping[str, Any]] = {"hidden_act": "silu"}
    layer_types: ClassVar[tuple[str, ...]] = ("full_attention",)
    partial_rotary: ClassVar[bool] = False
    gain_offset: ClassVar[float] = 0.0
    kept: ClassVar[Mapping[str, str]] = {
        "norm.weight": "a norm's gain: few numbers, which take over scales",
        ".bias": "few numbers, added to the outputs of codes",
    }
    skipped: ClassVar[tuple[str, ...]] = ()
    carried: ClassVar[tuple[str, ...]] = ()
    block_prefix: ClassVar[str] = "model.layers.{}."
    embedding: ClassVar[str] = "model.embed_tokens.weight"
    final_norm: ClassVar[str] = "model.norm.weight"
    head: ClassVar[str] = "lm_head.weight"

    def end_name(self, end: str) -> str:
        """Return the name in files of `embedding` or `head`."""
        return {"embedding": self.embedding, "head": self.head}[end]

    # What config.json says.

    def facts(self, values: Values) -> ModelFacts:
        """Return the facts of one model.

        Raises:
            CheckpointError: a value makes no sense, or the forward cannot compute it.
        """
        values = values.with_defaults(self.defaults)
        for key, only in self.assumed.items():
            if values.config.get(key, only) != only:
                raise values.wrong(f"{key}={values.config[key]!r} is not supported, only {only!r}")
        if any(kind not in self.layer_types for kind in values.items("layer_types")):
            kinds = " and ".join(self.layer_types)
            raise values.wrong(f"layer_types other than {kinds} are not supported")
        hidden, heads = values.count("hidden_size"), values.count("num_attention_heads")
        theta, scaling = read_rope(values)
        rotary = rotary_share(values)
        if rotary != 1 and not self.partial_rotary:
            raise values.wrong(f"partial_rotary_factor={rotary:g} is not supported, only 1.0")
        dtype = values.config.get("dtype") or values.config.get("torch_dtype")
        return ModelFacts(
            family=self,
            layers=values.count("num_hidden_layers", most=MOST_LAYERS),
            hidden=hidden,
            heads=heads,
            kv_heads=values.count("num_key_value_heads", heads),
            head_dim=values.count("head_dim", hidden // heads),
            intermediate=values.count("intermediate_size"),
            vocab=values.count("vocab_size"),
            tied=values.flag("tie_word_embeddings"),
            biased=self.biased(values),
            rms_norm_eps=values.positive("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            rotary_share=rotary,
            max_positions=values.count("max_position_embeddings", 32_768),
            dtype=str(dtype or "float32"),
            says_dtype=bool(dtype),
        )

    def biased(self, values: Values) -> tuple[str, ...]:
        """Return the linears of a block that have a bias."""
        return ()

    # What a block is made of.

    def shapes(self, facts: ModelFacts, layer: int) -> dict[str, Shape]:
        """Return names and shapes of a block's tensors: weights [O, I], experts' [E, O, I]."""
        shapes = {
            "input_layernorm.weight": (facts.hidden,),
            **self.attention_shapes(facts),
            "post_attention_layernorm.weight": (facts.hidden,),
            **self.mlp_shapes(facts, layer),
        }
        return shapes | {bias_of(name): shapes[name][:1] for name in facts.biased}

    def attention_shapes(self, facts: ModelFacts) -> dict[str, Shape]:
        hidden, head = facts.hidden, facts.head_dim
        return {
            "self_attn.q_proj.weight": (facts.heads * head, hidden),
            "self_attn.k_proj.weight": (facts.kv_heads * head, hidden),
            "self_attn.v_proj.weight": (facts.kv_heads * head, hidden),
            "self_attn.o_proj.weight": (hidden, facts.heads * head),
        }

    def mlp_shapes(self, facts: ModelFacts, layer: int) -> dict[str, Shape]:
        return {
            "mlp.gate_proj.weight": (facts.intermediate, facts.hidden),
            "mlp.up_proj.weight": (facts.intermediate, facts.hidden),
            "mlp.down_proj.weight": (facts.hidden, facts.intermediate),
        }

    def sites(self, facts: ModelFacts, layer: int) -> tuple[Site, ...]:
        """Return a block's sites, in the order of its forward."""
        return *self.mixing_sites(facts, layer), *self.mlp_sites(facts, layer)

    def mixing_sites(self, facts: ModelFacts, layer: int) -> tuple[Site, ...]:
        """Return the sites of `attention_stages`, which mixes tokens."""
        return QKV, O

    def mlp_sites(self, facts: ModelFacts, layer: int) -> tuple[Site, ...]:
        return GATE_UP, DOWN

    def scale_groups(self, facts: ModelFacts, layer: int) -> tuple[ScaleGroup, ...]:
        """Return a block's scale groups, in AWQ's order."""
        return *self.mixing_scale_groups(facts, layer), *self.mlp_scale_groups(facts, layer)

    def mixing_scale_groups(self, facts: ModelFacts, layer: int) -> tuple[ScaleGroup, ...]:
        """v -> o repeats each value channel for the query heads that read it."""
        repeat = facts.heads // facts.kv_heads
        return (
            self.norm_group(QKV, "input_layernorm.weight"),
            ScaleGroup(O, "self_attn.v_proj.weight", repeat, facts.head_dim),
        )

    def mlp_scale_groups(self, facts: ModelFacts, layer: int) -> tuple[ScaleGroup, ...]:
        return (
            self.norm_group(GATE_UP, "post_attention_layernorm.weight"),
            ScaleGroup(DOWN, "mlp.up_proj.weight"),
        )

    def norm_group(self, site: Site, gain: str, also: tuple[Site, ...] = ()) -> ScaleGroup:
        """Return the scale group of a site that reads a norm, as `also` do."""
        return ScaleGroup(site, gain, offset=self.gain_offset, also=also)

    # How a block computes: stages that halt before each site, and read its weights after that.

    def stages(self, block: Parts, x_BTH: Tensor, rope: Turns, attention: Attention) -> Stages:
        """Run a block; the generator returns its output, [B, T, H]."""
        attended_BTH = yield from block.attention_stages(
            block.norm("input_layernorm.weight", x_BTH), rope, attention
        )
        x_BTH = attended_BTH.add_(attention.read(x_BTH))
        del attended_BTH
        mlp_BTH = yield from block.mlp_stages(block.norm("post_attention_layernorm.weight", x_BTH))
        return mlp_BTH.add_(x_BTH)

    def attention_stages(
        self, block: Parts, normed_BTH: Tensor, rope: Turns, attention: Attention
    ) -> Stages:
        """Run what reads the site `qkv`, up to what is added to the block's input."""
        yield QKV, block.halt(normed_BTH)
        rounded = block.round_inputs(QKV, normed_BTH)
        query, key, value = (
            block.linear(name, rounded).unflatten(-1, (-1, block.facts.head_dim))
            for name in QKV.weights
        )
        query, key = self.before_rope(block, query, key)
        context = block.attend(query, key, value, rope, attention)
        # While it is halted, a run holds only what it still needs.
        del normed_BTH, rounded, query, key, value
        yield O, block.halt(context)
        return block.linear("self_attn.o_proj.weight", block.round_inputs(O, context))

    def before_rope(
        self, block: Parts, query_BTND: Tensor, key_BTKD: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return queries and keys as the rotary embedding turns them."""
        return query_BTND, key_BTKD

    def mlp_stages(self, block: Parts, normed_BTH: Tensor) -> Stages:
        """Run what reads the site `gate_up`, up to what is added beside it."""
        yield GATE_UP, block.halt(normed_BTH)
        rounded = block.round_inputs(GATE_UP, normed_BTH)
        gated = block.gated(*(block.linear(name, rounded) for name in GATE_UP.weights))
        del normed_BTH, rounded
        yield DOWN, block.halt(gated)
        return block.linear("mlp.down_proj.weight", block.round_inputs(DOWN, gated))

    # What a block keeps.

    def halted_width(self, facts: ModelFacts, layer: int) -> int:
        """Return the most numbers per token that a halted run holds, its input included."""
        hidden, values = facts.hidden, facts.heads * facts.head_dim
        return hidden + max(hidden, values, facts.intermediate)

    def state_width(self, facts: ModelFacts, layer: int) -> int:
        """Return how many numbers a token leaves behind for those after it: its key and value."""
        return 2 * facts.kv_heads * facts.head_dim

    def recurrent_width(self, facts: ModelFacts, layer: int) -> int:
        """Return how many numbers (float32) a text carries from token to token: a state's."""
        return 0
