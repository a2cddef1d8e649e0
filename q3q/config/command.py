"""The command that runs a trial again, read off its spec alone."""

import dataclasses
import json
import re
import shlex
from typing import Any

from q3q.config.schema import DEMO_NAMES, TEXT_NAMES, UNTOUCHED_BITS
from q3q.errors import ConfigError
from q3q.quantize.methods.registry import settings_class
from q3q.spec import TrialSpec


def command_of(spec: TrialSpec) -> str:
    """What a person types to get this trial, every setting that matters spelt out.

    A Hub model, text or method must still be what it was; the spec's id says whether it is.
    """
    words = ["python", "launch.py", *_model(spec), f"method={spec.method['name']}", *_knobs(spec)]
    scheme = spec.scheme
    if scheme is not None:
        words += [
            f"bits={scheme.bits}",
            f"group_size={scheme.group_size}",
            f"symmetric={_value(scheme.symmetric)}",
        ]
        words.append(f"act_bits={scheme.act_bits or UNTOUCHED_BITS}")
    rules = spec.rules
    if rules.get("overrides"):
        words.append(f"overrides={_value(rules['overrides'])}")
    if rules.get("skip"):
        words.append(f"skip={_value(list(rules['skip']))}")
    words += [
        f"{key}={bits}"
        for key in ("head_bits", "embedding_bits")
        if (bits := getattr(spec, key)) is not None
    ]
    words += [f"export={spec.export}"] if spec.export else []
    words += [f"data.path={spec.places['data']}"] if "data" in spec.places else []
    return shlex.join([*words, *_calibration(spec), *_evaluation(spec), f"seed={spec.seed}"])


def _model(spec: TrialSpec) -> list[str]:
    name, dtype = str(spec.model.get("name")), f"dtype={spec.model['dtype']}"
    if "source" in spec.model:
        if name != "local":
            return [f"model={name}", f"model.revision={spec.model['revision']}", dtype]
        return [
            "model=local",
            f"model.source={spec.model['source']}",
            f"model.revision={spec.model['revision']}",
            dtype,
        ]
    if name in DEMO_NAMES:
        return [f"model={name}", dtype]
    return [
        "model=local",
        f"model.path={spec.places.get('model', 'DIR')}",
        f"model.name={name}",
        dtype,
    ]


def _knobs(spec: TrialSpec) -> list[str]:
    """The method's settings that differ from its defaults."""
    try:
        kind = settings_class(str(spec.method["name"]))
    except ConfigError:
        return []  # a method of a package that is not installed here
    if kind is None:
        return []
    defaults = dataclasses.asdict(kind())
    return [
        f"method.{key}={_value(value)}"
        for key, value in spec.method.items()
        if key in defaults and key != "name" and value != defaults[key]
    ]


def _calibration(spec: TrialSpec) -> list[str]:
    wanted = spec.calibration
    if wanted is None:
        return []
    words = [f"calibration={wanted['source']}"]
    if wanted["source"] == "file":
        words.append(f"calibration.path={spec.places.get('calibration', 'FILE')}")
    return words + [
        f"calibration.{key}={wanted[key]}"
        for key in ("samples", "length", "draw", "route")
        if wanted.get(key) is not None
    ]


def _evaluation(spec: TrialSpec) -> list[str]:
    wanted = spec.evaluation
    sources = [text.get("source") or _source(text["name"]) for text in wanted["texts"]]
    words = ["evaluation=none", f"evaluation.texts=[{','.join(sources)}]"]
    words.append(f"evaluation.tasks=[{','.join(wanted['tasks'])}]")
    if "file" in sources:
        words.append(f"evaluation.path={spec.places.get('evaluation', 'FILE')}")
    if wanted["texts"]:
        words += [
            f"evaluation.window={wanted['texts'][0]['window']}",
            f"evaluation.limit={_limit(wanted['texts'][0])}",
        ]
    for key in ("task_limit", "shots", "limits", "chat", "max_gen_toks", "quick"):
        if wanted.get(key):
            words.append(f"evaluation.{key}={_value(wanted[key])}")
    drift = wanted.get("drift")
    if wanted["texts"] and drift is None:
        words.append("evaluation.drift=false")
    elif isinstance(drift, int):
        words.append(f"evaluation.drift_windows={drift}")
    if wanted.get("include"):
        words.append(f"evaluation.include_path={spec.places.get('tasks', 'DIR')}")
    return words


def _source(name: str) -> str:
    return next((source for source, shown in TEXT_NAMES.items() if shown == name), name)


def _limit(text: dict[str, Any]) -> str:
    return _value(text.get("limit"))


def _value(value: Any) -> str:
    """As Hydra's grammar reads it."""
    if isinstance(value, dict):
        return (
            "{"
            + ",".join(f"{_key(str(key))}:{_value(inner)}" for key, inner in value.items())
            + "}"
        )
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))


def _key(name: str) -> str:
    """Quoted only where Hydra would read it otherwise."""
    return f'"{name}"' if re.search(r"[\[\](){},:=]", name) else name
