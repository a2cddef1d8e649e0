"""Read lm-eval's results: metrics, their intervals, and what each document contributes to them."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lm_eval.api.group import Group
from lm_eval.api.metrics import mean
from lm_eval.api.registry import AGGREGATION_REGISTRY

from q3q.evaluate.compare import NORMAL_95
from q3q.evaluate.contributions import (
    ANYTHING,
    RANGES,
    Contributions,
    contributions,
    cut,
    number_of,
    of_group,
)
from q3q.evaluate.harness.task_files import STAND_INS, Aggregation

Samples = Mapping[str, Sequence[dict[str, Any]]]


@dataclass(frozen=True)
class Metric:
    """One of lm-eval's metrics, of a task or a group of tasks.

    owner: the task or group
    key: lm-eval's name with the filter's, `acc,none`
    """

    owner: str
    name: str
    filter: str

    @property
    def key(self) -> str:
        return f"{self.name},{self.filter}"

    @property
    def own_name(self) -> str:
        """The metric's name within its owner: `acc`, or `acc/<filter>` if the filter has a name."""
        return self.name + ("" if self.filter == "none" else f"/{self.filter}")

    @property
    def full_name(self) -> str:
        return f"{self.owner}/{self.own_name}"


@dataclass
class Shares:
    """What documents contribute to the metrics of tasks and groups.

    tasks: by metric; a task's contributions are in the order of its samples of that filter
    groups: by metric of a group, for each of its tasks; of groups only whose number is not the
        mean over all their documents
    without: by metric's full name, why no document has a share in it
    ranges: each metric's possible values
    """

    tasks: dict[Metric, Contributions] = field(default_factory=dict)
    groups: dict[Metric, dict[str, Contributions]] = field(default_factory=dict)
    without: dict[str, str] = field(default_factory=dict)
    ranges: dict[Metric, tuple[float, float]] = field(default_factory=dict)


def task_metrics(samples: Samples) -> dict[Metric, list[Any]]:
    """Return each metric's values, in the order of the samples that have it."""
    values: dict[Metric, list[Any]] = {}
    for task, rows in samples.items():
        for row in rows:
            for name in row["metrics"]:
                values.setdefault(Metric(task, name, row["filter"]), []).append(row[name])
    return values


def shares_of(
    tasks: Mapping[str, Any],
    groups: Mapping[str, Group],
    samples: Samples,
    results: Mapping[str, Mapping[str, Any]],
) -> Shares:
    """Return what documents contribute to each metric.

    Args:
        tasks: lm-eval's tasks.
        groups: lm-eval's groups.
        samples: lm-eval's samples.
        results: lm-eval's results.
    """
    shares = Shares()
    for metric, values in task_metrics(samples).items():
        aggregate = tasks[metric.owner].aggregation().get(metric.name, mean)
        if isinstance(aggregate, Aggregation):
            value = number_of(results[metric.owner].get(metric.key))
            # Without a number: an error of a resample, for the standard error, costs that alone.
            if aggregate.error is not None and (value is None or math.isnan(value)):
                shares.without[metric.full_name] = f"it cannot be aggregated: {aggregate.error}"
                continue
            aggregate = aggregate.function
        name = _name_of(aggregate)
        numbers = [number_of(value) for value in values]
        binary = all(number in (0.0, 1.0) for number in numbers)
        share = name in ("mean", "nanmean") and (binary or metric.name.startswith("acc"))
        shares.ranges[metric] = (0.0, 1.0) if share else RANGES.get(str(name), ANYTHING)
        try:
            shares.tasks[metric] = contributions(aggregate, name, values)
        except (TypeError, ValueError) as error:
            shares.without[metric.full_name] = str(error)
    for group in groups.values():
        for metric, weights in _group_metrics(group, results):
            members = [Metric(task, metric.name, metric.filter) for task in weights]
            if any(member not in shares.ranges for member in members):
                shares.without[metric.full_name] = "it cannot be aggregated in all tasks"
                continue
            ranges = {shares.ranges[member] for member in members}
            shares.ranges[metric] = ranges.pop() if len(ranges) == 1 else ANYTHING
            missing = [member.owner for member in members if member not in shares.tasks]
            if missing:
                shares.without[metric.full_name] = f"it has none in {', '.join(missing)}"
                continue
            parts = [(shares.tasks[member], weights[member.owner]) for member in members]
            if not _is_mean_of_documents(parts):
                shares.groups[metric] = dict(zip(weights, of_group(parts), strict=True))
    return shares


def _name_of(aggregate: Callable[..., Any]) -> str | None:
    """Return the name of one of lm-eval's aggregations, None of any other function."""
    names = {
        STAND_INS.get(function, function): name for name, function in AGGREGATION_REGISTRY.items()
    }
    return names.get(aggregate)


def _group_metrics(
    group: Group, results: Mapping[str, Mapping[str, Any]]
) -> Iterator[tuple[Metric, dict[str, float]]]:
    """Yield the metrics that a group has, each with the weights of its tasks."""
    leaves = [task.task_name for task in group.get_all_tasks()]
    for setting in group.aggregate_metric_list or ():
        filters = setting.filter_list
        if filters is None:
            filters = {
                key.removeprefix(f"{setting.metric},")
                for task in leaves
                for key in results.get(task, {})
                if key.startswith(f"{setting.metric},")
            }
        for name in [filters] if isinstance(filters, str) else sorted(filters):
            metric = Metric(group.name, setting.metric, name)
            weights = {
                task: float(results[task]["sample_len"]) if setting.weight_by_size else 1.0
                for task in leaves
                if metric.key in results.get(task, {})
            }
            if weights and metric.key in results.get(group.name, {}):
                yield metric, weights


def _is_mean_of_documents(parts: Sequence[tuple[Contributions, float]]) -> bool:
    """Return True if a group's number is the mean over all its tasks' documents."""
    return all(weight == len(part.values) and not part.logarithmic for part, weight in parts)


def read_metrics(
    results: Mapping[str, Mapping[str, Any]], shares: Shares
) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Return values by `<task>/<metric>` (and `/<filter>`, if it has a name), and 95 % intervals.

    An interval is that of lm-eval's standard error or, without one and for perplexities, that of
    the documents' contributions. It is cut to the metric's possible values.
    """
    metrics: dict[str, float] = {}
    intervals: dict[str, tuple[float, float]] = {}
    for metric, within in shares.ranges.items():
        scores = results[metric.owner]
        value = number_of(scores.get(metric.key))
        if value is None:
            continue
        metrics[metric.full_name] = value
        error = number_of(scores.get(f"{metric.name}_stderr,{metric.filter}"))
        share = shares.tasks.get(metric)
        if error is not None and math.isfinite(error) and not (share and share.logarithmic):
            ends = value - NORMAL_95 * error, value + NORMAL_95 * error
            intervals[metric.full_name] = cut(ends, within)
        elif interval := _interval(metric, shares):
            intervals[metric.full_name] = cut(interval, within)
    return metrics, intervals


def _interval(metric: Metric, shares: Shares) -> tuple[float, float] | None:
    if metric in shares.tasks:
        return shares.tasks[metric].interval()
    if metric in shares.groups:
        parts = shares.groups[metric].values()
        return Contributions(tuple(value for part in parts for value in part.values)).interval()
    return None


def sample_rows(
    task: str, samples: Sequence[dict[str, Any]], shares: Shares
) -> Iterator[dict[str, Any]]:
    """Yield what statistics need of a task's samples.

    This is doc_id, doc_hash, prompt_hash, filter and target; for each of the document's requests
    log_likelihood (and greedy), or text; and

    - scores: by metric, the document's contribution;
    - group_scores: by metric of a group, the contribution to it, where that is another;
    - values: by metric, its value for the document, where that is not its contribution.
    """
    places: dict[Metric, int] = {}
    for sample in samples:
        row = {
            name: sample[name] for name in ("doc_id", "doc_hash", "prompt_hash", "filter", "target")
        }
        row |= {"scores": {}, "group_scores": {}, "values": {}} | _answers(sample["filtered_resps"])
        for name in sample["metrics"]:
            metric, value = Metric(task, name, sample["filter"]), sample[name]
            place = places[metric] = places.get(metric, -1) + 1
            score = number_of(value)
            if metric in shares.tasks:
                row["scores"][metric.own_name] = shares.tasks[metric].values[place]
            scores = row["scores"]
            if metric.own_name not in scores or scores[metric.own_name] != score:
                row["values"][metric.own_name] = value
            for group, parts in shares.groups.items():
                if group.own_name == metric.own_name and task in parts:
                    row["group_scores"][group.full_name] = parts[task].values[place]
        yield row


def _answers(answers: Sequence[Any]) -> dict[str, Any]:
    if all(isinstance(answer, tuple) for answer in answers):
        columns = ("log_likelihood", "greedy")
        return {name: [answer[i] for answer in answers] for i, name in enumerate(columns)}
    if all(isinstance(answer, float) for answer in answers):
        return {"log_likelihood": list(answers)}
    return {"text": list(answers)}
