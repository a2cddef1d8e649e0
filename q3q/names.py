"""Names of trials for people, never the same for two trials of a list.

A plan, the progress of a sweep, a list of stored trials and a tracker's runs all name trials in
this way.
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence

from q3q.spec import Evaluation, TrialSpec, digest

LONGEST_VALUE = 40  # characters of a setting in a name
# Settings that tell people nothing where another one beside them differs as well.
OPAQUE = ("digest", "revision", "version", "lm_eval", "package", "include", "data", "overrides")
SHORT_DIGEST = 8  # characters of a digest


def trial_names(specs: Sequence[TrialSpec]) -> dict[str, str]:
    """Name each trial and its model, by the trial's id: `gptq w3 g128 seed 1 · demo`."""
    return {
        spec.id: f"{own} · {spec.model.label}"
        for spec, own in zip(specs, own_names(specs), strict=True)
    }


def own_names(specs: Sequence[TrialSpec]) -> list[str]:
    """Name each trial without its model, where a column of its own names that.

    Trials whose names would be equal get what differs between them too or, if no setting does that
    a name can hold, their ids.
    """
    namesakes: dict[str, dict[str, TrialSpec]] = {}
    for spec in specs:
        namesakes.setdefault(spec.label, {})[spec.id] = spec
    names: dict[str, str] = {}
    for group in namesakes.values():
        words = _differing_words(list(group.values()))
        for spec, own in zip(group.values(), words, strict=True):
            names[spec.id] = " ".join([spec.name, *own])
    models = {spec.id: spec.model.label for spec in specs}
    while True:
        counts = Counter((f"{names[key]} · {model}") for key, model in models.items())
        if max(counts.values(), default=1) == 1:
            return [names[spec.id] for spec in specs]
        for key, model in models.items():
            if counts[f"{names[key]} · {model}"] > 1:
                names[key] += f" {key}"


def _differing_words(specs: Sequence[TrialSpec]) -> list[list[str]]:
    """Return, for each trial, a word for each setting that differs between them."""
    if len(specs) == 1:
        return [[]]
    traits = [_traits(spec) for spec in specs]
    keys = list(dict.fromkeys(key for own in traits for key in own))
    differing = [key for key in keys if len({own.get(key) for own in traits}) > 1]

    def rows(keys: Sequence[str]) -> list[list[str]]:
        return [[_word(key, own[key]) for key in keys if key in own] for own in traits]

    for key in [key for key in differing if key.rpartition(".")[2] in OPAQUE]:
        without = [other for other in differing if other != key]
        if len(set(map(tuple, rows(without)))) == len(set(map(tuple, rows(differing)))):
            differing = without
    return rows(differing)


def _traits(spec: TrialSpec) -> dict[str, str]:
    """Return every setting that a name may hold, by dotted key; without those that are not given.

    A trial's own name has the method, bits, group and departures already.
    """
    parts: dict[str, Mapping[str, object]] = {
        "scheme": {
            "symmetric": spec.scheme and spec.scheme.symmetric,
            "scales": spec.scheme and spec.scheme.scales,
        },
        "model": spec.model.identity,
        "method": {key: value for key, value in spec.method.to_json().items() if key != "name"},
        "calibration": spec.calibration.traits() if spec.calibration else {},
        "mixed": {"overrides": spec.overrides or None, "skip": spec.skip or None},
        "evaluation": _measured(spec.evaluation),
        "trial": {"seed": spec.seed},
    }
    return {
        f"{part}.{key}": value if isinstance(value, str) else json.dumps(value, sort_keys=True)
        for part, settings in parts.items()
        for key, value in settings.items()
        if value is not None
    }


def _measured(evaluation: Evaluation) -> dict[str, object]:
    """Return an evaluation's settings, those of its texts as `4` or `stories:4,library:8`."""
    texts = evaluation.texts
    settings = {
        key: value
        for key, value in evaluation.to_json().items()
        if key not in ("texts", "tasks", "shots", "limits", "generates", "ends")
    }
    settings["texts"] = ",".join(text.name for text in texts) or "none"
    settings["tasks"] = ",".join(evaluation.task_names) or "none"
    for key in ("window", "limit", "draw", "samples", "source", "digest"):
        values = {text.name: getattr(text, key) for text in texts}
        several = len(set(values.values())) > 1
        each = [f"{name}:{value}" for name, value in values.items()]
        settings[key] = ",".join(each) if several else next(iter(values.values()), None)
    for key, chosen in (
        ("shots", {task.name: task.shots for task in evaluation.tasks}),
        ("limits", {task.name: task.limit for task in evaluation.tasks}),
    ):
        given = [f"{task}:{value}" for task, value in chosen.items() if value is not None]
        settings[key] = ",".join(given) or None
    settings["ends"] = ",".join(map(str, evaluation.ends)) or None
    return settings


def _word(key: str, value: str) -> str:
    """Return one setting as a word, without white space at its ends."""
    name = key.partition(".")[2]
    if name in OPAQUE and name not in ("version", "lm_eval", "package"):
        # The beginning of a digest says as much as the whole.
        value = (value if value.isalnum() else digest({"value": value}))[:SHORT_DIGEST]
    if len(value) > LONGEST_VALUE:
        value = f"{value[: LONGEST_VALUE - 1]}…"
    words = {
        "scheme.symmetric": "sym" if value == "true" else "asym",
        "model.dtype": value,
        "trial.seed": f"seed {value}",
        "evaluation.quick": "quick",
        "evaluation.source": f"text={value}",
        "evaluation.digest": f"text={value}",
        "evaluation.version": f"evaluation={value}",
        "evaluation.samples": f"windows={value}",
    }
    return words.get(key, f"{name}={value}").strip()
