"""Pictures. No pyplot: nothing global, no display, safe beside a caller's own figures.

Every picture is drawn once and written twice: as PNG, and as SVG whose points carry what they stand for. In the page
the SVG takes the page's colours and its points answer to the mouse, a finger and the keyboard.
"""

import io
import itertools
import math
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape, unescape
from typing import TYPE_CHECKING, Any

from q3q.record import SiteError, TrialRecord
from q3q.report.measures import (
    ABSENT,
    DIVERGED,
    FAILED,
    MEAN_ACCURACY,
    UNQUANTIZED_BITS,
    bits_of,
    by_model,
    cell,
    headline_metrics,
    in_order,
    is_accuracy,
    is_perplexity,
    labels,
    model_name,
    seconds,
    shown,
)
from q3q.report.tables import method_by_bits

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure
    from pandas import DataFrame

# Okabe and Ito's colours, which colour-blind readers can tell apart; yellow is too faint for a line on white.
POINT, ENTRY = "q3q-point", "q3q-entry"  # what an SVG group is: a point with a line and words, or a legend's entry
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
DOTS_PER_INCH = 150
MOST_ROWS = 64  # of the heatmap; beyond it the linears of a site are averaged
PANEL = (4.0, 3.6)  # inches; as wide as a telephone shows it, so that letters stay legible
MOST_HEATMAPS = 6  # of one model in a page
MOST_NAMED = 12  # trials in a caption
MOST_ENTRIES = 40  # of a legend, which would else leave no room for the picture
MOST_NUMBERED = 12  # blocks of the heatmap whose cells have room for their numbers


@dataclass(frozen=True)
class Plot:
    """One picture. name: of its files. caption: also what is missing from it, in words. model: that it is about."""

    name: str
    title: str
    caption: str
    figure: "Figure"
    model: str = ""

    def png(self) -> bytes:
        return _png(self.figure)

    def svg(self) -> bytes:
        """Without a date, and with the same ids each time: the same records give the same bytes."""
        return self._svg

    @cached_property
    def _svg(self) -> bytes:
        from matplotlib import rc_context

        content = io.BytesIO()
        with rc_context({"svg.hashsalt": self.name, "svg.fonttype": "none"}):
            self.figure.savefig(content, format="svg", metadata={"Date": None, "Creator": "q3q"}, transparent=True)
        return re.sub(rb"<g id=\"((?:q3q-point|q3q-entry)\|[^\"]*)\">", _tagged, content.getvalue())


def study_plots(records: Sequence[TrialRecord], predicted: Mapping[str, float] | None = None) -> list[Plot]:
    """Every picture that these records can fill.

    predicted: seconds that a trial was predicted to take, by its id.
    """
    records = in_order(records)
    models = by_model(records)
    plots: list[Plot] = []
    for model, mine in models.items():
        looks = _looks_of(mine)
        plots += _quality_against_bits(model, mine, looks)
        plots += _quality_against_bytes(model, mine, looks)
        plots += _drift(model, mine, looks)
        plots += _tokens_of_experts(model, mine)
        plots += _errors_of_experts(model, mine)
        plots += _site_errors(model, mine)
    plots += _quality_against_size(models)
    plots += _cost(records, {**(predicted or {}), **_planned(records)})
    return plots


def perplexity_against_bits(records: Sequence[TrialRecord]) -> bytes:
    """Perplexity over bits of a weight: a panel per model and text, a line per method, the unquantized model dashed.

    A point that is missing because its trial failed or its perplexity diverged is named below its panel.
    """
    models = by_model(in_order(records))
    texts = [name for name in headline_metrics(records) if is_perplexity(name)]
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
        axes.set_title(f"{model}: {text.partition('/')[2]}", fontsize=10)
    for axes in figure.axes[len(panels) :]:
        axes.set_axis_off()
    drawn = dict(itertools.islice(drawn.items(), MOST_ENTRIES))
    if drawn:
        inches = 0.6 + 0.08 * max(map(len, drawn))  # of one entry in letters of this size
        beside = max(1, min(len(drawn), int(figure.get_figwidth() / inches)))
        figure.legend(drawn.values(), drawn.keys(), loc="outside lower center", ncols=beside, fontsize=9)
    return _png(figure)


def site_error_heatmap(record: TrialRecord) -> bytes:
    """Error of each quantized linear, a column per block.

    The error of the outputs over the calibration tokens where the method saw some, else that of the weights.
    """
    return _png(_heatmap(record))


def _heatmap(record: TrialRecord) -> "Figure":
    sites, name = record.sites, f"{record.spec.name} · {model_name(record.spec)}"
    if not sites:
        return _notice(f"{name}: no linear was quantized.")
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
    _draw_grid(figure, axes, grid, what, lambda y, x: f"block {blocks[x]}, {rows[y]}")
    step = math.ceil(len(blocks) / 24)
    axes.set_xticks(range(0, len(blocks), step), labels=[str(block) for block in blocks[::step]], fontsize=8)
    axes.set_yticks(range(len(rows)), labels=rows, fontsize=8)
    axes.set_xlabel("block", fontsize=9)
    count = len(sites) // max(1, len(blocks) * len(rows))
    mean = f"\nmean over the {count} linears of each site" if averaged else ""
    missing = sum(math.isnan(value) for row in grid for value in row)
    grey = f"\ngrey: {missing} without a number" if missing else ""
    axes.set_title(f"{name}: {what}{mean}{grey}", fontsize=10)
    return figure


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


def _draw_lines(axes: "Axes", grid: "DataFrame", looks: "Looks", metric: str = "perplexity/text") -> dict[str, Any]:
    """One panel of a metric over bits; returns the legend's handles by label."""
    drawn: dict[str, Any] = {}
    values: list[float] = []
    missing = []
    for label, row in zip(map(str, grid.index), grid.to_dict("records"), strict=True):
        missing += [
            f"{label} {bits}-bit {word}" for bits, word in row.items() if isinstance(word, str) and word != ABSENT
        ]
        scale = 1.0 if is_perplexity(metric) else 100.0
        points = {bits: scale * found for bits, found in row.items() if isinstance(found, float)}
        values += points.values()
        if UNQUANTIZED_BITS in points:
            level = points[UNQUANTIZED_BITS]
            drawn[label.replace("none", "unquantized", 1)] = axes.axhline(level, color="0.35", linestyle="--")
            # On the left, where few bits keep the lines far above.
            axes.annotate(
                shown(level / scale, metric),
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
            axes.plot(bits, heights, linewidth=1.5, gid=_point(label, ""), **{**looks[label], "marker": ""})
            for one, height in points.items():
                words = f"{label}, {one} bits: {shown(height / scale, metric)}"
                _mark(axes, one, height, looks[label], label, words)
            drawn[label] = _handle(looks[label])
    ticks = [bits for bits in grid.columns if bits != UNQUANTIZED_BITS]
    axes.set_xticks(ticks)
    if ticks:
        axes.set_xlim(min(ticks) - 0.3, max(ticks) + 0.3)
    if values and is_perplexity(metric):
        _scale(axes, values)
    elif not values:
        words = "not measured" if grid.empty else "no finite number"
        axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", va="center")
        axes.set_yticks([])
    below = textwrap.fill(f"not shown: {', '.join(missing)}", 58) if missing else ""
    axes.set_xlabel(f"bits of a weight\n{below}".rstrip(), fontsize=9)
    axes.set_ylabel("perplexity per token" if is_perplexity(metric) else "accuracy, %", fontsize=9)
    _dress(axes)
    return drawn


def _dress(axes: "Axes") -> None:
    axes.tick_params(labelsize=8)
    axes.grid(True, which="major", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)


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


def _draw_grid(
    figure: "Figure", axes: "Axes", grid: list[list[float]], what: str, where: Callable[[int, int], str]
) -> None:
    """Cells coloured by value, with their numbers where there is room; a cell without a number is grey."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.patches import Rectangle

    finite = [value for row in grid for value in row if not math.isnan(value)] or [0.0]
    low, high = min(finite), max(finite)
    logarithmic = 0 < 10 * low < high
    norm = LogNorm(low, high) if logarithmic else Normalize(0.0, high or 1.0)
    image = ScalarMappable(norm, colormaps["viridis"])
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            colour = "0.7" if math.isnan(value) else image.cmap(norm(value))
            words = f"{where(y, x)}: {'no number' if math.isnan(value) else f'{value:.3g}'}"
            axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colour, gid=_point("", words)))
    axes.set_xlim(-0.5, len(grid[0]) - 0.5)
    axes.set_ylim(len(grid) - 0.5, -0.5)
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
                ink = "#111111" if norm(value) > 0.5 else "#ffffff"
                axes.text(x, y, f"{value:.2g}", ha="center", va="center", fontsize=7, color=ink)


def _quality_against_bits(model: str, records: Sequence[TrialRecord], looks: "Looks") -> Iterator[Plot]:
    """A line per method; the unquantized model dashed."""
    metrics = headline_metrics(records)
    several = MEAN_ACCURACY in metrics
    for metric in metrics:
        if not is_perplexity(metric) and (metric != MEAN_ACCURACY if several else not is_accuracy(metric)):
            continue
        grid = method_by_bits(records, metric)
        figure = _figure(*PANEL)
        axes = figure.subplots()
        drawn = _draw_lines(axes, grid, looks, metric)
        _legend(figure, drawn)
        what = _what(metric)
        yield Plot(f"{model}-{_slug(metric)}-bits", f"{what} against bits", "", figure, model)


def _quality_against_bytes(model: str, records: Sequence[TrialRecord], looks: "Looks") -> Iterator[Plot]:
    """The Pareto front: what no other trial beats in both."""
    metric = next((name for name in headline_metrics(records) if is_perplexity(name) or is_accuracy(name)), "")
    good = [r for r in records if isinstance(cell(r, metric), float) and "model_bytes" in r.metrics] if metric else []
    if len(good) < 2:
        return
    better = 1 if is_perplexity(metric) else -1
    scale = 1 if better == 1 else 100
    places = [(r.metrics["model_bytes"] / 1e6, scale * float(cell(r, metric))) for r in good]
    front = [
        (size, value)
        for size, value in sorted(places)
        if not any(s <= size and better * v <= better * value and (s, v) != (size, value) for s, v in places)
    ]
    figure = _figure(*PANEL)
    axes = figure.subplots()
    axes.step(*zip(*front, strict=True), where="post", color="0.35", linestyle="--", linewidth=1)
    drawn: dict[str, Any] = {"not beaten in both": _handle({"color": "0.35", "marker": "", "linestyle": "--"})}
    for record, label, (size, value) in zip(good, labels([r.spec for r in good]), places, strict=True):
        look = looks.get(label, {"color": "0.35", "marker": "*", "linestyle": ""})
        words = f"{label}, {bits_of(record.spec)} bits: {_megabytes(size)}, {shown(value / scale, metric)}"
        _mark(axes, size, value, look, label, words)
        drawn[label.replace("none", "unquantized", 1)] = _handle({**look, "linestyle": ""})
    _logarithmic(axes.xaxis, [size for size, _ in places], axes.set_xscale)
    if better == 1:
        _scale(axes, [value for _, value in places])
    axes.set_xlabel("size of the whole model, MB", fontsize=9)
    axes.set_ylabel(_what(metric), fontsize=9)
    _dress(axes)
    _legend(figure, drawn)
    caption = _not_shown([r for r in records if r not in good], metric)
    yield Plot(f"{model}-pareto", f"{_what(metric)} against size", caption, figure, model)


def _drift(model: str, records: Sequence[TrialRecord], looks: "Looks") -> Iterator[Plot]:
    """How far next-token distributions are from the unquantized model's: the mean, and up to where 99 % lie."""
    for text in dict.fromkeys(name[3:] for r in records for name in r.metrics if name.startswith("kl/")):
        good = [r for r in records if r.completed and r.metrics.get(f"kl/{text}", 0) > 0 and r.spec.scheme is not None]
        if not good:
            continue
        figure = _figure(*PANEL)
        axes = figure.subplots()
        drawn: dict[str, Any] = {}
        named = labels([r.spec for r in good])
        order = list(dict.fromkeys(named))
        for record, label in zip(good, named, strict=True):
            mean, high = record.metrics[f"kl/{text}"], record.metrics.get(f"kl_p99/{text}")
            look = looks.get(label, {"color": "0.35", "marker": "*", "linestyle": ""})
            x = bits_of(record.spec) + 0.12 * (order.index(label) - (len(order) - 1) / 2)
            if high is not None:
                axes.plot([x, x], [mean, high], color=look["color"], linewidth=1, gid=_point(label, ""))
                axes.plot([x], [high], color=look["color"], marker="_", gid=_point(label, ""))
            words = f"{label}, {bits_of(record.spec)} bits: mean {mean:.3g}" + (
                f", 99 % below {high:.3g}" if high else ""
            )
            _mark(axes, x, mean, look, label, words)
            drawn[label] = _handle({**look, "linestyle": ""})
        ticks = sorted({bits_of(r.spec) for r in good})
        axes.set_xticks(ticks)
        axes.set_xlim(ticks[0] - 0.6, ticks[-1] + 0.6)
        ends = [r.metrics[name] for r in good for name in (f"kl/{text}", f"kl_p99/{text}") if r.metrics.get(name)]
        _logarithmic(axes.yaxis, ends, axes.set_yscale)
        axes.set_xlabel("bits of a weight", fontsize=9)
        axes.set_ylabel("KL divergence, nats per token", fontsize=9)
        _dress(axes)
        _legend(figure, drawn)
        caption = "From the mean over tokens up to the value that 99 % of them stay below. " + _not_shown(
            [r for r in records if r not in good and r.spec.scheme is not None], f"kl/{text}"
        )
        title = f"KL divergence from the unquantized model, {text}"
        yield Plot(f"{model}-{_slug(text)}-kl", title, caption.strip(), figure, model)


def _tokens_of_experts(model: str, records: Sequence[TrialRecord]) -> Iterator[Plot]:
    """Of one trial for each calibration: which experts saw how many calibration tokens."""
    seen: set[tuple[str, int]] = set()
    for record in records:
        counts = {
            int(where.split(".")[1]): note["tokens_per_expert"]
            for where, note in record.notes.items()
            if isinstance(note, dict) and "tokens_per_expert" in note
        }
        key = (str(record.spec.calibration), record.spec.seed)
        if not counts or key in seen or len(seen) >= MOST_HEATMAPS:
            continue
        seen.add(key)
        numbers = {block: [float(count) or math.nan for count in mine] for block, mine in counts.items()}
        figure = _grid_of_experts(numbers, "calibration tokens")
        without = sum(math.isnan(value) for mine in numbers.values() for value in mine)
        caption = f"As the calibration of {record.spec.name} routed them. Grey: {without} experts saw no token."
        title = "Calibration tokens of each expert"
        yield Plot(f"{model}-{record.spec.id}-experts", title, caption, figure, model)


def _errors_of_experts(model: str, records: Sequence[TrialRecord]) -> Iterator[Plot]:
    """Of the trials with the fewest bits of each method: how far each expert is from what it was."""
    for record in _worst_of_each_method([r for r in records if any(site.experts for site in r.sites)]):
        found: dict[int, list[tuple[float, ...]]] = {}
        for site in record.sites:
            if site.experts is not None:
                found.setdefault(site.block, []).append(site.experts)
        means = {block: [_mean(list(some)) for some in zip(*linears, strict=True)] for block, linears in found.items()}
        outputs = any(site.experts is not None and site.output_error is not None for site in record.sites)
        what = "output error" if outputs else "weight error"
        caption = f"Mean {what} of an expert's gate, up and down, relative to what they were."
        title = f"Error of each expert: {record.spec.name}"
        yield Plot(f"{model}-{record.spec.id}-expert-errors", title, caption, _grid_of_experts(means, what), model)


def _grid_of_experts(numbers: Mapping[int, Sequence[float]], what: str) -> "Figure":
    """numbers: by block, one an expert; nan for none."""
    blocks = sorted(numbers)
    experts = len(numbers[blocks[0]])
    grid = [[numbers[block][e] for block in blocks] for e in range(experts)]
    figure = _figure(2.8 + min(max(3.0, 0.4 * len(blocks)), 10), 1.2 + min(max(1.4, 0.24 * experts), 9))
    axes = figure.subplots()
    _draw_grid(figure, axes, grid, what, lambda y, x: f"block {blocks[x]}, expert {y}")
    step = math.ceil(len(blocks) / 24)
    axes.set_xticks(range(0, len(blocks), step), labels=[str(block) for block in blocks[::step]], fontsize=8)
    axes.set_yticks(range(0, experts, math.ceil(experts / 16)))
    axes.tick_params(labelsize=8)
    axes.set_xlabel("block", fontsize=9)
    axes.set_ylabel("expert", fontsize=9)
    return figure


def _worst_of_each_method(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Of each method the one with the fewest bits, so many as there is room for."""
    chosen: list[TrialRecord] = []
    for record in sorted(records, key=lambda r: bits_of(r.spec)):
        same = [r for r in chosen if r.spec.method["name"] == record.spec.method["name"]]
        if not same and len(chosen) < MOST_HEATMAPS:
            chosen.append(record)
    return chosen


def _site_errors(model: str, records: Sequence[TrialRecord]) -> Iterator[Plot]:
    """Heatmaps of the trials with the fewest bits of each method, where errors are largest."""
    with_sites = [r for r in records if r.sites]
    chosen = _worst_of_each_method(with_sites)
    for record in chosen:
        left = len(with_sites) - len(chosen)
        caption = f"{left} more trials have theirs beside their records in MLflow (heatmap.png)." if left else ""
        name = f"{model}-{record.spec.id}-sites"
        yield Plot(name, f"Error per block and site: {record.spec.name}", caption, _heatmap(record), model)


def _quality_against_size(models: Mapping[str, Sequence[TrialRecord]]) -> Iterator[Plot]:
    """Over models, at each bit width: do larger ones lose less?"""
    everything = [record for mine in models.values() for record in mine]
    metric = next((name for name in headline_metrics(everything) if is_perplexity(name)), None)
    sizes = {model: size for model, mine in models.items() if (size := _parameters(mine)) is not None}
    if metric is None or len(sizes) < 2:
        return
    for bits in sorted({bits_of(record.spec) for record in everything if record.spec.scheme is not None}):
        lines: dict[str, list[tuple[float, float, str]]] = {}
        left_out = []
        for model, mine in models.items():
            some = [r for r in mine if bits_of(r.spec) in (bits, UNQUANTIZED_BITS)]
            for record, label in zip(some, labels([r.spec for r in some]), strict=True):
                value = cell(record, metric)
                if isinstance(value, float) and model in sizes:
                    lines.setdefault(label, []).append((sizes[model], value, model))
                else:
                    left_out.append(record)
        figure = _figure(*PANEL)
        axes = figure.subplots()
        looks = _looks([label for label in lines if not label.startswith("none")])
        drawn = {}
        for label, points in lines.items():
            look = looks.get(label, {"color": "0.35", "marker": "*", "linestyle": "--"})
            points.sort()
            xs, ys = [x for x, _, _ in points], [y for _, y, _ in points]
            axes.plot(xs, ys, linewidth=1.5, gid=_point(label, ""), **{**look, "marker": ""})
            for x, y, model in points:
                _mark(axes, x, y, look, label, f"{label}, {model}: {shown(y, metric)}")
            drawn[label.replace("none", "unquantized", 1)] = _handle(look)
        if not drawn:
            continue
        _logarithmic(axes.xaxis, list(sizes.values()), axes.set_xscale)
        _scale(axes, [y for points in lines.values() for _, y, _ in points])
        axes.set_xlabel("parameters, millions", fontsize=9)
        axes.set_ylabel(_what(metric), fontsize=9)
        _dress(axes)
        _legend(figure, drawn)
        title = f"{_what(metric)} against model size at {bits} bits"
        yield Plot(f"size-{bits}bits", title, _not_shown(left_out, metric), figure)


def _planned(records: Sequence[TrialRecord]) -> dict[str, float]:
    """Seconds that a trial was predicted to take, as its record says; by its id."""
    plans = {r.spec.id: r.environment.get("planned", {}) for r in records}
    return {trial: float(planned["seconds"]) for trial, planned in plans.items() if "seconds" in planned}


def _cost(records: Sequence[TrialRecord], predicted: Mapping[str, float]) -> Iterator[Plot]:
    """Predicted against actual seconds, a point per trial."""
    known = [
        (predicted[r.spec.id], float(seconds(r) or 0), r) for r in records if r.spec.id in predicted and seconds(r)
    ]
    known = [one for one in known if one[0] > 0 and one[2].completed]
    if not known:
        return
    looks = _looks(list(dict.fromkeys(str(r.spec.method["name"]) for _, _, r in known)))
    figure = _figure(*PANEL)
    axes = figure.subplots()
    ends = [min(min(p, a) for p, a, _ in known) / 1.5, max(max(p, a) for p, a, _ in known) * 1.5]
    axes.plot(ends, ends, color="0.35", linestyle="--", linewidth=1)
    drawn = {"as predicted": _handle({"color": "0.35", "marker": "", "linestyle": "--"})}
    for expected, actual, record in known:
        method = str(record.spec.method["name"])
        words = f"{record.spec.name} · {model_name(record.spec)}: predicted {expected:.0f} s, took {actual:.0f} s"
        _mark(axes, expected, actual, looks[method], method, words)
        drawn[method] = _handle({**looks[method], "linestyle": ""})
    for axis, scale in ((axes.xaxis, axes.set_xscale), (axes.yaxis, axes.set_yscale)):
        _logarithmic(axis, ends, scale)
    axes.set_xlabel("predicted, s", fontsize=9)
    axes.set_ylabel("took, s", fontsize=9)
    _dress(axes)
    _legend(figure, drawn)
    caption = (
        f"{len(records) - len(known)} trials without a prediction are not shown." if len(known) < len(records) else ""
    )
    yield Plot("cost", "Predicted against actual cost", caption, figure)


Looks = Mapping[str, Mapping[str, Any]]


def _looks_of(records: Sequence[TrialRecord]) -> dict[str, dict[str, Any]]:
    """One look per method and variant, whatever the plot. Labels differ between plots only where evaluations differ."""
    named = [*labels([r.spec for r in records])]
    for metric in headline_metrics(records):
        named += map(str, method_by_bits(records, metric).index)
    return _looks([label for label in dict.fromkeys(named) if not label.startswith("none")])


def _mark(axes: "Axes", x: float, y: float, look: Mapping[str, Any], label: str, words: str) -> None:
    """One point that knows what it stands for."""
    axes.plot(
        [x], [y], color=look["color"], marker=look["marker"], markersize=5.5, linestyle="", gid=_point(label, words)
    )


def _handle(look: Mapping[str, Any]) -> Any:
    """What a legend shows of a line."""
    from matplotlib.lines import Line2D

    return Line2D([], [], markersize=5, linewidth=1.5, **look)


def _legend(figure: "Figure", drawn: Mapping[str, Any]) -> None:
    """Below the picture; in the page its entries bring out their line."""
    if not drawn:
        return
    shown = dict(itertools.islice(drawn.items(), MOST_ENTRIES))
    beside = max(1, min(len(shown), int(figure.get_figwidth() / (0.6 + 0.08 * max(map(len, shown))))))
    legend = figure.legend(
        shown.values(), shown.keys(), loc="outside lower center", ncols=beside, fontsize=9, frameon=False
    )
    if len(shown) < len(drawn):
        legend.set_title(f"the first {len(shown)} of {len(drawn)}")
    for text in legend.get_texts():
        text.set_gid(f"{ENTRY}|{text.get_text().replace('unquantized', 'none', 1)}|")


def _point(label: str, words: str) -> str:
    """The id that an SVG group gets, until `_tagged` reads it."""
    return f"{POINT}|{label.replace('|', '/')}|{words.replace('|', '/')}"


def _tagged(found: "re.Match[bytes]") -> bytes:
    """A group of the SVG by what it is, instead of by its id: many may be the same."""
    kind, label, words = unescape(found[1].decode()).split("|")
    line = f' data-line="{escape(label)}"' if label else ""
    if kind == ENTRY:
        return f'<g class="entry" tabindex="0" role="button"{line}>'.encode()
    if not words:
        return f'<g class="line"{line}>'.encode()
    # <title> is what a reader of the file alone sees; the page has it in data-tip.
    return f'<g class="point" tabindex="0"{line} data-tip="{escape(words)}"><title>{escape(words)}</title>'.encode()


def _not_shown(records: Sequence[TrialRecord], metric: str) -> str:
    """The trials without a number, in words."""
    words = {DIVERGED: "diverged", FAILED: "failed"}
    told = [
        f"{record.spec.name} ({words.get(str(cell(record, metric)), 'not measured')})"
        for record in records
        if not isinstance(cell(record, metric), float)
    ]
    more = f" and {len(told) - MOST_NAMED} more" if len(told) > MOST_NAMED else ""
    return f"Not shown: {', '.join(told[:MOST_NAMED])}{more}." if told else ""


def _parameters(records: Sequence[TrialRecord]) -> float | None:
    """Millions of parameters, from what a trial says of its size."""
    for record in records:
        if {"model_bytes", "bits_per_weight_model"} <= record.metrics.keys():
            return 8 * record.metrics["model_bytes"] / record.metrics["bits_per_weight_model"] / 1e6
    return None


def _logarithmic(axis: "Axis", values: Sequence[float], scale: Callable[[str], Any]) -> None:
    """A logarithmic axis with plain numbers, of which at least two are within reach."""
    from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

    scale("log")
    span = max(values) / min(values)
    if span > 10:
        _plain_numbers(axis, span)
        return
    low, high = min(values), max(values)
    count = 4 if high > 1.15 * low else 1
    ticks = sorted({float(f"{low * (high / low) ** (k / max(1, count - 1)):.2g}") for k in range(count)})
    axis.set_ticks(ticks)
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _what(metric: str) -> str:
    if metric == MEAN_ACCURACY:
        return "Mean accuracy of the tasks, %"
    if is_perplexity(metric):
        return f"Perplexity of {metric.partition('/')[2]}"
    return f"Accuracy on {metric.removesuffix('/acc')}, %"


def _slug(name: str) -> str:
    return re.sub(r"[^\w]+", "-", name)


def _megabytes(size: float) -> str:
    return f"{size:.3g} MB" if size < 1000 else f"{size / 1000:.3g} GB"


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
