"""GPUs that failed under a task are kept from the other tasks.

Ray does not notice that a GPU is broken. A task that fails on it at once leaves it free, so Ray
gives it to the next task, and so on: one GPU could end a whole sweep. Therefore the process whose
GPU failed stays and keeps its part of the GPU (`worker`), and its task runs once more, on another
GPU. If that one fails too, the task is as likely to blame as the GPUs, and both are given back.

Ray may give the task the same GPU again: another part of it, or all of it after it was given back
because nothing else could run. That part is kept as well, and the task runs again.
"""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from q3q.storage.aside import tell
from q3q.sweep.ray.in_flight import InFlight
from q3q.sweep.ray.nodes import count_slots
from q3q.sweep.ray.tasks import Resources

# Least seconds in which nothing runs, though tasks wait, after which they get the GPUs that failed:
# there are too few without these.
IDLE_SECONDS = 60.0
# Failures of one task on the same GPU, after which the next one is its end: others may hold all the
# other GPUs for ever. Four quarters are a whole GPU.
MOST_FAILURES = 4

Gpu = tuple[str, tuple[str, ...]]  # its machine, and its number there; a task may have several


class _FailedGpu(NamedTuple):
    """A GPU that is kept aside, and the key of the task that failed there."""

    key: str
    gpu: Gpu


def gpu_of(flight: InFlight) -> Gpu:
    """Return the GPU that a task has."""
    began = flight.began
    return ("", ()) if began is None else (began.node_id, began.gpu_ids)


class GpusAside:
    """The GPUs that failed during one run, each with the stream of the process that keeps it.

    Args:
        patience: seconds in which more machines may come, where a cluster grows on demand.
    """

    def __init__(self, patience: float = 0.0) -> None:
        self.patience = patience
        self._kept: dict[Any, _FailedGpu] = {}
        # By the tasks' keys, also after GPUs were given back: otherwise a task could fail for ever.
        self._failed: dict[str, list[Gpu]] = {}
        self._busy = time.monotonic()  # when something ran last

    def keep(self, stream: Any, flight: InFlight) -> None:
        """Note that a task's process keeps the GPU that failed under it."""
        key, gpu = flight.task.key, gpu_of(flight)
        self._kept[stream] = _FailedGpu(key, gpu)
        self._failed.setdefault(key, []).append(gpu)

    def has_failed_before(self, key: str, gpu: Gpu) -> bool:
        """Return True if the task has failed on another GPU than this one, or too often on it."""
        earlier = self._failed.get(key, [])
        return any(other != gpu for other in earlier) or len(earlier) >= MOST_FAILURES

    def forget_ended(self) -> None:
        """Forget processes that ended before they were killed here, and so keep nothing.

        Ray kills some when memory is short, and others are lost with their machine.
        """
        import ray

        if streams := list(self._kept):
            # They have sent their last message, so all that may still come is their end.
            for stream in ray.wait(streams, num_returns=len(streams), timeout=0)[0]:
                del self._kept[stream]

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
        """Return all streams to kill if nothing has run for long, though tasks wait."""
        if runs or not self._kept:
            self._busy = time.monotonic()
        elif time.monotonic() - self._busy > max(IDLE_SECONDS, self.patience):
            tell("Trials wait for GPUs, and only those that failed are free: they are tried again")
            return self.released()
        return []
