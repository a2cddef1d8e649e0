"""A claim has one holder at a time, and no wall clock decides whether it lives."""

import json
import os
import signal
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from q3q.storage import claim as claim_module
from q3q.storage.claim import FREE, WIDTH, Claim, ClaimLostError, Holder, claimed, holder_of
from tests.chaos.faults import wait_until


def quick(folder, **settings):
    return Claim(folder, "it", **{"heartbeat": 0.05, "silence": 0.4, **settings})


def elsewhere(monkeypatch, name="another machine"):
    monkeypatch.setattr(claim_module, "_place", lambda: name)


def plant(folder, number=1, counter=f"{1:0{WIDTH}d}", **facts):
    """Write a claim file as another process left it."""
    (folder / f"it.claim.{number}").write_text(
        f"{counter}\n{json.dumps(asdict(replace(Holder.here(), **facts)))}\n"
    )


def take_slowly(claim, seconds=5.0):
    """Take the claim; return the seconds that it took."""
    started = time.monotonic()
    while claim.take() is not None:
        assert time.monotonic() - started < seconds
        time.sleep(0.01)
    return time.monotonic() - started


def in_child(work):
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return pid


def test_one_has_it_until_it_is_released(tmp_path):
    first, second = quick(tmp_path), quick(tmp_path)
    assert first.take() is None
    holder = second.take()
    assert (holder.pid, second.holder_lives) == (os.getpid(), True)
    assert f"process {os.getpid()} on " in str(holder)
    assert holder_of(tmp_path, "it") == holder
    first.release()
    assert holder_of(tmp_path, "it") is None
    assert second.take() is None
    second.release()
    assert len(list(tmp_path.iterdir())) == 1  # old generations are removed


def test_of_many_processes_that_find_a_dead_holder_one_gets_it(tmp_path):
    for number in range(1, 13):
        (folder := tmp_path / str(number)).mkdir()
        plant(folder, number, pid=2**22 + 1)
        gate, over = folder / "gate", folder / "over"

        def race(folder=folder, gate=gate, over=over):
            while not gate.exists():
                time.sleep(0.0005)
            result = "won" if quick(folder).take() is None else "lost"
            (folder / f"{result} {os.getpid()}").touch()
            wait_until(over.exists, "the end of the race")  # the winner lives until all have tried

        children = [in_child(race) for _ in range(6)]
        gate.touch()

        def all_tried(folder=folder):
            return len([*folder.glob("won *"), *folder.glob("lost *")]) == 6

        wait_until(all_tried, "an answer to all six")
        over.touch()
        for child in children:
            os.waitpid(child, 0)
        assert len(list(folder.glob("won *"))) == 1


def test_a_holder_killed_on_this_machine_is_seen_to_be_at_once(tmp_path):
    def hold():
        quick(tmp_path).take()
        (tmp_path / "has it").touch()
        time.sleep(60)

    child = in_child(hold)
    while not (tmp_path / "has it").exists():
        time.sleep(0.01)
    waiting = quick(tmp_path, silence=60)
    assert waiting.take().pid == child
    os.kill(child, signal.SIGKILL)  # a zombie until it is waited for; a zombie holds nothing
    assert take_slowly(waiting) < 2
    os.waitpid(child, 0)
    waiting.release()


def test_a_later_process_with_the_holders_id_is_not_the_holder(tmp_path):
    plant(tmp_path, born="1")
    claim = quick(tmp_path, silence=60)
    assert claim.take() is None
    claim.release()


def test_a_holder_whose_start_time_is_hidden_keeps_its_claim_until_it_is_silent(tmp_path):
    plant(tmp_path, born="")
    claim = quick(tmp_path)
    assert claim.take().pid == os.getpid()
    assert take_slowly(claim) >= 0.3
    claim.release()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_claim_file_holds_the_start_in_clock_ticks_since_boot(tmp_path):
    """As all versions of q3q write and compare it."""
    claim = quick(tmp_path)
    claim.take()
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    assert json.loads((tmp_path / "it.claim.1").read_text()[WIDTH + 1 :])["born"] == fields[19]
    claim.release()


def test_a_holder_elsewhere_is_taken_for_dead_after_its_silence(tmp_path):
    plant(tmp_path, place="another machine", host="far")
    claim = quick(tmp_path)
    assert claim.take().host == "far"
    assert not claim.holder_lives
    assert take_slowly(claim) >= 0.4
    claim.release()


def test_a_holder_elsewhere_that_beats_keeps_it_whatever_the_clocks_say(tmp_path, monkeypatch):
    holder = quick(tmp_path)
    holder.take()
    elsewhere(monkeypatch)
    monkeypatch.setattr(time, "time", lambda: 1 / 0)
    claim, started = quick(tmp_path), time.monotonic()
    while time.monotonic() - started < 1.0:  # more than twice the silence that loses a claim
        assert claim.take() is not None
        for path in tmp_path.glob("it.claim.*"):
            os.utime(path, (0, 0))  # a server whose clock jumped back to 1970
        time.sleep(0.02)
    assert claim.holder_lives
    holder.release()
    assert claim.take() is None
    claim.release()


def test_one_that_slept_too_long_sees_that_it_lost_and_disturbs_nobody(tmp_path, monkeypatch):
    sleeper = quick(tmp_path, heartbeat=0.8)
    sleeper.take()
    elsewhere(monkeypatch)
    claim = quick(tmp_path, heartbeat=5)
    take_slowly(claim)
    before = (tmp_path / "it.claim.2").read_bytes()
    deadline = time.monotonic() + 5
    while not sleeper.lost and time.monotonic() < deadline:
        time.sleep(0.02)
    with pytest.raises(ClaimLostError, match="another took over"):
        sleeper.check()
    sleeper.release()
    assert (tmp_path / "it.claim.2").read_bytes() == before
    claim.check()
    claim.release()


@pytest.mark.parametrize("torn", ["", "0000", f"{1:0{WIDTH}d}\n{{"])
def test_a_torn_claim_holds_nobody_up_for_ever(tmp_path, torn):
    (tmp_path / "it.claim.3").write_text(torn)
    claim = quick(tmp_path)
    assert claim.take().host == "?"
    assert take_slowly(claim) >= 0.3
    holder = holder_of(tmp_path, "it")
    assert holder is not None
    assert holder.pid == os.getpid()
    claim.release()


def test_a_late_comer_that_saw_an_old_generation_does_not_get_a_new_one(tmp_path, monkeypatch):
    """It saw generation 1 dead and slept; meanwhile 2 and 3 were taken, and 2 was removed."""
    holder = quick(tmp_path)
    plant(tmp_path, 2, counter=FREE)
    holder.take()
    late = quick(tmp_path)
    assert not late._create(2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["it.claim.3"]
    holder.check()
    holder.release()


def test_waiting_tells_for_whom_and_may_be_given_up(tmp_path):
    holder = quick(tmp_path)
    holder.take()

    def give_up(holder):
        raise KeyboardInterrupt(holder.pid)

    with pytest.raises(KeyboardInterrupt, match=str(os.getpid())), claimed(tmp_path, "it", give_up):
        raise AssertionError("it was given twice")
    holder.release()
    with claimed(tmp_path, "it", give_up):
        pass
