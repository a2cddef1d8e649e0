"""Where the texts of a prefix tree part, and what a recurrence does with that.

Keys and values of a branch are there for whoever needs a part of them. A state cannot be rewound,
so it must be kept wherever a later text goes another way: a span is cut there into segments. See
`q3q.models.flow`.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from q3q.models.flow import Flow, FlowPart, Level, Rows

# What a call costs, in tokens of padding: rows of other lengths join one if they pad it less.
CALL_TOKENS = 256
# A segment by its level in the tree of segments (-1: the path on which a part begins) and by its
# number there.
Place = tuple[int, int]


@dataclass(frozen=True)
class Span:
    """Part of a text's branch within a batch.

    text: its number.
    start, stop: depths start .. stop - 1 of the text.
    offset: its first token's index in the batch.
    """

    text: int
    start: int
    stop: int
    offset: int

    @property
    def length(self) -> int:
        return self.stop - self.start

    @property
    def end(self) -> int:
        """Index in the batch behind the span's last token."""
        return self.offset + self.length


class Branches:
    """A tree's branches.

    Args:
        lengths: tokens of each text.
        shared: tokens that each text shares with the one before it.
        most: segments whose states may be in memory.
        keep_ends: keep the states behind all texts' last tokens as well.
    """

    def __init__(
        self, lengths: Sequence[int], shared: Sequence[int], most: int, *, keep_ends: bool = False
    ) -> None:
        self._lengths, self._most, self._keep_ends = lengths, most, keep_ends
        self._shared = np.array(shared, np.int64)
        # Of each text's branch, the depths at which later texts go another way, ascending.
        self._cuts: list[list[int]] = [[] for _ in lengths]
        path: list[int] = []  # texts whose branches lead to the current one
        for text, depth in enumerate(shared):
            while path and shared[path[-1]] >= depth:
                path.pop()
            if depth:
                cuts = self._cuts[path[-1]]
                if cuts[:1] != [depth]:
                    cuts.insert(0, depth)  # each is at most the one before it
            path.append(text)

    def flow(self, spans: Sequence[Span], text: int, depth: int) -> Flow:
        """Plan how a recurrence goes through a batch.

        Args:
            text, depth: where the next batch begins.
        """
        segments = [segment for span in spans for segment in self._segments(span)]
        starts = range(0, len(segments), self._most)
        # Where each part begins, and behind the last one.
        bounds = [(segments[start].text, segments[start].start) for start in starts]
        held = [self._held(*bound) for bound in [*bounds, (text, depth)]]
        return Flow(
            [
                self._part(segments[start : start + self._most], *paths)
                for start, paths in zip(starts, pairwise(held), strict=True)
            ]
        )

    def _segments(self, span: Span) -> Iterator[Span]:
        cuts = self._cuts[span.text]
        inner = cuts[bisect_right(cuts, span.start) : bisect_left(cuts, span.stop)]
        for start, stop in pairwise([span.start, *inner, span.stop]):
            yield Span(span.text, start, stop, span.offset + start - span.start)

    def _held(self, text: int, depth: int) -> list[int]:
        """Return the depths of a path whose states are needed, ascending.

        These are where the text goes on, and where later ones branch off what is then left of the
        path.
        """
        if text == len(self._lengths):
            return []
        depths = np.concatenate(([depth], self._shared[text + 1 :]))
        left = np.minimum.accumulate(depths)
        first = np.flatnonzero(np.diff(left, prepend=depth + 1))
        return [int(held) for held in left[first][::-1] if held]

    def _part(self, segments: Sequence[Span], path: list[int], onward: list[int]) -> FlowPart:
        """Plan a part.

        Args:
            path, onward: depths of the states that are held before it and behind it.
        """
        at: dict[int, Place] = {depth: (-1, number) for number, depth in enumerate(path)}
        levels: list[list[Span]] = []
        parents: dict[Place, Place] = {}
        ends: list[Place] = []
        for segment in segments:
            while at and next(reversed(at)) > segment.start:
                at.popitem()  # the deepest comes last
            parent = at[segment.start] if segment.start else None
            level = 0 if parent is None else parent[0] + 1
            levels += [[]] if level == len(levels) else []
            place = level, len(levels[level])
            levels[level].append(segment)
            if parent is not None:
                parents[place] = parent
            at[segment.stop] = place
            if self._keep_ends and segment.stop == self._lengths[segment.text]:
                ends.append(place)
        going_on = [at[depth] for depth in onward]
        keep = {*parents.values(), *ends, *going_on}
        planned: list[Level] = []
        index = {(-1, number): number for number in range(len(path))}
        for level, segments_here in enumerate(levels):
            calls, kept = [], 0
            for numbers, begins in _calls(segments_here, level, parents):
                places = [(level, number) for number in numbers]
                rows_kept = [row for row, place in enumerate(places) if place in keep]
                index |= {places[row]: kept + n for n, row in enumerate(rows_kept)}
                kept += len(rows_kept)
                begin_S = [index[parents[place]] for place in places] if begins else []
                calls.append(_rows([segments_here[n] for n in numbers], begin_S, rows_kept))
            of_level = [[p for p in some if p[0] == level] for some in (going_on, ends)]
            planned.append(Level(calls, *(_index([index[p] for p in some]) for some in of_level)))
        by_level = sorted(range(len(ends)), key=lambda number: ends[number][0])
        stay_P = _index([number for level, number in going_on if level == -1])
        return FlowPart(planned, stay_P, _index(np.argsort(by_level).tolist()))


def _calls(
    segments: Sequence[Span], level: int, parents: dict[Place, Place]
) -> Iterator[tuple[list[int], bool]]:
    """Yield a level's segments by calls, and whether these begin with a state."""
    for begins in (False, True):
        numbers = [n for n in range(len(segments)) if ((level, n) in parents) == begins]
        for rows in alike([segments[number].length for number in numbers]):
            yield [numbers[row] for row in rows], begins


def alike(lengths: Sequence[int]) -> list[list[int]]:
    """Divide rows into calls so that padding, and CALL_TOKENS for each call, are least in all."""
    if not lengths:
        return []
    order = np.argsort(lengths, kind="stable")
    width_U, first_U = np.unique(np.array(lengths)[order], return_index=True)
    rows_U = np.append(first_U, len(order))  # number of rows that are shorter than each width
    cost_U = np.zeros(len(rows_U))  # of all rows shorter than a width
    begin_U = np.zeros(len(rows_U), np.int64)  # where the last call of these begins
    for stop, width in enumerate(width_U, start=1):
        costs = cost_U[:stop] + (rows_U[stop] - rows_U[:stop]) * width + CALL_TOKENS
        begin_U[stop] = costs.argmin()
        cost_U[stop] = costs.min()
    calls: list[list[int]] = []
    stop = len(width_U)
    while stop:
        begin = int(begin_U[stop])
        calls.append(order[rows_U[begin] : rows_U[stop]].tolist())
        stop = begin
    return calls


def _rows(segments: Sequence[Span], begin_S: list[int], keep_K: list[int]) -> Rows:
    lengths_S = np.array([segment.length for segment in segments])
    offsets_S = np.array([segment.offset for segment in segments])
    within_SW = np.arange(lengths_S.max())[None].repeat(len(segments), axis=0)
    real_SW = within_SW < lengths_S[:, None]
    token_SW = offsets_S[:, None] + np.minimum(within_SW, lengths_S[:, None] - 1)
    padded = not real_SW.all()
    return Rows(
        token_SW=torch.from_numpy(token_SW),
        lengths_S=torch.from_numpy(lengths_S) if padded else None,
        real_T=torch.from_numpy(np.flatnonzero(real_SW)) if padded else None,
        begin_S=_index(begin_S),
        keep_K=_index(keep_K),
    )


def _index(numbers: Sequence[int]) -> torch.Tensor | None:
    """Return the indices as a tensor; None if there are none."""
    return torch.tensor(numbers, dtype=torch.int64) if numbers else None
