"""GGUF, the format of llama.cpp: one file with the tensors, the tokenizer and the model's facts.

While blocks are quantized, their tensors lie in shards as for other formats, linears as the bytes
of their type's blocks. The file is put together from them at the end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from q3q.errors import ExportError
from q3q.export.gguf_layout import GgufBlocks
from q3q.export.gguf_packing import in_blocks, pack_rows
from q3q.export.gguf_vocabulary import vocabulary_of
from q3q.export.gguf_writing import tensors_of, write_model
from q3q.export.tensors import layouts
from q3q.export.writer import Exporter
from q3q.models.checkpoint import Checkpoint, end_tokens, load_tokenizer
from q3q.models.gguf_file import open_gguf
from q3q.models.packed import Layout
from q3q.models.tensor_files import read_header
from q3q.numerics.block_weights import BlockWeight
from q3q.numerics.weights import QuantizedWeight, StoredWeight
from q3q.placement import Trial
from q3q.spec import Json

FILE = "model.gguf"


class GgufExporter(Exporter):
    """Linears in the types of their schemes; all others as numbers, norms and routers in float32.

    Raises:
        ExportError: also if llama.cpp has no tokenizer like the model's.
    """

    name: ClassVar[str] = "gguf"

    def __init__(self, trial: Trial, checkpoint: Checkpoint) -> None:
        # First of all: a tokenizer that llama.cpp lacks is found before anything is written.
        folder, rows = checkpoint.folder, checkpoint.facts.vocab
        self._vocabulary = vocabulary_of(load_tokenizer(folder), rows, end_tokens(folder))
        super().__init__(trial, checkpoint)

    def weight(self, layout: Layout | None, name: str, weight: StoredWeight) -> dict[str, Tensor]:
        blocks = in_blocks(weight) if isinstance(weight, QuantizedWeight) else weight
        expected = layout.type if isinstance(layout, GgufBlocks) else None
        if not isinstance(blocks, BlockWeight) or blocks.format != expected:
            raise ExportError(f"export=gguf cannot store the codes of {name}")
        if not torch.equal(blocks.dequantize(), weight.dequantize()):
            raise ExportError(
                f"{name}: its scales are not float16 numbers, so storing them would change the "
                "weights that were measured"
            )
        return {name: pack_rows(blocks)}

    def quantization_config(self) -> Json | None:
        return None

    def sizes(self) -> dict[str, float]:
        model = open_gguf(self.folder / FILE)
        total = sum(tensor.size for tensor in model.tensors.values())
        linears = {
            name: math.prod(shape)
            for name, shape, layout in layouts(self.spec, self.checkpoint.facts)
            if layout is not None
        }
        sizes = {
            "export_bytes": float(total),
            "model_bytes": float(total),
            "bits_per_weight_model": 8 * total / self.checkpoint.facts.parameters,
        }
        bits = sum(model.tensors[name].bits for name in linears)
        return sizes | ({"bits_per_weight": bits / sum(linears.values())} if linears else {})

    def put_together(self, names: Mapping[str, str], size: int) -> Mapping[str, bytes]:
        """Write the file; the shards, which it was made of, are removed."""
        facts = self.checkpoint.facts
        kinds = {
            name: layout.type
            for name, _, layout in layouts(self.spec, facts)
            if isinstance(layout, GgufBlocks)
        }
        stored = {
            name: tensor
            for shard in sorted({*names.values()})
            for name, tensor in read_header(self.partial / shard).items()
        }
        path, most = self.partial / FILE, max(kinds.values(), key=[*kinds.values()].count)
        unfinished = path.with_suffix(".unfinished")
        write_model(
            unfinished,
            facts,
            self._vocabulary,
            tensors_of(facts, stored, kinds),
            name=str(self.spec.model.name),
            most=most,
        )
        unfinished.replace(path)
        for shard in {*names.values()}:
            (self.partial / shard).unlink()
        return {}
