"""FP8 as Qwen and DeepSeek release it: blocks of rows and columns share a scale."""

from collections.abc import Mapping
from typing import Any

from q3q.models.packed_floats import PlainFloats
from q3q.models.published.packing import Packing, any_of, unreadable

METHOD = "fp8"


def read_fp8(config: Mapping[str, Any]) -> Packing:
    """Read a config.

    Inputs are rounded in groups of a token's channels as wide as a block or, without blocks, per
    token or by a stored scale.

    Raises:
        CheckpointError: it is a variant that q3q cannot read.
    """
    kind, acts = config.get("fmt") or "e4m3", config.get("activation_scheme", "dynamic")
    block = config.get("weight_block_size")
    if kind != "e4m3" or acts not in ("dynamic", "static") or (block and acts == "static"):
        raise unreadable(METHOD, f"in a variant ({kind}, {acts} activations)")
    rows, columns = block or (-1, -1)
    layout = PlainFloats(
        8,
        columns,
        True,
        act_bits=8,
        act_format="fp8_e4m3",
        act_group_size=columns,
        act_scales="stored" if acts == "static" else "dynamic",
        group_rows=rows,
        scale_name="weight_scale_inv" if block else "weight_scale",
    )
    left_out = config.get("modules_to_not_convert") or config.get("ignored_layers") or ()
    # A name stands for a module and all in it.
    inside = f"(?:.*\\.)?(?:{any_of(left_out)})(?:\\..*)?"
    return Packing(METHOD, ((inside, None), (".*", layout)))
