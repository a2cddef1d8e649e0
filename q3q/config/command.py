"""The command that runs a trial again, read off its spec alone."""

import dataclasses
import json
import re
import shlex
from typing import Any

from q3q.config.schema import DEMO_NAMES, TEXT_NAMES, UNTOUCHED_BITS
from q3q.errors import ConfigError
from q3q.placement import Trial
from q3q.quantize.methods.registry import settings_class
from q3q.spec import TrialSpec


def command_of(trial: Trial) -> str:
    """Return the command that a person types to get this trial, with every setting that matters.

    A Hub model, text or method must still be what it was; the spec's id tells.
    """
    spec, scheme = trial.spec, trial.spec.scheme
    words = ["python", "launch.py", *_model(trial), f"method={spec.method.name}", *_knobs(spec)]
    if scheme is not None:
        words += [
            f"bits={scheme.bits}",
            f"group_size={scheme.group_size}",
            f"symmetric={_value(scheme.symmetric)}",
            f"act_bits={scheme.act_bits or UNTOUCHED_BITS}",
        ]
    words += [f"{key}={_value(patterns)}" for key, patterns in spec.rules.items() if patterns]
    words += [
        f"{key}={bits}"
        for key in ("head_bits", "embedding_bits")
        if (bits := getattr(spec, key)) is not None
    ]
    words += [f"export={spec.export}"] if spec.export else []
    words += [f"data.path={trial.placement.data}"] if trial.placement.data else []
    return shlex.join([*words, *_calibration(trial), *_evaluation(trial), f"seed={spec.seed}"])


def _model(trial: Trial) -> list[str]:
    model, dtype = trial.spec.model, f"dtype={trial.spec.model.dtype}"
    name = str(model.name)
    if model.source is not None:
        revision = f"model.revision={model.revision}"
        if name != "local":
            return [f"model={name}", revision, dtype]
        return ["model=local", f"model.source={model.source}", revision, dtype]
    if name in DEMO_NAMES:
        return [f"model={name}", dtype]
    folder = trial.placement.model or "DIR"
    return ["model=local", f"model.path={folder}", f"model.name={name}", dtype]


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
        f"method.{key}={_value(value)}"
        for key, value in spec.method.knobs.items()
        if key in defaults and value != defaults[key]
    ]


def _calibration(trial: Trial) -> list[str]:
    calibration = trial.spec.calibration
    if calibration is None:
        return []
    words = [f"calibration={calibration.source}"]
    if calibration.source == "file":
        words.append(f"calibration.path={trial.placement.calibration or 'FILE'}")
    return words + [
        f"calibration.{key}={value}"
        for key in ("samples", "length", "draw", "route")
        if (value := getattr(calibration, key)) is not None
    ]


def _evaluation(trial: Trial) -> list[str]:
    evaluation, placement = trial.spec.evaluation, trial.placement
    sources = [text.source or _source(text.name) for text in evaluation.texts]
    words = ["evaluation=none", f"evaluation.texts=[{','.join(sources)}]"]
    words.append(f"evaluation.tasks=[{','.join(evaluation.task_names)}]")
    if "file" in sources:
        words.append(f"evaluation.path={placement.evaluation or 'FILE'}")
    if evaluation.texts:
        first = evaluation.texts[0]
        words += [f"evaluation.window={first.window}", f"evaluation.limit={_value(first.limit)}"]
    facts = evaluation.to_json()
    for key in ("task_limit", "shots", "limits", "chat", "max_gen_toks", "quick"):
        if facts.get(key):
            words.append(f"evaluation.{key}={_value(facts[key])}")
    if evaluation.texts and evaluation.drift is None:
        words.append("evaluation.drift=false")
    elif isinstance(evaluation.drift, int):
        words.append(f"evaluation.drift_windows={evaluation.drift}")
    if evaluation.include:
        words.append(f"evaluation.include_path={placement.tasks or 'DIR'}")
    return words


def _source(name: str) -> str:
    return next((source for source, shown in TEXT_NAMES.items() if shown == name), name)


def _value(value: Any) -> str:
    """Write a value as Hydra's grammar reads it."""
    if isinstance(value, dict):
        items = ",".join(f"{_key(str(key))}:{_value(inner)}" for key, inner in value.items())
        return f"{{{items}}}"
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _key(name: str) -> str:
    """Quote a key only where Hydra would read it otherwise."""
    return f'"{name}"' if re.search(r"[\[\](){},:=]", name) else name
