"""Requests and answers of lm-eval's generation tasks: stop strings, thoughts, greedy settings."""

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text

from q3q.errors import ConfigError
from q3q.evaluate.journal import request_key

GENERATED_TOKENS = 256  # where a task does not say how many, as in HFLM
# Settings of a generation that leave greedy decoding as it is.
GREEDY_SETTINGS = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k"}


@dataclass(frozen=True)
class Answer:
    """A generated text without its thought.

    finished: False if it ended within a thought, and so answers nothing
    """

    text: str
    finished: bool


@dataclass(frozen=True)
class Thought:
    """The marks around a thought.

    begun: the text is in a thought from its first token on
    """

    start: str
    end: str
    begun: bool

    def after(self, text: str) -> str | None:
        """Return the text behind the thought, all of it without one; None within a thought."""
        if not self.begun and not text.lstrip().startswith(self.start):
            return text
        _, ended, answer = text.rpartition(self.end)
        return answer.lstrip() if ended else None


@dataclass(frozen=True)
class Generation:
    """A request's settings.

    until: stop strings, the tokenizer's end-of-text token's among them
    most: tokens to generate at most
    ends: tokens that end a text, the tokenizer's and those of the model's generation_config.json
    thought: None if the model cannot think
    """

    until: tuple[str, ...]
    most: int
    ends: tuple[int, ...]
    thought: Thought | None

    def key(self, tokens: bytes) -> str:
        return request_key(b"generate", tokens, json.dumps(asdict(self)).encode())

    def ended(self, tokenizer: Any, tokens: list[int]) -> bool:
        """Return True at an end token or a stop string; in a thought, no stop string counts."""
        if tokens[-1] in self.ends:
            return True
        # Called after each token, so a new stop string is at the end. A token has at least a byte.
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
    """Return lm-eval's settings of a generation in their normal form.

    Args:
        most: tokens to generate instead of the task's own number.

    Raises:
        ConfigError: they require sampling or beams, or so many tokens leave no room in the window.
    """
    kwargs = dict(normalize_gen_kwargs(settings, GENERATED_TOKENS))
    if kwargs["do_sample"]:
        raise ConfigError(
            f"{task} asks for sampled text ({settings}); only greedy generation is supported"
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
