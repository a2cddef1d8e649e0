"""Pictures, as PNG bytes. No pyplot: nothing global, no display, safe beside a caller's own figures."""

import io
import math
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from q3q.record import SiteError, TrialRecord
from q3q.report.tables import (
    ABSENT,
    UNQUANTIZED_BITS,
    by_model,
    headline_metrics,
    in_order,
    method_by_bits,
    model_name,
    shown,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from pandas import DataFrame

# Okabe and Ito's colours, which colour-blind readers can tell apart; yellow is too faint for a line on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
DOTS_PER_INCH = 150
MOST_ROWS = 64  # of the heatmap; beyond it the linears of a site are averaged
MOST_NUMBERED = 12  # blocks of the heatmap whose cells have room for their numbers


def perplexity_against_bits(records: Sequence[TrialRecord]) -> bytes:
    """Perplexity over bits of a weight: a panel per model and text, a line per method, the unquantized model dashed.

    A point that is missing because its trial failed or its perplexity diverged is named below its panel.
    """
    models = by_model(in_order(records))
    texts = [name for name in headline_metrics(records) if name.startswith("perplexity/")]
    panels = [(model, text) for model in models for text in texts]
    if not panels:
        return _png(_notice("No perplexity to show: no trial was asked to measure one."))
    grids = [method_by_bits(models[model], text) for model, text in panels]
    # One look per label in all panels, so that one legend serves them.
    named = dict.fromkeys(str(label) for grid in grids for label in grid.index)
    looks = _looks([label for label in named if not label.startswith("none")])
    rows, columns = (len(models), len(texts)) if len(texts) > 1 else _near_square(len(models))
    figure = _figure(4.4 * columns + 0.4, 3.7 * rows + 0.5)
    drawn: dict[str, Any] = {}
    places = figure.subplots(rows, columns, squeeze=False).flat[: len(panels)]
    for (model, text), grid, axes in zip(panels, grids, places, strict=True):
        drawn |= _draw_lines(axes, grid, looks)
        axes.set_title(f"{model}: {text.removeprefix('perplexity/')}", fontsize=10)
    for axes in figure.axes[len(panels) :]:
        axes.set_axis_off()
    if drawn:
        inches = 0.6 + 0.08 * max(map(len, drawn))  # of one entry in letters of this size
        beside = max(1, min(len(drawn), int(figure.get_figwidth() / inches)))
        figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=beside, fontsize=9)
    return _png(figure)


def site_error_heatmap(record: TrialRecord) -> bytes:
    """Error of each quantized linear, a column per block.

    The error of the outputs over the calibration tokens where the method saw some, else that of the weights.
    """
    sites, name = record.sites, f"{record.spec.name} · {model_name(record.spec)}"
    if not sites:
        return _png(_notice(f"{name}: no linear was quantized."))
    outputs = any(site.output_error is not None for site in sites)
    what = "output error ‖X(W − Q)ᵀ‖ / ‖XWᵀ‖" if outputs else "weight error ‖W − Q‖ / ‖W‖"
    keys = [f"{site.site}/{site.linear}" for site in sites]
    averaged = len(set(keys)) > MOST_ROWS
    if averaged:
        keys = [site.site for site in sites]
    rows, blocks = list(dict.fromkeys(keys)), sorted({site.block for site in sites})
    found: dict[tuple[str, int], list[float]] = {}
    for key, site in zip(keys, sites, strict=True):
        found.setdefault((key, site.block), []).append(_error(site, outputs))
    grid = [[_mean(found.get((row, block), [])) for block in blocks] for row in rows]
    figure = _figure(2.8 + min(max(3.6, 0.4 * len(blocks)), 10), 1.2 + max(1.2, 0.3 * len(rows)))
    axes = figure.subplots()
    _draw_grid(figure, axes, grid, what)
    step = math.ceil(len(blocks) / 24)
    axes.set_xticks(range(0, len(blocks), step), labels=[str(block) for block in blocks[::step]], fontsize=8)
    axes.set_yticks(range(len(rows)), labels=rows, fontsize=8)
    axes.set_xlabel("block", fontsize=9)
    count = len(sites) // max(1, len(blocks) * len(rows))
    mean = f"\nmean over the {count} linears of each site" if averaged else ""
    missing = sum(math.isnan(value) for row in grid for value in row)
    grey = f"\ngrey: {missing} without a number" if missing else ""
    axes.set_title(f"{name}: {what}{mean}{grey}", fontsize=10)
    return _png(figure)


def _looks(names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """A colour and marker per line; the dashes change when the colours start again."""
    return {
        name: {
            "color": COLOURS[number % len(COLOURS)],
            "marker": MARKERS[number % len(MARKERS)],
            "linestyle": ("-", "-.", ":")[number // len(COLOURS) % 3],
        }
        for number, name in enumerate(names)
    }


def _draw_lines(axes: "Axes", grid: "DataFrame", looks: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One panel of perplexities; returns the legend's handles by label."""
    drawn: dict[str, Any] = {}
    values: list[float] = []
    missing = []
    for label, row in zip(map(str, grid.index), grid.to_dict("records"), strict=True):
        missing += [
            f"{label} {bits}-bit {word}" for bits, word in row.items() if isinstance(word, str) and word != ABSENT
        ]
        points = {bits: found for bits, found in row.items() if isinstance(found, float)}
        values += points.values()
        if UNQUANTIZED_BITS in points:
            level = points[UNQUANTIZED_BITS]
            drawn[label.replace("none", "unquantized", 1)] = axes.axhline(level, color="0.35", linestyle="--")
            # On the left, where few bits keep the lines far above.
            axes.annotate(
                shown(level, "perplexity"),
                (0, level),
                xycoords=("axes fraction", "data"),
                xytext=(3, 3),
                textcoords="offset points",
                fontsize=8,
                color="0.35",
            )
        elif points:
            # A point that is missing breaks the line: nothing was measured there.
            bits = [one for one in grid.columns if one != UNQUANTIZED_BITS]
            heights = [points.get(one, math.nan) for one in bits]
            [drawn[label]] = axes.plot(bits, heights, markersize=5, linewidth=1.5, **looks[label])
    ticks = [bits for bits in grid.columns if bits != UNQUANTIZED_BITS]
    axes.set_xticks(ticks)
    if ticks:
        axes.set_xlim(min(ticks) - 0.3, max(ticks) + 0.3)
    if values:
        _scale(axes, values)
    else:
        words = "not measured" if grid.empty else "no finite perplexity"
        axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", va="center")
        axes.set_yticks([])
    below = textwrap.fill(f"not shown: {', '.join(missing)}", 58) if missing else ""
    axes.set_xlabel(f"bits of a weight\n{below}".rstrip(), fontsize=9)
    axes.set_ylabel("perplexity per token", fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(True, which="major", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)
    return drawn


def _scale(axes: "Axes", values: Sequence[float]) -> None:
    """A logarithmic axis for values that span more than a decade."""
    if max(values) > 10 * min(values):
        axes.set_yscale("log")
        _plain_numbers(axes.yaxis, max(values) / min(values))


def _plain_numbers(axis: "Axis", span: float) -> None:
    """Ticks of a logarithmic axis as 2, 5, 10 instead of powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if span < 1000 else (1.0,)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _draw_grid(figure: "Figure", axes: "Axes", grid: list[list[float]], what: str) -> None:
    """Cells coloured by value, with their numbers where there is room; a cell without a number is grey."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm, Normalize

    finite = [value for row in grid for value in row if not math.isnan(value)] or [0.0]
    low, high = min(finite), max(finite)
    logarithmic = 0 < 10 * low < high
    norm = LogNorm(low, high) if logarithmic else Normalize(0.0, high or 1.0)
    image = axes.imshow(grid, aspect="auto", norm=norm, cmap=colormaps["viridis"].with_extremes(bad="0.85"))
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_label(what.partition(" ‖")[0], fontsize=9)
    bar.ax.tick_params(labelsize=8)
    if logarithmic:
        _plain_numbers(bar.ax.yaxis, high / low)
    if len(grid[0]) > MOST_NUMBERED:
        return
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            if not math.isnan(value):
                ink = "black" if norm(value) > 0.5 else "white"
                axes.text(x, y, f"{value:.2g}", ha="center", va="center", fontsize=7, color=ink)


def _error(site: SiteError, outputs: bool) -> float:
    error = site.output_error if outputs else site.weight_error
    return math.nan if error is None or not math.isfinite(error) else error


def _mean(values: Sequence[float]) -> float:
    """Mean of the numbers among them; nan if there are none."""
    finite = [value for value in values if not math.isnan(value)]
    return math.fsum(finite) / len(finite) if finite else math.nan


def _near_square(count: int) -> tuple[int, int]:
    columns = min(3, count)
    return math.ceil(count / columns), columns


def _figure(width: float, height: float) -> "Figure":
    """An empty figure of so many inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DOTS_PER_INCH, layout="constrained")


def _notice(text: str) -> "Figure":
    figure = _figure(5, 1.2)
    figure.text(0.5, 0.5, textwrap.fill(text, 60), ha="center", va="center", fontsize=10)
    return figure


def _png(figure: "Figure") -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    content = io.BytesIO()
    FigureCanvasAgg(figure).print_png(content, metadata={"Software": "q3q"})
    return content.getvalue()
