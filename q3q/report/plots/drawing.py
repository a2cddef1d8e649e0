"""Figures, legends, and points that know which trial they stand for.

No pyplot: no global state, no display, safe beside a caller's own figures. A plot is drawn once and
written as PNG and as SVG. The SVG's points carry their values: in the page it takes the page's
colours, and its points answer to mouse, touch and keyboard.
"""

import io
import itertools
import math
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape, unescape
from typing import TYPE_CHECKING, Any

from q3q.report.plots.looks import Look, line_only

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The kinds of tagged SVG groups: a point of a line, a cell of a grid, an entry of a legend.
POINT, CELL, ENTRY = "q3q-point", "q3q-cell", "q3q-entry"
DOTS_PER_INCH = 150
PANEL = (4.0, 3.6)  # inches; as wide as a phone shows it, so that letters stay legible
WIDE = 4.5  # inches; wider plots get more room in the page
# Inches that a legend needs for a symbol, a letter and a row.
SYMBOL, LETTER, ROW = 0.5, 0.072, 0.2
MOST_ENTRIES = 40  # of a legend


@dataclass(frozen=True)
class Plot:
    """A figure and the words around it.

    name: file name without suffix.
    caption: remarks, among them what the plot cannot show.
    model: the model that it is about; empty if it is about several.
    """

    name: str
    title: str
    caption: str
    figure: "Figure"
    model: str = ""

    @property
    def wide(self) -> bool:
        return bool(self.figure.get_figwidth() > WIDE)

    def png(self) -> bytes:
        return png(self.figure)

    def svg(self) -> bytes:
        """Return an SVG without a date and with stable ids: equal records give equal bytes."""
        return self._svg

    @cached_property
    def _svg(self) -> bytes:
        from matplotlib import rc_context

        content = io.BytesIO()
        _take_dollars_as_text(self.figure)
        with rc_context({"svg.hashsalt": self.name, "svg.fonttype": "none"}):
            self.figure.savefig(
                content, format="svg", metadata={"Date": None, "Creator": "q3q"}, transparent=True
            )
        return re.sub(
            rb"<g id=\"((?:q3q-point|q3q-cell|q3q-entry)\|[^\"]*)\">", _tagged, content.getvalue()
        )


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure; width and height are in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DOTS_PER_INCH, layout="constrained")


def panel() -> tuple["Figure", "Axes"]:
    """Return a figure with one pair of axes."""
    figure = new_figure(*PANEL)
    return figure, figure.subplots()


def notice(text: str) -> "Figure":
    """Return a figure that shows nothing but text."""
    figure = new_figure(5, 1.2)
    figure.text(0.5, 0.5, textwrap.fill(text, 60), ha="center", va="center", fontsize=10)
    return figure


def png(figure: "Figure") -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    content = io.BytesIO()
    _take_dollars_as_text(figure)
    FigureCanvasAgg(figure).print_png(content, metadata={"Software": "q3q"})
    return content.getvalue()


def _take_dollars_as_text(figure: "Figure") -> None:
    """Switch off formulas: a name with two dollar signs would be set as one, or fail."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)


def mark(axes: "Axes", x: float, y: float, look: Look, label: str, description: str) -> None:
    """Draw a point of a label's line, with the description that the page shows for it."""
    axes.plot(
        [x],
        [y],
        color=look["color"],
        marker=look["marker"],
        fillstyle=look.get("fillstyle", "full"),
        markersize=5.5,
        linestyle="",
        gid=group_id(POINT, label, description),
    )


def line(
    axes: "Axes",
    xs: Sequence[float],
    ys: Sequence[float],
    look: Look,
    label: str,
    width: float = 1.5,
) -> None:
    """Draw a label's line; nan breaks it."""
    axes.plot(xs, ys, linewidth=width, gid=group_id(POINT, label), **line_only(look))


def handle(look: Look, text: str) -> Any:
    """Return a legend's symbol for a line, and the text beside it."""
    from matplotlib.lines import Line2D

    return Line2D([], [], markersize=5, linewidth=1.5, label=text, **look)


def legend(figure: "Figure", handles: Mapping[str, Any]) -> None:
    """Add a legend below the axes; the figure grows by its height.

    Args:
        handles: `handle`s by the label of their line. In the page an entry highlights its line.
    """
    if not handles:
        return
    shown = dict(itertools.islice(handles.items(), MOST_ENTRIES))
    texts = [handle.get_label() for handle in shown.values()]
    width, height = figure.get_size_inches()
    columns = max(1, min(len(texts), int(width / (SYMBOL + LETTER * max(map(len, texts))))))
    rows = math.ceil(len(texts) / columns) + (len(shown) < len(handles))
    figure.set_size_inches(width, height + ROW * rows)
    box = figure.legend(
        shown.values(),
        texts,
        loc="outside lower center",
        ncols=columns,
        fontsize=9,
        frameon=False,
    )
    if len(shown) < len(handles):
        box.set_title(f"the first {len(shown)} of {len(handles)}")
    for label, entry in zip(shown, box.get_texts(), strict=True):
        entry.set_gid(group_id(ENTRY, label))


def group_id(kind: str, label: str = "", description: str = "") -> str:
    """Return the id of an SVG group, which `_tagged` replaces by attributes."""
    return "|".join([kind, label.replace("|", "/"), description.replace("|", "/")])


def _tagged(match: "re.Match[bytes]") -> bytes:
    """Return an SVG group's opening tag, with attributes instead of an id: ids must be unique."""
    kind, label, description = unescape(match[1].decode()).split("|")
    of_line = f' data-line="{escape(label)}"' if label else ""
    if kind == ENTRY:
        return f'<g class="entry" tabindex="0" role="button"{of_line}>'.encode()
    if not description:
        return f'<g class="line"{of_line}>'.encode()
    # The keyboard steps from point to point; hundreds of cells of a grid would be in its way.
    stop = "" if kind == CELL else ' tabindex="0"'
    # Readers of the file alone see <title>; the page shows data-tip.
    text = escape(description)
    tag = f'<g class="point"{stop}{of_line} data-tip="{text}"><title>{text}</title>'
    return tag.encode()
