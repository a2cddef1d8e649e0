"""The Python door: a tidy table of a storage folder's numbers, under MLflow's names."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

import q3q
from q3q.errors import ReportError
from q3q.evaluate.compare import compare
from q3q.evaluate.samples import SAMPLES, window_rows, write_samples
from q3q.placement import Placement
from q3q.record import COMPLETED, TrialRecord
from q3q.track.mlflow_fields import trial_params
from tests.specs import make_spec

STORIES = "perplexity/stories"


def stored(storage, method, bits, value, **changes):
    record = TrialRecord(
        spec=make_spec(method, bits, **changes),
        placement=Placement(trials=storage / "trials"),
        status=COMPLETED,
        metrics={STORIES: value, "bits_per_weight": bits + 0.25},
        intervals={STORIES: (value - 0.1, value + 0.1)},
    )
    rows = window_rows(STORIES, "tokens", [0.5, 1.5])
    files: dict[str, str | None] = {SAMPLES: write_samples(record.trial.folder / SAMPLES, rows)}
    record = replace(record, files=files)
    record.save()
    return record


FIRST = (
    *("trial", "metric", "value", "low", "high"),
    *("difference", "difference_low", "difference_high"),
)


def test_a_row_is_a_trial_and_a_metric_under_mlflows_names(tmp_path):
    rtn, gptq = (
        stored(tmp_path, method, 3, value) for method, value in (("rtn", 4.0), ("gptq", 3.5))
    )
    table = q3q.results(tmp_path)
    assert tuple(table.columns[: len(FIRST)]) == FIRST
    assert len(table) == 4
    row = table[(table.trial == gptq.spec.id) & (table.metric == STORIES)].iloc[0]
    assert (row.value, row.low, row.high) == (3.5, 3.4, 3.6)
    assert row.bits == 3
    assert row.method == "gptq"
    for record in (rtn, gptq):
        own = table[table.trial == record.spec.id].iloc[0].dropna()
        assert trial_params(record.spec).keys() == {*own.index} - {*FIRST}


def test_the_difference_of_a_perplexity_is_in_nats_and_is_said_to_be_so(tmp_path):
    record = stored(tmp_path, "rtn", 3, 5.0)
    losses = [{f"text/{n}": math.log(number) for n in range(8)} for number in (5.0, 4.0)]
    compared = compare(STORIES, *losses, ratio=True)
    replace(record, comparisons={STORIES: compared}).save()
    table = q3q.results(tmp_path)
    [row] = table[table.metric == STORIES].itertuples()
    assert math.exp(row.difference) == pytest.approx(5.0 / 4.0)
    page = (Path(__file__).parents[2] / "docs" / "NOTEBOOK.md").read_text(encoding="utf-8")
    [line] = [line for line in page.splitlines() if line.startswith("| `difference`")]
    for text in (line, " ".join(str(q3q.results.__doc__).split())):
        assert "perplexities are in nats" in text


def test_a_difference_has_its_interval_whose_open_end_is_nan(tmp_path):
    record = stored(tmp_path, "rtn", 3, 5.0)
    bounded = compare(STORIES, *({str(n): n * by for n in range(8)} for by in (0.3, 0.2)))
    opened = replace(bounded, metric="bits_per_weight", high=None)
    replace(record, comparisons={STORIES: bounded, "bits_per_weight": opened}).save()
    rows = {row.metric: row for row in q3q.results(tmp_path).itertuples()}
    found = [(rows[one].difference_low, rows[one].difference_high) for one in rows]
    assert bounded.low is not None
    assert bounded.high is not None
    assert bounded.low < rows[STORIES].difference < bounded.high
    assert rows[STORIES].difference == bounded.difference
    assert found[0] == (bounded.low, bounded.high)
    assert found[1][0] == bounded.low
    assert math.isnan(found[1][1])
    stored(tmp_path / "alone", "rtn", 3, 5.0)
    alone = q3q.results(tmp_path / "alone")
    assert alone[["difference", "difference_low", "difference_high"]].isna().all(axis=None)


def test_what_diverged_is_nan_and_a_failed_trial_has_no_rows(tmp_path):
    record = stored(tmp_path, "rtn", 2, 5.0)
    replace(record, metrics={}, intervals={}, diverged=(STORIES,)).save()
    failed = replace(record.trial, spec=make_spec("rtn", 3))
    TrialRecord.failed(failed, "the worker died").save()
    table = q3q.results(tmp_path)
    assert table.trial.tolist() == [record.spec.id]
    assert math.isnan(table.value[0])


def test_samples_are_the_windows_and_questions_that_a_record_kept(tmp_path):
    record = stored(tmp_path, "gptq", 3, 3.5)
    table = q3q.samples(tmp_path)
    assert table.value.tolist() == [0.5, 1.5]
    assert table["sample"].tolist() == [0, 1]
    assert set(table.score) == {"nll"}
    assert set(table.trial) == {record.spec.id}
    assert set(table.method) == {"gptq"}
    (record.trial.folder / SAMPLES).write_bytes(b"damaged")
    with pytest.raises(ReportError, match=r"samples\.parquet cannot be read"):
        q3q.samples(tmp_path)


def test_a_missing_storage_or_study_is_said_in_a_line(tmp_path):
    with pytest.raises(ReportError, match="no such folder"):
        q3q.results(tmp_path / "nowhere")
    with pytest.raises(ReportError, match="holds no records"):
        q3q.results(tmp_path)
    record = stored(tmp_path, "gptq", 3, 3.5)
    with pytest.raises(ReportError, match="No sweep was run"):
        q3q.results(tmp_path, study="paper")
    (record.trial.folder / SAMPLES).unlink()
    replace(record, files={}).save()
    with pytest.raises(ReportError, match="kept the scores"):
        q3q.samples(tmp_path)
