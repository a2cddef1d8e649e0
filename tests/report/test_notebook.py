"""The script in docs/NOTEBOOK.md runs, on a small storage folder, and draws its plot."""

import re
from dataclasses import replace
from pathlib import Path

import matplotlib as mpl

from q3q.evaluate.samples import SAMPLES, window_rows, write_samples
from q3q.placement import Placement, Trial
from q3q.record import COMPLETED, Sweep, TrialRecord
from tests.specs import calibration_of, evaluation_of, make_spec

PAGE = Path(__file__).parents[2] / "docs" / "NOTEBOOK.md"
LIBRARY = "perplexity/library"


def record(storage, method, losses, source="demo"):
    calibration = None if method == "none" else calibration_of(source)
    spec = make_spec(method, 2, calibration=calibration, evaluation=evaluation_of("library"))
    trial = Trial(spec, Placement(trials=storage / "trials"))
    rows = window_rows(LIBRARY, "tokens", losses)
    files = {SAMPLES: write_samples(trial.folder / SAMPLES, rows)}
    made = TrialRecord(spec=spec, placement=trial.placement, status=COMPLETED, metrics={LIBRARY: 9})
    replace(made, files=files).save()
    return trial


def test_the_pages_scripts_run(tmp_path, monkeypatch):
    storage = tmp_path / "mlruns"
    trials = (
        record(storage, "none", [1.0, 2.0]),
        record(storage, "gptq", [1.5, 2.2]),
        record(storage, "gptq", [1.1, 2.1], source="library"),
    )
    sweep = Sweep(id="a1", name="calibration", command="python launch.py", config="", trials=trials)
    sweep.save(storage)
    monkeypatch.chdir(tmp_path)
    mpl.use("Agg")
    scripts = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(scripts) == 2
    names = {}
    for script in scripts:
        exec(compile(script, str(PAGE), "exec"), names)
    assert set(names["table"].metric) == {LIBRARY}
    lines = names["axes"].get_lines()
    drawn = {line.get_label(): [round(y, 6) for y in line.get_ydata()] for line in lines[:2]}
    assert drawn == {"demo": [0.2, 0.5], "library": [0.1, 0.1]}
    assert (tmp_path / "windows.png").stat().st_size > 1000
