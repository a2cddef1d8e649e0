"""Quality against size: of the quantized model in bytes, and of the original in parameters."""

from collections.abc import Iterator, Sequence
from typing import Any

from q3q.record import TrialRecord
from q3q.report.measures import (
    UNQUANTIZED_BITS,
    by_model,
    is_accuracy,
    is_base,
    is_perplexity,
    judged_metrics,
)
from q3q.report.plots.axes import (
    excess_scale,
    fixed_ticks,
    height_of,
    height_title,
    logarithmic,
    name_axes,
    scale,
)
from q3q.report.plots.drawing import Plot, handle, legend, line, mark, panel
from q3q.report.plots.looks import (
    DASHED,
    REFERENCE,
    SOFT,
    Looks,
    looks_of,
    points_only,
    quantizing_methods,
)
from q3q.report.plots.words import metric_title, not_shown, shown_label
from q3q.report.pools import Pool, comparable, pools

NEAR = 0.1  # of the axis; two models nearer to each other share a tick


def quality_against_bytes(
    model: str, records: Sequence[TrialRecord], looks: Looks
) -> Iterator[Plot]:
    """Draw the Pareto front of quality and bytes for each group of trials evaluated alike."""
    for number, (name, group) in enumerate(comparable(records).items(), start=1):
        metric = next(iter(judged_metrics(group)), None)
        if metric is None:
            continue
        tried = pools(group)
        # Pools of one label are of one method: none is drawn whose label has no size at all.
        sized = {pool.label for pool in tried if _size(pool) is not None}
        measured = [p for p in tried if isinstance(p.cell(metric), float) and p.label in sized]
        if len(measured) < 2:
            continue
        sign = 1 if is_perplexity(metric) else -1
        level, height = height_of([p for p in measured if p.spec.scheme is None], metric)
        points = [((_size(p) or 0.0) / 1e6, height(float(p.cell(metric)))) for p in measured]
        front = [
            (size, value)
            for size, value in sorted(points)
            if not any(
                s <= size and sign * v <= sign * value and (s, v) != (size, value)
                for s, v in points
            )
        ]
        figure, axes = panel()
        axes.step(*zip(*front, strict=True), where="post", color=SOFT, linestyle="--", linewidth=1)
        handles: dict[str, Any] = {"not beaten in both": handle(DASHED, "not beaten in both")}
        for pool, (size, value) in zip(measured, points, strict=True):
            look = looks.get(pool.label, REFERENCE)
            megabytes = f"{size:.3g} MB" if size < 1000 else f"{size / 1000:.3g} GB"
            description = f"{pool.label}, {pool.bits} bits: {megabytes}, {pool.shown(metric)}"
            mark(axes, size, value, look, pool.label, description)
            handles[pool.label] = handle(points_only(look), shown_label(pool))
        logarithmic(axes.xaxis, [size for size, _ in points], axes.set_xscale)
        if level is not None:
            excess_scale(axes, [value for _, value in points])
        elif is_perplexity(metric):
            scale(axes, [value for _, value in points])
        name_axes(axes, "size of the whole model, MB", height_title(metric, level))
        legend(figure, handles)
        left_out = [(pool, "no size") for pool in tried if pool not in measured]
        conditions = "" if name == model else f"{name}. "
        yield Plot(
            f"{model}-pareto" if number == 1 else f"{model}-pareto-{number}",
            f"{metric_title(metric)} against size",
            (conditions + not_shown(left_out, metric)).strip(),
            figure,
            model,
        )


def quality_against_parameters(records: Sequence[TrialRecord]) -> Iterator[Plot]:
    """Draw at each bit width whether larger models lose less; base models have their own lines."""
    sizes = {
        model: size
        for model, trials in by_model(records).items()
        if (size := _parameters(trials)) is not None
    }
    if len(sizes) < 2:
        return
    judged = judged_metrics(records)
    metrics = [next(filter(is_perplexity, judged), None), next(filter(is_accuracy, judged), None)]
    both = len({is_base(record.spec) for record in records}) > 1
    for metric in filter(None, metrics):
        tried = [
            (pool, pool.label + (" base" if both and is_base(pool.spec) else ""))
            for pool in pools(records, metric, over_models=True)
        ]
        quantized = [(pool, name) for pool, name in tried if pool.spec.scheme is not None]
        looks = looks_of((name for _, name in quantized), quantizing_methods(records))
        for bits in sorted({pool.bits for pool, _ in quantized}):
            shown = [item for item in tried if item[0].bits in (bits, UNQUANTIZED_BITS)]
            plot = _over_models(shown, metric, bits, sizes, looks)
            if plot is not None:
                yield plot


def _over_models(
    tried: Sequence[tuple[Pool, str]],
    metric: str,
    bits: int,
    sizes: dict[str, float],
    looks: Looks,
) -> Plot | None:
    """Draw a line per name over the models' sizes; None if no quantized trial has a number."""
    lines: dict[str, list[tuple[float, float, Pool]]] = {}
    left_out = []
    for pool, name in tried:
        value, model = pool.cell(metric), pool.spec.model.label
        if isinstance(value, float) and model in sizes:
            y = value if is_perplexity(metric) else 100 * value
            lines.setdefault(name, []).append((sizes[model], y, pool))
        else:
            left_out.append((pool, "size unknown" if isinstance(value, float) else ""))
    if not any(name in looks for name in lines):
        return None
    figure, axes = panel()
    handles = {}
    for name, points in lines.items():
        look = looks.get(name, REFERENCE)
        points.sort(key=lambda point: point[:2])
        line(axes, [x for x, _, _ in points], [y for _, y, _ in points], look, name)
        for x, y, pool in points:
            description = f"{name}, {pool.spec.model.label}: {pool.shown(metric)}"
            mark(axes, x, y, look, name, description)
        handles[name] = handle(look, shown_label(points[0][2], name))
    axes.set_xscale("log")
    drawn = [point for points in lines.values() for point in points]
    fixed_ticks(axes.xaxis, _ticks(sorted({x for x, _, _ in drawn})))
    if is_perplexity(metric):
        scale(axes, [y for _, y, _ in drawn])
    name_axes(axes, "parameters of the model", metric_title(metric))
    legend(figure, handles)
    title = f"{metric_title(metric)} against model size at {bits} bits"
    kind = "" if is_perplexity(metric) else "-accuracy"
    caption = not_shown(left_out, metric, models=True)
    return Plot(f"size-{bits}bits{kind}", title, caption, figure)


def _ticks(sizes: Sequence[float]) -> dict[float, str]:
    """Return a tick for each size in millions, without those that would overlap another."""
    ticks: dict[float, str] = {}
    apart = (sizes[-1] / sizes[0]) ** NEAR
    for size in sizes:
        if not ticks or size > apart * max(ticks):
            ticks[size] = f"{size / 1e3:.2g}B" if size >= 100 else f"{size:.2g}M"
    return ticks


def _size(pool: Pool) -> float | None:
    """Return the model's bytes."""
    sizes = (r.metrics["model_bytes"] for r in pool.records if "model_bytes" in r.metrics)
    return next(sizes, None)


def _parameters(records: Sequence[TrialRecord]) -> float | None:
    """Return millions of parameters, from the first record that knows its model's size."""
    for record in records:
        if {"model_bytes", "bits_per_weight_model"} <= record.metrics.keys():
            return 8 * record.metrics["model_bytes"] / record.metrics["bits_per_weight_model"] / 1e6
    return None
