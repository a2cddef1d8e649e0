"""lm-eval's templates, each compiled once."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

from lm_eval.utils import env

MOST_TEMPLATES = 1 << 12  # a task has a few


@contextmanager
def templates_compiled_once() -> Iterator[None]:
    """Keep lm-eval's compiled templates while inside, and leave its environment as it was.

    lm-eval compiles a template anew for each text that it makes with it. A compiled one holds
    nothing of a document, so the texts are the same.
    """
    before = env.__dict__.get("from_string")
    env.from_string = lru_cache(maxsize=MOST_TEMPLATES)(env.from_string)
    try:
        yield
    finally:
        if before is None:
            del env.from_string
        else:
            env.from_string = before
