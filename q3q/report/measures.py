"""A trial's metrics, and the names of trials, metrics and numbers for people.

Labels contain what differs between trials, so that two group sizes or knobs never share a name.
"""

import json
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from q3q.canonical import sha256
from q3q.evaluate.metrics import (
    accuracy_metric,
    held_out,
    mean_accuracy,
    mean_metrics,
    measures_text,
)
from q3q.evaluation import is_perplexity, is_share, value_in_words
from q3q.formatting import fixed
from q3q.names import SHORT_DIGEST
from q3q.number_formats import INT, own_form
from q3q.quantize.methods.registry import settings_class
from q3q.quantize.methods.settings import Appearance, MethodSettings
from q3q.record import TrialRecord
from q3q.report.sizes import SIZES, bits_of_weight
from q3q.spec import MEAN_ACCURACY, Evaluation, Json, Scheme, TrialSpec, text_metric

DIVERGED, FAILED, ABSENT = "diverged", "failed", "-"  # cells without a number
BITS_OF_TYPES = {"float32": 32, "bfloat16": 16, "float16": 16}
UNKNOWN_COMMIT = "unknown"
ACTIVATIONS = "scheme.act_bits"
FORMAT = "scheme.format"
SAID_BY_HEAD = ("model.dtype",)  # traits of an unquantized model in its label

Cell = float | str


def appearance_of(method: str) -> Appearance:
    """Return how a method is shown; the default if no installed package has it."""
    return (settings_class(method) or MethodSettings).appearance


def in_order(records: Iterable[TrialRecord]) -> list[TrialRecord]:
    """Return the latest record of each trial in the order of tables.

    By model; then the unquantized model, the yardstick, all others by label; then by bits.
    """
    latest = {record.spec.id: record for record in records}
    specs = [record.spec for record in latest.values()]
    keys = []
    for spec, label in zip(specs, labels(specs), strict=True):
        yardstick = appearance_of(spec.method.name).yardstick
        rank = 0 if spec.rounds_nothing else 1 if yardstick else 2
        keys.append((natural(spec.model.label), rank, natural(label), bits_of(spec), spec.id))
    return [latest[trial] for *_, trial in sorted(keys)]


def headline_metrics(records: Iterable[TrialRecord]) -> list[str]:
    """Return what the trials were asked to measure.

    These are each text's perplexity, the mean accuracy of several tasks, and each task's accuracy;
    for a task without accuracy all of its metrics.
    """
    records = list(records)
    measured = {name for record in records for name in (*record.metrics, *record.diverged)}
    texts = [metric for record in records for metric in text_metrics(record.spec)]
    tasks = []
    for spec, task in (
        (record.spec, task) for record in records for task in record.spec.evaluation.task_names
    ):
        accuracy = accuracy_metric(spec, task)
        start = "word_perplexity" if measures_text(task) else accuracy.removesuffix("acc")
        others = sorted(name for name in measured if name.startswith(start))
        tasks += [accuracy] if accuracy in measured or not others else others
    several = any(has_mean(record.spec) for record in records)
    return list(dict.fromkeys([*texts, *([MEAN_ACCURACY] if several else []), *tasks]))


def judged_metrics(records: Sequence[TrialRecord]) -> list[str]:
    """Return the metrics that methods are judged by, the one that ranks them first.

    These are each text's perplexity, and the mean accuracy or, of a single task, its accuracy.
    Texts of a kind that no trial is calibrated on come first: a method that fits its calibration
    text too closely looks good on that kind of text alone.
    """
    metrics = headline_metrics(records)
    texts = [name for name in metrics if is_perplexity(name)]
    tasks = [name for name in metrics if name.endswith("/acc")]
    specs = [record.spec for record in records]
    texts.sort(key=lambda metric: not held_out(metric, specs))
    return [*texts, *([MEAN_ACCURACY] if MEAN_ACCURACY in metrics else tasks[:1])]


def cell(record: TrialRecord, metric: str) -> Cell:
    """Return the metric, or `diverged`, `failed`, `-`. A failed trial's numbers do not count."""
    if metric == MEAN_ACCURACY:
        return _mean_accuracy(record)
    if not record.completed:
        return FAILED if _is_requested(record.spec, metric) else ABSENT
    if metric in record.diverged:
        return DIVERGED
    if metric in SIZES:
        size = bits_of_weight(record, metric)
        return ABSENT if size is None else size.value
    return float(record.metrics[metric]) if metric in record.metrics else ABSENT


def text_metrics(spec: TrialSpec) -> list[str]:
    """Return the perplexities that a trial is asked to measure."""
    quick = spec.evaluation.quick
    return [text_metric("perplexity", text.name, quick) for text in spec.evaluation.texts]


def is_better(value: float, other: float, metric: str) -> bool:
    return value < other if is_perplexity(metric) else value > other


def _is_requested(spec: TrialSpec, metric: str) -> bool:
    tasks = tuple(
        accuracy_metric(spec, task).removesuffix("acc") for task in spec.evaluation.task_names
    )
    return metric in (*text_metrics(spec), *SIZES) or metric.startswith(tasks)


def has_mean(spec: TrialSpec) -> bool:
    """Return True if a trial has several tasks, whose mean says more than each of them."""
    return len(mean_metrics(spec)) > 1


def _mean_accuracy(record: TrialRecord) -> Cell:
    cells = [cell(record, metric) for metric in mean_metrics(record.spec)]
    words = [content for content in cells if isinstance(content, str)]
    if len(cells) < 2 or ABSENT in words:
        return ABSENT
    mean = mean_accuracy(record.spec, record.metrics)
    return words[0] if words or mean is None else mean


def mean_of_numbers(values: Sequence[float]) -> float:
    """Return the mean of the values that are not nan; nan if there are none."""
    numbers = [value for value in values if not math.isnan(value)]
    return math.fsum(numbers) / len(numbers) if numbers else math.nan


def shown(content: Cell, metric: str) -> str:
    """Format a cell."""
    if isinstance(content, str):
        return content
    return fixed(content, 2) if metric in SIZES else value_in_words(content, metric)


def interval(record: TrialRecord, metric: str) -> tuple[float, float] | None:
    """Return the metric's 95 % interval, None if it has none or the trial failed.

    For the mean over tasks, the tasks' half widths add in squares, as errors of independent
    questions do.
    """
    mean = cell(record, metric)
    if not isinstance(mean, float):
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
    return mean - below, mean + above


def seconds(record: TrialRecord) -> float | None:
    """Return the seconds of all phases together, None if none was timed."""
    phases = [value for name, value in record.metrics.items() if name.startswith("seconds/")]
    return round(math.fsum(phases), 3) if phases else None


def bits_of(spec: TrialSpec) -> int:
    """Return the bits of a weight; of an unquantized model, those of the type it computes in."""
    if spec.scheme is not None:
        return spec.scheme.bits
    return BITS_OF_TYPES.get(spec.model.dtype, 16)


def given_format(record: TrialRecord) -> str:
    """Return the format of a checkpoint that was quantized before it was given; else nothing.

    Records of earlier versions do not know.
    """
    stored = record.notes.get("stored", {})
    return str(stored.get("quantized") or "") if isinstance(stored, dict) else ""


def is_reference(record: TrialRecord) -> bool:
    """Return True for a trial of the unquantized model."""
    return record.spec.rounds_nothing and not given_format(record)


def bits_of_record(record: TrialRecord) -> int:
    """Return the bits of a weight; of a checkpoint that was given quantized, those it has."""
    stored = record.metrics.get("bits_per_weight") if given_format(record) else None
    return bits_of(record.spec) if stored is None else math.floor(stored)


def is_base(spec: TrialSpec) -> bool:
    return bool(re.search(r"[-_]base$", spec.model.label, re.IGNORECASE))


def commit_of(record: TrialRecord) -> str:
    """Return the commit of the code that ran the trial."""
    return str(record.environment.get("git_commit") or UNKNOWN_COMMIT)


def by_model(records: Iterable[TrialRecord]) -> dict[str, list[TrialRecord]]:
    """Group records by model and keep their order."""
    groups: dict[str, list[TrialRecord]] = {}
    for record in records:
        groups.setdefault(record.spec.model.label, []).append(record)
    return groups


def labels(
    specs: Sequence[TrialSpec],
    metric: str | None = None,
    *,
    seeds: bool = True,
    models: bool = True,
    shared: Collection[str] = (),
) -> list[str]:
    """Label each trial with its method and what differs between these trials, bits excepted.

    Examples are `gptq g64 damping=0.05` and `unquantized float32`. Knobs, calibration, symmetry
    and activations are compared within a method, since each method has its own defaults; traits of
    a model within its name; all else between all trials. Quantized activations are named wherever
    other trials have none.

    Args:
        metric: include how this metric was evaluated.
        seeds: include seeds that differ.
        models: include model names that differ.
        shared: traits, by dotted key, that are named elsewhere.
    """
    traits = [
        {
            key: value
            for key, value in (
                traits_of(spec, metric)
                | ({"trial.seed": str(spec.seed)} if seeds else {})
                | ({"model.name": spec.model.label} if models else {})
            ).items()
            if key not in shared
        }
        for spec in specs
    ]
    words = _differing_words(specs, traits)
    return [" ".join([_head(spec), *own]) for spec, own in zip(specs, words, strict=True)]


def _head(spec: TrialSpec) -> str:
    """Return the method, or `unquantized` with the type that the model computes in."""
    return spec.method.name if spec.scheme else f"unquantized {spec.model.dtype}"


def _differing_words(
    specs: Sequence[TrialSpec], traits: Sequence[Mapping[str, str]]
) -> list[list[str]]:
    """Return the words that tell each trial from the others; see `labels`."""
    values: dict[tuple[str, str], set[str]] = {}
    for own, spec in zip(traits, specs, strict=True):
        for key, value in own.items():
            values.setdefault((scope_of(key, spec), key), set()).add(value)
    differing = {place for place, distinct in values.items() if len(distinct) > 1}
    activations = {own[ACTIVATIONS] for own in traits if ACTIVATIONS in own}

    def is_named(key: str, value: str, spec: TrialSpec, differing: set[tuple[str, str]]) -> bool:
        if spec.scheme is None and key in SAID_BY_HEAD:
            return False
        rounded = key == ACTIVATIONS and value != "null" and len(activations) > 1
        if key == FORMAT:
            return value != INT
        return rounded or (scope_of(key, spec), key) in differing

    def rows(differing: set[tuple[str, str]]) -> list[list[str]]:
        return [
            [
                word
                for key, value in own.items()
                if is_named(key, value, spec, differing) and (word := _word(key, value))
            ]
            for own, spec in zip(traits, specs, strict=True)
        ]

    def count(differing: set[tuple[str, str]]) -> int:
        named = zip(map(_head, specs), rows(differing), strict=True)
        return len({(head, *words) for head, words in named})

    # A digest tells people nothing where a name beside it differs as well.
    for key in sorted({key for _, key in differing if key.endswith((".digest", ".revision"))}):
        without = {(scope, name) for scope, name in differing if name != key}
        if count(without) == count(differing):
            differing = without
    return rows(differing)


def traits_of(spec: TrialSpec, metric: str | None) -> dict[str, str]:
    """Return what a label may name, by dotted key; values are as one would type them."""
    parts: dict[str, Json] = {
        "scheme": {} if spec.scheme is None else _scheme_traits(spec.scheme),
        "model": spec.model.identity,
        "method": {key: value for key, value in spec.method.to_json().items() if key != "name"},
        "calibration": spec.calibration.traits() if spec.calibration else {},
        "mixed": {"settings": spec.departures},
    }
    if metric is not None and metric not in SIZES:
        parts["evaluation"] = asked_of(spec.evaluation, metric)
    return {
        f"{part}.{key}": value if isinstance(value, str) else json.dumps(value)
        for part, entries in parts.items()
        for key, value in entries.items()
    }


def _scheme_traits(scheme: Scheme) -> Json:
    """Return what a label may name of a scheme; nothing that its format says already."""
    form = own_form(scheme.format)
    traits: Json = {"format": INT if form is None else scheme.codes}
    if form is None or form.group_size is None:
        traits["group_size"] = scheme.group_size if scheme.group_rows == 1 else scheme.groups
    if form is None:
        traits["symmetric"] = scheme.symmetric
    plain = scheme.act_bits is None or (scheme.act_format == INT and scheme.act_group_size == -1)
    traits["act_bits"] = scheme.act_bits if plain else scheme.activations.removeprefix("a")
    return traits


def asked_of(evaluation: Evaluation, metric: str) -> Json:
    """Return the settings of an evaluation that a metric depends on, by their names in its JSON."""
    measure, _, name = metric.partition("/")
    for text in evaluation.texts:
        if text.name == name:
            drift = {} if is_perplexity(metric) else {"drift": evaluation.drift}
            return text.to_json() | drift
    facts = evaluation.to_json()
    settings = {key: facts.get(key) for key in ("task_limit", "chat", "include")}
    if metric == MEAN_ACCURACY:
        data = json.dumps(facts.get("data", {}), sort_keys=True)  # of all tasks
        settings |= {key: facts.get(key) for key in ("tasks", "shots", "limits")}
        return settings | {"data.digest": sha256(data)[:8]}
    task = measure.removesuffix("_quick")
    return settings | {key: facts.get(key, {}).get(task) for key in ("shots", "limits")}


def scope_of(key: str, spec: TrialSpec) -> str:
    """Return the group of trials within which a trait is compared."""
    if key == "model.name":
        return ""
    if key.startswith("model."):
        return spec.model.label
    own = key.startswith(("method.", "calibration.")) or key in ("scheme.symmetric", ACTIVATIONS)
    return spec.method.name if own else ""


def _word(key: str, value: str) -> str:
    """Return one trait as a word of a label; empty for what needs no word."""
    name = key.rpartition(".")[2]
    words = {
        FORMAT: value,
        "scheme.group_size": "pc" if value == "-1" else f"g{value}" if value.isdigit() else value,
        "scheme.symmetric": "sym" if value == "true" else "asym",
        ACTIVATIONS: f"a{'16' if value == 'null' else value}",
        "mixed.settings": value,
        "model.name": value,
        "model.dtype": value,
        "evaluation.data.digest": f"data={value}",
        "trial.seed": f"seed {value}",
    }
    if name in ("digest", "revision", "include"):
        value = value[:SHORT_DIGEST]
    return words.get(key, f"{name}={value}")


def natural(text: str) -> list[tuple[int, int, str]]:
    """Return a sort key that puts g64 before g128."""
    return [
        (0, int(part), "") if part.isdigit() else (1, 0, part)
        for part in re.split(r"(\d+)", text)
        if part
    ]


def title(metric: str) -> str:
    """Return a metric in words, with its unit and whether lower or higher is better."""
    if is_perplexity(metric):
        kind, _, text = metric.partition("/")
        quick = ", a quick look" if kind.endswith("_quick") else ""
        return f"perplexity of {text} (lower is better{quick})"
    if metric == MEAN_ACCURACY:
        return "mean accuracy, % (higher is better)"
    if is_share(metric):
        task, _, name = metric.rpartition("/")
        return f"{'accuracy' if name == 'acc' else name} on {task}, % (higher is better)"
    return {
        "bits_per_weight": "bits per quantized weight, with scales and zero points",
        "bits_per_weight_model": "bits per weight of the whole model",
    }.get(metric, metric)


def short(metric: str) -> str:
    """Return a metric as the head of a column."""
    if metric == MEAN_ACCURACY:
        return "mean accuracy, %"
    if is_perplexity(metric):
        return f"perplexity, {metric.partition('/')[2]}"
    return f"{metric.removesuffix('/acc')}, %"
