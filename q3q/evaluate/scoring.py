"""Log-likelihoods of continuations: each token of their prefix tree runs once, each position asked is read once."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import chain, pairwise
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from q3q.errors import IntegrityError
from q3q.evaluate.budget import Result, TokenBudget, pass_tokens
from q3q.evaluate.prefixes import Batch, Ids, Places, Tape
from q3q.models.attention import KeysValues, Tree, sent, takes_ragged
from q3q.models.decoder import Decoder
from q3q.models.spool import Spool
from q3q.team import Team

# Tokens that one rank of a gang takes before what was scored is handed in: more lose more with a rank that dies.
ROUND_TOKENS = 1 << 18


@dataclass(frozen=True)
class Request:
    """inputs: the tokens that run, context and all but the last of the continuation. targets: the continuation.

    task: whose request it is, for messages.
    """

    inputs: Ids
    targets: Ids
    task: str


@dataclass(frozen=True)
class Score:
    """log_likelihood: natural, of the whole continuation. greedy: each of its tokens is the most likely one."""

    log_likelihood: float
    greedy: bool


@dataclass(frozen=True)
class Effort:
    """What scoring cost, in tokens. asked: of all requests' inputs. unique: of their prefix tree. computed: run.

    logits: positions that went through the head. attended, padded: query slots of attention, and the empty ones among
    them; elsewhere nothing is padded.
    """

    asked: int = 0
    unique: int = 0
    computed: int = 0
    logits: int = 0
    attended: int = 0
    padded: int = 0

    def __add__(self, other: "Effort") -> "Effort":
        return Effort(
            *(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__)
        )


def score(
    model: Decoder, requests: Sequence[Request], budget: TokenBudget
) -> Iterator[tuple[list[tuple[int, Score]], Effort]]:
    """As each batch ends, the requests (by number) that it completed, and the effort so far.

    A gang's ranks divide the requests; a log-likelihood may then differ in its last digits, as it may between batches
    of different sizes.

    Raises:
        IntegrityError: a log-likelihood is not finite.
    """
    if model.team.leads:
        yield from score_together(model, requests)
        return
    tape, readers = lay_out(requests, ragged=takes_ragged(model.device, model.norm_H.dtype))
    reads = Reads.of(tape, readers, requests)
    total_R, greedy_R = np.zeros(len(requests)), np.ones(len(requests), dtype=bool)
    left_R = np.array([len(request.targets) for request in requests])
    effort = Effort(sum(len(request.inputs) for request in requests), len(tape))

    def run() -> Iterator[tuple[Reads, Tensor, Tensor, Effort]]:
        """Of each batch what is read, the log-likelihoods and whether they are greedy, and the effort so far."""
        done = effort
        for first, stop, hidden_PH in run_tape(model, tape, budget, reads.position[reads.new]):
            part = reads.within(first, stop)
            row_R = part.new.cumsum() - 1
            done = replace(
                done,
                computed=done.computed + stop - first,
                logits=done.logits + len(hidden_PH),
                attended=tape.attended,
                padded=tape.padded,
            )
            found = model.log_likelihoods(
                hidden_PH, torch.from_numpy(part.target), torch.from_numpy(row_R)
            )
            yield part, *found, done

    for part, found_R, best_R, done in one_behind(run()):
        ended: list[tuple[int, Score]] = []
        if len(part.owner):
            likelihood = found_R.double().cpu().numpy()
            if not np.isfinite(likelihood).all():
                task = requests[part.owner[np.flatnonzero(~np.isfinite(likelihood))[0]]].task
                raise IntegrityError(f"{task}: a log-likelihood is not finite")
            np.add.at(total_R, part.owner, likelihood)
            np.logical_and.at(greedy_R, part.owner, best_R.cpu().numpy())
            np.subtract.at(left_R, part.owner, 1)
            for owner in np.unique(part.owner):
                if not left_R[owner]:
                    ended.append((int(owner), Score(float(total_R[owner]), bool(greedy_R[owner]))))
        yield ended, done


Item = TypeVar("Item")


def one_behind(items: Iterable[Item]) -> Iterator[Item]:
    """Each when the next one has been begun: so a GPU is busy with that while this one is fetched from it."""
    before: list[Item] = []
    for item in items:
        yield from before
        before = [item]
    yield from before


def score_together(
    model: Decoder, requests: Sequence[Request]
) -> Iterator[tuple[list[tuple[int, Score]], Effort]]:
    """`score` in rounds: in each, every rank of the model's team takes requests that are neighbours on the tape."""
    effort, size = Effort(), model.team.size
    order = sorted(
        range(len(requests)), key=lambda number: requests[number].inputs.astype(">u4").tobytes()
    )
    ends = np.cumsum([len(requests[number].inputs) for number in order])
    room, start = min(ROUND_TOKENS, pass_tokens(model) // 2), 0
    while start < len(order):
        before = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, before + room * size, "right")))
        cuts = np.searchsorted(
            ends, np.linspace(before, ends[stop - 1], size + 1)[1:-1], "right"
        ).clip(start, stop)
        bounds = [start, *cuts.tolist(), stop]
        shares = [order[low:high] for low, high in pairwise(bounds)]
        asked = [[requests[number] for number in share] for share in shares]
        for share, (found, cost) in zip(
            shares, model.team.together(_score_share, model.number, asked), strict=True
        ):
            effort += cost
            yield [(share[n], one) for n, one in found], effort
        start = stop


def _score_share(
    team: Team, number: int, asked: Sequence[Sequence[Request]]
) -> list[tuple[list[tuple[int, Score]], Effort]]:
    """On each rank: its requests, through all blocks once, as the others go through them."""
    model: Decoder = team.held[number]
    found, effort = list[tuple[int, Score]](), Effort()
    if asked[team.rank]:
        for ended, effort in score(model, asked[team.rank], _InStep.set(model)):  # noqa: B007
            found += ended
    else:
        list(model.states([]))
    return team.gather((found, effort))


class _InStep(TokenBudget):
    """Nothing is tried again: the other ranks would not."""

    def run(self, attempt: Callable[[int], tuple[int, Result]]) -> Result:
        return attempt(self.tokens)[1]


def run_tape(
    model: Decoder,
    tape: Tape,
    budget: TokenBudget,
    wanted_P: Places | None = None,
    keys_values: list[list[KeysValues]] | None = None,
) -> Iterator[tuple[int, int, Tensor]]:
    """Of each batch its first token on the tape, the one behind its last, and the final hidden states [P, H] wanted.

    Batch by batch; through a streamed model in pieces of many batches, block by block.

    wanted_P: places on the tape, ascending, whose states somebody reads; all if None. They alone go through the last
    block beyond its attention.
    keys_values: a list for each block that takes each batch's keys and values [K, T, D]; not of a streamed model.
    """
    kept: Spool | None = None

    def attempt(most: int) -> tuple[int, tuple[Piece, Iterator[Tensor]]]:
        piece = Piece(model, tape, most, wanted_P, kept, all_keys=keys_values is not None)
        states = model.states(piece.ids, piece.attend)
        begun = chain(
            [next(states)], states
        )  # whatever could take too much memory has been run by then
        piece.end_block()
        return 0 if model.streamed else len(piece.ids[0][0]), (piece, begun)

    while not tape.done:
        piece, states = budget.run(attempt)
        tape.follow(piece.tape)
        kept = piece.kept
        for taken, fresh in zip(keys_values or (), piece.fresh, strict=False):
            taken.append(fresh)
        for (first, stop), hidden_1PH in zip(piece.spans, states, strict=True):
            yield first, stop, hidden_1PH[0]


class Piece:
    """Batches of a tape that go through the model together, block by block.

    tape: a copy, behind them. spans, ids: of each batch, its first token and the one behind its last; [1, T].
    kept, fresh: of each block that has run, the keys and the values that the next piece needs, one after the other;
    and those of the piece itself, if they are wanted and it is a single batch.
    """

    def __init__(
        self,
        model: Decoder,
        tape: Tape,
        most: int,
        wanted_P: Places | None,
        before: Spool | None,
        *,
        all_keys: bool = False,
    ) -> None:
        """most: tokens of a batch. before: what the piece before this one kept. all_keys: whether `fresh` is wanted."""
        self.tape, self.kept = copy(tape), Spool(model.activations)
        self.spans: list[tuple[int, int]] = []
        self.fresh: list[KeysValues] = []
        self._all_keys = all_keys
        room = pass_tokens(model)
        while not self.tape.done and (
            not self.spans or self.spans[-1][1] - self.spans[0][0] < room
        ):
            self._batch = self.tape.next_batch(most)
            self.tape.advance()
            self.spans.append((self._batch.first, self._batch.stop))
        self.ids = [torch.from_numpy(tape.ids[a:b].astype(np.int64))[None] for a, b in self.spans]
        self._model, self._start, self._most, self._wanted, self._before = (
            model,
            copy(tape),
            most,
            wanted_P,
            before,
        )
        self._again: Tape | None = None
        self._tree: Tree | None = None

    def attend(self, k: int, b: int) -> Tree:
        """For `Decoder.states`: what batch b attends to in block k. Keys and values go on from batch to batch."""
        if b:
            assert self._tree is not None
            before = self._tree.kept
        else:
            self.end_block()
            before = (
                None if self._before is None else (self._before[2 * k], self._before[2 * k + 1])
            )
        last = k == len(self._model.blocks) - 1
        self._tree = self._planned(b).attention(
            before, self._rows(*self.spans[b]) if last else None
        )
        return self._tree

    def end_block(self) -> None:
        """Take what the last batch left, if one has run."""
        if self._tree is not None and self._tree.kept is not None and self._tree.fresh is not None:
            for states in self._tree.kept:
                self.kept.append(states)
            if self._all_keys:
                self.fresh.append(self._tree.fresh)
        self._tree = None

    def _planned(self, b: int) -> Batch:
        """Many batches are planned anew for each block: their masks together could take more than the activations."""
        if len(self.spans) > 1:
            self._again = copy(self._start) if not b or self._again is None else self._again
            self._batch = self._again.next_batch(self._most)
            self._again.advance()
        self._batch = self._batch.to(self._model.device, self._model.norm_H.dtype)
        return self._batch

    def _rows(self, first: int, stop: int) -> Tensor | None:
        if self._wanted is None:
            return None
        low, high = np.searchsorted(self._wanted, [first, stop])
        return sent(torch.from_numpy(self._wanted[low:high] - first), self._model.device)


@dataclass(frozen=True)
class Reads:
    """Which targets are asked where: places on the tape (ascending), target tokens, and the requests that ask; [R]."""

    position: np.ndarray
    target: np.ndarray
    owner: np.ndarray

    @classmethod
    def of(
        cls, tape: Tape, readers: Sequence[Sequence[int]], requests: Sequence[Request]
    ) -> "Reads":
        """readers: for each text of the tape, the requests whose inputs it is."""
        positions, targets, owners = [], [], []
        for places, numbers in zip(tape.places(), readers, strict=True):
            for number in numbers:
                target = requests[number].targets
                positions.append(places[-len(target) :].copy())
                targets.append(target.astype(np.int64))
                owners.append(np.full(len(target), number))
        if not positions:
            return cls(*(np.zeros(0, np.int64) for _ in range(3)))
        position, target, owner = map(np.concatenate, (positions, targets, owners))
        order = np.argsort(position, kind="stable")
        return cls(position[order], target[order], owner[order])

    @property
    def new(self) -> np.ndarray:
        """Whether no target before is asked at the same place [R]."""
        return np.diff(self.position, prepend=-1) > 0

    def within(self, first: int, stop: int) -> "Reads":
        """Those of tokens first .. stop - 1."""
        low, high = np.searchsorted(self.position, [first, stop])
        return Reads(self.position[low:high], self.target[low:high], self.owner[low:high])


def lay_out(requests: Sequence[Request], *, ragged: bool = False) -> tuple[Tape, list[list[int]]]:
    """The tape of all distinct inputs, and the requests that each of its texts serves."""
    readers: dict[bytes, list[int]] = {}
    for number, request in enumerate(requests):
        # Big-endian bytes sort as the tokens do.
        readers.setdefault(request.inputs.astype(">u4").tobytes(), []).append(number)
    order = sorted(readers)
    return Tape([requests[readers[key][0]].inputs for key in order], ragged), [
        readers[key] for key in order
    ]
