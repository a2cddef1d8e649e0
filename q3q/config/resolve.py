"""Resolve a composed config to a trial; refuse what makes no sense before anything runs."""

import functools
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from q3q.config.evaluation import resolve_evaluation, seed_of_shots
from q3q.config.model import refuse_second_rounding, resolve_model
from q3q.config.patterns import linears
from q3q.config.schema import GROUPS, Config, nearest, refuse_unknown
from q3q.config.schemes import check_ends, resolve_schemes
from q3q.config.texts import data_folder, resolve_calibration
from q3q.errors import ConfigError
from q3q.export.destination import check_destination, default_path
from q3q.export.formats import FORMATS, not_for_servers, refuse_what_it_cannot_hold, stored_scales
from q3q.models.facts import ModelFacts
from q3q.models.footprint import AUTO, LOADERS, bytes_of, choose, in_gb, need, refuse_generation
from q3q.quantize.methods.registry import described, offers, settings_class
from q3q.quantize.methods.settings import MethodSettings, NoneSettings
from q3q.spec import Json, TrialSpec, heads_held
from q3q.storage.stores import folder_of, is_url, refuse_unusable

# For Hydra's own folders, which lie in the storage folder.
OmegaConf.register_new_resolver("folder_of", lambda storage: str(folder_of(storage)), replace=True)


def spec_from(config: DictConfig) -> TrialSpec:
    """The trial that a composed config means, in canonical form.

    Raises:
        IncompatibleError: valid values that make no sense together. ConfigError: a value that cannot be meant.
    """
    _refuse_broken_methods(config.method.name)
    _refuse_strangers(config)
    settings: MethodSettings = OmegaConf.to_object(config.method)  # type: ignore[assignment]
    problem = settings.problem()
    if problem:
        raise ConfigError(problem)
    refuse_unknown("keep", config.keep, ("none", "blocks"))
    if is_url(config.storage):
        refuse_unusable(config.storage)
    storage = folder_of(config.storage).absolute()
    model, folder, facts = resolve_model(config)
    refuse_second_rounding(settings, folder, facts)
    schemes, rules = resolve_schemes(config, settings, facts)
    reads = schemes is not None and settings.observes() and len(schemes.skip) < len(linears(facts))
    calibration = resolve_calibration(config, settings, folder, facts) if reads else None
    evaluation = resolve_evaluation(config, facts, folder)
    places: Json = {"trials": str(storage / "trials"), "keep": config.keep}
    if is_url(config.storage):
        places["store"] = config.storage.rstrip("/")
    if folder is not None:
        places["model"] = str(folder)
    for name in ("calibration", "evaluation"):
        if config[name].path is not None:
            places[name] = str(Path(config[name].path).expanduser().absolute())
    if (data := data_folder(config)) is not None:
        places["data"] = str(data)
    places |= _loading(
        config, facts, model["dtype"], settings.name if schemes else None, evaluation
    )
    if config.evaluation.include_path is not None:
        places["tasks"] = str(Path(config.evaluation.include_path).expanduser().absolute())
    scheme = schemes.base if schemes else None
    spec = TrialSpec(
        model=model,
        method=described(settings, scheme),
        scheme=scheme,
        calibration=calibration,
        evaluation=evaluation,
        # Nothing but calibration windows and lm-eval's few shots is drawn at random.
        seed=config.seed if schemes is not None else seed_of_shots(evaluation, config.seed),
        overrides=dict(schemes.overrides) if schemes else {},
        skip=tuple(schemes.skip) if schemes else (),
        head_bits=config.head_bits,
        embedding_bits=config.embedding_bits,
        places=places,
        rules=rules,
    )
    check_ends(spec, facts)
    spec = _exported(config, spec, facts)
    measures = evaluation["texts"] or evaluation["tasks"]
    if schemes is None or not measures or not config.evaluation.baseline:
        return spec
    return spec.with_places({**spec.places, "baseline": _baseline_of(spec).id})


def _loading(
    config: DictConfig, facts: ModelFacts, dtype: str, method: str | None, evaluation: Json
) -> Json:
    """Where the model is to be held, as far as that is said; refused now if it cannot fit there."""
    refuse_unknown("loader", config.loader, (AUTO, *LOADERS))
    places: Json = {} if config.loader == AUTO else {"loader": config.loader}
    if config.loader != AUTO:
        refuse_generation(evaluation, config.loader)
    if config.memory is None:
        return places
    memory = bytes_of(config.memory)
    heads = heads_held(config.head_bits, evaluation)
    if config.loader == AUTO:
        refuse_generation(
            evaluation, choose(facts, dtype, method=method, memory=memory, heads=heads)
        )
    elif config.loader != "sharded":
        needs = need(facts, dtype, method=method, loader=config.loader, heads=heads)
        if needs > memory:
            raise ConfigError(
                f"memory={config.memory} is too little for loader={config.loader}: it needs {in_gb(needs)}"
            )
    return {**places, "memory": memory}


def _baseline_of(spec: TrialSpec) -> TrialSpec:
    """The trial of the unquantized model that this one is compared with."""
    return TrialSpec(
        model=spec.model,
        method=described(NoneSettings(), None),
        scheme=None,
        calibration=None,
        evaluation=spec.evaluation,
        seed=seed_of_shots(spec.evaluation, spec.seed),
        places=spec.places,
    )


def _refuse_broken_methods(wanted: str) -> None:
    offer = offers().get(wanted)
    if offer is not None and offer.problem:
        raise ConfigError(offer.problem)
    _warn_of_broken_methods()


@functools.cache
def _warn_of_broken_methods() -> None:
    """Somebody's broken package must not stop a study that does not use it, but is not passed over either."""
    for offer in offers().values():
        if offer.problem:
            print(f"q3q: {offer.problem}. Other methods are not affected", file=sys.stderr)


def _refuse_strangers(config: DictConfig) -> None:
    """Hydra lets `+key=value` add anything; a setting that nobody reads would be ignored in silence."""
    parts: dict[str, tuple[DictConfig, Any]] = {
        "": (config, Config),
        "method.": (config.method, OmegaConf.get_type(config.method)),
    }
    if settings_class(config.method.name) is not parts["method."][1]:
        raise ConfigError(
            f"method.name={config.method.name} is not a setting: choose the method with method="
        )
    for name, kind in GROUPS.items():
        parts[f"{name}."] = (config[name], kind)
    for prefix, (part, kind) in parts.items():
        known = [one.name for one in fields(kind)]
        for key in map(str, part):
            if key not in known and prefix + key != "hydra":
                raise ConfigError(
                    f"{prefix}{key} is not a setting{nearest(key, known)}See python launch.py --help"
                )


def _exported(config: DictConfig, spec: TrialSpec, facts: ModelFacts) -> TrialSpec:
    """The spec with what the export adds to it, refused if its format or its destination cannot take it."""
    name, path = config.export.name, config.export.path
    refuse_unknown("export", name, ("none", *FORMATS))
    if name == "none":
        if path is not None:
            raise ConfigError(
                f"export.path={path} is not read by export=none: choose a format, e.g. export=hf"
            )
        return spec
    refuse_what_it_cannot_hold(name, spec, facts)
    assert spec.scheme is not None
    spec = replace(
        spec,
        export=name,
        scheme=replace(spec.scheme, scales=stored_scales(name, spec.model["dtype"])),
    )
    folder = (
        default_path(spec, str(folder_of(config.storage)))
        if path is None
        else Path(path).expanduser().absolute()
    )
    from q3q.config.command import command_of  # which reads this module

    spec = spec.with_places({**spec.places, "export": str(folder), "command": command_of(spec)})
    check_destination(spec, facts)
    if (warning := not_for_servers(name, spec, facts)) is not None:
        _warn_once(warning)
    return spec


@functools.cache
def _warn_once(warning: str) -> None:
    print(f"q3q: {warning}", file=sys.stderr)
