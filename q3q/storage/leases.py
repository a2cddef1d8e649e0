"""Leases on a folder of this machine: while a process reads it, no other one deletes it.

A lease is a lock on a file beside the folder. The kernel ends it with its process.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path


def lease_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lease")


@contextmanager
def leased(folder: Path) -> Iterator[None]:
    """Keep a folder's files until the block ends; the lease's time is that of its last use."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with lease_of(folder).open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        os.utime(file.fileno())
        yield


@contextmanager
def unless_leased(*leases: Path) -> Iterator[bool]:
    """Yield True if no process has one of these leases; then none gets one before the end."""
    with ExitStack() as held:
        free = True
        for lease in leases:
            if lease.parent.is_dir():
                file = held.enter_context(lease.open("ab"))
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    free = False
        yield free
