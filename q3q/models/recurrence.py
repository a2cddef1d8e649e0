"""What carries a state from token to token, where attention would keep every key and value.

A family's stages pass a `Recurrence` to `Attention.recur`, which knows where texts begin, where
they share a prefix and what came before. The recurrence knows only how it computes.

Shapes: B rows, T tokens, X numbers a token.
"""

from collections.abc import Sequence
from typing import Protocol, TypeVar

import torch
from torch import Tensor

State = tuple[Tensor, ...]  # what a row's tokens leave behind for its next one: [B, ...] each
Tensors = TypeVar("Tensors", bound=tuple[Tensor, ...])


class Recurrence(Protocol):
    """Tokens in their order, each of which reads and changes its row's state."""

    def __call__(
        self, inputs_BTX: Tensor, state: State | None = None, lengths_B: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Return each token's output [B, T, Y], and each row's state behind its last token.

        Args:
            state: what each row's tokens before these left behind; None at the beginning of texts.
            lengths_B: each row's number of tokens, at least 1; what lies behind them is padding,
                which changes no state and whose outputs mean nothing. None: all T.
        """


def select(tensors: Tensors, rows_R: Tensor) -> Tensors:
    """Return a copy of some rows of each tensor."""
    return tuple(tensor[rows_R] for tensor in tensors)  # type: ignore[return-value]


def join(states: Sequence[State]) -> State | None:
    """Return all rows of these states, in their order; None if there are none."""
    if len(states) < 2:
        return states[0] if states else None
    return tuple(map(torch.cat, zip(*states, strict=True)))
