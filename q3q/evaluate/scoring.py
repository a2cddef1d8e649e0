"""Log-likelihoods of continuations: each token of their prefix tree runs once."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from q3q.errors import IntegrityError
from q3q.evaluate.budget import Result, TokenBudget, pass_tokens
from q3q.evaluate.packing import sort_keys
from q3q.evaluate.prefixes import Ids, PackedTree, Positions, common_prefix
from q3q.evaluate.tree_pass import run_tree
from q3q.models.decoder import Decoder
from q3q.models.footprint import recurrent_rows
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
    states = recurrent_rows(model.facts, model.device.type)
    tree, readers = pack_requests(requests, varlen=model.varlen, states=states, chunk=model.chunk)
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
        _ = model.head_VH  # the others gather it for their scores, and wait for this rank
    return team.gather((scores, effort))


class _InStep(TokenBudget):
    """A budget that never retries: the other ranks would not."""

    def run(self, attempt: Callable[[int], tuple[int, Result]]) -> Result:
        return attempt(self.tokens)[1]


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
        text = np.repeat(np.arange(len(readers)), [len(group) for group in readers])
        targets = [requests[number].targets for number in numbers]
        counts = np.array([len(tokens) for tokens in targets])
        # A text ends in its own branch, whose positions are consecutive.
        begin, stop = np.array(tree.begin), np.cumsum(counts)
        position = np.arange(stop[-1]) + np.repeat(begin[text + 1] - stop, counts)
        reaches_beyond = counts > begin[text + 1] - begin[text]
        rows: dict[int, list[int]] = {}
        for row in np.flatnonzero(reaches_beyond).tolist():
            rows.setdefault(int(text[row]), []).append(row)
        for number, path in enumerate(tree.positions() if rows else ()):
            for row in rows.get(number, ()):
                position[stop[row] - counts[row] : stop[row]] = path[-counts[row] :]
        target = np.concatenate(targets).astype(np.int64)
        owner = np.repeat(np.array(numbers), counts)
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
    requests: Sequence[Request], *, varlen: bool = False, states: int = 0, chunk: int = 1
) -> tuple[PackedTree, list[list[int]]]:
    """Return the tree of all distinct inputs, and the requests that each of its texts serves.

    Args:
        varlen, states, chunk: see `PackedTree`.
    """
    readers: dict[bytes, list[int]] = {}
    for number, key in enumerate(sort_keys(request.inputs for request in requests)):
        readers.setdefault(key, []).append(number)
    numbers = [readers[key] for key in sorted(readers)]
    texts = [requests[first].inputs for first, *_ in numbers]
    return PackedTree(texts, varlen, states, chunk=chunk), numbers
