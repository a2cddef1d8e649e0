"""The blocks that finished trials leave in a storage that is a URL, and a machine's copies of them.

All machines read them, and claim quantizations, in the store. So a quantization is made once,
whichever machine asks for it. A store has no free disk to take a part of: `keep=auto` keeps what
`STORE_BUDGET` holds.

A machine's copies lie in its mirror. While one of its trials uses a quantization's, it has a lease
on them, which the kernel ends with the process; what nobody here uses gives way to other blocks.
"""

import shutil
import time
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, suppress
from functools import partial
from pathlib import Path

from q3q.masking import masked
from q3q.storage.block_cache import BLOCKS, MARK, BlockCache, CachedBlocks, part_of_free_disk
from q3q.storage.files import bytes_below
from q3q.storage.leases import lease_of, leased, unless_leased
from q3q.storage.mirror import Mirror
from q3q.storage.stores import StoreError, is_url, with_retries

# Bytes of 25 quantizations of an 8B model at 4 bits; S3 bills about two dollars a month for them.
STORE_BUDGET = 100 * 10**9
# In a mirror: where earlier versions had copies that no store knew, with leases of another name.
OLD, OLD_LEASES = ".blocks", "*.lease"


def block_cache_of(storage: str | Path) -> BlockCache:
    """Return the cache of blocks of a storage: a folder, or a URL."""
    if is_url(str(storage)):
        return MirroredBlocks(Mirror(str(storage)))
    return BlockCache(Path(storage) / BLOCKS)


class MirroredBlocks(BlockCache):
    """The blocks of a store, and this machine's copies of them."""

    def __init__(self, mirror: Mirror) -> None:
        super().__init__(mirror.folder / BLOCKS)
        self.where = f"{masked(mirror.url)}/{BLOCKS}"
        self.mirror = mirror
        self.claims = mirror.claim_store(BLOCKS)

    def _stamp(self, mark: Path) -> None:
        mark.write_text(str(time.time_ns()), encoding="ascii")  # a store keeps no time of ours

    def delete(self, name: str) -> None:
        """See BlockCache. Copies here that somebody has a lease on go with a later pull.

        The mark goes last: if this process dies meanwhile, what is left may still go.
        """
        with self._unless_leased(name) as free:
            self.mirror.remove(f"{BLOCKS}/{name}", last=MARK, later=not free)
            if free:
                super().delete(name)

    def entries(self) -> list[CachedBlocks]:
        """See BlockCache. The clocks of the machines that used blocks decide their order."""
        store, sizes = self.mirror.store, self._sizes()
        entries = []
        for name in {path.split("/")[2] for path in sizes if path.endswith(f"/{MARK}")}:
            below = f"{BLOCKS}/{name}/"
            with suppress(FileNotFoundError):  # it goes away at this moment
                mark = with_retries(self.mirror.url, partial(store.read, f"{below}{MARK}"))
                used = int(mark) if mark.isdigit() else 0
                taken = sum(size for path, size in sizes.items() if path.startswith(below))
                entries.append(CachedBlocks(name, taken, used))
        return sorted(entries, key=lambda kept: (kept.used, kept.name))

    def _sizes(self) -> dict[str, int]:
        sizes: dict[str, int] = with_retries(
            self.mirror.url, lambda: self.mirror.store.sizes(BLOCKS)
        )
        return sizes

    def budget(self) -> int:
        return STORE_BUDGET

    def trim(self, in_use: Callable[[], Collection[str] | None]) -> list[str]:
        """See BlockCache; then delete this machine's copies that its disk has no room for."""
        gone: list[str] = []
        with suppress(StoreError):  # the next trial to finish deletes them
            gone = super().trim(in_use)
        self.trim_copies()
        return gone

    def lease(self, name: str) -> AbstractContextManager[None]:
        return leased(self.folder / name)

    def _unless_leased(self, name: str) -> AbstractContextManager[bool]:
        return unless_leased(lease_of(self.folder / name))

    def trim_copies(self) -> list[str]:
        """Delete the copies here, the least recently used first, beyond a part of the free disk.

        Those that a trial here has a lease on stay, and so does what was not sent yet.

        Returns:
            The quantizations of which copies were deleted.
        """
        self._delete_old_copies()
        copies = self._copies()
        taken = sum(kept.size for kept in copies)
        over = taken - part_of_free_disk(self.folder, taken)
        gone = []
        for kept in copies:
            if over <= 0:
                break
            with self._unless_leased(kept.name) as free:
                if free and (freed := self._drop(kept)):
                    gone.append(kept.name)
                    over -= freed
        return gone

    def _drop(self, kept: CachedBlocks) -> int:
        """Delete copies that nobody here uses; return the bytes that they took."""
        folder = self.folder / kept.name
        for path in folder.glob("*.partial"):  # of one that died, or that fetches them once more
            path.unlink(missing_ok=True)
        self.mirror.drop(f"{BLOCKS}/{kept.name}")
        return kept.size - bytes_below(folder)

    def _delete_old_copies(self) -> None:
        old = self.mirror.folder / OLD
        with unless_leased(*old.glob(OLD_LEASES)) as free:
            if free:
                shutil.rmtree(old, ignore_errors=True)

    def _copies(self) -> list[CachedBlocks]:
        copies = []
        for folder in self.folder.glob("*/"):
            lease = lease_of(folder)
            if size := bytes_below(folder):
                used = lease.stat().st_mtime_ns if lease.exists() else 0
                copies.append(CachedBlocks(folder.name, size, used))
        return sorted(copies, key=lambda kept: (kept.used, kept.name))
