"""model=judge: a published checkpoint is evaluated beside the original that it was made of.

A place is how a person names a model there: the Hub's name of it (with `@REVISION` if need be), a
folder, a GGUF file, or a page of conf/model.
"""

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from q3q import quoting
from q3q.config.pages import CONF, hub_sources, page_of
from q3q.config.schema import DEMO_NAMES
from q3q.errors import ConfigError, IncompatibleError
from q3q.models.facts import ModelFacts
from q3q.spec import ModelRef

# Facts that a checkpoint shares with its original, and their names for people.
SHARED = {
    "vocab": "tokens in the vocabulary",
    "layers": "layers",
    "hidden": "hidden size",
    "heads": "attention heads",
    "kv_heads": "key-value heads",
    "head_dim": "head size",
    "intermediate": "MLP size",
    "experts": "experts",
    "moe_intermediate": "size of an expert",
}


def is_judged(config: DictConfig) -> bool:
    """Return True if a config is of model=judge.

    Raises:
        ConfigError: only one of the two models is named.
    """
    model = config.model
    if model.reference is None:
        return False
    if model.source is None:
        raise ConfigError(
            f"model.reference={model.reference} is compared with published checkpoints: name them, "
            "model=judge model.source=ORGANIZATION/NAME,FOLDER,FILE.gguf"
        )
    if model.path is not None or model.revision is not None:
        raise ConfigError(
            "model=judge takes folders and files as model.source=, and revisions as "
            "model.source=ORGANIZATION/NAME@REVISION"
        )
    return True


def as_candidate(config: DictConfig) -> DictConfig:
    """Return the config of the checkpoint that is judged, as if it were given alone."""
    changed = _at(config, config.model.source)
    changed.model.name = config.model.name or _name(config.model.source)
    changed.dtype = config.model.dtype or config.dtype or changed.model.dtype
    return changed


def as_reference(config: DictConfig) -> DictConfig:
    """Return the config of the original, as if it were given alone.

    A model that is its own original has one name, the one that was given.
    """
    changed = _at(config, config.model.reference)
    if config.model.reference == config.model.source:
        changed.model.name = config.model.name or changed.model.name
    return changed


def refuse_other_shapes(
    model: ModelRef, facts: ModelFacts, reference: ModelRef, original: ModelFacts
) -> None:
    """Refuse a checkpoint that cannot be compared with the original, token by token.

    Raises:
        ConfigError: it is of another shape, or has another vocabulary.
    """
    differing = [
        f"{getattr(facts, key)} {words} instead of {getattr(original, key)}"
        for key, words in SHARED.items()
        if getattr(facts, key) != getattr(original, key)
    ]
    if type(facts.family) is not type(original.family):
        differing.insert(0, f"it is a {facts.family.name}, not a {original.family.name}")
    if differing:
        raise ConfigError(
            f"{model.label} cannot have been made from {reference.label}: {', '.join(differing)}"
        )


def refuse_quantizing(method: str) -> None:
    """Raise IncompatibleError: a judged checkpoint is evaluated as it is."""
    raise IncompatibleError(
        f"model=judge evaluates checkpoints as they are: leave method={method} out"
    )


def original_job(overrides: Sequence[str]) -> list[str]:
    """Return a judged job's overrides for the original's own trial."""
    place = _value(overrides, "model.reference")
    return [*_others(overrides), *_words(place)]


def _others(overrides: Sequence[str]) -> list[str]:
    keys = (override.lstrip("+~").partition("=")[0].partition(".")[0] for override in overrides)
    return [override for override, key in zip(overrides, keys, strict=True) if key != "model"]


def _value(overrides: Sequence[str], key: str) -> str:
    pairs = (override.partition("=") for override in overrides)
    return next(value.strip("'\"") for name, _, value in pairs if name.lstrip("+") == key)


def _words(place: str) -> list[str]:
    """Return the overrides that name a model alone."""
    if (page := _page(place)) is not None:
        return [f"model={page}"]
    if _is_local(place):
        return ["model=local", quoting.override("model.path", place)]
    source, _, revision = place.partition("@")
    words = ["model=hub", quoting.override("model.source", source)]
    return words + ([quoting.override("model.revision", revision)] if revision else [])


def _at(config: DictConfig, place: str) -> DictConfig:
    """Return a config whose model is the one at a place."""
    changed = config.copy()
    own: dict[str, str | None] = dict.fromkeys(("name", "source", "path", "revision", "dtype"))
    if (page := _page(place)) is not None:
        page_settings = OmegaConf.load(CONF / "model" / f"{page}.yaml")
        own |= {key: OmegaConf.select(page_settings, key) for key in own}
    elif _is_local(place):
        own["path"] = place
    else:
        own["source"], _, revision = place.partition("@")
        own["revision"] = revision or None
    for key, value in {**own, "reference": None}.items():
        changed.model[key] = value
    return changed


def _page(place: str) -> str | None:
    """Return the page of conf/model for one model at this place; None without one."""
    if place in DEMO_NAMES or place in hub_sources():
        return place
    return None if _is_local(place) else page_of(place)


def _is_local(place: str) -> bool:
    """Return True for a folder or file, also for one that is not there but cannot be a Hub's."""
    begins = place.startswith(("/", ".", "~"))
    return begins or place.endswith(".gguf") or Path(place).expanduser().exists()


def _name(place: str) -> str:
    """Return how reports call what is judged: the Hub's name, or the folder's or file's."""
    return Path(place).expanduser().absolute().name if _is_local(place) else place
