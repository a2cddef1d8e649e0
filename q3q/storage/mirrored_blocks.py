"""The blocks that finished trials leave in a storage that is a URL, and a machine's copies of them.

All machines read them, and claim quantizations, in the store. So a quantization is made once,
whichever machine asks for it. A store has no free disk to take a part of: `keep=auto` keeps what
`STORE_BUDGET` holds.

A machine's copies lie in its mirror. While one of its trials uses a quantization's, it has a lease
on them, which the kernel ends with the process; what nobody here uses gives way to other blocks.
"""

import fcntl
import os
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from q3q.masking import masked
from q3q.storage.block_cache import BLOCKS, MARK, BlockCache, Kept, part_of_free_disk
from q3q.storage.mirror import Mirror
from q3q.storage.stores import StoreError, is_url, with_retries

# Bytes of 25 quantizations of an 8B model at 4 bits; S3 bills about two dollars a month for them.
STORE_BUDGET = 100 * 10**9


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
        self.mirror.remove(f"{BLOCKS}/{name}")
        super().delete(name)

    def entries(self) -> list[Kept]:
        """See BlockCache. The clocks of the machines that used blocks decide their order."""
        store, sizes = self.mirror.store, self._sizes()
        found = []
        for name in {path.split("/")[2] for path in sizes if path.endswith(f"/{MARK}")}:
            below = f"{BLOCKS}/{name}/"
            with suppress(FileNotFoundError):  # it goes away at this moment
                mark = with_retries(self.mirror.url, partial(store.read, f"{below}{MARK}"))
                used = int(mark) if mark.isdigit() else 0
                taken = sum(size for path, size in sizes.items() if path.startswith(below))
                found.append(Kept(name, taken, used))
        return sorted(found, key=lambda kept: (kept.used, kept.name))

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

    @contextmanager
    def lease(self, name: str) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._lease(name).open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            os.utime(file.fileno())
            yield

    def trim_copies(self) -> list[str]:
        """Delete the copies here, the least recently used first, beyond a part of the free disk.

        Those that a trial here has a lease on stay, and so does what was not sent yet.

        Returns:
            The quantizations of which copies were deleted.
        """
        copies = self._copies()
        taken = sum(kept.size for kept in copies)
        over = taken - part_of_free_disk(self.folder, taken)
        gone = []
        for kept in copies:
            if over <= 0:
                break
            with self._lease(kept.name).open("ab") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                self.mirror.drop(f"{BLOCKS}/{kept.name}")
                gone.append(kept.name)
                over -= kept.size
        return gone

    def _copies(self) -> list[Kept]:
        found = []
        for folder in self.folder.glob("*/"):
            lease, size = self._lease(folder.name), 0
            with suppress(FileNotFoundError):  # files go away at this moment
                size = sum(one.stat().st_size for one in os.scandir(folder) if one.is_file())
            if size:
                used = lease.stat().st_mtime_ns if lease.exists() else 0
                found.append(Kept(folder.name, size, used))
        return sorted(found, key=lambda kept: (kept.used, kept.name))

    def _lease(self, name: str) -> Path:
        return self.folder / f".{name}.lease"
