"""Quantized blocks on disk: each one written is a checkpoint that a killed trial goes on from."""

import hashlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from q3q.numerics.weights import stored_weight
from q3q.quantize.walk import QuantizedBlock
from q3q.record import SiteError, write_atomically
from q3q.spec import Json


class BlockStore:
    """A folder with two files a block: tensors, and the facts that vouch for them. Implements the walk's BlockSink.

    The facts are written last and hold the tensors' checksum: a block without them, or that differs from them, was not
    finished and is computed again.

    kept: a folder of the same, where finished blocks may lie already. taken: how many blocks were not computed here.
    """

    def __init__(self, folder: Path, kept: Path | None = None) -> None:
        self.folder = folder
        self.kept = kept
        self.taken = 0

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
        write_atomically(_tensors(self.folder, block.index), content)
        write_atomically(_facts(self.folder, block.index), json.dumps(facts).encode())

    def load(self, index: int) -> QuantizedBlock | None:
        """The block as it was stored, on the CPU, or None if it is not there whole."""
        for folder in (self.folder, self.kept):
            block = None if folder is None else self._read(folder, index)
            if block is not None:
                self.taken += 1
                return block
        return None

    def holds(self, count: int) -> bool:
        """Whether all `count` blocks are there whole, so that nothing has to be calibrated."""
        folders = [folder for folder in (self.folder, self.kept) if folder is not None]
        return all(any(self._read(folder, k) is not None for folder in folders) for k in range(count))

    def remember(self, name: str, facts: Json) -> None:
        """Keep something that was found out beside the blocks, under a name of its own, until they are deleted."""
        write_atomically(self.folder / f"{name}.json", json.dumps(facts).encode())

    def recall(self, name: str) -> Json | None:
        for folder in (self.folder, self.kept):
            if folder is not None and (folder / f"{name}.json").exists():
                facts: Json = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
                return facts
        return None

    def keep(self) -> None:
        """Move finished blocks to where other trials find them; those that lie there already are the same."""
        if self.kept is not None and self.folder.exists():
            self.kept.mkdir(parents=True, exist_ok=True)
            for path in sorted(self.folder.glob("*.safetensors")) + sorted(self.folder.glob("*.json")):
                path.replace(self.kept / path.name)
        self.delete()

    def delete(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _read(self, folder: Path, index: int) -> QuantizedBlock | None:
        try:
            facts: dict[str, Any] = json.loads(_facts(folder, index).read_text(encoding="utf-8"))
            content = _tensors(folder, index).read_bytes()
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
            {name: stored_weight(parts[name], fact) for name, fact in facts["quantized"].items()},
            changed,
            [SiteError(**error) for error in facts["errors"]],
            facts["notes"],
        )


def _tensors(folder: Path, index: int) -> Path:
    return folder / f"block_{index:03d}.safetensors"


def _facts(folder: Path, index: int) -> Path:
    return folder / f"block_{index:03d}.json"
