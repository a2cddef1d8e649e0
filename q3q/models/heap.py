"""The C library's heap gives back what is freed. Where memory is bounded, what it would keep is too much.

Of glibc; another one is left as it is.
"""

import ctypes
from contextlib import suppress

_MMAP_THRESHOLD, _LARGE = -3, 1 << 24  # of glibc's malloc.h; bytes


def return_large() -> None:
    """Of tensors up to 32 MB, which a block's mostly are, the heap of each thread that made one would keep the memory,
    in holes where the next ones may not fit. Large ones of this process go back to the system from here on.
    Smaller ones do not: activations, which are made again and again, would each time come anew page by page.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(_MMAP_THRESHOLD, _LARGE)


def return_holes() -> None:
    """What smaller tensors left behind: a tenth of a gigabyte and more by the time a block's last site is solved."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
