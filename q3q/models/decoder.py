"""A whole decoder from a checkpoint: embedding, blocks, final norm, head.

Shapes: B windows, T tokens, H hidden, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear

from q3q.errors import NumericsError
from q3q.models.anatomy import block_class
from q3q.models.attention import CAUSAL, Attention, sent
from q3q.models.checkpoint import Checkpoint, names_on_disk
from q3q.models.facts import ModelFacts
from q3q.models.qwen3 import Qwen3Block, Rope, rms_norm
from q3q.models.spool import Spool
from q3q.numerics.kernels.logsum import has_fused, logsum
from q3q.numerics.linalg import all_finite
from q3q.numerics.weights import StoredWeight, numbers
from q3q.team import SOLO, Team

# Positions whose logits are held at one time on a GPU: a [positions, 151936] float32 slab of 512 is 0.3 GB.
HEAD_CHUNK = 512
# Logits that exist at one time where only likelihoods are wanted: on a GPU, and on a CPU (4 MB).
HEAD_LOGITS, CACHED_LOGITS = 1 << 26, 1 << 20
# Logits that exist at one time where they are wanted themselves, on a CPU: 64 MB, of which a reader makes a few copies.
SLAB_LOGITS = 1 << 24
# Where so few positions leave room there for the whole vocabulary, it goes in one piece.
FEW_POSITIONS = 128
# Rows of embedding and head that are looked at together by whoever goes through them all.
VOCABULARY_ROWS = 16384


# (index, block): what is set on every block, wherever it comes from.
Change = Callable[[int, Qwen3Block], None]
# Where a changed block's weights can be had again: those that differ from the checkpoint's, in the model's dtype.
Source = Callable[[], Mapping[str, Tensor]]


class Blocks(Protocol):
    """The blocks in order, where they are no list: each is made when it is asked for, and none is kept."""

    def __len__(self) -> int: ...

    def __getitem__(self, k: int) -> Qwen3Block: ...

    def __iter__(self) -> Iterator[Qwen3Block]: ...

    def exchange(self, k: int, source: Source) -> None:
        """From here on the k-th is made with the weights that `source` gives."""

    def adjust(self, change: Change) -> None:
        """Apply `change` to every block that is given out from here on."""

    def copy(self) -> "Blocks":
        """The same blocks; what is done to the copy leaves these alone."""


@dataclass
class Decoder:
    """embedding_VH, head_VH (the same tensor where they are tied), norm_H, and the blocks in order.

    activations: bytes of hidden states that may be in memory between two blocks, None for all. team: who shares it;
    number: which of the team's models it is.
    """

    team: ClassVar[Team] = SOLO
    number: ClassVar[int] = 0

    facts: ModelFacts
    embedding_VH: Tensor
    norm_H: Tensor
    head_VH: Tensor
    blocks: list[Qwen3Block] | Blocks
    activations: int | None = None

    @property
    def rope(self) -> Rope:
        return Rope(self.facts, self.device)

    @property
    def device(self) -> torch.device:
        return self.norm_H.device

    @property
    def streamed(self) -> bool:
        """Whether a block costs reading or gathering it: then much text is to go block by block, not batch by batch."""
        return not isinstance(self.blocks, list)

    @property
    def tied(self) -> bool:
        """Whether head and embedding are one tensor."""
        return self.head_VH is self.embedding_VH

    def adjust(self, change: Change) -> None:
        """Set something on every block, also on those that are still to be read."""
        if isinstance(self.blocks, list):
            for k, block in enumerate(self.blocks):
                change(k, block)
        else:
            self.blocks.adjust(change)

    def exchange(self, k: int, block: Qwen3Block | None, source: Source) -> None:
        """Put a changed block in the k-th's place. source: gives the weights in which it differs, again and again; a
        model that keeps its blocks asks it only if there is no `block`.
        """
        if not isinstance(self.blocks, list):
            self.blocks.exchange(k, source)
        else:
            self.blocks[k] = self.blocks[k].with_weights(source()) if block is None else block

    def exchange_ends(self, codes: Mapping[str, StoredWeight]) -> None:
        """Put quantized weights [1, V, H] in the place of `embedding`, `head`; tied, they are both the embedding's."""
        ends = {
            name: numbers(code, self.norm_H.dtype, self.device)[0] for name, code in codes.items()
        }
        tied = self.tied
        self.embedding_VH = ends.get("embedding", self.embedding_VH)
        self.head_VH = self.embedding_VH if tied else ends.get("head", self.head_VH)

    def rows(self, end: str) -> Iterator[Tensor]:
        """All rows of `embedding` or `head`, VOCABULARY_ROWS at a time."""
        yield from {"embedding": self.embedding_VH, "head": self.head_VH}[end].split(
            VOCABULARY_ROWS
        )

    def copy(self) -> "Decoder":
        """The same model; blocks put into the copy leave this one alone."""
        return replace(
            self, blocks=list(self.blocks) if isinstance(self.blocks, list) else self.blocks.copy()
        )

    def rest(self) -> None:
        """Let go of what can be read again when it is asked for: of a streamed model, its head."""

    def embed(self, ids_BT: Tensor) -> Tensor:
        return self.embedding_VH[sent(ids_BT, self.device)]

    def embedded(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """`embed` of each."""
        return (self.embed(ids_BT) for ids_BT in batches)

    def states(
        self,
        batches: Sequence[Tensor],
        attend: Callable[[int, int], Attention] | None = None,
        spool: Spool | None = None,
    ) -> Iterator[Tensor]:
        """Final hidden states [B, T, H] of each batch of ids [B, T], in order and normed: what the head reads.

        A resident model runs batch by batch, each when it is asked for; a streamed one block by block, all batches
        through each. Either way the same batches give the same bits.

        Args:
            attend: (block, batch) -> what its tokens attend to, by default each row its own past. Called for a block's
                batches in order, so that one may hand on to the next.
            spool: where a streamed model's activations lie between blocks, one that holds nothing yet.
        """
        rope = self.rope

        def run(block: Qwen3Block, k: int, b: int, x_BTH: Tensor) -> Tensor:
            return block(x_BTH, rope, CAUSAL if attend is None else attend(k, b))

        if not self.streamed:
            for b, ids_BT in enumerate(batches):
                x_BTH = self.embed(ids_BT)
                for k in range(len(self.blocks)):
                    x_BTH = run(self.blocks[k], k, b, x_BTH)
                yield rms_norm(x_BTH, self.norm_H, self.facts.rms_norm_eps)
            return
        self.rest()
        with spool or Spool(self.activations) as hidden:
            for ids_BT in batches:
                hidden.append(self.embed(ids_BT))
            for k in range(len(self.blocks)):
                block = self.blocks[k]
                for b in range(len(hidden)):
                    hidden[b] = run(block, k, b, hidden[b])
                del block  # before the next one is asked for: one at a time is what fits
            for x_BTH in hidden:
                yield rms_norm(x_BTH, self.norm_H, self.facts.rms_norm_eps)

    def hidden(self, ids_BT: Tensor, attentions: Sequence[Attention] = ()) -> Tensor:
        """`states` of one batch. attentions: one a block if not plainly causal."""
        return next(self.states([ids_BT], (lambda k, b: attentions[k]) if attentions else None))

    def logits(self, hidden_PH: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Float32 logits [up to HEAD_CHUNK, V] of each run of positions, so that no large slab ever exists."""
        rows = HEAD_CHUNK
        if hidden_PH.device.type == "cpu":
            rows = min(rows, max(1, SLAB_LOGITS // self.facts.vocab))
        for start in range(0, hidden_PH.shape[0], rows):
            chunk = slice(start, start + rows)
            yield chunk, linear(hidden_PH[chunk], self.head_VH).float()

    def log_likelihoods(
        self, hidden_PH: Tensor, targets_R: Tensor, positions_R: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Natural log-probability of each target, and whether it is the most likely token; both [R].

        positions_R: the row of hidden_PH that each target is read at, ascending; by default one target a row. Where
        targets and positions are in main memory, nobody waits for a GPU.
        Logits exist for one slab of the vocabulary at a time, small enough to stay in a CPU's cache.
        """
        device, positions, vocabulary = hidden_PH.device, hidden_PH.shape[0], self.head_VH.shape[0]
        positions_R = torch.arange(len(targets_R)) if positions_R is None else positions_R
        rows, numbers = self._slab(device)
        bounds = [*range(0, positions, rows), positions]
        asked = torch.searchsorted(positions_R, torch.tensor(bounds)).tolist()
        targets_R, positions_R = sent(targets_R, device), sent(positions_R, device)
        logsum_P = hidden_PH.new_full((positions,), -torch.inf, dtype=torch.float32)
        highest_P = torch.full_like(logsum_P, -torch.inf)
        chosen_R = logsum_P.new_full((len(targets_R),), torch.nan)
        for (start, stop), (begin, end) in zip(pairwise(bounds), pairwise(asked), strict=True):
            width = max(1, numbers // (stop - start))
            target_R, row_R = targets_R[begin:end], positions_R[begin:end] - start
            for first in range(0, vocabulary, width):
                logits_CS = linear(hidden_PH[start:stop], self.head_VH[first : first + width])
                there_R = (target_R - first).clamp(0, logits_CS.shape[1] - 1)
                here_R = there_R == target_R - first
                chosen_R[begin:end] = torch.where(
                    here_R, logits_CS[row_R, there_R].float(), chosen_R[begin:end]
                )
                slab_C, high_C = logsum(logits_CS)
                highest_P[start:stop] = torch.maximum(highest_P[start:stop], high_C)
                logsum_P[start:stop] = torch.logaddexp(logsum_P[start:stop], slab_C)
        return chosen_R - logsum_P[positions_R], chosen_R == highest_P[positions_R]

    def _slab(self, device: torch.device) -> tuple[int, int]:
        """Positions whose logits exist at one time where only likelihoods are wanted, and how many of these do."""
        vocabulary = self.facts.vocab
        if has_fused(device):
            return HEAD_CHUNK, HEAD_CHUNK * vocabulary
        numbers = CACHED_LOGITS if device.type == "cpu" else HEAD_LOGITS
        whole = numbers // vocabulary
        return min(HEAD_CHUNK, whole) if whole >= FEW_POSITIONS else HEAD_CHUNK, numbers


def load_decoder(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Decoder:
    """The whole model in memory, every weight in `dtype`.

    Raises:
        NumericsError: a weight is not finite, as stored or in `dtype`; it is named.
    """
    facts = checkpoint.facts
    embedding = placed(checkpoint.embedding(), "embedding", dtype, device)
    head = embedding if facts.tied else placed(checkpoint.head(), "head", dtype, device)
    norm = placed(checkpoint.final_norm(), "final norm", dtype, device)
    blocks = [load_block(checkpoint, k, dtype, device) for k in range(facts.layers)]
    return Decoder(facts, embedding, norm, head, blocks)


def load_block(
    checkpoint: Checkpoint,
    k: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    instead: Mapping[str, Tensor] | None = None,
) -> Qwen3Block:
    """One block in memory. instead: weights that are not taken from the checkpoint.

    Raises:
        NumericsError: a weight is not finite, as stored or in `dtype`; it is named.
    """
    facts, instead = checkpoint.facts, instead or {}
    wanted = [name for name in facts.block_shapes(k) if name not in instead]
    weights = checkpoint.block(k, dtype, wanted) | dict(instead)
    for name in list(
        weights
    ):  # one by one, so that no second block exists beside it on its way to the device
        weights[name] = placed(weights.pop(name), f"blocks.{k}.{name}", dtype, device)
    return block_of(facts, k, weights)


def block_of(facts: ModelFacts, k: int, weights: Mapping[str, Tensor]) -> Qwen3Block:
    """The k-th block with these weights. Where the checkpoint says that activations are rounded, those of its sites are
    whose linears it does not leave out.

    Raises:
        CheckpointError: it leaves out a part of a site.
    """
    block, packing = block_class(facts, k)(facts, weights), facts.packing
    if packing is not None and packing.act_bits is not None:
        block.act_bits = packing.act_bits
        block.unrounded = frozenset(
            site.name
            for site in block.sites
            if not packing.rounds(
                name.removesuffix(".weight") for name in names_on_disk(facts, k, site.weights)
            )
        )
    return block


def placed(tensor: Tensor, name: str, dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """The tensor in the model's dtype on its device.

    Raises:
        NumericsError: it is not finite.
    """
    there = tensor.to(device=device, dtype=dtype)
    if not all_finite(there):
        raise NumericsError(
            f"{name.removesuffix('.weight')}: the checkpoint's weights are not finite in {dtype}"
        )
    return there
