"""A decoder whose parameters DeepSpeed's ZeRO-3 divides over the ranks of a gang.

No other file imports DeepSpeed. Every rank holds its share of each tensor. A block, the embedding
or the head is gathered on every rank when it is needed, and lives as long as it is referenced.
Rank 0 decides, and all ranks gather in the same order (`q3q.team`).

DeepSpeed gathers in a module's hooks, which our staged forward does not run; so blocks are gathered
explicitly. Its other way to divide a model, AutoTP, crashes on CPUs and refuses Qwen3-MoE.

Shapes: B windows, T tokens, H hidden, V vocabulary.
"""

import gc
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial, wraps
from itertools import count
from typing import Any, TypeVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.nn import Parameter, ParameterList

from q3q.errors import CheckpointError, NumericsError, Q3QError
from q3q.models.attention import Attention
from q3q.models.block import Block
from q3q.models.checkpoint import Checkpoint
from q3q.models.decoder import (
    Change,
    Decoder,
    Source,
    build_block,
    convert_weight,
    round_block_cache,
)
from q3q.models.facts import ModelFacts
from q3q.models.kv_cache import KvRounding
from q3q.models.parts import Part, block_part, block_weight, end_part, seen_by_all
from q3q.models.spool import Spool
from q3q.numerics.weights import StoredWeight, numbers
from q3q.team import Team, exchanging

Method = TypeVar("Method", bound=Callable[..., Any])
_NUMBERS = count()


def in_step(method: Method) -> Method:
    """Decorate a method that all ranks must call at once: rank 0's call runs it on all of them."""

    @wraps(method)
    def call(self: "ShardedDecoder", *arguments: Any, **own: Any) -> Any:
        if not self.team.leads:
            return method(self, *arguments, **own)
        return self.team.run_on_all(
            _on_each, list(self.team.models), self.number, method.__name__, *arguments, **own
        )

    return call  # type: ignore[return-value]


def _on_each(
    team: Team, numbers: Sequence[int], number: int, name: str, *arguments: Any, **own: Any
) -> Any:
    """Call a model's method, after freeing this rank's shares of models that rank 0 has freed.

    Args:
        numbers: rank 0's models.
    """
    for freed in set(team.models).difference(numbers):
        del team.models[freed]
    return getattr(team.models[number], name)(*arguments, **own)


class ShardedBlocks:
    """Blocks that are gathered from the ranks at each access, and not kept."""

    def __init__(self, model: "ShardedDecoder") -> None:
        self._model = model

    def __len__(self) -> int:
        return self._model.facts.layers

    def __iter__(self) -> Iterator[Block]:
        return (self[k] for k in range(len(self)))

    def __getitem__(self, k: int) -> Block:
        return self._model.gather_block(range(len(self))[k])

    def exchange(self, k: int, source: Source) -> None:
        self._model.exchange_block(range(len(self))[k], source=source)

    def adjust(self, change: Change) -> None:
        """See `Blocks`. `change` goes to other processes, so pickle must support it."""
        self._model.adjust_blocks(change)

    def copy(self) -> "ShardedBlocks":
        return ShardedBlocks(self._model.copy())


class ShardedDecoder(Decoder):
    """One rank's share of a model, with the resident model's numbers, bit for bit.

    Text runs block by block, each rank running a part of the batches; rank 0 gets all results.
    """

    def __init__(
        self, team: Team, number: int, facts: ModelFacts, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.team, self.number, self.facts = team, number, facts  # type: ignore[misc]
        self.walk: Any = None  # a follower's, while the model is quantized
        self.activations: int | None = None
        self._dtype, self._device = dtype, device
        # By ("block", k), and (name of an end, 0).
        self._shares: dict[tuple[str, int], dict[str, Parameter]] = {}
        self._changes: list[Change] = []
        self._head_VH: Tensor | None = None
        team.models[number] = self

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
        """Return the complete embedding, gathered at each access."""
        return self.gather_end("embedding")

    @property
    def head_VH(self) -> Tensor:  # type: ignore[override]
        """Return the head, gathered at the first access and kept until `release_head`."""
        if self._head_VH is None:
            self._head_VH = self.gather_end("head")
        return self._head_VH

    def release_head(self) -> None:
        self._head_VH = None

    def rows(self, end: str) -> Iterator[Tensor]:
        yield from super().rows("embedding" if self.tied else end)

    def exchange_ends(self, codes: Mapping[str, StoredWeight]) -> None:
        for end, code in codes.items():
            self.exchange_end(end, code=code)
        self.release_head()

    def embed_batches(self, batches: Sequence[Tensor]) -> Iterator[Tensor]:
        """Embed all batches after gathering once, also for no batches: all ranks must gather."""
        embedding_VH = self.embedding_VH
        for ids_BT in batches:
            yield embedding_VH[ids_BT.to(self.device)]

    def original_head(self) -> Tensor:
        """Return the head as it was loaded, even if it was replaced since."""
        return self.gather_end("original head")

    def copy(self) -> "ShardedDecoder":
        """Return a copy that shares all parameters until replaced; for rank 0, working alone."""
        return self.make_copy(next(_NUMBERS))

    def states(
        self,
        batches: Sequence[Tensor],
        attend: Callable[[int, int], Attention] | None = None,
        spool: Spool | None = None,
    ) -> Iterator[Tensor]:
        """See `Decoder`. The ranks divide the batches if each row sees its own past alone."""
        if not self.team.leads or attend is not None:
            yield from self._block_by_block(batches, attend, spool)
            return
        with spool or Spool(self.activations) as results:
            self.divide_states(list(batches), results=results)
            yield from results

    @in_step
    def divide_states(self, batches: Sequence[Tensor], results: Spool | None = None) -> None:
        """Run each batch on one rank; rank 0 appends all results, in order, to `results`."""
        shares = self.team.divide([ids_BT.numel() for ids_BT in batches])
        own = self._block_by_block([batches[b] for b in shares[self.team.rank]])
        first = next(own, None)  # gathers all blocks, even if this rank has no batch
        owners = {b: rank for rank, share in enumerate(shares) for b in share}
        for b in range(len(batches)):
            x_BTH = None
            if owners[b] == self.team.rank:
                x_BTH, first = (next(own) if first is None else first), None
            x_BTH = self.team.send(x_BTH, owners[b])
            if results is not None:
                results.append(x_BTH)

    @in_step
    def gather_block(self, k: int) -> Block:
        weights = _gathered(self._shares["block", k])
        block = build_block(self.facts, k, weights)
        for change in self._changes:
            change(k, block)
        return block

    @in_step
    def gather_end(self, end: str) -> Tensor:
        """Return the complete `embedding`, `head` or `original head`."""
        if (end, 0) not in self._shares:
            end = end.removeprefix("original ")
        stored = "embedding" if self.tied and end == "head" else end
        return _gathered(self._shares[stored, 0])["weight"]

    @in_step
    def exchange_block(self, k: int, source: Source | None = None) -> None:
        """Replace the weights of a block that rank 0's `source` returns."""
        weights = source() if self.team.rank == 0 and source is not None else {}
        names = self.team.broadcast(list(weights))
        shapes = self.facts.block_shapes(k)
        shares = {name: self._share(shapes[name], weights.get(name)) for name in names}
        self._shares["block", k] |= shares
        gc.collect()  # DeepSpeed's parameters refer to themselves; the old ones would stay

    @in_step
    def exchange_end(self, end: str, code: StoredWeight | None = None) -> None:
        weight_VH = None if code is None else numbers(code, self._dtype, self._device)[0]
        if end == "head" or self.tied:
            self._shares.setdefault(("original head", 0), self._shares[end, 0])
        share = self._share((self.facts.vocab, self.facts.hidden), weight_VH)
        self._shares[end, 0] = {"weight": share}

    @in_step
    def round_cache(self, kv: KvRounding | None) -> None:
        """See `Decoder`; every rank plans the trees that it runs by `kv`."""
        self.kv = kv
        self._changes.append(partial(round_block_cache, kv))

    @in_step
    def adjust_blocks(self, change: Change) -> None:
        self._changes.append(change)

    @in_step
    def make_copy(self, number: int) -> "ShardedDecoder":
        other = object.__new__(type(self))
        other.__dict__ |= self.__dict__
        other.number, other._head_VH, other._changes = number, None, list(self._changes)  # type: ignore[misc]
        other._shares = {key: dict(share) for key, share in self._shares.items()}
        self.team.models[number] = other
        return other

    @in_step
    def load(self, checkpoint: Checkpoint | None = None) -> None:
        """Load tensor by tensor, of which each rank keeps its share.

        Where all ranks see rank 0's files, each reads its share alone, and nothing is sent.
        Elsewhere, and of packed tensors, rank 0 reads all of a tensor and sends it.

        Args:
            checkpoint: rank 0's.

        Raises:
            NumericsError: on rank 0: the named weight is not finite, as stored or in the dtype.
            CheckpointError: on rank 0: some rank could not read its share.
        """
        facts, own = self.facts, seen_by_all(self.team, checkpoint)
        norm_H, faults = None, list[Q3QError]()
        if checkpoint is not None:
            norm_H = checkpoint.final_norm()
            norm_H = convert_weight(norm_H, "final norm", self._dtype, self._device)
        self._norm_H: Tensor = self.team.broadcast(norm_H)

        def share(
            name: str, shape: Sequence[int], whole: Callable[[Checkpoint], Tensor], part: Part
        ) -> Parameter:
            first, count = self._stretch(shape)
            read = None if own is None else part(own, first, count)
            if read is None:
                weight = None
                if checkpoint is not None:
                    weight = convert_weight(whole(checkpoint), name, self._dtype, self._device)
                return self._share(shape, weight)
            numbers_N = None
            try:
                numbers_N = convert_weight(read(), name, self._dtype, self._device)
            except (NumericsError, CheckpointError) as error:  # told once all ranks have loaded
                faults.append(error)
            return self._divided(shape, numbers_N, _without_broadcast())

        ends = {"embedding": Checkpoint.embedding}
        if not facts.tied:
            ends["head"] = Checkpoint.head
        for end, read in ends.items():
            weight = share(end, (facts.vocab, facts.hidden), read, partial(end_part, end))
            self._shares[end, 0] = {"weight": weight}
        for k in range(facts.layers):
            self._shares["block", k] = {
                name: share(
                    f"blocks.{k}.{name}",
                    shape,
                    partial(block_weight, k, name),
                    partial(block_part, k, name),
                )
                for name, shape in facts.block_shapes(k).items()
            }
        gathered = [fault for fault in self.team.gather(faults[0] if faults else None) if fault]
        if gathered and self.team.rank == 0:
            raise gathered[0]

    def _stretch(self, shape: Sequence[int]) -> tuple[int, int]:
        """Return where this rank's share of a tensor's numbers begins, and how many it has."""
        numbers = math.prod(shape)
        each = -(-numbers // self.team.size)
        first = min(numbers, self.team.rank * each)
        return first, min(each, numbers - first)

    def _share(self, shape: Sequence[int], weight: Tensor | None) -> Parameter:
        """Return this rank's share of rank 0's weight."""
        import deepspeed

        with exchanging():
            return self._divided(shape, weight, deepspeed.zero.Init)

    def _divided(
        self, shape: Sequence[int], numbers: Tensor | None, init: Callable[..., object]
    ) -> Parameter:
        """Have DeepSpeed make this rank's share of a tensor that has these numbers in their place.

        Args:
            numbers: all of the tensor's, or those of this rank's stretch; None for any.
        """
        with _plain_tensors():
            content = torch.empty(shape, dtype=self._dtype, device=self._device)
            if numbers is not None and numbers.shape == content.shape:
                content.copy_(numbers)
            elif numbers is not None:
                first, count = self._stretch(shape)
                content.view(-1)[first : first + count] = numbers
            holder = ParameterList([Parameter(content, requires_grad=False)])
            del content
            # mem_efficient_linear would replace torch's own `linear`.
            init(module=holder, mem_efficient_linear=False)
            return holder[0]


@cache
def _without_broadcast() -> Callable[..., object]:
    """Return DeepSpeed's Init for ranks that each have their own share of a tensor already.

    Its own sends rank 0's tensor to all before each takes its share of it.
    """
    import deepspeed

    class OwnShares(deepspeed.zero.Init):
        def _zero_init_param(self, param: Any) -> None:
            self._convert_to_deepspeed_param(param)
            param.partition()

    return OwnShares


def load_sharded(
    checkpoint: Checkpoint, dtype: torch.dtype, team: Team, *, activations: int | None = None
) -> ShardedDecoder:
    """Load a model without ever holding it completely in one place.

    Rank 0 calls this while it works alone. Other ranks need no file, but help to read those that
    they see (`ShardedDecoder.load`).

    Args:
        activations: bytes of each rank's hidden states in memory between two blocks; None for all.

    Raises:
        NumericsError: the named weight is not finite, as stored or in `dtype`.
    """
    model: ShardedDecoder = team.run_on_all(
        _begin, next(_NUMBERS), checkpoint.facts, dtype, activations
    )
    model.load(checkpoint=checkpoint)
    return model


def _begin(
    team: Team, number: int, facts: ModelFacts, dtype: torch.dtype, activations: int | None
) -> ShardedDecoder:
    if not team.models and team.rank == 0:
        team.models = WeakValueDictionary()  # a copy is freed with its last reference
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    _prepare(device)
    model = ShardedDecoder(team, number, facts, dtype, device)
    model.activations = activations
    return model


def _prepare(device: torch.device) -> None:
    """Let DeepSpeed use torch's process group, without its own kernels, which need a compiler."""
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


def _gathered(share: Mapping[str, Parameter]) -> dict[str, Tensor]:
    """Return the complete tensors; the ranks themselves keep their shares alone."""
    import deepspeed

    with _plain_tensors(), exchanging(), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # DeepSpeed calls a renamed torch function
        with deepspeed.zero.GatheredParameters(list(share.values())):
            return {name: parameter.data for name, parameter in share.items()}


@contextmanager
def _plain_tensors() -> Iterator[None]:
    """Leave inference mode: DeepSpeed swaps parameters' data, which inference tensors forbid."""
    with torch.inference_mode(False), torch.no_grad():
        yield
