"""Kept blocks stay within a part of the free disk; the least recently used go first."""

import os
import shutil
from collections import namedtuple

import pytest

from q3q.storage import block_cache, mirrored_blocks
from q3q.storage.block_cache import BLOCKS, MARK, BlockCache
from q3q.storage.claim import Claim
from q3q.storage.mirrored_blocks import block_cache_of

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def cache(tmp_path):
    """Blocks of four quantizations of 1000 bytes each, used in the order of their names."""
    made = BlockCache(tmp_path)
    for second, name in enumerate(("a", "b", "c", "d")):
        made.use(name)
        (made.folder / name / "block_000.safetensors").write_bytes(bytes(1000))
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
        "blocks of 4 quantizations kept for later evaluations (keep=auto): 4.0 KB of at most "
        "5.0 KB, the least recently used go first"
    )
    assert f"stay in {cache.folder} for later evaluations: at most 5.0 KB" in cache.promise()


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
