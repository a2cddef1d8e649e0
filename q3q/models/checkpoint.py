"""A Qwen3 checkpoint on disk: what it holds, whether it is whole, and its weights one block at a time.

Finding a model, `read_facts` and the checks of `Checkpoint` read JSON and headers alone, without torch:
a plan or a refusal costs milliseconds. Weights are read into memory of their own, not mapped: mapped pages count as the
process's, and lie wherever the file's header ends, on which the last bits of a matrix product depend.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from q3q.errors import CheckpointError
from q3q.models.packed import Layout, Packing, read_packing
from q3q.models.tensor_files import Shape, Stored, read_header
from q3q.record import write_atomically

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

_FAMILY = ("qwen3", "qwen3_moe")
# What the forward of q3q takes for granted. Another value would be computed wrongly, in silence.
_FIXED = {"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False}
_WEIGHT_DTYPES = ("BF16", "F16", "F32", "F64")
_DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}
TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)
# All that a Qwen3 folder needs, and its licence. Pickles, which can run code when loaded, are not on the list.
_DOWNLOADED = ["*.safetensors", "*.json", "*.txt", "*.jinja", "README.md", "LICENSE*"]
EXPORT_MARKER = "q3q.json"  # a file that q3q's own exports have
EXPORT_KEY = "q3q"  # and what their config.json says of itself, wherever it is copied to
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_SECONDS = 5.0  # to wait for the Hub's answer
_OWN_FOLDER = "For a folder of your own: model=local model.path=DIR"


# ---------------------------------------------------------------------------------------------- where it is


def locate(source: str, revision: str | None = None, *, offline: bool = False) -> Path:
    """The folder of a model: a local one as it is, a Hub id's snapshot, downloaded if need be.

    Args:
        source: a folder, or a Hub id such as `Qwen/Qwen3-8B`. A folder of that name wins.
        revision: branch, tag or commit of a Hub id; its main branch if None.
        offline: look in the local cache only.

    Raises:
        CheckpointError: no such folder, or neither the Hub nor the local cache gives the model.
    """
    if (folder := _local_folder(source, revision)) is not None:
        return folder
    _check_hub_id(source)
    from huggingface_hub import snapshot_download

    silence = CheckpointError("offline was asked for") if offline else _ask_hub(source, revision)
    try:
        path = snapshot_download(
            source,
            revision=revision,
            allow_patterns=_DOWNLOADED,
            local_files_only=silence is not None,
            etag_timeout=_HUB_SECONDS,
        )
    except (
        Exception
    ) as error:  # the client's own, its HTTP library's, the disk's: to the user all mean the same
        raise _unreachable(source, revision, silence or error) from error
    return Path(path)


def resolve_revision(source: str, revision: str | None = None) -> str:
    """The commit that a Hub id means right now, found without downloading weights. A full commit is its own answer.

    The Hub is asked, and if it does not answer within seconds, the local cache, which remembers what a branch meant
    when something of it was last downloaded.

    Raises:
        CheckpointError: not a Hub id, or neither the Hub nor the local cache knows it.
    """
    _check_hub_id(source)
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    return _config_folder(source, revision).name  # .../snapshots/<commit>


def fetch_facts(source: str, revision: str | None = None) -> ModelFacts:
    """A Hub model's facts, from its config.json alone.

    Raises:
        CheckpointError: neither the Hub nor the local cache has it, or it is not a Qwen3.
    """
    _check_hub_id(source)
    return read_facts(_config_folder(source, revision))


def fetch_file(source: str, name: str, revision: str | None = None) -> Path | None:
    """A small file of a Hub model, None if the model has none of this name.

    Raises:
        CheckpointError: neither the Hub nor the local cache can tell.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    cached = try_to_load_from_cache(source, name, revision=revision)
    if cached is not None:  # a path, or the note that the model was found not to have it
        return Path(cached) if isinstance(cached, str) else None
    if (silence := _ask_hub(source, revision)) is not None:
        raise _unreachable(source, revision, silence) from silence
    try:
        return Path(hf_hub_download(source, name, revision=revision, etag_timeout=_HUB_SECONDS))
    except Exception as error:  # see `locate`
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None
        raise _unreachable(source, revision, error) from error


def _config_folder(source: str, revision: str | None) -> Path:
    """A snapshot of the local cache with config.json in it, up to date if the Hub answers."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(source, "config.json", revision=revision)
    settled = revision is not None and _COMMIT.fullmatch(
        revision
    )  # a commit never changes, a branch does
    if not (settled and isinstance(cached, str)):
        if (silence := _ask_hub(source, revision)) is None:
            try:
                return Path(
                    hf_hub_download(
                        source, "config.json", revision=revision, etag_timeout=_HUB_SECONDS
                    )
                ).parent
            except Exception as error:  # see `locate`
                silence = error
        if not isinstance(cached, str):
            raise _unreachable(source, revision, silence) from silence
    return Path(cached).parent


def _ask_hub(source: str, revision: str | None) -> Exception | None:
    """Why the Hub does not give a model, None if it does. Asked once, for seconds; a download tries half a minute."""
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(source, revision=revision, expand=["sha"], timeout=_HUB_SECONDS)
    except Exception as error:  # see `locate`
        return error
    return None


def _local_folder(source: str, revision: str | None) -> Path | None:
    folder = Path(source).expanduser()
    if not source or not folder.is_dir():
        return None
    if revision is not None:
        raise CheckpointError(
            f"{source} is a folder, which has no revision {revision!r}. Leave model.revision out"
        )
    return folder


def _check_hub_id(source: str) -> None:
    if Path(source).expanduser().is_file():
        raise CheckpointError(
            f"{source} is a file. Give the folder that holds config.json: model=local model.path=DIR"
        )
    if not _HUB_ID.fullmatch(source):
        raise CheckpointError(
            f"{source!r} is neither a folder nor a Hub id (owner/name). {_OWN_FOLDER}"
        )


def _unreachable(source: str, revision: str | None, error: Exception) -> CheckpointError:
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    what = source if revision is None else f"{source} (revision {revision})"
    if isinstance(error, RepositoryNotFoundError):
        reason = "it has no such model, or wants a login"
    elif isinstance(error, RevisionNotFoundError):
        reason = "it has no such revision"
    else:
        reason = _first_line(error)
    return CheckpointError(
        f"{what} is no folder here, and as a Hub id it is neither in the local cache "
        f"nor to be had from the Hub: {reason}. {_OWN_FOLDER}"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(". ")


# ---------------------------------------------------------------------------------------------- what it is


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """What config.json alone says about a Qwen3 or Qwen3-MoE. Sizes count elements; a dense model has 0 experts."""

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
    packing: Packing | None = None  # how its linears are stored, if they are not plain numbers
    quantized: str | None = (
        None  # how, if they were quantized before; also where they are plain numbers again
    )

    def sparse(self, layer: int) -> bool:
        """Whether this block routes its tokens to experts."""
        return (
            self.experts > 0
            and layer not in self.mlp_only_layers
            and (layer + 1) % self.decoder_sparse_step == 0
        )

    def block_shapes(self, layer: int) -> dict[str, Shape]:
        """Names and shapes of one block's tensors, as `Checkpoint.block` gives them: experts stacked."""
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
        """Input columns of each site, which a group size must divide. Two widths only where dense and sparse mix."""
        inner = {
            self.moe_intermediate if self.sparse(k) else self.intermediate
            for k in range(self.layers)
        }
        return {
            "qkv": (self.hidden,),
            "o": (self.heads * self.head_dim,),
            "gate_up": (self.hidden,),
            "down": tuple(sorted(inner)),
        }

    @property
    def linear_parameters(self) -> int:
        """Weights of the linears that are quantized: all in the blocks but norms and routers."""
        return sum(
            math.prod(shape)
            for layer in range(self.layers)
            for name, shape in self.block_shapes(layer).items()
            if name.endswith("_proj.weight")
        )

    @property
    def embedding_parameters(self) -> int:
        """Embedding and head; one matrix if tied."""
        return self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        """All of them."""
        blocks = sum(
            math.prod(shape) for k in range(self.layers) for shape in self.block_shapes(k).values()
        )
        return blocks + self.embedding_parameters + self.hidden

    def block_bytes(self, layer: int, dtype: str | None = None) -> int:
        """Bytes of one block's weights in `dtype`; in the checkpoint's own if None."""
        return _DTYPE_BYTES[dtype or self.dtype] * sum(
            map(math.prod, self.block_shapes(layer).values())
        )

    def weight_bytes(self, dtype: str | None = None) -> int:
        """Bytes of all weights in `dtype`; in the checkpoint's own if None."""
        return _DTYPE_BYTES[dtype or self.dtype] * self.parameters


def read_facts(source: Path | Mapping[str, Any]) -> ModelFacts:
    """Facts of a model folder, or of its parsed config.json, as transformers 4 or 5 write it.

    Raises:
        CheckpointError: no readable config.json, not a Qwen3, quantized in a way that q3q cannot read, or a kind of
            Qwen3 that it cannot run.
    """
    if isinstance(source, Mapping):
        where, config = "the config", source
    else:
        where, config = str(source), _read_json(source / "config.json")

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
        head_dim=count(
            "head_dim", hidden // heads if moe else 128
        ),  # the defaults of transformers' two classes
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
    if facts.dtype not in _DTYPE_BYTES:
        raise wrong(f"dtype {facts.dtype!r} is not supported, only {', '.join(_DTYPE_BYTES)}")
    return facts


# ---------------------------------------------------------------------------------------------- its weights


class Checkpoint:
    """A model folder, checked when opened, read one block at a time.

    Opening reads config.json and the header of every shard, and no weight.

    Args:
        folder: config.json, and model.safetensors or an index with its shards.

    Raises:
        CheckpointError: the folder is missing, incomplete, damaged (the shard or tensor is named), pickled, quantized
            in a way that q3q cannot read, or not a Qwen3.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise CheckpointError(f"{folder} is not a folder. {_OWN_FOLDER}")
        self.folder = folder
        self.facts = read_facts(folder)
        self._stored = _read_headers(folder)
        self._check_complete()

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors by their names on disk.

        Raises:
            KeyError: a name that the checkpoint does not have. CheckpointError: a file changed since it was opened.
        """
        return {name: self._stored[name].read() for name in names}

    def rows(self, name: str, first: int, count: int) -> Tensor:
        """Some rows of a tensor, read from its file. name: on disk, `model.embed_tokens.weight`."""
        return self._stored[name].read(first, count)

    def embedding(self) -> Tensor:
        """Token embedding, [vocab, hidden]."""
        return self.read(["model.embed_tokens.weight"])["model.embed_tokens.weight"]

    def final_norm(self) -> Tensor:
        """Weight of the norm before the head, [hidden]."""
        return self.read(["model.norm.weight"])["model.norm.weight"]

    def head(self) -> Tensor:
        """Output head, [vocab, hidden]; what the embedding is if the two are tied."""
        return (
            self.embedding() if self.facts.tied else self.read(["lm_head.weight"])["lm_head.weight"]
        )

    def block(
        self, k: int, dtype: torch.dtype | None = None, names: Collection[str] | None = None
    ) -> dict[str, Tensor]:
        """Weights of block `k`, named and shaped as `ModelFacts.block_shapes` says: experts stacked.

        The same from either layout on disk, one matrix per expert or (transformers 5 in memory) fused ones. Packed
        weights come as numbers, in the dtype of config.json.

        Args:
            k: 0 to layers - 1.
            dtype: to convert to; as stored if None.
            names: those of its weights that are wanted; all if None.
        """
        if not 0 <= k < self.facts.layers:
            raise IndexError(f"block {k} of {self.facts.layers}")
        fused = self._fused(k)
        wanted = [name for name in self.facts.block_shapes(k) if names is None or name in names]
        sources = {name: _sources(name, self.facts.experts, fused) for name in wanted}
        last: dict[str, Tensor] = {}

        def number(source: str) -> Tensor:
            nonlocal last
            if source not in last:  # fused, gate and up have the same one
                last = {}
                last = self._numbers(k, [source])
            return last[source]

        return {
            name: _assemble(map(number, sources[name]), name, self.facts, k, dtype)
            for name in wanted
        }

    def _numbers(self, k: int, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors of one block as plain numbers, by their names on disk less the block's prefix."""
        prefix, shapes = f"model.layers.{k}.", disk_shapes(self.facts, k, self._fused(k))
        layouts = {name: _layout(self.facts, prefix + name) for name in names}
        parts = {
            name: [name] if layout is None else list(_parts(layout, name, shapes[name]))
            for name, layout in layouts.items()
        }
        raw = self.read(prefix + part for some in parts.values() for part in some)
        numbers = {}
        for name, layout in layouts.items():
            if layout is None:
                numbers[name] = raw[prefix + name]
                continue
            rows, columns = shapes[name]
            packed = {part.rpartition(".")[2]: raw[prefix + part] for part in parts[name]}
            numbers[name] = layout.unpack(packed, rows, columns).to(_torch_dtype(self.facts.dtype))
        return numbers

    def digest(self, cache: Path | None = None) -> str:
        """SHA-256 (hex) of what determines the model's numbers: config.json, tokenizer files and every shard.

        Args:
            cache: folder for a memo of file digests, keyed by real path, size and modification time, so that 16 GB
                are hashed once. Nothing is written into the model's folder.
        """
        shards = {stored.shard for stored in self._stored.values()}
        files = [
            self.folder / "config.json",
            *(self.folder / name for name in TOKENIZER_FILES),
            *sorted(shards),
        ]
        memo = _Memo(cache)
        lines = [f"{file.name} {memo.digest(file)}\n" for file in files if file.is_file()]
        memo.save()
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def _fused(self, k: int) -> bool:
        return f"model.layers.{k}.mlp.experts.gate_up_proj" in self._stored

    def _check_complete(self) -> None:
        facts = self.facts
        expected: dict[str, Shape] = {"model.embed_tokens.weight": (facts.vocab, facts.hidden)}
        packed: dict[str, tuple[str, ...]] = {}
        for k in range(facts.layers):
            for name, shape in disk_shapes(facts, k, self._fused(k)).items():
                full = f"model.layers.{k}.{name}"
                if (layout := _layout(facts, full)) is None:
                    expected[full] = shape
                    continue
                for part, (types, part_shape) in _parts(layout, full, shape).items():
                    expected[part], packed[part] = part_shape, types
        expected["model.norm.weight"] = (facts.hidden,)
        if not facts.tied:
            expected["lm_head.weight"] = (facts.vocab, facts.hidden)

        if missing := [name for name in expected if name not in self._stored]:
            raise CheckpointError(f"{self.folder}: {_count(missing)} missing, first {missing[0]}")
        for what, misfits in {
            "of a shape that config.json does not imply": [
                f"{name} in {stored.shard.name}: {list(stored.shape)} instead of {list(shape)}"
                for name, shape in expected.items()
                if (stored := self._stored[name]).shape != shape
            ],
            "not stored as floats, or as the packed format says": [
                f"{name} in {stored.shard.name}: {stored.dtype}"
                for name in expected
                if (stored := self._stored[name]).dtype not in packed.get(name, _WEIGHT_DTYPES)
            ],
        }.items():
            if misfits:
                raise CheckpointError(
                    f"{self.folder}: {_count(misfits)} {what}, first {misfits[0]}"
                )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The fast tokenizer of a model folder, from its own files.

    Raises:
        CheckpointError: no tokenizer there, one that cannot be read, or one with ids that the embedding does not have.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise CheckpointError(f"{folder}: no tokenizer.json, and no vocab.json with merges.txt")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except (
        Exception
    ) as error:  # JSON, Rust and plain Python errors alike mean files that cannot be used
        raise CheckpointError(
            f"{folder}: the tokenizer cannot be loaded: {_first_line(error)}"
        ) from error
    if len(tokenizer) > (vocab := read_facts(folder).vocab):
        raise CheckpointError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, the embedding only {vocab} rows"
        )
    return tokenizer


def end_tokens(folder: Path) -> tuple[int, ...]:
    """Tokens after which the model has nothing more to say, as transformers' `generate` finds them.

    From generation_config.json where there is one, else config.json; a post-trained Qwen3 has two.

    Raises:
        CheckpointError: the file cannot be read, or its eos_token_id is neither a number nor a list of numbers.
    """
    own = folder / "generation_config.json"
    path = own if own.is_file() else folder / "config.json"
    found = _read_json(path).get("eos_token_id")
    ends = found if isinstance(found, list) else [] if found is None else [found]
    if not all(isinstance(end, int) for end in ends):
        raise CheckpointError(
            f"{path}: eos_token_id is {found!r}, neither a number nor a list of numbers"
        )
    return tuple(ends)


def _made_by_q3q(marker: Any) -> str | None:
    return f"by q3q: {marker.get('name')}" if isinstance(marker, dict) else None


def disk_shapes(facts: ModelFacts, layer: int, fused: bool = False) -> dict[str, Shape]:
    """`ModelFacts.block_shapes` as files hold them: each expert's matrices alone, or (fused) gate and up joined."""
    shapes = facts.block_shapes(layer)
    if not facts.sparse(layer):
        return shapes
    stacked = {name: shapes.pop(name) for name in list(shapes) if name.startswith("mlp.experts.")}
    if fused:
        experts, hidden, inner = stacked["mlp.experts.down_proj.weight"]
        shapes["mlp.experts.gate_up_proj"] = (experts, 2 * inner, hidden)
        shapes["mlp.experts.down_proj"] = (experts, hidden, inner)
        return shapes
    for name, (experts, *matrix) in stacked.items():
        shapes |= {of_expert(name, e): tuple(matrix) for e in range(experts)}
    return shapes


def of_expert(name: str, expert: int) -> str:
    """`mlp.experts.up_proj.weight` as files name one expert's, `mlp.experts.3.up_proj.weight`."""
    return name.replace("mlp.experts.", f"mlp.experts.{expert}.")


def names_on_disk(facts: ModelFacts, layer: int, names: Iterable[str]) -> Iterator[str]:
    """Tensors of a block, one of each expert's where they are stacked, as files name them."""
    for name in names:
        stacked = name.startswith("mlp.experts.")
        for one in [of_expert(name, e) for e in range(facts.experts)] if stacked else [name]:
            yield f"model.layers.{layer}.{one}"


def _layout(facts: ModelFacts, name: str) -> Layout | None:
    """How a tensor of a block is packed; None for plain numbers. name: on disk, `model.layers.0.mlp.up_proj.weight`."""
    if facts.packing is None or not name.endswith("_proj.weight"):
        return None
    return facts.packing.of(name.removesuffix(".weight"))


def _parts(layout: Layout, name: str, shape: Shape) -> dict[str, tuple[tuple[str, ...], Shape]]:
    """The tensors that a packed weight is stored as: their names, types and shapes."""
    rows, columns = shape
    base = name.removesuffix("weight")
    return {base + part: facts for part, facts in layout.parts(rows, columns).items()}


def _sources(name: str, experts: int, fused: bool) -> list[str]:
    """The names on disk that one tensor of a block is assembled from."""
    if not name.startswith("mlp.experts."):
        return [name]
    if fused:
        return ["mlp.experts.down_proj" if "down_proj" in name else "mlp.experts.gate_up_proj"]
    return [of_expert(name, e) for e in range(experts)]


def _torch_dtype(name: str) -> torch.dtype:
    import torch

    found: torch.dtype = getattr(torch, name)
    return found


def _assemble(
    parts: Iterator[Tensor], name: str, facts: ModelFacts, k: int, dtype: torch.dtype | None
) -> Tensor:
    """One tensor of a block from those that it is stored as, which are taken one at a time."""
    import torch

    shape = facts.block_shapes(k)[name]
    first = next(parts)
    if first.ndim == len(shape):
        if len(shape) == 3 and ".down_proj." not in name:  # fused, gate over up
            first = first.chunk(2, dim=1)[0 if ".gate_proj." in name else 1]
        return first.to(dtype or first.dtype).contiguous()
    stacked = torch.empty(shape, dtype=dtype or first.dtype)
    stacked[0] = first
    for e, part in enumerate(parts, start=1):
        stacked[e] = part
    return stacked


def _read_headers(folder: Path) -> dict[str, Stored]:
    """Every tensor of a folder. Like transformers, one model.safetensors goes before an index."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return read_header(single)
    if not index.is_file():
        if pickles := sorted(
            path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth")
        ):
            raise CheckpointError(
                f"{folder}: only pickled weights ({pickles[0]}), which can run code when loaded. "
                f"Save the model as safetensors: model.save_pretrained(DIR)"
            )
        raise CheckpointError(f"{folder}: no model.safetensors and no model.safetensors.index.json")
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(shard, str) for shard in weight_map.values()
    ):
        raise CheckpointError(f"{index}: no `weight_map` from tensor to shard")
    headers: dict[str, dict[str, Stored]] = {}
    for name in sorted(set(weight_map.values())):
        if name in (".", "..", "") or re.search(r"[/\\:\0]", name):
            raise CheckpointError(
                f"{index}: the shard {name!r} is not a file name; a shard lies beside its index"
            )
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: the shard {name}, which the index lists, is missing")
        headers[name] = read_header(folder / name)
    for tensor, shard in weight_map.items():
        if tensor not in headers[shard]:
            raise CheckpointError(
                f"{folder / shard}: {tensor}, which the index places there, is missing"
            )
    return {tensor: headers[shard][tensor] for tensor, shard in weight_map.items()}


class _Memo:
    """Digests of files, remembered by real path, size and modification time."""

    def __init__(self, cache: Path | None) -> None:
        self._path = None if cache is None else cache / "digests.json"
        self._changed = False
        self._known: dict[str, Any] = {}
        if self._path is not None and self._path.is_file():
            try:
                self._known = dict(json.loads(self._path.read_text(encoding="utf-8")))
            except (ValueError, TypeError):
                self._changed = True  # a memo that cannot be read is written anew; the files are still the truth

    def digest(self, file: Path) -> str:
        real, status = file.resolve(), file.stat()
        known = self._known.get(str(real))
        match known:
            case [status.st_size, status.st_mtime_ns, str(digest)]:
                return digest
        sha = hashlib.sha256()
        with real.open("rb") as opened:
            while chunk := opened.read(1 << 20):
                sha.update(chunk)
        self._known[str(real)] = [status.st_size, status.st_mtime_ns, sha.hexdigest()]
        self._changed = True
        return sha.hexdigest()

    def save(self) -> None:
        if self._path is not None and self._changed:
            there = {file: entry for file, entry in self._known.items() if Path(file).is_file()}
            write_atomically(self._path, json.dumps(there, indent=1).encode())


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{path.parent}: no {path.name} there, so not a model folder. {_OWN_FOLDER}"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {_first_line(error)}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} does not hold a table of settings")
    return content


def _count(names: list[str]) -> str:
    return f"{len(names)} tensor{'s are' if len(names) > 1 else ' is'}"
