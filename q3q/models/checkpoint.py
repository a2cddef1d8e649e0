"""A checkpoint on disk: check that it is complete, and read its weights block by block.

The checks read JSON and headers alone, without torch: a plan or a refusal costs milliseconds.
Weights are read into memory of their own, not mapped: mapped pages count as the process's, and lie
wherever the file's header ends, on which the last bits of a matrix product depend.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING

from q3q.canonical import sha256
from q3q.errors import CheckpointError, first_line
from q3q.models.completeness import check_complete, read_input_numbers, without_cache_scales
from q3q.models.digests import DigestMemo
from q3q.models.disk_names import (
    disk_shapes,
    is_fused,
    is_stacked,
    layout_of,
    of_expert,
    parts_of,
    sources_of,
)
from q3q.models.facts import ModelFacts, read_facts
from q3q.models.gguf_file import SUFFIX, gguf_of, open_gguf
from q3q.models.model_files import (
    ModelFiles,
    carried_over,
    read_model_files,
    settle,
    unread,
)
from q3q.models.model_json import (
    OWN_FOLDER,
    TOKENIZER_LIMIT,
    read_json,
    refuse_irregular,
)
from q3q.models.packed import doubts_of
from q3q.models.published.modelopt import FILE as MODELOPT_FILE
from q3q.models.tensor_files import Rows, StoredTensor, read_into
from q3q.storage.files import FileState, file_state

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = (
    "added_tokens.json chat_template.jinja merges.txt special_tokens_map.json tokenizer.json "
    "tokenizer_config.json vocab.json"
).split()
GENERATION = "generation_config.json"
EXPORT_MARKER = "q3q.json"  # a file that q3q's own exports have
_CONVERTED_AT_ONCE = 1 << 22  # numbers


class Checkpoint:
    """A model folder, checked when opened, read one block at a time.

    Opening reads config.json, the header of every shard and the few numbers by which some
    checkpoints round inputs, and no weight.

    Args:
        folder: config.json, and model.safetensors or an index with its shards; or a GGUF file, or
            a folder whose only weights are in one.

    Attributes:
        remarks: where config.json and the files disagree, and what q3q does, as transformers does.
        doubts: what is odd about weights that were read, a line each.
        carried: names of tensors of parts that are neither run nor quantized (`Family.carried`).
        gguf: what a GGUF file says of the model; None for safetensors.

    Raises:
        CheckpointError: the folder is missing, incomplete, damaged (the error names the shard or
            tensor), pickled, quantized in a way that q3q cannot read, or of no family that q3q
            runs.
    """

    def __init__(self, folder: Path) -> None:
        self.gguf = None if (path := gguf_of(folder)) is None else open_gguf(path)
        if self.gguf is None and not folder.is_dir():
            if folder.suffix == SUFFIX and not folder.exists():
                raise CheckpointError(f"there is no file {folder}")
            raise CheckpointError(f"{folder} is not a folder. {OWN_FOLDER}")
        self.folder = folder if self.gguf is None else self.gguf.path.parent
        for name in (*TOKENIZER_FILES, GENERATION):
            refuse_irregular(self.folder / name, TOKENIZER_LIMIT)
        facts = read_facts(folder)
        if self.gguf is None:
            self._files = _as_text(read_model_files(folder), facts)
        else:
            self._files = ModelFiles(dict(self.gguf.tensors), list(self.gguf.header.files))
        self.facts, remarks = settle(facts, self._files)
        self._stored = self._files.tensors
        self.doubts: dict[str, None] = {}
        if (packing := self.facts.packing) is not None:
            self.facts = replace(self.facts, packing=packing.settled(self._stored))
        self._names = check_complete(self.folder, self.facts, self._files)
        self.facts = replace(self.facts, input_numbers=read_input_numbers(self.facts, self._stored))
        parts = self.facts.family.carried
        self.carried = tuple(name for name in self._stored if parts and name.startswith(parts))
        bits = sum(self._stored[name].bits for name in self.carried)
        self.facts = replace(self.facts, carried_bytes=bits // 8)
        remarks += unread(self._stored, {*self._names, *self.carried}, self.facts)
        remarks += carried_over(self.carried)
        remarks += without_cache_scales(self.facts, self._stored)
        self.remarks: tuple[str, ...] = (*self._files.remarks, *remarks)

    @property
    def stored_dtype(self) -> str:
        """The type in which the embedding lies on disk, and all else that is not packed."""
        return self._stored[self.facts.family.embedding].dtype_name

    def bits_on_disk(self) -> dict[str, int]:
        """Return the bits of each of the model's tensors, by its name on disk."""
        return {name: self._stored[name].bits for name in self._names}

    def linear_bits_on_disk(self) -> int:
        """Return the bits of all linears in the blocks, without their biases."""
        return sum(self._stored[name].bits for name, linear in self._names.items() if linear)

    def read(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Return tensors by their names on disk.

        Raises:
            KeyError: the checkpoint has no tensor of this name.
            CheckpointError: a file changed since the checkpoint was opened.
        """
        return {name: self._stored[name].read() for name in names}

    def as_it_is(self, name: str) -> Rows:
        """Return a tensor to be written as it is stored; it is read when it is written."""
        import torch

        stored = self._stored[name]
        dtype: torch.dtype = getattr(torch, stored.dtype_name)
        return Rows(stored.shape, dtype, (stored.read() for _ in range(1)))

    def rows(self, name: str, first: int, count: int) -> Tensor:
        """Read some rows of a tensor by its name on disk (`model.embed_tokens.weight`)."""
        return self._stored[name].read(first, count)

    def states(self) -> dict[str, FileState]:
        """Return the state of each of its shards, by name."""
        return {path.name: file_state(path) for path in self._files.shards}

    def end_part(self, end: str, first: int, count: int) -> Tensor:
        """Read some numbers of the `embedding` or the `head`, of all its rows one after another."""
        name = self.facts.family.head if end == "head" else self.facts.family.embedding
        return self._stored[name].flat().read(first, count)

    def is_packed(self, k: int, name: str) -> bool:
        """Return True if one of block `k`'s tensors lies in files as codes, not as its numbers."""
        sources = sources_of(name, self.facts.experts, self._fused(k))
        return any(layout_of(self.facts, k, source) is not None for source in sources)

    def block_part(self, k: int, name: str, first: int, count: int) -> Tensor:
        """Read some numbers, [count], of one of block `k`'s tensors, as `block` has it, flattened.

        It must not be packed.
        """
        import torch

        parts, before = list[tuple[StoredTensor, int, int]](), 0  # numbers before the stretch
        for stored, begin, length in self._stretches(k, name):
            start, stop = max(first, before), min(first + count, before + length)
            if start < stop:
                parts.append((stored, begin + start - before, stop - start))
            before += length
        names = {stored.dtype_name for stored, *_ in parts} or {self.stored_dtype}
        dtype = reduce(torch.promote_types, (getattr(torch, name) for name in names))
        numbers_N = torch.empty(sum(length for *_, length in parts), dtype=dtype)
        read_into(numbers_N, parts)
        return numbers_N

    def _stretches(self, k: int, name: str) -> Iterator[tuple[StoredTensor, int, int]]:
        """Yield where the numbers of one of a block's tensors lie: a file's tensor, from, how many.

        Gate and up may lie fused in one tensor, gate over up, for each expert.
        """
        shape, prefix = self.facts.block_shapes(k)[name], self.facts.on_disk(k, "")
        sources = sources_of(name, self.facts.experts, self._fused(k))
        stored = [self._stored[prefix + source].flat() for source in sources]
        if len(stored) > 1 or stored[0].shape == (math.prod(shape),):
            yield from ((tensor, 0, tensor.shape[0]) for tensor in stored)
            return
        each = math.prod(shape[1:])
        upper = each if ".up_proj." in name else 0
        yield from ((stored[0], 2 * e * each + upper, each) for e in range(shape[0]))

    def embedding(self) -> Tensor:
        """Read the token embedding, [vocab, hidden]."""
        return self._tensor(self.facts.family.embedding)

    def final_norm(self) -> Tensor:
        """Read the weight of the norm before the head, [hidden]."""
        return self._tensor(self.facts.family.final_norm)

    def head(self) -> Tensor:
        """Read the output head, [vocab, hidden]; the embedding if the two are tied."""
        family = self.facts.family
        return self._tensor(family.embedding if self.facts.tied else family.head)

    def _tensor(self, name: str) -> Tensor:
        return self.read([name])[name]

    def block(
        self, k: int, dtype: torch.dtype | None = None, names: Collection[str] | None = None
    ) -> dict[str, Tensor]:
        """Read block `k`'s weights, named and shaped as in `ModelFacts.block_shapes`.

        Experts come stacked, from either layout on disk: one matrix per expert, or fused ones (as
        transformers 5 has them in memory). Packed weights come as numbers, in config.json's dtype.

        Args:
            dtype: convert to this; None leaves the stored one.
            names: of the weights to read; None for all.
        """
        if not 0 <= k < self.facts.layers:
            raise IndexError(f"block {k} of {self.facts.layers}")
        chosen = [name for name in self.facts.block_shapes(k) if names is None or name in names]
        return {name: self._weight(k, name, dtype) for name in chosen}

    def _weight(self, k: int, name: str, dtype: torch.dtype | None) -> Tensor:
        """Read one of block `k`'s weights; see `block`."""
        import torch

        if not is_stacked(name):
            weight = self._numbers(k, [name])[name]
            return weight.to(dtype or weight.dtype).contiguous()
        shape = self.facts.block_shapes(k)[name]
        if not self.is_packed(k, name):
            return self._experts(k, name, dtype).view(shape)
        stacked = torch.empty(shape, dtype=dtype or getattr(torch, self.facts.dtype))
        for e, matrix in enumerate(stacked):
            matrix.copy_(self.matrix(k, name, e))
        return stacked

    def _experts(self, k: int, name: str, dtype: torch.dtype | None) -> Tensor:
        """Read all experts' numbers of one of block `k`'s weights, [numbers], straight into place.

        Those of another type go through a tensor of a few MB.
        """
        import torch

        numbers = math.prod(self.facts.block_shapes(k)[name])
        stored = {one.dtype_name for one, *_ in self._stretches(k, name)}
        if dtype is None or stored == {str(dtype).removeprefix("torch.")}:
            return self.block_part(k, name, 0, numbers)
        target_N = torch.empty(numbers, dtype=dtype)
        for first in range(0, numbers, _CONVERTED_AT_ONCE):
            part_N = self.block_part(k, name, first, min(_CONVERTED_AT_ONCE, numbers - first))
            target_N[first : first + len(part_N)] = part_N
        return target_N

    def matrix(self, k: int, name: str, expert: int = 0) -> Tensor:
        """Read one tensor of block `k` as `block` has it; of stacked ones, an expert's matrix."""
        source = name
        if is_stacked(name):
            if self._fused(k):
                shape = self.facts.block_shapes(k)[name][1:]
                each = math.prod(shape)
                return self.block_part(k, name, expert * each, each).view(shape)
            source = of_expert(name, expert)
        return self._numbers(k, [source])[source]

    def _numbers(self, k: int, names: Iterable[str]) -> dict[str, Tensor]:
        """Read a block's tensors as plain numbers, by their names without the block's prefix."""
        import torch

        prefix, shapes = self.facts.on_disk(k, ""), disk_shapes(self.facts, k, self._fused(k))
        layouts = {name: layout_of(self.facts, k, name) for name in names}
        numbers = {}
        for name, layout in layouts.items():
            full = prefix + name
            if layout is None:
                numbers[name] = self._stored[full].read()
                continue
            base, (rows, columns) = full.removesuffix("weight"), shapes[name]
            packed = {
                part.removeprefix(base): self._stored[part].read()
                for part in parts_of(layout, full, shapes[name])
                if part in self._stored  # an optional one may be absent
            }
            if fault := layout.fault(packed, rows, columns):
                raise CheckpointError(f"{base}{fault}: damaged")
            for doubt in doubts_of(layout, packed, base.removesuffix(".")):
                self.doubts[doubt] = None
            weight = layout.unpack(packed, rows, columns)
            numbers[name] = weight.to(getattr(torch, self.facts.dtype))
        return numbers

    def digest(self, cache: Path | None = None) -> str:
        """Return the SHA-256 (hex) of config.json, tokenizer files and every shard.

        And of the file in which ModelOpt says how it quantized, where there is one.

        Args:
            cache: folder of a `DigestMemo`. Nothing is written into the model's folder.
        """
        # A GGUF file says all of it itself.
        config = () if self.gguf else ("config.json", MODELOPT_FILE)
        own = (self.folder / name for name in (*config, *TOKENIZER_FILES))
        files = [*own, *sorted(self._files.shards)]
        memo = DigestMemo(cache)
        lines = [f"{file.name} {memo.digest(file)}\n" for file in files if file.is_file()]
        memo.save()
        return sha256("".join(lines))

    def _fused(self, k: int) -> bool:
        return is_fused(self.facts, k, self._stored)


def _as_text(files: ModelFiles, facts: ModelFacts) -> ModelFiles:
    """Return a text model's files with the names of text models.

    transformers gives the text part of a model that sees images a config of its own when it saves
    it, and leaves the tensors their long names.
    """
    own, inner = facts.family.embedding, "model.language_model."
    if own in files.tensors or not own.startswith("model."):
        return files
    tensors = {name.replace(inner, "model.", 1): tensor for name, tensor in files.tensors.items()}
    return replace(files, tensors=tensors) if own in tensors else files


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the fast tokenizer of a model folder, from its own files.

    One without an end token gets the model's, from generation_config.json or config.json.

    Raises:
        CheckpointError: the folder has no tokenizer, one that cannot be read, or one with more ids
            than the embedding has rows.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise CheckpointError(f"{folder}: no tokenizer.json, and no vocab.json with merges.txt")
    from transformers import AutoTokenizer

    try:
        options = {"local_files_only": True, "trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:  # JSON, Rust and Python errors: the files cannot be used
        raise CheckpointError(
            f"{folder}: the tokenizer cannot be loaded: {first_line(error)}"
        ) from error
    if len(tokenizer) > (vocab := read_facts(folder).vocab):
        raise CheckpointError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, the embedding only {vocab} rows"
        )
    if tokenizer.eos_token_id is None:
        ends = end_tokens(folder) or _ends_in(folder / "config.json")
        if ends and 0 <= ends[0] < len(tokenizer):
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(ends[0])
    return tokenizer


def end_tokens(folder: Path) -> tuple[int, ...]:
    """Return the tokens that end a generated text, as transformers' `generate` finds them.

    They are in generation_config.json if it exists, else config.json; a post-trained model may have
    two.

    Raises:
        CheckpointError: the file cannot be read, or its eos_token_id is no number or list of them.
    """
    own = folder / GENERATION
    return _ends_in(own if own.is_file() else folder / "config.json")


def _ends_in(path: Path) -> tuple[int, ...]:
    config = read_json(path)
    text = config.get("text_config")
    value = config.get("eos_token_id", text.get("eos_token_id") if isinstance(text, dict) else None)
    ends = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(end) is int for end in ends):
        raise CheckpointError(
            f"{path}: eos_token_id is {value!r}, neither a number nor a list of numbers"
        )
    return tuple(ends)
