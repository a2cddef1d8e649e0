"""The head of a GGUF file: its values and where its tensors lie. Without torch.

The package `gguf` has a reader too. It makes an array of each of a vocabulary's 150,000 strings,
which takes seconds, and of a file that was cut short it says only that an index is wrong.
"""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from q3q.errors import CheckpointError
from q3q.models.tensor_files import Shape, damaged

# llama.cpp's word for an architecture -> config.json's `model_type`.
ARCHITECTURES = {
    "llama": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3moe": "qwen3_moe",
}

MAGIC, VERSIONS, ALIGNMENT = b"GGUF", (2, 3), 32
# Types of values by their number, as `struct` writes them; then strings and arrays.
_NUMBERS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
SPLIT, FIRST = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$"), "00001"
_MOST_AXES = 4

GgufValue = bool | int | float | str | list["GgufValue"]


@dataclass(frozen=True)
class GgufEntry:
    """A tensor as the head lists it.

    type: the number of its type, of `gguf.GGMLQuantizationType`
    shape: slowest axis first, as torch has it
    start: position of its first byte in the file
    """

    file: Path
    type: int
    shape: Shape
    start: int


@dataclass(frozen=True)
class GgufHeader:
    """What the heads of a model's files say; a large model may lie in several files."""

    files: tuple[Path, ...]
    values: dict[str, GgufValue]
    tensors: dict[str, GgufEntry]


def read_gguf_header(path: Path) -> GgufHeader:
    """Read the heads of all files of a model, given the first one.

    Raises:
        CheckpointError: a file is missing, damaged, or no GGUF file of a version that is known.
    """
    first = _read_one(path)
    count = first.values.get("split.count", 0)
    if not isinstance(count, int) or count < 2:
        return first
    match = SPLIT.search(path.name)
    if match is None or match[1] != FIRST or int(match[2]) != count:
        raise CheckpointError(
            f"{path} is one of a model's {count} files: give the first one, which is named "
            f"…-00001-of-{count:05d}.gguf, with the others beside it"
        )
    files = [
        path.with_name(f"{path.name[: match.start()]}-{k:05d}-of-{count:05d}.gguf")
        for k in range(1, count + 1)
    ]
    tensors = dict(first.tensors)
    for file in files[1:]:
        tensors |= _read_one(file).tensors
    return GgufHeader(tuple(files), first.values, tensors)


def _read_one(path: Path) -> GgufHeader:
    try:
        with path.open("rb") as file:
            if file.read(4) != MAGIC:
                raise CheckpointError(f"{path} is not a GGUF file: it does not begin with GGUF")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _Head(path, content).read()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (struct.error, UnicodeDecodeError, OverflowError, MemoryError) as error:
        raise damaged(path, "its head ends too early, or makes no sense") from error


class _Head:
    """Reads one file's head from its start."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self.path, self.content, self.position = path, content, len(MAGIC)

    def read(self) -> GgufHeader:
        (version,) = self._take("I")
        if version not in VERSIONS:
            versions = " and ".join(map(str, VERSIONS))
            raise CheckpointError(
                f"{self.path} is a GGUF file of version {version}: q3q reads {versions}"
            )
        tensors, values = self._take("QQ")
        table = {self._string(): self._value(*self._take("I")) for _ in range(values)}
        listed = [self._entry() for _ in range(tensors)]
        alignment = table.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise damaged(self.path, f"its alignment is {alignment!r}")
        data = -(-self.position // alignment) * alignment
        entries = {
            name: GgufEntry(self.path, kind, shape, data + offset)
            for name, kind, shape, offset in listed
        }
        if len(entries) < len(listed):
            raise damaged(self.path, "it lists a tensor twice")
        return GgufHeader((self.path,), table, entries)

    def _take(self, form: str) -> tuple[int, ...]:
        numbers = struct.unpack_from(f"<{form}", self.content, self.position)
        self.position += struct.calcsize(f"<{form}")
        return numbers

    def _string(self) -> str:
        (length,) = self._take("Q")
        end = self.position + length
        if end > len(self.content):
            raise struct.error
        text = self.content[self.position : end].decode()
        self.position = end
        return text

    def _value(self, kind: int) -> GgufValue:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            inner, count = self._take("IQ")
            if inner in _NUMBERS:
                if count > len(self.content):
                    raise struct.error
                return list(self._take(f"{count}{_NUMBERS[inner]}"))
            read_item: Callable[[], GgufValue] = (
                self._string if inner == _STRING else lambda: self._value(inner)
            )
            return [read_item() for _ in range(count)]
        if kind not in _NUMBERS:
            raise damaged(self.path, f"a value is of the unknown type {kind}")
        return self._take(_NUMBERS[kind])[0]

    def _entry(self) -> tuple[str, int, Shape, int]:
        name = self._string()
        (axes,) = self._take("I")
        if axes > _MOST_AXES:
            raise damaged(self.path, f"{name} has {axes} axes")
        fastest_first = self._take(f"{axes}Q")
        kind, offset = self._take("IQ")
        return name, kind, tuple(reversed(fastest_first)), offset


def stored_size(entry: GgufEntry, name: str) -> tuple[str, int]:
    """Return a tensor's type by its name, and its bytes.

    Raises:
        CheckpointError: the type is unknown or its blocks do not fill rows, or the file ends
            before the tensor does.
    """
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    try:
        kind = GGMLQuantizationType(entry.type)
        block, size = GGML_QUANT_SIZES[kind]
    except (ValueError, KeyError) as error:
        raise CheckpointError(
            f"{entry.file}: {name} is of type {entry.type}, which the installed gguf package does "
            "not know: pip install -U gguf, if a newer version does"
        ) from error
    if not entry.shape or entry.shape[-1] % block:
        raise damaged(
            entry.file, f"{name} of shape {list(entry.shape)} has no whole blocks of {kind.name}"
        )
    count = math.prod(entry.shape) // block * size
    if (end := entry.start + count) > (there := entry.file.stat().st_size):
        raise damaged(entry.file, f"it has {there} bytes, and {name} ends at {end}")
    return kind.name, count
