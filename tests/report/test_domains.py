"""What a calibration text costs on each evaluated text: who shares a table, and its rows."""

from pathlib import Path

import pytest

from q3q.placement import Placement
from q3q.record import COMPLETED, TrialRecord
from q3q.report.about import About
from q3q.report.domains import NOTE, OWN, domain_tables
from q3q.report.write import one_format
from q3q.spec import CalibrationPart
from tests.specs import calibration_of, evaluation_of, make_spec, text_of

CODE = text_of("code", source="file", digest="of code")
EVALUATION = evaluation_of("stories", "library", CODE, drift="auto")
KL = {"kl/stories": 0.1, "kl/library": 0.4, "kl/code": 0.5}


def record(calibration, metrics=KL, bits=2, **changes):
    return TrialRecord(
        spec=make_spec("gptq", bits, calibration=calibration, evaluation=EVALUATION, **changes),
        placement=Placement(calibration=Path("/somewhere/mine.txt")),
        status=COMPLETED,
        metrics={"perplexity/stories": 2.0, **metrics},
        intervals={name: (value / 2, value * 2) for name, value in metrics.items()},
    )


STORIES = record(calibration_of("demo"))
LIBRARY = record(calibration_of("library"), {"kl/stories": 0.3, "kl/library": 0.2, "kl/code": 0.25})
MINE = record(calibration_of("file", digest="of code"))


def test_a_row_is_a_calibration_and_its_own_kind_is_marked():
    [table] = domain_tables([STORIES, LIBRARY, MINE])
    assert table.columns == ("calibrated on", "KL on stories", "KL on library", "KL on code")
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["demo"] == (
        f"0.1000 [0.05000, 0.2000] ({OWN})",
        "0.4000 [0.2000, 0.8000]",
        "0.5000 [0.2500, 1.000]",
    )
    assert [cell.endswith(f"({OWN})") for cell in rows["library"]] == [False, True, False]
    assert [cell.endswith(f"({OWN})") for cell in rows["file mine.txt"]] == [False, False, True]
    assert "gptq, 2 bits, 8 windows of 64 tokens" in table.title


def test_only_trials_that_differ_in_the_text_alone_share_a_table():
    assert domain_tables([STORIES]) == []
    assert domain_tables([STORIES, record(calibration_of("library"), bits=4)]) == []
    assert domain_tables([STORIES, record(calibration_of("library", samples=9))]) == []
    assert domain_tables([STORIES, record(calibration_of("demo"), seed=1)]) == []
    assert domain_tables([STORIES, record(calibration_of("library"), metrics={})]) == []


def test_seeds_of_a_calibration_are_one_row_and_a_mix_is_of_all_its_kinds():
    parts = (
        CalibrationPart(source="demo", digest="a", samples=6),
        CalibrationPart(source="library", digest="b", samples=2),
    )
    mixed = record(calibration_of("mix", parts=parts))
    again = record(calibration_of("demo"), {name: kl + 0.02 for name, kl in KL.items()}, seed=1)
    [table] = domain_tables([STORIES, again, mixed])
    assert len(table.rows) == 2
    rows = {row[0]: row[1:] for row in table.rows}
    assert [OWN in cell for cell in rows["demo:6+library:2"]] == [True, True, False]
    assert "(2 seeds)" in rows["demo"][0]


@pytest.mark.parametrize("kind", ["html", "md"])
def test_the_report_has_the_table_where_several_texts_were_calibrated_on(kind):
    about = About(name="mine", command="python launch.py")
    both = one_format([STORIES, LIBRARY], about, kind).decode()
    assert "What each calibration costs" in both
    assert NOTE.split('"')[0] in both
    assert "What each calibration costs" not in one_format([STORIES], about, kind).decode()
