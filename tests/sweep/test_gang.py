"""Laws of gangs, with real Ray and real processes that really die."""

import os
import signal
import subprocess
import time

import pytest

from q3q.errors import ConfigError
from q3q.sweep.ray import gangs, scheduler
from q3q.sweep.ray.cluster import Cluster
from q3q.sweep.ray.tasks import Resources, Started, Task, WorkerDiedError
from tests.chaos.faults import runs

TWO = Resources(cpus=1, ranks=2)


@pytest.fixture(scope="module")
def cluster():
    with Cluster(cpus=2, gpus=0) as started:
        yield started


def run(cluster, *tasks, on_event=lambda *_: None, on_retry=None):
    return {outcome.key: outcome for outcome in cluster.run(tasks, on_event, on_retry)}


def survivors(pids, seconds=60):
    """Return the processes that still run, once all have had some time to end."""
    deadline = time.monotonic() + seconds
    while any(map(runs, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return [pid for pid in pids if runs(pid)]


def free(cluster):
    """Return whether the cluster is empty again: no rank of a gang still reserves anything."""
    task = Task(key="both", call=lambda _: "free", resources=Resources(cpus=2))
    return run(cluster, task)["both"].value == "free"


def test_ranks_meet_and_rank_0_speaks_for_all(cluster):
    def call(report, seat):
        from q3q.team import join_gang

        report(f"rank {seat.rank}")
        with join_gang(seat) as team:
            return seat.host, team.gather((os.getpid(), seat.rank, seat.size))

    events = []
    outcome = run(
        cluster,
        Task(key="gang", call=call, resources=TWO),
        on_event=lambda _, event: events.append(event),
    )
    host, ranks = outcome["gang"].value
    assert host == "127.0.0.1"
    assert [rank for _, rank, _ in ranks] == [0, 1]
    assert [size for _, _, size in ranks] == [2, 2]
    started = Started(key="gang", pid=ranks[0][0], node=events[0].node, attempt=1)
    assert events == [started, "rank 0"]
    assert free(cluster)


@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_rank_that_is_killed_takes_its_gang_down_and_the_task_runs_again(
    cluster, tmp_path, monkeypatch, victim
):
    # On a busy machine killed workers may take longer to die than the driver waits for them.
    monkeypatch.setattr(scheduler, "CANCEL_SECONDS", 300)

    def call(report, seat):
        from q3q.team import join_gang

        with join_gang(seat) as team:
            pids = team.gather(os.getpid())
            if not (tmp_path / "died").exists():
                if seat.rank == victim:
                    (tmp_path / "pids").write_text(" ".join(map(str, [*pids, seat.port])))
                    (tmp_path / "died").touch()
                    os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(1000)  # notices nothing
            return team.gather("done")

    retried, left = [], []

    def on_retry(key, error):
        *pids, port = map(int, (tmp_path / "pids").read_text().split())
        alive = survivors(pids)
        listening = subprocess.run(
            ["ss", "-Hltn"], capture_output=True, text=True, check=True
        ).stdout
        left.append((alive, f"127.0.0.1:{port} " in listening))
        retried.append((type(error), f"rank {victim} of 2" in str(error)))

    begin = time.monotonic()
    outcome = run(cluster, Task(key="gang", call=call, resources=TWO), on_retry=on_retry)["gang"]
    assert (outcome.value, outcome.attempts, outcome.error) == (["done", "done"], 2, None)
    assert retried == [(WorkerDiedError, True)]
    # Before it runs again all are dead (on a busy machine, about to be) and the port is free.
    assert left == [([], False)]
    assert time.monotonic() - begin < 600  # nobody slept to the end
    assert free(cluster)


@pytest.mark.slow
def test_a_rank_that_is_stopped_is_killed_and_the_task_runs_again(cluster, tmp_path, monkeypatch):
    """Its connections stay open, so nobody but the driver can notice."""
    monkeypatch.setattr(gangs, "HANG_SECONDS", 12)
    monkeypatch.setattr(scheduler, "CANCEL_SECONDS", 300)

    def call(report, seat):
        from q3q.team import join_gang

        with join_gang(seat) as team:
            pids = team.gather(os.getpid())
            if seat.rank == 1 and not (tmp_path / "pids").exists():
                (tmp_path / "pids").write_text(" ".join(map(str, pids)))
                os.kill(os.getpid(), signal.SIGSTOP)
            return team.gather("done")  # rank 0 waits here

    retried, left = [], []

    def on_retry(key, error):
        retried.append(str(error))
        left.extend(survivors(map(int, (tmp_path / "pids").read_text().split())))

    outcome = run(cluster, Task(key="gang", call=call, resources=TWO), on_retry=on_retry)["gang"]
    assert (outcome.value, outcome.attempts) == (["done", "done"], 2)
    [words] = retried
    assert "gang hangs" in words
    assert "rank 1 of 2 has not been heard for" in words
    assert left == []
    assert free(cluster)


def test_a_gang_hangs_if_a_rank_is_silent_or_all_wait_and_none_gets_on(monkeypatch):
    """Rank 0 may work alone for hours, and a busy exchange may take as long as it gets on."""
    monkeypatch.setattr(gangs, "HANG_SECONDS", 60)

    def gang_of(ranks):
        gang = object.__new__(gangs.Gang)
        gang.ranks, gang.ends, gang.heard = ranks, {}, {}
        return gang

    def listen(gang, seconds, pulses):
        """Let heartbeats come every second; `pulses`: of each rank, at second t."""
        for t in range(seconds):
            gang.pass_time(1.0)
            for rank, pulse in pulses.items():
                gang.hear(rank, pulse(t))

    works, waits, exchanges = (
        lambda t: (7, False),
        lambda t: (7, True),
        lambda t: (t // 50, True),
    )
    alone = gang_of(2)
    listen(alone, 10_000, {0: works, 1: waits})
    assert alone.hung() == {}
    slow = gang_of(2)
    listen(slow, 10_000, {0: exchanges, 1: exchanges})
    assert slow.hung() == {}
    dead = gang_of(2)
    listen(dead, 59, {0: waits, 1: waits})
    assert dead.hung() == {}
    listen(dead, 3, {0: waits, 1: waits})
    assert set(dead.hung()) == {0, 1}
    assert "an exchange hangs" in dead.hung()[0]
    stopped = gang_of(3)
    listen(stopped, 10, {0: works, 1: waits, 2: waits})
    listen(stopped, 61, {0: works, 1: waits})
    assert set(stopped.hung()) == {2}
    stopped.ends[2] = "has ended"
    assert stopped.hung() == {}
    # A rank that has not begun yet is waited for.
    coming = gang_of(3)
    listen(coming, 1000, {0: waits, 1: waits})
    assert coming.hung() == {}


def test_who_loses_the_other_does_not_hide_why(cluster):
    def call(report, seat):
        from q3q.team import join_gang

        with join_gang(seat) as team:
            if seat.rank == 1:
                raise KeyError("its own reason")
            team.gather(None)

    outcome = run(cluster, Task(key="gang", call=call, resources=TWO))["gang"]
    assert isinstance(outcome.error, KeyError)
    assert outcome.attempts == 1
    assert free(cluster)


def test_what_all_ranks_find_wrong_is_told_by_rank_0(cluster):
    def call(report, seat):
        raise ValueError(f"rank {seat.rank} will not")

    outcome = run(cluster, Task(key="gang", call=call, resources=TWO))["gang"]
    assert outcome.error.args == ("rank 0 will not",)


def test_a_gang_that_fits_nowhere_is_refused_and_one_that_has_to_wait_is_not(cluster):
    huge = Resources(cpus=1, ranks=3)
    outcomes = run(
        cluster,
        Task(key="single", call=lambda _: time.sleep(2)),
        Task(key="huge", call=lambda *_: None, resources=huge),
        Task(key="gang", call=lambda _, seat: seat.rank, resources=TWO),
    )
    assert isinstance(outcomes["huge"].error, ConfigError)
    assert (
        "huge needs 3 ranks of 1 CPUs, 0 GPUs, and all machines together do not have that"
        in str(outcomes["huge"].error)
    )
    assert outcomes["gang"].value == 0
    assert free(cluster)


def test_the_run_that_is_given_up_leaves_no_rank_behind(cluster, tmp_path):
    def call(report, seat):
        (tmp_path / f"{seat.rank}").write_text(str(os.getpid()))
        while not (tmp_path / "1").exists():
            time.sleep(0.05)
        report("both")
        time.sleep(1000)

    class GivenUpError(Exception):
        pass

    def on_event(_, event):
        if event == "both":
            raise GivenUpError

    with pytest.raises(GivenUpError):
        list(cluster.run([Task(key="gang", call=call, resources=TWO)], on_event))
    assert survivors([int((tmp_path / str(rank)).read_text()) for rank in range(2)]) == []
    assert free(cluster)
