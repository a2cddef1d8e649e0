"""The command that runs a trial again, read off its spec alone."""

import dataclasses
from pathlib import Path

from q3q.bit_budget import BitBudget
from q3q.config.arguments import JUDGE
from q3q.config.pages import hub_sources, page_of
from q3q.config.schema import DEMO_NAMES, TEXT_NAMES, UNTOUCHED_BITS
from q3q.data.texts import FROM_FILES
from q3q.errors import ConfigError
from q3q.placement import Placement, Trial
from q3q.quantize.methods.registry import settings_class
from q3q.quoting import launch, override
from q3q.spec import SELDOM_OF_SCHEME, TRACES, WRITTEN, CalibrationPart, ModelRef, TrialSpec


def command_of(trial: Trial) -> str:
    """Return the command that a person types to get this trial, with every setting that matters.

    A Hub model, text or method must still be what it was; the spec's id tells.
    """
    words = _quantization(trial)
    words += [override("export", trial.spec.export)] if trial.spec.export else []
    words += [override("data.path", trial.placement.data)] if trial.placement.data else []
    seed = override("seed", trial.spec.seed)
    return launch([*words, *_calibration(trial), *evaluation_words(trial), seed])


def export_command(trial: Trial, form: str) -> str:
    """Return the command that quantizes as the trial did and exports the model in a format.

    It measures nothing: the trial has.
    """
    words = [*_quantization(trial), override("export", form)]
    words += [override("data.path", trial.placement.data)] if trial.placement.data else []
    seed = override("seed", trial.spec.seed)
    return launch([*words, *_calibration(trial), "evaluation=none", seed])


def _quantization(trial: Trial) -> list[str]:
    spec, scheme = trial.spec, trial.spec.scheme
    words = [*_model(trial), override("method", spec.method.name), *_knobs(spec)]
    if scheme is not None:
        words += [override("bits", scheme.bits)] if spec.budget is None else _budget(spec.budget)
        words += [
            override("group_size", scheme.group_size),
            override("symmetric", scheme.symmetric),
            override("act_bits", scheme.act_bits or UNTOUCHED_BITS),
        ]
        newer = scheme.to_json()
        words += [override(key, newer[key]) for key in SELDOM_OF_SCHEME if key in newer]
    words += [override(key, patterns) for key, patterns in spec.rules.items()]
    words += [
        override(key, bits)
        for key in ("head_bits", "embedding_bits")
        if (bits := getattr(spec, key)) is not None
    ]
    words += [
        override(f"kv_{key}", value)
        for key, value in (spec.kv.to_json() if spec.kv else {}).items()
    ]
    return words


def judged_words(trial: Trial) -> list[str]:
    """Return the words for a checkpoint and the original that it is compared with."""
    spec, reference = trial.spec, trial.spec.reference
    assert reference is not None
    return [
        override("model", JUDGE),
        override("model.reference", _place(reference, trial.placement.reference)),
        override("model.source", _place(spec.model, trial.placement.model)),
        override("model.name", spec.model.name),
        override("model.dtype", spec.model.dtype),
        override("dtype", reference.dtype),
    ]


def _place(model: ModelRef, folder: Path | None) -> str:
    """Return how model=judge names a model; see `judged`."""
    if model.source is not None:
        return f"{model.source}@{model.revision}"
    return str(model.name if model.name in DEMO_NAMES else folder or "DIR")


def _model(trial: Trial) -> list[str]:
    if trial.spec.reference is not None:
        return judged_words(trial)
    model, dtype = trial.spec.model, override("dtype", trial.spec.model.dtype)
    if model.source is not None:
        revision = override("model.revision", model.revision)
        page = page_of(model.source)
        words = [override("model", page)] if page else _model_at("hub", "source", model.source)
        # Another model's name was accepted once; it is no part of the id, and is refused today.
        named = model.name is not None and model.name not in hub_sources()
        words += [override("model.name", model.name)] if named else []
        return [*words, revision, dtype]
    if model.name in DEMO_NAMES:
        return [override("model", model.name), dtype]
    folder = trial.placement.model or "DIR"
    return [*_model_at("local", "path", folder), override("model.name", model.name), dtype]


def _model_at(page: str, key: str, value: object) -> list[str]:
    return [override("model", page), override(f"model.{key}", value)]


def _knobs(spec: TrialSpec) -> list[str]:
    """Return the method's settings that differ from its defaults."""
    try:
        kind = settings_class(spec.method.name)
    except ConfigError:
        return []  # a method of a package that is not installed here
    if kind is None:
        return []
    defaults = dataclasses.asdict(kind())
    return [
        override(f"method.{key}", value)
        for key, value in spec.method.knobs.items()
        if key in defaults and value != defaults[key]
    ]


def _budget(budget: BitBudget) -> list[str]:
    key, limit = budget.given
    kept = ("unit", "measure", "samples", "length")
    return [
        override(f"budget.{key}", limit),
        *([] if budget.context is None else [override("context", budget.context)]),
        override("budget.widths", budget.widths),
        *(override(f"budget.{key}", getattr(budget, key)) for key in kept),
    ]


def _sensitivity_text(trial: Trial) -> list[str]:
    """Return what names the text on which sensitivities are measured, of a method without one."""
    budget = trial.spec.budget
    assert budget is not None
    words = [override("calibration", budget.source)]
    if budget.source in FROM_FILES:
        words.append(override("calibration.path", trial.placement.calibration or "FILE"))
    return words


def _calibration(trial: Trial) -> list[str]:
    calibration = trial.spec.calibration
    if calibration is None:
        return [] if trial.spec.budget is None else _sensitivity_text(trial)
    words, placement = [override("calibration", calibration.source)], trial.placement
    if calibration.source in FROM_FILES:
        words.append(override("calibration.path", placement.calibration or "FILE"))
    if calibration.parts:
        weights = {_source_of_part(part, placement): part.samples for part in calibration.parts}
        words.append(override("calibration.mix", weights))
    for traces in (part for part in calibration.every_part if part.source == TRACES):
        if traces.prompts is not None:
            file = placement.calibration_file(traces.digest) or "FILE"
            words.append(override("calibration.prompts", f"{traces.prompts}:{file}"))
        words.append(override("calibration.temperature", traces.temperature))
    draw = () if calibration.draw == WRITTEN else ("draw",)
    return words + [
        override(f"calibration.{key}", value)
        for key in ("samples", "length", *draw, "route")
        if (value := getattr(calibration, key)) is not None
    ]


def _source_of_part(part: CalibrationPart, placement: Placement) -> str:
    """Return a mix's source as it is typed: a name, or its kind and its file."""
    if part.source not in FROM_FILES:
        return part.source
    return f"{part.source}:{placement.calibration_file(part.digest) or 'FILE'}"


def evaluation_words(trial: Trial) -> list[str]:
    """Return the words for what the trial measures."""
    evaluation, placement = trial.spec.evaluation, trial.placement
    named = placement.texts or {}
    sources: list[object] = [
        {text.name: named[text.name]} if text.name in named else text.source or _source(text.name)
        for text in evaluation.texts
    ]
    words = ["evaluation=none", override("evaluation.texts", sources)]
    words.append(override("evaluation.tasks", evaluation.task_names))
    if "file" in sources:
        words.append(override("evaluation.path", placement.evaluation or "FILE"))
    if evaluation.texts:
        first = evaluation.texts[0]
        words += [
            override("evaluation.window", first.window),
            override("evaluation.limit", first.limit),
        ]
    facts = evaluation.to_json()
    for key in ("task_limit", "shots", "limits", "chat", "max_gen_toks", "quick"):
        if facts.get(key):
            words.append(override(f"evaluation.{key}", facts[key]))
    if evaluation.texts and evaluation.drift is None:
        words.append("evaluation.drift=false")
    elif isinstance(evaluation.drift, int):
        words.append(override("evaluation.drift_windows", evaluation.drift))
    if evaluation.include:
        words.append(override("evaluation.include_path", placement.tasks or "DIR"))
    return words


def _source(name: str) -> str:
    return next((source for source, shown in TEXT_NAMES.items() if shown == name), name)
