"""A decoder whose blocks are read from the checkpoint when they are asked for, and not kept: any size fits.

Shapes: B windows, T tokens, H hidden, V vocabulary.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from q3q.models import heap
from q3q.models.checkpoint import Checkpoint
from q3q.models.decoder import VOCABULARY_ROWS, Change, Decoder, Source, load_block, placed
from q3q.models.qwen3 import Qwen3Block
from q3q.numerics.weights import StoredWeight, numbers

_ON_DISK = {"embedding": "model.embed_tokens.weight", "head": "lm_head.weight"}


class StreamedBlocks:
    """Blocks that exist while somebody holds them. With the k-th, a thread starts to read the one after it.

    A block that was exchanged is made of what its source gives, and of the checkpoint for the rest.

    Args:
        ahead: whether to read ahead: the disk is then read while the processor works, and memory holds one block more.

    Raises:
        CheckpointError: a file cannot be read, or ends too early. NumericsError: a weight is not finite.
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
        self._next: tuple[int, Future[Qwen3Block]] | None = None

    def __len__(self) -> int:
        return self._checkpoint.facts.layers

    def __iter__(self) -> Iterator[Qwen3Block]:
        return (self[k] for k in range(len(self)))

    def __getitem__(self, k: int) -> Qwen3Block:
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

    def _read(self, k: int, source: Source | None) -> Qwen3Block:
        heap.return_holes()
        with torch.inference_mode():  # a thread does not inherit it
            return load_block(
                self._checkpoint, k, self._dtype, self._device, None if source is None else source()
            )

    @staticmethod
    def _drop(reading: "Future[Qwen3Block]") -> None:
        """Not before it has ended: two reads at a time would be one block too many."""
        if not reading.cancel():
            reading.exception()


class StreamedDecoder(Decoder):
    """Of the model only the final norm stays in memory. The embedding is read by rows, and the head when it is wanted.

    Same numbers as the resident model, bit for bit.

    Args:
        activations: see `Decoder`. ahead: see `StreamedBlocks`.
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
        self.norm_H = placed(checkpoint.final_norm(), "final norm", dtype, device)
        self._checkpoint, self._dtype = checkpoint, dtype
        self._codes: dict[str, StoredWeight] = {}  # of ends that were exchanged
        self._head_VH: Tensor | None = None
        self._last_head: Callable[[], Tensor | None] = lambda: None

    @property
    def embedding_VH(self) -> Tensor:  # type: ignore[override]
        """All of it, read anew unless it is the head."""
        return self.head_VH if self.facts.tied else self._whole("embedding")

    @property
    def head_VH(self) -> Tensor:  # type: ignore[override]
        """Read when it is first asked for, and kept until `rest`; after that not again while somebody else has it."""
        if self._head_VH is None:
            self._head_VH = self._last_head()
        if self._head_VH is None:
            self._head_VH = self._whole(self._origin("head"))
            self._last_head = weakref.ref(self._head_VH)
        return self._head_VH

    @property
    def tied(self) -> bool:
        return self.facts.tied

    def rest(self) -> None:
        self._head_VH = None

    def exchange_ends(self, codes: Mapping[str, StoredWeight]) -> None:
        self._codes |= codes
        self._head_VH, self._last_head = None, lambda: None

    def original_head(self) -> Tensor:
        """The head as the checkpoint has it, whatever is in its place now."""
        return (
            self.head_VH
            if self._origin("head") not in self._codes
            else self._whole(self._origin("head"), {})
        )

    def rows(self, end: str) -> Iterator[Tensor]:
        end = self._origin(end)
        return (
            self._rows(end, start, self._codes)
            for start in range(0, self.facts.vocab, VOCABULARY_ROWS)
        )

    def embed(self, ids_BT: Tensor) -> Tensor:
        wanted_U, place_BT = ids_BT.cpu().unique(return_inverse=True)
        if "embedding" in self._codes:
            rows_UH = torch.cat(
                [
                    part_RH[
                        wanted_U[(wanted_U >= start) & (wanted_U < start + len(part_RH))] - start
                    ]
                    for start, part_RH in zip(
                        range(0, self.facts.vocab, VOCABULARY_ROWS),
                        self.rows("embedding"),
                        strict=True,
                    )
                ]
            )
        else:
            rows_UH = torch.cat(
                [self._checkpoint.rows(_ON_DISK["embedding"], i, 1) for i in wanted_U.tolist()]
            )
            rows_UH = placed(rows_UH, "embedding", self._dtype, self.device)
        return rows_UH[place_BT.to(self.device)]

    def copy(self) -> "StreamedDecoder":
        assert isinstance(self.blocks, StreamedBlocks)
        other = object.__new__(type(self))
        other.__dict__ |= {
            **self.__dict__,
            "blocks": self.blocks.copy(),
            "_codes": dict(self._codes),
        }
        return other

    def _origin(self, end: str) -> str:
        """Under which name an end is stored: tied, the head is the embedding."""
        return "embedding" if self.facts.tied else end

    def _whole(self, end: str, codes: Mapping[str, StoredWeight] | None = None) -> Tensor:
        codes = self._codes if codes is None else codes
        whole_VH = torch.empty(
            self.facts.vocab, self.facts.hidden, dtype=self._dtype, device=self.device
        )
        for start in range(0, self.facts.vocab, VOCABULARY_ROWS):
            whole_VH[start : start + VOCABULARY_ROWS] = self._rows(end, start, codes)
        return whole_VH

    def _rows(self, end: str, start: int, codes: Mapping[str, StoredWeight]) -> Tensor:
        count = min(VOCABULARY_ROWS, self.facts.vocab - start)
        if end in codes:
            return numbers(codes[end].rows(start, start + count), self._dtype, self.device)[0]
        return placed(
            self._checkpoint.rows(_ON_DISK[end], start, count), end, self._dtype, self.device
        )
