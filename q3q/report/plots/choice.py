"""The picture of the answer: quality against bytes, with intervals, the recommended one marked."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from q3q.evaluation import change_unit, is_perplexity
from q3q.formatting import bytes_in_words, plural
from q3q.report.budgets import Memory, size_of
from q3q.report.changes import Change
from q3q.report.families import Families
from q3q.report.measures import short
from q3q.report.plots.axes import excess_scale, logarithmic, name_axes
from q3q.report.plots.drawing import Plot, handle, legend, mark, panel
from q3q.report.plots.looks import REFERENCE, SOFT, Looks, points_only
from q3q.report.plots.words import slug
from q3q.report.pools import Pool
from q3q.report.sizes import Size, sizes_note

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RING = "recommended"
MOST_WIDTHS = 6  # that are named beside their points


def picture_of_answer(
    name: str,
    tried: Sequence[Pool],
    reference: Pool | None,
    tests: Families,
    metric: str,
    chosen: Pool | None,
    looks: Looks,
    memory: Memory | None = None,
) -> Plot | None:
    """Draw each choice's change against its size; None if fewer than two are known.

    Args:
        chosen: the recommended choice, which gets a ring.
        memory: the cache that sizes count too.
    """
    points = [
        (pool, size, change)
        for pool in tried
        if (size := size_of(pool, memory)) is not None
        and (change := tests.change(pool, metric)) is not None
    ]
    if len(points) < 2:
        return None
    figure, axes = panel()
    axes.axhline(0, color=SOFT, linewidth=0.8, linestyle=":")
    handles, heights = {}, [0.0]
    unquantized = size_of(reference, memory) if reference else None
    if reference is not None and unquantized is not None:
        x = unquantized.value / 1e6
        description = f"{reference.name}: {bytes_in_words(unquantized.value)}"
        mark(axes, x, 0.0, REFERENCE, reference.label, description)
        handles[reference.label] = handle(points_only(REFERENCE), reference.label)
    for pool, size, change in points:
        look = looks.get(pool.label, REFERENCE)
        x, y = size.value / 1e6, 100 * change.value
        heights += [y]
        if change.low is not None and change.high is not None:
            ends = [100 * change.low, 100 * change.high]
            heights += ends
            axes.plot([x, x], ends, color=look["color"], linewidth=1.2, alpha=0.7)
        if pool is chosen:
            axes.plot(
                [x], [y], marker="o", markersize=14, fillstyle="none", color=SOFT,
                linestyle="", markeredgewidth=1.6,
            )  # fmt: skip
            own = "" if pool.spec.budget else f", {plural(pool.bits, 'bit')}"
            _write(axes, RING + own, (x, y), (0, 11), "center")
        description = f"{pool.name}: {bytes_in_words(size.value)}, {change.amount}"
        mark(axes, x, y, look, pool.label, description)
        handles[pool.label] = handle(points_only(look), pool.label)
    for bits, place in _widths(points, chosen).items():
        _write(axes, plural(bits, "bit"), place, (9, -3), "left")
    sizes = [size.value / 1e6 for _, size, _ in points]
    sizes += [unquantized.value / 1e6] if unquantized else []
    logarithmic(axes.xaxis, sizes, axes.set_xscale)
    if is_perplexity(metric):
        excess_scale(axes, heights)
    words = short(metric).removesuffix(", %").replace("perplexity, ", "perplexity of ")
    unit = change_unit(metric)
    size_in_words = "size of the whole model"
    if memory is not None:
        size_in_words = f"weights and cache of {memory.context:,} tokens"
    name_axes(axes, f"{size_in_words}, MB", f"change of {words} ({unit})")
    legend(figure, handles)
    rules = [size.rule for _, size, _ in points]
    title = f"What each choice costs: {words} against size"
    return Plot(f"{slug(name)}-answer", title, sizes_note(rules), figure, name)


def _widths(
    points: Sequence[tuple[Pool, Size, Change]], chosen: Pool | None
) -> dict[int, tuple[float, float]]:
    """Return where each width is named: at its choice that costs least, unless that has a ring."""
    lowest: dict[int, tuple[Pool, Size, Change]] = {}
    for pool, size, change in points:
        if pool.spec.budget is None and (
            pool.bits not in lowest or abs(change.value) < abs(lowest[pool.bits][2].value)
        ):
            lowest[pool.bits] = pool, size, change
    if len(lowest) > MOST_WIDTHS:
        return {}
    return {
        bits: (size.value / 1e6, 100 * change.value)
        for bits, (pool, size, change) in lowest.items()
        if chosen is None or pool.bits != chosen.bits
    }


def _write(
    axes: "Axes", text: str, place: tuple[float, float], offset: tuple[float, float], side: str
) -> None:
    axes.annotate(text, place, xytext=offset, textcoords="offset points", fontsize=9, ha=side)
