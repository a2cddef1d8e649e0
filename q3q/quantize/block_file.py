"""What the files of a quantized block hold: its codes, packed to their bits, and its facts.

Codes are packed where they are, so that a GPU sends only their bits to main memory, and while it
sends them it goes on with the next block. Files of older versions hold a byte a code; they are read
too.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from q3q.numerics.packing import pack_bits, unpack_bits
from q3q.numerics.weights import stored_weight
from q3q.quantize.block import QuantizedBlock
from q3q.record import SiteError
from q3q.spec import Json

PLAIN_BITS = 8  # of codes that do not fit the bits that they were declared with


@dataclass(frozen=True)
class EncodedBlock:
    """A block's tensors in main memory, or on their way there, and its facts.

    arrived: reached when all tensors are there; None if they are
    """

    index: int
    tensors: Mapping[str, Tensor]
    facts: Json
    arrived: torch.cuda.Event | None

    def wait(self) -> None:
        """Wait until all tensors are in main memory."""
        if self.arrived is not None:
            self.arrived.synchronize()

    def decoded(self, device: torch.device | str = "cpu") -> QuantizedBlock:
        self.wait()
        return decode(self.index, self.tensors, self.facts, device)


def encode(block: QuantizedBlock) -> EncodedBlock:
    """Pack a block's codes on their device, and begin to send all to main memory.

    Tensors that are in main memory already are not copied: nobody may change them.
    """
    parts = {name: weight.to_tensors() for name, weight in block.quantized.items()}
    bits = _bits_that_hold(
        {name: (part["codes"], block.quantized[name].code_bits) for name, part in parts.items()}
    )
    tensors = {f"changed/{name}": tensor.contiguous() for name, tensor in block.changed.items()}
    quantized = {}
    for name, part in parts.items():
        codes = part.pop("codes")
        part["packed"] = pack_bits(codes.view(-1), bits[name])
        tensors |= {f"quantized/{name}/{key}": tensor for key, tensor in part.items()}
        packed = {"bits": bits[name], "shape": list(codes.shape)}
        quantized[name] = {**block.quantized[name].facts(), "packed": packed}
        del codes
    facts = {
        "quantized": quantized,
        "errors": [asdict(error) for error in block.errors],
        "notes": block.notes,
        **({"peaks": block.peaks} if block.peaks else {}),
    }
    device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
    in_memory = {name: _to_memory(tensor) for name, tensor in tensors.items()}
    arrived = None
    if device.type == "cuda":
        arrived = torch.cuda.Event()
        arrived.record(torch.cuda.current_stream(device))
    return EncodedBlock(block.index, in_memory, facts, arrived)


def decode(
    index: int, tensors: Mapping[str, Tensor], facts: Json, device: torch.device | str = "cpu"
) -> QuantizedBlock:
    """Return the block that `encode` received, on a device: codes are unpacked there."""
    parts: dict[str, dict[str, Tensor]] = {name: {} for name in facts["quantized"]}
    changed: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        kind, name, *part = key.split("/")
        if kind == "changed":
            changed[name] = tensor.to(device)
        else:
            parts[name][part[0]] = tensor.to(device)
    for name, fact in facts["quantized"].items():
        if (packed := fact.get("packed")) is not None:  # older versions wrote a byte a code
            shape = torch.Size(packed["shape"])
            words = parts[name].pop("packed")
            parts[name]["codes"] = unpack_bits(words, packed["bits"], shape.numel()).view(shape)
    return QuantizedBlock(
        index,
        {name: stored_weight(parts[name], fact) for name, fact in facts["quantized"].items()},
        changed,
        [SiteError(**error) for error in facts["errors"]],
        facts["notes"],
        facts.get("peaks", {}),
    )


def _bits_that_hold(codes: Mapping[str, tuple[Tensor, int]]) -> dict[str, int]:
    """Return the bits to pack each weight's codes to; the device is asked once for all.

    Args:
        codes: by name, with the bits that they were declared with. Wider ones are kept as they are:
            the trial's checks find them, and say so.
    """
    counted = {name: part for name, (part, _) in codes.items() if part.numel()}
    largest = torch.stack([part.amax() for part in counted.values()]).tolist() if counted else []
    largest_of = dict(zip(counted, largest, strict=True))
    return {
        name: bits if largest_of.get(name, 0) < 2**bits else PLAIN_BITS
        for name, (_, bits) in codes.items()
    }


def _to_memory(tensor: Tensor) -> Tensor:
    """Return a tensor in main memory; a GPU writes it there while this process goes on."""
    if tensor.device.type != "cuda":
        return tensor.cpu()
    pinned = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return pinned.copy_(tensor, non_blocking=True)
