"""Where exported checkpoints are said: the terminal, the report, MLflow's note."""

from pathlib import Path

import pytest

from q3q.record import COMPLETED, TrialRecord
from q3q.report.about import About
from q3q.report.checkpoints import checkpoint_lines, checkpoint_tables
from q3q.report.write import write_report
from q3q.track.wording import trial_note
from tests.specs import evaluation_of, make_trial

USE = {
    "loader": "transformers 5",
    "runs": [
        {
            "device": "cpu",
            "threads": 2,
            "idle_bytes": 300_000_000,
            "peak_bytes": 500_000_000,
            "prompt": 8,
            "tokens": 32,
            "seconds": 2.0,
        }
    ],
}


def exported(storage, *, path=None, metrics=None, **notes):
    folder = storage / "exports" / "tiny" if path is None else path
    trial = make_trial(
        evaluation=evaluation_of(), export="gptq", storage=storage, placement={"export": folder}
    )
    facts = {"format": "gptq", "path": str(folder), **notes}
    metrics = {"export_bytes": 6_600_000.0} if metrics is None else metrics
    return TrialRecord(
        spec=trial.spec,
        placement=trial.placement,
        status=COMPLETED,
        metrics=metrics,
        notes={"export": facts},
    )


def test_the_terminal_names_the_folder_and_its_size_also_where_nothing_was_measured(tmp_path):
    record = exported(tmp_path, disk_bytes=6_700_000)
    [line] = checkpoint_lines([record])
    label = record.spec.label
    assert line == f"Checkpoint of {label}: {tmp_path}/exports/tiny (6.70 MB)"
    report = write_report([record], tmp_path / "report", About(name="x", command="y"))
    assert report.text == "Nothing was measured: the trials had no evaluation."


@pytest.mark.parametrize(
    ("notes", "metrics", "size"),
    [
        ({"disk_bytes": 6_700_000}, None, "6.70 MB"),
        ({}, None, "6.60 MB"),  # an old record has its tensors' bytes alone
        ({}, {}, "size not recorded"),
    ],
)
def test_the_report_lists_checkpoints_with_what_is_known_of_them(tmp_path, notes, metrics, size):
    record = exported(tmp_path, metrics=metrics, **notes)
    [table] = checkpoint_tables([record])
    [row] = table.rows
    assert row[1] == size
    assert row[3:5] == ("not measured", "not measured")
    assert row[5] == "exports/tiny in the storage folder"
    write_report([record], tmp_path / "report", About(name="x", command="y"))
    for name in ("results.md", "report.html"):
        text = (tmp_path / "report" / name).read_text()
        assert "Exported checkpoints" in text
        assert "exports/tiny in the storage folder" in text


def test_memory_and_speed_are_listed_with_their_device(tmp_path):
    [table] = checkpoint_tables([exported(tmp_path, use=USE, path=Path("/served/tiny"))])
    [row] = table.rows
    assert row[3:] == (
        "500 MB resident at most, 300 MB of it before loading",
        "16 (CPU, 2 threads)",
        "/served/tiny",
    )
    assert "other runtimes may differ" in table.note


def test_the_terminal_is_not_flooded(tmp_path):
    lines = list(checkpoint_lines([exported(tmp_path)] * 15))
    assert len(lines) == 13
    assert lines[-1] == "... and 3 more; python -m q3q.trials lists them all"


def test_no_export_no_table(tmp_path):
    record = exported(tmp_path)
    plain = TrialRecord(spec=record.spec, placement=record.placement, status=COMPLETED)
    assert checkpoint_tables([plain]) == []
    assert list(checkpoint_lines([plain])) == []


def test_mlflows_note_names_the_folder(tmp_path):
    note = trial_note(exported(tmp_path, disk_bytes=6_700_000))
    assert f"Checkpoint: `{tmp_path}/exports/tiny` (gptq, 6.70 MB on disk)" in note


def test_a_checkpoint_in_an_object_store_is_named_by_its_url(tmp_path):
    record = exported(tmp_path)
    record.notes["export"]["path"] = "s3://bucket/study/exports/tiny"
    [line] = checkpoint_lines([record])
    assert "s3://bucket/study/exports/tiny" in line
