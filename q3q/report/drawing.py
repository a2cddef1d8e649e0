"""How a picture is drawn: figures, axes, legends, and points that know what they stand for.

No pyplot: nothing global, no display, safe beside a caller's own figures. Every picture is drawn once and written
twice: as PNG, and as SVG whose points carry what they stand for. In the page the SVG takes the page's colours and its
points answer to the mouse, a finger and the keyboard.
"""

import io
import itertools
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape, unescape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# What an SVG group is: a point with a line and words, a cell of a grid, or a legend's entry.
POINT, CELL, ENTRY = "q3q-point", "q3q-cell", "q3q-entry"
# Okabe and Ito's colours, which colour-blind readers can tell apart; yellow is too faint for a line on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
DASHES = ("-", "--", ":", "-.")
METHODS = (
    "rtn",
    "gptq",
    "awq",
    "smoothquant",
    "billm",
)  # whose colours are the same in every report
SOFT = "0.35"
DOTS_PER_INCH = 150
PANEL = (4.0, 3.6)  # inches; as wide as a telephone shows it, so that letters stay legible
SYMBOL, LETTER, ROW = (
    0.5,
    0.072,
    0.2,
)  # inches of a legend: beside a line's name, of a letter of it, of a row
MOST_ENTRIES = 40  # of a legend
MOST_NUMBERED = 12  # columns of a grid whose cells have room for their numbers
MOST_CELLS = 1500  # of a grid that are drawn as shapes which answer; more are one picture

Look = Mapping[str, Any]
Looks = Mapping[str, Look]


@dataclass(frozen=True)
class Plot:
    """One picture. name: of its files. caption: also what is missing from it, in words. model: that it is about."""

    name: str
    title: str
    caption: str
    figure: "Figure"
    model: str = ""

    def png(self) -> bytes:
        return png(self.figure)

    def svg(self) -> bytes:
        """Without a date, and with the same ids each time: the same records give the same bytes."""
        return self._svg

    @cached_property
    def _svg(self) -> bytes:
        from matplotlib import rc_context

        content = io.BytesIO()
        with rc_context({"svg.hashsalt": self.name, "svg.fonttype": "none"}):
            self.figure.savefig(
                content, format="svg", metadata={"Date": None, "Creator": "q3q"}, transparent=True
            )
        return re.sub(
            rb"<g id=\"((?:q3q-point|q3q-cell|q3q-entry)\|[^\"]*)\">", _tagged, content.getvalue()
        )


def figure(width: float, height: float) -> "Figure":
    """An empty figure of so many inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DOTS_PER_INCH, layout="constrained")


def panel() -> tuple["Figure", "Axes"]:
    """A figure of one panel."""
    whole = figure(*PANEL)
    return whole, whole.subplots()


def notice(text: str) -> "Figure":
    whole = figure(5, 1.2)
    whole.text(0.5, 0.5, textwrap.fill(text, 60), ha="center", va="center", fontsize=10)
    return whole


def png(whole: "Figure") -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    content = io.BytesIO()
    FigureCanvasAgg(whole).print_png(content, metadata={"Software": "q3q"})
    return content.getvalue()


# ------------------------------------------------------------------------------------------------- looks


def looks_of(labels: Iterable[str]) -> Looks:
    """A look per label: the colour says the method, marker and dashes which of its variants."""
    found: dict[str, Look] = {}
    variants: dict[str, int] = {}
    distinct = list(dict.fromkeys(labels))
    order = list(dict.fromkeys([*METHODS, *map(method_of, distinct)]))
    for label in distinct:
        method = method_of(label)
        number = variants[method] = variants.get(method, -1) + 1
        found[label] = {
            "color": COLOURS[order.index(method) % len(COLOURS)],
            "marker": MARKERS[(order.index(method) + 3 * number) % len(MARKERS)],
            "linestyle": DASHES[number % len(DASHES)],
        }
    return found


def method_of(label: str) -> str:
    return label.partition(" ")[0]


REFERENCE: Look = {"color": SOFT, "marker": "*", "linestyle": "--"}  # the unquantized model


def points_only(look: Look) -> Look:
    return {**look, "linestyle": ""}


def line_only(look: Look) -> Look:
    return {**look, "marker": ""}


# ------------------------------------------------------------------------------------------------- points


def mark(axes: "Axes", x: float, y: float, look: Look, label: str, words: str) -> None:
    """One point that knows what it stands for."""
    axes.plot(
        [x],
        [y],
        color=look["color"],
        marker=look["marker"],
        markersize=5.5,
        linestyle="",
        gid=_point(label, words),
    )


def line(
    axes: "Axes",
    xs: Sequence[float],
    ys: Sequence[float],
    look: Look,
    label: str,
    width: float = 1.5,
) -> None:
    """A line of one label, broken where there is no number."""
    axes.plot(xs, ys, linewidth=width, gid=_point(label, ""), **line_only(look))


def handle(look: Look) -> Any:
    """What a legend shows of a line."""
    from matplotlib.lines import Line2D

    return Line2D([], [], markersize=5, linewidth=1.5, **look)


def legend(whole: "Figure", drawn: Mapping[str, Any]) -> None:
    """Below the picture, which grows by it; in the page its entries bring out their line."""
    if not drawn:
        return
    shown = dict(itertools.islice(drawn.items(), MOST_ENTRIES))
    width, height = whole.get_size_inches()
    beside = max(1, min(len(shown), int(width / (SYMBOL + LETTER * max(map(len, shown))))))
    rows = math.ceil(len(shown) / beside) + (len(shown) < len(drawn))
    whole.set_size_inches(width, height + ROW * rows)
    box = whole.legend(
        shown.values(),
        shown.keys(),
        loc="outside lower center",
        ncols=beside,
        fontsize=9,
        frameon=False,
    )
    if len(shown) < len(drawn):
        box.set_title(f"the first {len(shown)} of {len(drawn)}")
    for text in box.get_texts():
        text.set_gid(f"{ENTRY}|{text.get_text().replace('unquantized', 'none', 1)}|")


def _point(label: str, words: str) -> str:
    """The id that an SVG group gets, until `_tagged` reads it."""
    return f"{POINT}|{label.replace('|', '/')}|{words.replace('|', '/')}"


def _tagged(found: "re.Match[bytes]") -> bytes:
    """A group of the SVG by what it is, instead of by its id: many may be the same."""
    kind, label, words = unescape(found[1].decode()).split("|")
    of_line = f' data-line="{escape(label)}"' if label else ""
    if kind == ENTRY:
        return f'<g class="entry" tabindex="0" role="button"{of_line}>'.encode()
    if not words:
        return f'<g class="line"{of_line}>'.encode()
    # A reader with a keyboard goes from point to point; the hundreds of cells of a grid would hold them up.
    stop = "" if kind == CELL else ' tabindex="0"'
    # <title> is what a reader of the file alone sees; the page has it in data-tip.
    return f'<g class="point"{stop}{of_line} data-tip="{escape(words)}"><title>{escape(words)}</title>'.encode()


# ------------------------------------------------------------------------------------------------- axes


def dress(axes: "Axes", x: str, y: str) -> None:
    """Name the axes."""
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(True, which="major", color="0.9", linewidth=0.8)
    axes.set_axisbelow(True)


def scale(axes: "Axes", values: Sequence[float]) -> None:
    """A logarithmic axis for values that span more than a decade."""
    if max(values) > 10 * min(values) > 0:
        axes.set_yscale("log")
        plain_numbers(axes.yaxis, max(values) / min(values))


def excess_scale(axes: "Axes", values: Sequence[float]) -> None:
    """An axis of what may lie on both sides of nothing and spans decades: logarithmic but near 0, where it is linear.

    So 0.1 % and 100 % are both seen, and a value that is a little below 0 is not lost.
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


LEAST_EXCESS = 0.01  # percent; what is nearer to nothing is drawn on a linear scale


def plain_numbers(axis: "Axis", span: float) -> None:
    """Ticks of a logarithmic axis as 2, 5, 10 instead of powers of ten."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if span < 1000 else (1.0,)))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def logarithmic(axis: "Axis", values: Sequence[float], set_scale: Callable[[str], Any]) -> None:
    """A logarithmic axis with plain numbers, of which at least two are within reach."""
    set_scale("log")
    span = max(values) / min(values)
    if span > 10:
        plain_numbers(axis, span)
        return
    low, high = min(values), max(values)
    count = 4 if high > 1.15 * low else 1
    ticks = sorted(
        {float(f"{low * (high / low) ** (k / max(1, count - 1)):.2g}") for k in range(count)}
    )
    fixed_ticks(axis, {tick: f"{tick:g}" for tick in ticks})


def fixed_ticks(axis: "Axis", words: Mapping[float, str]) -> None:
    """Ticks at these places alone, with their words."""
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

    axis.set_major_locator(FixedLocator([*words]))
    axis.set_major_formatter(FixedFormatter([*words.values()]))
    axis.set_minor_locator(NullLocator())


# ------------------------------------------------------------------------------------------------- grids


def draw_grid(
    whole: "Figure",
    axes: "Axes",
    grid: list[list[float]],
    what: str,
    where: Callable[[int, int], str],
    *,
    number: str = ".3g",
    nothing: str = "no number",
) -> None:
    """Cells coloured by value, with their numbers where there is room; a cell without a number is grey.

    where: a cell's place in words, by row and column. number: how its value is written. nothing: what grey means.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.patches import Rectangle

    finite = [value for row in grid for value in row if not math.isnan(value)] or [0.0]
    low, high = min(finite), max(finite)
    wide = 0 < 10 * low < high
    norm = LogNorm(low, high) if wide else Normalize(0.0, high or 1.0)
    image = ScalarMappable(norm, colormaps["viridis"])
    if len(grid) * len(grid[0]) > MOST_CELLS:
        axes.set_facecolor("0.7")
        axes.imshow(grid, norm=norm, cmap=image.cmap, aspect="auto", interpolation="nearest")
    else:
        for y, row in enumerate(grid):
            for x, value in enumerate(row):
                colour = "0.7" if math.isnan(value) else image.cmap(norm(value))
                words = f"{where(y, x)}: {nothing if math.isnan(value) else format(value, number)}"
                gid = f"{CELL}||{words.replace('|', '/')}"
                axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colour, gid=gid))
    axes.set_xlim(-0.5, len(grid[0]) - 0.5)
    axes.set_ylim(len(grid) - 0.5, -0.5)
    bar = whole.colorbar(image, ax=axes, pad=0.02)
    bar.set_label(what.partition(" ‖")[0], fontsize=9)
    bar.ax.tick_params(labelsize=8)
    if wide:
        plain_numbers(bar.ax.yaxis, high / low)
    if len(grid[0]) > MOST_NUMBERED:
        return
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            if not math.isnan(value):
                ink = "#111111" if norm(value) > 0.5 else "#ffffff"
                text = format(value, number.replace("3", "2"))
                axes.text(x, y, text, ha="center", va="center", fontsize=7, color=ink)
