"""Texts with shared prefixes, packed as one prefix tree that holds each of its tokens once.

Sorted texts are in the depth-first order of their prefix tree. Each text adds a *branch*: the
tokens that it does not share with the text before it. The tree runs in batches that end wherever
the token budget ends. A batch needs the keys and values of one path from the root, so what is kept
never exceeds one text; of a recurrence, it needs the states from which later texts go on. No batch
holds a padding token.

Shapes: T tokens of a batch or of the tree, S spans of a batch, P keys.
"""

import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from q3q.evaluate.branches import Branches, Span
from q3q.models.attention import AttentionSlice, TreeAttention, VarlenSlice
from q3q.models.cache import NOTHING, Past
from q3q.models.flow import Flow
from q3q.models.softmax import VarlenLayout
from q3q.models.transfer import moved

Ids = NDArray[np.int32]
Positions = NDArray[np.int64]

# Spans attend to shared ancestors together if that saves gathering at least this many keys;
# otherwise these keys are gathered with each span's own.
WORTH_SHARING = 4096
# The same for varlen slices: a GPU gathers quickly, and combining two slices costs it more.
VARLEN_WORTH_SHARING = 1 << 15
# Most scores (queries x keys) of one slice, and most keys gathered for it: they bound its memory.
SLICE_SCORES = 1 << 22
SLICE_KEYS = 1 << 15


@dataclass(frozen=True)
class SharedStretch:
    """Ancestors that several spans attend to together.

    depths: of the ancestors. queries: tokens of the batch, those of consecutive spans.
    """

    depths: slice
    queries: slice


# A span, and the keys that it attends to by itself: unshared ancestors, then its own tokens.
OwnKeys = tuple[Span, Positions]


@dataclass(frozen=True)
class TreeBatch:
    """Tokens first .. stop - 1 of the tree and how they attend, ready for `Decoder.states`.

    flow: how a recurrence goes through them; None if the model has none.
    """

    first: int
    stop: int
    own: Sequence[AttentionSlice | VarlenSlice]
    shared: Sequence[AttentionSlice | VarlenSlice]
    depth_T: torch.Tensor
    path_index: torch.Tensor
    flow: Flow | None

    def attention(
        self, path: Past = NOTHING, read_index: torch.Tensor | None = None
    ) -> TreeAttention:
        """Return one block's attention.

        Args:
            path: what the block kept of the batch before; nothing at the tree's beginning.
            read_index: see `TreeAttention`.
        """
        return TreeAttention(
            self.own,
            self.shared,
            self.depth_T,
            self.path_index,
            path.keys_values,
            flow=self.flow,
            state=path.state,
            read_index=read_index,
        )

    def to(self, device: torch.device, dtype: torch.dtype) -> "TreeBatch":
        """Return the batch on the model's device, its biases in the model's dtype."""
        return moved(self, device, dtype)


@dataclass
class PackedTree:
    """The prefix tree of texts, depth first, and how far it has run.

    texts: token ids, distinct and sorted.
    varlen: batches attend by `VarlenSlice`s instead of `AttentionSlice`s.
    chunk: tokens of a text whose keys are rounded together, so that what spans share ends with such
        a chunk; 1 if each is rounded by itself.
    states: the most states of a recurrence that may be in memory; 0 if the model has none.
    ends: the most texts that end in a batch, if the states behind their last tokens are kept; 0 if
        they are not.
    shared: number of tokens that each text shares with the one before it.
    begin: index of each text's branch in `ids`, and at last the tree's length.
    ids: the tree's tokens [T].
    attended: query slots of attention in the batches so far.
    padded: those of them that are the attention's own padding; linear layers see none.
    """

    texts: list[Ids]
    varlen: bool = False
    states: int = 0
    ends: int = 0
    chunk: int = 1
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
        self._longest = max((len(text) for text in self.texts), default=0)
        self._branches: Branches | None = None
        if self.states:
            lengths = [len(text) for text in self.texts]
            keep_ends = self.ends > 0
            self._branches = Branches(lengths, self.shared, self.states, keep_ends=keep_ends)
        # Text and depth at which the next batch begins, and where it ends.
        self._text, self._depth = self._next = 0, 0

    def __len__(self) -> int:
        return len(self.ids)

    def positions(self) -> Iterator[Positions]:
        """Yield each text's token positions in `ids`; the next text overwrites the array."""
        path = np.zeros(self._longest, np.int64)
        for text, common, begin in zip(self.texts, self.shared, self.begin, strict=False):
            path[common : len(text)] = np.arange(begin, begin + len(text) - common)
            yield path[: len(text)]

    @property
    def done(self) -> bool:
        return self._text == len(self.texts)

    def next_batch(self, budget: int) -> TreeBatch:
        """Plan the next tokens, at most `budget`; only a branch longer than that is cut."""
        spans: list[Span] = []
        text, depth, room = self._text, self._depth, budget
        last = text + self.ends if self.ends else len(self.texts)
        while text < min(last, len(self.texts)) and room:
            remaining = len(self.texts[text]) - depth
            if remaining > room and spans:
                break
            spans.append(Span(text, depth, depth + min(remaining, room), budget - room))
            room -= spans[-1].length
            depth = spans[-1].stop
            if depth == len(self.texts[text]):
                text += 1
                depth = self.shared[text] if text < len(self.texts) else 0
        self._next = text, depth
        return self._plan(spans, next_depth=depth)

    def advance(self) -> None:
        """Go past the last batch."""
        self._text, self._depth = self._next

    def follow(self, copied: "PackedTree") -> None:
        """Go to where a copy of this tree has gone."""
        self._text, self._depth = copied._text, copied._depth
        self.attended, self.padded = copied.attended, copied.padded

    def _plan(self, spans: list[Span], next_depth: int) -> TreeBatch:
        # Keys are numbered: the past path by depth, then the batch's tokens. path[d] is the key at
        # depth d of the current span's text.
        path = np.zeros(self._longest, np.int64)
        path[: self._depth] = np.arange(self._depth)
        if self.varlen:  # no scores are held
            stretches, floors = shared_stretches(spans, VARLEN_WORTH_SHARING, sys.maxsize)
        else:
            stretches, floors = shared_stretches(spans, WORTH_SHARING, SLICE_SCORES, self.chunk)
        shared: list[AttentionSlice | VarlenSlice] = []
        own_keys: list[OwnKeys] = []
        for number, span in enumerate(spans):
            for stretch in stretches.get(number, ()):
                keys = path[stretch.depths]
                if self.varlen:
                    counts = np.array([stretch.queries.stop - span.offset]), np.array([len(keys)])
                    shared.append(_varlen_slice(stretch.queries, keys, *counts, causal=False))
                else:
                    shared += _shared_slices(stretch.queries, keys)
            first_key = self._depth + span.offset
            path[span.start : span.stop] = np.arange(first_key, first_key + span.length)
            own_keys.append((span, path[floors[number] : span.stop].copy()))
        tokens = spans[-1].end
        own: list[AttentionSlice | VarlenSlice]
        if self.varlen:
            queries = np.array([span.length for span in spans])
            counts = queries, np.array([len(keys) for _, keys in own_keys])
            every_key = np.concatenate([keys for _, keys in own_keys])
            own = [_varlen_slice(slice(0, tokens), every_key, *counts, causal=True)]
            self.attended += tokens
        else:
            own = [self._own_slice(bucket) for bucket in buckets(own_keys)]
        first = self.begin[self._text] + self._depth - self.shared[self._text]
        depth_T = torch.from_numpy(np.concatenate([np.arange(s.start, s.stop) for s in spans]))
        path_index = torch.from_numpy(path[:next_depth].copy())
        flow = None if self._branches is None else self._branches.flow(spans, *self._next)
        return TreeBatch(first, first + tokens, own, shared, depth_T, path_index, flow)

    def _own_slice(self, bucket: list[OwnKeys]) -> AttentionSlice:
        """Attend causally from each span to its own tokens and unshared ancestors."""
        queries = [np.arange(span.offset, span.end) for span, _ in bucket]
        wide, tall = max(map(len, queries)), max(len(keys) for _, keys in bucket)
        self.attended += wide * len(bucket)
        self.padded += wide * len(bucket) - sum(map(len, queries))
        # Query i of a span sees its ancestors (keys not its own), i + 1 of its own, and no padding.
        ancestors = torch.tensor([len(keys) - span.length for span, keys in bucket])
        causal = not ancestors.any()
        bias = None
        if not causal:
            unseen = torch.arange(tall) > ancestors[:, None, None] + torch.arange(wide)[:, None]
            bias = torch.zeros(unseen.shape).masked_fill_(unseen, -torch.inf)
        if len(bucket) == 1:
            [(span, keys)] = bucket
            index = _key_index(keys)
            key = index if isinstance(index, slice) else index[None]
            return AttentionSlice(slice(span.offset, span.end), key, causal, bias)
        query, key = _stacked(queries, wide), _stacked([keys for _, keys in bucket], tall)
        flat_T = np.concatenate([row * wide + np.arange(len(q)) for row, q in enumerate(queries)])
        real = torch.from_numpy(flat_T), torch.from_numpy(np.concatenate(queries))
        return AttentionSlice(query, key, causal, bias, real)


def shared_stretches(
    spans: Sequence[Span], min_saved_keys: int, max_scores: int, chunk: int = 1
) -> tuple[dict[int, list[SharedStretch]], list[int]]:
    """Choose the ancestors that spans attend to together, and what is left to each span.

    A run of consecutive spans has the path down to its shallowest span's start in common. Sharing
    that path saves gathering its keys once for each span but one. The spans that start there split
    the run: those between two of them descend from the first, so their common path goes on deeper.

    Args:
        spans: a batch's spans, depth first.
        min_saved_keys: share a path if that saves gathering so many keys.
        chunk: share whole chunks of so many tokens.
        max_scores: share it as well if the run's scores with it are more, which spares large masks.

    Returns:
        The stretches by the number of their first span, shallow before deep, and for each span the
        depth from which on it attends by itself.
    """
    stretches: defaultdict[int, list[SharedStretch]] = defaultdict(list)
    floors = [0] * len(spans)
    runs = [(range(len(spans)), 0)]  # consecutive spans, and the depth down to which all is shared
    while runs:
        run, floor = runs.pop()
        deep = min(spans[number].start for number in run)
        top = deep - deep % chunk
        queries = slice(spans[run[0]].offset, spans[run[-1]].end)
        saved_keys = (len(run) - 1) * (top - floor)
        scores = (queries.stop - queries.start) * (top - floor)
        if saved_keys >= min_saved_keys or scores > max_scores:
            stretches[run[0]].append(SharedStretch(slice(floor, top), queries))
            floor = top
        splits = [number for number in run if spans[number].start == deep]
        for number in splits:
            floors[number] = floor
        for before, after in pairwise([run[0] - 1, *splits, run[-1] + 1]):
            if after - before > 1:
                runs.append((range(before + 1, after), floor))
    return stretches, floors


def buckets(own_keys: Sequence[OwnKeys]) -> Iterator[list[OwnKeys]]:
    """Yield spans of similar shapes that attend as one slice, within the memory bounds."""
    alike: dict[tuple[int, int], list[OwnKeys]] = {}
    for span, keys in own_keys:
        shape = _rounded_up(span.length), _rounded_up(len(keys))
        alike.setdefault(shape, []).append((span, keys))
    for (wide, tall), group in alike.items():
        most = max(1, min(SLICE_SCORES // (wide * tall), SLICE_KEYS // tall))
        group.sort(key=lambda entry: (entry[0].length, len(entry[1])))
        for start in range(0, len(group), most):
            yield group[start : start + most]


def common_prefix(a: Ids, b: Ids) -> int:
    """Count the tokens that two texts share from their beginnings on."""
    length = min(len(a), len(b))
    different = a[:length] != b[:length]
    first = int(different.argmax()) if length else 0
    return first if length and different[first] else length


def _rounded_up(count: int) -> int:
    """Round up so that similar counts become equal.

    Steps: 1 below 8, 2 below 16, 4 below 64, then an eighth at most. Finer ones would give many
    slices of almost nothing.
    """
    step = max(min(4, 1 << max(0, count.bit_length() - 3)), 1 << max(0, count.bit_length() - 4))
    return -(-count // step) * step


def _shared_slices(queries: slice, keys: Positions) -> Iterator[AttentionSlice]:
    """Attend from all queries to the same keys, in slices of bounded size."""
    index = _key_index(keys)
    key = index if isinstance(index, slice) else index[None]
    most = max(1, SLICE_SCORES // len(keys))
    for start in range(queries.start, queries.stop, most):
        yield AttentionSlice(slice(start, min(queries.stop, start + most)), key)


def _varlen_slice(
    query: slice, keys: Positions, query_S: Positions, key_S: Positions, *, causal: bool
) -> VarlenSlice:
    """Return a slice of spans with query_S queries and key_S keys each."""
    query_ends_S, key_ends_S = (
        torch.from_numpy(np.concatenate([[0], np.cumsum(counts_S)]).astype(np.int32))
        for counts_S in (query_S, key_S)
    )
    longest = int(query_S.max()), int(key_S.max())
    layout = VarlenLayout(query_ends_S, key_ends_S, longest, causal)
    return VarlenSlice(query, _key_index(keys), layout)


def _key_index(keys: Positions) -> slice | torch.Tensor:
    """Return a slice for consecutive keys, which needs no copy of them, else their indices [P]."""
    if (np.diff(keys) == 1).all():
        return slice(int(keys[0]), int(keys[-1]) + 1)
    return torch.from_numpy(keys.copy())


def _stacked(rows: Sequence[Positions], width: int) -> torch.Tensor:
    """Stack rows to [S, width]; the padding is index 0, which always exists."""
    stacked = np.zeros((len(rows), width), np.int64)
    for row, entries in zip(stacked, rows, strict=True):
        row[: len(entries)] = entries
    return torch.from_numpy(stacked)
