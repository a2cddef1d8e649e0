"""GPTQ's configs, as AutoGPTQ, GPTQModel and auto-round write them."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

from q3q.models.packed import GptqWords, Layout
from q3q.models.published.packing import NOTHING, Packing, parts_of_names, unreadable

METHOD = "gptq"
BITS = range(2, 9)


def read_gptq(config: Mapping[str, Any]) -> Packing:
    """Read a config. `dynamic` gives modules other settings (`+:PATTERN`), or none (`-:PATTERN`).

    Raises:
        CheckpointError: it is a variant that q3q cannot read.
    """
    version = config.get("checkpoint_format") or "gptq"
    if version not in ("gptq", "gptq_v2") or config["bits"] not in BITS:
        raise unreadable(METHOD, f"in a variant ({version}, {config['bits']} bits)")
    below = 1 if version == "gptq" else 0
    layout = GptqWords(config["bits"], config["group_size"], bool(config["sym"]), below=below)
    exceptions = (config.get("dynamic") or {}).items()
    rules = [_exception(pattern, changes, layout) for pattern, changes in exceptions]
    if inside := config.get("modules_in_block_to_quantize"):
        names = [
            name for group in inside for name in ([group] if isinstance(group, str) else group)
        ]
        return Packing(METHOD, (*rules, (parts_of_names(names), layout), (".*", None)))
    return Packing(METHOD, (*rules, (".*", layout)))


def _exception(
    pattern: str, changes: Mapping[str, Any] | Literal[False], layout: GptqWords
) -> tuple[str, Layout | None]:
    """Return the rule that an entry of `dynamic` stands for.

    GPTQModel matches its patterns at the start of a module's name.
    """
    sign, _, rest = pattern.partition(":") if pattern[:2] in ("+:", "-:") else ("+", "", pattern)
    matched = f"(?:{rest or NOTHING}).*"
    if sign == "-" or changes is False:
        return matched, None
    size, symmetric = (
        changes.get("group_size", layout.group_size),
        changes.get("sym", layout.symmetric),
    )
    bits = changes.get("bits", layout.bits)
    return matched, replace(layout, bits=bits, group_size=size, symmetric=bool(symmetric))
