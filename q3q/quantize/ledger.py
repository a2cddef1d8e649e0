"""Take down of each quantized block what the record needs: errors, notes and sizes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from q3q.errors import IntegrityError
from q3q.models.checkpoint import Checkpoint
from q3q.numerics.weights import StoredWeight
from q3q.quantize.block import QuantizedBlock
from q3q.quantize.blocks import BlockStore
from q3q.record import SiteError
from q3q.spec import Json

UNQUANTIZED_BITS = (
    16  # embeddings, norms and the router stay in 16 bits, as the released checkpoints store them
)


@dataclass
class Ledger:
    """What a record needs of the quantized blocks, taken down one by one: they are too large to be kept.

    weights, bits, nominal_bits: of all quantized linears.
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
    """Each block's codes by weight name, read from disk when they are asked for."""

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
    """Bits per weight of the quantized linears (with scales and zero points) and of the whole model, and its bytes.

    Nominal bits are those of the codes alone, as papers count them.
    ends: embedding and head if they are quantized too: a part of the model, but no linear that a method treats.
    """
    parameters, count, bits = checkpoint.facts.parameters, ledger.weights, ledger.bits
    ends_count = sum(weight.shape.numel() for weight in ends.values())
    whole = bits + sum(weight.storage_bits() for weight in ends.values())
    whole += (parameters - count - ends_count) * UNQUANTIZED_BITS
    return {
        "bits_per_weight": bits / count if count else float(UNQUANTIZED_BITS),
        "bits_per_weight_nominal": ledger.nominal_bits / count
        if count
        else float(UNQUANTIZED_BITS),
        "bits_per_weight_model": whole / parameters,
        "model_bytes": whole / 8,
        "share_quantized": (count + ends_count) / parameters,
    }
