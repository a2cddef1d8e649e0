"""A gang's ranks, in processes of their own."""

import os
import socket
import subprocess

import pytest
import torch

from q3q import team
from q3q.environment import Phases
from q3q.errors import ConfigError
from q3q.team import LOOPBACK, SOLO, Team, choose_interfaces, interface_of


def test_work_is_shared_by_cost_and_everything_is_taken_once():
    costs = [5.0, 1.0, 1.0, 1.0, 4.0, 4.0]
    shares = Team(0, 3).divide(costs)
    assert sorted(item for items in shares for item in items) == list(range(6))
    assert [sum(costs[item] for item in items) for items in shares] == [6, 5, 5]  # the whole is 16
    assert shares == Team(2, 3).divide(costs)
    assert Team(0, 4).divide([1.0]) == [[0], [], [], []]


def test_alone_nothing_is_exchanged():
    content = object()  # useless to pickle
    assert SOLO.broadcast(content) is content
    assert SOLO.gather(content) == [content]
    assert SOLO.fold(content, lambda joined, own: (joined, own)) == (None, content)
    assert not SOLO.leads
    assert SOLO.run_on_all(lambda team, more, own: (more, own), 1, own=2) == (1, 2)


def test_what_rank_0_does_alone_is_what_is_left_of_a_phase(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    rank_0 = Team(0, 2)
    monkeypatch.setattr(rank_0, "broadcast", lambda content: None)

    def work(team, seconds):
        clock[0] += seconds
        if seconds > 1:
            team.run_on_all(work, 1)  # inside, it is an ordinary call

    phases = Phases(lambda: rank_0.together)
    with phases.phase("load"):
        clock[0] += 5
    with phases.phase("quantize"):
        rank_0.run_on_all(work, 2)
        clock[0] += 0.5
        rank_0.run_on_all(work, 1)
    assert phases.notes() == {"rank_0_alone": {"load": 5, "quantize": 0.5}}
    assert phases.metrics["seconds/quantize"] == 4.5
    alone = Phases()
    with alone.phase("load"):
        clock[0] += 5
    assert alone.notes() == {}


@pytest.fixture(scope="module")
def meeting(gang):
    """Return what each of three ranks saw in one meeting."""

    def everything(team):
        import os
        import subprocess
        from operator import attrgetter, methodcaller

        import torch

        seen = {}
        whole = torch.arange(6, dtype=torch.bfloat16).view(2, 3)
        sent = {
            "part": whole[:, 1:],
            "whole": whole,
            "again": whole,
            "none": torch.zeros(0),
            "words": ["a", (1, None)],
        }
        seen["broadcast"] = team.broadcast(sent if team.rank == 1 else None, source=1)
        seen["gathered"] = team.gather(team.rank * 10)
        seen["fold"] = team.fold(str(team.rank), lambda joined, own: (joined or "") + own)
        seen["mask"] = team.broadcast(torch.tensor([True, False]) if team.rank == 0 else None)

        if team.rank == 0:
            seen["leads"] = [team.leads, team.run_on_all(attrgetter("leads")), team.leads]
            seen["led"] = [team.run_on_all(methodcaller("gather", amount)) for amount in (1, 2)]
            team.dismiss()
        else:
            seen["leads"] = [team.leads]
            team.follow()
        pid = f"pid={os.getpid()},"
        lines = subprocess.run(
            ["ss", "-Hltnp"], capture_output=True, text=True, check=True
        ).stdout.splitlines()
        seen["listens"] = [line.split()[3].rpartition(":")[0] for line in lines if pid in line]
        team.gather(None)
        return seen

    return gang(3, everything)


def test_what_is_broadcast_arrives_as_it_was(meeting):
    whole = torch.arange(6, dtype=torch.bfloat16).view(2, 3)
    for seen in meeting:
        got = seen["broadcast"]
        assert torch.equal(got["whole"], whole)
        assert got["whole"].dtype == torch.bfloat16
        assert torch.equal(got["part"], whole[:, 1:])
        assert got["none"].numel() == 0
        assert got["words"] == ["a", (1, None)]
        assert seen["mask"].tolist() == [True, False]
    assert meeting[2]["broadcast"]["again"] is meeting[2]["broadcast"]["whole"]  # it travelled once


def test_ranks_are_heard_in_order(meeting):
    assert [seen["gathered"] for seen in meeting] == [[0, 10, 20]] * 3
    assert [seen["fold"] for seen in meeting] == ["012"] * 3


def test_rank_0_leads_and_the_others_follow(meeting):
    assert [seen["leads"] for seen in meeting] == [
        [True, False, True],
        [False],
        [False],
    ]  # in step nobody does
    assert meeting[0]["led"] == [[1, 1, 1], [2, 2, 2]]


def test_nothing_listens_beyond_loopback(meeting):
    assert meeting[0]["listens"]
    assert {
        address.strip("[]").removeprefix("::ffff:")
        for seen in meeting
        for address in seen["listens"]
    } == {LOOPBACK}


def test_an_interface_is_found_by_its_address():
    assert interface_of(LOOPBACK) == "lo"
    addresses = subprocess.run(
        ["hostname", "-I"], capture_output=True, text=True, check=True
    ).stdout.split()
    for address in addresses[:1]:
        assert interface_of(address) in os.listdir("/sys/class/net")
        assert interface_of(address) != "lo"
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1"):
        interface_of("192.0.2.1")  # kept for documentation; nobody has it
    assert socket.if_nameindex()


def test_an_interface_that_the_user_named_is_kept_and_one_for_an_earlier_gang_is_not(monkeypatch):
    monkeypatch.setattr(team, "_CHOSEN", {})
    monkeypatch.setattr(team, "interface_of", lambda host: host)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "ib0")
    for interface in ("lo", "eth0"):
        choose_interfaces(interface)
        assert os.environ["GLOO_SOCKET_IFNAME"] == interface
        assert os.environ["NCCL_SOCKET_IFNAME"] == "ib0"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
