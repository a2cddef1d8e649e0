"""A complete decoder from a checkpoint: embedding, blocks, final norm, head.

Shapes: B windows, T tokens, H hidden, V vocabulary.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear

from q3q.errors import NumericsError
from q3q.kv_scheme import FIXED
from q3q.models.attention import CAUSAL, Attention
from q3q.models.block import Block, Rope
from q3q.models.checkpoint import Checkpoint
from q3q.models.disk_names import names_on_disk
from q3q.models.facts import ModelFacts
from q3q.models.kv_cache import KvRounding
from q3q.models.softmax import supports_varlen
from q3q.models.spool import Spool
from q3q.models.transfer import to_device
from q3q.numerics.kernels.compiler import has_fused
from q3q.numerics.kernels.logsum import logsum
from q3q.numerics.kernels.norm import rms_norm
from q3q.numerics.linalg import all_finite
from q3q.numerics.weights import StoredWeight, numbers
from q3q.scheme import InputRounding
from q3q.team import SOLO, Team

# Positions whose logits a GPU holds at one time: 512 x 151936 float32 are 0.3 GB.
HEAD_CHUNK = 512
# Logits that exist at one time for likelihoods alone: on a GPU, and on a CPU (4 MB).
HEAD_LOGITS, CACHED_LOGITS = 1 << 26, 1 << 20
# Logits that `Decoder.logits` yields at one time on a CPU: 64 MB, which readers copy a few times.
SLAB_LOGITS = 1 << 24
# With at most so many positions in a slab, the vocabulary is not split.
FEW_POSITIONS = 128
# Rows of embedding or head in one piece of `Decoder.rows`.
VOCABULARY_ROWS = 16384


# Sets something on a block, given its index and the block; picklable, for other ranks.
Change = Callable[[int, Block], None]
# Returns the weights of a changed block that differ from the checkpoint's, in the model's dtype.
Source = Callable[[], Mapping[str, Tensor]]


def round_block_cache(kv: KvRounding | None, _: int, block: Block) -> None:
    """Change a block's cache; where the checkpoint brings fixed scales, they stay."""
    own = block.kv
    if kv is not None and own is not None and kv.scheme.scales == own.scheme.scales == FIXED:
        kv = replace(kv, key_scale=own.key_scale, value_scale=own.value_scale)
    block.kv = kv


class Blocks(Protocol):
    """Blocks in order, each made when it is read, and none kept."""

    def __len__(self) -> int: ...

    def __getitem__(self, k: int) -> Block: ...

    def __iter__(self) -> Iterator[Block]: ...

    def exchange(self, k: int, source: Source) -> None:
        """From here on, make the k-th block with `source`'s weights."""

    def adjust(self, change: Change) -> None:
        """Apply `change` to every block that is made from here on."""

    def copy(self) -> "Blocks":
        """Return the same blocks; changes of the copy leave these alone."""


@dataclass
class Decoder:
    """A model in memory; the base class of those that hold only parts of it."""

    team: ClassVar[Team] = SOLO  # the ranks that share the model
    number: ClassVar[int] = 0  # its number among the team's models

    facts: ModelFacts
    embedding_VH: Tensor
    norm_H: Tensor
    head_VH: Tensor  # the embedding itself if they are tied
    blocks: list[Block] | Blocks
    activations: int | None = None  # bytes of hidden states in memory between two blocks; None: all
    pinned: int = 0  # bytes of main memory for those that a GPU does not hold, before files
    kv: KvRounding | None = None  # how the cache of every block stores keys and values

    @property
    def rope(self) -> Rope:
        return Rope(self.facts, self.device)

    @property
    def device(self) -> torch.device:
        return self.norm_H.device

    @property
    def streamed(self) -> bool:
        """True if each access reads or gathers a block, so that text should run block by block."""
        return not isinstance(self.blocks, list)

    @property
    def varlen(self) -> bool:
        """True if trees attend in slices of unequal spans, which have no place for a mask."""
        late = self.kv is not None and self.kv.late
        return supports_varlen(self.device, self.norm_H.dtype) and not late

    @property
    def chunk(self) -> int:
        """Return the tokens whose keys the cache rounds together."""
        return 1 if self.kv is None else self.kv.scheme.chunk

    @property
    def tied(self) -> bool:
        """True if head and embedding are one tensor."""
        return self.head_VH is self.embedding_VH

    def adjust(self, change: Change) -> None:
        """Apply `change` to every block, including those that are not read yet."""
        if isinstance(self.blocks, list):
            for k, block in enumerate(self.blocks):
                change(k, block)
        else:
            self.blocks.adjust(change)

    def round_cache(self, kv: KvRounding | None) -> None:
        """Round keys and values of all blocks from here on; None: no longer."""
        self.kv = kv
        self.adjust(partial(round_block_cache, kv))

    def exchange(self, k: int, block: Block | None, source: Source) -> None:
        """Replace the k-th block.

        Args:
            block: the changed block; a model that does not keep its blocks ignores it.
            source: returns the changed weights, at every call; a model that keeps its blocks calls
                it only if `block` is None.
        """
        if not isinstance(self.blocks, list):
            self.blocks.exchange(k, source)
        else:
            self.blocks[k] = self.blocks[k].with_weights(source()) if block is None else block

    def exchange_ends(self, codes: Mapping[str, StoredWeight]) -> None:
        """Replace `embedding`, `head` by quantized [1, V, H]; if tied, `embedding` is both."""
        dtype, device, tied = self.norm_H.dtype, self.device, self.tied
        ends = {name: numbers(code, dtype, device)[0] for name, code in codes.items()}
        self.embedding_VH = ends.get("embedding", self.embedding_VH)
        self.head_VH = self.embedding_VH if tied else ends.get("head", self.head_VH)

    def rows(self, end: str) -> Iterator[Tensor]:
        """Yield all rows of `embedding` or `head`, VOCABULARY_ROWS at a time."""
        end_VH = {"embedding": self.embedding_VH, "head": self.head_VH}[end]
        yield from end_VH.split(VOCABULARY_ROWS)

    def copy(self) -> "Decoder":
        """Return the same model; blocks replaced in the copy stay in this one."""
        return replace(self, blocks=self.blocks.copy())

    def release_head(self) -> None:
        """Free the head if it can be read or gathered again when it is needed."""

    def embed(self, ids_BT: Tensor) -> Tensor:
        return self.embedding_VH[to_device(ids_BT, self.device)]

    def normed(self, x_BTH: Tensor) -> Tensor:
        """Return hidden states as the head reads them."""
        facts = self.facts
        return rms_norm(x_BTH, self.norm_H, facts.rms_norm_eps, facts.family.gain_offset)

    def embed_batches(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        return (self.embed(ids_BT) for ids_BT in batches)

    def states(
        self,
        batches: Sequence[Tensor],
        attend: Callable[[int, int], Attention] | None = None,
        spool: Spool | None = None,
    ) -> Iterator[Tensor]:
        """Yield each batch's final hidden states [B, T, H], normed as the head reads them.

        A resident model runs batch by batch, each when its states are asked for; a streamed one
        runs all batches through each block. Either way the same batches give the same bits.

        Args:
            batches: ids [B, T] each.
            attend: (block, batch) -> its tokens' attention; by default each row sees its own past.
                Called for a block's batches in order, so that one may pass state to the next.
            spool: an empty spool for a streamed model's activations between two blocks.
        """
        if self.streamed:
            yield from self._block_by_block(batches, attend, spool)
            return
        rope = self.rope
        for b, ids_BT in enumerate(batches):
            x_BTH = self.embed(ids_BT)
            for k in range(len(self.blocks)):
                x_BTH = self.blocks[k](x_BTH, rope, CAUSAL if attend is None else attend(k, b))
            yield self.normed(x_BTH)

    def _block_by_block(
        self,
        batches: Sequence[Tensor],
        attend: Callable[[int, int], Attention] | None = None,
        spool: Spool | None = None,
    ) -> Iterator[Tensor]:
        """`states` that reads each block once, whatever the batches."""
        self.release_head()
        rope = self.rope
        with spool or Spool(self.activations, pinned=self.pinned) as hidden:
            hidden.extend(self.embed_batches(batches))
            for k in range(len(self.blocks)):
                block = self.blocks[k]
                for b in range(len(hidden)):
                    hidden[b] = block(hidden[b], rope, CAUSAL if attend is None else attend(k, b))
                del block  # before the next one is read: only one at a time fits
            for x_BTH in hidden:
                yield self.normed(x_BTH)

    def hidden(self, ids_BT: Tensor, attentions: Sequence[Attention] = ()) -> Tensor:
        """Return `states` of one batch.

        Args:
            attentions: one per block; causal if empty.
        """
        return next(self.states([ids_BT], (lambda k, b: attentions[k]) if attentions else None))

    def logits(self, hidden_PH: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield float32 logits [up to HEAD_CHUNK, V] of each run of positions."""
        rows = HEAD_CHUNK
        if hidden_PH.device.type == "cpu":
            rows = min(rows, max(1, SLAB_LOGITS // self.facts.vocab))
        for start in range(0, hidden_PH.shape[0], rows):
            chunk = slice(start, start + rows)
            yield chunk, linear(hidden_PH[chunk], self.head_VH).float()

    def log_likelihoods(
        self, hidden_PH: Tensor, targets_R: Tensor, positions_R: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return each target's natural log-probability, and whether it is the most likely token.

        Logits exist for one slab of the vocabulary at a time, small enough for a CPU's cache.

        Args:
            targets_R: in main memory, as `positions_R`; then nothing waits for a GPU.
            positions_R: each target's row of hidden_PH, ascending; by default one target a row.

        Returns:
            Both [R].
        """
        device, positions, vocabulary = hidden_PH.device, hidden_PH.shape[0], self.head_VH.shape[0]
        positions_R = torch.arange(len(targets_R)) if positions_R is None else positions_R
        rows, numbers = self._slab(device)
        bounds = [*range(0, positions, rows), positions]
        target_bounds = torch.searchsorted(positions_R, torch.tensor(bounds)).tolist()
        targets_R, positions_R = to_device(targets_R, device), to_device(positions_R, device)
        logsum_P = hidden_PH.new_full((positions,), -torch.inf, dtype=torch.float32)
        highest_P = torch.full_like(logsum_P, -torch.inf)
        chosen_R = logsum_P.new_full((len(targets_R),), torch.nan)
        slabs = zip(pairwise(bounds), pairwise(target_bounds), strict=True)
        for (start, stop), (begin, end) in slabs:
            width = max(1, numbers // (stop - start))
            target_R, row_R = targets_R[begin:end], positions_R[begin:end] - start
            for first in range(0, vocabulary, width):
                logits_CS = linear(hidden_PH[start:stop], self.head_VH[first : first + width])
                column_R = (target_R - first).clamp(0, logits_CS.shape[1] - 1)
                in_slab_R = column_R == target_R - first
                logit_R = logits_CS[row_R, column_R].float()
                chosen_R[begin:end] = torch.where(in_slab_R, logit_R, chosen_R[begin:end])
                slab_C, high_C = logsum(logits_CS)
                highest_P[start:stop] = torch.maximum(highest_P[start:stop], high_C)
                logsum_P[start:stop] = torch.logaddexp(logsum_P[start:stop], slab_C)
        return chosen_R - logsum_P[positions_R], chosen_R == highest_P[positions_R]

    def _slab(self, device: torch.device) -> tuple[int, int]:
        """Return how many positions and logits `log_likelihoods` computes at one time."""
        vocabulary = self.facts.vocab
        if has_fused(device):
            return HEAD_CHUNK, HEAD_CHUNK * vocabulary
        numbers = CACHED_LOGITS if device.type == "cpu" else HEAD_LOGITS
        rows = numbers // vocabulary
        return min(HEAD_CHUNK, rows) if rows >= FEW_POSITIONS else HEAD_CHUNK, numbers


def load_decoder(
    checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> Decoder:
    """Load the complete model into memory, every weight in `dtype`.

    Raises:
        NumericsError: the named weight is not finite, as stored or in `dtype`.
    """
    facts = checkpoint.facts
    embedding = convert_weight(checkpoint.embedding(), "embedding", dtype, device)
    head = embedding if facts.tied else convert_weight(checkpoint.head(), "head", dtype, device)
    norm = convert_weight(checkpoint.final_norm(), "final norm", dtype, device)
    blocks = [load_block(checkpoint, k, dtype, device) for k in range(facts.layers)]
    return Decoder(facts, embedding, norm, head, blocks)


def load_block(
    checkpoint: Checkpoint,
    k: int,
    dtype: torch.dtype,
    device: torch.device | str = "cpu",
    changed: Mapping[str, Tensor] | None = None,
) -> Block:
    """Load one block into memory.

    Args:
        changed: weights that replace the checkpoint's.

    Raises:
        NumericsError: the named weight is not finite, as stored or in `dtype`.
    """
    facts, changed = checkpoint.facts, changed or {}
    stored = [name for name in facts.block_shapes(k) if name not in changed]
    weights = checkpoint.block(k, dtype, stored) | dict(changed)
    for name in list(weights):  # one by one: a second block would not fit on the way to the device
        weights[name] = convert_weight(weights.pop(name), f"blocks.{k}.{name}", dtype, device)
    return build_block(facts, k, weights)


def build_block(facts: ModelFacts, k: int, weights: Mapping[str, Tensor]) -> Block:
    """Build the k-th block from its weights.

    If the checkpoint rounds keys and values in a cache, so does the block. If it rounds
    activations, the block rounds the inputs of its sites, except of those whose linears the
    checkpoint leaves unquantized.

    Raises:
        CheckpointError: the checkpoint leaves out a part of a site.
    """
    block, packing = Block(facts, k, weights), facts.packing
    if packing is None:
        return block
    if packing.kv is not None:
        key, value = (facts.input_numbers.get(facts.on_disk(k, end), 1.0) for end in "kv")
        block.kv = KvRounding(packing.kv, key, value)
    if not packing.rounds_inputs:
        return block

    def rounding(*names: str) -> InputRounding | None:
        linears = [name.removesuffix(".weight") for name in names_on_disk(facts, k, names)]
        numbered = packing.inputs(linears)
        numbers = [facts.input_numbers[name] for name in linears if name in facts.input_numbers]
        if numbered is None or not numbers:
            return numbered
        # The range of all: experts have one each, and servers take the widest, too.
        widest = min(numbers) if numbered.scales == "factor" else max(numbers)
        return replace(numbered, number=widest)

    apart = {name for site in block.sites for name in site.apart if rounding(name) is None}
    roundings = {
        site.name: rounding(*(name for name in site.weights if name not in apart))
        for site in block.sites
    }
    block.unrounded = frozenset(
        apart | {site for site, rounding in roundings.items() if rounding is None}
    )
    kinds = {rounding for rounding in roundings.values() if rounding is not None}
    if len(kinds) == 1 and (kind := next(iter(kinds))).scales == "dynamic":
        block.rounding = kind
    else:
        block.own_rounding = {
            site: rounding for site, rounding in roundings.items() if rounding is not None
        }
    return block


def convert_weight(
    tensor: Tensor, name: str, dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """Return the tensor in the model's dtype on its device.

    Raises:
        NumericsError: the result is not finite.
    """
    tensor = tensor.to(device=device, dtype=dtype)
    if not all_finite(tensor):
        raise NumericsError(
            f"{name.removesuffix('.weight')}: the checkpoint's weights are not finite in {dtype}"
        )
    return tensor
