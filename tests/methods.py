"""Methods by their names, as a trial makes them."""

from importlib import import_module
from typing import Any

from q3q.quantize.methods.settings import SETTINGS


def built(name: str, **knobs: Any) -> Any:
    """Return a method with these knobs; the others have their defaults."""
    settings = SETTINGS[name](**knobs)
    module, _, kind = settings.implementation.partition(":")
    return getattr(import_module(module), kind)(settings)
