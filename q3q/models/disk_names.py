"""Names and shapes of a block's tensors in files: a matrix per expert, or fused ones."""

from collections.abc import Collection, Iterable, Iterator

from q3q.models.family import ModelFacts
from q3q.models.packed import Layout, Part, input_parts
from q3q.models.tensor_files import Shape

# Experts' weights as transformers 5 has them in memory: gate over up, and down.
FUSED = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


def disk_shapes(facts: ModelFacts, layer: int, fused: bool = False) -> dict[str, Shape]:
    """Return a block's shapes as files have them: a matrix per expert, or fused gate and up."""
    shapes = facts.block_shapes(layer)
    if not facts.sparse(layer):
        return shapes
    stacked = {name: shapes.pop(name) for name in list(shapes) if is_stacked(name)}
    if fused:
        experts, hidden, inner = stacked["mlp.experts.down_proj.weight"]
        gate_up, down = FUSED
        shapes |= {gate_up: (experts, 2 * inner, hidden), down: (experts, hidden, inner)}
        return shapes
    for name, (experts, *matrix) in stacked.items():
        shapes |= {of_expert(name, e): tuple(matrix) for e in range(experts)}
    return shapes


def is_fused(facts: ModelFacts, layer: int, tensors: Collection[str]) -> bool:
    """Return True if files hold a block's experts as fused tensors, gate over up."""
    return facts.on_disk(layer, "mlp.experts.gate_up_proj") in tensors


def is_stacked(name: str) -> bool:
    """Return True if one of a block's tensors holds a matrix for each expert."""
    return name.startswith("mlp.experts.")


def of_expert(name: str, expert: int) -> str:
    """Return one expert's name in files: `mlp.experts.3.up_proj.weight`."""
    return name.replace("mlp.experts.", f"mlp.experts.{expert}.")


def names_on_disk(facts: ModelFacts, layer: int, names: Iterable[str]) -> Iterator[str]:
    """Yield the names in files of a block's tensors; of a stacked one, each expert's."""
    for name in names:
        parts = [of_expert(name, e) for e in range(facts.experts)] if is_stacked(name) else [name]
        yield from (facts.on_disk(layer, part) for part in parts)


def without_expert(name: str) -> str:
    """Return `mlp.experts.3.up_proj.weight` as a block has it, `mlp.experts.up_proj.weight`."""
    return ".".join(part for part in name.split(".") if not part.isdigit())


def count_on_disk(facts: ModelFacts, layer: int, fused: bool) -> int:
    """Return the number of a block's tensors in files, without listing experts."""
    count = len(facts.block_shapes(layer))
    if facts.sparse(layer):
        count += len(FUSED) - 3 if fused else 3 * (facts.experts - 1)
    return count


def layout_of(facts: ModelFacts, layer: int, name: str) -> Layout | None:
    """Return the packed layout of one of a block's tensors in files; None for plain numbers."""
    if facts.packing is None or without_expert(name) not in facts.linears(layer):
        return None
    return facts.packing.of(facts.on_disk(layer, name).removesuffix(".weight"))


def parts_of(layout: Layout, name: str, shape: Shape) -> dict[str, Part]:
    """Return names, types and shapes of the tensors that a packed weight is stored as."""
    base = name.removesuffix("weight")
    return {base + part: facts for part, facts in layout.parts(*shape).items()}


def input_parts_of(layout: Layout, name: str) -> dict[str, Part]:
    """Return the same of the numbers by which the weight's input is rounded."""
    base = name.removesuffix("weight")
    return {base + part: facts for part, facts in input_parts(layout).items()}


def same_shape(stored: Shape, expected: Shape) -> bool:
    """Return True if a stored tensor has the shape: -1 is any length, and () is as good as (1,)."""
    if len(stored) != len(expected):
        return {stored, expected} == {(), (1,)}
    return all(n in (-1, own) for own, n in zip(stored, expected, strict=True))


def sources_of(name: str, experts: int, fused: bool) -> list[str]:
    """Return the names on disk that one tensor of a block is assembled from."""
    if not is_stacked(name):
        return [name]
    if fused:
        return [FUSED["down_proj" in name]]
    return [of_expert(name, e) for e in range(experts)]
