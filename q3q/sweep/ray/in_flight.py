"""A task that Ray has: one that waits in Ray's queue, or runs."""

import time
from dataclasses import dataclass, field
from typing import Any

from q3q.sweep.ray.gangs import Gang
from q3q.sweep.ray.tasks import Outcome, Started, Task


@dataclass
class InFlight:
    """A task that Ray has, or one rank of it.

    deaths: since it last got further
    began: its first event; None while it waits
    waiting_since, running_since: monotonic seconds; waiting counts while the cluster has no
        machine that is large enough
    """

    task: Task
    attempt: int
    deaths: int = 0
    began: Started | None = None
    waiting_since: float = field(default_factory=time.monotonic)
    running_since: float = 0.0
    rank: int = 0
    gang: Gang | None = None

    def outcome(self, value: Any = None, error: BaseException | None = None) -> Outcome:
        return Outcome(
            key=self.task.key,
            value=value,
            error=error,
            attempts=self.attempt,
            seconds=time.monotonic() - self.running_since if self.began else 0.0,
        )
