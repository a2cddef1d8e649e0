"""Resolve bits, groups, overrides and skip to a scheme for every linear."""

from collections.abc import Mapping
from dataclasses import replace

from omegaconf import DictConfig

from q3q.config.patterns import Linear, linears, meant, near, together
from q3q.config.schema import UNTOUCHED_BITS
from q3q.errors import ConfigError, IncompatibleError
from q3q.models.facts import ModelFacts
from q3q.quantize.methods.settings import MethodSettings
from q3q.spec import Json, Scheme, Schemes, TrialSpec


def resolve_schemes(
    config: DictConfig, settings: MethodSettings, facts: ModelFacts
) -> tuple[Schemes | None, Json]:
    """How each linear is stored (None: not at all), and the patterns that say so, for people."""
    act_bits = settings.default_act_bits if config.act_bits is None else config.act_bits
    base = Scheme(
        bits=settings.default_bits if config.bits is None else config.bits,
        group_size=settings.default_group_size if config.group_size is None else config.group_size,
        symmetric=settings.default_symmetric if config.symmetric is None else config.symmetric,
        act_bits=None if act_bits == UNTOUCHED_BITS else act_bits,
    )
    model = linears(facts)
    schemes, rules = _mixed(config, base, model)
    _check_group_sizes(schemes, model)
    if not settings.quantizes:
        if base.act_bits is not None:
            raise IncompatibleError(
                f"method={settings.name} quantizes nothing, so act_bits={config.act_bits} has no use"
            )
        return None, {}
    _check_able(schemes, settings, model)
    return schemes, rules


def _mixed(config: DictConfig, base: Scheme, model: Mapping[str, Linear]) -> tuple[Schemes, Json]:
    """overrides and skip, patterns of names, as what they mean for each linear of this model.

    Of several patterns that mean a linear the last one wins, setting by setting; skip wins over all.
    """
    given: dict[str, Json] = {}
    changed: dict[str, Json] = {}
    for pattern, wanted in config.overrides.items():
        given[str(pattern)] = change = {
            key: value for key, value in wanted.items() if value is not None
        }
        if not change:
            raise ConfigError(
                f"overrides: {pattern} says nothing; give bits, group_size or symmetric"
            )
        try:
            replace(base, **change)
        except ConfigError as error:
            raise ConfigError(f"overrides: {pattern}: {error}") from error
        for name in _meant("overrides", str(pattern), model):
            changed.setdefault(name, {}).update(change)
    left_out = {name for pattern in config.skip for name in _meant("skip", pattern, model)}
    overrides = {}
    for name in model:
        differs = {
            key: value
            for key, value in changed.get(name, {}).items()
            if value != getattr(base, key)
        }
        if differs and name not in left_out:
            overrides[name] = differs
    rules: Json = {}
    if overrides:
        rules["overrides"] = given
    if left_out:
        rules["skip"] = list(config.skip)
    return Schemes(base, overrides, tuple(name for name in model if name in left_out)), rules


def _meant(key: str, pattern: str, model: Mapping[str, Linear]) -> list[str]:
    names = meant(pattern, model)
    if not names:
        if pattern in ("lm_head", "head", "embedding", "embed_tokens"):
            raise ConfigError(
                f"{key}: {pattern} is not in a block; it has settings of its own, head_bits and embedding_bits"
            )
        close = near(pattern, model)
        hint = f"; did you mean {' or '.join(close)}? " if close else ". "
        first, last = next(iter(model.values())), list(model.values())[-1]
        raise ConfigError(
            f"{key}: {pattern} matches nothing in this model{hint}"
            f"Names go from {first.names[2]}, {first.names[1]}, {first.names[0]} to {last.names[0]}"
        )
    return names


def _check_group_sizes(schemes: Schemes, model: Mapping[str, Linear]) -> None:
    used: dict[int, list[Linear]] = {}
    for name, linear in model.items():
        scheme = schemes.of(name)
        if scheme is not None and scheme.group_size != -1:
            used.setdefault(scheme.group_size, []).append(linear)
    complaints = []
    for size, those in used.items():
        wrong: dict[int, list[Linear]] = {}
        for linear in those:
            if linear.columns % size:
                wrong.setdefault(linear.columns, []).append(linear)
        if wrong:
            where = ", ".join(
                f"{together(some)} ({columns} columns)" for columns, some in wrong.items()
            )
            usable = [
                s
                for s in (16, 32, 64, 128, 256, 512)
                if all(linear.columns % s == 0 for linear in those)
            ]
            complaints.append(
                f"group_size={size} does not divide {where}; sizes that do: {usable} or -1"
            )
    if complaints:
        raise ConfigError("; ".join(complaints))


def _check_able(schemes: Schemes, settings: MethodSettings, model: Mapping[str, Linear]) -> None:
    """The method can do what is asked of it, everywhere; all places where it cannot are named at once."""
    clash = settings.clash(schemes.base)
    if clash:
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
                f"overrides: {problem} (asked of {together(some)})"
                for problem, some in clashes.items()
            )
        )
    uneven = [site for site, found in schemes_of_sites.items() if len(found) > 1]
    if uneven and settings.rebalances:
        where = together(
            linear for linear in model.values() if (linear.block, linear.site) in uneven
        )
        raise IncompatibleError(
            f"method={settings.name} scales all linears of a site together: give {where} one setting"
        )
    torn = [site for site, found in schemes_of_sites.items() if None in found and len(found) > 1]
    if torn and schemes.base.act_bits is not None:
        where = together(linear for linear in model.values() if (linear.block, linear.site) in torn)
        raise IncompatibleError(
            f"act_bits={schemes.base.act_bits} rounds what all linears of a site read: skip all of {where}, or none"
        )


def check_ends(spec: TrialSpec, facts: ModelFacts) -> None:
    """Head and embedding: rounded as the scheme says, and one tensor where they are tied."""
    head, embedding = spec.head_bits, spec.embedding_bits
    asked = " ".join(
        f"{key}={bits}"
        for key, bits in (("head_bits", head), ("embedding_bits", embedding))
        if bits
    )
    if not asked:
        if spec.skip and len(spec.skip) == len(linears(facts)):
            raise IncompatibleError("skip leaves nothing to quantize: that is method=none")
        return
    if spec.scheme is None:
        name = spec.method["name"]
        raise IncompatibleError(
            f"method={name} quantizes nothing, so {asked} has no use; for these alone: method=rtn skip=[blocks.*]"
        )
    if spec.scheme.group_size != -1 and facts.hidden % spec.scheme.group_size:
        raise ConfigError(
            f"group_size={spec.scheme.group_size} does not divide the {facts.hidden} columns of {asked}"
        )
    if facts.tied and head != embedding:
        raise IncompatibleError(
            f"{spec.model['name']} ties head and embedding, they are one tensor: {asked} must be two equal numbers"
        )
