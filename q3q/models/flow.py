"""A recurrence over one batch of a prefix tree: what texts share runs once, then all at a time.

A batch is cut into *segments* wherever texts part. A segment begins with the state that the one
before it left, so those at one level of this tree of segments run together, as rows of few calls.

Shapes: T tokens of a batch, S segments that run as rows, W the longest one's tokens, K states that
are kept of them, P states on the path from the root, X and Y numbers a token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from q3q.models.recurrence import Recurrence, State, join, select


@dataclass(frozen=True)
class Rows:
    """Segments that run as the rows of one call, the shorter ones padded.

    token_SW: their tokens in the batch; as padding, a row's last token once more.
    lengths_S: their numbers of tokens; None if nothing is padded.
    real_T: positions in the flat [S * W] that are not padding; None if all are not.
    begin_S: the state that each begins with, of those that the level before kept (of the path's at
        the first level); None where texts begin.
    keep_K: rows whose state somebody asks for.
    """

    token_SW: Tensor
    lengths_S: Tensor | None
    real_T: Tensor | None
    begin_S: Tensor | None
    keep_K: Tensor | None

    def run(
        self, recurrence: Recurrence, inputs_TX: Tensor, before: State | None
    ) -> tuple[Tensor, Tensor, list[State]]:
        """Return the tokens, their outputs, and the states that are kept, if any are."""
        begin = next(iter(_some(before, self.begin_S)), None)
        outputs_SWY, states = recurrence(inputs_TX[self.token_SW], begin, self.lengths_S)
        token_T, outputs_TY = self.token_SW.flatten(), outputs_SWY.flatten(0, 1)
        if self.real_T is not None:
            token_T, outputs_TY = token_T[self.real_T], outputs_TY[self.real_T]
        return token_T, outputs_TY, _some(states, self.keep_K)


@dataclass(frozen=True)
class Level:
    """Segments as far from the root as each other; their kept states are numbered together.

    onward_K: at most one kept state, which is on the path when the part ends.
    ends_K: kept states behind texts' last tokens, if they are asked for.
    """

    calls: Sequence[Rows]
    onward_K: Tensor | None
    ends_K: Tensor | None


@dataclass(frozen=True)
class FlowPart:
    """Consecutive segments of a batch, as many as may have their states in memory.

    stay_P: the path's states that are still needed when the part ends; None if none is.
    order_K: where each text's end is among the ends of all levels; None if they are not asked for.
    """

    levels: Sequence[Level]
    stay_P: Tensor | None
    order_K: Tensor | None


@dataclass(frozen=True)
class Flow:
    """How a recurrence goes through a batch."""

    parts: Sequence[FlowPart]

    def run(
        self, recurrence: Recurrence, inputs_TX: Tensor, path: State | None
    ) -> tuple[Tensor, State | None, State | None]:
        """Run a block's recurrence.

        Args:
            path: the states that the batch before left, shallow before deep.

        Returns:
            Each token's output [T, Y], the next batch's path, and the states behind the last tokens
            of texts that end in the batch, in their order, if they are asked for.
        """
        outputs_TY: Tensor | None = None
        ends: list[State] = []
        for part in self.parts:
            onward, ended, before = _some(path, part.stay_P), list[State](), path
            for level in part.levels:
                kept: list[State] = []
                for rows in level.calls:
                    token_T, rows_TY, states = rows.run(recurrence, inputs_TX, before)
                    if outputs_TY is None:
                        outputs_TY = rows_TY.new_empty(len(inputs_TX), *rows_TY.shape[1:])
                    outputs_TY[token_T] = rows_TY
                    kept += states
                    del rows_TY, states  # a call's, before the next one's are there
                before = join(kept)
                del kept
                onward += _some(before, level.onward_K)
                ended += _some(before, level.ends_K)
            path = join(onward)
            ends += _some(join(ended), part.order_K)
        assert outputs_TY is not None  # a batch has a token
        return outputs_TY, path, join(ends)


def _some(states: State | None, index_K: Tensor | None) -> list[State]:
    """Return a copy of some of the states, in a list; an empty one if none are asked for."""
    if index_K is None:
        return []
    assert states is not None
    return [select(states, index_K)]
