"""Resolve a budget of bits, and refuse what cannot be allotted before anything runs."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from q3q.bit_budget import LIMITS, LINEAR, MEASURES, UNITS, BitBudget
from q3q.config.kv_cache import resolve_context
from q3q.config.schema import refuse_unknown
from q3q.config.texts import check_long_enough, opened
from q3q.data.windows import Knobs
from q3q.errors import ConfigError, IncompatibleError
from q3q.kv_scheme import KvScheme
from q3q.models.facts import ModelFacts
from q3q.models.footprint import bytes_of, cache_scheme, cache_shape
from q3q.number_formats import INT
from q3q.quantize.budget.units import (
    base_width,
    limit_of,
    refuse_unreachable,
    sizes_of,
    units_of,
    unquantized_bits,
    weights_in,
    with_widths,
)
from q3q.quantize.methods.settings import MethodSettings
from q3q.spec import MIX, TRACES, TrialSpec

DRAW = "random"  # windows on which sensitivities are measured
WINDOWS = Knobs("budget.length", "budget.samples")


def width_of(config: DictConfig) -> int | None:
    """Return the one width that `bits=` gives all linears; None without one.

    Raises:
        ConfigError: it is no number of bits.
    """
    bits = config.bits
    if bits is None or _is_average(bits):
        return None
    if isinstance(bits, bool) or not isinstance(bits, int | float):
        raise ConfigError(
            f"bits={bits} is not a number: give whole bits, or an average such as 3.5"
        )
    return int(bits)


def asks_for_budget(config: DictConfig) -> bool:
    """Return True if a config sets a limit on the bits."""
    return _is_average(config.bits) or any(config.budget[key] is not None for key in LIMITS)


def resolve_budget(
    config: DictConfig,
    settings: MethodSettings,
    folder: Path | None,
    facts: ModelFacts,
    kv: KvScheme | None,
) -> BitBudget | None:
    """Return the budget that a config means; None without one, or where nothing is quantized.

    Args:
        kv: how the cache is stored that a budget of bytes counts at `context=`; None: in 16 bits.

    Raises:
        ConfigError: a setting is wrong; IncompatibleError where it does not go with another.
    """
    part, width = config.budget, width_of(config)
    limits: dict[str, Any] = {key: part[key] for key in LIMITS if part[key] is not None}
    if _is_average(config.bits):
        if "bits" in limits:
            raise ConfigError(
                f"bits={config.bits:g} and budget.bits={part.bits:g} say the same: give one of them"
            )
        limits["bits"] = config.bits
    if not settings.quantizes or not limits:
        return None
    shown = " ".join(f"budget.{key}={value}" for key, value in limits.items())
    if width is not None:
        raise ConfigError(
            f"bits={width} gives all linears one width, and {shown} allots widths: drop one of them"
        )
    _refuse_incompatible(config, settings, shown)
    refuse_unknown("budget.unit", part.unit, UNITS)
    refuse_unknown("budget.measure", part.measure, MEASURES)
    for key in ("samples", "length"):
        if part[key] < 1:
            raise ConfigError(f"budget.{key}={part[key]}: give 1 or more")
    if "bytes" in limits:
        limits["bytes"] = bytes_of(limits["bytes"], "budget.bytes")
    for key in ("bits", "uniform"):
        if key in limits and not 0 < limits[key] < math.inf:
            raise ConfigError(f"budget.{key}={limits[key]}: give a positive number of bits")
    calibration = config.calibration
    text = opened(config, calibration.source, "calibration", calibration.path)
    check_long_enough(text, folder, part.samples, part.length, DRAW, WINDOWS)
    context = resolve_context(config) if "bytes" in limits else None
    if context is not None:
        counted = cache_shape(facts).bytes_at(cache_scheme(facts, kv), context)
        limits |= {"context": context, "cache": math.ceil(counted)}
    return BitBudget(
        **limits,
        unit=part.unit,
        widths=_widths(part.widths, settings),
        measure=part.measure,
        source=calibration.source,
        digest=text.digest,
        samples=part.samples,
        length=part.length,
        draw=DRAW,
    )


def _is_average(bits: Any) -> bool:
    return isinstance(bits, float) and not bits.is_integer()


def _refuse_incompatible(config: DictConfig, settings: MethodSettings, shown: str) -> None:
    name = settings.name
    if len(settings.bits) == 1:
        raise IncompatibleError(
            f"{shown}: method={name} has only one width, {settings.bits[0]} bits, so a budget has "
            "nothing to choose; group_size= changes how many bytes it takes"
        )
    if config.format != INT:
        raise IncompatibleError(
            f"{shown}: a budget chooses widths for format=int, but format={config.format} has a "
            "fixed number of bits"
        )
    if settings.work().variants:
        raise IncompatibleError(
            f"{shown}: method={name} searches its settings for each width, so losses measured at "
            "single widths do not add up: give method.search=false"
        )
    if config.calibration.source in (MIX, TRACES):
        raise IncompatibleError(
            f"{shown}: sensitivities are measured on one text, which calibration="
            f"{config.calibration.source} does not name: choose a text"
        )
    if settings.rebalances and config.budget.unit == LINEAR:
        raise IncompatibleError(
            f"method={name} scales all linears of a site together, so they have one width: "
            "budget.unit=site or block"
        )
    wrong = [str(pattern) for pattern, own in config.overrides.items() if own.bits is not None]
    if wrong:
        raise ConfigError(
            f"{shown} sets the bits of all linears, so overrides can set group_size and symmetric, "
            f"and not bits ({', '.join(wrong)}); skip=[...] leaves layers out"
        )
    cluster = config.cluster
    counts = (cluster.gpus_per_trial, cluster.ranks_per_trial)
    gang = config.loader == "sharded" or any(
        isinstance(count, int | float) and count > 1 for count in counts
    )
    if gang:
        raise IncompatibleError(
            f"{shown}: sensitivities are measured by one process, not by a gang: "
            "cluster.gpus_per_trial=1, and loader=streamed for a model that does not fit"
        )


def _widths(typed: Sequence[int], settings: MethodSettings) -> tuple[int, ...]:
    widths = tuple(sorted(set(typed)))
    shown = f"budget.widths=[{','.join(map(str, typed))}]"
    if len(widths) < 2:
        raise ConfigError(f"{shown}: give two or more widths to choose from")
    if wrong := [width for width in widths if width not in settings.bits]:
        able = ", ".join(map(str, settings.bits))
        raise ConfigError(
            f"{shown}: method={settings.name} cannot do {', '.join(map(str, wrong))}; it takes "
            f"{able}"
        )
    return widths


def with_base(spec: TrialSpec, facts: ModelFacts) -> TrialSpec:
    """Return the spec with the width that its overrides will depart from; see `base_width`.

    Sizes are those of config.json.

    Raises:
        ConfigError: no allotment keeps the budget.
    """
    assert spec.budget is not None
    assert spec.scheme is not None
    units = units_of(spec, facts)
    if not units:
        return spec
    sizes = sizes_of(spec, facts, units, spec.budget.widths)
    beside = unquantized_bits(spec, facts, units)
    limit = limit_of(spec, facts, units, beside)
    refuse_unreachable(spec.budget, sizes, limit, weights_in(facts, units), beside)
    bits = base_width(sizes, spec.budget.widths, limit)
    return replace(spec, scheme=replace(spec.scheme, bits=bits))


def with_all_widths(spec: TrialSpec, facts: ModelFacts) -> TrialSpec:
    """Return the spec with each width somewhere, for those who ask what mixed widths can be."""
    if spec.budget is None:
        return spec
    units, widths = units_of(spec, facts), spec.budget.widths
    return with_widths(spec, units, [widths[u % len(widths)] for u in range(len(units))])[0]
