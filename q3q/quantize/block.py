"""A quantized block, and the interface through which the walk stores and reloads it."""

from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from q3q.errors import IntegrityError
from q3q.numerics.weights import StoredWeight, numbers
from q3q.record import SiteError


@dataclass
class QuantizedBlock:
    """The result of quantizing one block.

    quantized: codes by weight name
    changed: weights that changed and are not quantized (norms that took over a scale)
    errors, notes: for the record
    peaks: the largest number that calibration tokens show a site, by its name, where servers round
        its inputs below a factor taken from it
    """

    index: int
    quantized: dict[str, StoredWeight]
    changed: dict[str, Tensor]
    errors: list[SiteError]
    notes: dict[str, Any] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)

    @property
    def full_peaks(self) -> dict[str, float]:
        """The peaks by full name, `blocks.3.down`."""
        return {f"blocks.{self.index}.{site}": peak for site, peak in self.peaks.items()}

    def numbers(self, dtype: torch.dtype, device: torch.device | str) -> dict[str, Tensor]:
        """Return all new weights, dequantized, in a block's shapes: experts stacked, else 2-D."""
        weights = {name: weight.to(device, dtype) for name, weight in self.changed.items()}
        for name, quantized in self.quantized.items():
            weight_EOI = numbers(quantized, dtype, device)
            weights[name] = weight_EOI if ".experts." in name else weight_EOI[0]
        return weights

    def on_cpu(self) -> "QuantizedBlock":
        """Return it in main memory, so that a whole model's codes do not fill a GPU."""
        quantized = {name: weight.to("cpu") for name, weight in self.quantized.items()}
        changed = {name: weight.cpu() for name, weight in self.changed.items()}
        return replace(self, quantized=quantized, changed=changed)


class BlockSink(Protocol):
    """A store of quantized blocks.

    A killed trial resumes from it, and a streamed model reads its quantized blocks from it.
    """

    def load(self, index: int) -> QuantizedBlock | None: ...

    def store(self, block: QuantizedBlock) -> None:
        """Take a block, which may be written later; `load` returns it from now on."""


def stored_numbers(sink: BlockSink | None, index: int, like: Tensor) -> dict[str, Tensor]:
    """Return a stored block's new weights in the dtype and on the device of `like`.

    Raises:
        IntegrityError: the sink does not have the block any more.
    """
    block = None if sink is None else sink.load(index)
    if block is None:
        raise IntegrityError(
            f"block {index}, which was quantized and stored, is now missing or incomplete"
        )
    return block.numbers(like.dtype, like.device)
