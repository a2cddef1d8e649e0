"""The settings that exist: their types, who has them, and what to say of one that does not exist.

A key is a setting's full name: `bits`, `evaluation.tasks`, `method.damping`. In a sweep of several
methods, `method.gptq.damping` is the damping of GPTQ alone.
"""

import functools
from dataclasses import fields
from typing import Any, get_args, get_origin, get_type_hints

from q3q.config.schema import GROUPS, Config, nearest
from q3q.quantize.methods.registry import offers
from q3q.quantize.methods.settings import SETTINGS, MethodSettings

HELP = "See python launch.py --help"


@functools.cache
def methods() -> dict[str, type[MethodSettings]]:
    """Return the settings of every method that can be used, by name."""
    others = {name: offer.settings for name, offer in offers().items() if offer.settings}
    return {**others, **SETTINGS}


@functools.cache
def knobs(method: str) -> dict[str, Any]:
    """Return a method's own settings and their types."""
    hints = get_type_hints(methods()[method])
    return {
        knob.name: hints[knob.name] for knob in fields(methods()[method]) if knob.name != "name"
    }


def owners(knob: str) -> list[str]:
    """Return the methods that have a setting of this name."""
    return [name for name in methods() if knob in knobs(name)]


@functools.cache
def types() -> dict[str, Any]:
    """Return the type of every setting that is no method's, by key."""
    hints = {key: hint for key, hint in get_type_hints(Config).items() if key not in GROUPS}
    for group, kind in GROUPS.items():
        hints |= {f"{group}.{key}": hint for key, hint in get_type_hints(kind).items()}
    del hints["method"]
    return hints


def type_of(key: str) -> Any:
    """Return a setting's type, of a method's setting that of its first owner; None if unknown."""
    if key.startswith("method."):
        knob = key.rpartition(".")[2]
        return next((knobs(owner)[knob] for owner in owners(knob)), None)
    return types().get(key)


def takes_list(key: str) -> bool:
    kind = type_of(key)
    return any(get_origin(part) is list for part in (kind, *get_args(kind)))


def takes_text(key: str) -> bool:
    return type_of(key) in (str, str | None)


def not_a_setting(key: str, method: str | None = None) -> str:
    """Return a line about a key that does not exist: whose setting it is, or what is like it.

    Args:
        method: the method that was chosen, where a key of `method.` is asked for.
    """
    group, _, name = key.rpartition(".")
    if group.partition(".")[0] == "method" and method is not None:
        if having := [owner for owner in owners(name) if owner != method]:
            have = "does" if len(having) == 1 else "do"
            return (
                f"method={method} does not have the setting {name}, but {' and '.join(having)} "
                f"{have}: add method={having[0]}, or, in a sweep of several methods, use "
                f"method.{having[0]}.{name}"
            )
        return (
            f"{key} is not a setting of method={method}{nearest(name, list(knobs(method)))}{HELP}"
        )
    if key in methods() or (group in methods() and name in knobs(group)):
        knob = name if group else "SETTING"
        return (
            f"{key} is not a setting. A method's settings are written method.{knob} or, in a sweep "
            f"of several methods, method.{group or key}.{knob}"
        )
    homes = [full for full in types() if full.rpartition(".")[2] == name and full != key]
    if homes and not group:
        return f"{key} is not a setting; did you mean {' or '.join(homes)}? {HELP}"
    if not group and (having := owners(name)):
        return f"{of_methods(name, having)}: use method.{name}"
    siblings = [full for full in types() if full.rpartition(".")[0] == group]
    names = [full.rpartition(".")[2] for full in siblings]
    names += [] if group else [*GROUPS, "method", "study"]
    return f"{key} is not a setting{nearest(name, names)}{HELP}"


def of_methods(knob: str, having: list[str]) -> str:
    """Return whose setting it is: `damping is a setting of gptq and billm`."""
    return f"{knob} is a setting of {' and '.join(having)}"
