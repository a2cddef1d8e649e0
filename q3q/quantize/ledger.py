"""The record's facts about quantized blocks: errors, notes and sizes."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from q3q.errors import IntegrityError
from q3q.models.checkpoint import Checkpoint
from q3q.models.disk_names import disk_shapes, without_expert
from q3q.models.facts import ModelFacts
from q3q.models.footprint import cache_scheme, cache_shape
from q3q.numerics.weights import StoredWeight
from q3q.placement import Trial
from q3q.quantize.block import QuantizedBlock
from q3q.quantize.block_store import BlockStore
from q3q.record import CACHE, SiteError
from q3q.spec import Json


@dataclass
class Ledger:
    """The facts about all quantized blocks, added one by one, as the blocks are too large to keep.

    weights, bits, nominal_bits: over all quantized linears
    peaks: `QuantizedBlock.peaks` by full name, `blocks.3.down`
    """

    blocks: int = 0
    errors: list[SiteError] = field(default_factory=list)
    notes: Json = field(default_factory=dict)
    weights: int = 0
    bits: int = 0
    nominal_bits: int = 0
    peaks: dict[str, float] = field(default_factory=dict)

    def add(self, block: QuantizedBlock) -> None:
        self.blocks += 1
        self.errors += block.errors
        self.notes |= block.notes
        self.peaks |= block.full_peaks
        for weight in block.quantized.values():
            self.weights += weight.shape.numel()
            self.bits += weight.storage_bits()
            self.nominal_bits += weight.nominal_bits()


@dataclass(frozen=True)
class StoredCodes(Sequence[Mapping[str, StoredWeight]]):
    """Each block's codes by weight name, read from disk at each access.

    device: where they are unpacked
    """

    store: BlockStore
    blocks: int
    device: torch.device | str = "cpu"

    def __len__(self) -> int:
        return self.blocks

    def __getitem__(self, k: Any) -> Any:
        block = self.store.load(range(self.blocks)[k], self.device)
        if block is None:
            raise IntegrityError(
                f"block {k}, which was quantized and stored, is now missing or incomplete"
            )
        return block.quantized


def sizes(
    checkpoint: Checkpoint, ledger: Ledger, ends: Mapping[str, StoredWeight]
) -> dict[str, float]:
    """Return the record's size metrics.

    Bits per weight of the quantized linears count scales and zero points; nominal bits are those of
    the codes alone, as papers count them. What is not quantized has the bits that it has in the
    checkpoint's files, also in one that is quantized already.

    Args:
        ends: a quantized embedding and head: part of the model, but no linears that a method
            treats.
    """
    facts = checkpoint.facts
    parameters, count = facts.parameters, ledger.weights
    model_bits = ledger.bits + bits_beside(checkpoint, count, ends)
    model_bits += sum(weight.storage_bits() for weight in ends.values())
    bits, nominal_bits = ledger.bits, ledger.nominal_bits
    if not count:
        count, bits = facts.linear_parameters, checkpoint.linear_bits_on_disk()
        nominal_bits = _nominal_bits(checkpoint)
    ends_count = sum(weight.shape.numel() for weight in ends.values())
    return {
        "bits_per_weight": bits / count,
        "bits_per_weight_nominal": nominal_bits / count,
        "bits_per_weight_model": model_bits / parameters,
        "model_bytes": model_bits / 8,
        "share_quantized": (ledger.weights + ends_count) / parameters,
    }


def bits_beside(checkpoint: Checkpoint, weights: int, ends: Collection[str]) -> float:
    """Return the bits in the checkpoint's files of all but these ends and so many linear weights.

    The weights of linears are taken to have the same bits each.
    """
    facts, on_disk = checkpoint.facts, checkpoint.bits_on_disk()
    of_linears = checkpoint.linear_bits_on_disk()
    of_ends = sum(on_disk.get(facts.family.end_name(end), 0) for end in ends)
    of_rest = sum(on_disk.values()) - of_linears - of_ends
    of_left_linears = (facts.linear_parameters - weights) * of_linears / facts.linear_parameters
    return of_left_linears + of_rest


def cache_sizes(trial: Trial, facts: ModelFacts) -> dict[str, float]:
    """Return the record's bytes of the cache, its scales included: of a token, and of a context.

    They are empty where neither a cache's scheme nor a context was asked for, and the checkpoint
    says no scheme.
    """
    kv, shape = cache_scheme(facts, trial.spec.kv), cache_shape(facts)
    context = trial.placement.context
    if kv is None and context is None:
        return {}
    metrics = {"cache_bytes_per_token": shape.token_bytes(kv)}
    return metrics if context is None else metrics | {"cache_bytes": shape.bytes_at(kv, context)}


def cache_note(trial: Trial, facts: ModelFacts) -> Json:
    """Return the record's note from which other contexts' bytes follow; see `record.CACHE`."""
    kv, shape = cache_scheme(facts, trial.spec.kv), cache_shape(facts)
    context = trial.placement.context
    if kv is None and context is None:
        return {}
    note: Json = {"numbers": shape.numbers, "head_dim": shape.head_dim}
    note |= {} if kv is None else {"kv": kv.to_json()}
    return {CACHE: note if context is None else note | {"context": context}}


def stored_note(checkpoint: Checkpoint, *, in_files: bool) -> Json:
    """Return how the weights are stored, for the record's notes.

    Its `dtype` is that of the given checkpoint's unquantized tensors; `quantized` says by what the
    given checkpoint was quantized already, if it was.

    Args:
        in_files: the evaluated weights lie in files, and the record's `model_bytes` are theirs.
    """
    quantized = checkpoint.facts.quantized
    settings = {} if quantized is None else {"quantized": quantized}
    return {"stored": {"dtype": checkpoint.stored_dtype, "in_files": in_files, **settings}}


def _nominal_bits(checkpoint: Checkpoint) -> int:
    """Return the bits of all linears' codes, or numbers, in the checkpoint's files."""
    facts, on_disk = checkpoint.facts, checkpoint.bits_on_disk()
    if facts.packing is None:
        return checkpoint.linear_bits_on_disk()
    total = 0
    for k in range(facts.layers):
        linears = facts.linears(k)
        for name, shape in disk_shapes(facts, k).items():
            full = facts.on_disk(k, name)
            if without_expert(name) in linears:
                layout = facts.packing.of(full.removesuffix(".weight"))
                total += on_disk[full] if layout is None else layout.bits * math.prod(shape)
    return total
