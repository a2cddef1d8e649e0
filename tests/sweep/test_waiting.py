"""OpenMP's threads wait briefly while others take their cores; the user's settings stay."""

import os
import resource

import pytest
import torch

from q3q.sweep.ray import waiting
from q3q.sweep.ray.waiting import (
    BUSY,
    CALM_ROUNDS,
    MOST_IDLE,
    QUIET,
    SETTINGS,
    SPINS,
    Gauge,
    IdleThreads,
    core_waits,
    loaded_libraries,
    may_start,
    wait_as_cores_allow,
)
from tests.chaos.faults import wait_until


def test_a_machine_is_busy_at_once_and_quiet_only_after_calm_rounds():
    gauge, between = Gauge(), (BUSY + QUIET) / 2
    assert [gauge.note(part) for part in (0.0, between, 2 * BUSY, between)] == [0, 0, 1, 1]
    assert all(gauge.note(0.0) for _ in range(CALM_ROUNDS - 1))
    assert gauge.note(between)  # not calm: the count begins anew
    assert all(gauge.note(0.0) for _ in range(CALM_ROUNDS - 1))
    assert not gauge.note(0.0)


def test_what_each_thread_waited_is_read_and_what_cannot_be_read_is_left_out(tmp_path):
    for name, text in (("11", "9000 700 3"), ("12", "1 40 2"), ("13", ""), ("14", None)):
        folder = tmp_path / "self/task" / name
        folder.mkdir(parents=True)
        if text is not None:
            (folder / "schedstat").write_text(text)
    assert core_waits(tmp_path) == {"11": 700, "12": 40}
    assert core_waits(tmp_path / "elsewhere") == {}


def test_threads_are_started_only_where_no_limit_is_near(tmp_path, monkeypatch):
    """libgomp ends the process if it cannot start one."""
    unlimited = resource.RLIM_INFINITY
    monkeypatch.setattr(resource, "getrlimit", lambda _: (unlimited, unlimited))
    group = tmp_path / "groups/box/job"
    group.mkdir(parents=True)
    (tmp_path / "self").mkdir()
    (tmp_path / "self/cgroup").write_text("1:cpu:/elsewhere\n0::/box/job\n")
    places = tmp_path, tmp_path / "groups"
    assert may_start(3, *places)
    assert not may_start(MOST_IDLE + 1, *places)
    (group / "pids.max").write_text("max\n")
    assert may_start(3, *places)
    for most, expected in ((500, False), (90_000, True)):
        (group.parent / "pids.max").write_text(f"{most}\n")
        (group.parent / "pids.current").write_text("40\n")
        assert may_start(3, *places) is expected
    monkeypatch.setattr(resource, "getrlimit", lambda _: (4096, unlimited))
    assert not may_start(3, *places)


@pytest.mark.skipif(not torch.backends.openmp.is_available(), reason="torch without OpenMP")
def test_idle_threads_are_there_until_they_end_and_change_no_bit():
    def threads():
        return len(os.listdir("/proc/self/task"))

    x = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    expected, before = x @ x, threads()
    [library] = [path for path in loaded_libraries() if "torch" in path]
    idle = IdleThreads(library, 3)
    wait_until(lambda: threads() >= before + 4, "three threads and the one that holds them")
    assert torch.equal(x @ x, expected)
    idle.end()
    wait_until(lambda: threads() <= before, "their end")


@pytest.mark.parametrize("given", [*SETTINGS, None])
@pytest.mark.parametrize("told", [True, False])
def test_what_the_user_says_of_waiting_stays(monkeypatch, given, told):
    watched = []
    monkeypatch.setattr(waiting, "_watch", None)
    monkeypatch.setattr(waiting._Watch, "start", lambda watch: watched.append(watch.threads))
    monkeypatch.setattr(waiting, "core_waits", lambda: {"1": 7 if told else 0})
    for name in SETTINGS:
        monkeypatch.setenv(name, "")  # what is set is undone in the end
        monkeypatch.delenv(name)
    if given is not None:
        monkeypatch.setenv(given, "the user's")
    wait_as_cores_allow(1)
    wait_as_cores_allow(4)
    found = {name: os.environ[name] for name in SETTINGS if name in os.environ}
    if given is not None:
        assert (found, watched) == ({given: "the user's"}, [])
    elif told:
        assert (found, watched) == ({}, [4])
    else:
        assert (found, watched) == ({SETTINGS[0]: SPINS}, [])
