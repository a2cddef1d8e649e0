"""A list of tensors with a limit on the bytes in memory; the rest lies on disk.

A run over all calibration or evaluation tokens keeps its activations here between two blocks. What
a GPU does not hold goes to main memory first, to as much as the plan reserved there: a GPU writes
and reads it some twenty times as fast as files, and meanwhile the process goes on.
"""

import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from q3q.errors import Q3QError


@dataclass(frozen=True)
class _Spilled:
    """A tensor whose raw bytes are in a file."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class _Moved:
    """A tensor of a device, copied to main memory.

    The copies to and from it are in the order of the device's work, so neither is waited for.
    """

    copy: Tensor
    device: torch.device

    def read(self) -> Tensor:
        return self.copy.to(self.device, non_blocking=True, copy=True)


_LINE = 64  # bytes to which tensors in main memory are aligned
_PIECE_TENSORS = 8  # that a piece of main memory has room for, if there is so much
_PINNED_LIMIT = 1 << 30  # bytes of a pinned piece


class _MainMemory:
    """Main memory for tensors of another device, taken in pieces for several tensors.

    Torch pins memory in powers of two, so a piece of its own for each tensor could take twice as
    much. What a tensor had is not given to another one.
    """

    def __init__(self, limit: int) -> None:
        self._left = limit
        self._free_N = torch.empty(0, dtype=torch.uint8)

    def put(self, tensor: Tensor) -> _Moved | None:
        """Copy a tensor; return None if there is no room for it."""
        size = -(-tensor.nbytes // _LINE) * _LINE
        if size > len(self._free_N) and not self._take_piece(size, tensor.is_cuda):
            return None
        place_N, self._free_N = self._free_N[: tensor.nbytes], self._free_N[size:]
        copy = place_N.view(tensor.dtype).view(tensor.shape)
        return _Moved(copy.copy_(tensor, non_blocking=True), tensor.device)

    def _take_piece(self, size: int, pinned: bool) -> bool:
        piece = min(self._left, max(size, _PIECE_TENSORS * size))
        if pinned and piece:
            piece = min(1 << (piece.bit_length() - 1), max(size, _PINNED_LIMIT))
        if piece < size:
            return False
        self._free_N = torch.empty(piece, dtype=torch.uint8, pin_memory=pinned)
        self._left -= piece
        return True


_Item = Tensor | _Moved | _Spilled


class Spool:
    """Tensors by index, each returned bit for bit and on its device; a context manager.

    The first tensors stay in memory. Readers go through all of them in order, again and again, so
    the least recently used is needed next; keeping the latest instead would read all from disk.

    Args:
        memory: bytes that may be in memory at one time; None for no limit and no files.
        pinned: bytes of main memory that further tensors may take before they go to files; it is
            pinned for tensors of a GPU.
        folder: where to create the folder of files; the system's temporary folder if None.

    Raises:
        Q3QError: the disk is full, or a file cannot be read back. The folder is named.
    """

    def __init__(
        self, memory: int | None = None, folder: Path | None = None, *, pinned: int = 0
    ) -> None:
        self._memory, self._parent, self._pinned = memory, folder, pinned
        self._main_memory = _MainMemory(pinned)
        self._items: list[_Item] = []
        self._in_memory = 0  # bytes
        self._folder: Path | None = None  # removed when the spool is garbage-collected

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> Tensor:
        item = self._items[i]
        if isinstance(item, _Moved):
            return item.read()
        return self._read(i % len(self), item) if isinstance(item, _Spilled) else item

    def __setitem__(self, i: int, tensor: Tensor) -> None:
        i = range(len(self))[i]
        item = self._items[i]
        self._in_memory -= item.nbytes if isinstance(item, Tensor) else 0
        if isinstance(item, _Moved) and _alike(item, tensor):
            item.copy.copy_(tensor, non_blocking=True)
        else:
            self._items[i] = self._keep(i, tensor)

    def append(self, tensor: Tensor) -> None:
        self._items.append(self._keep(len(self), tensor))

    def extend(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            self.append(tensor)

    def __reduce__(self) -> "tuple[Callable[..., Spool], tuple[int | None, int, list[Tensor]]]":
        """Pickle all tensors at once, in memory; the copy has files of its own."""
        return _spool_of, (self._memory, self._pinned, list(self))

    def take(self, other: "Spool") -> None:
        """Append another spool's tensors one by one, and leave it empty."""
        self.extend(other)
        other.close()

    def close(self) -> None:
        """Drop all tensors and remove the files."""
        self._items, self._in_memory = [], 0
        self._main_memory = _MainMemory(self._pinned)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def __enter__(self) -> "Spool":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def spilled(self) -> int:
        """Return the number of tensors on disk."""
        return sum(isinstance(item, _Spilled) for item in self._items)

    @property
    def moved(self) -> int:
        """Return the number of tensors in main memory that belong on their device."""
        return sum(isinstance(item, _Moved) for item in self._items)

    def _keep(self, i: int, tensor: Tensor) -> _Item:
        if self._memory is not None and self._in_memory + tensor.nbytes > self._memory:
            return self._main_memory.put(tensor) or self._write(i, tensor)
        self._in_memory += tensor.nbytes
        # A view would keep the whole tensor that it is a part of.
        return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()

    def _file(self, i: int) -> Path:
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="q3q_spool_", dir=self._parent))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        return self._folder / str(i)

    def _write(self, i: int, tensor: Tensor) -> _Spilled:
        content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        try:
            self._file(i).write_bytes(content.data)
        except OSError as error:
            folder = self._file(i).parent
            raise Q3QError(
                f"activations cannot be written to {folder}: {error.strerror}. TMPDIR= names a "
                "folder on another disk; the same command continues from the last block"
            ) from error
        return _Spilled(tensor.shape, tensor.dtype, tensor.device)

    def _read(self, i: int, spilled: _Spilled) -> Tensor:
        tensor = torch.empty(spilled.shape, dtype=spilled.dtype)
        content = tensor.view(-1).view(torch.uint8).numpy().data
        failure = f"activations cannot be read from {self._file(i)}"
        try:
            with self._file(i).open("rb") as file:
                count = file.readinto(content)
        except OSError as error:
            raise Q3QError(f"{failure}: {error.strerror}") from error
        if count != len(content):
            raise Q3QError(f"{failure}: {count} bytes instead of {len(content)}")
        return tensor.to(spilled.device)


def _alike(item: _Moved, tensor: Tensor) -> bool:
    same = item.copy.dtype == tensor.dtype and item.copy.shape == tensor.shape
    return same and item.device == tensor.device


def _spool_of(memory: int | None, pinned: int, tensors: Iterable[Tensor]) -> Spool:
    spool = Spool(memory, pinned=pinned)
    spool.extend(tensors)
    return spool
