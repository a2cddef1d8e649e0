"""Resolve bits, groups, overrides and skip to a scheme for every linear."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, replace

from omegaconf import DictConfig

from q3q.bit_budget import BitBudget
from q3q.config.budget import width_of
from q3q.config.patterns import Linear, linears, matching_linears, similar_names, summarize_linears
from q3q.config.schema import UNTOUCHED_BITS, refuse_unknown
from q3q.errors import ConfigError, IncompatibleError
from q3q.models.facts import ModelFacts
from q3q.number_formats import ACT_FORMATS, BLOCKS, FLOATS, FORMATS, INT, own_form
from q3q.quantize.methods.settings import MethodSettings
from q3q.scheme import ACT_SCALES, CALIBRATED, DYNAMIC
from q3q.spec import Json, Scheme, Schemes, TrialSpec

GROUP_SIZES = (16, 32, 64, 128, 256, 512)  # that an error suggests


def resolve_schemes(
    config: DictConfig,
    settings: MethodSettings,
    facts: ModelFacts,
    budget: BitBudget | None = None,
) -> tuple[Schemes | None, Json]:
    """Return how each linear is stored (None: not at all), and the patterns that say so.

    Args:
        budget: allots the bits later; until then all linears have its first width.
    """
    base = _base_scheme(config, settings, budget)
    if not settings.quantizes:  # then no other setting has to fit the model
        if base.act_bits is not None:
            key = "act_bits" if config.act_format in (None, INT) else "act_format"
            raise IncompatibleError(
                f"method={settings.name} quantizes nothing, so {key}={config[key]} has no effect"
            )
        return None, {}
    model = linears(facts)
    schemes, rules = _with_patterns(config, base, model, facts.family.skipped, settings)
    _check_group_sizes(schemes, settings, model)
    _check_able(schemes, settings, model)
    return schemes, rules


def asks_for_factors(config: DictConfig) -> bool:
    """Return True if inputs are rounded by numbers that calibration finds, whatever the method."""
    asked = (config.act_scales, *(settings.act_scales for settings in config.overrides.values()))
    return CALIBRATED in asked


def _base_scheme(config: DictConfig, settings: MethodSettings, budget: BitBudget | None) -> Scheme:
    """Return the scheme that holds unless a pattern says otherwise, defaults filled in."""
    refuse_unknown("format", config.format, FORMATS)
    bits, size, symmetric = _defaults_of(config.format, settings)
    width = width_of(config) if budget is None else budget.widths[0]
    act_format = config.act_format
    if act_format is None:
        follows = settings.default_act_bits is not None and config.act_bits is None
        act_format = config.format if follows and config.format in ACT_FORMATS else INT
    refuse_unknown("act_format", act_format, ACT_FORMATS)
    act_scales = config.act_scales or DYNAMIC
    refuse_unknown("act_scales", act_scales, ACT_SCALES)
    act, act_bits, act_size = FLOATS.get(act_format), config.act_bits, config.act_group_size
    if act_bits is None:
        act_bits = settings.default_act_bits if act is None else act.bits
    if act_size is None:
        act_size = -1 if act is None else act.group_size or -1
    return Scheme(
        bits=bits if width is None else width,
        group_size=size if config.group_size is None else config.group_size,
        symmetric=symmetric if config.symmetric is None else config.symmetric,
        act_bits=None if act is None and act_bits == UNTOUCHED_BITS else act_bits,
        format=config.format,
        group_rows=1 if config.group_rows is None else config.group_rows,
        four_over_six=config.four_over_six,
        act_format=act_format,
        act_group_size=act_size,
        act_scales=act_scales,
    )


def _defaults_of(form: str, settings: MethodSettings) -> tuple[int, int, bool]:
    """Return the bits, group_size and symmetric of a format, where they are not given."""
    own = own_form(form)
    if own is None:
        return settings.default_bits, settings.default_group_size, settings.default_symmetric
    symmetric = form not in BLOCKS or not BLOCKS[form].offsets
    return own.bits, own.group_size or -1, symmetric


def _changed(base: Scheme, changes: Json, settings: MethodSettings) -> Scheme:
    """Return the scheme with overrides; another format has its own bits and groups."""
    implied: Json = {}
    form, act_format = changes.get("format", base.format), changes.get("act_format")
    if form != base.format:
        bits, size, symmetric = _defaults_of(form, settings)
        implied |= {"bits": bits, "group_size": size, "symmetric": symmetric}
        implied |= {"group_rows": 1, "four_over_six": False}
    if act_format not in (None, base.act_format):
        act = FLOATS.get(act_format)
        implied["act_bits"] = settings.default_act_bits if act is None else act.bits
        implied["act_group_size"] = -1 if act is None else act.group_size or -1
        implied["act_scales"] = DYNAMIC
    values = dict(changes)
    if values.get("act_bits") == UNTOUCHED_BITS:
        values |= {"act_bits": None, "act_format": INT}
        implied |= {"act_group_size": -1, "act_scales": DYNAMIC}
    return replace(base, **{**implied, **values})


def _with_patterns(
    config: DictConfig,
    base: Scheme,
    model: Mapping[str, Linear],
    left_out: Sequence[str],
    settings: MethodSettings,
) -> tuple[Schemes, Json]:
    """Resolve overrides and skip, which are patterns of names, for each linear of this model.

    The last pattern that matches a linear wins, setting by setting; skip wins over all.

    Args:
        left_out: patterns of what stays unquantized unless skip is given.
    """
    patterns, changes_of = _changes_of_linears(config, base, model, settings)
    if config.skip is None:
        skipped = {name for pattern in left_out for name in matching_linears(pattern, model)}
        for pattern in patterns:
            if skipped.issuperset(matching_linears(pattern, model)):
                raise ConfigError(
                    f"overrides: {pattern} names only layers that stay in 16 bits unless skip is "
                    "given; skip=[] quantizes them"
                )
    else:
        skipped = {name for pattern in config.skip for name in _matches("skip", pattern, model)}
    overrides = {}
    for name in model:
        if name in skipped or name not in changes_of:
            continue
        own = _changed(base, changes_of[name], settings)
        differs = {
            part.name: value
            for part in fields(Scheme)
            if (value := getattr(own, part.name)) != getattr(base, part.name)
        }
        if differs:
            overrides[name] = differs
    overrides |= {name: own for name, own in _narrow(base, model).items() if name not in skipped}
    rules: Json = {}
    if overrides and patterns:
        rules["overrides"] = patterns
    if config.skip is not None and (skipped or left_out):
        rules["skip"] = list(config.skip)
    return Schemes(base, overrides, tuple(name for name in model if name in skipped)), rules


def _changes_of_linears(
    config: DictConfig, base: Scheme, model: Mapping[str, Linear], settings: MethodSettings
) -> tuple[dict[str, Json], dict[str, Json]]:
    """Return what each pattern of overrides says, and what of it holds for each linear."""
    patterns: dict[str, Json] = {}
    changes_of: dict[str, Json] = {}
    for pattern, typed in config.overrides.items():
        change = {key: value for key, value in typed.items() if value is not None}
        patterns[str(pattern)] = change
        if not change:
            raise ConfigError(
                f"overrides: {pattern} sets nothing; give bits, group_size, symmetric, format, "
                "act_format, act_bits or act_scales"
            )
        choices = {"format": FORMATS, "act_format": ACT_FORMATS, "act_scales": ACT_SCALES}
        for key in change.keys() & choices.keys():
            refuse_unknown(key, change[key], choices[key])
        try:
            _changed(base, change, settings)
        except ConfigError as error:
            raise type(error)(f"overrides: {pattern}: {error}") from error
        for name in _matches("overrides", str(pattern), model):
            changes_of.setdefault(name, {}).update(change)
    return patterns, changes_of


def _narrow(base: Scheme, model: Mapping[str, Linear]) -> dict[str, Json]:
    """Return what differs for linears whose columns do not fill the blocks of a GGUF type.

    They take the type with smaller blocks that is nearest, as llama.cpp's own quantizer does.
    """
    form = BLOCKS.get(base.format)
    other = None if form is None else BLOCKS.get(form.instead)
    if form is None or other is None:
        return {}
    instead = {
        "format": other.name,
        "bits": other.bits,
        "group_size": other.group_size,
        "symmetric": not other.offsets,
    }
    differs = {key: value for key, value in instead.items() if value != getattr(base, key)}
    return {
        name: dict(differs)
        for name, linear in model.items()
        if linear.columns % form.block and linear.columns % other.block == 0
    }


def _matches(key: str, pattern: str, model: Mapping[str, Linear]) -> list[str]:
    names = matching_linears(pattern, model)
    if not names:
        if pattern in ("lm_head", "head", "embedding", "embed_tokens"):
            raise ConfigError(
                f"{key}: {pattern} is not in a block; it has settings of its own, head_bits and "
                "embedding_bits"
            )
        close = similar_names(pattern, model)
        hint = f"; did you mean {' or '.join(close)}? " if close else ". "
        first, last = next(iter(model.values())), list(model.values())[-1]
        raise ConfigError(
            f"{key}: {pattern} matches nothing in this model{hint}Names go from "
            f"{first.names[2]}, {first.names[1]}, {first.names[0]} to {last.names[0]}"
        )
    return names


def _check_group_sizes(
    schemes: Schemes, settings: MethodSettings, model: Mapping[str, Linear]
) -> None:
    linears_of: dict[tuple[str, int], list[Linear]] = {}
    for name, linear in model.items():
        scheme = schemes.of(name)
        if scheme is None or scheme.group_size == -1:
            continue
        block = BLOCKS.get(scheme.format)
        size = scheme.group_size if block is None else block.block
        linears_of.setdefault((scheme.format, size), []).append(linear)
    complaints = []
    for (format_name, size), group in linears_of.items():
        misfits: dict[int, list[Linear]] = {}
        for linear in group:
            if linear.columns % size:
                misfits.setdefault(linear.columns, []).append(linear)
        if misfits:
            where = ", ".join(
                f"{summarize_linears(misfit)} ({columns} columns)"
                for columns, misfit in misfits.items()
            )
            columns_of = {linear.columns for linear in group}
            form = own_form(format_name)
            if form is not None and form.group_size is not None:
                fitting = f"format={form.name} has no others; skip=[...] leaves layers out"
                complaints.append(f"group_size={size} does not divide {where}; {fitting}")
                continue
            scheme = schemes.of(group[0].names[0])
            assert scheme is not None
            usable = _usable_sizes(scheme, columns_of, settings)
            complaints.append(f"group_size={size} does not divide {where}; sizes that do: {usable}")
    misfit_of: dict[int, list[Linear]] = {}
    for name, linear in model.items():
        scheme = schemes.of(name)
        size = -1 if scheme is None else scheme.act_group_size
        if size != -1 and linear.columns % size:
            misfit_of.setdefault(size, []).append(linear)
    for size, misfit in misfit_of.items():
        complaints.append(f"act_group_size={size} does not divide {summarize_linears(misfit)}")
    if complaints:
        raise ConfigError("; ".join(complaints))


def _usable_sizes(scheme: Scheme, columns: Collection[int], settings: MethodSettings) -> str:
    """Return in words the group sizes that divide these widths, and that the method takes."""
    taken = [
        size
        for size in (*GROUP_SIZES, -1)
        if all(width % size == 0 for width in columns)
        and settings.clash(replace(scheme, group_size=size)) is None
    ]
    sizes = [size for size in taken if size != -1]
    if not taken:
        return f"those that divide {math.gcd(*columns)}"
    return " or ".join([*([str(sizes)] if sizes else []), *(["-1"] if -1 in taken else [])])


def _check_able(schemes: Schemes, settings: MethodSettings, model: Mapping[str, Linear]) -> None:
    """Refuse what the method cannot do, naming all such places at once."""
    if schemes.base in map(schemes.of, model) and (clash := settings.clash(schemes.base)):
        raise IncompatibleError(clash)
    clashes: dict[str, list[Linear]] = {}
    schemes_of_sites: dict[tuple[int, str], set[Scheme | None]] = {}
    for name, linear in model.items():
        scheme = schemes.of(name)
        schemes_of_sites.setdefault((linear.block, linear.site), set()).add(scheme)
        problem = settings.clash(scheme) if scheme is not None and scheme != schemes.base else None
        if problem:
            clashes.setdefault(problem, []).append(linear)
    if clashes:
        raise IncompatibleError(
            "; ".join(
                f"overrides: {problem} (asked of {summarize_linears(group)})"
                for problem, group in clashes.items()
            )
        )

    def summary(sites: Collection[tuple[int, str]]) -> str:
        return summarize_linears(
            linear for linear in model.values() if (linear.block, linear.site) in sites
        )

    uneven = {site for site, kinds in schemes_of_sites.items() if len(kinds - {None}) > 1}
    if uneven and settings.rebalances:
        raise IncompatibleError(
            f"method={settings.name} scales all linears of a site together: give {summary(uneven)} "
            "one setting"
        )
    quantized = {site for site, kinds in schemes_of_sites.items() if kinds != {None}}
    torn = {
        (linear.block, linear.site)
        for name, linear in model.items()
        if schemes.of(name) is None and not linear.apart
    } & quantized
    rounding = next((s for s in map(schemes.of, model) if s is not None and s.act_bits), None)
    if torn and rounding is not None:
        raise IncompatibleError(
            f"{_activations(rounding)} rounds what all linears of a site read: skip all of "
            f"{summary(torn)}, or none"
        )
    unlike = {
        site
        for site, kinds in schemes_of_sites.items()
        if len({scheme.inputs for scheme in kinds if scheme is not None}) > 1
    }
    if unlike:
        raise IncompatibleError(
            "overrides: act_format, act_bits and act_scales round what all linears of a site read: "
            "give "
            f"all of {summary(unlike)} the same"
        )


def _activations(scheme: Scheme) -> str:
    if scheme.act_format == INT:
        return f"act_bits={scheme.act_bits}"
    return f"act_format={scheme.act_format}"


def check_ends(spec: TrialSpec, facts: ModelFacts, method: MethodSettings) -> None:
    """Check head and embedding: rounded as the scheme says, one tensor where they are tied."""
    head, embedding = spec.head_bits, spec.embedding_bits
    ends = (("head_bits", head), ("embedding_bits", embedding))
    settings = " ".join(f"{key}={bits}" for key, bits in ends if bits)
    if not settings:
        if spec.skip and len(spec.skip) == len(linears(facts)):
            raise IncompatibleError("skip leaves nothing to quantize: that is method=none")
        return
    if spec.scheme is None:
        raise IncompatibleError(
            f"method={spec.method.name} quantizes nothing, so {settings} has no effect; for these "
            "alone: method=rtn skip=[blocks.*]"
        )
    if spec.scheme.group_size != -1 and facts.hidden % spec.scheme.group_size:
        of_linears = {
            linear.columns
            for name, linear in linears(facts).items()
            if (scheme := Schemes(spec.scheme, spec.overrides, spec.skip).of(name)) is not None
            and scheme.group_size == spec.scheme.group_size
        }
        usable = _usable_sizes(spec.scheme, {facts.hidden, *of_linears}, method)
        raise ConfigError(
            f"group_size={spec.scheme.group_size} does not divide the {facts.hidden} columns of "
            f"{settings}; sizes that do: {usable}"
        )
    if facts.tied and head != embedding:
        raise IncompatibleError(
            f"{spec.model.name} ties head and embedding, they are one tensor: {settings} must be "
            "two equal numbers"
        )
