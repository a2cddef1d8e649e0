"""Prompts of post-trained models: chat templates, and thoughts that precede an answer."""

from dataclasses import dataclass

THINK_START, THINK_END = "<think>", "</think>"  # around a thought of a post-trained Qwen3


@dataclass(frozen=True)
class Chat:
    """How a prompt is shown to a model.

    template: apply the tokenizer's chat template
    thinking: the template's `enable_thinking`; None leaves it to the template
    think_start, think_end: around a thought. Only what follows it counts as the answer
    system: the system prompt
    """

    template: bool = False
    thinking: bool | None = None
    think_start: str = THINK_START
    think_end: str = THINK_END
    system: str | None = None

    @property
    def thinks(self) -> bool:
        """True if an answer may begin with a thought."""
        return self.template and self.thinking is not False


PLAIN_CHAT = "none"
CHATS = {
    PLAIN_CHAT: Chat(),
    "template": Chat(template=True),
    "thinking": Chat(template=True, thinking=True),
    "no_thinking": Chat(template=True, thinking=False),
}
