"""A decoder that reads its blocks when they are needed, and keeps none: any size fits.

Shapes: B windows, T tokens, H hidden, V vocabulary.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from q3q.models import heap
from q3q.models.block import Block
from q3q.models.checkpoint import Checkpoint
from q3q.models.decoder import VOCABULARY_ROWS, Change, Decoder, Source, convert_weight, load_block
from q3q.numerics.weights import StoredWeight, numbers


class StreamedBlocks:
    """Blocks that are read at each access, and not kept.

    An access of the k-th block also starts a thread that reads the next one. An exchanged block
    takes its source's weights, and the checkpoint's for the rest.

    Args:
        ahead: read ahead, so that the disk works while the processor does; holds one block more.

    Raises:
        CheckpointError: a file cannot be read, or ends too early.
        NumericsError: a weight is not finite.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        *,
        ahead: bool = True,
    ) -> None:
        self._checkpoint, self._dtype, self._device, self._ahead = checkpoint, dtype, device, ahead
        self._sources: dict[int, Source] = {}
        self._changes: list[Change] = []
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="q3q_read_ahead")
        self._next: tuple[int, Future[Block]] | None = None

    def __len__(self) -> int:
        return self._checkpoint.facts.layers

    def __iter__(self) -> Iterator[Block]:
        return (self[k] for k in range(len(self)))

    def __getitem__(self, k: int) -> Block:
        k = range(len(self))[k]
        expected, self._next = self._next, None
        if expected is not None and expected[0] != k:
            self._drop(expected[1])
            expected = None
        block = self._read(k, self._sources.get(k)) if expected is None else expected[1].result()
        del expected  # it holds the block
        if self._ahead and k + 1 < len(self):
            self._next = k + 1, self._reader.submit(self._read, k + 1, self._sources.get(k + 1))
        for change in self._changes:
            change(k, block)
        return block

    def exchange(self, k: int, source: Source) -> None:
        self._sources[k] = source
        if self._next is not None and self._next[0] == k:  # read before it was exchanged
            self._drop(self._next[1])
            self._next = None

    def adjust(self, change: Change) -> None:
        self._changes.append(change)

    def copy(self) -> "StreamedBlocks":
        other = StreamedBlocks(self._checkpoint, self._dtype, self._device, ahead=self._ahead)
        other._sources, other._changes = dict(self._sources), list(self._changes)
        return other

    def _read(self, k: int, source: Source | None) -> Block:
        heap.return_holes()
        with torch.inference_mode():  # a thread does not inherit it
            changed = None if source is None else source()
            return load_block(self._checkpoint, k, self._dtype, self._device, changed)

    @staticmethod
    def _drop(reading: "Future[Block]") -> None:
        """Cancel a read, or wait for its end: two reads at a time would hold one block too many."""
        if not reading.cancel():
            reading.exception()


class StreamedDecoder(Decoder):
    """A model of which only the final norm stays in memory.

    The embedding is read by rows, the head when it is needed. The numbers are the resident model's,
    bit for bit.

    Args:
        activations: see `Decoder`.
        ahead: see `StreamedBlocks`.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
        *,
        activations: int | None = None,
        ahead: bool = True,
    ) -> None:
        heap.return_large()
        self.facts, self.activations = checkpoint.facts, activations
        self.blocks = StreamedBlocks(checkpoint, dtype, device, ahead=ahead)
        self.norm_H = convert_weight(checkpoint.final_norm(), "final norm", dtype, device)
        self._checkpoint, self._dtype = checkpoint, dtype
        self._codes: dict[str, StoredWeight] = {}  # of exchanged ends
        self._head_VH: Tensor | None = None
        self._last_head: Callable[[], Tensor | None] = lambda: None

    @property
    def embedding_VH(self) -> Tensor:  # type: ignore[override]
        """Return the complete embedding, read at each access unless it is the head."""
        return self.head_VH if self.facts.tied else self._read_end("embedding")

    @property
    def head_VH(self) -> Tensor:  # type: ignore[override]
        """Return the head, read at the first access and kept until `release_head`.

        It is not read again while something else still refers to it.
        """
        if self._head_VH is None:
            self._head_VH = self._last_head()
        if self._head_VH is None:
            self._head_VH = self._read_end(self._origin("head"))
            self._last_head = weakref.ref(self._head_VH)
        return self._head_VH

    @property
    def tied(self) -> bool:
        return self.facts.tied

    def release_head(self) -> None:
        self._head_VH = None

    def exchange_ends(self, codes: Mapping[str, StoredWeight]) -> None:
        self._codes |= codes
        self._head_VH, self._last_head = None, lambda: None

    def original_head(self) -> Tensor:
        """Return the checkpoint's head, even if it was exchanged since."""
        end = self._origin("head")
        return self._read_end(end, {}) if end in self._codes else self.head_VH

    def rows(self, end: str) -> Iterator[Tensor]:
        end = self._origin(end)
        return (
            self._rows(end, start, self._codes)
            for start in range(0, self.facts.vocab, VOCABULARY_ROWS)
        )

    def embed(self, ids_BT: Tensor) -> Tensor:
        ids_U, index_BT = ids_BT.cpu().unique(return_inverse=True)
        if "embedding" in self._codes:
            starts = range(0, self.facts.vocab, VOCABULARY_ROWS)
            rows_UH = torch.cat(
                [
                    part_RH[ids_U[(ids_U >= start) & (ids_U < start + len(part_RH))] - start]
                    for start, part_RH in zip(starts, self.rows("embedding"), strict=True)
                ]
            )
        else:
            name = self.facts.family.embedding
            rows_UH = torch.cat([self._checkpoint.rows(name, i, 1) for i in ids_U.tolist()])
            rows_UH = convert_weight(rows_UH, "embedding", self._dtype, self.device)
        return rows_UH[index_BT.to(self.device)]

    def copy(self) -> "StreamedDecoder":
        assert isinstance(self.blocks, StreamedBlocks)
        other = object.__new__(type(self))
        other.__dict__ |= self.__dict__
        other.blocks, other._codes = self.blocks.copy(), dict(self._codes)
        return other

    def _origin(self, end: str) -> str:
        """Return the name under which an end is stored: a tied head is the embedding."""
        return "embedding" if self.facts.tied else end

    def _read_end(self, end: str, codes: Mapping[str, StoredWeight] | None = None) -> Tensor:
        codes = self._codes if codes is None else codes
        shape = self.facts.vocab, self.facts.hidden
        end_VH = torch.empty(shape, dtype=self._dtype, device=self.device)
        for start in range(0, self.facts.vocab, VOCABULARY_ROWS):
            end_VH[start : start + VOCABULARY_ROWS] = self._rows(end, start, codes)
        return end_VH

    def _rows(self, end: str, start: int, codes: Mapping[str, StoredWeight]) -> Tensor:
        count = min(VOCABULARY_ROWS, self.facts.vocab - start)
        if end in codes:
            return numbers(codes[end].rows(start, start + count), self._dtype, self.device)[0]
        rows_RH = self._checkpoint.rows(self.facts.family.end_name(end), start, count)
        return convert_weight(rows_RH, end, self._dtype, self.device)
