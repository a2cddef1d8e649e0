"""Writing a checkpoint block by block while the walk goes on: what all formats have in common.

One file a block and one for embedding, final norm and head, each written whole or not at all, so memory holds one block
whatever the model's size. Facts of each are written after it, its checksum and that of the codes it was made of: a
killed trial goes on after the blocks that have them. config.json comes last: without it no loader takes the folder.
"""

import hashlib
import json
import math
import os
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch import Tensor

from q3q.errors import ExportError
from q3q.export.destination import (
    VERSION,
    begin_export,
    check_destination,
    forget_export,
    is_finished,
    is_ours,
    partial_path,
)
from q3q.export.formats import FORMATS, layouts
from q3q.models.checkpoint import TOKENIZER_FILES, Checkpoint, of_expert
from q3q.models.decoder import Decoder
from q3q.models.facts import EXPORT_KEY
from q3q.models.packed import Layout
from q3q.models.tensor_files import Rows, encoded
from q3q.numerics.weights import QuantizedWeight, StoredWeight
from q3q.spec import Json, TrialSpec
from q3q.storage.files import write_atomically

if TYPE_CHECKING:
    from q3q.quantize.block import QuantizedBlock

COPIED = (*TOKENIZER_FILES, "generation_config.json")


class BlockSource(Protocol):
    """What the walk's own store offers: blocks as they were stored, if they were."""

    def load(self, index: int) -> "QuantizedBlock | None": ...

    def store(self, block: "QuantizedBlock") -> None: ...


class Exporter(ABC):
    """Writes one trial's checkpoint. A format says how one weight is stored and what config.json says about it.

    seconds: spent packing and writing so far. reordered: whether any weight's groups lie apart, known at the end.
    finished: whether the checkpoint is published; if from the start, another run did it, and nothing is written.

    Raises:
        ExportError: it cannot be written where it is to go.
    """

    name: ClassVar[str]

    def __init__(self, spec: TrialSpec, checkpoint: Checkpoint) -> None:
        check_destination(spec, checkpoint.facts)
        self.spec, self.checkpoint = spec, checkpoint
        self.path = Path(spec.places["export"])
        self.partial = partial_path(self.path)
        self.dtype: torch.dtype = getattr(torch, spec.model["dtype"])
        self.seconds = 0.0
        self.reordered = False
        self._layouts = {name: layout for name, _, layout in layouts(spec, checkpoint.facts)}
        self._whole: dict[
            int, tuple[str, int, int]
        ] = {}  # checksum, size and time of change of files seen to be whole
        self.finished = is_finished(spec)
        if self.finished:
            return
        if not is_ours(self.partial, spec):
            begin_export(self.partial, self._marker())
        # Left by an attempt that did not come to prove it: no loader takes the folder while its files are exchanged.
        (self.partial / "config.json").unlink(missing_ok=True)

    @property
    def folder(self) -> Path:
        """Where the checkpoint is now."""
        return self.path if self.finished else self.partial

    # ------------------------------------------------------------------------------------------ a format's own

    @abstractmethod
    def weight(self, layout: Layout | None, name: str, weight: StoredWeight) -> dict[str, Tensor]:
        """Tensors of one quantized linear by their names on disk. name: `model.layers.0.mlp.up_proj.weight`."""

    @abstractmethod
    def quantization_config(self) -> Json | None:
        """What config.json says about how weights are stored."""

    def other_files(self) -> Mapping[str, bytes]:
        """What else the format wants to lie in the folder."""
        return {}

    # ------------------------------------------------------------------------------------------ block by block

    def holds(self, block: "QuantizedBlock") -> bool:
        """Whether these very codes are written already."""
        if self.finished:  # the proof says whether they are what was evaluated
            return True
        facts = self._facts(block.index)
        return facts is not None and facts.get("codes") == _checksum(block)

    def store(self, block: "QuantizedBlock") -> None:
        """Write one block: its quantized linears, and whatever else it has as numbers in the model's dtype."""
        if self.finished:
            return
        with self._timed():
            weights = block.quantized
            tensors: dict[str, Tensor | Rows] = {}
            shapes = self.checkpoint.facts.block_shapes(block.index)
            plain = {name for name in shapes if name not in weights and name not in block.changed}
            numbers = self.checkpoint.block(block.index, self.dtype, plain) | {
                name: tensor.to(self.dtype) for name, tensor in block.changed.items()
            }
            for name, shape in shapes.items():
                stacked = len(shape) == 3
                for e in range(shape[0] if stacked else 1):
                    full = f"model.layers.{block.index}.{of_expert(name, e) if stacked else name}"
                    if name in weights:
                        tensors |= self.weight(
                            self._layouts[full], full, _of_one_expert(weights[name], e)
                        )
                    else:
                        tensors[full] = numbers[name][e] if stacked else numbers[name]
            apart = any(
                getattr(weight, "group_EI", None) is not None for weight in weights.values()
            )
            self._write(block.index, tensors, {"codes": _checksum(block), "reordered": apart})

    def finish(self, model: Decoder) -> Json:
        """Write what is not in a block, and all that makes the files a checkpoint. Returns their index.

        model: as evaluated.
        """
        with self._timed():
            facts = self.checkpoint.facts
            if not self.finished:
                ends = {"model.embed_tokens.weight": "embedding"} | (
                    {} if facts.tied else {"lm_head.weight": "head"}
                )
                shape = facts.vocab, facts.hidden
                tensors: dict[str, Tensor | Rows] = {
                    "model.norm.weight": model.norm_H.to("cpu", self.dtype)
                }
                for (
                    name,
                    end,
                ) in ends.items():  # a vocabulary is long: a few rows at a time, never all of it
                    tensors[name] = Rows(
                        shape, self.dtype, (part.to("cpu", self.dtype) for part in model.rows(end))
                    )
                self._write(facts.layers, tensors, {})
                self._write_files()
            index: Json = json.loads(
                (self.folder / "model.safetensors.index.json").read_text(encoding="utf-8")
            )
            return index

    def publish(self, card: str) -> None:
        """The folder, proved, takes its name: from here on it is a checkpoint."""
        write_atomically(self.folder / "README.md", card.encode())
        if not self.finished:
            for shard in self.partial.glob("*.safetensors"):
                with shard.open("rb") as file:
                    os.fsync(file.fileno())
            shutil.rmtree(self.partial / "facts", ignore_errors=True)
            for torn in self.partial.glob(".*.partial"):  # of a process that died while it wrote
                torn.unlink(missing_ok=True)
            self.partial.replace(self.path)
            self.finished = True

    def withdraw(self) -> None:
        """What was written is not what was evaluated: nobody shall load it. Another run's, proved by it, stays."""
        if not self.finished:
            forget_export(self.spec)

    def sizes(self) -> dict[str, float]:
        """Bytes of the tensors on disk and, where codes are stored, bits per weight, as the files themselves say."""
        stored = _stored_bytes(self.folder)
        whole = float(sum(stored.values()))
        count, size = 0, 0
        for name, shape, layout in layouts(self.spec, self.checkpoint.facts):
            if layout is not None:
                rows, columns = shape
                count += rows * columns
                size += sum(
                    stored[name.removesuffix("weight") + part]
                    for part in layout.parts(rows, columns)
                )
        if not count:
            return {"export_bytes": whole}
        return {
            "export_bytes": whole,
            "model_bytes": whole,
            "bits_per_weight": 8 * size / count,
            "bits_per_weight_model": 8 * whole / self.checkpoint.facts.parameters,
        }

    # ------------------------------------------------------------------------------------------ files

    def _write(self, index: int, tensors: Mapping[str, Tensor | Rows], facts: Json) -> None:
        """One file, and then its facts."""
        shard, digest = self.partial / self._shard(index), hashlib.sha256()

        def hashed() -> Iterator[bytes]:
            for part in encoded(tensors, {"format": "pt"}):
                digest.update(part)
                yield part

        expected = sum(
            math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors.values()
        )
        write_atomically(
            shard, hashed(), wait=False
        )  # the system brings it to the disk while the walk goes on
        facts |= {"sha256": digest.hexdigest(), "bytes": expected, "names": sorted(tensors)}
        write_atomically(
            self.partial / "facts" / f"{index:03d}.json", json.dumps(facts).encode(), wait=False
        )
        self._whole[index] = digest.hexdigest(), *_state(shard)

    def _facts(self, index: int) -> Json | None:
        """Facts of a file that is there whole."""
        shard = self.partial / self._shard(index)
        try:
            facts: Json = json.loads(
                (self.partial / "facts" / f"{index:03d}.json").read_text(encoding="utf-8")
            )
            state = _state(shard)
            if self._whole.get(index, ("",))[1:] != state:
                with shard.open("rb") as file:
                    self._whole[index] = hashlib.file_digest(file, "sha256").hexdigest(), *state
        except (OSError, ValueError):
            return None
        return facts if self._whole[index][0] == facts.get("sha256") else None

    def _shard(self, index: int) -> str:
        count = self.checkpoint.facts.layers + 1
        return f"model-{index + 1:05d}-of-{count:05d}.safetensors"

    def _write_files(self) -> None:
        count = self.checkpoint.facts.layers + 1
        found = [self._facts(k) for k in range(count)]
        missing = [self._shard(k) for k, facts in enumerate(found) if facts is None]
        if missing:
            raise ExportError(
                f"{self.partial}: {missing[0]} is not there whole; was something removed meanwhile?"
            )
        parts = [facts for facts in found if facts is not None]
        index = {
            "metadata": {"total_size": sum(facts["bytes"] for facts in parts)},
            "weight_map": {
                name: self._shard(k) for k, facts in enumerate(parts) for name in facts["names"]
            },
        }
        self.reordered = any(facts.get("reordered") for facts in parts)
        original = self.checkpoint.folder
        copied = [*(original / name for name in COPIED), *original.glob("LICENSE*")]
        files = {
            **{file.name: file.read_bytes() for file in copied if file.is_file()},
            **self.other_files(),
            "model.safetensors.index.json": json.dumps(index, indent=1).encode(),
            "config.json": json.dumps(self._config(), indent=1).encode(),
        }
        for name, content in files.items():
            write_atomically(self.partial / name, content)

    def _config(self) -> Json:
        config: Json = json.loads(
            (self.checkpoint.folder / "config.json").read_text(encoding="utf-8")
        )
        config.pop("quantization_config", None)
        config |= {"dtype": self.spec.model["dtype"], "torch_dtype": self.spec.model["dtype"]}
        config[EXPORT_KEY] = self._marker()
        described = self.quantization_config()
        return config | ({"quantization_config": described} if described else {})

    def _marker(self) -> Json:
        return {
            "format": self.name,
            "trial": self.spec.id,
            "quantization": self.spec.quantization_id,
            "name": self.spec.name,
            "version": VERSION,
        }

    @contextmanager
    def _timed(self) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - started


class PackingExporter(Exporter):
    """A format that stores codes: most of what one needs."""

    def weight(self, layout: Layout | None, name: str, weight: StoredWeight) -> dict[str, Tensor]:
        if not isinstance(weight, QuantizedWeight) or layout is None:
            raise ExportError(
                f"export={self.name} stores codes of a uniform grid; {name} has none. export=hf stores all"
            )
        scale_OG = weight.scale_EOG[0].to(self.scale_dtype)
        if not torch.equal(scale_OG.float(), weight.scale_EOG[0]):
            raise ExportError(
                f"{name}: its scales are no {self.scale_dtype} numbers, so what was measured is not stored"
            )
        group_I = None if weight.group_EI is None else weight.group_EI[0]
        # A float32 model's scales are numbers of 16 bits too, but a loader that unpacks in the type of the scales, as
        # transformers does with experts, has to find the model's own.
        stored_OG = scale_OG.to(self.dtype) if layout.own_scales else scale_OG
        parts = layout.pack(weight.codes_EOI[0], stored_OG, weight.zero_EOG[0], group_I)
        base = name.removesuffix("weight")
        return {base + part: tensor for part, tensor in parts.items()}

    @property
    def scale_dtype(self) -> torch.dtype:
        """Float16, as GPTQ's and AWQ's readers expect."""
        return torch.float16


class ExportingSink:
    """The walk's sink when its blocks are exported too. A block that was stored, but not exported yet, is exported."""

    def __init__(self, store: BlockSource, exporter: Exporter) -> None:
        self._store, self._exporter = store, exporter

    def load(self, index: int) -> "QuantizedBlock | None":
        block = self._store.load(index)
        if block is not None and not self._exporter.holds(block):
            self._exporter.store(block)
        return block

    def store(self, block: "QuantizedBlock") -> None:
        self._store.store(block)
        self._exporter.store(block)


def open_exporter(spec: TrialSpec, checkpoint: Checkpoint) -> Exporter | None:
    """The exporter that the spec asks for, ready to write; None if it asks for none.

    Raises:
        ExportError: it cannot be written where it is to go.
    """
    if spec.export is None:
        return None
    module, _, name = FORMATS[spec.export].implementation.partition(":")
    kind: type[Exporter] = getattr(import_module(module), name)
    return kind(spec, checkpoint)


def _of_one_expert(weight: StoredWeight, expert: int) -> StoredWeight:
    if weight.shape[0] == 1:
        return weight
    tensors = {name: tensor[expert : expert + 1] for name, tensor in weight.to_tensors().items()}
    made: StoredWeight = type(weight).from_tensors(tensors, weight.facts())  # type: ignore[attr-defined]
    return made


def _checksum(block: "QuantizedBlock") -> str:
    """SHA-256 of all that is written of a block."""
    tensors = {f"changed/{name}": tensor for name, tensor in block.changed.items()}
    for name, weight in block.quantized.items():
        tensors |= {
            f"quantized/{name}/{part}": tensor for part, tensor in weight.to_tensors().items()
        }
    digest = hashlib.sha256()
    for content in encoded(tensors):
        digest.update(content)
    return digest.hexdigest()


def _state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _stored_bytes(folder: Path) -> dict[str, int]:
    """Bytes of every tensor in the folder's files, by name, as their headers say."""
    sizes = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with shard.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            begin, end = entry["data_offsets"]
            sizes[name] = end - begin
    return sizes
