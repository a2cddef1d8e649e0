"""Writing a checkpoint block by block during the walk: what all formats have in common.

There is one shard a block, one for embedding, final norm and head, and one for parts that q3q does
not run, so memory holds one block whatever the model's size. config.json comes last: without it no
loader takes the folder.
"""

import hashlib
import json
import math
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
    give_final_name,
    is_finished,
    is_ours,
    partial_path,
    path_of,
)
from q3q.export.formats import FORMATS
from q3q.export.marker import CARD, published_files, write_marker
from q3q.export.shards import Shards, stored_bytes
from q3q.export.tensors import cache_scales, layouts
from q3q.models.checkpoint import TOKENIZER_FILES, Checkpoint
from q3q.models.decoder import Decoder
from q3q.models.disk_names import is_stacked, of_expert
from q3q.models.facts import EXPORT_KEY
from q3q.models.model_json import read_json
from q3q.models.packed import Layout
from q3q.models.packed_floats import FloatLayout
from q3q.models.tensor_files import Rows, encode_tensors
from q3q.number_formats import INT
from q3q.numerics.float_weights import FloatWeight
from q3q.numerics.stored_scales import input_factor
from q3q.numerics.weights import QuantizedWeight, StoredWeight
from q3q.placement import Trial
from q3q.spec import Json
from q3q.storage.files import write_atomically

if TYPE_CHECKING:
    from q3q.quantize.block import QuantizedBlock

COPIED = (
    *TOKENIZER_FILES,
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)


class BlockSource(Protocol):
    """The walk's own store of quantized blocks."""

    def load(self, index: int) -> "QuantizedBlock | None": ...

    def store(self, block: "QuantizedBlock") -> None: ...


class Exporter(ABC):
    """Writes one trial's checkpoint; each format's subclass says how a weight is stored.

    Attributes:
        seconds: time spent packing and writing.
        reordered: some weight's groups lie apart; known at the end.
        finished: the checkpoint is published; if another run did so, nothing is written.

    Raises:
        ExportError: the checkpoint cannot be written to its destination.
    """

    name: ClassVar[str]

    def __init__(self, trial: Trial, checkpoint: Checkpoint) -> None:
        check_destination(trial, checkpoint.facts)
        spec = trial.spec
        self.trial, self.spec, self.checkpoint = trial, spec, checkpoint
        self.path = path_of(trial)
        self.partial = partial_path(self.path)
        self.dtype: torch.dtype = getattr(torch, spec.model.dtype)
        self.seconds = 0.0
        self.reordered = False
        self._layouts = {name: layout for name, _, layout in layouts(spec, checkpoint.facts)}
        self._shards = Shards(
            self.partial, checkpoint.facts.layers + (2 if checkpoint.carried else 1)
        )
        self.finished = is_finished(trial)
        if self.finished:
            return
        if not is_ours(self.partial, spec):
            begin_export(self.partial, self._marker())
        # An earlier attempt may have left it; without it no loader takes the folder meanwhile.
        (self.partial / "config.json").unlink(missing_ok=True)

    @property
    def folder(self) -> Path:
        """The checkpoint's present folder."""
        return self.path if self.finished else self.partial

    @abstractmethod
    def weight(self, layout: Layout | None, name: str, weight: StoredWeight) -> dict[str, Tensor]:
        """Return one quantized linear's tensors by their names on disk.

        Args:
            name: the linear's name on disk, `model.layers.0.mlp.up_proj.weight`.
            weight: its codes and scales, [1, O, I].
        """

    @abstractmethod
    def quantization_config(self) -> Json | None:
        """Return config.json's section about how weights are stored."""

    def other_files(self) -> Mapping[str, bytes]:
        """Return the content of further files of the format, by name."""
        return {}

    def put_together(self, names: Mapping[str, str], size: int) -> Mapping[str, bytes]:
        """Return what makes a checkpoint of the shards: the index, by its file's name.

        Args:
            names: each tensor's shard.
        """
        index = {"metadata": {"total_size": size}, "weight_map": names}
        return {"model.safetensors.index.json": json.dumps(index, indent=1).encode()}

    def holds(self, block: "QuantizedBlock") -> bool:
        """Return True if exactly these codes are written already."""
        if self.finished:  # the proof compares them with what was evaluated
            return True
        facts = self._shards.facts(block.index)
        return facts is not None and facts.get("codes") == _checksum(block)

    def store(self, block: "QuantizedBlock") -> None:
        """Write one block: its quantized linears, and its other tensors in the model's dtype."""
        if self.finished:
            return
        with self._timed():
            weights, tensors = block.quantized, dict[str, Tensor | Rows]()
            shapes = self.checkpoint.facts.block_shapes(block.index)
            plain = {name for name in shapes if name not in weights and name not in block.changed}
            numbers = self.checkpoint.block(block.index, self.dtype, plain)
            numbers |= {name: tensor.to(self.dtype) for name, tensor in block.changed.items()}
            sites = self.checkpoint.facts.sites(block.index)
            peaks = {
                name: block.peaks[site.name]
                for site in sites
                if site.name in block.peaks
                for name in site.weights
            }
            for name, shape in shapes.items():
                stacked = is_stacked(name)
                for e in range(shape[0] if stacked else 1):
                    full = self.checkpoint.facts.on_disk(
                        block.index, of_expert(name, e) if stacked else name
                    )
                    if name in weights:
                        weight = _of_one_expert(weights[name], e)
                        layout = self._layouts[full]
                        tensors |= self.weight(layout, full, weight)
                        tensors |= self._input_factor(layout, full, peaks.get(name))
                    else:
                        tensors[full] = numbers[name][e] if stacked else numbers[name]
            unit_scale = torch.ones(1, dtype=self.dtype)  # with which the cache was evaluated
            scales = cache_scales(self.spec, self.checkpoint.facts, block.index)
            tensors |= {name: unit_scale.clone() for name in scales}
            groups = [getattr(weight, "group_EI", None) for weight in weights.values()]
            apart = any(group_EI is not None for group_EI in groups)
            facts = {"codes": _checksum(block), "reordered": apart}
            self._shards.write(block.index, tensors, facts)

    def _input_factor(
        self, layout: Layout | None, name: str, peak: float | None
    ) -> dict[str, Tensor]:
        """Return the stored factor of a linear's input, if its layout has one.

        Raises:
            ExportError: calibration found none.
        """
        if layout is None or not layout.input_parts:
            return {}
        if peak is None:
            raise ExportError(f"{name}: no factor was stored for its input with its block")
        (part,), base = layout.input_parts, name.removesuffix("weight")
        return {base + part: torch.tensor([input_factor(peak, layout.act_format, self.dtype)])}

    def finish(self, model: Decoder) -> Json:
        """Write the tensors outside the blocks and the checkpoint's other files; return the index.

        It is empty for a format that has one file.
        """
        with self._timed():
            if not self.finished:
                facts, norm_H = self.checkpoint.facts, model.norm_H.to("cpu", self.dtype)
                tensors: dict[str, Tensor | Rows] = {facts.family.final_norm: norm_H}
                ends = {facts.family.embedding: "embedding"}
                if not facts.tied:
                    ends[facts.family.head] = "head"
                for name, end in ends.items():  # a few rows at a time: a vocabulary is long
                    rows = (part.to("cpu", self.dtype) for part in model.rows(end))
                    tensors[name] = Rows((facts.vocab, facts.hidden), self.dtype, rows)
                self._shards.write(facts.layers, tensors, {})
                if self.checkpoint.carried:
                    carried = {
                        name: self.checkpoint.as_it_is(name) for name in self.checkpoint.carried
                    }
                    self._shards.write(facts.layers + 1, carried, {})
                self._write_files()
            file = self.folder / "model.safetensors.index.json"
            if not file.is_file():  # the format has one file of its own
                return {}
            return json.loads(file.read_text(encoding="utf-8"))

    def publish(self, card: str) -> None:
        """Write the card and the final marker, and give the proved folder its final name."""
        write_atomically(self.folder / CARD, card.encode())
        if not self.finished:
            self._shards.finish()
            write_marker(self.partial, self._marker(), self._shards.digests())
            give_final_name(self.partial, self.path)
            self.finished = True
        elif published_files(self.path) is None:  # an earlier version's, proved again just now
            write_marker(self.path, self._marker(), {})

    def withdraw(self) -> None:
        """Remove a checkpoint that is not what was evaluated, unless another run published it."""
        if not self.finished:
            forget_export(self.trial)

    def sizes(self) -> dict[str, float]:
        """Return the tensors' bytes and, if codes are stored, bits per weight, from the files.

        The model's are without what it is exported with and does not run.
        """
        stored = stored_bytes(self.folder)
        total = float(sum(stored.values()))
        own = total - sum(stored[name] for name in self.checkpoint.carried)
        count, size = 0, 0
        for name, shape, layout in layouts(self.spec, self.checkpoint.facts):
            if layout is not None:
                count += math.prod(shape)
                base = name.removesuffix("weight")
                size += sum(stored[base + part] for part in layout.parts(*shape))
        sizes = {
            "export_bytes": total,
            "model_bytes": own,
            "bits_per_weight_model": 8 * own / self.checkpoint.facts.parameters,
        }
        return sizes | ({"bits_per_weight": 8 * size / count} if count else {})

    def _write_files(self) -> None:
        shards, shard_of = self._shards.all_facts(), self._shards.name
        names = {name: shard_of(k) for k, facts in enumerate(shards) for name in facts["names"]}
        self.reordered = any(facts.get("reordered") for facts in shards)
        original = self.checkpoint.folder
        copied = [*(original / name for name in COPIED), *original.glob("LICENSE*")]
        files = {
            **{file.name: file.read_bytes() for file in copied if file.is_file()},
            **self.other_files(),
            **self.put_together(names, sum(facts["bytes"] for facts in shards)),
            "config.json": json.dumps(self._config(), indent=1).encode(),
        }
        for name, content in files.items():
            write_atomically(self.partial / name, content)

    def _config(self) -> Json:
        gguf = self.checkpoint.gguf
        config = (
            read_json(self.checkpoint.folder / "config.json") if gguf is None else dict(gguf.config)
        )
        config.pop("quantization_config", None)
        for part in (config, config.get("text_config")):
            if part is not None:
                part |= {"dtype": self.spec.model.dtype, "torch_dtype": self.spec.model.dtype}
                if self.checkpoint.facts.tied != part.get("tie_word_embeddings", False):
                    part["tie_word_embeddings"] = self.checkpoint.facts.tied  # as the files have it
        config[EXPORT_KEY] = self._marker()
        section = self.quantization_config()
        return config | ({"quantization_config": section} if section else {})

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
    """The common part of formats that store codes."""

    def weight(self, layout: Layout | None, name: str, weight: StoredWeight) -> dict[str, Tensor]:
        if layout is None or not isinstance(weight, QuantizedWeight | FloatWeight):
            raise ExportError(
                f"export={self.name} stores codes of a uniform grid; {name} has none. "
                "export=hf stores all"
            )
        if misfit := _misfit(weight, layout):
            raise ExportError(
                f"export={self.name} cannot hold {misfit} ({name}). export=hf stores all"
            )
        if isinstance(weight, QuantizedWeight):
            group_I = None if weight.group_EI is None else weight.group_EI[0]
            scale_OG = self._stored(weight.scale_EOG[0], layout, name)
            parts = layout.pack(weight.codes_EOI[0], scale_OG, weight.zero_EOG[0], group_I)
        else:
            assert isinstance(layout, FloatLayout)
            scale_OG, factor = weight.stored_scale_EOG[0], weight.global_EO
            if scale_OG.is_floating_point():
                scale_OG = self._stored(scale_OG, layout, name)
            row_factor = None if factor is None else factor[0, :1]
            parts = layout.pack_floats(weight.codes_EOI[0], scale_OG, row_factor)
        base = name.removesuffix("weight")
        return {base + part: tensor for part, tensor in parts.items()}

    def _stored(self, scale_OG: Tensor, layout: Layout, name: str) -> Tensor:
        """Return scales in the type in which they are stored.

        Raises:
            ExportError: they are no numbers of this type.
        """
        stored_OG = scale_OG.to(self.scale_dtype)
        if not torch.equal(stored_OG.float(), scale_OG):
            raise ExportError(
                f"{name}: its scales are not {self.scale_dtype} numbers, so storing them would "
                "change the weights that were measured"
            )
        # A float32 model's scales are 16-bit numbers too, but are stored in the model's type for
        # loaders that unpack in the type of the scales, as transformers does with experts.
        return stored_OG.to(self.dtype) if layout.own_scales else stored_OG

    @property
    def scale_dtype(self) -> torch.dtype:
        """Float16, as GPTQ's and AWQ's readers expect."""
        return torch.float16


class ExportingSink:
    """A sink of the walk that exports each block that it stores, or loads and has not exported."""

    def __init__(self, store: BlockSource, exporter: Exporter) -> None:
        self._store, self._exporter = store, exporter

    def load(self, index: int) -> "QuantizedBlock | None":
        block = self._store.load(index)
        if block is not None and not self._exporter.holds(block):
            self._exporter.store(block)
        return block

    def store(self, block: "QuantizedBlock") -> None:
        self._store.store(block)
        self._exporter.store(block.on_cpu())


def open_exporter(trial: Trial, checkpoint: Checkpoint) -> Exporter | None:
    """Return the spec's exporter, ready to write; None if the trial exports nothing.

    Raises:
        ExportError: the checkpoint cannot be written to its destination.
    """
    if trial.spec.export is None:
        return None
    module, _, name = FORMATS[trial.spec.export].implementation.partition(":")
    exporter: type[Exporter] = getattr(import_module(module), name)
    return exporter(trial, checkpoint)


def _misfit(weight: QuantizedWeight | FloatWeight, layout: Layout) -> str | None:
    """Return what of a method's codes the layout has no place for; None if it holds them all."""
    own = weight.format if isinstance(weight, FloatWeight) else INT
    asked = layout.format if isinstance(layout, FloatLayout) else INT
    if own != asked:
        return f"codes of format={own} where format={asked} was asked for"
    if isinstance(weight, FloatWeight):
        return _float_misfit(weight, layout)
    return _whole_misfit(weight, layout)


def _whole_misfit(weight: QuantizedWeight, layout: Layout) -> str | None:
    groups, expected = weight.scale_EOG.shape[2], layout.groups(weight.shape[2])
    if not weight.whole_zeros:
        return "zero points that are not whole numbers within the codes' bits"
    if weight.bits != layout.bits:
        return f"codes of {weight.bits} bits where bits={layout.bits} was asked for"
    if groups != expected:
        return f"{groups} groups a row where group_size={layout.group_size} makes {expected}"
    if layout.symmetric and not weight.symmetric:
        return "asymmetric codes where symmetric=true was asked for"
    return None


def _float_misfit(weight: FloatWeight, layout: Layout) -> str | None:
    groups, expected = weight.stored_scale_EOG.shape[2], layout.groups(weight.shape[2])
    if groups != expected:
        return f"{groups} groups a row where group_size={layout.group_size} makes {expected}"
    if weight.group_EI is not None:
        return "groups of columns that lie apart"
    factor = weight.global_EO
    if factor is not None and not bool((factor == factor[:, :1]).all()):
        return "a factor that differs between the rows of a linear"
    return None


def _of_one_expert(weight: StoredWeight, expert: int) -> StoredWeight:
    return weight if weight.shape[0] == 1 else weight.experts(expert, expert + 1)


def _checksum(block: "QuantizedBlock") -> str:
    """Return the SHA-256 of all tensors that are written of a block."""
    tensors = {f"changed/{name}": tensor for name, tensor in block.changed.items()}
    for name, weight in block.quantized.items():
        parts = weight.to_tensors().items()
        tensors |= {f"quantized/{name}/{part}": tensor for part, tensor in parts}
    tensors |= {f"peaks/{site}": torch.tensor(peak) for site, peak in block.peaks.items()}
    digest = hashlib.sha256()
    for content in encode_tensors(tensors):
        digest.update(content)
    return digest.hexdigest()
