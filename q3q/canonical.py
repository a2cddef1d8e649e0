"""Canonical JSON: what a spec's parts are filed as, and digests of it."""

import hashlib
import json
from collections.abc import Collection, Mapping
from typing import Any

Json = dict[str, Any]


def digest(facts: Json, *, spaced: bool = False) -> str:
    """Return the SHA-256 (64 hex digits) of facts as canonical JSON.

    Args:
        spaced: with a space after each separator, as files' seals have always had it.
    """
    separators = None if spaced else (",", ":")
    return sha256(json.dumps(facts, sort_keys=True, separators=separators))


def sha256(content: str | bytes) -> str:
    """Return the SHA-256 (64 hex digits) of a text or of bytes."""
    if isinstance(content, str):
        content = content.encode(errors="surrogatepass")
    return hashlib.sha256(content).hexdigest()


def without_none(facts: Mapping[str, Any], keep: Collection[str] = ()) -> Json:
    """Return what is given; of the keys in `keep`, also what is not."""
    return {key: value for key, value in facts.items() if value is not None or key in keep}


def checked(what: str, value: Any, kind: type) -> Any:
    """Return a value of JSON.

    Raises:
        ValueError: it is of another type.
    """
    if not isinstance(value, kind):
        raise ValueError(f"{what} is {type(value).__name__}")
    return value
