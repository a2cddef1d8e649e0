"""Quality against the bits of a weight: a line per method, the unquantized model dashed."""

import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from q3q.evaluation import is_accuracy, is_perplexity
from q3q.record import TrialRecord
from q3q.report.measures import by_model, headline_metrics, in_order, interval, shown
from q3q.report.plots.axes import excess_scale, height_of, height_title, name_axes, scale
from q3q.report.plots.drawing import (
    Plot,
    handle,
    legend,
    line,
    mark,
    new_figure,
    notice,
    panel,
    png,
)
from q3q.report.plots.looks import SOFT, Look, Looks, study_looks
from q3q.report.plots.words import metric_title, slug
from q3q.report.pools import Pool, pools
from q3q.report.tables import topics
from q3q.spec import MEAN_ACCURACY

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def quality_against_bits(
    model: str, records: Sequence[TrialRecord], looks: Looks
) -> Iterator[Plot]:
    """Draw each perplexity, and each mean accuracy or, of a single task, its accuracy."""
    drawn: dict[str, int] = {}
    for metric, heading, group in topics(records, everything=False):
        if not is_perplexity(metric) and not is_accuracy(metric):
            continue
        tried = pools(group, metric)
        if not tried:
            continue
        figure, axes = panel()
        legend(figure, _draw_lines(axes, tried, looks, metric))
        spread = any(pool.spread(metric) for pool in tried)
        bounded = any(pool_interval(pool, metric) for pool in tried) and is_accuracy(metric)
        bars = [
            *(["95 % interval"] if bounded else []),
            *(["standard deviation over seeds"] if spread else []),
        ]
        sentences = [
            f"{heading.partition(', % ')[0].capitalize()}." if metric == MEAN_ACCURACY else "",
            f"Bars: {' or '.join(bars)}." if bars else "",
        ]
        count = drawn[metric] = drawn.get(metric, 0) + 1
        name = f"{slug(model)}-{slug(metric)}-bits" + (f"-{count}" if count > 1 else "")
        title = f"{metric_title(metric)} against bits"
        yield Plot(name, title, " ".join(filter(None, sentences)), figure, model)


def perplexity_against_bits(records: Sequence[TrialRecord]) -> bytes:
    """Return a PNG of perplexities over bits, with axes for each model and text.

    A trial without a point, because it failed or its perplexity diverged, is named below its axes.
    """
    models = by_model(in_order(records))
    texts = [name for name in headline_metrics(records) if is_perplexity(name)]
    panels = [(model, text) for model in models for text in texts]
    if not panels:
        return png(notice("No perplexity to show: no trial was asked to measure one."))
    looks = study_looks(records)
    columns = len(texts) if len(texts) > 1 else min(3, len(models))
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(4.4 * columns + 0.4, 3.7 * rows + 0.5)
    handles: dict[str, Any] = {}
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for (model, text), axes in zip(panels, grid, strict=False):
        handles |= _draw_lines(axes, pools(models[model], text), looks, text)
        axes.set_title(f"{model}: {text.partition('/')[2]}", fontsize=10)
    for axes in figure.axes[len(panels) :]:
        axes.set_axis_off()
    legend(figure, handles)
    return png(figure)


def _draw_lines(axes: "Axes", tried: Sequence[Pool], looks: Looks, metric: str) -> dict[str, Any]:
    """Draw a metric over bits and return the legend's handles by label.

    Perplexities are drawn relative to the unquantized model's where it is known; otherwise 3 to 8
    bits could not be told apart beside 2. A bit width that was not run leaves a line unbroken; one
    that failed or diverged breaks it.
    """
    quantized = [pool for pool in tried if not pool.is_reference]
    references = [
        pool for pool in tried if pool.is_reference and isinstance(pool.cell(metric), float)
    ]
    level, height = height_of(references, metric)
    handles: dict[str, Any] = {}
    values = []
    for pool in references:
        value = float(pool.cell(metric))
        values.append(height(value))
        handles[pool.label] = axes.axhline(
            height(value), color=SOFT, linestyle="--", label=pool.label
        )
        if is_accuracy(metric) and (ends := pool_interval(pool, metric)) is not None:
            axes.axhspan(*map(height, ends), color=SOFT, alpha=0.1, linewidth=0)
            values += map(height, ends)
        # On the left, where few bits keep the lines far above.
        axes.annotate(
            shown(value, metric),
            (0, height(value)),
            xycoords=("axes fraction", "data"),
            xytext=(3, 3),
            textcoords="offset points",
            fontsize=8,
            color=SOFT,
        )
    by_label: dict[str, list[Pool]] = {}
    for pool in quantized:
        by_label.setdefault(pool.label, []).append(pool)
    # Bars of intervals at one place would hide each other.
    step = min(0.12, 0.5 / max(1, len(by_label))) if is_accuracy(metric) else 0.0
    for number, (label, group) in enumerate(by_label.items()):
        aside = step * (number - (len(by_label) - 1) / 2)
        if heights := _draw_line(axes, group, height, looks[label], metric, aside):
            values += heights
            handles[label] = handle(looks[label], label)
    ticks = sorted({pool.bits for pool in quantized})
    axes.set_xticks(ticks)
    if ticks:
        axes.set_xlim(min(ticks) - 0.3, max(ticks) + 0.3)
    if not values:
        text = "no finite number" if tried else "not measured"
        axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center")
        axes.set_yticks([])
    elif level is not None:
        excess_scale(axes, values)
    elif is_perplexity(metric):
        scale(axes, values)
    missing = [
        f"{pool.label} {pool.bits}-bit {word}"
        for pool in tried
        if isinstance(word := pool.cell(metric), str)
    ]
    below = textwrap.fill(f"not shown: {', '.join(missing)}", 58) if missing else ""
    name_axes(axes, f"bits per weight\n{below}".rstrip(), height_title(metric, level))
    return handles


def _draw_line(
    axes: "Axes",
    tried: Sequence[Pool],
    height: Callable[[float], float],
    look: Look,
    metric: str,
    aside: float = 0.0,
) -> list[float]:
    """Draw one label's line and points and return their heights; empty if it has no number.

    Args:
        aside: how far it is moved to the right.
    """
    tried = sorted(tried, key=lambda pool: pool.bits)
    cells = [pool.cell(metric) for pool in tried]
    heights = [height(cell) if isinstance(cell, float) else math.nan for cell in cells]
    if all(map(math.isnan, heights)):
        return []
    label = tried[0].label
    line(axes, [pool.bits + aside for pool in tried], heights, look, label)
    reached = []
    for pool, cell, y in zip(tried, cells, heights, strict=True):
        if not isinstance(cell, float):
            continue
        reached.append(y)
        spread, own = pool.spread(metric), pool_interval(pool, metric)
        bounds = (cell - spread, cell + spread) if spread is not None else None
        if bounds is None and is_accuracy(metric):
            bounds = own
        x = pool.bits + aside
        if bounds is not None:
            ends = [*map(height, bounds)]
            line(axes, [x, x], ends, {**look, "linestyle": "-"}, label, 1.0)
            reached += ends
        shown_cell = pool.shown(metric, intervals=is_accuracy(metric))
        mark(axes, x, y, look, label, f"{pool.name}: {shown_cell}")
    return reached


def pool_interval(pool: Pool, metric: str) -> tuple[float, float] | None:
    """Return the 95 % interval of a single trial's metric."""
    return interval(pool.records[0], metric) if len(pool.records) == 1 else None
