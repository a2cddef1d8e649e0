"""Which GGUF type holds a linear's codes, and what a GGUF file cannot hold. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from q3q.models.facts import ModelFacts
from q3q.models.gguf_header import ARCHITECTURES
from q3q.models.packed import Layout, Shape
from q3q.number_formats import BLOCKS, INT
from q3q.spec import Scheme

if TYPE_CHECKING:
    from torch import Tensor

# Whole numbers that a type holds as they are: (bits, symmetric) of groups of 32 columns. Zero
# points become offsets of float16.
WHOLE_NUMBERS = {(4, True): "q4_0", (4, False): "q4_1", (8, True): "q8_0"}
WHOLE_GROUP = 32
TAKES = (
    f"format={','.join(BLOCKS)}, or whole numbers with group_size={WHOLE_GROUP}: bits=4, or bits=8 "
    "symmetric=true"
)
MODEL_TYPES = {model_type: arch for arch, model_type in ARCHITECTURES.items()}


@dataclass(frozen=True)
class GgufBlocks(Layout):
    """Rows of a type's blocks, as bytes.

    type: a name of `number_formats.BLOCKS`
    """

    type: str = "q8_0"

    marker: ClassVar[str] = "weight"

    def parts(self, rows: int, columns: int) -> dict[str, tuple[tuple[str, ...], Shape]]:
        form = BLOCKS[self.type]
        return {"weight": (("U8",), (rows, columns // form.block * form.block_bits // 8))}

    def pack(
        self, codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor, group_I: Tensor | None
    ) -> dict[str, Tensor]:
        from q3q.export.gguf_packing import in_blocks, pack_rows
        from q3q.numerics.weights import QuantizedWeight

        weight = QuantizedWeight(codes_OI[None], scale_OG[None], zero_OG[None], self.bits, True)
        return {"weight": pack_rows(in_blocks(weight))}

    def unpack(self, parts: Mapping[str, Tensor], rows: int, columns: int) -> Tensor:
        import torch
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        kind = GGMLQuantizationType[self.type.upper()]
        return torch.from_numpy(dequantize(parts["weight"].numpy(), kind))


def type_of(scheme: Scheme) -> str | None:
    """Return the type that holds a scheme's codes; None if none does."""
    if scheme.format in BLOCKS:
        return scheme.format
    if scheme.format != INT or scheme.group_size != WHOLE_GROUP:
        return None
    return WHOLE_NUMBERS.get((scheme.bits, scheme.symmetric))


def layout_of(scheme: Scheme) -> GgufBlocks:
    kind = type_of(scheme)
    assert kind is not None, scheme
    return GgufBlocks(scheme.bits, scheme.group_size, scheme.symmetric, type=kind)


def architecture_of(facts: ModelFacts) -> str | None:
    """Return llama.cpp's word for a model's architecture; None if the writer has none."""
    architectures = (MODEL_TYPES.get(model_type) for model_type in facts.family.model_types)
    return next((arch for arch in architectures if arch is not None), None)


def model_problems(facts: ModelFacts) -> Iterator[str]:
    """Yield why llama.cpp would not run a model as q3q does, a few words each."""
    arch = architecture_of(facts)
    if arch is None:
        yield f"the {facts.family.name} family (it takes {', '.join(MODEL_TYPES)})"
        return
    if facts.experts:
        if not facts.norm_topk_prob:
            yield "experts whose shares do not sum to 1 (norm_topk_prob=false)"
        if not all(map(facts.sparse, range(facts.layers))):
            yield "blocks without experts in a model that has experts"
    scaling = facts.rope_scaling
    if scaling is not None and scaling.kind == "yarn":
        plain = (scaling.low, scaling.high, scaling.truncate) == (1.0, 32.0, True)
        if not plain:
            yield "YaRN's frequencies with bounds of their own"
