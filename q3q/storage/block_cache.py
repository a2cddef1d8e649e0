"""The quantized blocks that finished trials leave for later evaluations, within a budget.

They lie in `trials/blocks/<quantization id>`. What `keep=auto` leaves there has a mark, whose time
of change is when a trial used the blocks last. The least recently used go first when all that are
marked take more than a part of the free disk. What `keep=blocks` left has no mark and stays.

Where the storage is a URL, each machine has a cache of its own, `.blocks/<quantization id>` in its
mirror. The machine's trials that use blocks have a lease on them, which the kernel ends with them.
"""

import fcntl
import os
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from q3q.formatting import bytes_in_words
from q3q.storage.claim import Claim

# Of the disk that would be free without these blocks, the part that they may take. No sweep should
# find its disk full because of blocks that may never be asked for again; a tenth of a 2 TB disk
# holds some fifty quantizations of an 8B model at 4 bits.
SHARE = 0.1
MARK = "kept_by_auto"


def stored_blocks(*folders: Path) -> int:
    """Return how many blocks of one quantization lie in some folders; their content is not read."""
    return len({path.name for folder in folders for path in folder.glob("block_*.json")})


@dataclass(frozen=True)
class Kept:
    """Blocks of one quantization that may go.

    name: the quantization's id
    used: nanoseconds of the clock when a trial used them last; decides nothing but their order
    """

    name: str
    size: int
    used: int


class BlockCache:
    """The folder of finished trials' quantized blocks.

    Args:
        here: the folder is this machine's alone, where trials have leases.
    """

    def __init__(self, folder: Path, *, here: bool = False) -> None:
        self.folder, self.here = folder, here

    @classmethod
    def of_storage(cls, storage: Path, *, here: bool) -> "BlockCache":
        """Return the cache of a storage folder, or of a mirror."""
        # Names that begin with a dot are not exchanged with a store (`storage.mirror`).
        return cls(storage / ".blocks" if here else storage / "trials" / "blocks", here=here)

    def use(self, name: str) -> None:
        """Note that a trial uses a quantization's blocks, which it may be about to make.

        Blocks that are there without a mark get none.
        """
        folder = self.folder / name
        new = not folder.is_dir() or not any(folder.iterdir())
        folder.mkdir(parents=True, exist_ok=True)
        if new or (folder / MARK).exists():
            (folder / MARK).touch()

    def forget_older(self, name: str, since: str | None) -> None:
        """Delete a quantization's blocks unless they were made for a wish to run from nothing.

        Args:
            since: names the wish; None if there is none.
        """
        mark = self.folder / name / MARK
        if since is None or (mark.exists() and mark.read_text(encoding="utf-8") == since):
            return
        shutil.rmtree(mark.parent, ignore_errors=True)
        mark.parent.mkdir(parents=True)
        mark.write_text(since, encoding="utf-8")

    def keep(self, name: str) -> None:
        """Let a quantization's blocks stay, whatever they take (keep=blocks)."""
        (self.folder / name / MARK).unlink(missing_ok=True)

    @contextmanager
    def lease(self, name: str) -> Iterator[None]:
        """Keep a quantization's blocks on this machine while some work runs."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._lease(name).open("ab") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            yield

    def leased(self) -> set[str]:
        """Return the quantizations that somebody on this machine has a lease on."""
        found = set()
        for path in self.folder.glob(self._lease("*").name):
            with path.open("ab") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    found.add(path.stem)
        return found

    def _lease(self, name: str) -> Path:
        return self.folder / f"{name}.lease"

    def entries(self) -> list[Kept]:
        """Return all quantizations whose blocks may go, the least recently used first."""
        found = []
        for mark in self.folder.glob(f"*/{MARK}"):
            with suppress(OSError):  # it goes away at this moment
                sizes = [one.stat().st_size for one in os.scandir(mark.parent) if one.is_file()]
                found.append(Kept(mark.parent.name, sum(sizes), mark.stat().st_mtime_ns))
        return sorted(found, key=lambda kept: (kept.used, kept.name))

    def budget(self) -> int:
        """Return the bytes that blocks may take that may go."""
        place = next(one for one in (self.folder, *self.folder.parents) if one.exists())
        taken = sum(kept.size for kept in self.entries())
        return int((shutil.disk_usage(place).free + taken) * SHARE)

    def trim(self, in_use: Callable[[], Collection[str]]) -> list[str]:
        """Delete the least recently used blocks beyond the budget; return whose.

        Args:
            in_use: returns the quantizations that running trials use: theirs stay.
        """
        entries = self.entries()
        over = sum(kept.size for kept in entries) - self.budget()
        gone = []
        for kept in entries:
            if over <= 0:
                break
            claim = Claim(self.folder, kept.name)
            if claim.take() is not None:  # a trial looks at them, or makes them
                continue
            try:
                # A trial that found these blocks under this claim is running, and so is seen.
                if kept.name not in in_use():
                    shutil.rmtree(self.folder / kept.name, ignore_errors=True)
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
        where = "on this machine " if self.here else ""
        return (
            f"blocks of {count} kept {where}for later evaluations (keep=auto): {size} of at most "
            f"{bytes_in_words(self.budget())}, the least recently used go first"
        )

    def promise(self) -> str:
        """Return a line on what will be kept here."""
        most = f"at most {bytes_in_words(self.budget())}, the least recently used go first"
        if self.here:
            return (
                "Quantized blocks stay for later evaluations on the machine that made them, not in "
                f"the store: on this one in {self.folder}, {most}. keep=none keeps none, "
                "keep=blocks all, in the store."
            )
        return (
            f"Quantized blocks stay in {self.folder} for later evaluations: {most}. keep=none "
            "keeps none, keep=blocks all."
        )
