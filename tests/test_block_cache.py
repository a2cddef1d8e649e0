"""Kept blocks stay within a part of the free disk; the least recently used go first."""

import os
import shutil
from collections import namedtuple

import pytest

from q3q.storage import block_cache
from q3q.storage.block_cache import MARK, BlockCache
from q3q.storage.claim import Claim

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def cache(tmp_path):
    """Blocks of four quantizations of 1000 bytes each, used in the order of their names."""
    made = BlockCache.of_storage(tmp_path, here=False)
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
    assert BlockCache.of_storage(tmp_path / "not" / "there", here=False).budget() > 0


def test_it_is_told(cache, disk):
    disk(5)
    assert cache.describe() == (
        "blocks of 4 quantizations kept for later evaluations (keep=auto): 4.0 KB of at most "
        "5.0 KB, the least recently used go first"
    )
    assert f"stay in {cache.folder} for later evaluations: at most 5.0 KB" in cache.promise()


def test_it_is_told_of_a_machine_with_a_storage_elsewhere(tmp_path):
    cache = BlockCache.of_storage(tmp_path, here=True)
    said = cache.promise()
    assert "on the machine that made them, not in the store" in said
    assert f"on this one in {tmp_path}" in said
    with cache.lease("a"), cache.lease("a"):
        assert cache.leased() == {"a"}
    assert cache.leased() == set()
