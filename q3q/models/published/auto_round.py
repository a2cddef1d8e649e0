"""auto-round's configs: GPTQ's or AWQ's files, with other settings for some layers."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from q3q.models.packed import AwqWords, GptqWords, Layout
from q3q.models.published.packing import Packing, any_of, unreadable

METHOD = "auto-round"
NO_CODES = 16  # bits of a layer that is left out


def read_auto_round(config: Mapping[str, Any]) -> Packing:
    """Read a config.

    Raises:
        CheckpointError: it is a variant that q3q cannot read.
    """
    packing = str(config.get("packing_format") or "auto_round:auto_gptq")
    kind = config.get("data_type", "int")
    bits, size, symmetric = config["bits"], config["group_size"], bool(config["sym"])
    if kind != "int" or (config.get("act_bits") or NO_CODES) < NO_CODES:
        raise unreadable(METHOD, f"in a variant ({kind}, {config.get('act_bits')} bits of inputs)")
    layout: Layout
    if packing.endswith("gptq") or packing == "auto_round":
        # Zero points are stored less one, as GPTQ's first version has them.
        layout = GptqWords(bits, size, symmetric, below=1)
    elif packing.endswith("awq") and bits == 4:
        layout = AwqWords(bits, size, symmetric)
    else:
        raise unreadable(METHOD, f"in a variant ({packing}, {bits} bits)")
    exceptions = (config.get("extra_config") or {}).items()
    rules = [_exception(name, changes, layout) for name, changes in exceptions]
    inside = config.get("block_name_to_quantize")
    within = [inside] if isinstance(inside, str) else list(inside or ())
    begins = [name for part in within for name in str(part).split(",")]
    outside = f"(?!(?:{any_of(begins)})\\.).*" if begins else "(?!)"
    return Packing(METHOD, (*rules, (outside, None), (".*", layout)))


def _exception(name: str, changes: Mapping[str, Any], layout: Layout) -> tuple[str, Layout | None]:
    bits = changes.get("bits", layout.bits)
    if bits >= NO_CODES:
        return any_of([name]), None
    size = changes.get("group_size", layout.group_size)
    symmetric = bool(changes.get("sym", layout.symmetric))
    return any_of([name]), replace(layout, bits=bits, group_size=size, symmetric=symmetric)
