"""The hashes of documents that lm-eval puts into its samples, made quickly."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from json.encoder import encode_basestring
from types import SimpleNamespace
from typing import Any

from lm_eval import evaluator


@contextmanager
def documents_written_quickly() -> Iterator[None]:
    """Have lm-eval write documents by `written` while inside.

    It hashes each document as indented JSON, which Python's encoder writes piece by piece.
    """
    before = evaluator.json
    evaluator.json = SimpleNamespace(**vars(json) | {"dumps": written})
    try:
        yield
    finally:
        evaluator.json = before


def written(content: Any, **settings: Any) -> str:
    """Return what `json.dumps` does; quickly for what lm-eval asks of most documents."""
    if settings.get("indent") == 2 and settings.get("ensure_ascii") is False:
        plain = _fields(content) if type(content) is dict and content else None
        if plain is not None and set(settings) <= {"indent", "ensure_ascii", "default"}:
            return "{\n  " + ",\n  ".join(plain) + "\n}"
    return json.dumps(content, **settings)


def _fields(document: dict[Any, Any]) -> list[str] | None:
    """Return a document's fields; None unless they are texts, whole numbers and lists of texts."""
    fields = []
    for name, value in document.items():
        if type(name) is not str:
            return None
        if type(value) is str:
            text = encode_basestring(value)
        elif type(value) is int:
            text = str(value)
        elif type(value) is list and value and all(type(one) is str for one in value):
            text = "[\n    " + ",\n    ".join(map(encode_basestring, value)) + "\n  ]"
        else:
            return None
        fields.append(f"{encode_basestring(name)}: {text}")
    return fields
