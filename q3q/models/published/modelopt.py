"""NVIDIA ModelOpt's configs: `hf_quant_config.json`, or the same inside config.json."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from q3q.models.packed import Layout
from q3q.models.packed_floats import ModelOptFp4, PlainFloats
from q3q.models.published.packing import FP8_CACHE, NOTHING, Packing, cache_of, unreadable

METHOD = "modelopt"
FILE = "hf_quant_config.json"
FP4_GROUP = 16
MIXED = "MIXED_PRECISION"


def read_modelopt(config: Mapping[str, Any]) -> Packing:
    """Read a config, of either shape.

    Raises:
        CheckpointError: its algorithm is one that q3q cannot read.
    """
    inner = config.get("quantization", config)
    left_out = inner.get("exclude_modules") or inner.get("ignore") or ()
    word, scheme = inner.get("kv_cache_quant_algo"), inner.get("kv_cache_scheme")
    if word not in (None, "FP8"):
        raise unreadable(METHOD, f"with a cache of keys and values in {word}")
    kv = FP8_CACHE if word else cache_of(METHOD, scheme) if scheme else None
    rules: list[tuple[str, Layout | None]] = [(_wildcards(left_out), None)]
    if inner["quant_algo"] == MIXED:
        for name, own in inner["quantized_layers"].items():
            rules.append((re.escape(name), _layout(own["quant_algo"], own)))
        return Packing(METHOD, (*rules, (".*", None)), kv=kv)
    return Packing(METHOD, (*rules, (".*", _layout(inner["quant_algo"], inner))), kv=kv)


def _layout(algorithm: str, settings: Mapping[str, Any]) -> Layout:
    size = settings.get("group_size") or FP4_GROUP
    if algorithm == "FP8":
        return PlainFloats(
            8, -1, True, act_bits=8, act_format="fp8_e4m3", act_scales="stored", group_rows=-1
        )
    if algorithm in ("NVFP4", "W4A16_NVFP4") and size == FP4_GROUP:
        if algorithm == "W4A16_NVFP4":
            return ModelOptFp4(4, size, True, format="nvfp4")
        return ModelOptFp4(
            4,
            size,
            True,
            act_bits=4,
            act_format="nvfp4",
            act_group_size=size,
            act_scales="factor",
            format="nvfp4",
        )
    raise unreadable(METHOD, f"in a way ({algorithm}, groups of {size})")


def _wildcards(patterns: Iterable[str]) -> str:
    """Return a pattern of these modules and all in them; a star stands for any characters."""
    expressions = [re.escape(pattern).replace(r"\*", ".*") for pattern in patterns]
    return f"(?:{'|'.join(expressions)})(?:\\..*)?" if expressions else NOTHING
