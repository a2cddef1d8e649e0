"""Kept blocks stay within a part of the free disk; the least recently used go first."""

import fcntl
import json
import os
import shutil
import time
from collections import namedtuple

import pytest

from q3q.attempt import claims_of, running_quantizations
from q3q.storage import block_cache, mirrored_blocks
from q3q.storage import claim as claim_module
from q3q.storage import stores as stores_module
from q3q.storage.block_cache import BLOCKS, MARK, BlockCache
from q3q.storage.claim import Claim, FolderClaimStore
from q3q.storage.mirror import Mirror
from q3q.storage.mirrored_blocks import OLD, block_cache_of
from q3q.storage.stores import FolderStore, StoreError
from tests.specs import make_trial

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def cache(tmp_path):
    """Blocks of four quantizations of 1000 bytes each, used in the order of their names."""
    made = BlockCache(tmp_path)
    for second, name in enumerate(("a", "b", "c", "d")):
        made.use(name)
        (made.folder / name / "block_000.safetensors").write_bytes(bytes(998))
        (made.folder / name / "block_000.json").write_text("{}")
        os.utime(made.folder / name / MARK, (second, second))
    return made


@pytest.fixture
def disk(monkeypatch):
    """Set how many kept quantizations the budget holds."""

    def holds(count):
        free = int(count * 1000 / block_cache.SHARE) - 4000
        monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, free))

    return holds


def left(cache):
    return sorted(path.name for path in cache.folder.iterdir() if path.is_dir())


def test_the_least_recently_used_go_first_and_no_more_than_must(cache, disk):
    disk(4)
    assert cache.trim(list) == []
    disk(2)
    assert cache.trim(list) == ["a", "b"]
    assert left(cache) == ["c", "d"]


def test_what_a_trial_uses_again_stays_longer(cache, disk):
    cache.use("a")
    disk(3)
    assert cache.trim(list) == ["b"]


def test_what_a_running_trial_uses_or_looks_at_stays(cache, disk):
    claim = Claim(cache.folder, "b")
    assert claim.take() is None
    disk(1)
    assert cache.trim(lambda: ["a"]) == ["c", "d"]
    assert left(cache) == ["a", "b"]
    claim.release()
    disk(0)
    assert cache.trim(list) == ["a", "b"]


def test_a_claim_of_a_dead_machine_costs_no_other_its_blocks_and_is_noticed_later(
    cache, disk, monkeypatch
):
    assert Claim(cache.folder, "a", heartbeat=60).take() is None
    monkeypatch.setattr(claim_module, "_place", lambda: "another machine")
    monkeypatch.setattr(FolderClaimStore, "silence", 0.1)
    disk(2)
    assert cache.trim(list) == ["b"]
    time.sleep(0.1)
    disk(3)
    assert cache.trim(list) == ["a"]


def test_nothing_goes_while_it_is_unknown_what_runs(cache, disk):
    disk(0)
    assert cache.trim(lambda: None) == []
    assert cache.trim(list) == ["a", "b", "c", "d"]  # its claims are free again


def test_what_a_killed_download_left_is_no_block(cache):
    for name in ("block_000.json", "block_000.safetensors", MARK):
        (cache.folder / "a" / name).unlink()
    (cache.folder / "a/.block_000.json.0123.partial").touch()
    cache.use("a")
    assert (cache.folder / "a" / MARK).exists()


def test_what_keep_blocks_left_stays(cache, disk):
    cache.keep("a")
    cache.use("a")  # a later trial with keep=auto makes no claim to it
    disk(0)
    assert cache.trim(list) == ["b", "c", "d"]
    assert left(cache) == ["a"]
    assert cache.describe() == ""


def test_the_budget_does_not_shrink_by_what_is_kept(cache, disk, tmp_path):
    disk(4)
    before = cache.budget()
    assert before == 4000
    for name in left(cache):
        cache.keep(name)
    assert cache.budget() == before - 4000 * block_cache.SHARE
    assert BlockCache(tmp_path / "not" / "there").budget() > 0


def test_it_is_told(cache, disk):
    disk(5)
    assert cache.describe() == (
        "blocks of 4 quantizations kept for later evaluations (keep=auto): 4.00 KB of at most "
        "5.00 KB, the least recently used go first"
    )
    assert f"stay in {cache.folder} for later evaluations: at most 5.00 KB" in cache.promise()


def machine(tmp_path, name, monkeypatch):
    monkeypatch.setenv("Q3Q_MIRRORS", str(tmp_path / name))
    return block_cache_of(f"file://{tmp_path}/store")


def test_a_store_keeps_what_its_budget_holds_and_a_machine_what_its_disk_holds(
    tmp_path, disk, monkeypatch
):
    one, other = (machine(tmp_path, name, monkeypatch) for name in "ab")
    for name in ("a", "b", "c", "d"):
        one.use(name)
        (one.folder / name / "block_000.safetensors").write_bytes(bytes(1000))
        with one.lease(name):
            one.mirror.push(f"{BLOCKS}/{name}")
    one.keep("a")
    one.mirror.push(f"{BLOCKS}/a")
    assert [kept.name for kept in other.entries()] == ["b", "c", "d"]
    size = other.entries()[0].size
    other.mirror.pull(BLOCKS)
    other.use("b")  # the other machine's use counts, once it is sent
    other.mirror.push(f"{BLOCKS}/b")

    monkeypatch.setattr(mirrored_blocks, "STORE_BUDGET", 2 * size)
    assert one.describe().startswith("blocks of 3 quantizations kept for later evaluations")
    assert f"stay in file://{tmp_path}/store/trials/blocks for later" in one.promise()
    with one.lease("a"):
        disk(0)
        assert one.trim(lambda: ["c"]) == ["d"]
        assert [path.parent.name for path in one.folder.glob("*/*.safetensors")] == ["a"]
    assert [kept.name for kept in one.entries()] == ["c", "b"]
    assert one.mirror.push(BLOCKS) == 0  # what only its copies lost stays in the store
    one.mirror.pull(BLOCKS)
    assert left(one) == ["a", "b", "c"]
    other.mirror.pull(BLOCKS)
    assert not any((other.folder / "d").iterdir())


def sent_blocks(cache, *names):
    """Make and send blocks of some quantizations."""
    for name in names:
        cache.use(name)
        (cache.folder / name / "block_000.safetensors").write_bytes(bytes(1000))
        (cache.folder / name / "block_000.json").write_text("{}")
        cache.mirror.push(f"{BLOCKS}/{name}")


def names_in(cache, name):
    folder = cache.folder / name
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


WHOLE = ["block_000.json", "block_000.safetensors", MARK]


def test_copies_that_a_trial_here_uses_stay_until_it_ends(tmp_path, monkeypatch):
    one, other = (machine(tmp_path, name, monkeypatch) for name in "ab")
    sent_blocks(one, "a", "b")
    other.mirror.pull(BLOCKS)
    with other.lease("a"), one.lease("b"):
        other.delete("a")  # this machine's own deletion
        other.delete("b")  # another's
        other.mirror.pull(BLOCKS)
        one.mirror.pull(BLOCKS)
        assert names_in(other, "a") == names_in(one, "b") == WHOLE
        assert names_in(other, "b") == names_in(one, "a") == []
        assert other.mirror.store.find(BLOCKS) == {}
    for machine_, name in ((other, "a"), (one, "b")):
        machine_.mirror.pull(BLOCKS)
        assert names_in(machine_, name) == []
        assert machine_.mirror.push(BLOCKS) == 0
    assert other.mirror.store.find(BLOCKS) == {}


def test_a_deletion_that_is_cut_off_leaves_the_mark(tmp_path, monkeypatch):
    one = machine(tmp_path, "a", monkeypatch)
    sent_blocks(one, "a")
    (one.folder / "a/source.json").write_text("{}")  # its name comes after the mark's
    one.mirror.push(BLOCKS)
    remove, left = one.mirror.store.remove, [3]

    def die(name):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        remove(name)

    monkeypatch.setattr(one.mirror.store, "remove", die)
    with pytest.raises(KeyboardInterrupt):
        one.delete("a")
    assert list(one.mirror.store.find(BLOCKS)) == [f"{BLOCKS}/a/{MARK}"]


def test_only_what_was_freed_of_copies_counts_and_torn_downloads_go(tmp_path, disk, monkeypatch):
    one = machine(tmp_path, "a", monkeypatch)
    sent_blocks(one, "a", "b")
    with one.lease("a"):
        (one.folder / "a/.block_000.json.0123.partial").write_bytes(bytes(500))
    with one.lease("b"):
        pass
    (one.folder / "c").mkdir()
    (one.folder / "c/block_000.safetensors").write_bytes(bytes(1000))  # not sent yet
    disk(2)  # what "c" takes is not freed, so "b" goes too
    assert one.trim_copies() == ["a", "b"]
    assert names_in(one, "a") == names_in(one, "b") == []
    assert names_in(one, "c") == ["block_000.safetensors"]


def test_copies_of_the_version_before_go_once_nobody_uses_them(tmp_path, monkeypatch):
    one = machine(tmp_path, "a", monkeypatch)
    old = one.mirror.folder / OLD
    (old / "x").mkdir(parents=True)
    (old / "x/block_000.json").write_text("{}")
    (old / "y.lease").touch()
    with (old / "x.lease").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        one.trim_copies()
        assert (old / "x/block_000.json").exists()
    one.trim_copies()
    assert not old.exists()


@pytest.fixture
def running(tmp_path, monkeypatch):
    """Two trials of a store, of which the second runs."""
    monkeypatch.setenv("Q3Q_MIRRORS", str(tmp_path / "mirrors"))
    mirror = Mirror(f"file://{tmp_path}/store")
    trials = [
        make_trial(bits=bits, storage=mirror.folder, placement={"store": mirror.url})
        for bits in (3, 4)
    ]
    claim = Claim(claims_of(trials[1], mirror), "trial")
    assert claim.take() is None
    yield *trials, mirror.store
    claim.release()
    assert running_quantizations(trials[0]) == set()


def test_a_trial_that_runs_again_is_seen_and_one_without_a_spec_makes_it_unknown(running):
    asks, runs, store = running
    assert running_quantizations(asks) is None
    store.write(f"trials/{runs.id}/spec.json", json.dumps(runs.to_json()).encode())
    store.write(f"trials/{runs.id}/record.json", b"of its run before")
    assert running_quantizations(asks) == {runs.spec.quantization_id}
    assert running_quantizations(runs) == set()


def test_so_is_a_trial_of_a_folder(tmp_path):
    asks, runs = (make_trial(bits=bits, storage=tmp_path) for bits in (3, 4))
    claim = Claim(runs.folder, "trial")
    assert claim.take() is None
    assert running_quantizations(asks) is None
    (runs.folder / "spec.json").write_text(json.dumps(runs.to_json()))
    assert running_quantizations(asks) == {runs.spec.quantization_id}
    claim.release()
    assert running_quantizations(asks) == set()


def test_a_refused_connection_is_tried_again_and_said_to_be_one(running, monkeypatch):
    asks, runs, store = running
    store.write(f"trials/{runs.id}/spec.json", json.dumps(runs.to_json()).encode())
    read, refusals = FolderStore.read, [1]

    def refuse(self, name):
        if name.endswith("spec.json") and refusals[0] > 0:
            refusals[0] -= 1
            raise RuntimeError("connection refused")  # botocore's errors are no OSError
        return read(self, name)

    monkeypatch.setattr(FolderStore, "read", refuse)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert running_quantizations(asks) == {runs.spec.quantization_id}
    refusals[0] = 1000
    monkeypatch.setattr(stores_module, "PATIENCE", 0.0)
    with pytest.raises(StoreError, match="connection refused"):
        running_quantizations(asks)
