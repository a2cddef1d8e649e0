"""The answer first: for each model and bit width the best method, what it loses, and what cannot be told apart.

A loss is measured against the unquantized model on the same questions and windows. Where the record holds the paired
comparison, its interval is the loss's; else the loss has none, and only the metric's own intervals, wider because what
makes a text hard is in both, say what can be told apart.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from q3q.record import TrialRecord
from q3q.report.tables import (
    DIVERGED,
    FAILED,
    MEAN_ACCURACY,
    Table,
    bits_of,
    by_model,
    cell,
    headline_metrics,
    in_order,
    interval,
    is_perplexity,
    labels,
    shown_of,
)

RULE = (
    "Losses are against the unquantized model, with 95 % intervals of paired differences where a trial has them. Two "
    "methods are not distinguishable where the intervals of their losses (without these: of the metric itself) overlap."
)


@dataclass(frozen=True)
class Loss:
    """What a trial loses on one metric against the unquantized model.

    value: of a perplexity the ratio less one, of an accuracy the difference (negative is worse). low, high: its 95 %
    interval, None without a paired comparison. distinguishable: from no loss at all; None if unknown.
    """

    metric: str
    value: float
    low: float | None = None
    high: float | None = None
    distinguishable: bool | None = None

    def __str__(self) -> str:
        unit = "%" if is_perplexity(self.metric) else "points"
        text = f"{100 * self.value:+.1f} {unit}"
        if self.low is not None and self.high is not None:
            text += f" [{100 * self.low:+.1f}, {100 * self.high:+.1f}]"
        return text + (" (not distinguishable from none)" if self.distinguishable is False else "")


def answers(records: Sequence[TrialRecord]) -> list[Table]:
    """A table per model: a row per bit width."""
    return [table for model, mine in by_model(in_order(records)).items() if (table := _answer(model, mine))]


def loss(record: TrialRecord, reference: TrialRecord | None, metric: str) -> Loss | None:
    """None where one of the two has no number, or there is no reference."""
    compared = record.comparisons.get(metric)
    if compared is not None and compared.difference is not None and record.completed:
        of_ratio = is_perplexity(metric)
        value, low, high = (
            None if one is None else math.expm1(one) if of_ratio else one
            for one in (compared.difference, compared.low, compared.high)
        )
        assert value is not None
        return Loss(metric, value, low, high, compared.distinguishable)
    if reference is None:
        return None
    ours, theirs = cell(record, metric), cell(reference, metric)
    if not isinstance(ours, float) or not isinstance(theirs, float):
        return None
    return Loss(metric, ours / theirs - 1 if is_perplexity(metric) else ours - theirs)


def alike(one: TrialRecord, other: TrialRecord, reference: TrialRecord | None, metric: str) -> bool:
    """Whether two trials cannot be told apart on a metric, by the rule above."""
    losses = [loss(record, reference, metric) for record in (one, other)]
    bounds = [None if it is None or it.low is None or it.high is None else (it.low, it.high) for it in losses]
    if None in bounds:
        bounds = [interval(record, metric) for record in (one, other)]
    if bounds[0] is None or bounds[1] is None:
        return cell(one, metric) == cell(other, metric)
    return bounds[0][0] <= bounds[1][1] and bounds[1][0] <= bounds[0][1]


def reference_of(record: TrialRecord, records: Sequence[TrialRecord]) -> TrialRecord | None:
    """The unquantized model's trial, of the same model and the same evaluation."""

    def known(spec: object) -> object:
        return {key: value for key, value in spec.items() if key != "name"} if isinstance(spec, dict) else spec

    for other in records:
        same = other.spec.evaluation == record.spec.evaluation and known(other.spec.model) == known(record.spec.model)
        if same and other.completed and other.spec.scheme is None:
            return other
    return None


def _answer(model: str, records: Sequence[TrialRecord]) -> Table | None:
    metrics = headline_metrics(records)
    judged = next((name for name in metrics if is_perplexity(name)), None)
    tasks = [MEAN_ACCURACY] if MEAN_ACCURACY in metrics else [name for name in metrics if name.endswith("/acc")]
    judged = judged or next(iter(tasks), None)
    if judged is None:
        return None
    beside = [name for name in tasks[:1] if name != judged]
    named = dict(zip([r.spec.id for r in records], labels([r.spec for r in records], judged), strict=True))
    rows = []
    for bits in sorted({bits_of(record.spec) for record in records if record.spec.scheme is not None}):
        mine = [record for record in records if record.spec.scheme is not None and bits_of(record.spec) == bits]
        numbers = [record for record in mine if isinstance(cell(record, judged), float)]
        if not numbers:
            words = {cell(record, judged) for record in mine} & {DIVERGED, FAILED}
            rows.append(
                (str(bits), "none", " or ".join(sorted(map(str, words))) or "-", *["-"] * (2 + 2 * len(beside)))
            )
            continue
        sign = 1 if is_perplexity(judged) else -1
        best = min(numbers, key=lambda record: sign * float(cell(record, judged)))
        reference = reference_of(best, records)
        others = [named[o.spec.id] for o in numbers if o is not best and alike(best, o, reference, judged)]
        cells = [
            text
            for metric in (judged, *beside)
            for text in (shown_of(best, metric), str(loss(best, reference, metric) or "unknown"))
        ]
        rows.append((str(bits), named[best.spec.id], *cells, ", ".join(dict.fromkeys(others)) or "-"))
    if not rows:
        return None
    heads = [text for metric in (judged, *beside) for text in (_short(metric), "loss")]
    return Table(model, ("bits", "best method", *heads, "not distinguishable from the best"), tuple(rows))


def _short(metric: str) -> str:
    if metric == MEAN_ACCURACY:
        return "mean accuracy, %"
    if is_perplexity(metric):
        return f"perplexity, {metric.partition('/')[2]}"
    return f"{metric.removesuffix('/acc')}, %"
