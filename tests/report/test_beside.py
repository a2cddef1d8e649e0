"""Studies side by side, records as a DataFrame, and means over different questions."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from q3q.evaluate.samples import SAMPLES, window_rows, write_samples
from q3q.record import COMPLETED, Sweep, TrialRecord
from q3q.report import load
from q3q.report.__main__ import main
from q3q.report.beside import Beside, NamedStudy, beside
from q3q.report.latex import latex
from q3q.report.plots import study_plots
from q3q.report.tables import result_tables
from tests.specs import calibration_of, evaluation_of, make_trial, method_of, text_of

STORIES = "perplexity/stories"
HARD = [1.0, 2.0, 3.0, 4.0, 1.5, 2.5, 3.5, 4.5]
DOCS = Path(__file__).parents[2] / "docs"


def record(
    storage: Path, method: Any = "gptq", bits: int = 4, perplexity: float = 3.0, **spec: Any
) -> TrialRecord:
    """Return a completed trial that is saved."""
    accuracies = spec.pop("accuracies", {})
    trial = make_trial(method, bits, storage=storage, **spec)
    metrics = {STORIES: perplexity, **accuracies, "seconds/load": 1.0}
    result = TrialRecord(
        spec=trial.spec, placement=trial.placement, status=COMPLETED, metrics=metrics
    )
    result.save()
    return result


def measured(trial: TrialRecord, nll_N: list[float]) -> TrialRecord:
    write_samples(trial.trial.folder / SAMPLES, window_rows(STORIES, "d", nll_N))
    return trial


def study(name: str, *records: TrialRecord) -> NamedStudy:
    return NamedStudy(name, f"run {name}", "", records)


def cells(page: Beside) -> list[tuple[str, ...]]:
    return [row for table in page.tables for row in table.rows]


def test_what_differs_is_named_and_trials_meet_in_a_row_in_spite_of_it(tmp_path: Path) -> None:
    mild, strong = (method_of("gptq", damping=damping) for damping in (0.01, 0.05))
    page = beside(
        [
            study("mild", *(record(tmp_path, mild, bits, 3.0 + bits) for bits in (2, 4))),
            study("strong", *(record(tmp_path, strong, bits, 6.0 + 2 * bits) for bits in (2, 4))),
        ]
    )
    assert page.differences.rows == (("method.damping", "0.01", "0.05"),)
    assert cells(page) == [
        ("gptq", "2", "5.000", "10.00", "+100 %, worse (not tested)"),
        ("gptq", "4", "7.000", "14.00", "+100 %, worse (not tested)"),
    ]


def test_changes_are_tested_window_by_window(tmp_path: Path) -> None:
    c4, demo = (calibration_of(source) for source in ("c4", "demo"))
    first = measured(record(tmp_path, "gptq", 4, 3.0, calibration=c4), HARD)
    second = record(tmp_path, "gptq", 4, 3.1, calibration=demo)
    measured(second, [nll - 0.1 - 0.001 * k for k, nll in enumerate(HARD)])
    [row] = cells(beside([study("a", first), study("b", second)]))
    assert re.fullmatch(r"-\d.*% \[-.*, -.*\], better", row[-1])


def test_numbers_of_other_windows_or_questions_are_not_set_against_each_other(
    tmp_path: Path,
) -> None:
    short, whole = (evaluation_of(text_of("stories", limit=limit)) for limit in (2, None))
    page = beside(
        [
            study("short", record(tmp_path, "rtn", evaluation=short)),
            study("whole", record(tmp_path, "rtn", evaluation=whole)),
        ]
    )
    assert [row[-1] for row in cells(page)] == ["measured otherwise"]
    assert ("texts.stories.limit", "2", "none") in page.differences.rows


def test_a_metric_of_another_kind_changes_in_its_own_unit(tmp_path: Path) -> None:
    asked = evaluation_of(tasks=["copying"])
    first, second = (
        replace(record(tmp_path, "rtn", bits, evaluation=asked), metrics={"copying/f1": value})
        for bits, value in ((3, 0.5), (4, 0.75))
    )
    second = replace(second, spec=replace(first.spec, seed=1))
    [row] = cells(beside([study("a", first), study("b", second)]))
    assert row[-1] == "+0.250 (not tested)"


def test_a_trial_of_both_studies_is_called_the_same(tmp_path: Path) -> None:
    both, one = record(tmp_path, "rtn"), record(tmp_path, "gptq")
    page = beside([study("a", both, one), study("b", both)])
    assert cells(page) == [
        ("rtn", "4", "3.000", "3.000", "the same trial"),
        ("gptq", "4", "3.000", "-", "-"),
    ]


def test_several_studies_on_the_command_line_are_one_page(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, damping in (("mild", 0.01), ("strong", 0.05)):
        trial = record(tmp_path, method_of("gptq", damping=damping), 4, 3.0 + damping)
        Sweep(
            id=f"id{name}", name=name, command=f"run {name}", config="", trials=(trial.trial,)
        ).save(tmp_path)
    options = ["--study", "mild", "--study", "strong", "--storage", str(tmp_path)]
    assert main(options) == 0
    assert "method.damping" in capfd.readouterr().out
    folder = tmp_path / "reports/mild_idmild+strong_idstrong"
    page = (folder / "report.html").read_text()
    for words in ("mild against strong", "run mild", "run strong", "3.010", "3.050"):
        assert words in page
        assert words in (folder / "results.md").read_text()
    assert "sweep" in (folder / "results.csv").read_text().splitlines()[0].split(",")
    assert main([*options, "--study", "nothing"]) == 2
    assert "--study nothing is not known" in capfd.readouterr().err


def test_a_mean_names_its_questions_and_only_trials_with_the_same_share_it(tmp_path: Path) -> None:
    mine = evaluation_of("stories", tasks=["mine"])
    two = evaluation_of("stories", tasks=["who", "where"])
    few = evaluation_of("stories", tasks=["who", "where"], task_limit=6)
    answered = {"who/acc": 0.5, "where/acc": 0.75}
    records = [
        record(tmp_path, "rtn", evaluation=mine, accuracies={"mine/acc": 0.125}),
        record(tmp_path, "rtn", evaluation=two, accuracies=answered),
        record(tmp_path, "gptq", evaluation=two, accuracies=answered),
        record(tmp_path, "rtn", evaluation=few, accuracies=answered),
    ]
    tables = {
        table.title: [row[0] for row in table.rows]
        for table in result_tables(records, everything=False)
        if "accuracy" in table.title
    }
    assert tables == {
        "demo: mean accuracy of where, who, % (higher is better)": ["rtn", "gptq"],
        "demo: mean accuracy of where, who (6 questions each), % (higher is better)": ["rtn"],
        "demo: accuracy on mine, % (higher is better)": ["rtn"],
    }
    text = latex(records)
    assert "Avg. 1: mean of where, who. Avg. 2: mean of where, who (6 questions each)." in text
    means = [
        line.split(" & ")[-2:] for line in text.splitlines() if "RTN" in line or "GPTQ" in line
    ]
    assert sorted(sum("--" in cell for cell in row) for row in means) == [1, 1, 1, 2]
    captions = [plot.caption for plot in study_plots(records) if "Mean accuracy" in plot.title]
    assert len(captions) == 2
    frame = load(str(tmp_path))
    assert frame["accuracy"].isna().sum() == 1
    assert frame["accuracy_of"].nunique() == 2


def test_load_gives_each_setting_that_differs_and_numbers_that_are_numbers(tmp_path: Path) -> None:
    one = record(tmp_path, "gptq", 3, calibration=calibration_of("c4"))
    two = record(tmp_path, "gptq", 4, calibration=calibration_of("demo", samples=4))
    lost = replace(two, spec=replace(two.spec, seed=5), metrics={}, diverged=(STORIES,))
    lost.save()
    Sweep(id="x", name="first", command="run", config="", trials=(one.trial,)).save(tmp_path)
    frame = load(str(tmp_path)).set_index("trial")
    assert frame.loc[one.spec.id, "sweep"] == "first"
    assert frame.loc[one.spec.id, "calibration.source"] == "c4"
    assert frame.loc[two.spec.id, "calibration.samples"] == 4
    assert frame[STORIES].dtype == float
    assert frame[STORIES].isna().sum() == 1
    assert frame.loc[lost.spec.id, "diverged"] == STORIES
    assert list(load(str(tmp_path), "first")["trial"]) == [one.spec.id]
    assert "calibration.length" not in frame.columns  # it is the same for all


def test_the_documented_plot_can_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for method in ("none", "rtn", "gptq"):
        for bits in (3, 4):
            record(tmp_path / "mlruns", method, bits, 3.0 + 1 / bits)
    [snippet] = re.findall(r"```python\n(.*?)```", (DOCS / "REPORT.md").read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "REPORT.md", "exec"), {})
    assert (tmp_path / "mine.png").read_bytes().startswith(b"\x89PNG")
