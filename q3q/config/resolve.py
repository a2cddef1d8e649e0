"""Resolve a composed config to a trial; refuse what makes no sense before anything runs."""

import functools
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from q3q.config.budget import resolve_budget, with_all_widths, with_base
from q3q.config.calibration import resolve_calibration
from q3q.config.command import command_of
from q3q.config.evaluation import resolve_evaluation, seed_of_shots
from q3q.config.judged import (
    as_reference,
    is_judged,
    refuse_other_shapes,
    refuse_quantizing,
)
from q3q.config.known import not_a_setting
from q3q.config.kv_cache import cache_notice, reads_cache, resolve_context, resolve_kv
from q3q.config.model import resolve_model
from q3q.config.patterns import linears
from q3q.config.schema import GROUPS, Config, refuse_unknown
from q3q.config.schemes import check_ends, resolve_schemes
from q3q.config.texts import absolute, data_folder, evaluated_texts
from q3q.errors import ConfigError
from q3q.export.destination import check_destination, default_path
from q3q.export.formats import FORMATS, refuse_unsupported, stored_scales
from q3q.export.serving import kv_notice, loading_notice, serving_notice
from q3q.formatting import enough_gb
from q3q.models.facts import ModelFacts, refuse_second_rounding
from q3q.models.footprint import (
    AUTO,
    LOADERS,
    MethodMemory,
    bytes_of,
    choose,
    need,
    refuse_generation,
)
from q3q.placement import KEEPS, Placement, Trial
from q3q.quantize.methods.registry import method_ref, offers, settings_class
from q3q.quantize.methods.settings import MethodSettings, NoneSettings
from q3q.spec import TrialSpec
from q3q.storage.stores import folder_of, is_url, refuse_unusable


def trial_from(config: DictConfig) -> Trial:
    """Return the trial that a composed config means, in canonical form.

    Raises:
        IncompatibleError: valid values that make no sense together.
        ConfigError: an invalid value.
    """
    _refuse_broken_methods(config.method.name)
    _refuse_unknown_keys(config)
    settings: MethodSettings = OmegaConf.to_object(config.method)  # type: ignore[assignment]
    if problem := settings.problem():
        raise ConfigError(problem)
    refuse_unknown("keep", config.keep, KEEPS)
    if is_url(config.storage):
        refuse_unusable(config.storage)
    model, folder, facts = resolve_model(config)
    if (judged := is_judged(config)) and settings.quantizes:
        refuse_quantizing(config.method.name)
    if settings.quantizes:
        refuse_second_rounding(folder, facts)
    # A judged checkpoint reads what its original reads.
    of_text = as_reference(config) if judged else config
    reference, home, original = resolve_model(of_text) if judged else (None, folder, facts)
    if reference is not None:
        refuse_other_shapes(model, facts, reference, original)
    kv = resolve_kv(config, facts)
    budget = resolve_budget(config, settings, folder, facts, kv)
    schemes, rules = resolve_schemes(config, settings, facts, budget)
    reads = schemes is not None and (settings.observes() or schemes.calibrates_inputs)
    observes = schemes is not None and reads and len(schemes.skip) < len(linears(facts))
    resolved = resolve_calibration(config, settings, folder, facts) if observes else None
    evaluation = resolve_evaluation(of_text, original, home)
    scheme = schemes.base if schemes else None
    spec = TrialSpec(
        model=model,
        method=method_ref(settings, scheme),
        scheme=scheme,
        calibration=resolved.calibration if resolved else None,
        evaluation=evaluation,
        # Only calibration windows and lm-eval's few shots are drawn at random.
        seed=config.seed if schemes is not None else seed_of_shots(evaluation, config.seed),
        overrides=dict(schemes.overrides) if schemes else {},
        skip=tuple(schemes.skip) if schemes else (),
        head_bits=config.head_bits,
        embedding_bits=config.embedding_bits,
        kv=kv if reads_cache(config, evaluation, budget) else None,
        reference=reference,
        rules=rules,
        budget=budget,
    )
    check_ends(spec, facts, settings)
    _note_once(cache_notice(spec.kv, facts))
    if schemes is not None and schemes.calibrates_inputs and not settings.observes():
        _note_once(
            f"method={settings.name} itself reads no text; act_scales=calibrated has it run the "
            "calibration's, to find each input's largest number"
        )
    if budget is not None:
        spec = with_base(spec, facts)
    loader, memory = _loading(config, facts, settings.memory(), spec)
    placement = Placement(
        trials=folder_of(config.storage).absolute() / "trials",
        keep=config.keep,
        store=config.storage.rstrip("/") if is_url(config.storage) else None,
        model=folder,
        calibration=resolved.file if resolved else absolute(config.calibration.path),
        parts=resolved.files if resolved else None,
        evaluation=absolute(config.evaluation.path),
        texts=_own_texts(config.evaluation),
        data=data_folder(config),
        loader=loader,
        memory=memory,
        tasks=absolute(config.evaluation.include_path),
        context=resolve_context(config),
        reference=home if judged else None,
    )
    trial = _exported(config, Trial(spec, placement), facts, settings)
    measures = evaluation.texts or evaluation.tasks
    if trial.spec.rounds_nothing or not measures or not config.evaluation.baseline:
        return trial
    return trial.placed(baseline=_baseline_of(trial.spec).id)


def _own_texts(settings: DictConfig) -> dict[str, Path] | None:
    """Return the files of the texts that the user named, by name; None without any."""
    named = {text.name: absolute(text.path) for text in evaluated_texts(settings) if text.name}
    return {name: path for name, path in named.items() if path is not None} or None


def _loading(
    config: DictConfig,
    facts: ModelFacts,
    method: MethodMemory | None,
    spec: TrialSpec,
) -> tuple[str | None, int | None]:
    """Return the loader and the bytes that the user asked for; refuse what cannot fit."""
    refuse_unknown("loader", config.loader, (AUTO, *LOADERS))
    loader = None if config.loader == AUTO else str(config.loader)
    if loader is not None:
        refuse_generation(spec.generates, loader)
    if config.memory is None:
        return loader, None
    memory, dtype, heads = bytes_of(config.memory), spec.model.dtype, spec.heads
    if loader is None:
        chosen = choose(facts, dtype, method=method, memory=memory, heads=heads)
        refuse_generation(spec.generates, chosen)
    elif loader != "sharded":
        needs = need(facts, dtype, method=method, loader=loader, heads=heads)
        if needs > memory:
            raise ConfigError(
                f"memory={config.memory} is too little for loader={loader}: it needs "
                f"{enough_gb(needs)}"
            )
    return loader, memory


def _baseline_of(spec: TrialSpec) -> TrialSpec:
    """Return the unquantized model's trial, which this one is compared with."""
    return TrialSpec(
        model=spec.reference or spec.model,
        method=method_ref(NoneSettings(), None),
        scheme=None,
        calibration=None,
        evaluation=spec.evaluation,
        seed=seed_of_shots(spec.evaluation, spec.seed),
    )


def _refuse_broken_methods(name: str) -> None:
    offer = offers().get(name)
    if offer is not None and offer.problem:
        raise ConfigError(offer.problem)
    _warn_of_broken_methods()


@functools.cache
def _warn_of_broken_methods() -> None:
    """Name broken packages, once; they do not stop a study that does not use them."""
    for offer in offers().values():
        if offer.problem:
            print(f"Note: {offer.problem}. Other methods are not affected", file=sys.stderr)


def _refuse_unknown_keys(config: DictConfig) -> None:
    """Refuse settings that nothing reads: Hydra lets `+key=value` add any."""
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
        names = [field.name for field in fields(kind)]
        for key in map(str, part):
            if key not in names and prefix + key != "hydra":
                raise ConfigError(not_a_setting(prefix + key, config.method.name))


def _exported(
    config: DictConfig, trial: Trial, facts: ModelFacts, settings: MethodSettings
) -> Trial:
    """Add the export, if there is one; refuse what its format or destination cannot take."""
    name, path, spec = config.export.name, config.export.path, trial.spec
    refuse_unknown("export", name, ("none", *FORMATS))
    if name == "none":
        if path is not None:
            raise ConfigError(
                f"export.path={path} is not read by export=none: choose a format, e.g. export=hf"
            )
        return trial
    refuse_unsupported(name, with_all_widths(spec, facts), facts, whole_zeros=settings.whole_zeros)
    assert spec.scheme is not None
    scheme = replace(spec.scheme, scales=stored_scales(name, spec.model.dtype, spec.scheme.format))
    trial = replace(trial, spec=replace(spec, export=name, scheme=scheme))
    folder = absolute(path) or default_path(trial.spec, str(folder_of(config.storage)))
    trial = trial.placed(export=folder)
    trial = trial.placed(command=command_of(trial))
    check_destination(trial, facts)
    _note_once(serving_notice(name, trial.spec, facts))
    _note_once(loading_notice(trial.spec, facts))
    _note_once(kv_notice(name, trial.spec))
    return trial


@functools.cache
def _note_once(notice: str | None) -> None:
    """Print a notice, if any, that stops nothing: without the `q3q:` of an error that does."""
    if notice is not None:
        print(f"Note: {notice}", file=sys.stderr)
