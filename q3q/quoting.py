"""Commands as they are printed: a shell and Hydra read back exactly the values that were meant."""

import re
import shlex
from collections.abc import Mapping, Sequence

# What Hydra's grammar reads as it stands; a number or one of these words would not stay a text.
PLAIN = re.compile(r"[\w/.][\w/.+@*?|:-]*", re.ASCII)
WORDS = ("null", "true", "false")


def override(key: str, value: object) -> str:
    """Return `KEY=VALUE` in Hydra's grammar; `launch` and `module` quote it for the shell.

    Args:
        value: None, a truth value, a number, a text or path, or a list or mapping of these.
    """
    return f"{key}={_value(value)}"


def launch(overrides: Sequence[str], sweep: bool = False) -> str:
    """Return the command that starts a trial, or a sweep, with these overrides."""
    return shlex.join(["python", "launch.py", *(["-m"] if sweep else []), *overrides])


def module(name: str, *words: str) -> str:
    """Return a command of one of q3q's other programs: `python -m q3q.trials ...`."""
    return shlex.join(["python", "-m", name, *words])


def _value(value: object) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, Mapping):
        items = (f"{_key(str(key))}:{_value(inner)}" for key, inner in value.items())
        return f"{{{','.join(items)}}}"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_value, value))}]"
    return _text(str(value))


def _text(text: str) -> str:
    if PLAIN.fullmatch(text) and text.lower() not in WORDS and not _is_number(text):
        return text
    # `${` would begin an interpolation, also in quotes. Hydra halves the backslashes before a
    # quote, OmegaConf those before `${`, and neither touches any others.
    text = re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + r"\${", text)
    text = re.sub(r'(\\*)("|\Z)', lambda match: match[1] * 2 + ('\\"' if match[2] else ""), text)
    return f'"{text}"'


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _key(name: str) -> str:
    """Escape what would end a mapping's key: Hydra's grammar takes no quotes there."""
    return re.sub(r"([\\\[\](){},:= \t])", r"\\\1", name)
