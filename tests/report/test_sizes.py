"""A model's size is that of its files where there are files, and a report says which it is."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from q3q.names import trial_names
from q3q.placement import Placement
from q3q.record import COMPLETED, UNQUANTIZED, TrialRecord
from q3q.report.about import About
from q3q.report.baselines import with_baselines
from q3q.report.plots import study_plots
from q3q.report.sizes import COUNTED, COUNTED_IN_16, FILES, bits_of_weight, bytes_of
from q3q.report.tables import result_tables, trial_table
from q3q.report.write import write_report
from tests.specs import evaluation_of, make_spec, model_of

STORIES = "perplexity/stories"
PARAMETERS = 1_000_000
MODEL = "bits_per_weight_model"


def record(
    method: str = "gptq",
    bits: int = 4,
    counted: float = 6.0,
    files: float | None = None,
    stored: dict[str, Any] | None = None,
    **spec: Any,
) -> TrialRecord:
    """Return a trial of a model with a million parameters.

    Args:
        counted: bits per weight of the whole model that the record has.
        files: bits per weight of the exported files.
    """
    perplexity = spec.pop("perplexity", 3.0)
    metrics = {
        STORIES: perplexity,
        "bits_per_weight": float(bits),
        MODEL: counted,
        "model_bytes": counted * PARAMETERS / 8,
    }
    if files is not None:
        metrics["export_bytes"] = files * PARAMETERS / 8
    notes = {} if stored is None else {"stored": stored}
    return TrialRecord(
        spec=make_spec(method, bits, **spec), status=COMPLETED, metrics=metrics, notes=notes
    )


OLD_HF = record(counted=6.3, files=32.0, export="hf")  # as an earlier version counted it
AWQ = record(counted=9.3, files=9.3, export="awq")
PLAIN = record("rtn", counted=6.3)
NEW = record("rtn", counted=7.5, stored={"dtype": "float32", "in_files": False})
NONE = record("none", counted=32.0, stored={"dtype": "float32", "in_files": True})


@pytest.mark.parametrize(
    ("trial", "bits", "rule"),
    [
        (OLD_HF, 32.0, FILES),
        (AWQ, 9.3, FILES),
        (PLAIN, 6.3, COUNTED_IN_16),
        (NEW, 7.5, COUNTED),
        (NONE, 32.0, FILES),
    ],
)
def test_files_count_where_there_are_files(trial: TrialRecord, bits: float, rule: str) -> None:
    size, of_weight = bytes_of(trial), bits_of_weight(trial, MODEL)
    assert size is not None
    assert of_weight is not None
    assert size.value == pytest.approx(bits * PARAMETERS / 8)
    assert of_weight.value == pytest.approx(bits)
    assert size.rule == of_weight.rule == rule


def sizes(records: list[TrialRecord]) -> tuple[dict[str, str], str]:
    [table] = [t for t in result_tables(records, everything=True) if "whole model" in t.title]
    return {
        row[0]: ", ".join(cell for cell in row[1:] if cell != "-") for row in table.rows
    }, table.note


def test_a_table_marks_what_is_counted_only_where_rows_differ_and_says_the_rule() -> None:
    mixed, note = sizes([OLD_HF, AWQ, PLAIN])
    assert mixed == {"gptq export:hf": "32.00", "gptq export:awq": "9.30", "rtn": "6.30 †"}
    assert note.startswith("Sizes without a mark: the checkpoint's files. †: counted")
    files, note = sizes([OLD_HF, AWQ])
    assert list(files.values()) == ["9.30", "32.00"]
    assert note == "Sizes: the checkpoint's files."
    counted, note = sizes([PLAIN])
    assert list(counted.values()) == ["6.30"]
    assert note.startswith("Sizes: counted, as no checkpoint was written")
    three, note = sizes([NONE, PLAIN, replace(NEW, spec=make_spec("rtn", 3))])
    assert three == {"unquantized float32": "32.00", "rtn": "7.50 †, 6.30 ††"}
    assert "††: counted" in note


def test_the_largest_file_is_the_largest_in_the_plot_and_looks_differ() -> None:
    plots = {plot.name: plot for plot in study_plots([OLD_HF, AWQ, PLAIN])}
    [axes] = plots["demo-pareto"].figure.axes
    points: dict[str, Any] = {
        str(line.get_gid()).split("|")[1]: line
        for line in axes.get_lines()
        if str(line.get_gid()).startswith("q3q-point")
    }
    megabytes = {label: float(line.get_xdata()[0]) for label, line in points.items()}
    assert max(megabytes, key=lambda label: megabytes[label]) == "gptq export:hf"
    looks = {
        (line.get_color(), line.get_marker(), line.get_fillstyle()) for line in points.values()
    }
    assert len(looks) == len(points)
    assert "†: counted" in plots["demo-pareto"].caption


def test_every_text_has_its_picture_against_size() -> None:
    evaluation = evaluation_of("stories", "library")
    records = [
        replace(trial, metrics={**trial.metrics, "perplexity/library": 9.0})
        for trial in (record("rtn", bits, float(bits), evaluation=evaluation) for bits in (3, 4))
    ]
    titles = [plot.title for plot in study_plots(records) if "size" in plot.title]
    assert titles == ["Perplexity of stories against size", "Perplexity of library against size"]


@pytest.mark.parametrize(
    ("dtype", "label", "bits"),
    [
        ("float32", "unquantized float32", "32"),
        ("bfloat16", "unquantized bfloat16", "16"),
        ("float16", "unquantized float16", "16"),
    ],
)
def test_an_unquantized_model_is_called_by_its_type(dtype: str, label: str, bits: str) -> None:
    trial = record("none", counted=16.0, model=model_of("demo", dtype=dtype))
    [table] = result_tables([trial], everything=False)
    assert (table.rows[0][0], table.columns[1]) == (label, bits)


def test_a_checkpoint_that_was_given_quantized_has_the_bits_that_it_has() -> None:
    stored = {"dtype": "float32", "in_files": True, "quantized": "gptq"}
    trial = record("none", counted=9.3, stored=stored)
    trial = replace(trial, metrics={**trial.metrics, "bits_per_weight": 4.25})
    tables = result_tables([trial], everything=True)
    assert {(table.rows[0][0], table.columns[1]) for table in tables} == {("given gptq", "4")}
    assert [table.rows[0][1] for table in tables] == ["3.000", "4.25", "9.30"]


def test_no_label_names_a_setting_that_an_unquantized_model_has_not() -> None:
    mixed = record("rtn", rules={"overrides": {}, "skip": ["blocks.0"]}, skip=("blocks.0.o",))
    tables = result_tables([record("none", counted=16.0), mixed, PLAIN], everything=False)
    assert [row[0] for row in tables[0].rows] == [
        "unquantized float32",
        "rtn",
        "rtn -blocks.0",
    ]
    assert set(trial_names([NONE.spec]).values()) == {"none · demo"}


def test_a_single_trial_shows_the_unquantized_model_that_it_computed(tmp_path: Path) -> None:
    trial = replace(PLAIN, notes={UNQUANTIZED: {STORIES: [2.5, 2.0, 3.0]}})
    report = write_report([trial], tmp_path / "report", About(name="one", command="run"))
    assert "unquantized float32      -  2.500" in report.text
    assert "+20.0 % from the unquantized model" in " ".join(report.text.split())
    page = report.files["report.html"].decode()
    assert "1 trial: 1 completed, 0 failed." in page
    assert page.count("<details><summary>") == 1  # what was not run is in no list of trials
    assert len(trial_table([trial])) == 1


def test_a_finished_trial_of_the_unquantized_model_counts_before_the_note(tmp_path: Path) -> None:
    none = replace(record("none", perplexity=2.4), placement=Placement(trials=tmp_path / "trials"))
    none.save()
    placement = Placement(trials=tmp_path / "trials", baseline=none.spec.id)
    noted = {UNQUANTIZED: {STORIES: [2.5]}}
    trial = replace(PLAIN, notes=noted, placement=placement)
    assert [r.metrics[STORIES] for r in with_baselines([trial])] == [3.0, 2.4]
    other = replace(trial, spec=make_spec("rtn", evaluation=evaluation_of("library")))
    assert len(with_baselines([other])) == 2  # that trial was evaluated otherwise
    assert with_baselines([trial, none]) == [trial, none]
    assert len(with_baselines([replace(trial, notes={}, placement=Placement())])) == 1
