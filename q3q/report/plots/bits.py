"""Quality against the bits of a weight: a line per method, the unquantized model dashed."""

import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from q3q.record import TrialRecord
from q3q.report.measures import (
    by_model,
    headline_metrics,
    in_order,
    is_accuracy,
    is_perplexity,
    shown,
)
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
from q3q.report.plots.words import metric_title, shown_label, slug
from q3q.report.pools import Pool, pools
from q3q.spec import MEAN_ACCURACY

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def quality_against_bits(
    model: str, records: Sequence[TrialRecord], looks: Looks
) -> Iterator[Plot]:
    """Draw each perplexity, and the mean accuracy or, of a single task, its accuracy."""
    metrics = headline_metrics(records)
    accuracies = [MEAN_ACCURACY] if MEAN_ACCURACY in metrics else [*filter(is_accuracy, metrics)]
    drawn = {*filter(is_perplexity, metrics), *accuracies}
    for metric in [name for name in metrics if name in drawn]:
        tried = pools(records, metric)
        figure, axes = panel()
        legend(figure, _draw_lines(axes, tried, looks, metric))
        spread = any(pool.spread(metric) for pool in tried)
        caption = "Bars: standard deviation over seeds." if spread else ""
        name, title = f"{model}-{slug(metric)}-bits", f"{metric_title(metric)} against bits"
        yield Plot(name, title, caption, figure, model)


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
    quantized = [pool for pool in tried if pool.spec.scheme is not None]
    references = [
        pool for pool in tried if pool.spec.scheme is None and isinstance(pool.cell(metric), float)
    ]
    level, height = height_of(references, metric)
    handles: dict[str, Any] = {}
    values = []
    for pool in references:
        value = float(pool.cell(metric))
        values.append(height(value))
        handles[pool.label] = axes.axhline(
            height(value), color=SOFT, linestyle="--", label=shown_label(pool)
        )
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
    for label, group in by_label.items():
        if heights := _draw_line(axes, group, height, looks[label], metric):
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
    name_axes(axes, f"bits of a weight\n{below}".rstrip(), height_title(metric, level))
    return handles


def _draw_line(
    axes: "Axes",
    tried: Sequence[Pool],
    height: Callable[[float], float],
    look: Look,
    metric: str,
) -> list[float]:
    """Draw one label's line and points and return their heights; empty if it has no number."""
    tried = sorted(tried, key=lambda pool: pool.bits)
    cells = [pool.cell(metric) for pool in tried]
    heights = [height(cell) if isinstance(cell, float) else math.nan for cell in cells]
    if all(map(math.isnan, heights)):
        return []
    label = tried[0].label
    line(axes, [pool.bits for pool in tried], heights, look, label)
    reached = []
    for pool, cell, y in zip(tried, cells, heights, strict=True):
        if not isinstance(cell, float):
            continue
        reached.append(y)
        if (spread := pool.spread(metric)) is not None:
            ends = [height(cell - spread), height(cell + spread)]
            line(axes, [pool.bits, pool.bits], ends, {**look, "linestyle": "-"}, label, 1.0)
            reached += ends
        mark(axes, pool.bits, y, look, label, f"{pool.name}: {pool.shown(metric)}")
    return reached
