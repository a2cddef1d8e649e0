"""Laws of tables, plots and the report, on records made by hand."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from q3q.placement import Trial
from q3q.record import COMPLETED, FAILED, SiteError, TrialRecord
from q3q.report.about import About
from q3q.report.luck import luck_tables
from q3q.report.plots import perplexity_against_bits, site_error_heatmap, study_plots
from q3q.report.tables import method_by_bits, result_tables, sites_csv, trial_table
from q3q.report.write import trial_artifacts, write_report
from q3q.spec import TrialSpec
from tests.specs import (
    calibration_of,
    changed,
    evaluation_of,
    make_spec,
    method_of,
    model_of,
    text_of,
)

STORIES, WHO = "perplexity/stories", "stories_who/acc"


def spec(method: str = "gptq", bits: int = 4, **changes: Any) -> TrialSpec:
    """A trial; keywords are those of `make_spec`, or knobs of the method."""
    knobs = {name: changes.pop(name) for name in ("damping",) if name in changes}
    length = 512 if method == "awq" else 2048
    default = {"calibration": calibration_of(length=length)} if method in ("gptq", "awq") else {}
    return make_spec(
        method_of(method, **knobs),
        bits,
        **{"evaluation": evaluation_of("stories", tasks=["stories_who"]), **default, **changes},
    )


def record(
    method: str = "gptq",
    bits: int = 4,
    perplexity: float | None = 3.5,
    acc: float = 0.75,
    **changes: Any,
) -> TrialRecord:
    """Return a completed trial; None is a diverged perplexity."""
    measured = {} if perplexity is None else {STORIES: perplexity}
    return TrialRecord(
        spec=spec(method, bits, **changes),
        status=COMPLETED,
        metrics={
            **measured,
            WHO: acc,
            "bits_per_weight": bits + 0.25,
            "seconds/quantize": 2.0,
            "seconds/load": 0.5,
        },
        intervals={WHO: (acc - 0.05, acc + 0.04)},
        diverged=() if perplexity is not None else (STORIES,),
    )


def failed(method: str, bits: int, reason: str = "the worker died", **changes: Any) -> TrialRecord:
    return TrialRecord.failed(Trial(spec(method, bits, **changes)), reason)


GRID = [
    record("awq", 4, 3.25),
    record("gptq", 3, 12.3456),
    failed("gptq", 2),
    record("none", perplexity=3.0, acc=0.875),
    record("rtn", 2, None, acc=0.25),
    record("rtn", 3, 123456.0),
    record("rtn", 4, 987.654),
]


def test_method_by_bits_holds_every_outcome_in_its_cell() -> None:
    grid = method_by_bits(GRID, STORIES)
    assert list(grid.columns) == [2, 3, 4, 32]
    assert list(grid.index) == ["unquantized float32", "rtn", "awq", "gptq"]
    assert grid.to_numpy().tolist() == [
        ["-", "-", "-", 3.0],
        ["diverged", 123456.0, 987.654, "-"],
        ["-", "-", 3.25, "-"],
        ["failed", 12.3456, "-", "-"],
    ]


def test_the_terminal_table_is_exactly_this() -> None:
    perplexity, accuracy = result_tables(GRID, everything=False)
    assert perplexity.plain() == (
        "demo: perplexity of stories (lower is better)\n"
        "method \\ bits               2         3      4     32\n"
        "unquantized float32         -         -      -  3.000\n"
        "rtn                  diverged  1.23e+05  987.7      -\n"
        "awq                         -         -  3.250      -\n"
        "gptq                   failed     12.35      -      -"
    )
    assert accuracy.plain() == (
        "demo: accuracy on stories_who, % (higher is better)\n"
        "method \\ bits             2     3     4    32\n"
        "unquantized float32       -     -     -  87.5\n"
        "rtn                    25.0  75.0  75.0     -\n"
        "awq                       -     -  75.0     -\n"
        "gptq                 failed  75.0     -     -\n"
        "95 % intervals reach at most 5.0 points to either side."
    )


def test_the_markdown_table_is_exactly_this() -> None:
    assert result_tables(GRID[:3], everything=False)[0].markdown() == (
        "**demo: perplexity of stories (lower is better)**\n\n"
        "| method \\ bits | 2 | 3 | 4 |\n"
        "| --- | ---: | ---: | ---: |\n"
        "| awq | - | - | 3.250 |\n"
        "| gptq | failed | 12.35 | - |\n"
    )


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ({"group_size": 128}, {"group_size": 64}, ["gptq g64", "gptq g128"]),
        ({"group_size": 128}, {"group_size": -1}, ["gptq g128", "gptq pc"]),
        ({"act_bits": None}, {"act_bits": 8}, ["gptq a8", "gptq a16"]),
        ({"symmetric": True}, {"symmetric": False}, ["gptq asym", "gptq sym"]),
        ({"damping": 0.01}, {"damping": 0.05}, ["gptq damping=0.01", "gptq damping=0.05"]),
        (
            {"calibration": calibration_of("c4")},
            {"calibration": calibration_of("demo")},
            ["gptq source=c4", "gptq source=demo"],
        ),
        (
            {"calibration": calibration_of("file", digest="d3")},
            {"calibration": calibration_of("file", digest="d4")},
            ["gptq digest=d3", "gptq digest=d4"],
        ),
    ],
)
def test_what_differs_stands_in_the_label_and_nothing_is_overwritten(
    first: dict[str, Any], second: dict[str, Any], expected: list[str]
) -> None:
    records = [
        record("gptq", 3, 5.0, **first),
        record("gptq", 3, 6.0, **second),
        record("gptq", 4, 4.0, **first),
    ]
    grid = method_by_bits(records, STORIES)
    assert list(grid.index) == expected
    assert sorted(value for value in grid.to_numpy().flatten() if value != "-") == [4.0, 5.0, 6.0]


def test_seeds_share_a_cell_that_says_so() -> None:
    records = [record("gptq", 3, value, seed=seed) for seed, value in enumerate((5.0, 6.0, 7.0))]
    assert method_by_bits(records, STORIES).to_dict() == {3: {"gptq": 6.0}}
    assert result_tables(records, everything=False)[0].rows == (("gptq", "6.0 ± 1.0 (3 seeds)"),)
    diverged = [*records, record("gptq", 3, None, seed=3)]
    assert method_by_bits(diverged, STORIES).to_dict() == {3: {"gptq": "diverged"}}


@pytest.mark.parametrize(
    ("first", "second", "label"),
    [
        ({"chat": "thinking"}, {}, "gptq chat=thinking"),
        ({"shots": {"stories_who": 5}}, {"shots": {"stories_who": 0}}, "gptq shots=5"),
        ({"limits": {"stories_who": 9}}, {}, "gptq limits=9"),
        ({"include": "d1"}, {"include": "d2"}, "gptq include=d1"),
    ],
)
def test_questions_asked_otherwise_are_told_apart(
    first: dict[str, Any], second: dict[str, Any], label: str
) -> None:
    tasks = ["stories_who", "other"]
    records = [
        record(acc=acc, evaluation=evaluation_of("stories", tasks=tasks, **changes))
        for acc, changes in ((0.5, first), (0.75, second))
    ]
    records = [replace(r, metrics={**r.metrics, "other/acc": r.metrics[WHO]}) for r in records]
    assert method_by_bits(records, WHO).to_dict()[4][label] == 0.5
    for metric in (WHO, "accuracy"):
        assert sorted(method_by_bits(records, metric).to_dict()[4].values()) == [0.5, 0.75]
    assert list(method_by_bits(records, STORIES).index) == ["gptq"]


def test_numbers_that_differ_for_no_known_reason_are_both_shown() -> None:
    """A data set changed between two trials, which is no trait of one task's metric."""
    asked = evaluation_of(tasks=["stories_who"])
    records = [
        record(acc=acc, evaluation=changed(asked, data={"x:y": str(acc)})) for acc in (0.5, 0.75)
    ]
    result = method_by_bits(records, WHO).to_dict()[4]
    assert result == {f"gptq ({trial.spec.id})": trial.metrics[WHO] for trial in records}


def test_how_much_is_luck_is_told_by_seeds_calibrations_and_methods() -> None:
    sets = {samples: calibration_of(samples=samples) for samples in (8, 32)}
    values = {
        ("gptq", 8): (5.0, 7.0),
        ("gptq", 32): (4.0, 4.0),
        ("awq", 8): (9.0, 9.0),
        ("awq", 32): (9.0, 9.0),
    }
    records = [
        record(method, 2, value, seed=seed, calibration=sets[count])
        for (method, count), pair in values.items()
        for seed, value in enumerate(pair)
    ]
    table = luck_tables(records)[0]
    # Variances: 2, 0, 0, 0 within cells; 2 and 0 between sets; that of 5 and 9 between methods.
    assert table.rows == (("2", "0.71", "1.0", "2.8", "4.0"),)
    assert luck_tables([record("gptq", 2, 5.0), record("awq", 2, 6.0)]) == []


def test_methods_own_defaults_do_not_crowd_the_labels_but_group_sizes_do() -> None:
    same = [
        record("awq", 3),
        record("gptq", 3),
        record("none"),
    ]  # they calibrate differently, as each method does
    assert list(method_by_bits(same, STORIES).index) == [
        "unquantized float32",
        *("awq", "gptq"),
    ]
    differ = [record("rtn", 3, group_size=-1), record("gptq", 3), record("none")]
    assert list(method_by_bits(differ, STORIES).index) == [
        "unquantized float32",
        *("rtn pc", "gptq g128"),
    ]


def test_evaluations_that_differ_are_told_apart_only_where_they_matter() -> None:
    short = evaluation_of(text_of("stories", window=128), tasks=["stories_who"])
    records = [record(perplexity=3.5), record(perplexity=4.5, evaluation=short)]
    assert method_by_bits(records, STORIES).to_dict()[4] == {
        "gptq window=128": 4.5,
        "gptq window=512": 3.5,
    }
    assert method_by_bits(records, WHO).to_dict()[4] == {"gptq": 0.75}


def test_a_number_is_not_hidden_by_a_trial_that_failed_to_measure_it_again() -> None:
    more = evaluation_of("stories")
    for order in (1, -1):
        records = [record(perplexity=3.5), failed("gptq", 4, evaluation=more)][::order]
        assert method_by_bits(records, STORIES).to_dict()[4] == {"gptq": 3.5}


def test_a_failed_trials_numbers_are_not_shown() -> None:
    untrusted = replace(
        record("gptq", 3, 5.0), status=FAILED, reason="levels: 9 levels in a group of 3 bits"
    )
    assert method_by_bits([untrusted], STORIES).to_dict() == {3: {"gptq": "failed"}}
    row = trial_table([untrusted]).iloc[0]
    assert row[STORIES] is None
    assert row["seconds"] == 2.5


def test_a_task_without_accuracy_is_told_by_what_it_has() -> None:
    asked = evaluation_of(tasks=["copying"])
    measured = replace(record(evaluation=asked), metrics={"copying/exact_match": 0.5}, intervals={})
    [table] = result_tables([measured, failed("gptq", 3, evaluation=asked)], everything=False)
    assert table.title == "demo: copying/exact_match"
    assert table.rows == (("gptq", "failed", "0.5000"),)


def test_several_tasks_have_a_mean_and_models_have_tables_of_their_own() -> None:
    evaluation, moe = evaluation_of(tasks=["a", "b"]), model_of("demo_moe")
    records = [
        replace(
            record("rtn", 4, evaluation=evaluation, model=model),
            metrics={"a/acc": 0.5, "b/acc": accuracy},
        )
        for model, accuracy in ((spec().model, 0.6), (moe, 0.9))
    ]
    short = [(table.title, table.rows) for table in result_tables(records, everything=False)]
    assert short == [
        ("demo: mean accuracy of a, b, % (higher is better)", (("rtn", "55.0"),)),
        ("demo_moe: mean accuracy of a, b, % (higher is better)", (("rtn", "70.0"),)),
    ]
    assert len(result_tables(records, everything=True)) == 6
    assert list(method_by_bits(records, "a/acc").index) == ["rtn demo", "rtn demo_moe"]


def test_tables_too_wide_for_the_terminal_number_their_labels() -> None:
    long = "x" * 120
    records = [record("gptq", 3, 5.0, damping=long), record("gptq", 3, 6.0, damping="y")]
    lines = result_tables(records, everything=False)[0].plain(100).splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[2:4] == ["[1]            5.000", "[2]            6.000"]
    legend = "".join(line.strip() for line in lines[4:])
    assert legend == f"[1] gptq damping={long}[2] gptq damping=y"


def test_the_long_table_has_a_row_per_trial_and_says_how_each_ended() -> None:
    table = trial_table(
        [*GRID, replace(GRID[0], metrics={**GRID[0].metrics, STORIES: 9.0})]
    )  # the latest record counts
    assert list(table["method"]) == ["none", "rtn", "rtn", "rtn", "awq", "gptq", "gptq"]
    assert list(table["bits"]) == [None, 2, 3, 4, 4, 2, 3]
    assert list(table[STORIES]) == [3.0, "diverged", 123456.0, 987.654, 9.0, None, 12.3456]
    assert list(table["status"]) == ["COMPLETED"] * 5 + ["FAILED", "COMPLETED"]
    assert table["reason"][5] == "the worker died"
    assert table[f"{WHO}.low"][0] == pytest.approx(0.825)
    assert {"trial", "model", "group_size", "act_bits", "symmetric", "seed", "seconds"} <= set(
        table.columns
    )


def about(command: str = "python launch.py") -> About:
    return About(
        name="a study", command=command, question="Which is best?", expectation="GPTQ & <co>"
    )


def test_a_reports_files_do_not_depend_on_the_order_trials_ended_in(tmp_path: Path) -> None:
    command = "python launch.py -m method=none,rtn,gptq,awq bits=2,3,4"
    other = failed("gptq", 8, "out of\nmemory")
    report = write_report([other, *GRID], tmp_path / "one", about(command))
    again = write_report([*GRID[::-1], other], tmp_path / "two", about(command))
    files = {
        str(path.relative_to(report.folder)): path
        for path in report.folder.rglob("*")
        if path.is_file()
    }
    assert {"report.html", "results.md", "results.csv", "results.tex", "perplexity.png"} <= set(
        files
    )
    assert {f"plots/demo-perplexity-stories-bits.{kind}" for kind in ("svg", "png")} <= set(files)
    assert {name: path.read_bytes() for name, path in files.items()} == report.files
    assert report.files == again.files
    page = report.files["results.md"].decode()
    assert command in page
    assert "(plots/demo-perplexity-stories-bits.png)" in page
    assert f"- gptq w2 g128 · demo (`{GRID[2].spec.id}`): the worker died" in page
    assert f"- rtn w2 g128 · demo (`{GRID[4].spec.id}`): {STORIES}" in page
    assert "the worker died\n- gptq w8 g128 · demo" in page
    assert "out of memory" in page
    assert "8 trials: 6 completed, 2 failed." in page
    assert report.text.splitlines()[:3] == [
        "demo: perplexity of stories (lower is better)",
        "method \\ bits               2         3      4       8     32",
        "unquantized float32         -         -      -       -  3.000",
    ]
    assert report.artifacts()["table.md"].decode().count("| gptq | failed |") == 2


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ([], "No results: no trial measured anything."),
        ([failed("gptq", 2)], "gptq           failed"),
        ([record("rtn", 2, None)], "rtn            diverged"),
    ],
)
def test_nothing_to_show_is_shown_as_such(
    records: list[TrialRecord], expected: str, tmp_path: Path
) -> None:
    report = write_report(records, tmp_path, about())
    assert len(set(pixels(report.files["perplexity.png"]).flatten())) > 1  # not blank
    assert len(report.files["results.csv"].decode().splitlines()) == 1 + len(records)
    assert expected in report.text.splitlines()


def test_a_trials_artifacts_are_its_record_and_what_it_has(tmp_path: Path) -> None:
    assert set(trial_artifacts(failed("gptq", 2))) == {"record.json"}
    trial = replace(
        with_sites(2, ["q_proj", "o_proj"]),
        results={"results": {"stories_who": {"acc,none": 0.75}}},
    )
    files = trial_artifacts(trial)
    assert set(files) == {"record.json", "sites.csv", "heatmap.png", "lm_eval.json"}
    assert TrialRecord.from_json(json.loads(files["record.json"])) == trial
    assert json.loads(files["lm_eval.json"]) == trial.results
    assert files["sites.csv"].decode() == sites_csv(trial)


def with_sites(blocks: int, linears: list[str], outputs: bool = True) -> TrialRecord:
    sites = [
        SiteError(
            block=k,
            site="qkv",
            linear=name,
            weight_error=0.5 / (k + 1),
            output_error=0.25 if outputs else None,
        )
        for k in range(blocks)
        for name in linears
    ]
    return replace(record(), sites=tuple(sites))


def test_each_experts_error_is_drawn_for_the_fewest_bits_of_a_method() -> None:
    def of(bits: int) -> TrialRecord:
        errors = [
            SiteError(
                block=k,
                site="down",
                linear="down",
                weight_error=0.2,
                output_error=0.1,
                experts=(0.1 * k, 0.3),
            )
            for k in range(2)
        ]
        return replace(record("gptq", bits), sites=tuple(errors))

    plots = {
        plot.name: plot
        for plot in study_plots([of(4), of(3)])
        if plot.name.endswith("-expert-errors")
    }
    [plot] = plots.values()
    assert "w3" in plot.title
    assert "output error" in plot.caption


def test_the_sites_table_is_exactly_this() -> None:
    assert sites_csv(with_sites(2, ["q_proj"])) == (
        "block,site,linear,weight_error,output_error\n"
        "0,qkv,q_proj,0.5,0.25\n1,qkv,q_proj,0.25,0.25\n"
    )
    assert sites_csv(with_sites(1, ["q_proj"], outputs=False)).endswith("0,qkv,q_proj,0.5,\n")


def pixels(png: bytes) -> Any:
    import io

    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def texts(png_of: Any, *arguments: Any) -> list[str]:
    """Return every text that a plot draws, read from its figure after it was drawn."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.text import Text

    drawn: list[str] = []
    print_png = FigureCanvasAgg.print_png

    def read(canvas: Any, *arguments: Any, **settings: Any) -> None:
        print_png(canvas, *arguments, **settings)
        drawn.extend(text.get_text() for text in canvas.figure.findobj(Text) if text.get_text())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FigureCanvasAgg, "print_png", read)
        png_of(*arguments)
    return drawn


def test_the_plot_says_what_it_cannot_show_and_names_its_axes() -> None:
    drawn = texts(perplexity_against_bits, GRID)
    assert "perplexity increase (%)" in drawn
    assert "bits per weight\nnot shown: rtn 2-bit diverged, gptq 2-bit failed" in drawn
    assert {"unquantized float32", "rtn", "awq", "gptq", "demo: stories"} <= set(drawn)
    assert {"10", "1e+06"} <= set(drawn)  # a logarithmic axis with plain numbers
    alone = texts(perplexity_against_bits, [trial for trial in GRID if trial.spec.scheme])
    assert "perplexity per token" in alone  # nothing to compare with
    assert "100000" in alone


def test_a_point_moves_in_the_plot_when_its_perplexity_does() -> None:
    before, after = (
        [record("rtn", 3, 9.0), record("rtn", 4, low), record("none", perplexity=3.0)]
        for low in (4.0, 6.0)
    )
    pictures = [pixels(perplexity_against_bits(records)) for records in (before, after)]
    assert pictures[0].shape == pictures[1].shape
    assert (pictures[0] != pictures[1]).any()


def test_the_heatmap_prefers_the_error_of_outputs_and_says_so() -> None:
    drawn = " ".join(texts(site_error_heatmap, with_sites(2, ["q_proj", "k_proj"])))
    assert "output error ‖X(W − Q)ᵀ‖ / ‖XWᵀ‖" in drawn
    assert "qkv/k_proj" in drawn
    drawn = " ".join(texts(site_error_heatmap, with_sites(2, ["q_proj"], outputs=False)))
    assert "weight error ‖W − Q‖ / ‖W‖" in drawn


def test_the_heatmap_averages_many_linears_and_says_so_and_counts_cells_without_a_number() -> None:
    drawn = " ".join(texts(site_error_heatmap, with_sites(3, [f"experts.{i}" for i in range(65)])))
    assert "mean over the 65 linears of each site" in drawn
    assert "qkv/experts.0" not in drawn
    complete = with_sites(2, ["q_proj", "k_proj"])
    unknown = replace(
        complete, sites=(replace(complete.sites[0], output_error=None), *complete.sites[1:])
    )
    assert "grey: 1 without a number" in " ".join(texts(site_error_heatmap, unknown))
