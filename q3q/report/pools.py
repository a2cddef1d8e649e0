"""Trials that may be compared, and trials that differ in luck alone.

A seed is no method: of trials that differ in nothing else the mean counts, and how far they spread.
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
    model_name,
    shown,
)
from q3q.spec import TrialSpec

MOST_WORDS = 4  # that tell one evaluation from another
LONGEST_WORD = 40


@dataclass(frozen=True)
class Pool:
    """One thing that was tried: a trial, or several that differ in their seed alone.

    label: its method, and of all else but bits what differs from the others.
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
        """With its bits, for people."""
        return self.label if self.spec.scheme is None else f"{self.label}, {self.bits} bits"

    def values(self, metric: str) -> list[float]:
        """The numbers, one a seed."""
        return [
            found for record in self.records if isinstance(found := cell(record, metric), float)
        ]

    def cell(self, metric: str) -> Cell:
        """The mean over seeds. A seed that diverged leaves no mean; one that failed says nothing of the others."""
        words = {found for record in self.records if isinstance(found := cell(record, metric), str)}
        numbers = self.values(metric)
        if DIVERGED in words or not numbers:
            return next(word for word in (DIVERGED, FAILED, ABSENT) if word in words)
        return math.fsum(numbers) / len(numbers)

    def spread(self, metric: str) -> float | None:
        """Standard deviation over seeds; None of a single one."""
        numbers = self.values(metric)
        return (
            statistics.stdev(numbers)
            if len(numbers) > 1 and isinstance(self.cell(metric), float)
            else None
        )

    def shown(self, metric: str, *, intervals: bool = False) -> str:
        """Its cell for people: `3.512`, `3.512 [3.1, 3.9]`, of several seeds `3.512 ± 0.020 (4 seeds)`."""
        text, spread = shown(self.cell(metric), metric), self.spread(metric)
        if spread is not None:
            return f"{text} ± {shown_spread(spread, metric)} ({len(self.values(metric))} seeds)"
        bounds = interval(self.records[0], metric) if intervals and len(self.records) == 1 else None
        return (
            text
            if bounds is None
            else f"{text} [{shown(bounds[0], metric)}, {shown(bounds[1], metric)}]"
        )


def shown_spread(spread: float, metric: str) -> str:
    """A standard deviation to two digits, in the unit that the metric is shown in."""
    return f"{float(f'{(100 if is_accuracy(metric) else 1) * spread:.2g}'):g}"


def pools(
    records: Sequence[TrialRecord], metric: str | None = None, *, over_models: bool = False
) -> list[Pool]:
    """The records as pools, in order.

    over_models: models are not told apart by the labels, so that a method has one of all. metric: only trials that it
    says something of, told apart by what it depends on. Of trials that differ in nothing that the metric depends on,
    what was measured counts, not what failed; if they measured different numbers all the same, each stands for itself,
    with its id.
    """
    told = [
        record for record in in_order(records) if metric is None or cell(record, metric) != ABSENT
    ]
    names = labels([record.spec for record in told], metric, seeds=False, models=not over_models)
    places: dict[tuple[str, str, int], dict[str, list[TrialRecord]]] = {}
    for record, name in zip(told, names, strict=True):
        twins = places.setdefault((name, model_name(record.spec), bits_of(record.spec)), {})
        twins.setdefault(_but_for_luck(record.spec), []).append(record)
    found = []
    for (name, *_), twins in places.items():
        mine = [Pool(name, tuple(some)) for some in twins.values()]
        if metric is not None and len(mine) > 1:
            mine = _distinct(mine, metric)
        found += (
            mine
            if len(mine) == 1
            else [Pool(f"{name} ({one.spec.id})", one.records) for one in mine]
        )
    return found


def _distinct(mine: Sequence[Pool], metric: str) -> list[Pool]:
    """Those with different numbers; all that failed only if none has one."""
    values = {pool.cell(metric): pool for pool in reversed(mine) if pool.cell(metric) != FAILED}
    return list(values.values())[::-1] or list(mine[:1])


def _but_for_luck(spec: TrialSpec) -> str:
    return replace(spec, seed=0).id


def comparable(records: Sequence[TrialRecord]) -> dict[str, list[TrialRecord]]:
    """Groups of trials that may be compared with each other: of the same weights in the same type, evaluated alike.

    By a name: the model's, and where it has several groups what tells them apart.
    """
    found: dict[str, list[TrialRecord]] = {}
    for model, mine in by_model(in_order(records)).items():
        groups: dict[str, list[TrialRecord]] = {}
        for record in mine:
            groups.setdefault(conditions(record.spec), []).append(record)
        words = _telling([some[0].spec for some in groups.values()])
        for number, (some, told) in enumerate(zip(groups.values(), words, strict=True), start=1):
            name = f"{model} ({told})" if told else model
            found[name if name not in found else f"{name}, {number}"] = some
    return found


def conditions(spec: TrialSpec) -> str:
    """What two trials must have in common for their numbers to be compared."""
    model = {key: value for key, value in spec.model.items() if key != "name"}
    evaluation = {
        key: value for key, value in spec.evaluation.items() if key != "drift"
    }  # drift changes no other number
    return json.dumps([model, evaluation], sort_keys=True)


def _telling(specs: Sequence[TrialSpec]) -> list[str]:
    """Of each what differs from the others in model and evaluation: `limit=2, task_limit=10`."""
    flat = [
        {
            k: v
            for k, v in spec.flat().items()
            if k.startswith(("model.", "evaluation.")) and k != "evaluation.drift"
        }
        for spec in specs
    ]
    keys = dict.fromkeys(key for one in flat for key in one if key != "model.name")
    differ = [key for key in keys if len({one.get(key) for one in flat}) > 1]
    plain = [
        key for key in differ if not key.endswith(("digest", "revision")) and ".data." not in key
    ] or differ
    told = []
    for one in flat:
        words = dict.fromkeys(
            f"{key.rpartition('.')[2]}={one.get(key, 'none')}"[:LONGEST_WORD] for key in plain
        )
        told.append(", ".join([*words][:MOST_WORDS]) + (", …" if len(words) > MOST_WORDS else ""))
    return told
