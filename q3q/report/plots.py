"""The pictures of a report: which there are, and what each shows of the records."""

import math
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from q3q.record import SiteError, TrialRecord
from q3q.report.drawing import (
    REFERENCE,
    SOFT,
    Looks,
    Plot,
    draw_grid,
    dress,
    excess_scale,
    figure,
    fixed_ticks,
    handle,
    legend,
    line,
    logarithmic,
    looks_of,
    mark,
    method_of,
    notice,
    panel,
    png,
    points_only,
    scale,
)
from q3q.report.measures import (
    DIVERGED,
    FAILED,
    UNQUANTIZED_BITS,
    bits_of,
    by_model,
    headline_metrics,
    in_order,
    is_accuracy,
    is_base,
    is_perplexity,
    judged_metrics,
    labels,
    model_name,
    seconds,
    shown,
)
from q3q.report.pools import Pool, comparable, pools
from q3q.spec import MEAN_ACCURACY

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_ROWS = 64  # of the heatmap; beyond it the linears of a site are averaged
MOST_HEATMAPS = 6  # of one model in a page
MOST_NAMED = 12  # trials in a caption
NEAR = 0.1  # of the axis; two models nearer to each other share a tick
PERCENTILES = ("1", "25", "50", "75", "99", "99.9")  # of the divergence, as drawn


def study_plots(
    records: Sequence[TrialRecord], predicted: Mapping[str, float] | None = None
) -> list[Plot]:
    """Every picture that these records can fill.

    predicted: seconds that a trial was predicted to take, by its id.
    """
    records = in_order(records)
    models = by_model(records)
    looks = _looks_of(records)
    plots: list[Plot] = []
    for model, mine in models.items():
        plots += _quality_against_bits(model, mine, looks)
        plots += _quality_against_bytes(model, mine, looks)
        plots += _drift(model, mine, looks)
        plots += _tokens_of_experts(model, mine)
        plots += _errors_of_experts(model, mine)
        plots += _site_errors(model, mine)
    plots += _quality_against_size(records)
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
        return png(notice("No perplexity to show: no trial was asked to measure one."))
    looks = _looks_of(records)
    rows, columns = (len(models), len(texts)) if len(texts) > 1 else _near_square(len(models))
    whole = figure(4.4 * columns + 0.4, 3.7 * rows + 0.5)
    drawn: dict[str, Any] = {}
    places = whole.subplots(rows, columns, squeeze=False).flat[: len(panels)]
    for (model, text), axes in zip(panels, places, strict=True):
        drawn |= _draw_lines(axes, pools(models[model], text), looks, text)
        axes.set_title(f"{model}: {text.partition('/')[2]}", fontsize=10)
    for axes in whole.axes[len(panels) :]:
        axes.set_axis_off()
    legend(whole, drawn)
    return png(whole)


def site_error_heatmap(record: TrialRecord) -> bytes:
    """Error of each quantized linear, a column per block.

    The error of the outputs over the calibration tokens where the method saw some, else that of the weights.
    """
    return png(_heatmap(record))


def _heatmap(record: TrialRecord) -> "Figure":
    sites, name = record.sites, f"{record.spec.name} · {model_name(record.spec)}"
    if not sites:
        return notice(f"{name}: no linear was quantized.")
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
    whole = figure(2.8 + min(max(3.6, 0.4 * len(blocks)), 10), 1.2 + max(1.2, 0.3 * len(rows)))
    axes = whole.subplots()
    draw_grid(whole, axes, grid, what, lambda y, x: f"block {blocks[x]}, {rows[y]}")
    step = math.ceil(len(blocks) / 24)
    axes.set_xticks(
        range(0, len(blocks), step), labels=[str(block) for block in blocks[::step]], fontsize=8
    )
    axes.set_yticks(range(len(rows)), labels=rows, fontsize=8)
    axes.set_xlabel("block", fontsize=9)
    count = len(sites) // max(1, len(blocks) * len(rows))
    mean = f"\nmean over the {count} linears of each site" if averaged else ""
    missing = sum(math.isnan(value) for row in grid for value in row)
    grey = f"\ngrey: {missing} without a number" if missing else ""
    axes.set_title(f"{name}: {what}{mean}{grey}", fontsize=10)
    return whole


def _draw_lines(axes: "Axes", tried: Sequence[Pool], looks: Looks, metric: str) -> dict[str, Any]:
    """One panel of a metric over bits; returns the legend's handles by label.

    A perplexity is drawn as what it is above the unquantized model's, where that is known: only so are 3 to 8 bits
    told apart beside 2. A width that was not run leaves a line whole; one that failed or diverged breaks it.
    """
    drawn: dict[str, Any] = {}
    missing = [
        f"{pool.label} {pool.bits}-bit {word}"
        for pool in tried
        if isinstance(word := pool.cell(metric), str)
    ]
    quantized = [pool for pool in tried if pool.spec.scheme is not None]
    references = [
        pool for pool in tried if pool.spec.scheme is None and isinstance(pool.cell(metric), float)
    ]
    level, height = _above(references, metric)
    ticks = sorted({pool.bits for pool in quantized})
    values = []
    for pool in references:
        known = float(pool.cell(metric))
        values.append(height(known))
        drawn[pool.label.replace("none", "unquantized", 1)] = axes.axhline(
            height(known), color=SOFT, linestyle="--"
        )
        # On the left, where few bits keep the lines far above.
        axes.annotate(
            shown(known, metric),
            (0, height(known)),
            xycoords=("axes fraction", "data"),
            xytext=(3, 3),
            textcoords="offset points",
            fontsize=8,
            color=SOFT,
        )
    by_label: dict[str, list[Pool]] = {}
    for pool in quantized:
        by_label.setdefault(pool.label, []).append(pool)
    for label, mine in by_label.items():
        mine.sort(key=lambda pool: pool.bits)
        found = [pool.cell(metric) for pool in mine]
        heights = [height(value) if isinstance(value, float) else math.nan for value in found]
        if all(map(math.isnan, heights)):
            continue
        line(axes, [pool.bits for pool in mine], heights, looks[label], label)
        for pool, value, y in zip(mine, found, heights, strict=True):
            if not isinstance(value, float):
                continue
            values.append(y)
            if (spread := pool.spread(metric)) is not None:
                ends = [height(value - spread), height(value + spread)]
                line(
                    axes,
                    [pool.bits, pool.bits],
                    ends,
                    {**looks[label], "linestyle": "-"},
                    label,
                    1.0,
                )
                values += ends
            mark(axes, pool.bits, y, looks[label], label, f"{pool.name}: {pool.shown(metric)}")
        drawn[label] = handle(looks[label])
    axes.set_xticks(ticks)
    if ticks:
        axes.set_xlim(min(ticks) - 0.3, max(ticks) + 0.3)
    if not values:
        axes.text(
            0.5,
            0.5,
            "no finite number" if tried else "not measured",
            transform=axes.transAxes,
            ha="center",
        )
        axes.set_yticks([])
    elif level is not None:
        excess_scale(axes, values)
    elif is_perplexity(metric):
        scale(axes, values)
    below = textwrap.fill(f"not shown: {', '.join(missing)}", 58) if missing else ""
    dress(axes, f"bits of a weight\n{below}".rstrip(), _axis(metric, level))
    return drawn


def _above(
    references: Sequence[Pool], metric: str
) -> tuple[float | None, Callable[[float], float]]:
    """The unquantized model's perplexity, and where a value is drawn: in percent above it, if it is known."""
    known = [value for pool in references if isinstance(value := pool.cell(metric), float)]
    if not is_perplexity(metric):
        return None, lambda value: 100 * value
    if len(known) != 1:
        return None, lambda value: value
    return known[0], lambda value: 100 * (value / known[0] - 1)


def _axis(metric: str, level: float | None) -> str:
    if level is not None:
        return "perplexity above the unquantized\nmodel's, %"
    return "perplexity per token" if is_perplexity(metric) else "accuracy, %"


def _quality_against_bits(
    model: str, records: Sequence[TrialRecord], looks: Looks
) -> Iterator[Plot]:
    """A line per method; the unquantized model dashed."""
    metrics = headline_metrics(records)
    several = MEAN_ACCURACY in metrics
    for metric in metrics:
        if not is_perplexity(metric) and (
            metric != MEAN_ACCURACY if several else not is_accuracy(metric)
        ):
            continue
        tried = pools(records, metric)
        whole, axes = panel()
        legend(whole, _draw_lines(axes, tried, looks, metric))
        caption = (
            "Bars: standard deviation over seeds."
            if any(pool.spread(metric) for pool in tried)
            else ""
        )
        yield Plot(
            f"{model}-{_slug(metric)}-bits", f"{_what(metric)} against bits", caption, whole, model
        )


def _quality_against_bytes(
    model: str, records: Sequence[TrialRecord], looks: Looks
) -> Iterator[Plot]:
    """The Pareto front: what no other trial that was evaluated alike beats in both."""
    for number, (name, mine) in enumerate(comparable(records).items(), start=1):
        metric = next(iter(judged_metrics(mine)), None)
        if metric is None:
            continue
        tried = pools(mine)
        sized = {pool.label: size for pool in tried if (size := _size(pool)) is not None}
        good = [
            pool for pool in tried if isinstance(pool.cell(metric), float) and pool.label in sized
        ]
        if len(good) < 2:
            continue
        better = 1 if is_perplexity(metric) else -1
        level, height = _above([pool for pool in good if pool.spec.scheme is None], metric)
        places = [((_size(pool) or 0.0) / 1e6, height(float(pool.cell(metric)))) for pool in good]
        front = [
            (size, value)
            for size, value in sorted(places)
            if not any(
                s <= size and better * v <= better * value and (s, v) != (size, value)
                for s, v in places
            )
        ]
        whole, axes = panel()
        axes.step(*zip(*front, strict=True), where="post", color=SOFT, linestyle="--", linewidth=1)
        drawn: dict[str, Any] = {
            "not beaten in both": handle({"color": SOFT, "marker": "", "linestyle": "--"})
        }
        for pool, (size, value) in zip(good, places, strict=True):
            look = looks.get(pool.label, REFERENCE)
            words = f"{pool.label}, {pool.bits} bits: {_megabytes(size)}, {pool.shown(metric)}"
            mark(axes, size, value, look, pool.label, words)
            drawn[pool.label.replace("none", "unquantized", 1)] = handle(points_only(look))
        logarithmic(axes.xaxis, [size for size, _ in places], axes.set_xscale)
        if level is not None:
            excess_scale(axes, [value for _, value in places])
        elif better == 1:
            scale(axes, [value for _, value in places])
        dress(axes, "size of the whole model, MB", _axis(metric, level))
        legend(whole, drawn)
        left_out = [(pool, "" if pool in good else "no size") for pool in tried if pool not in good]
        alike = "" if name == model else f"{name}. "
        title = f"{_what(metric)} against size"
        place = f"{model}-pareto" if number == 1 else f"{model}-pareto-{number}"
        yield Plot(place, title, (alike + _not_shown(left_out, metric)).strip(), whole, model)


def _size(pool: Pool) -> float | None:
    """Bytes of the model."""
    return next(
        (r.metrics["model_bytes"] for r in pool.records if "model_bytes" in r.metrics), None
    )


def _drift(model: str, records: Sequence[TrialRecord], looks: Looks) -> Iterator[Plot]:
    """How far next-token distributions are from the unquantized model's, and how that is spread over tokens."""
    for text in dict.fromkeys(
        name[3:] for r in records for name in r.metrics if name.startswith("kl/")
    ):
        metric = f"kl/{text}"
        asked = [r for r in records if r.spec.scheme is not None and text in _texts(r)]
        tried = pools(asked, metric)
        good = [
            pool for pool in tried if isinstance(found := pool.cell(metric), float) and found > 0
        ]
        if not good:
            continue
        whole, axes = panel()
        drawn: dict[str, Any] = {}
        order = list(dict.fromkeys(pool.label for pool in good))
        step = min(0.12, 0.8 / len(order))
        ends: list[float] = []
        without = 0
        for pool in good:
            look, mean = (
                {**looks.get(pool.label, REFERENCE), "linestyle": "-"},
                float(pool.cell(metric)),
            )
            x = pool.bits + step * (order.index(pool.label) - (len(order) - 1) / 2)
            known = {p: _mean(pool.values(f"kl_p{p}/{text}")) for p in PERCENTILES}
            known = {
                p: value for p, value in known.items() if value > 0
            }  # nan and 0 have no place on this axis
            without += "50" not in known
            for (low, high), width in ((("1", "99"), 1.0), (("25", "75"), 4.0)):
                span = [
                    known.get(low, mean if high == "99" else math.nan),
                    known.get(high, math.nan),
                ]
                line(axes, [x, x], span, look, pool.label, width)
            for p, symbol in (("99.9", "_"), ("50", "|")):
                if p in known:
                    line_of = {**look, "marker": symbol, "linestyle": ""}
                    axes.plot([x], [known[p]], markersize=6, **line_of)
            told = "".join(f", {p} % below {value:.3g}" for p, value in known.items())
            mark(axes, x, mean, look, pool.label, f"{pool.name}: mean {mean:.3g}{told}")
            ends += [mean, *known.values()]
            drawn[pool.label] = handle(points_only(look))
        ticks = sorted({pool.bits for pool in good})
        axes.set_xticks(ticks)
        axes.set_xlim(ticks[0] - 0.6, ticks[-1] + 0.6)
        # The quarter of the tokens that are predicted best hardly changes at all, down to 1e-12.
        bottom = max(min(ends), min(float(pool.cell(metric)) for pool in good) / 100)
        logarithmic(axes.yaxis, [end for end in ends if end >= bottom], axes.set_yscale)
        axes.set_ylim(bottom=bottom / 1.5)
        dress(axes, "bits of a weight", "KL divergence, nats per token")
        legend(whole, drawn)
        parts = [
            "Over tokens: mean (symbol), the middle half (thick), 98 % (thin), and what 99.9 % stay below (dash)."
        ]
        parts += ["What reaches the bottom goes on below it."] if min(ends) < bottom else []
        parts += (
            [f"Of {without} the mean alone is known, and up to where 99 % lie."] if without else []
        )
        nothing = [(pool, "0, no divergence") for pool in tried if pool.cell(metric) == 0]
        nothing += [(pool, "") for pool in tried if isinstance(pool.cell(metric), str)]
        measured = {record.spec.id for pool in tried for record in pool.records}
        nothing += [(pool, "") for pool in pools([r for r in asked if r.spec.id not in measured])]
        title = f"KL divergence from the unquantized model, {text}"
        caption = " ".join(filter(None, [*parts, _not_shown(nothing, metric)]))
        yield Plot(f"{model}-{_slug(text)}-kl", title, caption, whole, model)


def _texts(record: TrialRecord) -> list[str]:
    return [str(text["name"]) for text in record.spec.evaluation.get("texts", [])]


def _tokens_of(record: TrialRecord) -> dict[int, list[int]]:
    """Calibration tokens of each expert, by block."""
    return {
        int(where.split(".")[1]): note["tokens_per_expert"]
        for where, note in record.notes.items()
        if isinstance(note, dict) and "tokens_per_expert" in note
    }


def _tokens_of_experts(model: str, records: Sequence[TrialRecord]) -> Iterator[Plot]:
    """Of one trial for each calibration: which experts saw how many calibration tokens."""
    seen: set[tuple[str, int]] = set()
    for record in records:
        counts = _tokens_of(record)
        key = (str(record.spec.calibration), record.spec.seed)
        if not counts or key in seen or len(seen) >= MOST_HEATMAPS:
            continue
        seen.add(key)
        numbers = {
            block: [float(count) or math.nan for count in mine] for block, mine in counts.items()
        }
        whole = _grid_of_experts(numbers, "calibration tokens", number=",.0f")
        without = sum(math.isnan(value) for mine in numbers.values() for value in mine)
        caption = f"As the calibration of {record.spec.name} routed them. Grey: {without} experts saw no token."
        title = "Calibration tokens of each expert"
        yield Plot(f"{model}-{record.spec.id}-experts", title, caption, whole, model)


def _errors_of_experts(model: str, records: Sequence[TrialRecord]) -> Iterator[Plot]:
    """Of the trials with the fewest bits of each method: how far each expert is from what it was.

    An expert that saw no token has no error of outputs: it is grey, and in no mean.
    """
    for record in _worst_of_each_method(
        [r for r in records if any(site.experts for site in r.sites)]
    ):
        tokens = _tokens_of(record)
        outputs = any(
            site.experts is not None and site.output_error is not None for site in record.sites
        )
        found: dict[int, list[tuple[float, ...]]] = {}
        for site in record.sites:
            if site.experts is not None:
                saw = tokens.get(site.block, []) if site.output_error is not None else []
                errors = [
                    e if e > 0 or not saw or saw[k] else math.nan
                    for k, e in enumerate(site.experts)
                ]
                found.setdefault(site.block, []).append(tuple(errors))
        means = {
            block: [_mean(list(some)) for some in zip(*linears, strict=True)]
            for block, linears in found.items()
        }
        what = "output error" if outputs else "weight error"
        without = sum(math.isnan(value) for mine in means.values() for value in mine)
        grey = f" Grey: {without} experts saw no token." if without else ""
        caption = f"Mean {what} of an expert's gate, up and down, relative to what they were.{grey}"
        title = f"Error of each expert: {record.spec.name}"
        whole = _grid_of_experts(means, what)
        yield Plot(f"{model}-{record.spec.id}-expert-errors", title, caption, whole, model)


def _grid_of_experts(
    numbers: Mapping[int, Sequence[float]], what: str, number: str = ".3g"
) -> "Figure":
    """numbers: by block, one an expert; nan for none."""
    blocks = sorted(numbers)
    experts = len(numbers[blocks[0]])
    grid = [[numbers[block][e] for block in blocks] for e in range(experts)]
    whole = figure(
        2.8 + min(max(3.0, 0.4 * len(blocks)), 10), 1.2 + min(max(1.4, 0.24 * experts), 9)
    )
    axes = whole.subplots()
    places = {"number": number, "nothing": "no token"}
    draw_grid(whole, axes, grid, what, lambda y, x: f"block {blocks[x]}, expert {y}", **places)
    step = math.ceil(len(blocks) / 24)
    axes.set_xticks(
        range(0, len(blocks), step), labels=[str(block) for block in blocks[::step]], fontsize=8
    )
    axes.set_yticks(range(0, experts, math.ceil(experts / 16)))
    axes.tick_params(labelsize=8)
    axes.set_xlabel("block", fontsize=9)
    axes.set_ylabel("expert", fontsize=9)
    return whole


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
        caption = (
            f"{left} more trials have theirs beside their records in MLflow (heatmap.png)."
            if left
            else ""
        )
        name = f"{model}-{record.spec.id}-sites"
        yield Plot(
            name, f"Error per block and site: {record.spec.name}", caption, _heatmap(record), model
        )


def _quality_against_size(records: Sequence[TrialRecord]) -> Iterator[Plot]:
    """Over models, at each bit width: do larger ones lose less? Base models have lines of their own."""
    sizes = {
        model: size
        for model, mine in by_model(records).items()
        if (size := _parameters(mine)) is not None
    }
    if len(sizes) < 2:
        return
    judged = judged_metrics(records)
    metrics = [next(filter(is_perplexity, judged), None), next(filter(is_accuracy, judged), None)]
    both = len({is_base(record.spec) for record in records}) > 1
    for metric in filter(None, metrics):
        tried = pools(records, metric, over_models=True)
        named = {
            id(pool): pool.label + (" base" if both and is_base(pool.spec) else "")
            for pool in tried
        }
        looks = looks_of(name for name in named.values() if method_of(name) != "none")
        for bits in sorted({pool.bits for pool in tried if pool.spec.scheme is not None}):
            some = [pool for pool in tried if pool.bits in (bits, UNQUANTIZED_BITS)]
            lines: dict[str, list[tuple[float, float, Pool]]] = {}
            left_out = []
            for pool in some:
                value, model = pool.cell(metric), model_name(pool.spec)
                if isinstance(value, float) and model in sizes:
                    y = value if is_perplexity(metric) else 100 * value
                    lines.setdefault(named[id(pool)], []).append((sizes[model], y, pool))
                else:
                    left_out.append((pool, "size unknown" if isinstance(value, float) else ""))
            if not any(method_of(name) != "none" for name in lines):
                continue
            whole, axes = panel()
            drawn = {}
            for name, points in lines.items():
                look = looks.get(name, REFERENCE)
                points.sort(key=lambda point: point[:2])
                line(axes, [x for x, _, _ in points], [y for _, y, _ in points], look, name)
                for x, y, pool in points:
                    mark(
                        axes,
                        x,
                        y,
                        look,
                        name,
                        f"{name}, {model_name(pool.spec)}: {pool.shown(metric)}",
                    )
                drawn[name.replace("none", "unquantized", 1)] = handle(look)
            axes.set_xscale("log")
            fixed_ticks(
                axes.xaxis,
                _ticks_of(sorted({x for points in lines.values() for x, _, _ in points})),
            )
            if is_perplexity(metric):
                scale(axes, [y for points in lines.values() for _, y, _ in points])
            dress(axes, "parameters of the model", _what(metric))
            legend(whole, drawn)
            title = f"{_what(metric)} against model size at {bits} bits"
            kind = "" if is_perplexity(metric) else "-accuracy"
            yield Plot(
                f"size-{bits}bits{kind}", title, _not_shown(left_out, metric, models=True), whole
            )


def _ticks_of(sizes: Sequence[float]) -> dict[float, str]:
    """A tick at each size (millions), but for those that would stand on another's."""
    told: dict[float, str] = {}
    apart = (sizes[-1] / sizes[0]) ** NEAR
    for size in sizes:
        if not told or size > apart * max(told):
            told[size] = f"{size / 1e3:.2g}B" if size >= 100 else f"{size:.2g}M"
    return told


def _planned(records: Sequence[TrialRecord]) -> dict[str, float]:
    """Seconds that a trial was predicted to take, as its record says; by its id."""
    plans = {r.spec.id: r.environment.get("planned", {}) for r in records}
    return {
        trial: float(planned["seconds"]) for trial, planned in plans.items() if "seconds" in planned
    }


def _cost(records: Sequence[TrialRecord], predicted: Mapping[str, float]) -> Iterator[Plot]:
    """Predicted against actual seconds, a point per trial."""
    known = [
        (predicted[r.spec.id], float(seconds(r) or 0), r)
        for r in records
        if r.spec.id in predicted and seconds(r)
    ]
    known = [one for one in known if one[0] > 0 and one[2].completed]
    if not known:
        return
    looks = looks_of(str(r.spec.method["name"]) for r in records)
    whole, axes = panel()
    ends = [min(min(p, a) for p, a, _ in known) / 1.5, max(max(p, a) for p, a, _ in known) * 1.5]
    axes.plot(ends, ends, color=SOFT, linestyle="--", linewidth=1)
    drawn = {"as predicted": handle({"color": SOFT, "marker": "", "linestyle": "--"})}
    for expected, actual, record in known:
        method = str(record.spec.method["name"])
        words = f"{record.spec.name} · {model_name(record.spec)}: predicted {expected:.0f} s, took {actual:.0f} s"
        mark(axes, expected, actual, looks[method], method, words)
        drawn[method] = handle(points_only(looks[method]))
    for axis, set_scale in ((axes.xaxis, axes.set_xscale), (axes.yaxis, axes.set_yscale)):
        logarithmic(axis, ends, set_scale)
    dress(axes, "predicted, s", "took, s")
    legend(whole, drawn)
    left = len(records) - len(known)
    caption = f"{left} trials that failed or had no prediction are not shown." if left else ""
    yield Plot("cost", "Predicted against actual cost", caption, whole)


def _looks_of(records: Sequence[TrialRecord]) -> Looks:
    """One look per method and variant, whatever the plot."""
    named: list[str] = []
    for mine in by_model(records).values():
        named += labels([r.spec for r in mine], seeds=False)
        for metric in headline_metrics(mine):
            named += [pool.label for pool in pools(mine, metric)]
        for group in comparable(mine).values():
            named += [pool.label for pool in pools(group)]
        for text in dict.fromkeys(
            name for r in mine for name in r.metrics if name.startswith("kl/")
        ):
            named += [pool.label for pool in pools(mine, text)]
    return looks_of(label for label in dict.fromkeys(named) if method_of(label) != "none")


def _not_shown(left_out: Sequence[tuple[Pool, str]], metric: str, *, models: bool = False) -> str:
    """What has no point and why, in words. models: name them too."""
    words = {DIVERGED: "diverged", FAILED: "failed"}
    told = [
        f"{pool.spec.name}{f' · {model_name(pool.spec)}' if models else ''} "
        f"({words.get(str(pool.cell(metric))) or why or 'not measured'})"
        for pool, why in left_out
    ]
    more = f" and {len(told) - MOST_NAMED} more" if len(told) > MOST_NAMED else ""
    return f"Not shown: {', '.join(told[:MOST_NAMED])}{more}." if told else ""


def _parameters(records: Sequence[TrialRecord]) -> float | None:
    """Millions of parameters, from what a trial says of its size."""
    for record in records:
        if {"model_bytes", "bits_per_weight_model"} <= record.metrics.keys():
            return 8 * record.metrics["model_bytes"] / record.metrics["bits_per_weight_model"] / 1e6
    return None


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
