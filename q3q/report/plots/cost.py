"""Predicted against actual seconds of each trial."""

from collections.abc import Iterator, Mapping, Sequence

from q3q.formatting import fixed, plural
from q3q.record import TrialRecord
from q3q.report.measures import seconds
from q3q.report.plots.axes import logarithmic, name_axes
from q3q.report.plots.drawing import Plot, handle, legend, mark, panel
from q3q.report.plots.looks import (
    DASHED,
    REFERENCE,
    SOFT,
    looks_of,
    points_only,
    quantizing_methods,
)


def predicted_against_actual_cost(
    records: Sequence[TrialRecord], predicted: Mapping[str, float]
) -> Iterator[Plot]:
    """Draw a point per completed trial.

    Args:
        predicted: seconds by trial id; what a record itself says of its plan takes precedence.
    """
    plans = {record.spec.id: record.environment.get("planned", {}) for record in records}
    expected = {trial: float(plan["seconds"]) for trial, plan in plans.items() if "seconds" in plan}
    expected = {**predicted, **expected}
    timed = [
        (expected[record.spec.id], float(seconds(record) or 0), record)
        for record in records
        if expected.get(record.spec.id, 0) > 0 and seconds(record) and record.completed
    ]
    if not timed:
        return
    looks = looks_of(sorted(quantizing_methods(records)))
    figure, axes = panel()
    ends = [min(min(p, a) for p, a, _ in timed) / 1.5, max(max(p, a) for p, a, _ in timed) * 1.5]
    axes.plot(ends, ends, color=SOFT, linestyle="--", linewidth=1)
    handles = {"as predicted": handle(DASHED, "as predicted")}
    for plan, actual, record in timed:
        method = record.spec.method.name
        look = looks.get(method, REFERENCE)
        trial = f"{record.spec.name} · {record.spec.model.label}"
        description = f"{trial}: predicted {fixed(plan, 0)} s, took {fixed(actual, 0)} s"
        mark(axes, plan, actual, look, method, description)
        text = method if method in looks else "unquantized"
        handles[method] = handle(points_only(look), text)
    for axis, set_scale in ((axes.xaxis, axes.set_xscale), (axes.yaxis, axes.set_yscale)):
        logarithmic(axis, ends, set_scale)
    name_axes(axes, "predicted, s", "took, s")
    legend(figure, handles)
    left_out = len(records) - len(timed)
    hidden = f"Not shown: {plural(left_out, 'trial')}, failed or without a prediction."
    caption = f"How long q3q took, not how fast the model is. {hidden if left_out else ''}".strip()
    yield Plot("cost", "Predicted against actual time of a trial", caption, figure)
