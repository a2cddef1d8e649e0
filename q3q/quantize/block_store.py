"""Quantized blocks on disk, from which a killed trial resumes."""

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import torch

from q3q.errors import CheckpointError
from q3q.models.tensor_files import encode_tensors, read_tensors
from q3q.quantize.behind import Behind
from q3q.quantize.block import QuantizedBlock
from q3q.quantize.block_file import EncodedBlock, decode, encode
from q3q.spec import Json
from q3q.storage.aside import clear_for_file, clear_for_folder, put_aside
from q3q.storage.claim import ClaimLostError
from q3q.storage.files import (
    FileDigests,
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

    Blocks are written by a thread, at most `behind.MOST` behind the walk. A context manager: all
    are on the disk at its end.

    Args:
        finished: another such folder, read if the first lacks a block.
        identity: of the quantization, so that the blocks of another are not taken for these.
        check_claim: called before a block is written; raises if another process makes these blocks.
    """

    def __init__(
        self,
        folder: Path,
        finished: Path | None = None,
        identity: str = "",
        check_claim: Callable[[], object] = lambda: None,
    ) -> None:
        self._check_claim = check_claim
        self.folder, self.finished, self.identity = folder, finished, identity
        self._stored: set[int] = set()
        self._loaded: set[int] = set()
        self._digests = FileDigests()
        self._behind = Behind(self._write)

    @property
    def reused(self) -> int:
        """The number of blocks that were loaded and not computed here."""
        return len(self._loaded - self._stored)

    @property
    def made(self) -> bool:
        """True if some blocks were computed here."""
        return bool(self._stored)

    def notes(self) -> Json:
        """Return the record's notes: the search for a variant, and the number of reused blocks."""
        search = self.recall("search")
        return ({"search": search} if search else {}) | (
            {"blocks_from_disk": self.reused} if self.reused else {}
        )

    def store(self, block: QuantizedBlock) -> None:
        """Let the thread write a block, once few enough wait for it.

        Raises:
            OSError: an earlier block could not be written.
        """
        self._behind.make_room()
        self._behind.add(encode(block))
        self._stored.add(block.index)

    def settle(self) -> None:
        """Wait until every stored block is on the disk.

        Raises:
            OSError: a block could not be written.
        """
        self._behind.settle()

    def __enter__(self) -> "BlockStore":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.settle()
        else:  # the first error counts; where another process has the trial, nothing is begun
            self._behind.end(drop=isinstance(error, ClaimLostError))

    def _write(self, block: EncodedBlock) -> None:
        """Write a block's two files: the thread's work."""
        block.wait()
        self._check_claim()
        path = _tensor_file(self.folder, block.index)
        digest = self._digests.write(path, encode_tensors(block.tensors))
        facts = {OWNER: self._owner(f"block {block.index}"), "tensors": digest, **block.facts}
        write_atomically(_facts_file(self.folder, block.index), sealed(facts))

    def load(self, index: int, device: torch.device | str = "cpu") -> QuantizedBlock | None:
        """Return a stored block on a device; None if it is missing or damaged."""
        if (waiting := self._behind.find(index)) is not None:
            return waiting.decoded(device)
        for folder in self._folders:
            block = self._read(folder, index, device)
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

    def share(self) -> None:
        """Give the folder of finished blocks those that it lacks, as further names of the files.

        Raises:
            OSError: it could not be given them; e.g. the file system has no hard links.
        """
        assert self.finished is not None
        tensors, facts = self.folder.glob("*.safetensors"), self.folder.glob("*.json")
        for path in sorted(tensors) + sorted(facts):  # the facts vouch for the tensors
            with suppress(FileExistsError):
                (self.finished / path.name).hardlink_to(path)

    def delete(self) -> None:
        self._behind.end(drop=True)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _verified_facts(self, folder: Path, index: int) -> Json | None:
        """Return a block's facts if both its files are whole, else None."""
        path = _tensor_file(folder, index)
        facts = self._facts(_facts_file(folder, index), f"block {index}")
        if facts is None:
            return None
        clear_for_file(path)
        try:
            digest = self._digests.of(path)
        except OSError:  # missing, or it cannot be read
            return None
        if digest != facts.get("tensors"):
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

    def _read(self, folder: Path, index: int, device: torch.device | str) -> QuantizedBlock | None:
        facts = self._verified_facts(folder, index)
        if facts is None:
            return None
        try:
            tensors = read_tensors(_tensor_file(folder, index))
        except CheckpointError:  # moved or damaged at this moment
            return None
        return decode(index, tensors, facts, device)


def _tensor_file(folder: Path, index: int) -> Path:
    return folder / f"block_{index:03d}.safetensors"


def _facts_file(folder: Path, index: int) -> Path:
    return folder / f"block_{index:03d}.json"
