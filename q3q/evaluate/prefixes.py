"""Texts with shared beginnings as one tape: every token of their prefix tree once, and nothing else.

Sorted texts stand in the depth-first order of their prefix tree. Each one therefore adds a *branch* to the tape: the
tokens that it does not share with the text before it. A tape is run in batches, cut wherever the budget ends; what
the next batch needs of the earlier ones is one path from the tree's root, so the keys and values that are kept never
exceed one window. No batch holds a padding token.

Counts: R reads (a target asked of a position), T tokens of a batch or of the tape.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from q3q.models.attention import KeysValues, Look, RaggedLook, Tree, sent

Ids = NDArray[np.int32]
Places = NDArray[np.int64]

# A stretch of the tree that several branches share is attended to once for all of them if that spares gathering this
# many keys; a shorter one is gathered with each branch's own keys.
WORTH_SHARING = 4096
# The same for ragged looks: a GPU gathers quickly, and putting two looks together costs it more.
RAGGED_WORTH_SHARING = 1 << 15
# Scores (queries x keys) of one look, and keys gathered for it: bounds of its memory.
LOOK_SCORES = 1 << 22
LOOK_KEYS = 1 << 15


@dataclass(frozen=True)
class Piece:
    """Part of a branch within a batch: depths start .. stop - 1 of its text, from token `offset` of the batch on."""

    start: int
    stop: int
    offset: int


@dataclass(frozen=True)
class Batch:
    """Tokens first .. stop - 1 of the tape and how they attend, ready for `Decoder.states`."""

    first: int
    stop: int
    own: Sequence[Look | RaggedLook]
    shared: Sequence[Look | RaggedLook]
    depth_T: torch.Tensor
    keep: torch.Tensor

    def attention(self, kept: KeysValues | None, wanted: torch.Tensor | None = None) -> Tree:
        """One block's attention.

        kept: what the block kept of the batch before, None at the tape's start. wanted: see `Tree`.
        """
        return Tree(self.own, self.shared, self.depth_T, self.keep, kept, wanted=wanted)

    def to(self, device: torch.device, dtype: torch.dtype) -> "Batch":
        """The same with its indices where the model is, and what is added to its scores in the model's dtype."""
        own, shared = (
            [look.to(device, dtype) for look in looks] for looks in (self.own, self.shared)
        )
        return Batch(
            self.first, self.stop, own, shared, sent(self.depth_T, device), sent(self.keep, device)
        )


@dataclass
class Tape:
    """The prefix tree of texts, depth first.

    texts: token ids, distinct and sorted. ragged: whether batches attend by `RaggedLook`s. shared: how many tokens each
    has in common with the one before it. begin: where on the tape its own tokens begin, and at last the tape's end.
    ids: the tape. attended, padded: query slots of attention in the batches so far, and those of them that were padding
    of the attention's own (linear layers see none).
    """

    texts: list[Ids]
    ragged: bool = False
    shared: list[int] = field(init=False)
    begin: list[int] = field(init=False)
    ids: Ids = field(init=False)
    attended: int = 0
    padded: int = 0

    def __post_init__(self) -> None:
        before = [np.zeros(0, np.int32), *self.texts]
        self.shared = [common_prefix(a, b) for a, b in zip(before, self.texts, strict=False)]
        branches = [text[common:] for text, common in zip(self.texts, self.shared, strict=True)]
        self.begin = [0, *np.cumsum([len(branch) for branch in branches], dtype=np.int64).tolist()]
        self.ids = np.concatenate(branches) if branches else np.zeros(0, np.int32)
        self._path = np.zeros(max((len(text) for text in self.texts), default=0), np.int64)
        self._text, self._depth, self._kept = 0, 0, 0

    def __len__(self) -> int:
        return len(self.ids)

    def places(self) -> Iterator[Places]:
        """For each text, where each of its tokens is on the tape. The array is reused: read it before going on."""
        path = np.zeros_like(self._path)
        for text, common, begin in zip(self.texts, self.shared, self.begin, strict=False):
            path[common : len(text)] = np.arange(begin, begin + len(text) - common)
            yield path[: len(text)]

    @property
    def done(self) -> bool:
        return self._text == len(self.texts)

    def next_batch(self, budget: int) -> Batch:
        """The next tokens, at most `budget`; `advance` goes past them. Only a branch longer than that is cut."""
        pieces: list[Piece] = []
        text, depth, room = self._text, self._depth, budget
        while text < len(self.texts) and room:
            length = len(self.texts[text])
            taken = min(length - depth, room)
            if taken < length - depth and pieces:
                break
            pieces.append(Piece(depth, depth + taken, budget - room))
            room -= taken
            depth += taken
            if depth == length:
                text += 1
                depth = self.shared[text] if text < len(self.texts) else 0
        self._next = text, depth
        return self._plan(pieces, next_depth=depth)

    def advance(self) -> None:
        """Go past the last batch."""
        (self._text, self._depth), self._kept = self._next, self._next[1]

    def follow(self, copied: "Tape") -> None:
        """Go to where a copy has gone."""
        self._text, self._depth, self._kept = copied._text, copied._depth, copied._kept
        self.attended, self.padded = copied.attended, copied.padded

    def _plan(self, pieces: list[Piece], next_depth: int) -> Batch:
        # Keys are numbered: the kept path by depth, then the batch's tokens.
        path = np.concatenate(
            [np.arange(self._kept), np.zeros(len(self._path) - self._kept, np.int64)]
        )
        stretches, floors = shared_stretches(pieces, *self._bounds)
        shared: list[Look | RaggedLook] = []
        leaves: list[tuple[Piece, Places]] = []
        for number, piece in enumerate(pieces):
            for floor, top, last in stretches.get(number, ()):
                until = pieces[last].offset + pieces[last].stop - pieces[last].start
                look = _ragged_shared if self.ragged else _shared_looks
                shared += look(piece.offset, until, path[floor:top])
            place = self._kept + piece.offset
            path[piece.start : piece.stop] = np.arange(place, place + piece.stop - piece.start)
            leaves.append((piece, path[floors[number] : piece.stop].copy()))
        tokens = pieces[-1].offset + pieces[-1].stop - pieces[-1].start
        own: list[Look | RaggedLook]
        if self.ragged:
            own = [_ragged_own(leaves)]
            self.attended += tokens
        else:
            own = [self._own_look(bucket) for bucket in buckets(leaves)]
        first = self.begin[self._text] + self._depth - self.shared[self._text]
        depths = np.concatenate([np.arange(piece.start, piece.stop) for piece in pieces])
        keep = path[:next_depth].copy()
        return Batch(
            first, first + tokens, own, shared, torch.from_numpy(depths), torch.from_numpy(keep)
        )

    @property
    def _bounds(self) -> tuple[int, int]:
        """For `shared_stretches`. Ragged looks hold no scores."""
        return (RAGGED_WORTH_SHARING, sys.maxsize) if self.ragged else (WORTH_SHARING, LOOK_SCORES)

    def _own_look(self, bucket: list[tuple[Piece, Places]]) -> Look:
        """Each piece's own tokens, and the ancestors that were not worth sharing, causally."""
        queries = [
            np.arange(piece.offset, piece.offset + piece.stop - piece.start) for piece, _ in bucket
        ]
        wide, tall = max(map(len, queries)), max(len(keys) for _, keys in bucket)
        self.attended += wide * len(bucket)
        self.padded += wide * len(bucket) - sum(map(len, queries))
        # Query i of a piece sees its ancestors (keys that are not its own) and i + 1 of its own; pads come after those.
        ancestors = torch.tensor(
            [len(keys) - len(query) for query, (_, keys) in zip(queries, bucket, strict=True)]
        )
        causal = not ancestors.any()
        bias = None
        if not causal:
            unseen = torch.arange(tall) > ancestors[:, None, None] + torch.arange(wide)[:, None]
            bias = torch.zeros(unseen.shape).masked_fill_(unseen, -torch.inf)
        if len(bucket) == 1:
            [(piece, keys)] = bucket
            tokens = slice(piece.offset, piece.offset + wide)
            if (np.diff(keys) == 1).all():
                return Look(tokens, slice(int(keys[0]), int(keys[0]) + tall), causal, bias)
            return Look(tokens, torch.from_numpy(keys)[None], causal, bias)
        query, key = _stacked(queries, wide), _stacked([keys for _, keys in bucket], tall)
        place = np.concatenate(
            [row * wide + np.arange(len(tokens)) for row, tokens in enumerate(queries)]
        )
        real = torch.from_numpy(place), torch.from_numpy(np.concatenate(queries))
        return Look(query, key, causal, bias, real)


def shared_stretches(
    pieces: Sequence[Piece], worth: int, most: int
) -> tuple[dict[int, list[tuple[int, int, int]]], list[int]]:
    """Which stretches of the tree are attended to once for many pieces, and what is left to each piece.

    Args:
        worth: keys that sharing must spare from being gathered. most: scores that a piece may have with its ancestors.

    Returns:
        By its first piece, each run of pieces that shares the depths floor .. top - 1: (floor, top, last piece); and
        for each piece the depth from which on it attends by itself.
    """
    stretches: dict[int, list[tuple[int, int, int]]] = {}
    floors = [0] * len(pieces)
    todo = [(0, len(pieces) - 1, 0)]
    while todo:
        first, last, floor = todo.pop()
        top = min(piece.start for piece in pieces[first : last + 1])
        tokens = pieces[last].offset + pieces[last].stop - pieces[last].start - pieces[first].offset
        # A piece whose own scores against its ancestors would be too many gives them up too: they need no mask then.
        if (last - first) * (top - floor) >= worth or tokens * (top - floor) > most:
            stretches.setdefault(first, []).append((floor, top, last))
            floor = top
        begin = first
        for number in range(first, last + 2):
            if number <= last and pieces[number].start > top:
                continue
            if begin < number:
                todo.append((begin, number - 1, floor))
            if number <= last:
                floors[number] = floor
            begin = number + 1
    return stretches, floors


def buckets(leaves: Sequence[tuple[Piece, Places]]) -> Iterator[list[tuple[Piece, Places]]]:
    """Pieces that attend together: of like length, with like numbers of keys, within the bounds of memory."""
    alike: dict[tuple[int, int], list[tuple[Piece, Places]]] = {}
    for piece, keys in leaves:
        alike.setdefault((_rung(piece.stop - piece.start), _rung(len(keys))), []).append(
            (piece, keys)
        )
    for (wide, tall), group in alike.items():
        most = max(1, min(LOOK_SCORES // (wide * tall), LOOK_KEYS // tall))
        group.sort(key=lambda leaf: (leaf[0].stop - leaf[0].start, len(leaf[1])))
        for start in range(0, len(group), most):
            yield group[start : start + most]


def common_prefix(a: Ids, b: Ids) -> int:
    """How many tokens two texts have in common from their beginnings on."""
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length


def _rung(count: int) -> int:
    """The next rung of a ladder, so that what stands on one pads little: steps of 1 below 8, of 2 below 16, of 4 below
    64, then of an eighth at most. With finer ones there would be many looks at next to nothing."""
    step = max(min(4, 1 << max(0, count.bit_length() - 3)), 1 << max(0, count.bit_length() - 4))
    return -(-count // step) * step


def _shared_looks(first: int, until: int, keys: Places) -> Iterator[Look]:
    """Queries first .. until - 1 at the same keys, in slabs."""
    contiguous = (np.diff(keys) == 1).all()
    index = (
        slice(int(keys[0]), int(keys[-1]) + 1)
        if contiguous
        else torch.from_numpy(keys.copy())[None]
    )
    slab = max(1, LOOK_SCORES // len(keys))
    for start in range(first, until, slab):
        yield Look(slice(start, min(until, start + slab)), index)


def _ragged_own(leaves: Sequence[tuple[Piece, Places]]) -> RaggedLook:
    """All pieces of a batch at their own tokens, and at the ancestors that were not worth sharing."""
    queries = np.array([piece.stop - piece.start for piece, _ in leaves])
    keys = np.array([len(key) for _, key in leaves])
    return _ragged(
        slice(0, int(queries.sum())),
        np.concatenate([key for _, key in leaves]),
        queries,
        keys,
        causal=True,
    )


def _ragged_shared(first: int, until: int, keys: Places) -> list[RaggedLook]:
    """Queries first .. until - 1 at the same keys."""
    return [
        _ragged(
            slice(first, until),
            keys,
            np.array([until - first]),
            np.array([len(keys)]),
            causal=False,
        )
    ]


def _ragged(
    query: slice, keys: Places, query_S: Places, key_S: Places, *, causal: bool
) -> RaggedLook:
    """query_S, key_S: how many each piece has."""
    key = (
        slice(int(keys[0]), int(keys[-1]) + 1)
        if (np.diff(keys) == 1).all()
        else torch.from_numpy(keys.copy())
    )
    query_ends_S, key_ends_S = (
        torch.from_numpy(np.concatenate([[0], np.cumsum(each)]).astype(np.int32))
        for each in (query_S, key_S)
    )
    return RaggedLook(
        query, key, query_ends_S, key_ends_S, (int(query_S.max()), int(key_S.max())), causal
    )


def _stacked(rows: Sequence[Places], width: int) -> torch.Tensor:
    """[S, width]; pads point at the first of all, which exists."""
    stacked = np.zeros((len(rows), width), np.int64)
    for row, entries in zip(stacked, rows, strict=True):
        row[: len(entries)] = entries
    return torch.from_numpy(stacked)
