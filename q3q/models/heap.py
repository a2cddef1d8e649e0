"""Make glibc's heap return freed memory to the system, which matters where memory is bounded.

Another C library's heap is left as it is.
"""

import ctypes
from contextlib import suppress

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of glibc's malloc.h
_LARGE = 1 << 24  # bytes


def return_large() -> None:
    """From here on, return this process's large tensors to the system when they are freed.

    By default each thread's heap keeps freed tensors of up to 32 MB, as most of a block's are, in
    holes that the next ones may not fit. Smaller tensors stay in the heap: activations, which come
    again and again, would have to be mapped anew page by page each time.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").mallopt(_MMAP_THRESHOLD, _LARGE)


def return_holes() -> None:
    """Return the holes that smaller tensors left: 0.1 GB and more after a block's last site."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
