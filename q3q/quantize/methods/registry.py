"""The methods that exist: q3q's own, and the entry points of installed packages. Without torch."""

import functools
from dataclasses import dataclass, fields, is_dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from q3q.errors import ConfigError, first_line
from q3q.quantize.methods.settings import SETTINGS, MethodSettings
from q3q.spec import MethodRef, Scheme

GROUP = "q3q.methods"
# Keys of a spec's method entry that are no knobs.
RESERVED = ("version", "package", "act_bits", "act_format", "act_group_size")


@dataclass(frozen=True)
class Offer:
    """One method of an installed package.

    package: its name and version, as in `name 1.0`
    settings: None if the method cannot be used
    problem: then the reason, in one line
    """

    name: str
    package: str
    settings: type[MethodSettings] | None
    problem: str | None


@functools.cache
def offers() -> dict[str, Offer]:
    """Return the installed packages' methods by name; a broken package breaks its own alone."""
    by_name: dict[str, Offer] = {}
    for point in sorted(entry_points(group=GROUP), key=lambda point: (point.name, point.value)):
        package = f"{point.dist.name} {point.dist.version}" if point.dist else point.value
        offer = _offer(point, package)
        other = by_name.get(point.name)
        if other is not None and other.package != package:
            problem = (
                f"method={point.name} is offered by {other.package} and by {package}: uninstall "
                "one of them"
            )
            offer = Offer(point.name, package, None, problem)
        by_name[point.name] = offer
    return by_name


def settings_class(name: str) -> type[MethodSettings] | None:
    """Return the class of a method's settings; None if the method is unknown or broken."""
    if name in SETTINGS:
        return SETTINGS[name]
    offer = offers().get(name)
    return offer.settings if offer else None


def method_ref(settings: MethodSettings, scheme: Scheme | None) -> MethodRef:
    """Return the method as a spec names it."""
    knobs = settings.knobs(scheme)
    own = settings.name in SETTINGS
    return MethodRef(
        name=knobs.pop("name"),
        version=settings.version,
        knobs=knobs,
        package=None if own else offers()[settings.name].package,
    )


def settings_of(method: MethodRef) -> MethodSettings:
    """Return the settings of a spec's method.

    Raises:
        ConfigError: the package that offers it is not installed here, or in another version.
    """
    kind = settings_class(method.name)
    offer = None if method.package is None else offers().get(method.name)
    if kind is None or method.package != (offer and offer.package):
        here = "none of that name" if offer is None else offer.problem or f"that of {offer.package}"
        raise ConfigError(
            f"this trial needs method={method.name} of {method.package or 'q3q'} on this machine; "
            f"here is {here}"
        )
    names = {knob.name for knob in fields(kind)}
    return kind(**{key: value for key, value in method.knobs.items() if key in names})


def settings_or_default(method: MethodRef) -> MethodSettings:
    """Return a method's settings; the defaults of an unknown one where its package is missing."""
    try:
        return settings_of(method)
    except ConfigError:
        return MethodSettings(name=method.name)


def _offer(point: EntryPoint, package: str) -> Offer:
    def broken(reason: str) -> Offer:
        problem = f"method={point.name} of the package {package} cannot be used: {reason}"
        return Offer(point.name, package, None, problem)

    if point.name in SETTINGS:
        return broken("q3q has a method of that name itself; the package must choose another")
    try:
        settings = point.load()
    except Exception as error:  # somebody else's code: whatever it raises
        return broken(f"{point.value} does not load ({type(error).__name__}: {first_line(error)})")
    problem = _misfit(settings, point.name)
    return (
        broken(f"{point.value} {problem}")
        if problem
        else Offer(point.name, package, settings, None)
    )


def _misfit(settings: Any, name: str) -> str | None:
    """Return why an object cannot be a method's settings, as a predicate; or None."""
    if not (
        isinstance(settings, type)
        and issubclass(settings, MethodSettings)
        and is_dataclass(settings)
    ):
        return "is not a dataclass derived from MethodSettings"
    knobs = {field.name: field.default for field in fields(settings)}
    if knobs["name"] != name:
        return f'must declare name: str = "{name}", as its entry point does'
    try:
        OmegaConf.structured(settings)
    except (OmegaConfBaseException, ValueError) as error:
        return f"has a setting of a type that a config cannot hold ({first_line(error)})"
    if settings.quantizes and ":" not in settings.implementation:
        return 'must declare implementation: ClassVar[str] = "module:Class"'
    reserved = next((key for key in RESERVED if key in knobs), None)
    return reserved and f"has a setting named {reserved}, which q3q uses itself"
