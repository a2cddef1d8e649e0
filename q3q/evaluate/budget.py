"""The number of tokens to run at once: chosen by measuring speed, halved when memory runs out."""

import gc
import time
from collections.abc import Callable
from typing import TypeVar

import torch

from q3q.errors import MEMORY_WORDS
from q3q.models.decoder import Decoder
from q3q.models.footprint import token_bytes

Result = TypeVar("Result")

START_TOKENS = {"cpu": 512, "cuda": 4096}
# Larger batches make a GPU no faster; on a CPU they no longer fit its caches.
MOST_TOKENS, MOST_CPU_TOKENS = 1 << 16, 1 << 10
# A batch's tokens where speed is not measured: for windows of a text, and for a streamed model.
SET_TOKENS = {"cpu": 1024, "cuda": 8192}
# Bytes of hidden states, on disk if need be, that a pass through a streamed model may hold.
PASS_BYTES = 1 << 34
# If doubling raises tokens per second by less than this factor, the smaller batch stays.
WORTH_DOUBLING = 1.05
# Batches measured at each size; the fastest counts, since other work can only slow them down.
TRIES = 2


class TokenBudget:
    """The number of tokens that a batch may hold.

    It doubles while that is faster, and halves for good when memory runs out.
    """

    def __init__(self, start: int = START_TOKENS["cpu"], most: int = MOST_TOKENS) -> None:
        self.tokens = start
        self._most = most
        self._settled = False
        self._before = 0.0  # tokens per second at half the size
        self._rates: list[float] = []

    @classmethod
    def measured(cls, model: Decoder) -> "TokenBudget":
        """Return a budget that measures speed; for a streamed model (few passes) a fixed one."""
        if model.streamed:
            return cls.set(model)
        if model.device.type == "cpu":
            return cls(most=MOST_CPU_TOKENS)
        most = MOST_TOKENS
        if model.activations is not None:
            # Loaded with room for SET_TOKENS; attention over a tree holds float32 states as well.
            each = 2 * token_bytes(model.facts, str(model.norm_H.dtype).removeprefix("torch."))
            most = min(most, SET_TOKENS["cuda"] + model.activations // each)
        return cls(START_TOKENS["cuda"], most)

    @classmethod
    def set(cls, model: Decoder, least: int = 1) -> "TokenBudget":
        """Return a fixed budget of at least `least` tokens, so that batches and bits repeat."""
        tokens = max(least, SET_TOKENS.get(model.device.type, SET_TOKENS["cpu"]))
        return cls(tokens, most=tokens)

    def run(self, attempt: Callable[[int], tuple[int, Result]]) -> Result:
        """Return the result of `attempt`, called again with half the tokens if memory runs out.

        Args:
            attempt: receives the most tokens of a batch; returns the tokens it ran, and its result.

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
            # Outside the handler the error is gone, with the tensors that its traceback held.
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _now(self) -> float:
        """Return seconds; while batches are measured, once the GPU has done its queued work."""
        if not self._settled and torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def _learn(self, tokens: int, seconds: float) -> None:
        if self._settled or tokens < 0.75 * self.tokens:
            return
        self._rates.append(tokens / seconds)
        if len(self._rates) < TRIES:
            return
        rate, self._rates = max(self._rates), []
        if rate < WORTH_DOUBLING * self._before:
            self.tokens, self._settled = self.tokens // 2, True
        elif 2 * self.tokens > self._most:
            self._settled = True
        else:
            self.tokens, self._before = 2 * self.tokens, rate


def pass_tokens(model: Decoder) -> int:
    """Return the tokens of one pass: PASS_BYTES' worth for a streamed model, else one batch (1)."""
    return PASS_BYTES // (model.facts.hidden * model.norm_H.element_size()) if model.streamed else 1


def out_of_memory(error: BaseException) -> bool:
    """Return True for the errors by which a GPU, torch's CPU allocator or Python report it."""
    if isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and MEMORY_WORDS.search(str(error)) is not None
