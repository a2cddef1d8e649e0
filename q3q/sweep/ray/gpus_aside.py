"""GPUs that failed under a task are kept from the other tasks.

Ray does not notice that a GPU is broken. A task that fails on it at once leaves it free, so Ray
gives it to the next task, and so on: one GPU could end a whole sweep. Therefore the process whose
GPU failed stays and keeps its part of the GPU (`worker`), and its task runs once more, on another
GPU. If that one fails too, the task is as likely to blame as the GPUs, and both are given back.
"""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from q3q.storage.aside import tell
from q3q.sweep.ray.in_flight import InFlight
from q3q.sweep.ray.nodes import count_slots
from q3q.sweep.ray.tasks import Resources

# Seconds in which nothing runs, though tasks wait, after which they get the GPUs that failed: there
# are too few without these.
IDLE_SECONDS = 60.0


class _Kept(NamedTuple):
    """What keeps a GPU: the task that failed there, and the GPU's machine and numbers."""

    key: str
    gpu: tuple[str, tuple[str, ...]]


class GpusAside:
    """The GPUs that failed during one run, each with the stream of the process that keeps it."""

    def __init__(self) -> None:
        self._kept: dict[Any, _Kept] = {}
        self._busy = time.monotonic()  # when something ran last

    def keep(self, stream: Any, flight: InFlight) -> None:
        """Note that a task's process keeps the GPU that failed under it."""
        began = flight.began
        gpu = ("", ()) if began is None else (began.node_id, began.gpu_ids)
        self._kept[stream] = _Kept(flight.task.key, gpu)

    def has_failed_before(self, key: str) -> bool:
        """Return True if a GPU is kept that failed under this task."""
        return any(kept.key == key for kept in self._kept.values())

    def another(self, shape: Resources, machines: Sequence[Resources]) -> bool:
        """Return True if such a task has another GPU to run on."""
        able = sum(int(machine.gpus) for machine in machines if count_slots(shape, machine))
        return able > len({kept.gpu for kept in self._kept.values()})

    def released(self, key: str | None = None) -> list[Any]:
        """Return the streams of the processes to kill, which gives their GPUs back.

        Args:
            key: of the task that they failed under; None for all.
        """
        streams = [stream for stream, kept in self._kept.items() if key in (None, kept.key)]
        for stream in streams:
            del self._kept[stream]
        return streams

    def released_if_idle(self, runs: bool) -> list[Any]:
        """Return all streams to kill if nothing has run for `IDLE_SECONDS`, though tasks wait."""
        if runs or not self._kept:
            self._busy = time.monotonic()
        elif time.monotonic() - self._busy > IDLE_SECONDS:
            tell("Trials wait for GPUs, and only those that failed are free: they are tried again")
            return self.released()
        return []
