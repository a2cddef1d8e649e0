"""Leases on a folder of this machine: what somebody here reads is not deleted meanwhile.

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
    """Have a folder's files stay while some work goes on; its lease tells when that last began."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with lease_of(folder).open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        os.utime(file.fileno())
        yield


@contextmanager
def unless_leased(*leases: Path) -> Iterator[bool]:
    """Yield True if nobody has one of these leases; then nobody gets one before the end."""
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
