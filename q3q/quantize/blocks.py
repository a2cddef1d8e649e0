"""Quantized blocks on disk: each one written is a checkpoint that a killed trial goes on from."""

import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from q3q.numerics.weights import QuantizedWeight
from q3q.quantize.walk import QuantizedBlock
from q3q.record import SiteError, write_atomically


class BlockStore:
    """A folder with two files a block: tensors, and the facts that vouch for them. Implements the walk's BlockSink.

    The facts are written last and hold the tensors' checksum: a block without them, or that differs from them, was not
    finished and is computed again.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def store(self, block: QuantizedBlock) -> None:
        tensors = {f"changed/{name}": tensor.contiguous() for name, tensor in block.changed.items()}
        for name, quantized in block.quantized.items():
            tensors |= {f"quantized/{name}/{part}": tensor for part, tensor in quantized.to_tensors().items()}
        content = save({name: tensor.cpu() for name, tensor in tensors.items()})
        facts = {
            "sha256": hashlib.sha256(content).hexdigest(),
            "quantized": {name: quantized.facts() for name, quantized in block.quantized.items()},
            "errors": [asdict(error) for error in block.errors],
            "notes": block.notes,
        }
        write_atomically(self._tensors(block.index), content)
        write_atomically(self._facts(block.index), json.dumps(facts).encode())

    def load(self, index: int) -> QuantizedBlock | None:
        """The block as it was stored, on the CPU, or None if it is not there whole."""
        try:
            facts: dict[str, Any] = json.loads(self._facts(index).read_text(encoding="utf-8"))
            content = self._tensors(index).read_bytes()
        except (FileNotFoundError, ValueError):
            return None
        if hashlib.sha256(content).hexdigest() != facts["sha256"]:
            return None
        parts: dict[str, dict[str, Tensor]] = {name: {} for name in facts["quantized"]}
        changed: dict[str, Tensor] = {}
        for key, tensor in load(content).items():
            kind, name, *part = key.split("/")
            if kind == "changed":
                changed[name] = tensor
            else:
                parts[name][part[0]] = tensor
        return QuantizedBlock(
            index,
            {name: QuantizedWeight.from_tensors(parts[name], fact) for name, fact in facts["quantized"].items()},
            changed,
            [SiteError(**error) for error in facts["errors"]],
            facts["notes"],
        )

    def delete(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _tensors(self, index: int) -> Path:
        return self.folder / f"block_{index:03d}.safetensors"

    def _facts(self, index: int) -> Path:
        return self.folder / f"block_{index:03d}.json"
