"""Quantized blocks on disk, from which a killed trial resumes."""

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from torch import Tensor

from q3q.errors import CheckpointError
from q3q.models.tensor_files import encode_tensors, read_tensors
from q3q.numerics.weights import stored_weight
from q3q.quantize.block import QuantizedBlock
from q3q.record import SiteError
from q3q.spec import Json
from q3q.storage.aside import clear_for_file, clear_for_folder, put_aside
from q3q.storage.files import (
    FileState,
    file_state,
    flush_folder,
    make_folder,
    read_file,
    sealed,
    unsealed,
    write_atomically,
)

OWNER = "owner"  # key of a file's facts: which block of which quantization they are of


class BlockStore:
    """A folder with two files per block: its tensors, and its facts. The walk's BlockSink.

    The facts are written last, and hold the tensors' checksum, their own, and whose they are. A
    block that lacks them is unfinished. What differs from them is damaged or another trial's: it is
    put aside. Either block is computed again. A file's checksum is computed when it is first read,
    and again only after the file has changed.

    Args:
        folder: where blocks are written.
        finished: another such folder, read if the first lacks a block.
        identity: of the quantization, so that the blocks of another are not taken for these.
    """

    def __init__(self, folder: Path, finished: Path | None = None, identity: str = "") -> None:
        self.folder, self.finished, self.identity = folder, finished, identity
        self._stored: set[int] = set()
        self._loaded: set[int] = set()
        # By file: its state, and its checksum when it had that state.
        self._checksums: dict[Path, tuple[FileState, str]] = {}

    @property
    def reused(self) -> int:
        """The number of blocks that were loaded and not computed here."""
        return len(self._loaded - self._stored)

    def notes(self) -> Json:
        """Return the record's notes: the search for a variant, and the number of reused blocks."""
        search = self.recall("search")
        return ({"search": search} if search else {}) | (
            {"blocks_from_disk": self.reused} if self.reused else {}
        )

    def store(self, block: QuantizedBlock) -> None:
        tensors = {f"changed/{name}": tensor.contiguous() for name, tensor in block.changed.items()}
        for name, quantized in block.quantized.items():
            tensors |= {
                f"quantized/{name}/{part}": tensor
                for part, tensor in quantized.to_tensors().items()
            }
        digest = hashlib.sha256()

        def hashed() -> Iterator[bytes]:
            for part in encode_tensors(tensors):
                digest.update(part)
                yield part

        path = _tensor_file(self.folder, block.index)
        write_atomically(path, hashed())
        facts = {
            OWNER: self._owner(f"block {block.index}"),
            "tensors": digest.hexdigest(),
            "quantized": {name: quantized.facts() for name, quantized in block.quantized.items()},
            "errors": [asdict(error) for error in block.errors],
            "notes": block.notes,
        }
        write_atomically(_facts_file(self.folder, block.index), sealed(facts))
        self._checksums[path] = (file_state(path), digest.hexdigest())
        self._stored.add(block.index)

    def load(self, index: int) -> QuantizedBlock | None:
        """Return a stored block, on the CPU; None if it is missing or damaged."""
        for folder in self._folders:
            block = self._read(folder, index)
            if block is not None:
                self._loaded.add(index)
                return block
        return None

    def holds(self, count: int) -> bool:
        """Return True if the first `count` blocks are there whole: nothing has to be calibrated."""
        return all(
            any(self._verified_facts(folder, k) is not None for folder in self._folders)
            for k in range(count)
        )

    @property
    def _folders(self) -> list[Path]:
        return [folder for folder in (self.folder, self.finished) if folder is not None]

    def remember(self, name: str, facts: Json) -> None:
        """Write named facts beside the blocks; `delete` deletes them too."""
        write_atomically(self.folder / f"{name}.json", sealed(facts | {OWNER: self._owner(name)}))

    def recall(self, name: str) -> Json | None:
        """Return what `remember` wrote; None if it is missing or damaged."""
        for folder in self._folders:
            facts = self._facts(folder / f"{name}.json", name)
            if facts is not None:
                return facts
        return None

    def keep(self) -> None:
        """Move all files to the folder of finished blocks; those already there are equal."""
        if self.finished is not None and self.folder.is_dir():
            clear_for_folder(self.finished)
            make_folder(self.finished)
            tensors, facts = self.folder.glob("*.safetensors"), self.folder.glob("*.json")
            for path in sorted(tensors) + sorted(facts):
                clear_for_file(self.finished / path.name)
                path.replace(self.finished / path.name)
            flush_folder(self.finished)
        self.delete()

    def delete(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _verified_facts(self, folder: Path, index: int) -> Json | None:
        """Return a block's facts if both its files are whole, else None."""
        path = _tensor_file(folder, index)
        facts = self._facts(_facts_file(folder, index), f"block {index}")
        if facts is None:
            return None
        clear_for_file(path)
        try:
            state = file_state(path)
            checked_state, checksum = self._checksums.get(path, (None, ""))
            if checked_state != state:
                with path.open("rb") as file:
                    checksum = hashlib.file_digest(file, "sha256").hexdigest()
                self._checksums[path] = (state, checksum)
        except OSError:  # missing, or it cannot be read
            return None
        if checksum != facts.get("tensors"):
            put_aside(path, "is damaged or another trial's, by its checksum")
            return None
        return facts

    def _facts(self, path: Path, name: str) -> Json | None:
        """Return the facts in a file without their owner; None if it is missing or put aside."""
        try:
            facts = unsealed(read_file(path))
            owner = facts.pop(OWNER, self._owner(name))  # older versions wrote none
            if owner != self._owner(name):
                raise ValueError(f"it is {owner}")
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            put_aside(path, f"cannot be read ({error})")
            return None
        return facts

    def _owner(self, name: str) -> str:
        return f"{name} of {self.identity}"

    def _read(self, folder: Path, index: int) -> QuantizedBlock | None:
        facts = self._verified_facts(folder, index)
        if facts is None:
            return None
        parts: dict[str, dict[str, Tensor]] = {name: {} for name in facts["quantized"]}
        changed: dict[str, Tensor] = {}
        try:
            tensors = read_tensors(_tensor_file(folder, index))
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


def _tensor_file(folder: Path, index: int) -> Path:
    return folder / f"block_{index:03d}.safetensors"


def _facts_file(folder: Path, index: int) -> Path:
    return folder / f"block_{index:03d}.json"
