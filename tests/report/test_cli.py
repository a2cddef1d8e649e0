"""`python -m q3q.report` on folders of records, complete, empty and damaged."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from q3q.record import COMPLETED, Sweep, TrialRecord
from q3q.report.__main__ import main
from q3q.storage.files import sealed, unsealed
from tests.specs import evaluation_of, make_trial, text_of


def record(storage: Path, bits: int, model: str = "demo", commit: str = "aaa") -> TrialRecord:
    """Saved in the storage folder."""
    evaluation = evaluation_of(text_of("wikitext2", window=2048))
    trial = make_trial("rtn", bits, model=model, evaluation=evaluation, storage=storage)
    metrics = {"perplexity/wikitext2": 10.0 + bits, "seconds/evaluate": 2.0}
    result = TrialRecord(
        spec=trial.spec,
        placement=trial.placement,
        status=COMPLETED,
        metrics=metrics,
        environment={"git_commit": commit},
    )
    result.save()
    return result


def sweep(storage: Path, name: str, *records: TrialRecord) -> None:
    Sweep(
        id=f"id{name}",
        name=name,
        command=f"run {name}",
        config="",
        trials=tuple(record.trial for record in records),
        question=f"{name}?",
    ).save(storage)


def test_a_study_is_found_by_its_name_and_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two, three = record(tmp_path, 2), record(tmp_path, 3)
    sweep(tmp_path, "first", two)
    sweep(tmp_path, "second", two, three, replace(two, spec=replace(two.spec, seed=9)))
    assert main(["--study", "second", "--storage", str(tmp_path)]) == 0
    page = (tmp_path / "reports/second_idsecond/report.html").read_text()
    assert "second?" in page
    assert "run second" in page
    assert "1 of the study&#39;s 3 trials have no record yet." in page
    assert "report.html" in capsys.readouterr().out


def test_each_format_is_printed_alone(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    record(tmp_path, 2, model="qwen3_8b_base")
    shown = {}
    for kind in ("html", "md", "csv", "latex"):
        assert main(["--storage", str(tmp_path), "--format", kind]) == 0
        shown[kind] = capfdbinary.readouterr().out.decode()
    assert shown["html"].startswith("<!doctype html>")
    assert "| rtn | 12.00 |" in shown["md"]
    assert shown["csv"].splitlines()[0].startswith("trial,label,model,method,bits")
    assert r"Qwen3-8B-Base & RTN & 2 & 16 & 128 & 12.0 \\" in shown["latex"]
    assert not (tmp_path / "reports").exists()


def test_against_the_paper_says_so_even_when_nothing_was_run(
    tmp_path: Path, capfdbinary: pytest.CaptureFixture[bytes]
) -> None:
    record(tmp_path, 2)
    main(["--storage", str(tmp_path), "--format", "md"])
    assert b"Against the paper" not in capfdbinary.readouterr().out
    main(["--storage", str(tmp_path), "--format", "md", "--against", "paper"])
    assert b"None of the study's 2250 cells" in capfdbinary.readouterr().out


def test_no_records_and_unknown_studies_are_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--storage", str(tmp_path)]) == 2
    assert "holds no records: run a sweep first" in capsys.readouterr().err
    sweep(tmp_path, "group_size", record(tmp_path, 2))
    assert main(["--storage", str(tmp_path), "--study", "groupsize"]) == 2
    assert capsys.readouterr().err == (
        "q3q: --study groupsize is not known; did you mean group_size? "
        f"Known in {tmp_path}: group_size\n"
    )


def test_a_damaged_record_is_left_out_and_named(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    record(tmp_path, 2)
    broken, strange = record(tmp_path, 3), record(tmp_path, 4)
    path = tmp_path / "trials" / broken.spec.id / "record.json"
    path.write_text(path.read_text()[:100])
    other = tmp_path / "trials" / strange.spec.id / "record.json"
    other.write_text(
        json.dumps({**strange.to_json(), "spec": {**strange.trial.to_json(), "seed": 5}})
    )
    assert main(["--storage", str(tmp_path), "--format", "md"]) == 0
    printed = capfd.readouterr()
    assert f"{path} cannot be read and is left out (not JSON)" in printed.err
    assert f"{other} cannot be read and is left out (ValueError: it belongs to trial" in printed.err
    assert "1 trial: 1 completed" in printed.out
    assert str(path) in printed.out


def test_records_of_several_code_versions_are_told(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    record(tmp_path, 2, commit="aaa")
    record(tmp_path, 3, commit="bbb")
    main(["--storage", str(tmp_path), "--format", "md"])
    assert "measured by 2 versions of the code: 1 by aaa, 1 by bbb." in capfd.readouterr().out


def test_code_that_nobody_knows_is_a_version_too(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    record(tmp_path, 2, commit="aaa")
    record(tmp_path, 3, commit="")
    main(["--storage", str(tmp_path), "--format", "md"])
    printed = capfd.readouterr().out
    assert "measured by 2 versions of the code: 1 by aaa, 1 by unknown." in printed
    assert "code aaa: `python launch.py" in printed
    main(["--storage", str(tmp_path), "--format", "csv"])
    head, *rows = capfd.readouterr().out.splitlines()
    place = head.split(",").index("git_commit")
    assert [row.split(",")[place] for row in rows] == ["aaa", "unknown"]


def test_all_sweeps_of_a_name_are_one_study_and_an_id_is_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two, three = record(tmp_path, 2), record(tmp_path, 3)
    sweep(tmp_path, "grid", two)
    path = tmp_path / "sweeps/grid_idgrid.json"
    older = {**unsealed(path.read_bytes()), "id": "older"}
    path.unlink()
    (tmp_path / "sweeps/grid_older.json").write_bytes(sealed(older))
    sweep(tmp_path, "grid", three)
    assert main(["--storage", str(tmp_path), "--study", "grid"]) == 0
    page = (tmp_path / "reports/grid/report.html").read_text()
    assert "2 trials: 2 completed" in page
    assert "This report covers 2 sweeps of this name" in page
    assert main(["--storage", str(tmp_path), "--study", "older"]) == 0
    assert "1 trial: 1 completed" in (tmp_path / "reports/grid_older/report.html").read_text()


@pytest.mark.parametrize(
    "damage",
    [
        {"environment": None},
        {"metrics": []},
        {"notes": [1]},
        {"intervals": {"a": [None, None]}},
        {
            "sites": [
                {
                    "block": 0,
                    "site": "o",
                    "linear": "o",
                    "weight_error": "much",
                    "output_error": None,
                }
            ]
        },
        {"spec": {"seed": -1}},
        {"spec": {"evaluation": []}},
        {"spec": {"model": None}},
        {"reason": None},
        "[" * 100_000,
        "null",
    ],
    ids=str,
)
def test_what_is_no_record_is_named_and_the_others_are_reported(
    damage: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    record(tmp_path, 2)
    strange = record(tmp_path, 3)
    path = tmp_path / "trials" / strange.spec.id / "record.json"
    data = strange.to_json()
    if isinstance(damage, dict):
        changed = {**data["spec"], **damage["spec"]} if "spec" in damage else data["spec"]
        path.write_text(json.dumps({**data, **damage, "spec": changed}))
    else:
        path.write_text(damage)
    assert main(["--storage", str(tmp_path), "--format", "html"]) == 0
    assert f"{path} cannot be read and is left out" in capfd.readouterr().err


def test_a_damaged_sweep_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sweep(tmp_path, "whole", record(tmp_path, 2))
    (tmp_path / "sweeps/torn_1.json").write_text('{"id": "1", "trials": [')
    assert main(["--storage", str(tmp_path), "--study", "whole", "--format", "md"]) == 0
    assert "torn_1.json cannot be read and is left out (not JSON)" in capfd.readouterr().err
    assert main(["--storage", str(tmp_path), "--study", "torn"]) == 2
    assert "torn_1.json cannot be read" in capfd.readouterr().err


def test_an_out_that_is_no_folder_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record(tmp_path, 2)
    file = tmp_path / "notes.txt"
    file.write_text("notes")
    assert main(["--storage", str(tmp_path), "--out", str(file)]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"q3q: --out {file} cannot be written")
    assert printed.count("\n") == 1
    assert file.read_text() == "notes"
