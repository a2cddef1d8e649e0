"""Tensors of a GGUF file, read as the numbers that llama.cpp computes with. torch on reading.

llama.cpp turns neighbouring dimensions of a Llama's heads together, and transformers a dimension
of the first half with one of the second; so files hold a Llama's q and k with their rows in
another order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from q3q.errors import CheckpointError
from q3q.models.tensor_files import StoredTensor, readable

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

PLAIN = ("F32", "F16", "BF16")  # types that hold numbers as they are


@dataclass(frozen=True)
class GgufTensor(StoredTensor):
    """A tensor, or one expert's part of one: `read` gives its numbers, float32.

    type: by its name in `gguf.GGMLQuantizationType`, such as `Q4_K`
    name: in the file, for errors
    size: bytes in the file
    heads: of a Llama's q or k, whose rows lie in llama.cpp's order; 0: of others
    table: the tensor whose numbers this one has in a row, one after another; None: itself
    """

    type: str = "F32"
    name: str = ""
    size: int = 0
    heads: int = 0
    table: GgufTensor | None = field(default=None, compare=False)

    @property
    def bits(self) -> int:
        return 8 * self.size

    def flat(self) -> GgufTensor:
        if len(self.shape) == 1:
            return self
        return replace(self, shape=(math.prod(self.shape),), table=self)

    def read(self, first: int = 0, count: int | None = None) -> Tensor:
        """Read numbers, dequantized as llama.cpp does.

        Args:
            first: index of the first entry to read along the first axis.
            count: number of entries to read; None for all.

        Raises:
            CheckpointError: the file cannot be read, or ends too early; or a scale is no finite
                number.
        """
        import torch

        count = self.shape[0] - first if count is None else count
        if self.table is not None:
            columns = self.table.shape[-1]
            row = first // columns
            rows = self.table.read(row, -(-(first + count) // columns) - row)
            return rows.flatten()[first - row * columns :][:count].clone()
        # Rows of a head lie in another order, so whole heads are read.
        step = self.shape[0] // self.heads if self.heads else 1
        start = first // step * step
        stop = -(-(first + count) // step) * step
        numbers = torch.from_numpy(self._numbers(start, stop - start))
        if not bool(torch.isfinite(numbers).all()):
            what = "a number" if self.type in PLAIN else f"a scale of its {self.type} blocks"
            raise CheckpointError(f"{self.shard}: {what} in {self.name} is not a finite number")
        if self.heads:
            pairs = numbers.unflatten(0, (-1, step // 2, 2)).transpose(1, 2)
            numbers = pairs.flatten(0, 2)
        return numbers[first - start :][:count].contiguous()

    def pieces(self, place_N: Tensor, first: int, file: int) -> Iterable[Callable[[], None]]:
        """Read numbers into their place now: what dequantizes them takes several times their bytes.

        So nothing is left for threads.
        """
        place_N.copy_(self.flat().read(first, len(place_N)))
        return ()

    def zero_blocks(self, numbers: Tensor) -> tuple[int, int]:
        """Count the blocks whose scale is 0, so that all their numbers are, and all blocks.

        Pruned weights and tokens that were never trained have such blocks; other weights do not.

        Args:
            numbers: all of the tensor's, as `read` returns them.
        """
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        block = max(32, GGML_QUANT_SIZES[GGMLQuantizationType[self.type]][0])
        numbers = numbers.flatten()
        if numbers.numel() % block:
            block = numbers.numel()
        zero_B = (numbers.view(-1, block) == 0).all(-1)
        return int(zero_B.sum()), len(zero_B)

    def _numbers(self, row: int, rows: int) -> np.ndarray:
        """Read rows as they lie in the file."""
        import numpy as np
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        each = self.size // self.shape[0]
        content = np.empty(rows * each, dtype=np.uint8)
        with readable(self.shard), self.shard.open("rb", buffering=0) as file:
            self._fill(file.fileno(), content.data, self.start + row * each)
        try:
            with np.errstate(all="ignore"):  # numbers that are none are found afterwards
                numbers = dequantize(content.reshape(rows, each), GGMLQuantizationType[self.type])
        except NotImplementedError as error:
            raise CheckpointError(
                f"{self.shard}: {self.name} is of type {self.type}, which holds no weights that "
                "the gguf package can read"
            ) from error
        return np.asarray(numbers, dtype=np.float32).reshape(rows, *self.shape[1:])
