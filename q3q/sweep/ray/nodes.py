"""Ray's machines: what they have, how many tasks fit, and what their kernel killed."""

from collections.abc import Callable, Mapping

from q3q.sweep.ray.tasks import (
    KIND,
    Resources,
)


def ray_machines() -> list[Resources]:
    import ray

    return [resources_of(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def resources_of(amounts: Mapping[str, float]) -> Resources:
    kinds = [name.removeprefix(KIND) for name in amounts if name.startswith(KIND)]
    return Resources(
        cpus=amounts.get("CPU", 0),
        gpus=amounts.get("GPU", 0),
        memory=int(amounts.get("memory", 0)) or None,
        kind=kinds[0] if len(kinds) == 1 else "",
    )


def count_slots(wanted: Resources, machine: Resources) -> int:
    """How many such tasks, or ranks of one, the machine has room for when it is empty."""
    if wanted.kind not in ("", machine.kind):
        return 0
    amounts = [
        (wanted.cpus, machine.cpus),
        (wanted.gpus, machine.gpus),
        (wanted.memory or 0, machine.memory or 0),
    ]
    return min((int(has // needs) for needs, has in amounts if needs), default=wanted.ranks)


def node_id_here() -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())


def count_kernel_kills() -> Callable[[], int]:
    """What counts the processes that a machine's kernel killed for memory, of its containers too; 0 if it does not
    say. Nested, and so pickled whole, like `task_entry`'s."""

    def count() -> int:
        from pathlib import Path

        try:
            counters = dict(
                line.split()
                for line in Path("/proc/vmstat").read_text(encoding="ascii").splitlines()
            )
        except OSError:
            return 0
        return int(counters.get("oom_kill", 0))

    return count
