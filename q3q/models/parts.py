"""What a rank of a gang reads of a checkpoint: its own part of each tensor, if it sees the files.

The parts are stretches of a tensor's numbers, whose places in a safetensors file are known.
"""

from collections.abc import Callable
from contextlib import suppress
from functools import partial

from torch import Tensor

from q3q.errors import CheckpointError
from q3q.models.checkpoint import Checkpoint
from q3q.team import Team

# Returns what reads some numbers of a tensor, from a number on; None if only all can be read.
Part = Callable[[Checkpoint, int, int], Callable[[], Tensor] | None]


def block_weight(k: int, name: str, checkpoint: Checkpoint) -> Tensor:
    """Return one of a block's tensors."""
    return checkpoint.block(k, names=[name])[name]


def end_part(end: str, checkpoint: Checkpoint, first: int, count: int) -> Callable[[], Tensor]:
    """Return what reads a part of the embedding or the head; see `Part`."""
    return partial(checkpoint.end_part, end, first, count)


def block_part(
    k: int, name: str, checkpoint: Checkpoint, first: int, count: int
) -> Callable[[], Tensor] | None:
    """Return what reads a part of one of a block's tensors; see `Part`."""
    if checkpoint.is_packed(k, name):
        return None
    return partial(checkpoint.block_part, k, name, first, count)


def seen_by_all(team: Team, checkpoint: Checkpoint | None) -> Checkpoint | None:
    """Return rank 0's checkpoint as each rank opens it; None if some rank does not see its files.

    They must be the same files, not copies of them: nobody has compared these with the plan's.
    """
    named = None if checkpoint is None else (checkpoint.folder, checkpoint.states())
    folder, states = team.broadcast(named)
    own = checkpoint
    if own is None:
        with suppress(CheckpointError, OSError):
            opened = Checkpoint(folder)
            own = opened if opened.states() == states else None
    return own if all(team.gather(own is not None)) else None
