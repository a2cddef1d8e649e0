"""A packed checkpoint's config: which linear has which layout."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from q3q.errors import CheckpointError
from q3q.kv_scheme import FIXED, KvScheme
from q3q.models.packed import Layout
from q3q.scheme import InputRounding

NOTHING = r"(?!)"  # a pattern that matches no name
Rules = tuple[tuple[str, Layout | None], ...]


@dataclass(frozen=True)
class Packing:
    """A packed checkpoint's config.

    method: the quantizer's word for itself, or for its format
    rules: patterns of complete names with their layouts; the first that matches counts
    inexact: what runs otherwise in the format's own runtime than here, a line each
    kv: how its cache stores keys and values; their scales lie beside the weights, or are 1
    by_files: a linear without its layout's marker among the stored tensors is unquantized
    """

    method: str
    rules: Rules
    inexact: tuple[str, ...] = ()
    kv: KvScheme | None = None
    by_files: bool = False

    def of(self, linear: str) -> Layout | None:
        """Return a linear's layout, None if it is unquantized.

        Args:
            linear: a name on disk, `model.layers.0.self_attn.q_proj`.
        """
        matching = (layout for pattern, layout in self.rules if re.fullmatch(pattern, linear))
        return next(matching, None)

    def settled(self, tensors: Collection[str]) -> Packing:
        """Return the packing as the files have it, where they say what is unquantized.

        Args:
            tensors: names of all stored tensors.
        """
        if not self.by_files:
            return self
        markers = {f".{layout.marker}" for _, layout in self.rules if layout is not None}
        packed = {
            name.removesuffix(end) for end in markers for name in tensors if name.endswith(end)
        }
        plain = {name.removesuffix(".weight") for name in tensors if name.endswith(".weight")}
        return replace(self, rules=((any_of(sorted(plain - packed)), None), *self.rules))

    @property
    def rounds_inputs(self) -> bool:
        """True if some linear's input is rounded."""
        return any(layout is not None and layout.inputs is not None for _, layout in self.rules)

    def inputs(self, linears: Iterable[str]) -> InputRounding | None:
        """Return how the input that these linears share is rounded, None if it is not.

        Raises:
            CheckpointError: it is rounded in different ways.
        """
        first: dict[InputRounding | None, str] = {}  # the first linear that reads it so
        for name in linears:
            layout = self.of(name)
            first.setdefault(None if layout is None else layout.inputs, name)
        if len(first) > 1:
            (one, name), (other, another) = list(first.items())[:2]
            raise CheckpointError(
                f"{name} reads its input {_in_words(one)} and {another} reads the same one "
                f"{_in_words(other)}: q3q cannot read this"
            )
        return next(iter(first))


def any_of(names: Iterable[str]) -> str:
    """Return a pattern that matches these targets and nothing else.

    A target that begins with `re:` is a pattern, which compressed-tensors matches at the start of a
    name, not to its end.
    """
    patterns = [
        f"(?:{name[3:]}).*" if name.startswith("re:") else re.escape(name) for name in names
    ]
    return "|".join(patterns) or NOTHING


def parts_of_names(parts: Iterable[str]) -> str:
    """Return a pattern of names that contain one of these parts."""
    return f".*(?:{any_of(parts)}).*"


# How servers store a cache in fp8: one scale for a layer's keys, and one for its values.
FP8_CACHE = KvScheme(bits=8, format="fp8_e4m3", scales=FIXED)
# Where the two scales lie, by the module of a block.
KEY_SCALES = ("self_attn.k_scale", "self_attn.k_proj.k_scale", "self_attn.k_proj.output_scale")
VALUE_SCALES = ("self_attn.v_scale", "self_attn.v_proj.v_scale", "self_attn.v_proj.output_scale")


def cache_of(method: str, args: Mapping[str, Any]) -> KvScheme:
    """Return how a `kv_cache_scheme` says that keys and values are stored.

    Raises:
        CheckpointError: in a way that q3q cannot read.
    """
    one_scale = args.get("strategy", "tensor") == "tensor" and args.get("dynamic") is not True
    if (args["num_bits"], args["type"]) != (8, "float") or not one_scale:
        raise unreadable(method, f"with a cache of keys and values ({dict(args)})")
    return FP8_CACHE


def unreadable(method: str, why: str) -> CheckpointError:
    return CheckpointError(f"quantized already ({method}), {why} that q3q cannot read")


def _in_words(rounding: InputRounding | None) -> str:
    if rounding is None:
        return "unrounded"
    return f"rounded ({rounding.format}, {rounding.bits} bits, {rounding.scales} scales)"
