"""A Qwen3 checkpoint on disk: what it holds, whether it is whole, and its weights one block at a time.

Finding a model, `read_facts` and the checks of `Checkpoint` read JSON and headers alone, without torch:
a plan or a refusal costs milliseconds. Weights are read into memory of their own, not mapped: mapped pages count as the
process's, and lie wherever the file's header ends, on which the last bits of a matrix product depend.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from q3q.errors import CheckpointError
from q3q.models.facts import (
    OWN_FOLDER,
    ModelFacts,
    first_line,
    number_of_tensors,
    read_facts,
    read_json,
)
from q3q.models.packed import Layout
from q3q.models.tensor_files import Shape, Stored, read_header
from q3q.storage.files import write_atomically

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

_WEIGHT_DTYPES = ("BF16", "F16", "F32", "F64")
TOKENIZER_FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)
EXPORT_MARKER = "q3q.json"  # a file that q3q's own exports have


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
            raise CheckpointError(f"{folder} is not a folder. {OWN_FOLDER}")
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
            raise CheckpointError(
                f"{self.folder}: {number_of_tensors(missing)} missing, first {missing[0]}"
            )
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
                    f"{self.folder}: {number_of_tensors(misfits)} {what}, first {misfits[0]}"
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
            f"{folder}: the tokenizer cannot be loaded: {first_line(error)}"
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
    found = read_json(path).get("eos_token_id")
    ends = found if isinstance(found, list) else [] if found is None else [found]
    if not all(isinstance(end, int) for end in ends):
        raise CheckpointError(
            f"{path}: eos_token_id is {found!r}, neither a number nor a list of numbers"
        )
    return tuple(ends)


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
    weight_map = read_json(index).get("weight_map")
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
