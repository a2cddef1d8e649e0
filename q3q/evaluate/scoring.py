"""Log-likelihoods of continuations: each token of their prefix tree runs once."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from q3q.errors import IntegrityError
from q3q.evaluate.budget import Result, TokenBudget, pass_tokens
from q3q.evaluate.packing import sort_keys
from q3q.evaluate.prefixes import Ids, PackedTree, Positions, TreeBatch, common_prefix
from q3q.models.attention import KeysValues, TreeAttention, supports_varlen, to_device
from q3q.models.decoder import Decoder
from q3q.models.spool import Spool
from q3q.team import Team

# Tokens that a gang's rank runs before it hands in the scores: the most that its death loses.
ROUND_TOKENS = 1 << 18


@dataclass(frozen=True)
class Request:
    """A continuation to score.

    inputs: the tokens that run: the context and all but the last token of the continuation.
    targets: the continuation.
    task: its task's name, for messages.
    """

    inputs: Ids
    targets: Ids
    task: str


@dataclass(frozen=True)
class Score:
    """A continuation's score.

    log_likelihood: of the whole continuation, natural logarithm.
    greedy: each of its tokens is the most likely one.
    """

    log_likelihood: float
    greedy: bool


@dataclass(frozen=True)
class Effort:
    """The cost of scoring.

    asked: tokens of all requests' inputs.
    unique: tokens of their prefix tree.
    computed: tokens that ran.
    logits: positions that went through the head.
    attended: query slots of attention.
    padded: empty ones among these; nothing else is padded.
    """

    asked: int = 0
    unique: int = 0
    computed: int = 0
    logits: int = 0
    attended: int = 0
    padded: int = 0

    def __add__(self, other: "Effort") -> "Effort":
        names = self.__dataclass_fields__
        return Effort(*(getattr(self, name) + getattr(other, name) for name in names))


def score(
    model: Decoder, requests: Sequence[Request], budget: TokenBudget
) -> Iterator[tuple[list[tuple[int, Score]], Effort]]:
    """Yield, as each batch ends, the requests (by number) that it completed, and the effort so far.

    A gang's ranks divide the requests; a log-likelihood may then differ in its last digits, as it
    may between batches of different sizes.

    Raises:
        IntegrityError: a log-likelihood is not finite.
    """
    if model.team.leads:
        yield from _score_on_team(model, requests)
        return
    varlen = supports_varlen(model.device, model.norm_H.dtype)
    tree, readers = pack_requests(requests, varlen=varlen)
    reads = Reads.of(tree, readers, requests)
    total_R, greedy_R = np.zeros(len(requests)), np.ones(len(requests), dtype=bool)
    left_R = np.array([len(request.targets) for request in requests])
    total_effort = Effort(sum(len(request.inputs) for request in requests), len(tree))

    def run() -> Iterator[tuple[Reads, Tensor, Tensor, Effort]]:
        """Yield each batch's reads, their log-likelihoods and greediness, and the effort so far."""
        effort = total_effort
        for first, stop, hidden_PH in run_tree(model, tree, budget, reads.position[reads.new]):
            part = reads.within(first, stop)
            row_R = part.new.cumsum() - 1
            effort = replace(
                effort,
                computed=effort.computed + stop - first,
                logits=effort.logits + len(hidden_PH),
                attended=tree.attended,
                padded=tree.padded,
            )
            targets = torch.from_numpy(part.target), torch.from_numpy(row_R)
            yield part, *model.log_likelihoods(hidden_PH, *targets), effort

    for part, scores_R, best_R, effort in one_behind(run()):
        completed: list[tuple[int, Score]] = []
        if len(part.owner):
            likelihood = scores_R.double().cpu().numpy()
            if not np.isfinite(likelihood).all():
                task = requests[part.owner[np.flatnonzero(~np.isfinite(likelihood))[0]]].task
                raise IntegrityError(f"{task}: a log-likelihood is not finite")
            np.add.at(total_R, part.owner, likelihood)
            np.logical_and.at(greedy_R, part.owner, best_R.cpu().numpy())
            np.subtract.at(left_R, part.owner, 1)
            for owner in np.unique(part.owner):
                if not left_R[owner]:
                    result = Score(float(total_R[owner]), bool(greedy_R[owner]))
                    completed.append((int(owner), result))
        yield completed, effort


Item = TypeVar("Item")


def one_behind(items: Iterable[Item]) -> Iterator[Item]:
    """Yield each item once the next has begun, so that a GPU computes during the transfer."""
    before: list[Item] = []
    for item in items:
        yield from before
        before = [item]
    yield from before


def _score_on_team(
    model: Decoder, requests: Sequence[Request]
) -> Iterator[tuple[list[tuple[int, Score]], Effort]]:
    """Run `score` in rounds; in each, every rank scores requests that are neighbours."""
    effort, size = Effort(), model.team.size
    keys = sort_keys(request.inputs for request in requests)
    order = sorted(range(len(requests)), key=keys.__getitem__)
    ends = tree_ends([requests[number].inputs for number in order])
    room, start = round_tokens(pass_tokens(model), requests), 0
    while start < len(order):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + room * size, "right")))
        levels = np.linspace(before, ends[stop - 1], size + 1)[1:-1]
        cuts = np.searchsorted(ends, levels, "right").clip(start, stop)
        shares = [order[low:high] for low, high in pairwise([start, *cuts.tolist(), stop])]
        requests_by_rank = [[requests[number] for number in share] for share in shares]
        results = model.team.run_on_all(_score_share, model.number, requests_by_rank)
        for share, (scores, cost) in zip(shares, results, strict=True):
            effort += cost
            yield [(share[n], result) for n, result in scores], effort
        start = stop


def tree_ends(inputs: Sequence[Ids]) -> Positions:
    """Return how many distinct tokens the prefix tree of sorted inputs has up to each of them."""
    before = [np.zeros(0, np.int32), *inputs]
    return np.cumsum(
        [
            0 if ids is last else len(ids) - common_prefix(last, ids)
            for last, ids in zip(before, inputs, strict=False)
        ]
    )


def round_tokens(most: int, requests: Sequence[Request]) -> int:
    """Return the tokens of a rank's share of a round, so that each share runs in a single pass.

    A share begins with a whole path from the root, however much of it the share before has in
    common, so that the longest input is left free beside it.

    Args:
        most: tokens of one pass.
    """
    longest = max((len(request.inputs) for request in requests), default=0)
    return max(1, min(ROUND_TOKENS, most // 2, most - longest))


def _score_share(
    team: Team, number: int, requests_by_rank: Sequence[Sequence[Request]]
) -> list[tuple[list[tuple[int, Score]], Effort]]:
    """Score this rank's requests in one pass through all blocks, in step with the others."""
    model: Decoder = team.models[number]
    scores, effort = list[tuple[int, Score]](), Effort()
    if requests_by_rank[team.rank]:
        for completed, effort in score(model, requests_by_rank[team.rank], _InStep.set(model)):  # noqa: B007
            scores += completed
    else:
        list(model.states([]))
    return team.gather((scores, effort))


class _InStep(TokenBudget):
    """A budget that never retries: the other ranks would not."""

    def run(self, attempt: Callable[[int], tuple[int, Result]]) -> Result:
        return attempt(self.tokens)[1]


def run_tree(
    model: Decoder,
    tree: PackedTree,
    budget: TokenBudget,
    read_P: Positions | None = None,
    keys_values: list[list[KeysValues]] | None = None,
) -> Iterator[tuple[int, int, Tensor]]:
    """Yield each batch's range of tokens in the tree (first, stop), and its final states [P, H].

    A model in memory runs batch by batch, a streamed one many batches in one pass, block by block.

    Args:
        read_P: positions in the tree, ascending, whose states are read; all if None. Only these go
            through the last block beyond its attention.
        keys_values: a list for each block, to which each batch's keys and values [K, T, D] are
            appended. Not of a streamed model.
    """
    path: Spool | None = None

    def attempt(batch_tokens: int) -> tuple[int, tuple[TreePass, Iterator[Tensor]]]:
        all_keys = keys_values is not None
        tree_pass = TreePass(model, tree, batch_tokens, read_P, path, all_keys=all_keys)
        states = model.states(tree_pass.ids, tree_pass.attend)
        # Whatever could take too much memory has run when the first states are there.
        states = chain([next(states)], states)
        tree_pass.end_block()
        return 0 if model.streamed else len(tree_pass.ids[0][0]), (tree_pass, states)

    while not tree.done:
        tree_pass, states = budget.run(attempt)
        tree.follow(tree_pass.tree)
        path = tree_pass.path
        for block, batch in zip(keys_values or (), tree_pass.keys_values, strict=False):
            block.append(batch)
        for (first, stop), hidden_1PH in zip(tree_pass.bounds, states, strict=True):
            yield first, stop, hidden_1PH[0]


class TreePass:
    """Batches of a tree that go through the model together, block by block.

    tree: a copy of the tree that has gone past them.
    bounds: each batch's first token, and the one behind its last.
    ids: each batch's tokens [1, T].
    path: keys and values that the next pass needs, those of one block after the other.
    keys_values: each block's keys and values of a pass of a single batch, if asked for.
    """

    def __init__(
        self,
        model: Decoder,
        tree: PackedTree,
        batch_tokens: int,
        read_P: Positions | None,
        past: Spool | None,
        *,
        all_keys: bool = False,
    ) -> None:
        """Plan the batches.

        Args:
            batch_tokens: most tokens of a batch.
            read_P: see `run_tree`.
            past: `path` of the pass before this one.
            all_keys: keep `keys_values`.
        """
        self.tree, self.path = copy(tree), Spool(model.activations)
        self.bounds: list[tuple[int, int]] = []
        self.keys_values: list[KeysValues] = []
        self._all_keys = all_keys
        room = pass_tokens(model)
        tokens = 0
        while not self.tree.done and (not self.bounds or tokens < room):
            self._batch = self.tree.next_batch(batch_tokens)
            self.tree.advance()
            self.bounds.append((self._batch.first, self._batch.stop))
            tokens = self._batch.stop - self.bounds[0][0]
        self.ids = [torch.from_numpy(tree.ids[a:b].astype(np.int64))[None] for a, b in self.bounds]
        self._model, self._start, self._batch_tokens = model, copy(tree), batch_tokens
        self._read_P, self._past = read_P, past
        self._replanned: PackedTree | None = None
        self._attention: TreeAttention | None = None

    def attend(self, k: int, b: int) -> TreeAttention:
        """Return batch b's attention in block k, for `Decoder.states`."""
        if b:
            assert self._attention is not None
            path = self._attention.path
        else:
            self.end_block()
            path = None if self._past is None else (self._past[2 * k], self._past[2 * k + 1])
        last = k == len(self._model.blocks) - 1
        read_index = self._read_index(*self.bounds[b]) if last else None
        self._attention = self._planned(b).attention(path, read_index)
        return self._attention

    def end_block(self) -> None:
        """Keep what the last batch left in a block, if one has run."""
        attention = self._attention
        if attention is not None and attention.path and attention.batch_keys_values:
            for states in attention.path:
                self.path.append(states)
            if self._all_keys:
                self.keys_values.append(attention.batch_keys_values)
        self._attention = None

    def _planned(self, b: int) -> TreeBatch:
        """Plan batch b, of several anew for each block: all masks could take too much memory."""
        if len(self.bounds) > 1:
            if not b or self._replanned is None:
                self._replanned = copy(self._start)
            self._batch = self._replanned.next_batch(self._batch_tokens)
            self._replanned.advance()
        self._batch = self._batch.to(self._model.device, self._model.norm_H.dtype)
        return self._batch

    def _read_index(self, first: int, stop: int) -> Tensor | None:
        if self._read_P is None:
            return None
        low, high = np.searchsorted(self._read_P, [first, stop])
        return to_device(torch.from_numpy(self._read_P[low:high] - first), self._model.device)


@dataclass(frozen=True)
class Reads:
    """Target tokens and the positions at which requests ask for them [R].

    position: in the tree, ascending.
    target: token.
    owner: the request's number.
    """

    position: Positions
    target: Positions
    owner: Positions

    @classmethod
    def of(
        cls, tree: PackedTree, readers: Sequence[Sequence[int]], requests: Sequence[Request]
    ) -> "Reads":
        """Collect the reads. readers: for each text of the tree, the requests with these inputs."""
        numbers = [number for group in readers for number in group]
        if not numbers:
            return cls(*(np.zeros(0, np.int64) for _ in range(3)))
        position = np.concatenate(
            [
                positions[-len(requests[number].targets) :].copy()
                for positions, group in zip(tree.positions(), readers, strict=True)
                for number in group
            ]
        )
        targets = [requests[number].targets for number in numbers]
        target = np.concatenate(targets).astype(np.int64)
        owner = np.repeat(np.array(numbers), [len(tokens) for tokens in targets])
        order = np.argsort(position, kind="stable")
        return cls(position[order], target[order], owner[order])

    @property
    def new(self) -> NDArray[np.bool_]:
        """True where no earlier read has the same position [R]."""
        return np.diff(self.position, prepend=-1) > 0

    def within(self, first: int, stop: int) -> "Reads":
        """Return the reads of tokens first .. stop - 1."""
        low, high = np.searchsorted(self.position, [first, stop])
        return Reads(self.position[low:high], self.target[low:high], self.owner[low:high])


def pack_requests(
    requests: Sequence[Request], *, varlen: bool = False
) -> tuple[PackedTree, list[list[int]]]:
    """Return the tree of all distinct inputs, and the requests that each of its texts serves."""
    readers: dict[bytes, list[int]] = {}
    for number, key in enumerate(sort_keys(request.inputs for request in requests)):
        readers.setdefault(key, []).append(number)
    numbers = [readers[key] for key in sorted(readers)]
    return PackedTree([requests[first].inputs for first, *_ in numbers], varlen), numbers
