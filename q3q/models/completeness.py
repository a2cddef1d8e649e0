"""Check that a checkpoint's files hold the model that its config describes; without torch."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

from q3q.errors import CheckpointError
from q3q.models.disk_names import (
    FUSED,
    count_on_disk,
    disk_shapes,
    input_parts_of,
    is_fused,
    layout_of,
    parts_of,
    same_shape,
    without_expert,
)
from q3q.models.facts import ModelFacts, number_of_tensors
from q3q.models.model_files import FLOATS, ModelFiles
from q3q.models.packed import SCALES, Layout
from q3q.models.published.packing import KEY_SCALES, VALUE_SCALES
from q3q.models.tensor_files import Shape, StoredTensor

# Tensors that a config.json may ask for, beyond those that are stored, and still have listed one by
# one: enough to name what a damaged folder lacks, and few enough to take no time.
LISTED = 100_000


def check_complete(folder: Path, facts: ModelFacts, files: ModelFiles) -> dict[str, bool]:
    """Return the model's tensors by name, and if they are a linear's weight or part of one.

    A file may hold others too.

    Raises:
        CheckpointError: a tensor is missing, or has another shape or type.
    """
    family, tensors = facts.family, files.tensors
    least = sum(count_on_disk(facts, k, is_fused(facts, k, tensors)) for k in range(facts.layers))
    if least > len(tensors) + LISTED:
        raise CheckpointError(
            f"{folder}: config.json gives {facts.layers} layers"
            f"{f' of {facts.experts} experts' if facts.experts else ''}, at least {least} "
            f"tensors, and the files hold {len(tensors)}"
        )
    expected: dict[str, Shape] = {family.embedding: (facts.vocab, facts.hidden)}
    packed: dict[str, tuple[str, ...]] = {}
    linears: set[str] = set()
    of_blocks = [facts.linears(k) for k in range(facts.layers)]
    for k, name, shape, layout in _weights(facts, tensors):
        full = facts.on_disk(k, name)
        if layout is None:
            expected[full] = shape
            stacked = without_expert(name)
            linears |= {full} if stacked in of_blocks[k] or stacked in FUSED else set()
            continue
        parts, of_input = parts_of(layout, full, shape), input_parts_of(layout, full)
        for part, (types, part_shape) in (parts | of_input).items():
            if part not in tensors and part.endswith(layout.optional):
                continue
            expected[part], packed[part] = part_shape, types
        linears |= {part for part in parts if part in expected}
    for name in filter(None, cache_scales(facts, tensors).values()):
        expected[name], packed[name] = (1,), SCALES
    expected[family.final_norm] = (facts.hidden,)
    if not facts.tied:
        expected[family.head] = (facts.vocab, facts.hidden)

    if missing := [name for name in expected if name not in tensors]:
        untied = (
            " (tie_word_embeddings is false in config.json)" if missing[0] == family.head else ""
        )
        found = f"{files.whereabouts(missing[0])}{untied}{_hint(missing[0], facts, tensors)}"
        raise CheckpointError(
            f"{folder}: {number_of_tensors(missing)} missing, first {missing[0]}"
            f"{found or ', which config.json implies: are all files here, and of one model?'}"
        )
    for what, misfits in {
        "of a shape that config.json does not imply": [
            f"{name} in {stored.shard.name}: {list(stored.shape)} instead of {list(shape)}"
            for name, shape in expected.items()
            if not same_shape((stored := tensors[name]).shape, shape)
        ],
        "not stored as floats, or as the packed format says": [
            f"{name} in {stored.shard.name}: {stored.dtype}"
            for name in expected
            if (stored := tensors[name]).dtype not in packed.get(name, tuple(FLOATS))
        ],
    }.items():
        if misfits:
            raise CheckpointError(
                f"{folder}: {number_of_tensors(misfits)} {what}, first {misfits[0]}"
            )
    return {name: name in linears for name in expected}


def read_input_numbers(facts: ModelFacts, tensors: Mapping[str, StoredTensor]) -> dict[str, float]:
    """Read the scale or factor of each linear's rounded input, by the linear's name on disk.

    And those of keys and values in a cache, by `k` and `v` of a block: `model.layers.0.k`.

    Raises:
        CheckpointError: one is not a positive number.
    """
    if (packing := facts.packing) is None:
        return {}
    numbers = dict[str, float]()

    def read(part: str) -> float:
        stored = tensors[part].number()
        if not 0 < stored < math.inf:
            raise CheckpointError(
                f"{part} in {tensors[part].shard} is {stored:g}, by which nothing can be rounded"
            )
        return stored

    for (k, end), part in cache_scales(facts, tensors).items():
        if part is not None:
            numbers[facts.on_disk(k, end)] = read(part)
    if not packing.rounds_inputs:
        return numbers
    for k, name, _, layout in _weights(facts, tensors):
        full = facts.on_disk(k, name)
        for part in {} if layout is None else input_parts_of(layout, full):
            assert layout is not None
            numbers[full.removesuffix(".weight")] = layout.input_number(read(part))
    return numbers


def cache_scales(facts: ModelFacts, tensors: Collection[str]) -> dict[tuple[int, str], str | None]:
    """Return the names of the scales of a cache, by block and `k` or `v`; None where one lacks.

    Nothing where the config does not say that keys and values are stored by scales of their own.
    """
    if facts.packing is None or facts.packing.kv is None:
        return {}
    names_of_scales = dict[tuple[int, str], str | None]()
    for k in (k for k in range(facts.layers) if facts.family.state_width(facts, k)):
        for end, places in (("k", KEY_SCALES), ("v", VALUE_SCALES)):
            names = (facts.on_disk(k, place) for place in places)
            names_of_scales[k, end] = next((name for name in names if name in tensors), None)
    return names_of_scales


def without_cache_scales(facts: ModelFacts, tensors: Collection[str]) -> list[str]:
    """Return a remark on keys and values whose scales are not there."""
    scales = cache_scales(facts, tensors)
    lacking = [
        facts.on_disk(k, f"self_attn.{end}_scale") for (k, end), name in scales.items() if not name
    ]
    if not lacking:
        return []
    return [
        "config.json says that keys and values are stored by fixed scales, and the files lack "
        f"{len(lacking)} of {len(scales)}, first {lacking[0]}: these are 1, as servers take them"
    ]


def _weights(
    facts: ModelFacts, tensors: Collection[str]
) -> Iterator[tuple[int, str, Shape, Layout | None]]:
    """Yield each block's tensors: the block, the name there, the shape and the packed layout."""
    for k in range(facts.layers):
        for name, shape in disk_shapes(facts, k, is_fused(facts, k, tensors)).items():
            yield k, name, shape, layout_of(facts, k, name)


def _hint(missing: str, facts: ModelFacts, tensors: Collection[str]) -> str:
    """Say what the files hold in the place of a linear's missing part."""
    if facts.packing is None:
        return ""
    ending = ".weight" if ".weight" in missing else f".{missing.rpartition('.')[2]}"
    module = missing[: missing.rindex(ending) + 1]
    others = sorted(name.removeprefix(module) for name in tensors if name.startswith(module))
    stored = ", ".join(others[:4])
    return f" ({facts.packing.method} has it; the files hold {stored} there)" if stored else ""
