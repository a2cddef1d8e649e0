"""A decoder whose parameters are divided over the ranks of a gang by DeepSpeed's ZeRO-3: the only file to import that.

Every rank holds its share of each tensor. A block, the embedding or the head exists whole, on every rank, while it is
held by somebody: it is gathered when it is asked for. Rank 0 asks, and all ranks do it in the same order (`q3q.team`).

DeepSpeed's own way to gather is a module's hooks, which our staged forward does not pass; so blocks are gathered
explicitly. Its other way to divide a model, AutoTP, crashes on CPUs and refuses Qwen3-MoE.

Shapes: B windows, T tokens, H hidden, V vocabulary.
"""

import gc
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial, wraps
from itertools import count
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.nn import Parameter, ParameterList

from q3q.models.attention import CAUSAL, Attention
from q3q.models.checkpoint import Checkpoint
from q3q.models.decoder import Change, Decoder, Source, block_of, placed
from q3q.models.facts import ModelFacts
from q3q.models.qwen3 import Qwen3Block, rms_norm
from q3q.models.spool import Spool
from q3q.numerics.weights import StoredWeight, numbers
from q3q.team import Team, reaching_others

Method = TypeVar("Method", bound=Callable[..., Any])
_NUMBERS = count()


def in_step(method: Method) -> Method:
    """A method that all ranks must call at the same time: rank 0 has them do it, and gets its own result."""

    @wraps(method)
    def call(self: "ShardedDecoder", *arguments: Any, **own: Any) -> Any:
        if not self.team.leads:
            return method(self, *arguments, **own)
        return self.team.together(
            _on_each, list(self.team.held), self.number, method.__name__, *arguments, **own
        )

    return call  # type: ignore[return-value]


def _on_each(
    team: Team, known: Sequence[int], number: int, name: str, *arguments: Any, **own: Any
) -> Any:
    """known: the models that rank 0 still has; the others' shares of any more are let go of."""
    for gone in set(team.held).difference(known):
        del team.held[gone]
    return getattr(team.held[number], name)(*arguments, **own)


class ShardedBlocks:
    """Blocks that exist while somebody holds them, each gathered from the ranks when it is asked for."""

    def __init__(self, model: "ShardedDecoder") -> None:
        self._model = model

    def __len__(self) -> int:
        return self._model.facts.layers

    def __iter__(self) -> Iterator[Qwen3Block]:
        return (self[k] for k in range(len(self)))

    def __getitem__(self, k: int) -> Qwen3Block:
        block: Qwen3Block = self._model.gather_block(range(len(self))[k])
        return block

    def exchange(self, k: int, source: Source) -> None:
        self._model.exchange_block(range(len(self))[k], source=source)

    def adjust(self, change: Change) -> None:
        """change: goes to other processes, so it must be one that can be pickled."""
        self._model.adjust_blocks(change)

    def copy(self) -> "ShardedBlocks":
        return ShardedBlocks(self._model.copy())


class ShardedDecoder(Decoder):
    """One rank's share of a model. Same numbers as the resident model, bit for bit.

    Text runs block by block, each rank its part of the batches; rank 0 gets all results.

    number: which of the team's models this is. activations: see `Decoder`.
    """

    def __init__(
        self, team: Team, number: int, facts: ModelFacts, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.team, self.number, self.facts = team, number, facts  # type: ignore[misc]
        self.walk: Any = None  # of a rank that follows, while the model is quantized
        self.activations: int | None = None
        self._dtype, self._device = dtype, device
        self._shares: dict[
            tuple[str, int], dict[str, Parameter]
        ] = {}  # of each block ("block", k), and of the ends
        self._changes: list[Change] = []
        self._head_VH: Tensor | None = None
        team.held[number] = self

    @property
    def device(self) -> torch.device:
        return self._device

    @property
    def blocks(self) -> ShardedBlocks:  # type: ignore[override]
        return ShardedBlocks(self)

    @property
    def tied(self) -> bool:
        return self.facts.tied

    @property
    def norm_H(self) -> Tensor:  # type: ignore[override]
        return self._norm_H

    @property
    def embedding_VH(self) -> Tensor:  # type: ignore[override]
        """All of it, gathered anew."""
        embedding: Tensor = self.gather_end("embedding")
        return embedding

    @property
    def head_VH(self) -> Tensor:  # type: ignore[override]
        """Gathered when it is first asked for, and kept until `rest`."""
        if self._head_VH is None:
            self._head_VH = self.gather_end("head")
        return self._head_VH

    def rest(self) -> None:
        self._head_VH = None

    def rows(self, end: str) -> Iterator[Tensor]:
        yield from super().rows("embedding" if self.tied else end)

    def exchange_ends(self, codes: Mapping[str, StoredWeight]) -> None:
        for end, code in codes.items():
            self.exchange_end(end, code=code)
        self.rest()

    def embedded(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """One gathering for all, also for none: ranks that share batches out have different numbers of them."""
        embedding_VH = self.embedding_VH
        for ids_BT in batches:
            yield embedding_VH[ids_BT.to(self.device)]

    def original_head(self) -> Tensor:
        """The head as it was loaded, whatever is in its place now."""
        head: Tensor = self.gather_end("original head")
        return head

    def held_bytes(self) -> int:
        """Bytes of parameters that this rank keeps."""
        shares = [parameter for share in self._shares.values() for parameter in share.values()]
        return self._norm_H.nbytes + sum(parameter.ds_tensor.nbytes for parameter in shares)  # type: ignore[attr-defined]

    def copy(self) -> "ShardedDecoder":
        """Shares what is not exchanged in either. To be asked for by rank 0, as long as it works alone."""
        copied: ShardedDecoder = self.make_copy(next(_NUMBERS))
        return copied

    def states(
        self,
        batches: Sequence[Tensor],
        attend: Callable[[int, int], Attention] | None = None,
        spool: Spool | None = None,
    ) -> Iterator[Tensor]:
        """See `Decoder`. Where each row sees its own past alone, the batches are divided over the ranks."""
        if not self.team.leads or attend is not None:
            yield from self._run(batches, attend, spool)
            return
        with spool or Spool(self.activations) as found:
            self.divide_states(list(batches), found=found)
            yield from found

    def _run(
        self,
        batches: Sequence[Tensor],
        attend: Callable[[int, int], Attention] | None = None,
        spool: Spool | None = None,
    ) -> Iterator[Tensor]:
        """All these batches here, block by block; as many gatherings as there are blocks, whatever the batches."""
        self.rest()
        rope = self.rope
        with spool or Spool(self.activations) as hidden:
            for x_BTH in self.embedded(batches):
                hidden.append(x_BTH)
            for k in range(self.facts.layers):
                block = self.blocks[k]
                for b in range(len(hidden)):
                    hidden[b] = block(hidden[b], rope, CAUSAL if attend is None else attend(k, b))
                del block
            for x_BTH in hidden:
                yield rms_norm(x_BTH, self._norm_H, self.facts.rms_norm_eps)

    # ------------------------------------------------------------------------------------------ in step

    @in_step
    def divide_states(self, batches: Sequence[Tensor], found: Spool | None = None) -> None:
        """Run each batch on one rank; rank 0 puts all results, in order, into `found`."""
        shares = self.team.share([ids_BT.numel() for ids_BT in batches])
        mine = self._run([batches[b] for b in shares[self.team.rank]])
        first = next(mine, None)  # all blocks are gathered by now, also where no batch is mine
        owners = {b: rank for rank, share in enumerate(shares) for b in share}
        for b in range(len(batches)):
            x_BTH = None
            if owners[b] == self.team.rank:
                x_BTH, first = (next(mine) if first is None else first), None
            x_BTH = self.team.sent(x_BTH, owners[b])
            if found is not None:
                found.append(x_BTH)

    @in_step
    def gather_block(self, k: int) -> Qwen3Block:
        weights = _whole(self._shares["block", k])
        block = block_of(self.facts, k, weights)
        for change in self._changes:
            change(k, block)
        return block

    @in_step
    def gather_end(self, end: str) -> Tensor:
        """The whole `embedding`, `head` or `original head`."""
        if (end, 0) not in self._shares:
            end = end.removeprefix("original ")
        return _whole(self._shares["embedding" if self.tied and end == "head" else end, 0])[
            "weight"
        ]

    @in_step
    def exchange_block(self, k: int, source: Source | None = None) -> None:
        """source: rank 0's, weights that are not as they were."""
        weights = source() if self.team.rank == 0 and source is not None else {}
        names = self.team.broadcast(list(weights))
        shapes = self.facts.block_shapes(k)
        self._shares["block", k] |= {
            name: self._share(shapes[name], weights.get(name)) for name in names
        }
        gc.collect()  # DeepSpeed's parameters hold themselves, so what was exchanged would stay for long

    @in_step
    def exchange_end(self, end: str, code: StoredWeight | None = None) -> None:
        whole_VH = None if code is None else numbers(code, self._dtype, self._device)[0]
        if end == "head" or self.tied:
            self._shares.setdefault(("original head", 0), self._shares[end, 0])
        self._shares[end, 0] = {
            "weight": self._share((self.facts.vocab, self.facts.hidden), whole_VH)
        }

    @in_step
    def adjust_blocks(self, change: Change) -> None:
        self._changes.append(change)

    @in_step
    def make_copy(self, number: int) -> "ShardedDecoder":
        other = object.__new__(type(self))
        other.__dict__ |= self.__dict__
        other.number, other._head_VH, other._changes = number, None, list(self._changes)  # type: ignore[misc]
        other._shares = {place: dict(share) for place, share in self._shares.items()}
        self.team.held[number] = other
        return other

    @in_step
    def load(self, checkpoint: Checkpoint | None = None) -> None:
        """Tensor by tensor: rank 0 reads one, all take their shares of it, and it is gone."""
        facts = self.facts

        def share(
            name: str, shape: Sequence[int], read: Callable[[Checkpoint], Tensor]
        ) -> Parameter:
            whole = (
                None
                if checkpoint is None
                else placed(read(checkpoint), name, self._dtype, self._device)
            )
            return self._share(shape, whole)

        ends = {"embedding": Checkpoint.embedding} | (
            {} if facts.tied else {"head": Checkpoint.head}
        )
        for end, read in ends.items():
            self._shares[end, 0] = {"weight": share(end, (facts.vocab, facts.hidden), read)}
        norm_H = None
        if checkpoint is not None:
            norm_H = placed(checkpoint.final_norm(), "final norm", self._dtype, self._device)
        self._norm_H: Tensor = self.team.broadcast(norm_H)
        for k in range(facts.layers):
            self._shares["block", k] = {
                name: share(f"blocks.{k}.{name}", shape, partial(_weight, k, name))
                for name, shape in facts.block_shapes(k).items()
            }

    def _share(self, shape: Sequence[int], whole: Tensor | None) -> Parameter:
        """This rank's part of a tensor that rank 0 has."""
        import deepspeed

        with _plain_tensors(), reaching_others():
            content = torch.empty(shape, dtype=self._dtype, device=self._device)
            if whole is not None:
                content.copy_(whole)
            holder = ParameterList([Parameter(content, requires_grad=False)])
            del content
            deepspeed.zero.Init(
                module=holder, mem_efficient_linear=False
            )  # that would change torch's own `linear`
            return holder[0]


def _weight(k: int, name: str, checkpoint: Checkpoint) -> Tensor:
    return checkpoint.block(k, names=[name])[name]


def load_sharded(
    checkpoint: Checkpoint, dtype: torch.dtype, team: Team, *, activations: int | None = None
) -> ShardedDecoder:
    """Rank 0 reads the checkpoint; the other ranks need no file. At no time is the model whole anywhere.

    To be asked for by rank 0, as long as it works alone.

    Args:
        activations: bytes of hidden states that may be in memory between two blocks on each rank, None for all.

    Raises:
        NumericsError: a weight is not finite, as stored or in `dtype`; it is named.
    """
    model: ShardedDecoder = team.together(
        _begin, next(_NUMBERS), checkpoint.facts, dtype, activations
    )
    model.load(checkpoint=checkpoint)
    return model


def _begin(
    team: Team, number: int, facts: ModelFacts, dtype: torch.dtype, activations: int | None
) -> ShardedDecoder:
    if not team.held and team.rank == 0:
        team.held = WeakValueDictionary()  # a copy that nobody has any more is not kept
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _prepare(device)
    model = ShardedDecoder(team, number, facts, dtype, device)
    model.activations = activations
    return model


def _prepare(device: torch.device) -> None:
    """Let DeepSpeed use the group that there is, without its own kernels, whose building takes a compiler."""
    os.environ.setdefault("LOCAL_RANK", "0")  # each rank sees one GPU
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import deepspeed
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "gloo" if device.type == "cpu" else "nccl"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)


def _whole(share: Mapping[str, Parameter]) -> dict[str, Tensor]:
    """The whole tensors, which live as long as somebody holds them; the ranks keep their shares alone."""
    import deepspeed

    with _plain_tensors(), reaching_others(), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # of torch, about the name of what DeepSpeed calls there
        with deepspeed.zero.GatheredParameters(list(share.values())):
            return {name: parameter.data for name, parameter in share.items()}


@contextmanager
def _plain_tensors() -> Iterator[None]:
    """DeepSpeed exchanges what parameters hold, which torch allows for no tensor that inference mode made."""
    with torch.inference_mode(False), torch.no_grad():
        yield
