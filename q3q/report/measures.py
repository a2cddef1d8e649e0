"""What a trial says of a metric, and how people call the trial, the metric and its numbers.

What differs between trials stands in their labels, so that two group sizes or knobs never share a name.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from q3q.record import TrialRecord
from q3q.spec import MEAN_ACCURACY, WORD_TASK, TrialSpec, accuracy_metric, mean_metrics, text_metric

DIVERGED, FAILED, ABSENT = "diverged", "failed", "-"  # cells that hold no number
UNQUANTIZED_BITS = 16  # the column of the unquantized model
SIZES = ("bits_per_weight", "bits_per_weight_model")
UNKNOWN_COMMIT = "unknown"
ACTIVATIONS = "scheme.act_bits"

Cell = float | str


def in_order(records: Iterable[TrialRecord]) -> list[TrialRecord]:
    """Each trial once, its latest record: by model, the reference first, then the yardstick, then by name and bits."""
    latest = {record.spec.id: record for record in records}
    places = []
    for trial, label in zip(
        latest, labels([record.spec for record in latest.values()]), strict=True
    ):
        spec = latest[trial].spec
        first = {"none": 0, "rtn": 1}.get(str(spec.method["name"]), 2)
        places.append((natural(model_name(spec)), first, natural(label), bits_of(spec), trial))
    return [latest[trial] for *_, trial in sorted(places)]


def headline_metrics(records: Iterable[TrialRecord]) -> list[str]:
    """What the trials were asked for: the perplexity of each text, the mean accuracy of several tasks, each task's.

    A task that has no accuracy is told by all of its metrics.
    """
    records = list(records)
    seen = {name for record in records for name in (*record.metrics, *record.diverged)}
    texts = [metric for record in records for metric in text_metrics(record.spec)]
    tasks = []
    for spec, task in (
        (record.spec, task)
        for record in records
        for task in record.spec.evaluation.get("tasks", [])
    ):
        accuracy = accuracy_metric(spec, task)
        start = "word_perplexity" if task == WORD_TASK else accuracy.removesuffix("acc")
        others = sorted(name for name in seen if name.startswith(start))
        tasks += [accuracy] if accuracy in seen or not others else others
    several = any(len(mean_metrics(record.spec)) > 1 for record in records)
    return list(dict.fromkeys([*texts, *([MEAN_ACCURACY] if several else []), *tasks]))


def cell(record: TrialRecord, metric: str) -> Cell:
    """The metric as a number, or `diverged`, `failed`, `-`. A failed trial's numbers are not to be trusted."""
    if metric == MEAN_ACCURACY:
        return _mean_accuracy(record)
    if not record.completed:
        return FAILED if _asked(record.spec, metric) else ABSENT
    if metric in record.diverged:
        return DIVERGED
    return float(record.metrics[metric]) if metric in record.metrics else ABSENT


def text_metrics(spec: TrialSpec) -> list[str]:
    """The perplexities that a trial was asked for."""
    quick = bool(spec.evaluation.get("quick"))
    return [
        text_metric("perplexity", text["name"], quick) for text in spec.evaluation.get("texts", [])
    ]


def is_perplexity(metric: str) -> bool:
    return metric.partition("/")[0] in ("perplexity", "perplexity_quick")


def is_accuracy(metric: str) -> bool:
    return metric == MEAN_ACCURACY or metric.endswith("/acc")


def _asked(spec: TrialSpec, metric: str) -> bool:
    tasks = tuple(
        accuracy_metric(spec, task).removesuffix("acc") for task in spec.evaluation.get("tasks", [])
    )
    return metric in (*text_metrics(spec), *SIZES) or metric.startswith(tasks)


def _mean_accuracy(record: TrialRecord) -> Cell:
    cells = [cell(record, metric) for metric in mean_metrics(record.spec)]
    words = [found for found in cells if isinstance(found, str)]
    if not cells or ABSENT in words:
        return ABSENT
    return words[0] if words else math.fsum(map(float, cells)) / len(cells)


def shown(found: Cell, metric: str) -> str:
    """A cell for people: perplexity to four digits, accuracy in percent."""
    if isinstance(found, str):
        return found
    if metric == MEAN_ACCURACY or metric.endswith(("/acc", "/acc_norm")):
        return f"{100 * found:.1f}"
    if metric in SIZES:
        return f"{found:.2f}"
    return f"{found:#.4g}".rstrip(".") if 1e-3 <= abs(found) < 1e4 else f"{found:.2e}"


def shown_of(record: TrialRecord, metric: str) -> str:
    return shown(cell(record, metric), metric)


def interval(record: TrialRecord, metric: str) -> tuple[float, float] | None:
    """The metric's 95 % interval; None for one that has none, or that is not to be trusted.

    Of the tasks' mean: the half widths of the tasks add in squares, as errors of independent questions do.
    """
    if not isinstance(cell(record, metric), float):
        return None
    if metric != MEAN_ACCURACY:
        return record.intervals.get(metric)
    names = mean_metrics(record.spec)
    if not all(name in record.intervals for name in names):
        return None
    below, above = (
        math.sqrt(
            math.fsum((record.metrics[name] - record.intervals[name][end]) ** 2 for name in names)
        )
        / len(names)
        for end in (0, 1)
    )
    mean = float(cell(record, metric))
    return mean - below, mean + above


def seconds(record: TrialRecord) -> float | None:
    """Of all phases together; None if none was timed."""
    phases = [value for name, value in record.metrics.items() if name.startswith("seconds/")]
    return round(math.fsum(phases), 3) if phases else None


def bits_of(spec: TrialSpec) -> int:
    return UNQUANTIZED_BITS if spec.scheme is None else spec.scheme.bits


def model_name(spec: TrialSpec) -> str:
    return str(spec.model.get("name") or spec.model.get("source"))


def is_base(spec: TrialSpec) -> bool:
    return bool(re.search(r"[-_]base$", model_name(spec), re.IGNORECASE))


def by_model(records: Iterable[TrialRecord]) -> dict[str, list[TrialRecord]]:
    """The records of each model, in the order in which they come."""
    found: dict[str, list[TrialRecord]] = {}
    for record in records:
        found.setdefault(model_name(record.spec), []).append(record)
    return found


def labels(
    specs: Sequence[TrialSpec],
    metric: str | None = None,
    *,
    seeds: bool = True,
    models: bool = True,
) -> list[str]:
    """For each trial its method, and of everything but bits what differs between these trials: `gptq g64 damping=0.05`.

    Knobs, calibration, symmetry and activations are compared within a method (each has defaults of its own), what a
    model is within its name, all else between all trials. Quantized activations are told wherever others have none.
    metric: also tell apart how its text or tasks were evaluated. seeds, models: whether seed and model's name are told.
    """
    traits = [
        _traits(spec, metric)
        | ({"trial.seed": str(spec.seed)} if seeds else {})
        | ({"model.name": model_name(spec)} if models else {})
        for spec in specs
    ]
    values: dict[tuple[str, str], set[str]] = {}
    for mine, spec in zip(traits, specs, strict=True):
        for key, value in mine.items():
            values.setdefault((_scope(key, spec), key), set()).add(value)
    telling = {place for place, found in values.items() if len(found) > 1}
    activations = {mine[ACTIVATIONS] for mine in traits if ACTIVATIONS in mine}

    def tells(key: str, value: str, spec: TrialSpec, telling: set[tuple[str, str]]) -> bool:
        rounded = key == ACTIVATIONS and value != "null" and len(activations) > 1
        return rounded or (_scope(key, spec), key) in telling

    def rows(telling: set[tuple[str, str]]) -> list[str]:
        return [
            " ".join(
                [
                    str(spec.method["name"]),
                    *(
                        _word(key, mine[key])
                        for key in mine
                        if tells(key, mine[key], spec, telling)
                    ),
                ]
            )
            for mine, spec in zip(traits, specs, strict=True)
        ]

    # A digest tells people nothing where a name beside it differs as well.
    for key in sorted({key for _, key in telling if key.endswith((".digest", ".revision"))}):
        without = {(scope, name) for scope, name in telling if name != key}
        if len(set(rows(without))) == len(set(rows(telling))):
            telling = without
    return rows(telling)


def _traits(spec: TrialSpec, metric: str | None) -> dict[str, str]:
    """All that may tell a trial from others in a label, by dotted key; values as one would type them."""
    stored = () if spec.scheme is None else ("group_size", "symmetric", "act_bits")
    parts: dict[str, Mapping[str, Any]] = {
        "scheme": {key: getattr(spec.scheme, key) for key in stored},
        "model": {key: value for key, value in spec.model.items() if key != "name"},
        "method": {key: value for key, value in spec.method.items() if key != "name"},
        "calibration": spec.calibration or {},
        "mixed": {"settings": spec.departures},
    }
    if metric is not None and metric not in SIZES:
        parts["evaluation"] = _conditions(spec.evaluation, metric)
    return {
        f"{part}.{key}": value if isinstance(value, str) else json.dumps(value)
        for part, entries in parts.items()
        for key, value in entries.items()
    }


def _conditions(wanted: Mapping[str, Any], metric: str) -> dict[str, Any]:
    """Under which settings of the evaluation a metric is measured."""
    measure, _, text = metric.partition("/")
    for one in wanted.get("texts", []):
        if one["name"] == text:
            return dict(one) if is_perplexity(metric) else {**one, "drift": wanted.get("drift")}
    asked = {key: wanted.get(key) for key in ("task_limit", "chat", "include")}
    if metric == MEAN_ACCURACY:
        return (
            asked
            | {key: wanted.get(key) for key in ("tasks", "shots", "limits")}
            | _data_of(wanted)
        )
    task = measure.removesuffix("_quick")
    return asked | {key: wanted.get(key, {}).get(task) for key in ("shots", "limits")}


def _data_of(wanted: Mapping[str, Any]) -> dict[str, str]:
    """All data sets of the tasks as one digest."""
    known = json.dumps(wanted.get("data", {}), sort_keys=True)
    return {"data.digest": hashlib.sha256(known.encode()).hexdigest()[:8]}


def _scope(key: str, spec: TrialSpec) -> str:
    """Within what a trait is compared."""
    if key == "model.name":
        return ""
    if key.startswith("model."):
        return model_name(spec)
    own = key.startswith(("method.", "calibration.")) or key in ("scheme.symmetric", ACTIVATIONS)
    return str(spec.method["name"]) if own else ""


def _word(key: str, value: str) -> str:
    """One trait in a label."""
    name = key.rpartition(".")[2]
    words = {
        "scheme.group_size": "pc" if value == "-1" else f"g{value}",
        "scheme.symmetric": "sym" if value == "true" else "asym",
        ACTIVATIONS: f"a{UNQUANTIZED_BITS if value == 'null' else value}",
        "mixed.settings": value or "uniform",
        "model.name": value,
        "model.dtype": value,
        "evaluation.data.digest": f"data={value}",
        "trial.seed": f"seed {value}",
    }
    return words.get(key, f"{name}={value}")


def natural(text: str) -> list[tuple[int, int, str]]:
    """A sort key under which g64 comes before g128."""
    return [
        (0, int(part), "") if part.isdigit() else (1, 0, part)
        for part in re.split(r"(\d+)", text)
        if part
    ]


def title(metric: str) -> str:
    """A metric in words, with its unit and its good direction."""
    if is_perplexity(metric):
        kind, _, text = metric.partition("/")
        return f"perplexity of {text} (lower is better{', a quick look' if kind.endswith('_quick') else ''})"
    if metric == MEAN_ACCURACY:
        return "mean accuracy of the tasks, % (higher is better)"
    if metric.endswith(("/acc", "/acc_norm")):
        task, _, name = metric.rpartition("/")
        return f"{'accuracy' if name == 'acc' else name} on {task}, % (higher is better)"
    return {
        "bits_per_weight": "bits per quantized weight, with scales and zero points",
        "bits_per_weight_model": "bits per weight of the whole model",
    }.get(metric, metric)


def commit_of(record: TrialRecord) -> str:
    """The version of the code that measured it."""
    return str(record.environment.get("git_commit") or UNKNOWN_COMMIT)


def trial_names(specs: Sequence[TrialSpec]) -> dict[str, str]:
    """What each trial is called among these, by its id: `gptq w3 g128 · demo`.

    Those that would be called alike have also what differs between them, or if no label says that their ids.
    """
    alike: dict[str, list[TrialSpec]] = {}
    for spec in specs:
        alike.setdefault(f"{spec.name} · {model_name(spec)}", []).append(spec)
    found: dict[str, str] = {}
    for name, mine in alike.items():
        words = [label.partition(" ")[2] for label in labels(mine)]
        for spec, told in zip(mine, words, strict=True):
            own = (
                f"{spec.name} {told}" if words.count(told) == 1 else f"{spec.name} {told} {spec.id}"
            )
            found[spec.id] = (
                name if len(mine) == 1 else f"{' '.join(own.split())} · {model_name(spec)}"
            )
    return found


def is_better(ours: float, theirs: float, metric: str) -> bool:
    return ours < theirs if is_perplexity(metric) else ours > theirs


def judged_metrics(records: Sequence[TrialRecord]) -> list[str]:
    """What a method is judged by: the perplexity of each text, and the mean accuracy, or the one task's."""
    metrics = headline_metrics(records)
    texts = [name for name in metrics if is_perplexity(name)]
    tasks = (
        [MEAN_ACCURACY]
        if MEAN_ACCURACY in metrics
        else [name for name in metrics if name.endswith("/acc")]
    )
    return [*texts, *tasks[:1]]


def short(metric: str) -> str:
    """A metric as the head of a column."""
    if metric == MEAN_ACCURACY:
        return "mean accuracy, %"
    if is_perplexity(metric):
        return f"perplexity, {metric.partition('/')[2]}"
    return f"{metric.removesuffix('/acc')}, %"
