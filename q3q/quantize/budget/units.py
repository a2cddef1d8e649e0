"""The units that a bit budget is allotted over, and what they take: arithmetic, without torch."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from q3q.bit_budget import BLOCK, LINEAR, BitBudget
from q3q.errors import ConfigError
from q3q.formatting import bytes_in_words
from q3q.models.facts import ModelFacts
from q3q.number_formats import SCALE_BITS
from q3q.quantize.methods.registry import settings_or_default
from q3q.spec import Json, Scheme, TrialSpec

INDEX_BITS = 32  # of a column's group, where groups lie apart


@dataclass(frozen=True)
class Unit:
    """What gets one width.

    name: of the linear, site or block: `blocks.0.qkv`
    sites: of the block, by name, that its linears lie in
    weights: of the block, by name
    """

    name: str
    block: int
    sites: tuple[str, ...]
    weights: tuple[str, ...]

    @property
    def linears(self) -> tuple[str, ...]:
        return tuple(full_name(self.block, weight) for weight in self.weights)


def full_name(block: int, weight: str) -> str:
    return f"blocks.{block}.{weight.removesuffix('.weight')}"


def units_of(spec: TrialSpec, facts: ModelFacts) -> list[Unit]:
    """Return a trial's units, without linears that stay unquantized, in the order of the model."""
    assert spec.budget is not None
    units: dict[str, Unit] = {}
    for k in range(facts.layers):
        for site in facts.sites(k):
            for weight in site.weights:
                linear = full_name(k, weight)
                if linear in spec.skip:
                    continue
                name = {LINEAR: linear, BLOCK: f"blocks.{k}"}.get(
                    spec.budget.unit, f"blocks.{k}.{site.name}"
                )
                unit = units.get(name, Unit(name, k, (), ()))
                sites = dict.fromkeys((*unit.sites, site.name))
                units[name] = replace(unit, sites=tuple(sites), weights=(*unit.weights, weight))
    return list(units.values())


def sizes_of(
    spec: TrialSpec, facts: ModelFacts, units: Sequence[Unit], widths: Sequence[int]
) -> list[list[int]]:
    """Return the bits that each unit takes at each width, as its codes will count them."""
    schemes, shapes = spec.schemes, [facts.block_shapes(k) for k in range(facts.layers)]
    assert schemes is not None
    rows = []
    for unit in units:
        row = []
        for bits in widths:
            total = 0
            for weight, linear in zip(unit.weights, unit.linears, strict=True):
                scheme = schemes.of(linear)
                assert scheme is not None
                shape = shapes[unit.block][weight]
                total += linear_bits(shape, replace(scheme, bits=bits), spec)
            row.append(total)
        rows.append(row)
    return rows


def linear_bits(shape: Sequence[int], scheme: Scheme, spec: TrialSpec) -> int:
    """Return the bits of a linear's codes, scales, zero points and, if groups lie apart, indices.

    As `QuantizedWeight.storage_bits` counts what the trial's method makes.
    """
    knobs, whole_zeros = spec.method.knobs, settings_or_default(spec.method).whole_zeros
    experts, _, columns = (1, *shape)[-3:]
    apart = knobs.get("act_order", False) and not knobs.get("static_groups", False)
    index = experts * columns * INDEX_BITS if apart and scheme.group_size != -1 else 0
    return _bits(shape, scheme, whole_zeros=whole_zeros) + index


def _bits(shape: Sequence[int], scheme: Scheme, *, whole_zeros: bool = True) -> int:
    """Return the bits of codes, scales and zero points."""
    weights, columns = math.prod(shape), shape[-1]
    groups = 1 if scheme.group_size == -1 else columns // scheme.group_size
    numbers = weights // columns * groups
    bits = weights * scheme.bits + numbers * SCALE_BITS["float"]
    if not scheme.symmetric:
        bits += numbers * (scheme.bits if whole_zeros else SCALE_BITS["float"])
    return bits


def ends_bits(spec: TrialSpec, facts: ModelFacts) -> int:
    """Return the bits of a quantized embedding and head, of one tensor where they are tied."""
    schemes, shape = spec.schemes, (facts.vocab, facts.hidden)
    assert schemes is not None
    ends = (schemes.embedding, None if facts.tied else schemes.head)
    return sum(_bits(shape, end) for end in ends if end is not None)


def weights_in(facts: ModelFacts, units: Sequence[Unit]) -> int:
    """Count the weights of all units."""
    return sum(
        math.prod(facts.block_shapes(unit.block)[weight])
        for unit in units
        for weight in unit.weights
    )


def unquantized_bits(spec: TrialSpec, facts: ModelFacts, units: Sequence[Unit]) -> int:
    """Estimate from config.json the bits of all that the units do not have.

    A trial counts them in the model's files instead; where these hold the type that config.json
    says, both are equal.
    """
    item, ends = 8 * facts.weight_bytes(facts.dtype) // facts.parameters, facts.vocab * facts.hidden
    left = facts.parameters - weights_in(facts, units)
    left -= ends * (bool(spec.embedding_bits) + (bool(spec.head_bits) and not facts.tied))
    return item * left + ends_bits(spec, facts)


def limit_of(spec: TrialSpec, facts: ModelFacts, units: Sequence[Unit], unquantized: int) -> int:
    """Return the most bits that the units may take together.

    Args:
        unquantized: bits of the rest of the model.
    """
    assert spec.budget is not None
    key, value = spec.budget.given
    if key == "bits":
        return math.floor(Fraction(str(value)) * weights_in(facts, units))
    if key == "bytes":
        return 8 * (int(value) - (spec.budget.cache or 0)) - unquantized
    return sum(row[0] for row in sizes_of(spec, facts, units, (int(value),)))


def refuse_unreachable(
    budget: BitBudget, sizes: Sequence[Sequence[int]], limit: int, weights: int, unquantized: int
) -> None:
    """Refuse a budget that no allotment keeps, or that would leave bits over whatever is chosen.

    Raises:
        ConfigError: it is; the line says what can be reached.
    """
    least, most = (sum(end(row) for row in sizes) for end in (min, max))
    if least <= limit <= most or (limit > most and budget.given[0] == "bytes"):
        return
    key, value = budget.given
    widths = ",".join(map(str, budget.widths))
    if key == "bytes":
        raise ConfigError(f"budget.bytes={value}{_short(budget, least, most, unquantized)}")
    average = "" if key == "bits" else f", an average of {limit / weights:.4g}"
    low, high = math.ceil(1000 * least / weights) / 1000, math.floor(1000 * most / weights) / 1000
    raise ConfigError(
        f"budget.{key}={value:g}{average}: with budget.widths=[{widths}] the average, scales and "
        f"zero points counted, is {low:g} to {high:g} bits"
    )


def _short(budget: BitBudget, least: int, most: int, unquantized: int) -> str:
    """Say why a budget of bytes holds no allotment, and what can be reached."""
    assert budget.bytes is not None
    if 8 * budget.bytes <= unquantized:
        return (
            ": what stays unquantized (embedding, head, norms and skipped layers) takes "
            f"{bytes_in_words(unquantized / 8)} alone; head_bits= and embedding_bits= make it "
            "smaller"
        )
    ends = [(end + unquantized) / 8 for end in (least, most)]
    taken, widths = " to ".join(map(bytes_in_words, ends)), ",".join(map(str, budget.widths))
    line = f" is too little: with budget.widths=[{widths}] the model takes {taken}"
    if budget.cache is None:
        return line
    whole = " to ".join(bytes_in_words(end + budget.cache) for end in ends)
    return (
        f"{line}, and {whole} with the cache of context={budget.context} "
        f"({bytes_in_words(budget.cache)}), which counts too; a shorter context or kv_bits= makes "
        "that smaller"
    )


def base_width(sizes: Sequence[Sequence[int]], widths: Sequence[int], limit: int) -> int:
    """Return the smallest width with which all units take at least the limit, else the largest.

    So a table that sorts trials by it compares a budget with a uniform width that takes no less.
    """
    taking = [bits for w, bits in enumerate(widths) if sum(row[w] for row in sizes) >= limit]
    return min(taking, default=widths[-1])


def with_widths(
    spec: TrialSpec, units: Sequence[Unit], chosen: Sequence[int]
) -> tuple[TrialSpec, dict[str, Json]]:
    """Return the spec with each unit's width among its overrides, and the patterns that say so."""
    assert spec.scheme is not None
    overrides: dict[str, Json] = {name: dict(own) for name, own in spec.overrides.items()}
    patterns: dict[str, Json] = {}
    for unit, bits in zip(units, chosen, strict=True):
        if bits == spec.scheme.bits:
            continue
        patterns[unit.name] = {"bits": bits}
        for linear in unit.linears:
            overrides.setdefault(linear, {})["bits"] = bits
    in_order = {
        name: overrides[name] for unit in units for name in unit.linears if name in overrides
    }
    return replace(spec, overrides=in_order), patterns


def by_block(units: Sequence[Unit]) -> Mapping[int, list[int]]:
    """Return the numbers of each block's units."""
    numbers: dict[int, list[int]] = {}
    for u, unit in enumerate(units):
        numbers.setdefault(unit.block, []).append(u)
    return numbers
