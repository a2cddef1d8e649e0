"""bitsandbytes' layouts of a linear: 4-bit codes of a table of numbers, and LLM.int8's rows.

Shapes: O out features, I in features, N = O * I weights, B blocks of N.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from q3q.errors import CheckpointError
from q3q.models.packed import Layout, Part

if TYPE_CHECKING:
    from torch import Tensor

NESTED_BLOCK = 256  # blocks whose scales share a scale, with double quantization
STATE = "weight.quant_state.bitsandbytes__"


@dataclass(frozen=True)
class TableCodes(Layout):
    """bitsandbytes' `nf4` and `fp4`: blocks of neighbours in a flat weight share a scale.

    group_size: numbers of a block
    table: nf4 or fp4; the 16 numbers themselves are stored beside the codes
    double: the blocks' scales are codes of 8 bits themselves
    """

    table: str = "nf4"
    double: bool = False

    marker: ClassVar[str] = "weight.quant_map"
    unsigned: ClassVar[bool] = True

    @property
    def scale_parts(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("weight.nested_absmax" if self.double else "weight.absmax",)

    @property
    def state(self) -> str:
        return STATE + self.table

    def parts(self, rows: int, columns: int) -> dict[str, Part]:
        blocks = -(-rows * columns // self.group_size)
        parts: dict[str, Part] = {
            "weight": (("U8",), (-(-rows * columns // 2), 1)),
            "weight.absmax": (("U8",) if self.double else ("F32",), (blocks,)),
            "weight.quant_map": (("F32",), (16,)),
            self.state: (("U8",), (-1,)),
        }
        if self.double:
            parts["weight.nested_absmax"] = (("F32",), (-(-blocks // NESTED_BLOCK),))
            parts["weight.nested_quant_map"] = (("F32",), (256,))
        return parts

    def unpack(self, parts: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        import torch

        state = self._state(parts[self.state], rows, columns)
        packed = parts["weight"].flatten()
        codes_N = torch.stack((packed >> 4, packed & 15), dim=-1).flatten()[: rows * columns]
        scale_B = parts["weight.absmax"]
        if self.double:
            nested = parts["weight.nested_absmax"].repeat_interleave(NESTED_BLOCK)[: len(scale_B)]
            scale_B = parts["weight.nested_quant_map"][scale_B.int()] * nested
            scale_B = scale_B + float(state["nested_offset"])
        scale_N = scale_B.repeat_interleave(self.group_size)[: len(codes_N)]
        return (parts["weight.quant_map"][codes_N.int()] * scale_N).view(rows, columns)

    def _state(self, stored: Tensor, rows: int, columns: int) -> Mapping[str, Any]:
        """Return the facts that are stored as JSON in a tensor.

        Raises:
            CheckpointError: they are none, or contradict the config.
        """
        try:
            state: dict[str, Any] = json.loads(bytes(stored.tolist()))
            facts = (state["quant_type"], state["blocksize"], math.prod(state["shape"]))
            nested = state.get("nested_blocksize", NESTED_BLOCK)
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{self.state} does not describe codes: {error!r}") from error
        expected = (self.table, self.group_size, rows * columns)
        if facts != expected or nested != NESTED_BLOCK:
            raise CheckpointError(
                f"{self.state} says {facts} and nested blocks of {nested}, and the config "
                f"{expected} and {NESTED_BLOCK}"
            )
        return state


@dataclass(frozen=True)
class Int8Rows(Layout):
    """bitsandbytes' LLM.int8: signed bytes, and the largest magnitude of each row."""

    marker: ClassVar[str] = "SCB"
    unsigned: ClassVar[bool] = True
    scale_parts: ClassVar[tuple[str, ...]] = ("SCB",)

    def parts(self, rows: int, columns: int) -> dict[str, Part]:
        return {"weight": (("I8",), (rows, columns)), "SCB": (("F32",), (rows,))}

    def unpack(self, parts: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        return parts["weight"].float() * (parts["SCB"] / 127)[:, None]
