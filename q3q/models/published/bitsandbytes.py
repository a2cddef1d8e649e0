"""bitsandbytes' configs: 4 bits (nf4, fp4), or LLM.int8."""

from collections.abc import Mapping
from typing import Any

from q3q.models.packed import Layout
from q3q.models.packed_tables import Int8Rows, TableCodes
from q3q.models.published.packing import Packing, unreadable

METHOD = "bitsandbytes"
BLOCK = 64  # numbers of a block, which transformers does not let one choose
THRESHOLD = 6.0  # of LLM.int8: larger inputs stay in 16 bits
WHOLE_COLUMNS = (
    "bitsandbytes keeps every column of its input in 16 bits in which some token of the batch has "
    f"a magnitude of {THRESHOLD:g} or more; here only such numbers themselves are kept, so that no "
    "token's numbers depend on others in the batch"
)


def read_bitsandbytes(config: Mapping[str, Any]) -> Packing:
    """Read a config. The files say which linears are left out.

    Raises:
        CheckpointError: it is a variant that q3q cannot read.
    """
    layout: Layout
    if config.get("load_in_8bit") or config.get("_load_in_8bit"):
        if (threshold := config.get("llm_int8_threshold", THRESHOLD)) != THRESHOLD:
            raise unreadable(METHOD, f"with llm_int8_threshold={threshold}, not {THRESHOLD:g},")
        layout = Int8Rows(8, -1, True, act_bits=8, act_scales="outliers")
        return Packing(METHOD, ((".*", layout),), (WHOLE_COLUMNS,), by_files=True)
    table = config.get("bnb_4bit_quant_type", "fp4")
    storage = config.get("bnb_4bit_quant_storage") or "uint8"
    if table not in ("nf4", "fp4") or storage != "uint8":
        raise unreadable(METHOD, f"in a variant ({table}, stored as {storage})")
    double = bool(config.get("bnb_4bit_use_double_quant"))
    layout = TableCodes(4, BLOCK, True, table=table, double=double)
    return Packing(METHOD, ((".*", layout),), by_files=True)
