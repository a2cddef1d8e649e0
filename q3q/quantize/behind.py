"""A thread that writes quantized blocks while the walk continues with the next ones."""

import contextvars
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch

from q3q.quantize.block_file import EncodedBlock

# Blocks that may wait for the thread or be written by it. A process that is killed loses these, and
# their codes are in main memory.
MOST = 2


class Behind:
    """Blocks on their way to the disk, in order, at most MOST at a time.

    An error of the thread is raised where the next block comes, or at the end.

    Args:
        write: writes one block; called by the thread.
    """

    def __init__(self, write: Callable[[EncodedBlock], None]) -> None:
        self._write = write
        self._thread: ThreadPoolExecutor | None = None
        self._waiting: dict[int, tuple[EncodedBlock, Future[None]]] = {}  # the oldest first

    def make_room(self) -> None:
        """Wait until fewer than MOST blocks are on their way.

        Raises:
            Exception: what writing one of the others raised.
        """
        while self._waiting:
            index, (_, writing) = next(iter(self._waiting.items()))
            if len(self._waiting) < MOST and not writing.done():
                return
            self._take(index)

    def add(self, block: EncodedBlock) -> None:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="q3q_write_behind")
        context = contextvars.copy_context()  # it says what it puts aside where the caller does
        writing = self._thread.submit(context.run, self._written, block)
        self._waiting[block.index] = block, writing

    def find(self, index: int) -> EncodedBlock | None:
        """Return a block that is still on its way, and so in memory; any thread may ask."""
        block, _ = self._waiting.get(index, (None, None))
        return block

    def settle(self) -> None:
        """Wait until no block is on its way.

        Raises:
            Exception: what writing one of them raised.
        """
        while self._waiting:
            self._take(next(iter(self._waiting)))

    def end(self, *, drop: bool) -> None:
        """Wait until no block is on its way, whether they could be written or not.

        Args:
            drop: do not begin to write those that only wait.
        """
        futures = [writing for _, writing in self._waiting.values()]
        if drop:
            for writing in futures:
                writing.cancel()
        wait(futures)
        self._waiting = {}

    def _take(self, index: int) -> None:
        try:
            self._waiting[index][1].result()
        finally:
            del self._waiting[index]

    def _written(self, block: EncodedBlock) -> None:
        with torch.inference_mode():  # a thread does not inherit it
            self._write(block)
