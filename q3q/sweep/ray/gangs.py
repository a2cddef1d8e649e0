"""Tasks that Ray has in hand: single ones, and gangs of ranks with one verdict."""

import time
from dataclasses import dataclass, field
from typing import Any

from q3q.sweep.ray.messages import DIED, ERROR, VALUE, caused_by
from q3q.sweep.ray.tasks import (
    Outcome,
    Resources,
    Started,
    Task,
    WorkerDiedError,
)
from q3q.team import PeerLostError

ECHO_SECONDS = (
    3.0  # that the ranks of a gang have to end once one has, and to say which of them failed first
)


@dataclass
class InFlight:
    """A task that Ray has, or one rank of it. deaths: since it last got further. clock: monotonic seconds when it was
    submitted, then when it began."""

    task: Task
    attempt: int
    deaths: int = 0
    began: Started | None = None
    clock: float = field(default_factory=time.monotonic)
    rank: int = 0
    gang: "Gang | None" = None

    def ended(
        self, value: Any = None, error: BaseException | None = None, died: bool = False
    ) -> Outcome:
        seconds = time.monotonic() - self.clock if self.began else 0.0
        key, attempts = self.task.key, self.attempt
        return Outcome(
            key=key, value=value, error=error, died=died, attempts=attempts, seconds=seconds
        )


class Gang:
    """The ranks of one task. group: Ray's, with room for all. ends: how each rank that ended did."""

    def __init__(self, shape: Resources, entry: Any, work: tuple[Any, ...]) -> None:
        import ray

        amounts = {"CPU": shape.cpus, "GPU": shape.gpus, "memory": shape.memory, **shape.pin}
        bundle = {name: amount for name, amount in amounts.items() if amount}
        # On as few machines as possible, and all at once or not at all, so that no two gangs wait for each other.
        self.group = ray.util.placement_group([bundle] * shape.ranks, strategy="PACK")
        self.ranks, self.ends = shape.ranks, dict[int, tuple[str, Any]]()
        self._entry, self._work = entry, work
        self._failed: float | None = None

    def seat(self, rank: int, address: tuple[str, int] | None = None) -> Any:
        """Have Ray run a rank; its stream. address: where rank 0 waits for it."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        strategy = PlacementGroupSchedulingStrategy(self.group, placement_group_bundle_index=rank)
        return self._entry.options(scheduling_strategy=strategy).remote(
            *self._work, (rank, self.ranks, address)
        )

    def verdict(self) -> tuple[str, Any] | None:
        """How the gang ended, None if it did not.

        Whoever loses the connection to a rank that failed fails too, and may be heard first. When rank 0 is through,
        the others end by themselves in a moment, and their processes serve others.
        """
        said = [(rank, end) for rank, end in self.ends.items() if rank == 0 or end[0] != VALUE]
        if not said:
            return None
        weight, rank = min((_weight(rank, *end), rank) for rank, end in said)
        self._failed = self._failed or time.monotonic()
        waited = len(self.ends) == self.ranks or time.monotonic() - self._failed > ECHO_SECONDS
        if weight in (_DONE, _OTHERS_ERROR, _ECHO) and not waited:
            return None
        if weight == _ECHO:
            lost = WorkerDiedError("the ranks of a gang lost each other, and none says why")
            return DIED, caused_by(lost, self.ends[rank][1])
        return self.ends[rank]


_DONE, _GONE, _OWN_ERROR, _OTHERS_ERROR, _ECHO = range(5)


def _weight(rank: int, kind: str, content: Any) -> int:
    """What counts first of how the ranks of a gang ended."""
    if kind == ERROR:
        return (
            _ECHO if isinstance(content, PeerLostError) else _OTHERS_ERROR if rank else _OWN_ERROR
        )
    return _DONE if kind == VALUE else _GONE
