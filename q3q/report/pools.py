"""Groups of trials: those that may be compared, and those that differ in nothing but their seed.

Trials that differ only in the seed count as one, by their mean and standard deviation.
"""

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from q3q.record import TrialRecord
from q3q.report.measures import (
    ABSENT,
    DIVERGED,
    FAILED,
    Cell,
    bits_of,
    by_model,
    cell,
    in_order,
    interval,
    is_accuracy,
    labels,
    shown,
)
from q3q.spec import TrialSpec

MOST_WORDS = 4  # of a name that tells evaluations apart
LONGEST_WORD = 40


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
        return bits_of(self.spec)

    @property
    def name(self) -> str:
        """The label with the bits."""
        return self.label if self.spec.scheme is None else f"{self.label}, {self.bits} bits"

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
        text, spread = shown(self.cell(metric), metric), self.spread(metric)
        if spread is not None:
            return f"{text} ± {shown_spread(spread, metric)} ({len(self.values(metric))} seeds)"
        bounds = interval(self.records[0], metric) if intervals and len(self.records) == 1 else None
        ends = "" if bounds is None else ", ".join(shown(bound, metric) for bound in bounds)
        return f"{text} [{ends}]" if ends else text


def shown_spread(spread: float, metric: str) -> str:
    """Format a standard deviation to two digits, in the unit in which the metric is shown."""
    return f"{float(f'{(100 if is_accuracy(metric) else 1) * spread:.2g}'):g}"


def pools(
    records: Sequence[TrialRecord], metric: str | None = None, *, over_models: bool = False
) -> list[Pool]:
    """Return the records as pools, in the order of tables.

    Trials that differ in nothing on which the metric depends share a place. There a number counts
    before a failure; several different numbers each get a pool of their own, labelled with an id.

    Args:
        metric: leave out trials without a cell for it, and label only what it depends on.
        over_models: leave models out of labels, so that a method has the same label for all.
    """
    trials = [
        record for record in in_order(records) if metric is None or cell(record, metric) != ABSENT
    ]
    names = labels([record.spec for record in trials], metric, seeds=False, models=not over_models)
    places: dict[tuple[str, str, int], dict[str, list[TrialRecord]]] = {}
    for record, name in zip(trials, names, strict=True):
        spec = record.spec
        twins = places.setdefault((name, spec.model.label, bits_of(spec)), {})
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
            groups.setdefault(_conditions(record.spec), []).append(record)
        names = _differences([group[0].spec for group in groups.values()])
        for number, (group, words) in enumerate(zip(groups.values(), names, strict=True), start=1):
            name = f"{model} ({words})" if words else model
            named[name if name not in named else f"{name}, {number}"] = group
    return named


def _conditions(spec: TrialSpec) -> str:
    """Return what two trials must share for their numbers to be compared."""
    # Drift is measured beside the other metrics and changes none of them.
    evaluation = replace(spec.evaluation, drift=None)
    return json.dumps([spec.model.identity, evaluation.to_json()], sort_keys=True)


def _differences(specs: Sequence[TrialSpec]) -> list[str]:
    """Say for each spec how its model and evaluation differ: `limit=2, task_limit=10`."""
    settings = [
        {
            key: value
            for key, value in spec.flat().items()
            if key.startswith(("model.", "evaluation.")) and key != "evaluation.drift"
        }
        for spec in specs
    ]
    keys = dict.fromkeys(key for own in settings for key in own if key != "model.name")
    differing = [key for key in keys if len({own.get(key) for own in settings}) > 1]
    readable = [
        key for key in differing if not key.endswith(("digest", "revision")) and ".data." not in key
    ]
    texts = []
    for own in settings:
        words = dict.fromkeys(
            f"{key.rpartition('.')[2]}={own.get(key, 'none')}"[:LONGEST_WORD]
            for key in readable or differing
        )
        more = ", …" if len(words) > MOST_WORDS else ""
        texts.append(", ".join([*words][:MOST_WORDS]) + more)
    return texts
