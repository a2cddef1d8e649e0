"""What the pictures show: the lines, the points, and what is said of those that are missing."""

import itertools
import math
import re
from dataclasses import replace
from typing import Any

import pytest

from q3q.record import COMPLETED, SiteError, TrialRecord
from q3q.report import drawing
from q3q.report.drawing import Plot, looks_of
from q3q.report.plots import study_plots
from q3q.spec import Scheme, TrialSpec

STORIES = "perplexity/stories"


def record(
    method: str, bits: int, perplexity: float | None, model: str = "demo", **changes: Any
) -> TrialRecord:
    """A completed trial, its perplexity diverged if None. changes: of the spec."""
    spec = TrialSpec(
        model={"name": model, "digest": model, "dtype": "float32"},
        method={"name": method, "version": 1},
        scheme=None if method == "none" else Scheme(bits=bits, group_size=128, symmetric=False),
        calibration=None,
        evaluation={
            "texts": [{"name": "stories", "window": 512, "limit": None}],
            "tasks": [],
            "task_limit": None,
        },
        seed=0,
    )
    measured = {} if perplexity is None else {STORIES: perplexity}
    parameters = 1e6 * len(model)
    sizes = {"model_bytes": parameters * bits / 8, "bits_per_weight_model": float(bits)}
    return TrialRecord(
        spec=replace(spec, **changes),
        status=COMPLETED,
        metrics={**measured, **sizes},
        diverged=() if measured else (STORIES,),
    )


def plots(records: list[TrialRecord]) -> dict[str, Plot]:
    return {plot.name: plot for plot in study_plots(records)}


def tips(plot: Plot) -> list[str]:
    return re.findall(r'data-tip="([^"]*)"', plot.svg().decode())


def lines(plot: Plot) -> dict[str, list[tuple[float, float]]]:
    """The points of each drawn line by its label; one that is broken has a nan."""
    found = {}
    for one in plot.figure.axes[0].get_lines():
        kind, _, rest = (one.get_gid() or "").partition("|")
        if kind == drawing.POINT and rest.endswith("|"):
            found[rest[:-1]] = list(zip(*one.get_data(), strict=True))
    return found


def test_a_width_that_was_not_run_leaves_a_line_whole_and_one_that_diverged_breaks_it() -> None:
    records = [record("gptq", bits, 10.0 - bits) for bits in (2, 4, 8)]
    records += [record("rtn", 2, 9.0), record("rtn", 3, None), record("rtn", 4, 8.0)]
    found = lines(plots(records)["demo-perplexity-stories-bits"])
    assert found["gptq"] == [(2, 8.0), (4, 6.0), (8, 2.0)]
    assert [bits for bits, _ in found["rtn"]] == [2, 3, 4]
    assert [math.isnan(height) for _, height in found["rtn"]] == [False, True, False]


def test_perplexities_are_drawn_as_what_they_are_above_the_unquantized_models() -> None:
    """So that 0.1 % and 50 % are both seen, and one below it is not lost."""
    records = [
        record("none", 16, 2.0),
        record("gptq", 2, 3.0),
        record("gptq", 4, 2.002),
        record("gptq", 8, 1.9999),
    ]
    plot = plots(records)["demo-perplexity-stories-bits"]
    assert [height for _, height in lines(plot)["gptq"]] == pytest.approx([50, 0.1, -0.005])
    [axes] = plot.figure.axes
    heights = [axes.transData.transform((2, height))[1] for height in (50, 0.1, 0, -0.005)]
    steps = [one - other for one, other in itertools.pairwise(heights)]
    assert min(steps) > 0.02 * axes.bbox.height
    low, high = axes.get_ylim()
    assert low < -0.005
    assert high > 50


def test_seeds_are_one_line_with_bars() -> None:
    records = [record("gptq", 2, value, seed=seed) for seed, value in enumerate((4.0, 5.0, 6.0))]
    plot = plots(records)["demo-perplexity-stories-bits"]
    assert tips(plot) == ["gptq, 2 bits: 5.000 ± 1 (3 seeds)"]
    assert "standard deviation over seeds" in plot.caption


def test_a_method_has_its_colour_in_every_picture_and_its_variants_look_different() -> None:
    some, others = looks_of(["gptq g128", "gptq pc", "rtn"]), looks_of(["awq", "gptq"])
    assert some["gptq g128"]["color"] == some["gptq pc"]["color"] == others["gptq"]["color"]
    assert some["gptq g128"]["marker"] != some["gptq pc"]["marker"]
    assert len({look["color"] for look in (some["rtn"], others["awq"], others["gptq"])}) == 3


def test_a_legend_of_many_lines_leaves_the_picture_its_room() -> None:
    def height(count: int) -> float:
        calibrated = [
            {"source": "demo", "digest": "d", "samples": samples} for samples in range(count)
        ]
        records = [record("gptq", 2, 5.0, calibration=one) for one in calibrated]
        plot = plots(records)["demo-perplexity-stories-bits"]
        plot.png()
        return float(plot.figure.axes[0].get_window_extent().height)

    assert height(24) > 0.9 * height(1)


def test_what_has_no_place_on_an_axis_is_named() -> None:
    none = [
        replace(record("none", 16, 2.0), metrics={STORIES: 2.0}),
        record("rtn", 4, 4.0),
        record("gptq", 4, 3.0),
    ]
    assert plots(none)["demo-pareto"].caption == "Not shown: none (no size)."
    same, other = (
        replace(one, metrics={**one.metrics, "kl/stories": kl})
        for one, kl in ((record("rtn", 8, 2.0), 0.0), (record("rtn", 4, 2.1), 0.5))
    )
    plot = plots([same, other, record("rtn", 2, 3.0)])["demo-stories-kl"]
    assert len(tips(plot)) == 1
    assert "Not shown: rtn w8 g128 (0, no divergence), rtn w2 g128 (not measured)." in plot.caption
    assert "Of 1 the mean alone is known" in plot.caption


def test_the_divergence_shows_how_it_is_spread_over_tokens() -> None:
    one = record("rtn", 4, 2.0)
    found = {
        f"kl_p{p}/stories": kl
        for p, kl in (("1", 0.01), ("25", 0.1), ("50", 0.2), ("75", 0.4), ("99", 4.0))
    }
    one = replace(one, metrics={**one.metrics, "kl/stories": 0.5, **found, "kl_p99.9/stories": 9.0})
    plot = plots([one])["demo-stories-kl"]
    assert tips(plot) == [
        "rtn, 4 bits: mean 0.5, 1 % below 0.01, 25 % below 0.1, 50 % below 0.2, 75 % below 0.4, 99 % below 4, "
        "99.9 % below 9"
    ]
    drawn = [tuple(one.get_ydata()) for one in plot.figure.axes[0].get_lines()]
    assert {(0.01, 4.0), (0.1, 0.4)} <= set(drawn)
    assert "is known" not in plot.caption


def test_base_models_have_lines_of_their_own_over_size_and_a_method_has_one() -> None:
    """One model lacks a method that differs in its activations: its other methods keep their names."""
    records = []
    for model in ("m", "m_base", "model_of_size", "model_of_size_base"):
        records += [record("none", 16, 2.0, model), record("gptq", 4, 3.0, model)]
    eight = Scheme(bits=4, group_size=128, symmetric=True, act_bits=8)
    records += [record("smoothquant", 4, 4.0, "m", scheme=eight), record("rtn", 4, None, "m")]
    plot = plots(records)["size-4bits"]
    assert {name: len(points) for name, points in lines(plot).items()} == {
        **{"none": 2, "none base": 2, "gptq": 2, "gptq base": 2},
        "smoothquant a8": 1,
    }
    assert plot.caption == "Not shown: rtn w4 g128 · m (diverged)."
    assert len(plot.figure.axes[0].get_xticks()) > 1


def test_accuracy_has_a_picture_over_size_too() -> None:
    asked = {"texts": [], "tasks": ["who"], "task_limit": None}
    records = [
        replace(one, metrics={**one.metrics, "who/acc": 0.5})
        for one in (
            record("rtn", 4, 1.0, model, evaluation=asked) for model in ("m", "larger_model")
        )
    ]
    assert tips(plots(records)["size-4bits-accuracy"]) == [
        "rtn, m: 50.0",
        "rtn, larger_model: 50.0",
    ]


def with_experts(count: int, tokens: list[int], errors: list[float]) -> TrialRecord:
    sites = [
        SiteError(
            block=k,
            site="down",
            linear="down",
            weight_error=0.2,
            output_error=0.1,
            experts=tuple(errors),
        )
        for k in range(count)
    ]
    notes = {f"blocks.{k}.gate_up": {"tokens_per_expert": tokens} for k in range(count)}
    return replace(record("gptq", 2, 3.0), sites=tuple(sites), notes=notes)


def test_an_expert_without_tokens_has_no_error_and_tokens_are_whole_numbers() -> None:
    one = with_experts(2, [0, 12345], [0.0, 0.3])
    found = {
        name.rpartition("-")[2]: plot for name, plot in plots([one]).items() if "expert" in name
    }
    assert tips(found["errors"])[:3] == [
        "block 0, expert 0: no token",
        "block 1, expert 0: no token",
        "block 0, expert 1: 0.3",
    ]
    assert "Grey: 2 experts saw no token." in found["errors"].caption
    assert "block 0, expert 1: 12,345" in tips(found["experts"])


def test_a_large_grid_is_one_picture_and_no_cell_stops_a_keyboard() -> None:
    small = next(
        plot
        for name, plot in plots([with_experts(2, [1, 1], [0.1, 0.3])]).items()
        if "errors" in name
    )
    assert len(tips(small)) == 4
    assert 'tabindex="0" data-tip' not in small.svg().decode()
    errors = [0.1 + 0.001 * k for k in range(128)]
    large = next(
        plot
        for name, plot in plots([with_experts(94, [1] * 128, errors)]).items()
        if "errors" in name
    )
    assert tips(large) == []
    assert b"<image" in large.svg()
    assert len(large.svg()) < 200_000
