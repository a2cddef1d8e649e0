"""Lines, points and captions of the plots."""

import itertools
import math
import re
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest

from q3q.quantize.methods.registry import settings_class
from q3q.quantize.methods.settings import Appearance, MethodSettings
from q3q.record import COMPLETED, SiteError, TrialRecord
from q3q.report import measures
from q3q.report.latex import latex
from q3q.report.measures import in_order
from q3q.report.plots import Plot, drawing, study_plots
from q3q.report.plots.looks import COLOURS, looks_of
from q3q.spec import MethodRef
from tests.specs import calibration_of, evaluation_of, make_spec

STORIES = "perplexity/stories"


def record(
    method: str | MethodRef,
    bits: int,
    perplexity: float | None,
    model: str = "demo",
    **changes: Any,
) -> TrialRecord:
    """A completed trial, its perplexity diverged if None. changes: of the spec."""
    measured = {} if perplexity is None else {STORIES: perplexity}
    parameters = 1e6 * len(model)
    sizes = {"model_bytes": parameters * bits / 8, "bits_per_weight_model": float(bits)}
    return TrialRecord(
        spec=make_spec(method, bits, model=model, **changes),
        status=COMPLETED,
        metrics={**measured, **sizes},
        diverged=() if measured else (STORIES,),
    )


def plots(records: list[TrialRecord]) -> dict[str, Plot]:
    return {plot.name: plot for plot in study_plots(records)}


def tips(plot: Plot) -> list[str]:
    return re.findall(r'data-tip="([^"]*)"', plot.svg().decode())


def lines(plot: Plot) -> dict[str, list[tuple[float, float]]]:
    """Return the points of each line by its label; nan breaks a line."""
    result = {}
    for artist in plot.figure.axes[0].get_lines():
        kind, _, rest = (artist.get_gid() or "").partition("|")
        if kind == drawing.POINT and rest.endswith("|"):
            data: Any = artist.get_data()
            result[rest[:-1]] = list(zip(*data, strict=True))
    return result


def test_a_width_that_was_not_run_leaves_a_line_whole_and_one_that_diverged_breaks_it() -> None:
    records = [record("gptq", bits, 10.0 - bits) for bits in (2, 4, 8)]
    records += [record("rtn", 2, 9.0), record("rtn", 3, None), record("rtn", 4, 8.0)]
    result = lines(plots(records)["demo-perplexity-stories-bits"])
    assert result["gptq"] == [(2, 8.0), (4, 6.0), (8, 2.0)]
    assert [bits for bits, _ in result["rtn"]] == [2, 3, 4]
    assert [math.isnan(height) for _, height in result["rtn"]] == [False, True, False]


def test_perplexities_are_drawn_as_what_they_are_above_the_unquantized_models() -> None:
    """Both 0.1 % and 50 % are visible, and so is a value below the original's."""
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
    steps = [upper - lower for upper, lower in itertools.pairwise(heights)]
    assert min(steps) > 0.02 * axes.bbox.height
    low, high = axes.get_ylim()
    assert low < -0.005
    assert high > 50


def test_seeds_are_one_line_with_bars() -> None:
    records = [record("gptq", 2, value, seed=seed) for seed, value in enumerate((4.0, 5.0, 6.0))]
    plot = plots(records)["demo-perplexity-stories-bits"]
    assert tips(plot) == ["gptq, 2 bits: 5.0 ± 1.0 (3 seeds)"]
    assert "standard deviation over seeds" in plot.caption


def test_a_method_has_its_colour_in_every_picture_and_its_variants_look_different() -> None:
    looks, other_looks = looks_of(["gptq g128", "gptq pc", "rtn"]), looks_of(["awq", "gptq"])
    assert looks["gptq g128"]["color"] == looks["gptq pc"]["color"] == other_looks["gptq"]["color"]
    assert looks["gptq g128"]["marker"] != looks["gptq pc"]["marker"]
    assert (
        len({look["color"] for look in (looks["rtn"], other_looks["awq"], other_looks["gptq"])})
        == 3
    )


def test_methods_of_other_packages_have_colours_that_q3qs_own_leave_free() -> None:
    own = looks_of(["rtn", "gptq", "awq", "smoothquant", "billm"])
    foreign = looks_of(["zeta", "alpha"])
    assert len({look["color"] for look in (*own.values(), *foreign.values())}) == 7
    assert looks_of(["zeta"], methods=["alpha", "rtn"])["zeta"] == foreign["zeta"]


def test_a_method_says_itself_how_it_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass
    class Settings(MethodSettings):
        appearance: ClassVar[Appearance] = Appearance("ZETA", row=0, colour=3, yardstick=True)

    methods = ("gptq", "rtn", MethodRef(name="zeta", version=1))
    records = [record(method, 2, 3.0) for method in methods]
    assert [trial.spec.method.name for trial in in_order(records)] == ["rtn", "gptq", "zeta"]
    monkeypatch.setattr(
        measures,
        "settings_class",
        lambda name: Settings if name == "zeta" else settings_class(name),
    )
    assert [trial.spec.method.name for trial in in_order(records)] == ["rtn", "zeta", "gptq"]
    assert looks_of(["zeta"])["zeta"]["color"] == COLOURS[3]
    rows = [line.split(" & ")[1] for line in latex(records).splitlines() if " & 2 & " in line]
    assert rows == ["ZETA", "RTN", "GPTQ"]


def test_a_legend_of_many_lines_leaves_the_picture_its_room() -> None:
    def height(count: int) -> float:
        records = [
            record("gptq", 2, 5.0, calibration=calibration_of(samples=samples))
            for samples in range(1, count + 1)
        ]
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
    caption = plots(none)["demo-pareto"].caption
    assert caption.endswith(". Not shown: unquantized float32 (no size).")
    same, other = (
        replace(trial, metrics={**trial.metrics, "kl/stories": kl})
        for trial, kl in ((record("rtn", 8, 2.0), 0.0), (record("rtn", 4, 2.1), 0.5))
    )
    plot = plots([same, other, record("rtn", 2, 3.0)])["demo-stories-kl"]
    assert len(tips(plot)) == 1
    assert "Not shown: rtn w8 g128 (0, no divergence), rtn w2 g128 (not measured)." in plot.caption
    assert "Of 1 trial, only the mean and at most the 99th percentile are known." in plot.caption


def test_the_divergence_shows_how_it_is_spread_over_tokens() -> None:
    trial = record("rtn", 4, 2.0)
    result = {
        f"kl_p{p}/stories": kl
        for p, kl in (("1", 0.01), ("25", 0.1), ("50", 0.2), ("75", 0.4), ("99", 4.0))
    }
    trial = replace(
        trial, metrics={**trial.metrics, "kl/stories": 0.5, **result, "kl_p99.9/stories": 9.0}
    )
    plot = plots([trial])["demo-stories-kl"]
    assert tips(plot) == [
        "rtn, 4 bits: mean 0.500, 1 % below 0.0100, 25 % below 0.100, 50 % below 0.200, "
        "75 % below 0.400, 99 % below 4.00, 99.9 % below 9.00"
    ]
    lines: Any = plot.figure.axes[0].get_lines()
    drawn = [tuple(line.get_ydata()) for line in lines]
    assert {(0.01, 4.0), (0.1, 0.4)} <= set(drawn)
    assert "only the mean" not in plot.caption


def test_base_models_have_lines_of_their_own_over_size_and_a_method_has_one() -> None:
    """A method that one model lacks does not rename the model's other methods."""
    records = []
    for model in ("m", "m_base", "model_of_size", "model_of_size_base"):
        records += [record("none", 16, 2.0, model), record("gptq", 4, 3.0, model)]
    records += [record("smoothquant", 4, 4.0, "m", act_bits=8), record("rtn", 4, None, "m")]
    plot = plots(records)["size-4bits"]
    assert {name: len(points) for name, points in lines(plot).items()} == {
        **{"unquantized float32": 2, "unquantized float32 base": 2, "gptq": 2, "gptq base": 2},
        "smoothquant a8": 1,
    }
    assert plot.caption == "Not shown: rtn w4 g128 · m (diverged)."
    assert len(plot.figure.axes[0].get_xticks()) > 1


def test_accuracy_has_a_picture_over_size_too() -> None:
    evaluation = evaluation_of(tasks=["who"])
    records = [
        replace(trial, metrics={**trial.metrics, "who/acc": 0.5})
        for trial in (
            record("rtn", 4, 1.0, model, evaluation=evaluation) for model in ("m", "larger_model")
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
    trial = with_experts(2, [0, 12345], [0.0, 0.3])
    result = {
        name.rpartition("-")[2]: plot for name, plot in plots([trial]).items() if "expert" in name
    }
    assert tips(result["errors"])[:3] == [
        "block 0, expert 0: no token",
        "block 1, expert 0: no token",
        "block 0, expert 1: 0.3",
    ]
    assert "Grey: 2 experts saw no token." in result["errors"].caption
    assert "block 0, expert 1: 12,345" in tips(result["experts"])


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


def test_variants_of_a_method_share_no_colour_and_marker() -> None:
    """Points have no dashes: an open marker is another than a full one."""
    labels = [f"gptq export:{number}" for number in range(30)]
    labels += [f"{method} x{number}" for method in "abcdefgh" for number in range(4)]
    looks = looks_of(labels)
    seen = {(look["color"], look["marker"], look["fillstyle"]) for look in looks.values()}
    assert len(seen) == len(labels)


def test_accuracies_have_their_intervals_in_the_picture() -> None:
    evaluation = evaluation_of(tasks=["who"])
    records = [
        replace(
            record(method, bits, 1.0, evaluation=evaluation),
            metrics={"who/acc": 0.5},
            intervals={"who/acc": (0.4, 0.6)},
        )
        for method, bits in (("none", 16), ("rtn", 4), ("awq", 4))
    ]
    plot = plots(records)["demo-who-acc-bits"]
    drawn: Any = plot.figure.axes[0].get_lines()
    bars = [sorted(line.get_ydata()) for line in drawn if len(line.get_xdata()) == 2]
    assert bars.count([40.0, 60.0]) == 2
    assert plot.caption == "Bars: 95 % interval."
    assert tips(plot) == [f"{m}, 4 bits: 50.0 [40.0, 60.0]" for m in ("rtn", "awq")]


def test_heatmaps_of_one_kind_of_error_share_a_scale_and_kinds_are_named() -> None:
    def with_errors(method: str, error: float, outputs: bool) -> TrialRecord:
        sites = [
            SiteError(
                block=k,
                site="o",
                linear="o_proj",
                weight_error=error,
                output_error=error * (k + 1) if outputs else None,
            )
            for k in range(2)
        ]
        return replace(record(method, 2, 3.0), sites=tuple(sites))

    records = [
        with_errors("gptq", 0.1, outputs=True),
        with_errors("awq", 0.3, outputs=True),
        with_errors("rtn", 0.9, outputs=False),
    ]
    heatmaps = [plot for plot in study_plots(records) if plot.name.endswith("-sites")]
    scales = {plot.title: plot.figure.axes[1].get_ylim() for plot in heatmaps}
    assert scales == {
        "Weight error per block and site: rtn w2 g128": (0.0, 0.9),
        "Output error per block and site: awq w2 g128": (0.0, 0.6),
        "Output error per block and site: gptq w2 g128": (0.0, 0.6),
    }


def test_models_whose_names_differ_in_what_no_file_can_be_called_keep_their_own_plots() -> None:
    records = [record("rtn", 4, 2.0, model) for model in ("a/../b", "a..b", "a b")]
    names = [plot.name for plot in study_plots(records)]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(r"[\w-]+", name) for name in names)


def test_an_allotment_has_a_grid_of_unit_by_width_and_a_note_that_is_none_has_no_picture() -> None:
    note = {"units": ["blocks.0.qkv", "blocks.0.o"], "widths": [2, 4], "bits": [4, 2]}
    note |= {"measured": [[0.5, 0.01], [0.125, 0.0]], "predicted": 0.135}

    def drawn(note: dict[str, Any]) -> list[Plot]:
        one = replace(record("rtn", 3, 3.0), notes={"allotment": note})
        return [p for p in study_plots([one]) if p.name.endswith("sensitivities")]

    [plot] = drawn(note)
    assert "0.1350" in plot.caption
    cells = tips(plot)
    assert "blocks.0.qkv, 2 bits: 0.5" in cells
    assert "blocks.0.o, 4 bits: nothing" in cells
    assert len([patch for patch in plot.figure.axes[0].patches if not patch.get_fill()]) == 2
    assert not drawn({**note, "bits": [4]})
    assert not drawn({**note, "measured": [[1.0]]})
