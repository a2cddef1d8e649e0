"""How many tokens to run at once: found by measuring, halved when memory runs out."""

import gc
import time
from collections.abc import Callable
from typing import TypeVar

import torch

from q3q.models.decoder import Decoder
from q3q.models.footprint import token_bytes

Result = TypeVar("Result")

START_TOKENS = {"cpu": 512, "cuda": 4096}
# More makes a GPU no faster, nor a CPU, whose caches the rest of a larger batch leaves.
MOST_TOKENS, MOST_CPU_TOKENS = 1 << 16, 1 << 10
# Of a batch where none is measured: windows of a text, and whatever goes through a streamed model.
SET_TOKENS = {"cpu": 1024, "cuda": 8192}
# Hidden states that lie on disk, beyond what memory may hold, while a streamed model is gone through once.
PASS_BYTES = 1 << 34
# Doubling must raise tokens per second by this factor, else the smaller batch is kept: it needs less memory.
WORTH_DOUBLING = 1.05
# How libraries that have no exception for it say so.
OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
)
TRIES = 2  # batches measured at each size; the best counts, since everything else on the machine only slows down


class TokenBudget:
    """tokens: what a batch may hold now. It doubles while that is faster, and halves for good on out-of-memory."""

    def __init__(self, start: int = START_TOKENS["cpu"], most: int = MOST_TOKENS) -> None:
        self.tokens = start
        self._most = most
        self._settled = False
        self._before = 0.0  # tokens per second at half the size
        self._rates: list[float] = []

    @classmethod
    def measured(cls, model: Decoder) -> "TokenBudget":
        """For this model: to be found by measuring, unless it is streamed, where a pass is all that could be timed."""
        if model.streamed:
            return cls.set(model)
        if model.device.type == "cpu":
            return cls(most=MOST_CPU_TOKENS)
        most = MOST_TOKENS
        if model.activations is not None:
            # Beyond what the model was loaded with room for; and attention along a tree holds what it sees in float32.
            each = 2 * token_bytes(model.facts, str(model.norm_H.dtype).removeprefix("torch."))
            most = min(most, SET_TOKENS["cuda"] + model.activations // each)
        return cls(START_TOKENS["cuda"], most)

    @classmethod
    def set(cls, model: Decoder, least: int = 1) -> "TokenBudget":
        """For this model, and always the same while memory lasts, so that numbers are too; `least` tokens at least."""
        tokens = max(least, SET_TOKENS.get(model.device.type, SET_TOKENS["cpu"]))
        return cls(tokens, most=tokens)

    def run(self, attempt: Callable[[int], tuple[int, Result]]) -> Result:
        """The result of attempt(budget), which returns how many tokens it ran with it; tried anew with less memory.

        Raises:
            MemoryError, RuntimeError: a single token is too much.
        """
        while True:
            begin = self._now()
            try:
                tokens, result = attempt(self.tokens)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error) or self.tokens == 1:
                    raise
                self.tokens //= 2
                self._most, self._settled = self.tokens, True
            else:
                self._learn(tokens, self._now() - begin)
                return result
            # Out here the error, and with it the tensors that its traceback holds, is gone.
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _now(self) -> float:
        """Seconds. While batches are measured, a GPU's work is waited for: it is only begun when a call returns."""
        if not self._settled and torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def _learn(self, tokens: int, seconds: float) -> None:
        if self._settled or tokens < 0.75 * self.tokens:
            return
        self._rates.append(tokens / seconds)
        if len(self._rates) < TRIES:
            return
        rate = max(self._rates)
        self._rates = []
        if rate < WORTH_DOUBLING * self._before:
            self.tokens //= 2
            self._settled = True
        elif 2 * self.tokens > self._most:
            self._settled = True
        else:
            self.tokens *= 2
            self._before = rate


def pass_tokens(model: Decoder) -> int:
    """How many tokens go through the model at a time: all that the disk may hold of a streamed one, else a batch."""
    return PASS_BYTES // (model.facts.hidden * model.norm_H.element_size()) if model.streamed else 1


def out_of_memory(error: BaseException) -> bool:
    """Whether this is a GPU's, the CPU allocator's or Python's way to say so."""
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in OUT_OF_MEMORY)
