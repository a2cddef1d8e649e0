"""Requests and answers of lm-eval's generation tasks: stop strings, thoughts and greedy settings."""

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from lm_eval.models.utils import (
    normalize_gen_kwargs,
    postprocess_generated_text,
)

from q3q.errors import ConfigError
from q3q.evaluate.journal import request_key

LEARNT_TOGETHER = 1 << 12  # requests whose texts go to the tokenizer together
GENERATED_TOKENS = 256  # where a task does not say how many, as in HFLM
# Settings of a generation that leave greedy decoding as it is.
GREEDY_SETTINGS = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k"}


@dataclass(frozen=True)
class Answer:
    """A generated text without its thought. finished: False if it ended in the middle of one, and answers nothing."""

    text: str
    finished: bool


@dataclass(frozen=True)
class Thought:
    """Where a thought begins and ends. begun: the text stands in one from its first token on."""

    start: str
    end: str
    begun: bool

    def after(self, text: str) -> str | None:
        """What follows the thought, or the whole of a text without one; None while it lasts."""
        if not self.begun and not text.lstrip().startswith(self.start):
            return text
        _, ended, answer = text.rpartition(self.end)
        return answer.lstrip() if ended else None


@dataclass(frozen=True)
class Generation:
    """until: stop strings, the tokenizer's end-of-text token's among them. most: tokens. ends: tokens after which
    nothing comes, the tokenizer's and those of the model's generation_config.json. thought: None if there can be none.
    """

    until: tuple[str, ...]
    most: int
    ends: tuple[int, ...]
    thought: Thought | None

    def key(self, tokens: bytes) -> str:
        return request_key(b"generate", tokens, json.dumps(asdict(self)).encode())

    def ended(self, tokenizer: Any, tokens: list[int]) -> bool:
        """Whether a stop string is there. While the model thinks, none counts."""
        if tokens[-1] in self.ends:
            return True
        # Asked after each token: a stop string that was not there before is at the end, and a token is a byte at least.
        tail = tokenizer.decode(tokens[-(self._longest + 4) :])
        if not any(stop in tail for stop in self.until):
            return False
        return any(stop in (self._answered(tokenizer.decode(tokens)) or "") for stop in self.until)

    def answer(self, tokens: list[int], tokenizer: Any) -> Answer:
        text = self._answered(tokenizer.decode(tokens, skip_special_tokens=True))
        if text is None:
            return Answer("", finished=False)
        return Answer(postprocess_generated_text(text, list(self.until), None), finished=True)

    def _answered(self, text: str) -> str | None:
        return text if self.thought is None else self.thought.after(text)

    @cached_property
    def _longest(self) -> int:
        """Bytes of the longest stop string."""
        return max((len(stop.encode()) for stop in self.until), default=0)


def greedy_settings(
    settings: dict[str, Any], task: str, most: int | None, window: int
) -> dict[str, Any]:
    """lm-eval's settings of a generation in their normal form; `most` tokens, if it is given.

    Raises:
        ConfigError: they want sampling or beams, or the window holds nothing beside so many tokens.
    """
    kwargs = dict(normalize_gen_kwargs(settings, GENERATED_TOKENS))
    if kwargs["do_sample"]:
        raise ConfigError(
            f"{task} wants sampled text ({settings}); only greedy generation is supported"
        )
    if unknown := set(kwargs) - GREEDY_SETTINGS:
        raise ConfigError(
            f"{task} sets {', '.join(sorted(unknown))}; only greedy generation is supported"
        )
    if most is not None:
        kwargs["max_gen_toks"] = most
    if not 0 < kwargs["max_gen_toks"] < window:
        raise ConfigError(
            f"{task} wants {kwargs['max_gen_toks']} generated tokens, the window has {window}; "
            "evaluation.max_gen_toks=N takes fewer"
        )
    return kwargs
