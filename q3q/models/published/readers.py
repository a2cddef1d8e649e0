"""The reader of each method's `quantization_config`."""

from collections.abc import Callable, Mapping
from typing import Any

from q3q.errors import CheckpointError
from q3q.models.published.auto_round import read_auto_round
from q3q.models.published.awq import read_awq
from q3q.models.published.bitsandbytes import read_bitsandbytes
from q3q.models.published.compressed_tensors import read_compressed_tensors
from q3q.models.published.fp8 import read_fp8
from q3q.models.published.gptq import read_gptq
from q3q.models.published.modelopt import read_modelopt
from q3q.models.published.packing import Packing

READERS: dict[str, Callable[[Mapping[str, Any]], Packing]] = {
    "compressed-tensors": read_compressed_tensors,
    "gptq": read_gptq,
    "awq": read_awq,
    "auto-round": read_auto_round,
    "bitsandbytes": read_bitsandbytes,
    "fp8": read_fp8,
    "modelopt": read_modelopt,
    "modelopt_fp4": read_modelopt,
}


def read_packing(config: Mapping[str, Any]) -> Packing:
    """Read a `quantization_config`.

    Raises:
        CheckpointError: its method, or its variant of the method, is not supported.
    """
    method = config.get("quant_method", "unknown method")
    if method == "unknown method" and ("load_in_4bit" in config or "load_in_8bit" in config):
        method = "bitsandbytes"  # older files do not say it
    if method not in READERS:
        raise CheckpointError(
            f"quantized already ({method}), which q3q cannot read (it reads "
            f"{', '.join(READERS)}): give the original model"
        )
    try:
        return READERS[method](config)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        fault = f"lacks {error}" if isinstance(error, KeyError) else f"is invalid: {error!r}"
        raise CheckpointError(f"quantized already ({method}), and its config {fault}") from error
