"""The messages of a task's stream, and how they are pickled.

A task is a Ray *streaming generator*: its first item says that it began, the next ones are what it
reported, the last one is its result or its own exception. One ordered stream per task means that a
result cannot overtake an event, that a worker's death is seen on the stream that it fed, and that
no mailbox process exists that could die, or lag, for all.
"""

import traceback
from typing import Any, NamedTuple

from q3q.errors import Q3QError

EVENT = "event"  # something that the task reported
ADDRESS = "address"  # of a gang: where rank 0 listens for the others
PULSE = "pulse"  # of a rank: its exchanges so far, and whether it waits in one
# How a task ends. DIED is not sent: it stands for what a dead worker could not send.
VALUE, ERROR, HANDED_BACK, DIED = "value", "error", "handed back", "died"


class Message(NamedTuple):
    kind: str
    content: Any


def pack(*message: Any) -> bytes:
    """Pickle a message: its kind and content, and of an error its traceback in words."""
    from ray import cloudpickle

    return cloudpickle.dumps(message)


def unpack(packed: bytes) -> Any:
    from ray import cloudpickle

    return cloudpickle.loads(packed)


def pack_error(error: BaseException) -> bytes:
    """Pickle an exception, or, if it cannot travel, one that says what it was."""
    trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    try:
        packed = pack(ERROR, error, trace)
        # An exception class with its own __init__ often pickles but does not come back.
        unpack(packed)
    except Exception:
        packed = pack(ERROR, Q3QError(f"{type(error).__name__}: {error}"), trace)
    return packed


def caused_by(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error
