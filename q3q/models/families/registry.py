"""The families that exist: q3q's own, and the entry points of installed packages. Without torch."""

import difflib
import functools
from collections.abc import Mapping
from contextlib import suppress
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from q3q.errors import CheckpointError, first_line
from q3q.models.family import Family

GROUP = "q3q.families"
LONGEST = 40  # characters that are read of a model_type
GUIDE = "docs/FAMILY_GUIDE.md"
# model_type -> `module:Class`; a file is imported when one of its models is read.
OWN = {
    "qwen3": "q3q.models.families.qwen3:Qwen3",
    "qwen3_moe": "q3q.models.families.qwen3_moe:Qwen3Moe",
    "qwen2": "q3q.models.families.qwen2:Qwen2",
    "llama": "q3q.models.families.llama:Llama",
    "qwen3_next": "q3q.models.families.qwen3_next:Qwen3Next",
    "qwen3_5": "q3q.models.families.qwen3_5:Qwen35",
    "qwen3_5_text": "q3q.models.families.qwen3_5:Qwen35Text",
    "qwen3_5_moe": "q3q.models.families.qwen3_5_moe:Qwen35Moe",
    "qwen3_5_moe_text": "q3q.models.families.qwen3_5_moe:Qwen35MoeText",
    "mistral": "q3q.models.families.mistral:Mistral",
}


def find_family(model_type: Any) -> Family:
    """Return the family of config.json's `model_type`.

    Raises:
        CheckpointError: there is none, or the package that offers it is broken.
    """
    points, word = _offered(), str(model_type)[:LONGEST]
    model_types = (*OWN, *sorted(points))
    if model_type is None:
        raise CheckpointError(
            "config.json has no model_type, which names a model's family. q3q runs "
            f"{', '.join(model_types)}; {GUIDE} says how to add one, in one file"
        )
    if word in OWN:
        module, _, name = OWN[word].partition(":")
        return getattr(import_module(module), name)()
    if word in points:
        return _load(points[word])
    near = difflib.get_close_matches(word, model_types, n=1, cutoff=0.7)
    nearest = f"; the nearest name is {near[0]}" if near else ""
    raise CheckpointError(
        f"model_type {word!r} is of no family that q3q runs: {', '.join(model_types)}{nearest}. "
        f"{GUIDE} says how to add one, in one file"
    )


@functools.cache
def _offered() -> Mapping[str, EntryPoint]:
    """Return the installed packages' families by model_type, which names the entry point."""
    points = sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value))
    return {point.name: point for point in points}


def package_of(family: Family) -> str | None:
    """Return the installed package that offers a family, as `name version`; None for q3q's own."""
    kind = type(family)
    if kind.__module__.partition(".")[0] == "q3q":
        return None
    for point in _offered().values():
        with suppress(CheckpointError):  # another family of a broken package
            if type(_load(point)) is kind:
                return f"{point.dist.name} {point.dist.version}" if point.dist else point.value
    return None


def _load(point: EntryPoint) -> Family:
    try:
        kind = point.load()
    except Exception as error:  # somebody else's code: whatever it raises
        raise CheckpointError(
            f"the family {point.name} cannot be used: {point.value} does not load "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error
    if not (isinstance(kind, type) and issubclass(kind, Family)):
        raise CheckpointError(
            f"the family {point.name} cannot be used: {point.value} is not a class derived from "
            "q3q.models.family.Family"
        )
    return kind()
