"""What each unit of a model loses at each width, and which width a budget gave it."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from q3q.bit_budget import BLOCK_ERROR, KL
from q3q.formatting import significant
from q3q.record import ALLOTMENT, TrialRecord
from q3q.report.plots.drawing import Plot, new_figure
from q3q.report.plots.heatmaps import MOST_HEATMAPS, draw_grid
from q3q.report.plots.words import slug

MOST_NAMED = 80  # units whose names have room
QUANTITIES = {
    KL: "divergence of the predictions, nats",
    BLOCK_ERROR: "squared error of the block's output",
}


@dataclass(frozen=True)
class Allotted:
    """An allotment as a record notes it.

    measured: by unit, a number for each width; nan for 0, which a logarithm cannot show
    """

    units: list[str]
    widths: list[int]
    bits: list[int]
    measured: list[list[float]]

    @classmethod
    def of(cls, record: TrialRecord) -> "Allotted | None":
        """Return None for a trial without a budget, or with a note that is none of q3q's."""
        note: Mapping[str, Any] = record.notes.get(ALLOTMENT) or {}
        try:
            units, widths, bits = list(note["units"]), list(note["widths"]), list(note["bits"])
            measured = [[float(x) or math.nan for x in row] for row in note["measured"]]
        except (KeyError, TypeError, ValueError):
            return None
        whole = len(units) == len(bits) == len(measured) and set(bits) <= set(widths)
        if not units or not whole or any(len(row) != len(widths) for row in measured):
            return None
        return cls(units, widths, bits, measured)


def sensitivities(model: str, records: Sequence[TrialRecord]) -> Iterator[Plot]:
    """Draw a row per unit and a column per width, and frame the width that each unit was given."""
    grids = [(record, grid) for record in records if (grid := Allotted.of(record)) is not None]
    for record, grid in grids[:MOST_HEATMAPS]:
        yield Plot(
            f"{slug(model)}-{record.spec.id}-sensitivities",
            f"What each unit loses alone, and the width that it got: {record.spec.name}",
            _caption(record, len(grids) - MOST_HEATMAPS),
            _figure(record, grid),
            model,
        )


def _caption(record: TrialRecord, more: int) -> str:
    note, bits = record.notes[ALLOTMENT], record.metrics.get("bits_per_weight")
    words = ["Framed: the width that the unit got."]
    if bits is not None:
        words.append(f"All units take {significant(bits)} bits per weight, scales counted.")
    if isinstance(predicted := note.get("predicted"), float):
        words.append(f"The framed numbers add up to {significant(predicted)}.")
    return " ".join(words + ([f"{more} more trials have such grids."] if more > 0 else []))


def _figure(record: TrialRecord, grid: Allotted) -> Any:
    from matplotlib.patches import Rectangle

    budget = record.spec.budget
    quantity = QUANTITIES.get(budget.measure if budget else "", "sensitivity")
    figure = new_figure(2.8 + 0.55 * len(grid.widths), 1.2 + min(0.26 * len(grid.units), 14))
    axes = figure.subplots()
    draw_grid(
        figure,
        axes,
        grid.measured,
        quantity,
        lambda y, x: f"{grid.units[y]}, {grid.widths[x]} bits",
        missing="nothing",
    )
    for y, bits in enumerate(grid.bits):
        x = grid.widths.index(bits)
        axes.add_patch(
            Rectangle((x - 0.46, y - 0.46), 0.92, 0.92, fill=False, edgecolor="#d62728", lw=1.6)
        )
    axes.set_xticks(range(len(grid.widths)), labels=list(map(str, grid.widths)), fontsize=8)
    axes.set_xlabel("bits", fontsize=9)
    step = math.ceil(len(grid.units) / MOST_NAMED)
    axes.set_yticks(range(0, len(grid.units), step), labels=grid.units[::step], fontsize=8)
    return figure
