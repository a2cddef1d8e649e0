"""Build the method that a spec names."""

from importlib import import_module

from q3q.errors import ConfigError
from q3q.quantize.method import Method
from q3q.quantize.methods.registry import settings_of
from q3q.spec import TrialSpec


def build_method(spec: TrialSpec) -> Method:
    """Return the method that the spec names, with its settings."""
    settings = settings_of(spec.method)
    module, _, name = settings.implementation.partition(":")
    try:
        kind = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        owner = f"method={settings.name} of {spec.method.package or 'q3q'}"
        raise ConfigError(f"{owner}: {settings.implementation} is not there ({error})") from error
    if not issubclass(kind, Method):
        raise ConfigError(
            f"method={settings.name}: {settings.implementation} is not derived from Method"
        )
    return kind(settings)
