"""A report is drawn again whenever something that it shows has changed, and only then."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from q3q.evaluate.samples import SAMPLES, window_rows, write_samples
from q3q.placement import Placement
from q3q.record import COMPLETED, TrialRecord
from q3q.report import drawn, write
from q3q.report.about import About, Report
from q3q.report.drawn import DRAWN, TrialFiles, current_report
from tests.damage import a_folder, flipped, gone, torn
from tests.specs import evaluation_of, make_spec, method_of

pytestmark = pytest.mark.usefixtures("undrawn")

STORIES = "perplexity/stories"
ABOUT = About(name="a study", command="python launch.py", predicted={"another's": 1.0})


def record(storage: Path, method: str, losses: list[float], **changes: Any) -> TrialRecord:
    """Return a trial that is on the disk with its samples."""
    spec = make_spec(method_of(method), 4, evaluation=evaluation_of("stories"))
    made = TrialRecord(
        spec=spec,
        placement=Placement(trials=storage / "trials"),
        status=COMPLETED,
        metrics={STORIES: 3.5, "bits_per_weight": 4.25, "seconds/quantize": 2.0},
        intervals={STORIES: (3.25, 3.75)},
    )
    path = made.trial.folder / SAMPLES
    sha = write_samples(path, window_rows(STORIES, "d", losses))
    made = replace(made, files={SAMPLES: sha}, **changes)
    made.save()
    return made


@pytest.fixture
def records(tmp_path: Path) -> list[TrialRecord]:
    """Return two trials; the unquantized model's is on the disk, of another command."""
    baseline = record(tmp_path, "none", [1.0, 1.25, 1.0])
    made = [record(tmp_path, method, [1.25, 1.5, 1.75]) for method in ("rtn", "gptq")]
    placed = Placement(baseline=baseline.spec.id, trials=tmp_path / "trials")
    return [replace(one, placement=placed) for one in made]


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Count how often a report is written."""
    count, plain = list[Path](), write.write_report

    def write_report(records: Any, folder: Path, about: About) -> Report:
        count.append(folder)
        return plain(records, folder, about)

    monkeypatch.setattr(write, "write_report", write_report)
    return count


def test_a_report_that_is_up_to_date_is_read_and_is_the_same(
    records: list[TrialRecord], draws: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "report"
    first = current_report(records, folder, ABOUT)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    others_prediction = replace(ABOUT, predicted={"another's": 2.0, "a third's": 3.0})
    assert current_report(records, folder, ABOUT) == first
    assert current_report(records, folder, others_prediction) == first
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert len(draws) == 1
    assert first.headline
    fresh = write.write_report(records, tmp_path / "other", ABOUT)
    assert first == replace(fresh, folder=folder)


def reworded(records: list[TrialRecord], tmp_path: Path) -> tuple[Any, About]:
    return records, replace(ABOUT, question="Why?")


def warned(records: list[TrialRecord], tmp_path: Path) -> tuple[Any, About]:
    return records, replace(ABOUT, warnings=["1 of the study's 3 trials has no record yet."])


def predicted(records: list[TrialRecord], tmp_path: Path) -> tuple[Any, About]:
    return records, replace(ABOUT, predicted={records[0].spec.id: 7.0})


def measured_otherwise(records: list[TrialRecord], tmp_path: Path) -> tuple[Any, About]:
    return [replace(records[0], metrics={STORIES: 3.6}), records[1]], ABOUT


def fewer(records: list[TrialRecord], tmp_path: Path) -> tuple[Any, About]:
    return records[:1], ABOUT


def samples_gone(records: list[TrialRecord], tmp_path: Path) -> tuple[Any, About]:
    (records[0].trial.folder / SAMPLES).unlink()
    return records, ABOUT


def baseline_changed(records: list[TrialRecord], tmp_path: Path) -> tuple[Any, About]:
    record(tmp_path, "none", [1.0, 1.25, 1.0], metrics={STORIES: 3.0})
    return records, ABOUT


def baseline_gone(records: list[TrialRecord], tmp_path: Path) -> tuple[Any, About]:
    path = tmp_path / "trials" / str(records[0].placement.baseline) / "record.json"
    path.unlink()
    return records, ABOUT


@pytest.mark.parametrize(
    "change",
    [
        reworded,
        warned,
        predicted,
        measured_otherwise,
        fewer,
        samples_gone,
        baseline_changed,
        baseline_gone,
    ],
)
def test_whatever_a_report_shows_draws_it_again(
    change: Callable[..., tuple[Any, About]],
    records: list[TrialRecord],
    draws: list[Path],
    tmp_path: Path,
) -> None:
    current_report(records, tmp_path / "report", ABOUT)
    changed, about = change(records, tmp_path)
    again = current_report(changed, tmp_path / "report", about)
    assert len(draws) == 2
    assert again.files == write.write_report(changed, tmp_path / "fresh", about).files


@pytest.mark.parametrize("part", ["_code", "packages", "version"])
def test_other_code_or_libraries_draw_it_again(
    part: str,
    records: list[TrialRecord],
    draws: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    current_report(records, tmp_path / "report", ABOUT)
    other = {"python": "4"} if part == "packages" else "another"
    monkeypatch.setattr(drawn, part, lambda *_: other)
    current_report(records, tmp_path / "report", ABOUT)
    assert len(draws) == 2


@pytest.mark.parametrize("damage", [gone, torn, flipped, a_folder])
def test_damage_to_any_file_of_it_draws_it_again(
    damage: Callable[[Path], None], records: list[TrialRecord], draws: list[Path], tmp_path: Path
) -> None:
    folder = tmp_path / "report"
    whole = current_report(records[:1], folder, ABOUT)
    names = [DRAWN, *(name for name in whole.files if not name.endswith("svg"))]
    for done, name in enumerate(names, start=1):
        damage(folder / name)
        assert current_report(records[:1], folder, ABOUT) == whole
        assert len(draws) == 1 + done, name
        assert {one: (folder / one).read_bytes() for one in whole.files} == whole.files


def test_the_code_is_every_file_of_q3qs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawn, "CODE", tmp_path)
    seen = {drawn._code()}
    for name in ("formatting.py", "report/page.html.j2", "report/page.css", "report/paper.csv"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        for content in ("one", "other"):
            path.write_text(content)
            seen.add(drawn._code())
    assert len(seen) == 9


def test_a_trials_files_are_made_when_one_is_asked_for(
    records: list[TrialRecord], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, plain = list[str](), write.trial_artifacts

    def trial_artifacts(one: TrialRecord) -> dict[str, bytes]:
        made.append(one.spec.id)
        return plain(one)

    monkeypatch.setattr(write, "trial_artifacts", trial_artifacts)
    files = TrialFiles(records[0])
    assert made == []
    assert dict(files) == plain(records[0])
    assert len(files) == len(plain(records[0]))
    assert made == [records[0].spec.id]
