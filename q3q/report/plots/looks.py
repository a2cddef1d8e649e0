"""Colours, symbols and dashes: a method looks the same in every plot of a report."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from q3q.quantize.methods.settings import SETTINGS
from q3q.record import TrialRecord
from q3q.report.measures import appearance_of, by_model, headline_metrics, labels
from q3q.report.pools import comparable, pools
from q3q.report.tables import topics

# The colours of Okabe and Ito, which colour-blind readers can tell apart, without yellow: it is too
# faint for a line on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
DASHES = ("-", "--", ":", "-.")
FILLS = ("full", "none", "left", "top")
MOST_VARIANTS = len(MARKERS) * len(FILLS)  # of a method that look different
SOFT = "0.35"

Look = Mapping[str, Any]  # keyword arguments of matplotlib's Line2D
Looks = Mapping[str, Look]  # by label

REFERENCE: Look = {"color": SOFT, "marker": "*", "linestyle": "--"}  # the unquantized model
DASHED: Look = {"color": SOFT, "marker": "", "linestyle": "--"}  # a line that stands for no trial


def looks_of(labels: Iterable[str], methods: Iterable[str] = ()) -> Looks:
    """Return a look for each label: the method has the colour, its variants differ in the rest.

    Args:
        labels: labels whose first word is the method.
        methods: further methods of the report. A method without a colour of its own takes the
            first free one in alphabetical order, so plots agree only if all are named here.
    """
    distinct = list(dict.fromkeys(labels))
    slots = _slots({*methods, *map(_method_of, distinct)})
    looks: dict[str, Look] = {}
    variants: dict[str, int] = {}
    taken: set[tuple[str, ...]] = set()
    for label in distinct:
        method = _method_of(label)
        number = variants.get(method, 0)
        while (point := _point(slots[method], number)) in taken and number < MOST_VARIANTS:
            number += 1
        taken.add(point)
        variants[method] = number + 1
        look = dict(zip(("color", "marker", "fillstyle"), point, strict=True))
        looks[label] = {**look, "linestyle": DASHES[number % len(DASHES)]}
    return looks


def _point(slot: int, number: int) -> tuple[str, str, str]:
    """Return the colour, marker and filling of a method's variant: first all markers, then open.

    A step of 4 visits all nine markers.
    """
    marker = MARKERS[(slot + 4 * number) % len(MARKERS)]
    fill = FILLS[number // len(MARKERS) % len(FILLS)]
    return COLOURS[slot % len(COLOURS)], marker, fill


def study_looks(records: Sequence[TrialRecord]) -> Looks:
    """Return a look for each method and variant, whichever plot shows it."""
    names: list[str] = []
    for group in by_model(records).values():
        every = zip(labels([record.spec for record in group], seeds=False), group, strict=True)
        names += [label for label, record in every if not record.spec.rounds_nothing]
        drift = [name for record in group for name in record.metrics if name.startswith("kl/")]
        tried = [pool for metric in headline_metrics(group) for pool in pools(group, metric)]
        tried += [
            pool
            for metric, _, alike in topics(group, everything=False)
            for pool in pools(alike, metric)
        ]
        tried += [pool for alike in comparable(group).values() for pool in pools(alike)]
        tried += [pool for metric in dict.fromkeys(drift) for pool in pools(group, metric)]
        names += [pool.label for pool in tried if not pool.is_reference]
    return looks_of(names, quantizing_methods(records))


def quantizing_methods(records: Iterable[TrialRecord]) -> set[str]:
    return {r.spec.method.name for r in records if r.spec.scheme is not None}


def points_only(look: Look) -> Look:
    return {**look, "linestyle": ""}


def line_only(look: Look) -> Look:
    return {**look, "marker": ""}


def _method_of(label: str) -> str:
    return label.partition(" ")[0]


def _slots(methods: Iterable[str]) -> dict[str, int]:
    """Return each method's position in the palette: its own, or the next free one."""
    own = {method: appearance_of(method).colour for method in methods}
    free = 1 + max(settings.appearance.colour or 0 for settings in SETTINGS.values())
    others = sorted(method for method, colour in own.items() if colour is None)
    return {
        method: free + others.index(method) if colour is None else colour
        for method, colour in own.items()
    }
