"""Divergence of next-token distributions from the unquantized model's, spread over tokens."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

from q3q.formatting import plural, significant
from q3q.record import TrialRecord
from q3q.report.measures import mean_of_numbers
from q3q.report.plots.axes import logarithmic, name_axes
from q3q.report.plots.drawing import Plot, handle, legend, line, mark, panel
from q3q.report.plots.looks import REFERENCE, Looks, points_only
from q3q.report.plots.words import not_shown, slug
from q3q.report.pools import Pool, pools

PERCENTILES = ("1", "25", "50", "75", "99", "99.9")


def divergence_against_bits(
    model: str, records: Sequence[TrialRecord], looks: Looks
) -> Iterator[Plot]:
    """Draw each text's KL divergence over bits: its mean and percentiles over tokens."""
    metrics = [name for r in records for name in r.metrics if name.startswith("kl/")]
    for metric in dict.fromkeys(metrics):
        text = metric.removeprefix("kl/")
        trials = [r for r in records if not r.spec.rounds_nothing and text in _texts(r)]
        tried = pools(trials, metric)
        positive = [p for p in tried if isinstance(kl := p.cell(metric), float) and kl > 0]
        if not positive:
            continue
        figure, axes = panel()
        handles: dict[str, Any] = {}
        order = list(dict.fromkeys(pool.label for pool in positive))
        step = min(0.12, 0.8 / len(order))
        values: list[float] = []
        mean_alone = 0
        for pool in positive:
            look = {**looks.get(pool.label, REFERENCE), "linestyle": "-"}
            mean, percentiles = float(pool.cell(metric)), _percentiles(pool, text)
            mean_alone += "50" not in percentiles
            x = pool.bits + step * (order.index(pool.label) - (len(order) - 1) / 2)
            for low, high, width in (("1", "99", 1.0), ("25", "75", 4.0)):
                start = percentiles.get(low, mean if high == "99" else math.nan)
                span = [start, percentiles.get(high, math.nan)]
                line(axes, [x, x], span, look, pool.label, width)
            for p, symbol in (("99.9", "_"), ("50", "|")):
                if p in percentiles:
                    dash = {**look, "marker": symbol, "linestyle": ""}
                    axes.plot([x], [percentiles[p]], markersize=6, **dash)
            spread = "".join(
                f", {p} % below {significant(value, 3)}" for p, value in percentiles.items()
            )
            mark(
                axes, x, mean, look, pool.label, f"{pool.name}: mean {significant(mean, 3)}{spread}"
            )
            values += [mean, *percentiles.values()]
            handles[pool.label] = handle(points_only(look), pool.label)
        ticks = sorted({pool.bits for pool in positive})
        axes.set_xticks(ticks)
        axes.set_xlim(ticks[0] - 0.6, ticks[-1] + 0.6)
        # The quarter of the tokens that are predicted best hardly changes at all, down to 1e-12.
        bottom = max(min(values), min(float(pool.cell(metric)) for pool in positive) / 100)
        logarithmic(axes.yaxis, [value for value in values if value >= bottom], axes.set_yscale)
        axes.set_ylim(bottom=bottom / 1.5)
        name_axes(axes, "bits per weight", "KL divergence, nats per token")
        legend(figure, handles)
        sentences = [
            "Per-token KL divergence: mean (marker), 25th to 75th percentile (thick bar), 1st to "
            "99th (thin bar), 99.9th (dash).",
            "Bars are clipped at the axis." if min(values) < bottom else "",
            f"Of {plural(mean_alone, 'trial')}, only the mean and at most the 99th percentile "
            "are known."
            if mean_alone
            else "",
            not_shown(_left_out(trials, tried, metric), metric),
        ]
        title = f"KL divergence from the unquantized model, {text}"
        caption = " ".join(filter(None, sentences))
        yield Plot(f"{slug(model)}-{slug(text)}-kl", title, caption, figure, model)


def _percentiles(pool: Pool, text: str) -> dict[str, float]:
    """Return the percentiles that a logarithmic axis can show, which are neither nan nor 0."""
    values = {p: mean_of_numbers(pool.values(f"kl_p{p}/{text}")) for p in PERCENTILES}
    return {p: value for p, value in values.items() if value > 0}


def _left_out(
    trials: Sequence[TrialRecord], tried: Sequence[Pool], metric: str
) -> list[tuple[Pool, str]]:
    """Return the trials without a point, each with its reason."""
    measured = {record.spec.id for pool in tried for record in pool.records}
    return [
        *((pool, "0, no divergence") for pool in tried if pool.cell(metric) == 0),
        *((pool, "") for pool in tried if isinstance(pool.cell(metric), str)),
        *((pool, "") for pool in pools([r for r in trials if r.spec.id not in measured])),
    ]


def _texts(record: TrialRecord) -> list[str]:
    return [text.name for text in record.spec.evaluation.texts]
