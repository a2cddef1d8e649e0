"""Quantized blocks on disk: each one written is a checkpoint that a killed trial goes on from."""

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from q3q.errors import CheckpointError
from q3q.models.tensor_files import encoded, read_tensors
from q3q.numerics.weights import stored_weight
from q3q.quantize.block import QuantizedBlock
from q3q.record import SiteError
from q3q.spec import Json
from q3q.storage.files import sealed, unsealed, write_atomically


class BlockStore:
    """A folder with two files a block: tensors, and the facts that vouch for them. Implements the walk's BlockSink.

    The facts are written last and hold the tensors' checksum and their own: a block without them, or that differs from
    them, was not finished or is damaged, and is computed again.

    A file's checksum is computed when it is first read, and again only if the file has changed since.

    kept: a folder of the same, where finished blocks may lie already.
    """

    def __init__(self, folder: Path, kept: Path | None = None) -> None:
        self.folder = folder
        self.kept = kept
        self._stored: set[int] = set()
        self._loaded: set[int] = set()
        self._checked: dict[
            Path, tuple[str, int, int]
        ] = {}  # a file's checksum, size and time of change

    @property
    def taken(self) -> int:
        """How many blocks were loaded that were not computed here."""
        return len(self._loaded - self._stored)

    def store(self, block: QuantizedBlock) -> None:
        tensors = {f"changed/{name}": tensor.contiguous() for name, tensor in block.changed.items()}
        for name, quantized in block.quantized.items():
            tensors |= {
                f"quantized/{name}/{part}": tensor
                for part, tensor in quantized.to_tensors().items()
            }
        digest = hashlib.sha256()

        def hashed() -> Iterator[bytes]:
            for part in encoded(tensors):
                digest.update(part)
                yield part

        path = _tensors(self.folder, block.index)
        write_atomically(path, hashed())
        facts = {
            "tensors": digest.hexdigest(),
            "quantized": {name: quantized.facts() for name, quantized in block.quantized.items()},
            "errors": [asdict(error) for error in block.errors],
            "notes": block.notes,
        }
        write_atomically(_facts(self.folder, block.index), sealed(facts))
        self._checked[path] = (digest.hexdigest(), *_state(path))
        self._stored.add(block.index)

    def load(self, index: int) -> QuantizedBlock | None:
        """The block as it was stored, on the CPU, or None if it is not there whole."""
        for folder in self._folders:
            block = self._read(folder, index)
            if block is not None:
                self._loaded.add(index)
                return block
        return None

    def holds(self, count: int) -> bool:
        """Whether all `count` blocks are there whole, so that nothing has to be calibrated."""
        return all(
            any(self._whole(folder, k) is not None for folder in self._folders)
            for k in range(count)
        )

    @property
    def _folders(self) -> list[Path]:
        return [folder for folder in (self.folder, self.kept) if folder is not None]

    def remember(self, name: str, facts: Json) -> None:
        """Keep something that was found out beside the blocks, under a name of its own, until they are deleted."""
        write_atomically(self.folder / f"{name}.json", sealed(facts))

    def recall(self, name: str) -> Json | None:
        for folder in (self.folder, self.kept):
            if folder is not None:
                with suppress(
                    OSError, ValueError
                ):  # not there, or damaged: it has to be found out again
                    return unsealed((folder / f"{name}.json").read_bytes())
        return None

    def keep(self) -> None:
        """Move finished blocks to where other trials find them; those that lie there already are the same."""
        if self.kept is not None and self.folder.exists():
            self.kept.mkdir(parents=True, exist_ok=True)
            for path in sorted(self.folder.glob("*.safetensors")) + sorted(
                self.folder.glob("*.json")
            ):
                path.replace(self.kept / path.name)
        self.delete()

    def delete(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _whole(self, folder: Path, index: int) -> Json | None:
        """The facts of a block that is there whole."""
        path = _tensors(folder, index)
        try:
            facts = unsealed(_facts(folder, index).read_bytes())
            state = _state(path)
            known, *checked = self._checked.get(path, ("",))
            if tuple(checked) != state:
                with path.open("rb") as file:
                    known = hashlib.file_digest(file, "sha256").hexdigest()
                self._checked[path] = (known, *state)
        except (OSError, ValueError):
            return None
        return facts if known == facts.get("tensors") else None

    def _read(self, folder: Path, index: int) -> QuantizedBlock | None:
        facts = self._whole(folder, index)
        if facts is None:
            return None
        parts: dict[str, dict[str, Tensor]] = {name: {} for name in facts["quantized"]}
        changed: dict[str, Tensor] = {}
        try:
            tensors = read_tensors(_tensors(folder, index))
        except CheckpointError:  # moved or damaged at this moment
            return None
        for key, tensor in tensors.items():
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


def _state(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _facts(folder: Path, index: int) -> Path:
    return folder / f"block_{index:03d}.json"
