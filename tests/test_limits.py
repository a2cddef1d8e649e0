"""Limits of memory and cores, on hand-made trees of files and in real control groups."""

import os
import time
from pathlib import Path

import pytest

from q3q.errors import ConfigError
from q3q.limits import (
    PROC,
    control_groups,
    cores,
    free_memory,
    memory_for_trials,
    unclaimed_memory,
)
from tests.commands import python

GB = 10**9
MACHINE = 16 * 2**30  # bytes that the machine of the hand-made trees has left
CORES = 64  # that it has


class Machine:
    """The files of a process's control groups.

    groups: lines of /proc/self/cgroup
    """

    def __init__(self, folder: Path, *groups: str) -> None:
        self.proc, self.mounted = folder / "proc", folder / "sys fs"  # a space, as mountinfo has
        write(self.proc / "meminfo", f"MemTotal: 99 kB\nMemAvailable:   {MACHINE // 1024} kB\n")
        write(self.proc / "self/statm", "100 10 5 1 0 20 0")
        write(self.proc / "self/cgroup", "".join(f"{line}\n" for line in groups))

    def mount(self, kind: str, options: str = "rw", root: str = "/", at: str = "") -> None:
        """Mount a hierarchy, of which `root` is seen."""
        point = str(self.mounted / at).replace(" ", "\\040")
        file = self.proc / "self/mountinfo"
        before = (
            file.read_text() if file.exists() else "21 1 8:1 / / rw,relatime - ext4 /dev/x rw\n"
        )
        # Optional fields stand between the options and the dash, none or several of them.
        fields = f"31 23 0:26 {root} {point} rw,nosuid shared:9 master:2 - {kind} {kind} {options}"
        write(file, f"{before}{fields}\n")

    def group(self, path: str, **files: object) -> None:
        """Write a group's files; in their names __ stands for a dot."""
        for name, content in files.items():
            write(self.mounted / path / name.replace("__", "."), f"{content}\n")

    def free(self) -> int:
        return unclaimed_memory(self.proc)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture(autouse=True)
def many_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(CORES)), raising=False)


def test_without_control_groups_it_is_what_the_machine_has(tmp_path):
    machine = Machine(tmp_path)
    assert (machine.free(), cores(machine.proc)) == (MACHINE, CORES)
    assert free_memory(machine.proc) == MACHINE + 10 * os.sysconf("SC_PAGE_SIZE")


def test_a_system_that_does_not_tell_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="give memory=8GB"):
        unclaimed_memory(tmp_path)


OWN = "system.slice/job.slice/job_7.scope"


@pytest.mark.parametrize("where", ["", "system.slice", "system.slice/job.slice", OWN])
def test_v2_a_limit_counts_on_every_level(tmp_path, where):
    """Slurm and Kubernetes limit a group above the process's, systemd-run its own."""
    machine = Machine(tmp_path, f"0::/{OWN}")
    machine.mount("cgroup2")
    machine.group(OWN, memory__max="max", memory__high="max", cpu__max="max 100000")
    machine.group(where, memory__max=2 * GB, memory__current=GB // 2, cpu__max="250000 100000")
    assert (machine.free(), cores(machine.proc)) == (2 * GB - GB // 2, 2)


@pytest.mark.parametrize("where", ["", "slurm", "slurm/uid_1/job_2", "slurm/uid_1/job_2/step_0"])
def test_v1_a_limit_counts_on_every_level_of_its_own_hierarchy(tmp_path, where):
    own = "/slurm/uid_1/job_2/step_0"
    machine = Machine(tmp_path, f"9:memory:{own}", f"4:cpu,cpuacct:{own}", "1:name=systemd:/x")
    machine.mount("cgroup", "rw,memory", at="memory")
    machine.mount("cgroup", "rw,cpu,cpuacct", at="cpu,cpuacct")
    unlimited = 9223372036854771712
    machine.group(f"memory{own}", memory__limit_in_bytes=unlimited, memory__usage_in_bytes=1)
    machine.group(f"cpu,cpuacct{own}", cpu__cfs_quota_us=-1, cpu__cfs_period_us=100000)
    machine.group(f"memory/{where}", memory__limit_in_bytes=3 * GB, memory__usage_in_bytes=GB)
    machine.group(f"cpu,cpuacct/{where}", cpu__cfs_quota_us=350000, cpu__cfs_period_us=100000)
    assert (machine.free(), cores(machine.proc)) == (2 * GB, 3)


def test_the_least_of_all_levels_counts_each_with_its_own_use(tmp_path):
    machine = Machine(tmp_path, "0::/pod/container")
    machine.mount("cgroup2")
    machine.group("pod", memory__max=4 * GB, memory__current=3 * GB, cpu__max="400000 100000")
    machine.group(
        "pod/container", memory__max=2 * GB, memory__current=GB // 2, cpu__max="800000 100000"
    )
    assert (machine.free(), cores(machine.proc)) == (GB, 4)


@pytest.mark.parametrize(("high", "most"), [("max", 3 * GB), (2 * GB, 2 * GB), (9 * GB, 3 * GB)])
def test_memory_high_is_a_limit_too(tmp_path, high, most):
    machine = Machine(tmp_path, "0::/job")
    machine.mount("cgroup2")
    machine.group("job", memory__max=3 * GB, memory__high=high, memory__current=0)
    assert machine.free() == most


@pytest.mark.parametrize(
    ("files", "line"),
    [
        ({"memory__max": 4 * GB, "memory__current": 3 * GB}, "inactive_file"),
        (
            {"memory__limit_in_bytes": 4 * GB, "memory__usage_in_bytes": 3 * GB},
            "total_inactive_file",
        ),
    ],
)
def test_page_cache_that_the_kernel_gives_back_is_free(tmp_path, files, line):
    machine = Machine(tmp_path, "0::/job")
    machine.mount("cgroup2")
    machine.group("job", **files, memory__stat=f"anon {GB}\n{line} {2 * GB}\nactive_file {GB}")
    assert machine.free() == 3 * GB


def test_what_is_full_has_nothing_left_and_a_part_of_a_core_is_one(tmp_path):
    machine = Machine(tmp_path, "0::/job")
    machine.mount("cgroup2")
    machine.group("job", memory__max=GB, memory__current=2 * GB, cpu__max="50000 100000")
    assert (machine.free(), cores(machine.proc)) == (0, 1)


@pytest.mark.parametrize(
    ("path", "root"),
    [
        ("/", "/"),  # the container has a namespace of its own
        ("/docker/abc", "/docker/abc"),  # it has not, and sees its own group alone
        ("/docker/abc", "/"),  # it sees all of the host's, which does not have it by this name
        ("/../../kubepods/abc", "/"),  # the process is outside of its namespace's root
        ("/docker/abc", "/docker/other"),
    ],
)
def test_in_a_container_its_own_group_is_found(tmp_path, path, root):
    machine = Machine(tmp_path, f"0::{path}")
    machine.mount("cgroup2", root=root)
    machine.group("", memory__max=GB, memory__current=0, cpu__max="200000 100000")
    assert (machine.free(), cores(machine.proc)) == (GB, 2)


def test_a_group_inside_a_container_is_found_below_what_is_mounted(tmp_path):
    machine = Machine(tmp_path, "0::/docker/abc/step_1")
    machine.mount("cgroup2", root="/docker/abc")
    machine.group("", memory__max=4 * GB, memory__current=0)
    machine.group("step_1", memory__max=GB, memory__current=0)
    machine.group("step_2", memory__max=1, memory__current=0)  # not this process's
    assert machine.free() == GB


def test_a_hybrid_has_memory_in_one_version_and_the_rest_in_the_other(tmp_path):
    machine = Machine(tmp_path, "3:memory:/job", "2:cpu:/job", "0::/job")
    machine.mount("cgroup", "rw,memory", at="memory")
    machine.mount("cgroup2", at="unified")
    machine.group("memory/job", memory__limit_in_bytes=GB, memory__usage_in_bytes=0)
    machine.group("unified/job", cgroup__procs="1")
    assert (machine.free(), cores(machine.proc)) == (GB, CORES)  # cpu is mounted nowhere


def test_another_mount_of_the_hierarchy_with_other_groups_is_not_ours(tmp_path):
    machine = Machine(tmp_path, "0::/job")
    machine.mount("cgroup2", root="/neighbour", at="a")
    machine.mount("cgroup2", at="b")
    machine.group("a", memory__max=1, memory__current=0)
    machine.group("b/job", memory__max=GB, memory__current=0)
    assert machine.free() == GB


@pytest.fixture
def real_group(tmp_path):
    """Make a control group with limits and one below it; yield the files to join the latter by."""
    v2 = Path("/sys/fs/cgroup/cgroup.controllers").exists()
    limits = {
        "memory": {"memory.max" if v2 else "memory.limit_in_bytes": GB},
        "cpu": {"cpu.max": "100000 100000"}
        if v2
        else {"cpu.cfs_period_us": 100000, "cpu.cfs_quota_us": 100000},
    }
    made: list[Path] = []
    try:
        for controller, files in limits.items():
            group = (
                Path("/sys/fs/cgroup") / ("" if v2 else controller) / f"q3q-limits-{os.getpid()}"
            )
            for folder in (group, group / "below"):
                if not folder.exists():
                    folder.mkdir()
                    made.insert(0, folder)
            for name, limit in files.items():
                (group / name).write_text(str(limit))
        yield list(dict.fromkeys(f / "cgroup.procs" for f in made if f.name == "below"))
    except OSError as error:
        pytest.skip(f"no control group with limits can be made here: {error}")
    finally:
        for folder in made:
            while (folder / "cgroup.procs").read_text():
                time.sleep(0.05)
            folder.rmdir()


def test_a_process_sees_the_limits_of_the_group_above_its_real_one(real_group):
    code = (
        "import os, sys\n"
        "for members in sys.argv[1:]:\n"
        "    open(members, 'w').write(str(os.getpid()))\n"
        "from q3q.limits import cores, free_memory, unclaimed_memory\n"
        "print(cores(), free_memory(), unclaimed_memory())\n"
    )
    shown = python("-c", code, *map(str, real_group)).stdout
    count, free, unclaimed = map(int, shown.split())
    assert count == 1
    assert GB // 2 < unclaimed < free < GB * 1.1  # shared pages are another group's


def test_trials_may_take_nine_tenths_and_the_command_says_how_much(tmp_path):
    assert memory_for_trials(Machine(tmp_path).proc) == round(
        0.9 * (MACHINE + 10 * os.sysconf("SC_PAGE_SIZE"))
    )
    assert memory_for_trials(tmp_path / "nothing") is None
    said = int(python("-m", "q3q.limits").stdout)
    assert 2**26 < said < 2**50


def test_this_machines_own_limits_can_be_read():
    assert 0 <= unclaimed_memory() < free_memory() < 2**50
    assert 1 <= cores() <= CORES
    assert all(path.is_dir() for path in control_groups("memory", PROC)[-1:])
