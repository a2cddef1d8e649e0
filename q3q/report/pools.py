"""Groups of trials: those that may be compared, and those that differ in nothing but their seed.

Trials that differ only in the seed count as one, by their mean and standard deviation.
"""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from q3q.evaluate.identities import conditions_of
from q3q.evaluation import is_accuracy
from q3q.formatting import plural, with_spread
from q3q.record import TrialRecord
from q3q.report.measures import (
    ABSENT,
    DIVERGED,
    FAILED,
    Cell,
    bits_of_record,
    by_model,
    cell,
    given_format,
    in_order,
    interval,
    is_reference,
    labels,
    shown,
)
from q3q.spec import Json, TrialSpec, digest

LONGEST_WORDS = 60  # characters of a setting in a name that tells evaluations apart


@dataclass(frozen=True)
class Pool:
    """A trial, or several that differ in nothing but their seed.

    label: the method, and what differs from other pools, bits excepted.
    """

    label: str
    records: tuple[TrialRecord, ...]

    @property
    def spec(self) -> TrialSpec:
        return self.records[0].spec

    @property
    def bits(self) -> int:
        return bits_of_record(self.records[0])

    @property
    def is_reference(self) -> bool:
        """Is this the unquantized model?"""
        return is_reference(self.records[0])

    @property
    def name(self) -> str:
        """The label with the bits."""
        return self.label if self.is_reference else f"{self.label}, {plural(self.bits, 'bit')}"

    def values(self, metric: str) -> list[float]:
        """Return the numbers, one for each seed that has one."""
        cells = (cell(record, metric) for record in self.records)
        return [content for content in cells if isinstance(content, float)]

    def cell(self, metric: str) -> Cell:
        """Return the mean over seeds; `diverged` if a seed diverged. Failed seeds do not count."""
        words = {cell(record, metric) for record in self.records}
        numbers = self.values(metric)
        if DIVERGED in words or not numbers:
            return next(word for word in (DIVERGED, FAILED, ABSENT) if word in words)
        return math.fsum(numbers) / len(numbers)

    def spread(self, metric: str) -> float | None:
        """Return the standard deviation over seeds; None if there is a single one."""
        numbers = self.values(metric)
        several = len(numbers) > 1 and isinstance(self.cell(metric), float)
        return statistics.stdev(numbers) if several else None

    def shown(self, metric: str, *, intervals: bool = False) -> str:
        """Format the cell: `3.512`, `3.512 [3.1, 3.9]` or `3.512 ± 0.020 (4 seeds)`."""
        content, spread = self.cell(metric), self.spread(metric)
        if spread is not None and isinstance(content, float):
            unit = 100 if is_accuracy(metric) else 1
            mean, deviation = with_spread(unit * content, unit * spread)
            return f"{mean} ± {deviation} ({plural(len(self.values(metric)), 'seed')})"
        text = shown(content, metric)
        bounds = interval(self.records[0], metric) if intervals and len(self.records) == 1 else None
        ends = "" if bounds is None else ", ".join(shown(bound, metric) for bound in bounds)
        return f"{text} [{ends}]" if ends else text


def pools(
    records: Sequence[TrialRecord],
    metric: str | None = None,
    *,
    over_models: bool = False,
    names: Mapping[str, str] | None = None,
) -> list[Pool]:
    """Return the records as pools, in the order of tables.

    Trials that differ in nothing on which the metric depends share a place. There a number counts
    before a failure; several different numbers each get a pool of their own, labelled with an id.

    Args:
        metric: leave out trials without a cell for it, and label only what it depends on.
        over_models: leave models out of labels, so that a method has the same label for all.
        names: the labels of trials by id, where others than these decide what differs.
    """
    trials = [
        record for record in in_order(records) if metric is None or cell(record, metric) != ABSENT
    ]
    if names is None:
        specs = [record.spec for record in trials]
        own = labels(specs, metric, seeds=False, models=not over_models)
    else:
        own = [names[record.spec.id] for record in trials]
    own = [_with_format(name, record) for name, record in zip(own, trials, strict=True)]
    places: dict[tuple[str, str, int], dict[str, list[TrialRecord]]] = {}
    for record, name in zip(trials, own, strict=True):
        spec = record.spec
        twins = places.setdefault((name, spec.model.label, bits_of_record(record)), {})
        twins.setdefault(replace(spec, seed=0).id, []).append(record)
    result = []
    for (name, *_), twins in places.items():
        group = [Pool(name, tuple(seeds)) for seeds in twins.values()]
        if metric is not None and len(group) > 1:
            # One pool per number; failures only if there is no number.
            numbers = {
                pool.cell(metric): pool for pool in reversed(group) if pool.cell(metric) != FAILED
            }
            group = list(numbers.values())[::-1] or group[:1]
        if len(group) > 1:
            group = [Pool(f"{name} ({pool.spec.id})", pool.records) for pool in group]
        result += group
    return result


def comparable(records: Sequence[TrialRecord]) -> dict[str, list[TrialRecord]]:
    """Group trials whose numbers may be compared: same weights in the same dtype, same evaluation.

    A group's name is the model's and, where the model has several groups, what differs.
    """
    named: dict[str, list[TrialRecord]] = {}
    for model, trials in by_model(in_order(records)).items():
        groups: dict[str, list[TrialRecord]] = {}
        for record in trials:
            groups.setdefault(conditions_of(record.spec), []).append(record)
        names = _differences([group[0].spec for group in groups.values()])
        for number, (group, words) in enumerate(zip(groups.values(), names, strict=True), start=1):
            name = f"{model} ({words})" if words else model
            named[name if name not in named else f"{name}, {number}"] = group
    return named


def _differences(specs: Sequence[TrialSpec]) -> list[str]:
    """Say for each spec how its model and evaluation differ: `stories: 2 windows; 10 questions`."""
    settings = [model_in_words(spec) | evaluation_in_words(spec) for spec in specs]
    keys = dict.fromkeys(key for own in settings for key in own)
    differing = [key for key in keys if len({own.get(key) for own in settings}) > 1]
    readable = [key for key in differing if key not in FOR_MACHINES] or differing
    return ["; ".join(own[key] for key in readable if own.get(key)) for own in settings]


FOR_MACHINES = ("model", "data", "include", "versions", "others")  # settings of few words


def model_in_words(spec: TrialSpec) -> dict[str, str]:
    """Return what can tell two models of one name apart: the type, and the files."""
    return {"dtype": spec.model.dtype, "model": f"weights {spec.model.files[:12]}"}


def evaluation_in_words(spec: TrialSpec) -> dict[str, str]:
    """Return the settings of an evaluation in a reader's words; what is a default has none."""
    evaluation = spec.evaluation
    words: dict[str, str] = {"quick": "quick" if evaluation.quick else ""}
    for text in evaluation.texts:
        windows = "all windows" if text.limit is None else plural(text.limit, "window")
        drawn = f", {text.samples} drawn at random" if text.samples else ""
        words[f"text.{text.name}"] = f"{text.name}: {windows} of {text.window} tokens{drawn}"
    limits = dict.fromkeys(evaluation.limit_of(task) for task in evaluation.tasks)
    asked = " or ".join("all" if most is None else str(most) for most in limits)
    each = f" ({asked} questions each)" if [*limits] not in ([], [None]) else ""
    names = _cut(", ".join(evaluation.task_names))
    shots = {task.name: task.shots for task in evaluation.tasks if task.shots is not None}
    most = evaluation.max_gen_toks
    facts: Json = {
        "tasks": f"tasks {names}{each}" if names else "no tasks",
        "shots": f"shots {_cut(json.dumps(shots))}" if shots else "",
        "chat": f"chat {evaluation.chat}" if evaluation.chat else "",
        "max_gen_toks": f"answers of at most {most} tokens" if most else "",
        "versions": f"evaluation {evaluation.version}, lm-eval {evaluation.lm_eval}",
        "include": f"task files {str(evaluation.include)[:8]}",
        "data": f"data {digest(dict(evaluation.data))[:8]}",
        "others": f"settings {digest(evaluation.to_json())[:8]}",
    }
    return words | facts


def _with_format(label: str, record: TrialRecord) -> str:
    """Call a checkpoint that was given quantized by its format, not unquantized."""
    if not (given := given_format(record)):
        return label
    return label.replace(f"unquantized {record.spec.model.dtype}", f"given {given}", 1)


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_WORDS else text[: LONGEST_WORDS - 1] + "…"
