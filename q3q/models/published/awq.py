"""AWQ's configs, as AutoAWQ writes them."""

from collections.abc import Mapping
from typing import Any

from q3q.models.packed import AwqWords
from q3q.models.published.packing import Packing, parts_of_names, unreadable

METHOD = "awq"


def read_awq(config: Mapping[str, Any]) -> Packing:
    """Read a config.

    Raises:
        CheckpointError: it is a variant that q3q cannot read.
    """
    version = str(config.get("version") or config.get("format") or "gemm").lower()
    bits = config.get("bits") or config["w_bit"]
    if version != "gemm" or bits != 4 or not config.get("zero_point", True):
        raise unreadable(METHOD, f"in a variant ({version}, {bits} bits)")
    layout = AwqWords(bits, config.get("group_size") or config["q_group_size"], False)
    parts = config.get("modules_to_not_convert") or ()  # substrings of names
    return Packing(METHOD, ((parts_of_names(parts), None), (".*", layout)))
