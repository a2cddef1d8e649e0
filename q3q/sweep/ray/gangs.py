"""Gangs: tasks that run as several ranks at once.

Each rank runs in a worker of its own, and all are placed together (a Ray placement group). Rank 0
is the task: what it reports and how it ends counts. When any rank dies or fails, so does the gang:
the others, who wait for it, are killed at once.

A gang may also hang: a process that is stopped, or an exchange that never ends because a link is
down. Each rank sends heartbeats (`worker`), which say whether it waits for other ranks and how many
exchanges it has had. A rank that works, however long, does not wait; so a gang hangs if a rank
sends nothing at all, or if all of its ranks wait and none gets on.
"""

import os
import time
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from q3q.sweep.ray.messages import DIED, ERROR, VALUE, Message, caused_by
from q3q.sweep.ray.tasks import Resources, WorkerDiedError
from q3q.team import PeerLostError

# A gang that hangs for so long is given up: longer than any tensor travels, and than code keeps
# Python's lock to itself. What a rank does alone may take hours.
HANG_SECONDS = float(os.environ.get("Q3Q_HANG_SECONDS", "300"))
# Seconds that the other ranks have, once one has ended, to end and to say which failed first.
SETTLE_SECONDS = 3.0


class Precedence(IntEnum):
    """How a rank ended; the first of these that occurs in a gang decides how the gang ended."""

    RESULT = 0
    DEATH = 1  # or handed back
    ERROR_OF_RANK_0 = 2
    ERROR_OF_OTHER_RANK = 3  # what all ranks find wrong, rank 0 says
    SECONDARY_FAILURE = 4  # the rank lost its connection to one that failed before

    @classmethod
    def of(cls, rank: int, end: Message) -> "Precedence":
        if end.kind == VALUE:
            return cls.RESULT
        if end.kind != ERROR:
            return cls.DEATH
        if isinstance(end.content, PeerLostError):
            return cls.SECONDARY_FAILURE
        return cls.ERROR_OF_RANK_0 if rank == 0 else cls.ERROR_OF_OTHER_RANK


@dataclass
class Heard:
    """What the driver last heard of a rank.

    exchanges, waits: of its last heartbeat
    silence: seconds since its last message, of any kind
    still: seconds since its number of exchanges changed, or since it did not wait
    """

    exchanges: int = 0
    waits: bool = False
    silence: float = 0.0
    still: float = 0.0


class Gang:
    """The ranks of one task.

    group: Ray's placement group, with room for all
    ends: the last message of each rank that ended
    heard: of each rank that has begun
    """

    def __init__(self, shape: Resources, entry: Any, work: tuple[Any, ...]) -> None:
        import ray

        amounts = {
            "CPU": shape.cpus,
            "GPU": shape.gpus,
            "memory": shape.memory,
            **shape.kind_request,
        }
        bundle = {name: amount for name, amount in amounts.items() if amount}
        # On as few machines as possible, and all at once or not at all, so that no two gangs wait
        # for each other.
        self.group = ray.util.placement_group([bundle] * shape.ranks, strategy="PACK")
        self.ranks, self.ends = shape.ranks, dict[int, Message]()
        self.heard: dict[int, Heard] = {}
        self._entry, self._work = entry, work
        self._first_end: float | None = None

    def start(self, rank: int, address: tuple[str, int] | None = None) -> Any:
        """Have Ray start a rank; return its stream.

        Args:
            address: where rank 0 listens; None for rank 0 itself.
        """
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        strategy = PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=rank)
        return self._entry.options(scheduling_strategy=strategy).remote(
            *self._work, (rank, self.ranks, address)
        )

    def hear(self, rank: int, pulse: tuple[int, bool] | None = None) -> None:
        """Note a rank's message; `pulse`: of a heartbeat, its exchanges and whether it waits."""
        heard = self.heard.setdefault(rank, Heard())
        heard.silence = 0.0
        if pulse is not None:
            exchanges, waits = pulse
            if not waits or exchanges != heard.exchanges:
                heard.still = 0.0
            heard.exchanges, heard.waits = exchanges, waits

    def pass_time(self, seconds: float) -> None:
        """Let seconds pass in which the driver listened."""
        for heard in self.heard.values():
            heard.silence += seconds
            heard.still += seconds

    def hung(self) -> dict[int, str]:
        """Return the ranks that hang, and how, in words; none if the gang gets on."""
        live = {rank: heard for rank, heard in self.heard.items() if rank not in self.ends}
        silent = {
            rank: f"has not been heard for {heard.silence:.0f} s: it is stopped, or its machine is"
            for rank, heard in live.items()
            if heard.silence > HANG_SECONDS
        }
        if silent or len(self.heard) < self.ranks:
            return silent
        if any(not heard.waits or heard.still <= HANG_SECONDS for heard in live.values()):
            return {}
        least = min((heard.still for heard in live.values()), default=0.0)
        words = f"has waited for the others for {least:.0f} s, as they all do: an exchange hangs"
        return dict.fromkeys(live, words)

    def verdict(self) -> Message | None:
        """Return how the gang ended; None while it goes on, or while the cause may yet be heard.

        A death, or rank 0's own error, ends the gang at once. Otherwise the other ranks get
        SETTLE_SECONDS: a rank that loses its connection to one that failed fails too, and may be
        heard first; and once rank 0 has its result the others end by themselves in a moment, and
        their processes serve other tasks.
        """
        # That another rank than 0 has finished says nothing about the gang.
        decisive = {rank: end for rank, end in self.ends.items() if rank == 0 or end.kind != VALUE}
        if not decisive:
            return None
        precedence, rank = min((Precedence.of(rank, end), rank) for rank, end in decisive.items())
        if self._first_end is None:
            self._first_end = time.monotonic()
        settled = (
            len(self.ends) == self.ranks or time.monotonic() - self._first_end > SETTLE_SECONDS
        )
        if not settled and precedence not in (Precedence.DEATH, Precedence.ERROR_OF_RANK_0):
            return None
        if precedence is Precedence.SECONDARY_FAILURE:
            lost = WorkerDiedError(
                "all ranks of the gang lost their connections, and none reported a cause"
            )
            return Message(DIED, caused_by(lost, decisive[rank].content))
        return decisive[rank]
