"""Quality against size: of the quantized model in bytes, and of the original in parameters."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from q3q.evaluation import is_accuracy, is_perplexity
from q3q.formatting import bytes_in_words
from q3q.record import TrialRecord
from q3q.report.budgets import Memory, size_of
from q3q.report.measures import by_model, is_base, judged_metrics
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
from q3q.report.plots.words import metric_title, not_shown, slug
from q3q.report.pools import Pool, comparable, pools
from q3q.report.sizes import COUNTED, Size, number_of, parameters_of, sizes_note

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FRONT = "Pareto front"
NEAR = 0.1  # of the axis; two models nearer to each other share a tick


def quality_against_bytes(
    model: str, records: Sequence[TrialRecord], looks: Looks, context: int | None = None
) -> Iterator[Plot]:
    """Draw the Pareto front of quality and bytes, for each text and group evaluated alike.

    Args:
        context: tokens of a text whose cache is counted beside the weights; None: weights alone.
    """
    number, memory, uncounted = 0, Memory.of(records, context), ""
    if context is not None and memory is None:
        uncounted = " The cache is not counted: nothing here knows the model's config.json."
    for name, group in comparable(records).items():
        judged = judged_metrics(group)
        texts = [metric for metric in judged if is_perplexity(metric)]
        for metric in texts or judged[:1]:
            plot = _front(group, metric, looks, memory)
            if plot is None:
                continue
            number += 1
            figure, caption = plot
            conditions = "" if name == model else f"{name}. "
            yield Plot(
                f"{slug(model)}-pareto" if number == 1 else f"{slug(model)}-pareto-{number}",
                f"{metric_title(metric)} against {'size' if memory is None else 'memory'}",
                (conditions + caption + uncounted).strip(),
                figure,
                model,
            )


def _front(
    records: Sequence[TrialRecord], metric: str, looks: Looks, memory: Memory | None
) -> tuple["Figure", str] | None:
    """Draw one metric against size; return the figure and its caption, None if little is known."""
    tried = pools(records)
    # Pools of one label are of one method: none is drawn whose label has no size at all.
    sized = {pool.label for pool in tried if size_of(pool) is not None}
    measured = [p for p in tried if isinstance(p.cell(metric), float) and p.label in sized]
    if len(measured) < 2:
        return None
    sign = 1 if is_perplexity(metric) else -1
    level, height = height_of([p for p in measured if p.is_reference], metric)
    sizes = [size_of(pool) or Size(0.0, COUNTED) for pool in measured]
    rules = {size.rule for size in sizes}
    caches = [0.0 if memory is None else memory.cache(pool) for pool in measured]
    points = [
        ((size.value + cache) / 1e6, height(float(pool.cell(metric))))
        for size, cache, pool in zip(sizes, caches, measured, strict=True)
    ]
    front = [
        (size, value)
        for size, value in sorted(points)
        if not any(
            s <= size and sign * v <= sign * value and (s, v) != (size, value) for s, v in points
        )
    ]
    figure, axes = panel()
    axes.step(*zip(*front, strict=True), where="post", color=SOFT, linestyle="--", linewidth=1)
    handles: dict[str, Any] = {FRONT: handle(DASHED, FRONT)}
    for pool, size, cache, (x, y) in zip(measured, sizes, caches, points, strict=True):
        look = looks.get(pool.label, REFERENCE)
        mark_of_rule = number_of(size.rule, rules)
        description = f"{pool.name}: {bytes_in_words(size.value)} {mark_of_rule}".rstrip()
        if memory is not None:
            description += f" and {bytes_in_words(cache)} of cache"
        mark(axes, x, y, look, pool.label, f"{description}, {pool.shown(metric)}")
        if mark_of_rule:
            axes.annotate(
                mark_of_rule, (x, y), xytext=(4, 2), textcoords="offset points", fontsize=8
            )
        handles[pool.label] = handle(points_only(look), pool.label)
    logarithmic(axes.xaxis, [x for x, _ in points], axes.set_xscale)
    if level is not None:
        excess_scale(axes, [value for _, value in points])
    elif is_perplexity(metric):
        scale(axes, [value for _, value in points])
    width, said_of_cache = "size of the whole model, MB", ""
    if memory is not None:
        width = f"weights and cache of {memory.context:,} tokens, MB"
        said_of_cache = (
            f"Memory: all weights, and keys and values of one text of {memory.context:,} tokens, "
            "with their scales."
        )
    name_axes(axes, width, height_title(metric, level))
    legend(figure, handles)
    left_out = [(pool, "no size") for pool in tried if pool not in measured]
    return figure, " ".join(
        filter(None, [said_of_cache, sizes_note(rules), not_shown(left_out, metric)])
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
        quantized = [(pool, name) for pool, name in tried if not pool.is_reference]
        looks = looks_of((name for _, name in quantized), quantizing_methods(records))
        for bits in sorted({pool.bits for pool, _ in quantized}):
            shown = [item for item in tried if item[0].bits == bits or item[0].is_reference]
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
        handles[name] = handle(look, name)
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


def _parameters(records: Sequence[TrialRecord]) -> float | None:
    """Return millions of parameters, from the first record that knows its model's size."""
    sizes = (size for record in records if (size := parameters_of(record)) is not None)
    size = next(sizes, None)
    return None if size is None else size / 1e6
