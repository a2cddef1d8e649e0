"""Axes: their titles, scales and ticks."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from q3q.evaluation import is_perplexity
from q3q.report.pools import Pool

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

LEAST_EXCESS = 0.01  # percent; smaller values lie on a linear scale


def name_axes(axes: "Axes", x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(True, which="major", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)


def height_of(
    references: Sequence[Pool], metric: str
) -> tuple[float | None, Callable[[float], float]]:
    """Choose how high a metric's value is drawn.

    Perplexities are drawn in percent above the unquantized model's, if exactly one is measured;
    accuracies in percent.

    Returns:
        the unquantized model's perplexity if heights are relative to it, else None; and the
        function from a value to its height.
    """
    levels = [value for pool in references if isinstance(value := pool.cell(metric), float)]
    if not is_perplexity(metric):
        return None, lambda value: 100 * value
    if len(levels) != 1:
        return None, lambda value: value
    return levels[0], lambda value: 100 * (value / levels[0] - 1)


def height_title(metric: str, level: float | None) -> str:
    """Return the title of an axis whose heights come from `height_of`."""
    if level is not None:
        return "perplexity increase (%)"
    return "perplexity per token" if is_perplexity(metric) else "accuracy, %"


def scale(axes: "Axes", values: Sequence[float]) -> None:
    """Make the vertical axis logarithmic if the values span more than a decade."""
    if max(values) > 10 * min(values) > 0:
        axes.set_yscale("log")
        plain_numbers(axes.yaxis, max(values) / min(values))


def excess_scale(axes: "Axes", values: Sequence[float]) -> None:
    """Make the vertical axis logarithmic on both sides of 0 and linear near it.

    Both 0.1 % and 100 % stay visible, and so does a value slightly below 0.
    """
    from matplotlib.ticker import FuncFormatter, NullLocator, SymmetricalLogLocator

    sizes = [abs(value) for value in values if value != 0] or [1.0]
    linear = 10.0 ** math.floor(math.log10(min(max(min(sizes), LEAST_EXCESS), max(sizes))))
    axes.set_yscale("symlog", linthresh=linear, linscale=0.5)
    decades = math.log10(max(sizes) / linear)
    locator = SymmetricalLogLocator(
        linthresh=linear, base=10, subs=(1.0,) if decades > 2 else (1.0, 2.0, 5.0)
    )
    axes.yaxis.set_major_locator(locator)
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    low, high = min(0.0, *values), max(0.0, *values)
    axes.set_ylim(
        low * 1.6 - (0.1 * linear if low == 0 else 0),
        high * 1.6 + (0.1 * linear if high == 0 else 0),
    )


def plain_numbers(axis: "Axis", span: float) -> None:
    """Label a logarithmic axis with 2, 5, 10 instead of powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if span < 1000 else (1.0,)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def logarithmic(axis: "Axis", values: Sequence[float], set_scale: Callable[[str], Any]) -> None:
    """Make an axis logarithmic with plain numbers and at least two ticks in view."""
    set_scale("log")
    low, high = min(values), max(values)
    if high / low > 10:
        plain_numbers(axis, high / low)
        return
    count = 4 if high > 1.15 * low else 1
    ticks = sorted(
        {float(f"{low * (high / low) ** (k / max(1, count - 1)):.2g}") for k in range(count)}
    )
    fixed_ticks(axis, {tick: f"{tick:g}" for tick in ticks})


def fixed_ticks(axis: "Axis", texts: Mapping[float, str]) -> None:
    """Show ticks at these positions only, each with its text."""
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

    axis.set_major_locator(FixedLocator([*texts]))
    axis.set_major_formatter(FixedFormatter([*texts.values()]))
    axis.set_minor_locator(NullLocator())
