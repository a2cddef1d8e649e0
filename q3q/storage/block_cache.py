"""The quantized blocks that finished trials leave for later evaluations, within a budget.

They lie in `trials/blocks/<quantization id>`. What `keep=auto` leaves there has a mark, whose time
of change is when a trial used the blocks last. The least recently used go first when all that are
marked take more than a part of the free disk. What `keep=blocks` left has no mark and stays.

`storage.mirrored_blocks` does the same where the storage is a URL.
"""

import shutil
from collections.abc import Callable, Collection
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from q3q.formatting import bytes_in_words
from q3q.storage.claim import ClaimStore, remembered
from q3q.storage.files import bytes_below

# Of the disk that would be free without these blocks, the part that they may take. No sweep should
# find its disk full because of blocks that may never be asked for again; a tenth of a 2 TB disk
# holds some fifty quantizations of an 8B model at 4 bits.
SHARE = 0.1
MARK = "kept_by_auto"
BLOCKS = "trials/blocks"  # in a storage


def stored_blocks(*folders: Path) -> int:
    """Return how many blocks of one quantization lie in some folders; their content is not read."""
    return len({path.name for folder in folders for path in folder.glob("block_*.json")})


@dataclass(frozen=True)
class CachedBlocks:
    """Blocks of one quantization that may go.

    name: the quantization's id
    used: nanoseconds of the clock when a trial used them last; decides nothing but their order
    """

    name: str
    size: int
    used: int


class BlockCache:
    """The blocks of a storage folder, each quantization's in a folder of its own.

    where: for people
    claims: where claims on quantizations are
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.where = str(folder)
        self.claims: Path | ClaimStore = folder

    def use(self, name: str) -> None:
        """Note that a trial uses a quantization's blocks, which it may be about to make.

        Blocks that are there without a mark get none.
        """
        folder = self.folder / name
        new = not stored_blocks(folder)  # what a process that died left of a file is no block
        folder.mkdir(parents=True, exist_ok=True)
        if new or (folder / MARK).exists():
            self._stamp(folder / MARK)

    def _stamp(self, mark: Path) -> None:
        mark.touch()

    def keep(self, name: str) -> None:
        """Let a quantization's blocks stay, whatever they take (keep=blocks)."""
        (self.folder / name / MARK).unlink(missing_ok=True)

    def delete(self, name: str) -> None:
        """Delete a quantization's blocks."""
        shutil.rmtree(self.folder / name, ignore_errors=True)

    def lease(self, name: str) -> AbstractContextManager[None]:
        """Have a quantization's blocks stay on this machine while some work goes on.

        In a folder, `trim` leaves what running trials use.
        """
        return nullcontext()

    def entries(self) -> list[CachedBlocks]:
        """Return all quantizations whose blocks may go, the least recently used first."""
        entries = []
        for mark in self.folder.glob(f"*/{MARK}"):
            with suppress(OSError):  # it goes away at this moment
                size, used = bytes_below(mark.parent), mark.stat().st_mtime_ns
                entries.append(CachedBlocks(mark.parent.name, size, used))
        return sorted(entries, key=lambda kept: (kept.used, kept.name))

    def budget(self) -> int:
        """Return the bytes that blocks may take that may go."""
        return part_of_free_disk(self.folder, sum(kept.size for kept in self.entries()))

    def trim(self, in_use: Callable[[], Collection[str] | None]) -> list[str]:
        """Delete the least recently used blocks beyond the budget; return whose.

        Args:
            in_use: returns the quantizations that running trials use: theirs stay. None if that
                cannot be known now: all stay.
        """
        entries = self.entries()
        over = sum(kept.size for kept in entries) - self.budget()
        gone = []
        for kept in entries:
            if over <= 0:
                break
            with remembered(self.claims, kept.name) as claim:
                if claim.take() is not None:  # a trial looks at them, or makes them
                    over -= kept.size  # no others go in their place: their holder may be dead
                    continue
            try:
                # A trial that found these blocks under this claim is running, and so is seen.
                used = in_use()
                if used is None:
                    break
                if kept.name not in used:
                    self.delete(kept.name)
                    gone.append(kept.name)
                    over -= kept.size
            finally:
                claim.release()
        return gone

    def describe(self) -> str:
        """Return a line on what lies here and may go; empty if nothing does."""
        entries = self.entries()
        if not entries:
            return ""
        size = bytes_in_words(sum(kept.size for kept in entries))
        count = f"{len(entries)} quantization{'s' if len(entries) > 1 else ''}"
        return (
            f"blocks of {count} kept for later evaluations (keep=auto): {size} of at most "
            f"{bytes_in_words(self.budget())}, the least recently used go first"
        )

    def promise(self) -> str:
        """Return a line on what will be kept here."""
        return (
            f"Quantized blocks stay in {self.where} for later evaluations: at most "
            f"{bytes_in_words(self.budget())}, the least recently used go first. keep=none "
            "keeps none, keep=blocks all."
        )


def part_of_free_disk(folder: Path, taken: int) -> int:
    """Return the bytes that blocks in a folder may take, of which some are there already."""
    place = next(parent for parent in (folder, *folder.parents) if parent.exists())
    return int((shutil.disk_usage(place).free + taken) * SHARE)
