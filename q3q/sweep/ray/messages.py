"""The messages of a task's stream: a kind, its content, and how both are pickled."""

import traceback
from typing import Any

from q3q.errors import Q3QError

EVENT, VALUE, ERROR, DIED, BACK, MEET = (
    "event",
    "value",
    "error",
    "died",
    "handed back",
    "meet",
)


def pack(*message: Any) -> bytes:
    from ray import cloudpickle

    return cloudpickle.dumps(message)


def unpack(packed: bytes) -> Any:
    from ray import cloudpickle

    return cloudpickle.loads(packed)


def pack_error(error: BaseException) -> bytes:
    trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    try:
        packed = pack(ERROR, error, trace)
        unpack(
            packed
        )  # an exception class with its own __init__ often pickles but does not come back
    except Exception:
        packed = pack(ERROR, Q3QError(f"{type(error).__name__}: {error}"), trace)
    return packed


def caused_by(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error
