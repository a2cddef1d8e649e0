"""Safetensors files: read headers without torch and tensors one by one; write in pieces."""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from q3q.errors import CheckpointError
from q3q.limits import cores

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Shape = tuple[int, ...]

# Bytes of one element, by safetensors' name of its type.
ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
_TORCH_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
}
_COMPARED_AT_ONCE = 1 << 22  # bytes
# Threads that read tensors at most, and bytes that each reads at a time: one thread copies some
# 2 GB/s from the page cache, and a disk of several GB/s wants several requests at once.
MOST_READERS, READ_AT_ONCE = 4, 1 << 22
_HEADER_LIMIT = 100_000_000  # bytes; the format's own limit


@cache
def readers() -> int:
    """Return how many threads read: half the cores, as the others compute meanwhile."""
    return max(1, min(MOST_READERS, cores() // 2))


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a shard, as the shard's header describes it."""

    shard: Path
    dtype: str
    shape: Shape
    start: int  # position of its first byte in the file

    @property
    def bits(self) -> int:
        return 8 * math.prod(self.shape) * ITEM_BYTES[self.dtype]

    @property
    def dtype_name(self) -> str:
        """Its type by torch's name, `bfloat16`."""
        return _TORCH_DTYPES.get(self.dtype, self.dtype)

    def read(self, first: int = 0, count: int | None = None) -> Tensor:
        """Read the tensor into memory of its own.

        Args:
            first: index of the first entry to read along the first axis.
            count: number of entries to read; None for all.

        Raises:
            CheckpointError: the file cannot be read, or ends too early.
        """
        import torch

        shape = self.shape if count is None else (count, *self.shape[1:])
        tensor = torch.empty(shape, dtype=getattr(torch, self.dtype_name))
        before = first * math.prod(self.shape[1:])
        read_into(tensor.view(-1), [(self, before, tensor.numel())])
        return tensor

    def number(self) -> float:
        """Read the first number of a float tensor, without torch.

        Raises:
            CheckpointError: the file cannot be read, or ends too early.
        """
        size = ITEM_BYTES[self.dtype]
        with readable(self.shard), self.shard.open("rb") as file:
            file.seek(self.start)
            content = file.read(size)
        if self.dtype == "BF16":  # the upper half of a float32
            content = b"\0\0" + content
        kind = {"F16": "<e", "F64": "<d"}.get(self.dtype, "<f")
        if len(content) != struct.calcsize(kind):
            raise damaged(self.shard, "it ends too early")
        return float(struct.unpack(kind, content)[0])

    def flat(self) -> StoredTensor:
        """Return it as one axis, of which any stretch can be read."""
        return replace(self, shape=(math.prod(self.shape),))

    def pieces(self, place_N: Tensor, first: int, file: int) -> Iterable[Callable[[], None]]:
        """Return what reads numbers into their place, piece by piece; threads may share the pieces.

        Args:
            place_N: contiguous; if of another type than the tensor, nothing is left for threads.
            first: the first number to read, of the flattened tensor.
            file: the shard, opened.
        """
        import torch

        if place_N.dtype != getattr(torch, self.dtype_name):
            place_N.copy_(self.flat().read(first, len(place_N)))
            return
        if not len(place_N):
            return
        buffer = place_N.view(torch.uint8).numpy().data
        position = self.start + first * place_N.itemsize
        for start in range(0, len(buffer), READ_AT_ONCE):
            piece = buffer[start : start + READ_AT_ONCE]
            yield partial(self._fill, file, piece, position + start)

    def _fill(self, file: int, piece: memoryview, position: int) -> None:
        """Read bytes of an open file; the interpreter's lock is free meanwhile."""
        done = 0
        while done < len(piece):
            with readable(self.shard):
                chunk = os.preadv(file, [piece[done:]], position + done)
            if not chunk:
                raise damaged(self.shard, "it ends too early")
            done += chunk


def read_into(target_N: Tensor, stretches: Iterable[tuple[StoredTensor, int, int]]) -> None:
    """Fill a tensor with stretches of stored ones, one after another, by several threads.

    Args:
        target_N: contiguous.
        stretches: a stored tensor, its first number to read and how many, of it flattened.

    Raises:
        CheckpointError: a file cannot be read, or ends too early.
    """
    with ExitStack() as files:

        @cache
        def opened(shard: Path) -> int:
            with readable(shard):
                return files.enter_context(shard.open("rb", buffering=0)).fileno()

        pieces, before = list[Callable[[], None]](), 0
        for stored, first, count in stretches:
            place_N = target_N[before : before + count]
            pieces += stored.pieces(place_N, first, opened(stored.shard))
            before += count
        if target_N.nbytes <= READ_AT_ONCE:  # threads would cost more than they save
            for read in pieces:
                read()
            return
        # A pool of its own: a fork leaves none of a shared pool's threads.
        with ThreadPoolExecutor(readers()) as pool:
            list(pool.map(lambda read: read(), pieces))


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Name the file that cannot be read.

    Raises:
        CheckpointError: instead of the system's error.
    """
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error


@dataclass(frozen=True)
class Rows:
    """A tensor to write that never exists completely, as its parts along the first axis."""

    shape: Shape
    dtype: torch.dtype
    parts: Iterator[Tensor]


def encode_tensors(
    tensors: Mapping[str, Tensor | Rows], metadata: Mapping[str, str] | None = None
) -> Iterator[bytes]:
    """Yield a safetensors file's content in pieces, wide dtypes first to align all tensors."""
    names = {torch_name: name for name, torch_name in _TORCH_DTYPES.items()}
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    order = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    begin = 0
    for name in order:
        tensor = tensors[name]
        end = begin + math.prod(tensor.shape) * tensor.dtype.itemsize
        kind = names[str(tensor.dtype).removeprefix("torch.")]
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield struct.pack("<Q", len(text)) + text
    for name in order:
        tensor = tensors[name]
        for part in tensor.parts if isinstance(tensor, Rows) else [tensor]:
            yield _bytes(part)


def _bytes(tensor: Tensor) -> bytes:
    """Return the tensor's bytes, without a copy if it is in main memory and contiguous."""
    import torch

    if not tensor.numel():
        return b""
    view: memoryview = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
    return view  # type: ignore[return-value]  # a buffer is enough for files and hashes


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a file into memory.

    Raises:
        CheckpointError: the file is damaged, or cannot be read.
    """
    return {name: stored.read() for name, stored in read_header(path).items()}


def same_bytes(one: StoredTensor, other: StoredTensor) -> bool:
    """Return True if two tensors of one shape and type are equal, byte by byte.

    Raises:
        CheckpointError: a file cannot be read.
    """
    left = math.prod(one.shape) * ITEM_BYTES[one.dtype]
    try:
        with one.shard.open("rb") as first, other.shard.open("rb") as second:
            first.seek(one.start)
            second.seek(other.start)
            while left > 0:
                step = min(left, _COMPARED_AT_ONCE)
                if first.read(step) != second.read(step):
                    return False
                left -= step
    except OSError as error:
        raise CheckpointError(f"{one.shard} cannot be read: {error.strerror}") from error
    return True


def damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged: {reason}. Download or copy it again")


def read_header(shard: Path) -> dict[str, StoredTensor]:
    """Read a safetensors header: 8 bytes of length, then JSON.

    The data follows without gaps, to the last byte of the file.

    Raises:
        CheckpointError: the file is damaged, or cannot be read.
    """

    try:
        size = shard.stat().st_size
        with shard.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
            if length > min(_HEADER_LIMIT, size - 8):
                raise damaged(shard, f"its header cannot fit into its {size} bytes")
            header = json.loads(file.read(length))
    except OSError as error:
        raise CheckpointError(f"{shard} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise damaged(shard, "its header is not JSON") from error
    if not isinstance(header, dict):
        raise damaged(shard, "its header is not a table of tensors")
    header.pop("__metadata__", None)

    stored, spans = {}, []
    for name, entry in header.items():
        match entry:
            case {
                "dtype": str(dtype),
                "shape": [*shape],
                "data_offsets": [int(begin), int(end)],
            } if (
                dtype in ITEM_BYTES
                and all(type(n) is int and n >= 0 for n in shape)
                and end - begin == math.prod(shape) * ITEM_BYTES[dtype]
            ):
                stored[name] = StoredTensor(shard, dtype, tuple(shape), 8 + length + begin)
                spans.append((begin, end))
            case _:
                raise damaged(shard, f"its header's entry for {name!r} makes no sense")
    position = 0
    for begin, end in sorted(spans):
        if begin != position:
            raise damaged(shard, "its header's tensors overlap or leave gaps")
        position = end
    if 8 + length + position != size:
        raise damaged(shard, f"it has {size} bytes, its header says {8 + length + position}")
    return stored
