"""The cluster's machines: what they have, how many tasks fit, and what their kernels killed."""

from collections.abc import Callable, Mapping

from q3q.sweep.ray.tasks import KIND, Resources


def ray_machines() -> list[Resources]:
    """Return what each live machine of the cluster has, taken or free."""
    import ray

    return [resources_of(node["Resources"]) for node in ray.nodes() if node["Alive"]]


def node_ids(*, gpus: bool) -> list[str]:
    """Return Ray's ids of the live machines where tasks may run; `gpus`: those that need GPUs.

    A cluster's head often has no cores for tasks (`ray start --num-cpus=0`).
    """
    import ray

    return [
        str(node["NodeID"])
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("GPU" if gpus else "CPU")
    ]


def resources_of(amounts: Mapping[str, float]) -> Resources:
    """Read Ray's table of a machine's, or a cluster's, resources."""
    kinds = [name.removeprefix(KIND) for name in amounts if name.startswith(KIND)]
    return Resources(
        cpus=amounts.get("CPU", 0),
        gpus=amounts.get("GPU", 0),
        memory=int(amounts.get("memory", 0)) or None,
        kind=kinds[0] if len(kinds) == 1 else "",
    )


def count_slots(request: Resources, machine: Resources) -> int:
    """Return how many such tasks, or ranks of one, fit on the machine when it is empty."""
    if request.kind not in ("", machine.kind):
        return 0
    amounts = [
        (request.cpus, machine.cpus),
        (request.gpus, machine.gpus),
        (request.memory or 0, machine.memory or 0),
    ]
    slots = [int(available // each) for each, available in amounts if each]
    return min(slots, default=request.ranks)


def current_node_id() -> str:
    import ray

    return str(ray.get_runtime_context().get_node_id())


def kernel_kill_counter() -> Callable[[], int]:
    """Return a function that counts the processes that its machine's kernel killed for memory.

    Processes in containers count too. It returns 0 where the kernel does not say (not Linux). It
    is nested, so that Ray pickles it whole and it runs where q3q cannot be imported.
    """

    def count() -> int:
        from pathlib import Path

        try:
            lines = Path("/proc/vmstat").read_text(encoding="ascii").splitlines()
        except OSError:
            return 0
        return int(dict(line.split() for line in lines).get("oom_kill", 0))

    return count
