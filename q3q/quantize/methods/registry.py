"""Which methods there are: q3q's own, and those that installed packages offer as entry points. No torch here."""

import functools
from dataclasses import dataclass, fields, is_dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from q3q.errors import ConfigError
from q3q.quantize.methods.settings import SETTINGS, MethodSettings
from q3q.spec import Scheme

GROUP = "q3q.methods"
RESERVED = ("version", "package", "act_bits")  # of a spec's method entry, beside the settings


@dataclass(frozen=True)
class Offer:
    """One method of one package, `name 1.0`; its settings, or why it cannot be used, in one line."""

    name: str
    package: str
    settings: type[MethodSettings] | None
    problem: str | None


@functools.cache
def offers() -> dict[str, Offer]:
    """What is installed, by the method's name. A package that is broken costs its own method only."""
    found: dict[str, Offer] = {}
    for point in sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value)):
        package = f"{point.dist.name} {point.dist.version}" if point.dist else point.value
        offer = _offer(point, package)
        other = found.get(point.name)
        if other is not None and other.package != package:
            both = f"method={point.name} is offered by {other.package} and by {package}: uninstall one of them"
            offer = Offer(point.name, package, None, both)
        found[point.name] = offer
    return found


def settings_class(name: str) -> type[MethodSettings] | None:
    """The settings of q3q's own method of that name, or of a package's; None if nobody has it, or it is broken."""
    if name in SETTINGS:
        return SETTINGS[name]
    offer = offers().get(name)
    return offer.settings if offer else None


def described(settings: MethodSettings, scheme: Scheme | None) -> dict[str, Any]:
    """The method as a spec's entry: its knobs, the version of its numerics, and the package if it is not q3q's own."""
    entry = {**settings.knobs(scheme), "version": settings.version}
    if settings.name not in SETTINGS:
        entry["package"] = offers()[settings.name].package
    return entry


def settings_of(method: dict[str, Any]) -> MethodSettings:
    """The settings of a spec's method entry.

    Raises:
        ConfigError: the package that offers it is not installed here, or in another version.
    """
    name, wanted = method["name"], method.get("package")
    kind = settings_class(name)
    offer = None if wanted is None else offers().get(name)
    if kind is None or wanted != (offer and offer.package):
        there = (
            "none of that name" if offer is None else offer.problem or f"that of {offer.package}"
        )
        raise ConfigError(
            f"this trial needs method={name} of {wanted or 'q3q'} on this machine; here is {there}"
        )
    return kind(**{knob.name: method[knob.name] for knob in fields(kind) if knob.name in method})


def _offer(point: EntryPoint, package: str) -> Offer:
    def broken(why: str) -> Offer:
        return Offer(
            point.name,
            package,
            None,
            f"method={point.name} of the package {package} cannot be used: {why}",
        )

    if point.name in SETTINGS:
        return broken("q3q has a method of that name itself; the package must choose another")
    try:
        settings = point.load()
    except Exception as error:  # somebody else's code: whatever it raises
        return broken(f"{point.value} does not load ({type(error).__name__}: {_first_line(error)})")
    problem = _misfit(settings, point.name)
    return (
        broken(f"{point.value} {problem}")
        if problem
        else Offer(point.name, package, settings, None)
    )


def _misfit(settings: Any, name: str) -> str | None:
    """Why an object cannot be a method's settings, said of it; or None."""
    if not (
        isinstance(settings, type)
        and issubclass(settings, MethodSettings)
        and is_dataclass(settings)
    ):
        return "is not a dataclass derived from MethodSettings"
    knobs = {field.name: field.default for field in fields(settings)}
    if knobs["name"] != name:
        return f'must say name: str = "{name}", as its entry point does'
    taken = [key for key in RESERVED if key in knobs]
    try:
        OmegaConf.structured(settings)
    except (OmegaConfBaseException, ValueError) as error:
        return f"has a setting of a type that a config cannot hold ({_first_line(error)})"
    if settings.quantizes and ":" not in settings.implementation:
        return 'must say implementation: ClassVar[str] = "module:Class"'
    return f"has a setting named {taken[0]}, which q3q uses itself" if taken else None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [""])[0]
