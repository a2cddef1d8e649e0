"""A list of tensors of which only so many bytes are in memory; the others lie on disk.

What runs over all calibration or evaluation tokens block by block keeps their activations here between two blocks.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from q3q.errors import Q3QError


@dataclass(frozen=True)
class _Spilled:
    """What a file of raw bytes was."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device


class Spool:
    """Tensors by number, each as it was put in, bit for bit and on its device. Also a context manager: `close`.

    The first ones stay in memory. They are gone through in order, again and again: what was used longest ago is what
    is needed next, and keeping the latest instead would read every one of them from disk.

    Args:
        memory: bytes that may be in memory at one time; None for all, and no file is ever made.
        folder: where the folder with the files is made; the system's place for temporary files if None.

    Raises:
        Q3QError: the disk is full, or a file cannot be read back. The folder is named.
    """

    def __init__(self, memory: int | None = None, folder: Path | None = None) -> None:
        self._memory, self._parent = memory, folder
        self._items: list[Tensor | _Spilled] = []
        self._held = 0  # bytes in memory
        self._folder: tempfile.TemporaryDirectory[str] | None = (
            None  # removes itself when nobody holds it any more
        )

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self)))

    def __getitem__(self, i: int) -> Tensor:
        item = self._items[i]
        return self._read(i % len(self), item) if isinstance(item, _Spilled) else item

    def __setitem__(self, i: int, tensor: Tensor) -> None:
        i = range(len(self))[i]
        self._forget(i)
        self._items[i] = self._keep(i, tensor)

    def append(self, tensor: Tensor) -> None:
        self._items.append(self._keep(len(self), tensor))

    def __reduce__(self) -> "tuple[Callable[..., Spool], tuple[int | None, list[Tensor]]]":
        """A copy for another process has files of its own there. While it is made, and read, all is in memory."""
        return _filled, (self._memory, list(self))

    def take(self, other: "Spool") -> None:
        """Append what another one holds, one by one; it is left empty."""
        for tensor in other:
            self.append(tensor)
        other.close()

    def close(self) -> None:
        """Let go of all tensors, and remove the files."""
        self._items, self._held = [], 0
        if self._folder is not None:
            self._folder.cleanup()
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
        """How many lie on disk."""
        return sum(isinstance(item, _Spilled) for item in self._items)

    def _keep(self, i: int, tensor: Tensor) -> Tensor | _Spilled:
        if self._memory is not None and self._held + tensor.nbytes > self._memory:
            return self._write(i, tensor)
        self._held += tensor.nbytes
        # A view would keep all of the tensor that it is a part of.
        return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()

    def _forget(self, i: int) -> None:
        item = self._items[i]
        if isinstance(item, Tensor):
            self._held -= item.nbytes

    def _file(self, i: int) -> Path:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="q3q_spool_", dir=self._parent)
        return Path(self._folder.name) / str(i)

    def _write(self, i: int, tensor: Tensor) -> _Spilled:
        content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        try:
            self._file(i).write_bytes(content.data)
        except OSError as error:
            raise Q3QError(
                f"activations cannot be written to {self._file(i).parent}: {error.strerror}"
            ) from error
        return _Spilled(tensor.shape, tensor.dtype, tensor.device)

    def _read(self, i: int, what: _Spilled) -> Tensor:
        tensor = torch.empty(what.shape, dtype=what.dtype)
        content = tensor.view(-1).view(torch.uint8).numpy().data
        try:
            with self._file(i).open("rb") as file:
                count = file.readinto(content)
        except OSError as error:
            raise Q3QError(
                f"activations cannot be read from {self._file(i)}: {error.strerror}"
            ) from error
        if count != len(content):
            raise Q3QError(
                f"activations cannot be read from {self._file(i)}: {count} bytes instead of {len(content)}"
            )
        return tensor.to(what.device)


def _filled(memory: int | None, tensors: Sequence[Tensor]) -> Spool:
    spool = Spool(memory)
    for tensor in tensors:
        spool.append(tensor)
    return spool
