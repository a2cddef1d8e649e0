"""Conversations to calibrate on: a file's messages, and the text that a model's template makes.

A conversation is a document. It is kept as the canonical JSON of its messages, so its digest does
not depend on any model; what a model reads is made by the chat template of its own tokenizer.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from q3q.data.files import json_lines
from q3q.errors import CalibrationError, first_line
from q3q.spec import Json

# A template that asks for today's date gets this one: windows must not depend on the day.
DATE = "26 Jul 2024"
CLOCK, GIVEN_DATE = "strftime_now", "date_string"


def conversations(path: Path) -> tuple[str, ...]:
    """Return a file's conversations, each as the canonical JSON of its messages.

    Args:
        path: JSON lines (`.jsonl`, perhaps compressed): on each a list of messages, or an object
            with one as `messages`. A message has a `role` and a `content`, both texts.

    Raises:
        CalibrationError: the file or one of its lines is something else; the line is named.
    """
    chats = tuple(
        json.dumps(_messages(where, item), ensure_ascii=False, sort_keys=True)
        for where, item in json_lines(path)
    )
    if not chats:
        raise CalibrationError(f"{path} holds no conversation")
    return chats


def rendered(
    documents: Iterable[str], tokenizer: Any, name: str, *, answers: bool = False
) -> tuple[str, ...]:
    """Return conversations as the model's chat template writes them.

    Args:
        documents: as `conversations` returns them.
        answers: end with what the template writes before an answer.

    Raises:
        CalibrationError: the tokenizer has no template, or the template refuses a conversation or
            writes today's date.
    """
    refuse_template(tokenizer.chat_template, name)
    texts = []
    for number, document in enumerate(documents, 1):
        try:
            written = tokenizer.apply_chat_template(
                json.loads(document),
                tokenize=False,
                add_generation_prompt=answers,
                **{GIVEN_DATE: DATE},
            )
        except Exception as error:  # whatever a template raises
            raise CalibrationError(
                f"{name}, conversation {number}: the model's chat template does not take it: "
                f"{first_line(error)}"
            ) from error
        texts.append(written)
    return tuple(texts)


def refuse_template(template: str | None, name: str) -> None:
    """Refuse to write conversations with a template that cannot, or that depends on the day.

    Args:
        template: a tokenizer's; None or empty if it has none.

    Raises:
        CalibrationError: it cannot be used.
    """
    if not template:
        raise CalibrationError(
            f"{name}: the model's tokenizer has no chat template, so nothing says how it reads "
            "messages: give a post-trained model, or plain text with calibration=file"
        )
    if CLOCK in template and GIVEN_DATE not in template:
        raise CalibrationError(
            f"{name}: the model's chat template writes today's date into each conversation, so "
            "windows would differ from day to day: give plain text with calibration=file"
        )


def _messages(where: str, item: Any) -> list[Json]:
    messages = item.get("messages") if isinstance(item, Mapping) else item
    if not isinstance(messages, list) or not messages:
        raise CalibrationError(
            f"{where}: neither a list of messages nor an object with one as `messages`"
        )
    for number, message in enumerate(messages, 1):
        whole = isinstance(message, Mapping) and all(
            isinstance(message.get(key), str) for key in ("role", "content")
        )
        if not whole:
            raise CalibrationError(
                f"{where}: message {number} must be an object with a text `role` and a text "
                "`content`"
            )
    return [{"role": message["role"], "content": message["content"]} for message in messages]
