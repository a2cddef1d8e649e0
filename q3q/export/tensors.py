"""The tensors of an export by its format's definition, and their bytes. Imports no torch."""

import math
from collections.abc import Iterator

from q3q.export.formats import FORMATS
from q3q.export.serving import holds_cache
from q3q.models.disk_names import disk_shapes, without_expert
from q3q.models.facts import DTYPE_BYTES, ModelFacts
from q3q.models.packed import Layout
from q3q.models.tensor_files import ITEM_BYTES
from q3q.spec import TrialSpec

SCALE_BYTES = 2  # float16
FACTOR_BYTES = 4  # of an input's scales, a float32 for each linear
KEYS = "self_attn.k_proj.weight"  # a block with these has a cache that grows with the text


def layouts(
    spec: TrialSpec, facts: ModelFacts
) -> Iterator[tuple[str, tuple[int, ...], Layout | None]]:
    """Yield each weight of the exported model: name on disk, unpacked shape and layout.

    The layout is None for plain numbers.
    """
    schemes = spec.schemes
    assert spec.export is not None
    assert schemes is not None
    make = FORMATS[spec.export].layout
    family = facts.family
    yield family.embedding, (facts.vocab, facts.hidden), None
    for k in range(facts.layers):
        linears = facts.linears(k)
        for name, shape in disk_shapes(facts, k).items():
            layout = None
            if make is not None and without_expert(name) in linears:
                scheme = schemes.of(f"blocks.{k}.{without_expert(name).removesuffix('.weight')}")
                layout = None if scheme is None else make(scheme)
            yield facts.on_disk(k, name), shape, layout
        yield from ((name, (1,), None) for name in cache_scales(spec, facts, k))
    yield family.final_norm, (facts.hidden,), None
    if not facts.tied:
        yield family.head, (facts.vocab, facts.hidden), None


def cache_scales(spec: TrialSpec, facts: ModelFacts, k: int) -> list[str]:
    """Return the names of the scales of block k's keys and values, if the format stores them."""
    if spec.export != "compressed_tensors" or spec.kv is None or not holds_cache(spec.kv):
        return []
    if KEYS not in facts.block_shapes(k):
        return []
    return [facts.on_disk(k, f"self_attn.{part}_scale") for part in "kv"]


def plain_linears(spec: TrialSpec, facts: ModelFacts) -> Iterator[str]:
    """Yield the names on disk of the blocks' linears that stay plain numbers, without `.weight`.

    Routers, and what else a family never quantizes, are among them.
    """
    for k in range(facts.layers):
        never = {name for site in facts.sites(k) for name in site.unquantized}
        yield from (facts.on_disk(k, name.removesuffix(".weight")) for name in sorted(never))
    linears = {
        facts.on_disk(k, name)
        for k in range(facts.layers)
        for name in disk_shapes(facts, k)
        if without_expert(name) in facts.linears(k)
    }
    for name, _, layout in layouts(spec, facts):
        if layout is None and name in linears:
            yield name.removesuffix(".weight")


def tensor_bytes(shape: tuple[int, ...], layout: Layout | None, dtype: str) -> int:
    """Return one weight's bytes on disk, the sum over the tensors of its layout."""
    own = DTYPE_BYTES[dtype]
    if layout is None:
        return math.prod(shape) * own
    scale = own if layout.own_scales else SCALE_BYTES
    of_input = FACTOR_BYTES * len(layout.input_parts)
    return of_input + sum(
        math.prod(part) * (scale if "F16" in types else ITEM_BYTES[types[0]])
        for types, part in layout.parts(*shape).values()
    )


def expected_bytes(spec: TrialSpec, facts: ModelFacts) -> int:
    """Return the bytes of all tensors of the export by the format's definition."""
    dtype = spec.model.dtype
    return sum(tensor_bytes(shape, layout, dtype) for _, shape, layout in layouts(spec, facts))
