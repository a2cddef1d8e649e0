"""Heatmaps: errors per block and site, and errors and calibration tokens per expert."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from q3q.formatting import plural
from q3q.record import SiteError, TrialRecord
from q3q.report.measures import bits_of, mean_of_numbers
from q3q.report.plots.axes import plain_numbers
from q3q.report.plots.drawing import CELL, Plot, group_id, new_figure, notice, png
from q3q.report.plots.words import slug

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_ROWS = 64  # of a heatmap; beyond it the linears of a site are averaged
MOST_HEATMAPS = 6  # of one model in a page
MOST_NUMBERED = 12  # columns of a grid whose cells have room for their numbers
MOST_CELLS = 1500  # of a grid that are shapes with descriptions; more become one image


def site_error_heatmap(record: TrialRecord) -> bytes:
    """Return a PNG of each quantized linear's error, a column per block.

    The error is that of the outputs on calibration tokens if the method saw any, else the weights'.
    """
    return png(_site_heatmap(record))


def site_errors(model: str, records: Sequence[TrialRecord]) -> Iterator[Plot]:
    """Draw the trials with the fewest bits of each method, whose errors are largest."""
    with_sites = [record for record in records if record.sites]
    chosen = _fewest_bits_of_each_method(with_sites)
    more = len(with_sites) - len(chosen)
    rest = (
        f"{plural(more, 'more trial')} have theirs beside their records in MLflow (heatmap.png)."
        if more
        else ""
    )
    # Errors of outputs and of weights are different quantities: each has a scale of its own.
    grids = {kind: [_site_grid(r) for r in chosen if _has_outputs(r) == kind] for kind in (0, 1)}
    for record in chosen:
        alike = grids[_has_outputs(record)]
        kind = "Output" if _has_outputs(record) else "Weight"
        title = f"{kind} error per block and site: {record.spec.name}"
        scale = f"One colour scale for all {kind.lower()} errors." if len(alike) > 1 else ""
        ends = _ends([row for grid in alike for row in grid.errors])
        name = f"{slug(model)}-{record.spec.id}-sites"
        caption = f"{scale} {rest}".strip()
        yield Plot(name, title, caption, _site_heatmap(record, ends), model)


def tokens_of_experts(model: str, records: Sequence[TrialRecord]) -> Iterator[Plot]:
    """Draw how many calibration tokens each expert saw, for one trial of each calibration."""
    seen: set[tuple[str, int]] = set()
    for record in records:
        counts = _tokens_by_block(record)
        key = (str(record.spec.calibration), record.spec.seed)
        if not counts or key in seen or len(seen) >= MOST_HEATMAPS:
            continue
        seen.add(key)
        numbers = {
            block: [float(count) or math.nan for count in experts]
            for block, experts in counts.items()
        }
        figure = _expert_heatmap(numbers, "calibration tokens", number=",.0f")
        routed = f"Tokens as routed during the calibration of {record.spec.name}."
        caption = f"{routed} Grey: {_missing(numbers.values())} experts saw no token."
        title = "Calibration tokens of each expert"
        yield Plot(f"{slug(model)}-{record.spec.id}-experts", title, caption, figure, model)


def errors_of_experts(model: str, records: Sequence[TrialRecord]) -> Iterator[Plot]:
    """Draw each expert's error, for the trials with the fewest bits of each method.

    An expert that saw no token has no output error: its cell is grey, and no mean includes it.
    """
    with_experts = [r for r in records if any(site.experts for site in r.sites)]
    for record in _fewest_bits_of_each_method(with_experts):
        tokens = _tokens_by_block(record)
        sites = [site for site in record.sites if site.experts is not None]
        kind = "output" if any(site.output_error is not None for site in sites) else "weight"
        linears: dict[int, list[list[float]]] = {}
        for site in sites:
            counts = tokens.get(site.block, []) if site.output_error is not None else []
            errors = [
                error if error > 0 or not counts or counts[expert] else math.nan
                for expert, error in enumerate(site.experts or ())
            ]
            linears.setdefault(site.block, []).append(errors)
        means = {
            block: [mean_of_numbers(list(errors)) for errors in zip(*rows, strict=True)]
            for block, rows in linears.items()
        }
        missing = _missing(means.values())
        grey = f" Grey: {missing} experts saw no token." if missing else ""
        caption = f"Relative {kind} error of an expert, mean over gate, up and down.{grey}"
        title = f"Error of each expert: {record.spec.name}"
        figure = _expert_heatmap(means, f"{kind} error")
        yield Plot(f"{slug(model)}-{record.spec.id}-expert-errors", title, caption, figure, model)


@dataclass(frozen=True)
class SiteGrid:
    """Errors by site (rows) and block (columns), nan for none.

    averaged: how many linears of a site a cell is the mean of, 1 if each has its own.
    """

    rows: list[str]
    blocks: list[int]
    errors: list[list[float]]
    averaged: int


def _has_outputs(record: TrialRecord) -> bool:
    return any(site.output_error is not None for site in record.sites)


def _site_grid(record: TrialRecord) -> SiteGrid:
    sites, outputs = record.sites, _has_outputs(record)
    keys = [f"{site.site}/{site.linear}" for site in sites]
    averaged = len(set(keys)) > MOST_ROWS
    if averaged:
        keys = [site.site for site in sites]
    rows, blocks = list(dict.fromkeys(keys)), sorted({site.block for site in sites})
    errors: dict[tuple[str, int], list[float]] = {}
    for key, site in zip(keys, sites, strict=True):
        errors.setdefault((key, site.block), []).append(_error(site, outputs))
    grid = [[mean_of_numbers(errors.get((row, block), [])) for block in blocks] for row in rows]
    count = len(sites) // max(1, len(blocks) * len(rows)) if averaged else 1
    return SiteGrid(rows, blocks, grid, count)


def _site_heatmap(record: TrialRecord, ends: tuple[float, float] | None = None) -> "Figure":
    """Draw a trial's errors. ends: of the colour scale, by default its own smallest and largest."""
    name = f"{record.spec.name} · {record.spec.model.label}"
    if not record.sites:
        return notice(f"{name}: no linear was quantized.")
    outputs = _has_outputs(record)
    quantity = "output error ‖X(W − Q)ᵀ‖ / ‖XWᵀ‖" if outputs else "weight error ‖W − Q‖ / ‖W‖"
    heatmap = _site_grid(record)
    grid, rows, blocks = heatmap.errors, heatmap.rows, heatmap.blocks
    height = 1.2 + max(1.2, 0.3 * len(rows))
    figure = new_figure(2.8 + min(max(3.6, 0.4 * len(blocks)), 10), height)
    axes = figure.subplots()
    draw_grid(figure, axes, grid, quantity, lambda y, x: f"block {blocks[x]}, {rows[y]}", ends=ends)
    _name_blocks(axes, blocks)
    axes.set_yticks(range(len(rows)), labels=rows, fontsize=8)
    linears = f"\nmean over the {heatmap.averaged} linears of each site"
    mean = linears if heatmap.averaged > 1 else ""
    missing = _missing(grid)
    grey = f"\ngrey: {missing} without a number" if missing else ""
    axes.set_title(f"{name}: {quantity}{mean}{grey}", fontsize=10)
    return figure


def _expert_heatmap(
    numbers: Mapping[int, Sequence[float]], quantity: str, number: str = ".3g"
) -> "Figure":
    """Draw a row per expert and a column per block.

    Args:
        numbers: by block, one for each expert; nan for none.
    """
    blocks = sorted(numbers)
    experts = len(numbers[blocks[0]])
    grid = [[numbers[block][e] for block in blocks] for e in range(experts)]
    height = 1.2 + min(max(1.4, 0.24 * experts), 9)
    figure = new_figure(2.8 + min(max(3.0, 0.4 * len(blocks)), 10), height)
    axes = figure.subplots()
    draw_grid(
        figure,
        axes,
        grid,
        quantity,
        lambda y, x: f"block {blocks[x]}, expert {y}",
        number=number,
        missing="no token",
    )
    _name_blocks(axes, blocks)
    axes.set_yticks(range(0, experts, math.ceil(experts / 16)))
    axes.tick_params(labelsize=8)
    axes.set_ylabel("expert", fontsize=9)
    return figure


def _name_blocks(axes: "Axes", blocks: Sequence[int]) -> None:
    step = math.ceil(len(blocks) / 24)
    names = [str(block) for block in blocks[::step]]
    axes.set_xticks(range(0, len(blocks), step), labels=names, fontsize=8)
    axes.set_xlabel("block", fontsize=9)


def draw_grid(
    figure: "Figure",
    axes: "Axes",
    grid: Sequence[Sequence[float]],
    quantity: str,
    place: Callable[[int, int], str],
    *,
    number: str = ".3g",
    missing: str = "no number",
    ends: tuple[float, float] | None = None,
) -> None:
    """Colour cells by value, with their numbers where there is room; nan is grey.

    Args:
        place: describes a cell by its row and column.
        number: format of a value.
        missing: describes a grey cell.
        ends: of the colour scale; by default the smallest and the largest value.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.patches import Rectangle

    low, high = ends or _ends(grid)
    wide = 0 < 10 * low < high
    norm = LogNorm(low, high) if wide else Normalize(0.0, high or 1.0)
    image = ScalarMappable(norm, colormaps["viridis"])
    cells = [(x, y, value) for y, row in enumerate(grid) for x, value in enumerate(row)]
    if len(cells) > MOST_CELLS:
        axes.set_facecolor("0.7")
        axes.imshow(grid, norm=norm, cmap=image.cmap, aspect="auto", interpolation="nearest")
    else:
        for x, y, value in cells:
            colour = "0.7" if math.isnan(value) else image.cmap(norm(value))
            text = missing if math.isnan(value) else format(value, number)
            gid = group_id(CELL, "", f"{place(y, x)}: {text}")
            axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colour, gid=gid))
    axes.set_xlim(-0.5, len(grid[0]) - 0.5)
    axes.set_ylim(len(grid) - 0.5, -0.5)
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_label(quantity.partition(" ‖")[0], fontsize=9)
    bar.ax.tick_params(labelsize=8)
    if wide:
        plain_numbers(bar.ax.yaxis, high / low)
    if len(grid[0]) > MOST_NUMBERED:
        return
    for x, y, value in cells:
        if not math.isnan(value):
            ink = "#111111" if norm(value) > 0.5 else "#ffffff"
            text = format(value, number.replace("3", "2"))
            axes.text(x, y, text, ha="center", va="center", fontsize=7, color=ink)


def _ends(grid: Iterable[Sequence[float]]) -> tuple[float, float]:
    finite = [value for row in grid for value in row if not math.isnan(value)] or [0.0]
    return min(finite), max(finite)


def _fewest_bits_of_each_method(records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Return each method's trial with the fewest bits, at most as many as a page has room for."""
    chosen: dict[object, TrialRecord] = {}
    for record in sorted(records, key=lambda record: bits_of(record.spec)):
        chosen.setdefault(record.spec.method.name, record)
    return list(chosen.values())[:MOST_HEATMAPS]


def _tokens_by_block(record: TrialRecord) -> dict[int, list[int]]:
    """Return each expert's calibration tokens, by block."""
    return {
        int(place.split(".")[1]): note["tokens_per_expert"]
        for place, note in record.notes.items()
        if isinstance(note, dict) and "tokens_per_expert" in note
    }


def _error(site: SiteError, outputs: bool) -> float:
    error = site.output_error if outputs else site.weight_error
    return math.nan if error is None or not math.isfinite(error) else error


def _missing(rows: Iterable[Sequence[float]]) -> int:
    return sum(math.isnan(value) for row in rows for value in row)
