"""How much memory and how many cores this process may use, as its kernel limits them.

A limit may lie on the process's own control group or on any group above it (Slurm, systemd,
Kubernetes, a container), so all of them count, in both versions of Linux's control groups.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from q3q.errors import ConfigError

PROC = Path("/proc")
FREE = 0.9  # of the free memory that trials may plan with


@dataclass(frozen=True)
class _MemoryFiles:
    """The names of a control group's files about memory.

    limits: bytes, or `max`
    used: bytes that the group and all below it take, page cache included
    idle: the line of memory.stat with the cache that the kernel gives back first
    """

    limits: tuple[str, ...]
    used: str
    idle: str


MEMORY_FILES = (
    _MemoryFiles(("memory.max", "memory.high"), "memory.current", "inactive_file"),
    _MemoryFiles(("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
)


def cores(proc: Path = PROC) -> int:
    """Return how many cores this process may use: by its affinity and its control groups."""
    affinity = getattr(os, "sched_getaffinity", None)
    count = len(affinity(0)) if affinity else os.cpu_count() or 1
    for group in control_groups("cpu", proc):
        for quota, period in (
            [*_text(group / "cpu.max").split(), "max", "max"][:2],
            [_text(group / f"cpu.cfs_{name}_us") for name in ("quota", "period")],
        ):
            if quota.isdigit() and period.isdigit() and int(period) > 0:  # not `max`, not -1
                count = min(count, int(quota) // int(period))
    return max(1, count)


def memory_for_trials(proc: Path = PROC) -> int | None:
    """Return the bytes of main memory that trials here may take; None if the system does not tell.

    `python -m q3q.limits` prints them, for `ray start --memory`: Ray itself sees the machine's
    memory, or the limit of a container as a whole.
    """
    try:
        return round(FREE * free_memory(proc))
    except ConfigError:
        return None


def free_memory(proc: Path = PROC) -> int:
    """Return the bytes of main memory that this process can have, its present ones included.

    Raises:
        ConfigError: this system does not tell.
    """
    unclaimed = unclaimed_memory(proc)
    pages = int((proc / "self/statm").read_text(encoding="ascii").split()[1])
    return unclaimed + pages * os.sysconf("SC_PAGE_SIZE")


def unclaimed_memory(proc: Path = PROC) -> int:
    """Return the bytes of main memory that this process can have beside its present ones.

    It is what the machine has left or, if that is less, what one of the process's control groups
    has left of its limit. Page cache that the kernel gives back first counts as free in both.

    Raises:
        ConfigError: this system does not tell.
    """
    available = re.search(r"^MemAvailable:\s*(\d+) kB", _text(proc / "meminfo"), re.MULTILINE)
    if available is None:
        raise ConfigError("this system does not say how much memory is free: give memory=8GB")
    rooms = [room for group in control_groups("memory", proc) for room in _rooms(group)]
    return max(0, min([int(available[1]) * 1024, *rooms]))


def _rooms(group: Path) -> Iterator[int]:
    """Yield the bytes that a control group has left of each of its limits."""
    for files in MEMORY_FILES:
        idle = re.search(rf"^{files.idle} (\d+)", _text(group / "memory.stat"), re.MULTILINE)
        used = _text(group / files.used)
        taken = max(0, int(used) - int(idle[1] if idle else 0)) if used.isdigit() else 0
        for limit in map(_text, (group / name for name in files.limits)):
            if limit.isdigit():  # not `max`, not missing
                yield int(limit) - taken


def control_groups(controller: str, proc: Path = PROC) -> list[Path]:
    """Return the folders of this process's control group and of all groups above it.

    Only groups that a mount shows are among them. They are those of the unified hierarchy
    (version 2) and of the controller's own (version 1), where there are such.

    Args:
        controller: version 1's name, `memory` or `cpu`.
    """
    own: dict[str, str] = {}
    for line in _text(proc / "self/cgroup").splitlines():
        _, names, group = line.split(":", 2)
        own |= dict.fromkeys(names.split(","), group)
    folders: list[Path] = []
    mounts = _mounts(_text(proc / "self/mountinfo"))
    for kind, name in (("cgroup2", ""), ("cgroup", controller)):
        if name not in own:
            continue
        fitting = [
            (PurePosixPath(mount.root), Path(mount.point))
            for mount in mounts
            if mount.kind == kind and (not name or name in mount.controllers)
        ]
        path = PurePosixPath(own[name])
        below = [
            pair for pair in fitting if path.is_relative_to(pair[0]) and ".." not in path.parts
        ]
        # A group that no mount shows (it is outside of the process's namespace): a mount's root is
        # then the best that is known, and in a container it usually is the container's own group.
        for root, point in below or fitting[:1]:
            steps = path.relative_to(root).parts if below else ()
            folders += [point.joinpath(*steps[:count]) for count in range(len(steps), -1, -1)]
    return list(dict.fromkeys(folders))


@dataclass(frozen=True)
class _Mount:
    """A line of /proc/self/mountinfo.

    root: the group that the mount shows at its point
    kind: cgroup2, cgroup, or any other file system
    controllers: of a version 1 hierarchy, among other options
    """

    root: str
    point: str
    kind: str
    controllers: tuple[str, ...]


def _mounts(lines: str) -> list[_Mount]:
    """Read /proc/self/mountinfo; of several mounts in one place, the last one is seen."""
    mounts: dict[str, _Mount] = {}
    for line in lines.splitlines():
        before, _, after = line.partition(" - ")
        fields, kinds = before.split(), after.split()
        if len(fields) < 5 or len(kinds) < 3:
            continue
        root, point = map(_unescaped, fields[3:5])
        mounts[point] = _Mount(root, point, kinds[0], tuple(kinds[2].split(",")))
    return list(mounts.values())


def _unescaped(name: str) -> str:
    """Return a path of mountinfo, which writes a space as `\\040`."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), name)


def _text(path: Path) -> str:
    """Return a small file without the white space at its ends; nothing if it is missing."""
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape").strip()
    except OSError:
        return ""


if __name__ == "__main__":
    print(memory_for_trials())
