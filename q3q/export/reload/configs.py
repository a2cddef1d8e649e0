"""What a checkpoint's config.json says about its weights and their inputs. Imports no torch."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INNER = "model.language_model."  # where the text part of a model that sees images has `model.`
UNPACKER = "a plain unpacker"  # its description begins so; public loaders' do not


def read_config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))


def text_of(config: dict[str, Any]) -> dict[str, Any]:
    """Return the values of the text part, which may be one of several."""
    return {**config, **config.get("text_config", {})}


def has_experts(config: dict[str, Any]) -> bool:
    text = text_of(config)
    return bool(text.get("num_experts") or text.get("num_local_experts"))


@dataclass(frozen=True)
class Group:
    """One setting of linears in a config of compressed-tensors.

    scales: of floats, `e8m0` or `e4m3`; else `float`
    wide_groups: a scale is shared by a whole row or linear
    rounded: activations are rounded
    """

    bits: int
    floats: bool
    symmetric: bool
    rounded: bool = False
    scales: str = "float"
    wide_groups: bool = False


def groups_of(packed: dict[str, Any]) -> list[Group]:
    """Return the settings of a compressed-tensors config."""
    groups = []
    for group in packed["config_groups"].values():
        weights = group["weights"]
        scales = {"tensor_group": "e4m3"}.get(weights["strategy"], "float")
        powers = weights["type"] == "float" and "uint8" in str(weights.get("scale_dtype"))
        groups.append(
            Group(
                bits=weights["num_bits"],
                floats=weights["type"] == "float",
                symmetric=weights["symmetric"],
                rounded=bool(group.get("input_activations")),
                scales="e8m0" if powers else scales,
                wide_groups=weights["strategy"] in ("channel", "tensor"),
            )
        )
    return groups


AS_IT_IS, UNPACKED = "as it is", "dequantize=True"


def reading_of(groups: Sequence[Group], *, experts: bool, dtype: str) -> str | None:
    """Return how transformers reads such compressed-tensors weights; None if it misreads them.

    The rules are those of transformers 5.23 with compressed-tensors 0.20. Refusals and remarks of
    `q3q.export` follow from them.

    AS_IT_IS: each linear by its own setting.
    UNPACKED: while they load, all by one setting. It is the way for zero points, for which its
        packed modules have no room, and for MX and NVFP4 unless the model is bfloat16, as these
        are what unpacking makes of them.

    Args:
        experts: the model has experts, which transformers fuses: of these it reads whole numbers
            that are symmetric and whose inputs are not rounded, and FP8 with a scale a row or
            linear. NVFP4 it reads without the factor, and MXFP8 by scales that it takes for
            numbers.
    """
    if experts:
        sound = all(
            group.symmetric
            and (
                (group.scales == "float" and group.wide_groups)
                if group.floats
                else not group.rounded
            )
            for group in groups
        )
        return AS_IT_IS if sound else None
    if all(
        group.symmetric and (group.scales == "float" or dtype == "bfloat16") for group in groups
    ):
        return AS_IT_IS
    return UNPACKED if len(groups) == 1 else None


def rounding_of(packed: dict[str, Any], linear: str) -> dict[str, Any] | None:
    """Return how the input of `linear`, named as on disk, is rounded; None if it is not."""

    def matches(target: str) -> bool:
        if target.startswith("re:"):
            return bool(re.match(target[3:], linear))
        return target in (linear, "Linear")

    if any(map(matches, packed["ignore"])):
        return None
    # A name or a pattern precedes a class, as in all readers.
    groups = sorted(packed["config_groups"].values(), key=lambda g: g["targets"] == ["Linear"])
    group = next(group for group in groups if any(map(matches, group["targets"])))
    return group.get("input_activations")


def roundings_of(packed: dict[str, Any]) -> list[list[Any]]:
    """Return [type, bits, channels that share a scale] of each way in which inputs are rounded."""
    groups = packed.get("config_groups", {}).values()
    roundings = {
        (args["type"], args["num_bits"], args.get("group_size") or -1)
        for args in (group.get("input_activations") for group in groups)
        if args
    }
    return [list(rounding) for rounding in sorted(roundings)]
