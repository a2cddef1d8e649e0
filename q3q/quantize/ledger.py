"""The record's facts about quantized blocks: errors, notes and sizes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from q3q.errors import IntegrityError
from q3q.models.checkpoint import Checkpoint
from q3q.numerics.weights import StoredWeight
from q3q.quantize.block import QuantizedBlock
from q3q.quantize.block_store import BlockStore
from q3q.record import SiteError
from q3q.spec import Json

# Of embeddings, norms and the router, as the released checkpoints store them.
UNQUANTIZED_BITS = 16


@dataclass
class Ledger:
    """The facts about all quantized blocks, added one by one, as the blocks are too large to keep.

    weights, bits, nominal_bits: over all quantized linears
    """

    blocks: int = 0
    errors: list[SiteError] = field(default_factory=list)
    notes: Json = field(default_factory=dict)
    weights: int = 0
    bits: int = 0
    nominal_bits: int = 0

    def add(self, block: QuantizedBlock) -> None:
        self.blocks += 1
        self.errors += block.errors
        self.notes |= block.notes
        for weight in block.quantized.values():
            self.weights += weight.shape.numel()
            self.bits += weight.storage_bits()
            self.nominal_bits += weight.nominal_bits()


@dataclass(frozen=True)
class StoredCodes(Sequence[Mapping[str, StoredWeight]]):
    """Each block's codes by weight name, read from disk at each access."""

    store: BlockStore
    blocks: int

    def __len__(self) -> int:
        return self.blocks

    def __getitem__(self, k: Any) -> Any:
        block = self.store.load(range(self.blocks)[k])
        if block is None:
            raise IntegrityError(
                f"block {k} was quantized and stored, and is not there whole any more"
            )
        return block.quantized


def sizes(
    checkpoint: Checkpoint, ledger: Ledger, ends: Mapping[str, StoredWeight]
) -> dict[str, float]:
    """Return the record's size metrics.

    Bits per weight of the quantized linears count scales and zero points; nominal bits are those of
    the codes alone, as papers count them.

    Args:
        ends: a quantized embedding and head: part of the model, but no linears that a method
            treats.
    """
    parameters, count, bits = checkpoint.facts.parameters, ledger.weights, ledger.bits
    nominal_bits = ledger.nominal_bits
    ends_count = sum(weight.shape.numel() for weight in ends.values())
    model_bits = bits + sum(weight.storage_bits() for weight in ends.values())
    model_bits += (parameters - count - ends_count) * UNQUANTIZED_BITS
    return {
        "bits_per_weight": bits / count if count else float(UNQUANTIZED_BITS),
        "bits_per_weight_nominal": nominal_bits / count if count else float(UNQUANTIZED_BITS),
        "bits_per_weight_model": model_bits / parameters,
        "model_bytes": model_bits / 8,
        "share_quantized": (count + ends_count) / parameters,
    }
