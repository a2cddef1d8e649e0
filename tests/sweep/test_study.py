"""Real sweeps through launch.py: real Ray, real MLflow, real processes killed."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from q3q.record import TrialRecord
from tests.chaos.faults import log_of

ROOT = Path(__file__).parent.parent.parent
SMALL = [
    "evaluation.tasks=[]",
    "evaluation.texts=[demo]",
    "evaluation.limit=4",
    "calibration.samples=8",
]


def start(storage: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "launch.py", *arguments, *SMALL, f"storage={storage}"]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def launch(storage: Path, *arguments: str) -> tuple[int, str]:
    process = start(storage, *arguments)
    output, _ = process.communicate(timeout=240)
    return process.returncode, output


def records(storage: Path) -> dict[str, dict]:
    def name(record: dict) -> str:
        if record["spec"].get("reference"):
            return "floor"
        return record["spec"]["method"]["name"] + str(
            (record["spec"]["scheme"] or {}).get("bits", "")
        )

    return {name(record): record for record in _all(storage)}


def descendants(pid: int) -> list[int]:
    parents = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(path.parent.name)] = int(fields[1])
    found, front = [], [pid]
    while front:
        front = [child for child, parent in parents.items() if parent in front]
        found += front
    return found


def working(pid: int) -> list[int]:
    """Ray workers below a process that have a task in hand: they carry its name."""
    busy = []
    for child in descendants(pid):
        try:
            title = Path(f"/proc/{child}/cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if title.startswith("ray::task"):
            busy.append(child)
    return busy


def client(storage: Path):
    from mlflow import MlflowClient

    return MlflowClient(f"sqlite:///{storage}/mlflow.db")


def runs(storage: Path) -> tuple[list, list]:
    mlflow = client(storage)
    everything = [
        run
        for exp in mlflow.search_experiments()
        for run in mlflow.search_runs([exp.experiment_id])
    ]
    parents = [run for run in everything if "mlflow.parentRunId" not in run.data.tags]
    return parents, [run for run in everything if run not in parents]


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """One sweep with a worker killed by SIGKILL while it quantizes, and all that it left."""
    storage = tmp_path_factory.mktemp("swept")
    process = start(storage, "-m", "method=rtn,gptq", "bits=2,4", "evaluation.floor=true")
    deadline = time.monotonic() + 120
    killed = None
    while killed is None and time.monotonic() < deadline and process.poll() is None:
        # Its evaluation is still to come, so it cannot have ended meanwhile.
        for log in storage.glob("trials/*/trial.log"):
            steps = log_of(log.parent)
            if killed is None and steps and steps[-1].words.startswith("quantize 1 of"):
                killed = steps[-1].pid
                os.kill(killed, signal.SIGKILL)
        time.sleep(0.02)
    output, _ = process.communicate(timeout=240)
    assert killed is not None, output
    return storage, process.returncode, output, killed


def test_a_killed_worker_costs_nothing(swept):
    storage, code, output, killed = swept
    assert code == 0, output
    assert len(records(storage)) == 6
    assert {record["status"] for record in records(storage).values()} == {"COMPLETED"}
    assert f"pid {killed}" in output  # the death was seen, and said


def test_the_unquantized_model_is_added_and_all_are_compared_with_it(swept):
    storage, _, output, _ = swept
    assert "method=none of demo is added, to compare with" in output
    found = records(storage)
    assert found["none"]["comparisons"] == {}
    for name in set(found) - {"none", "floor"}:
        compared = found[name]["comparisons"]["perplexity/stories"]
        ours, theirs = (found[one]["metrics"]["perplexity/stories"] for one in (name, "none"))
        assert compared["difference"] == pytest.approx(math.log(ours / theirs))
        assert compared["n"] == 4
    floor = found["floor"]["metrics"]["kl_floor/stories"]
    kls = [found[name]["metrics"]["kl/stories"] for name in ("rtn4", "rtn2")]
    assert 0 < floor < kls[0] < kls[1]
    assert "demo in bfloat16 is added, to see what rounding alone costs" in output


def test_the_table_and_the_report_are_there(swept):
    _storage, _, output, _ = swept
    assert re.search(r"method.*2.*4", output)
    folder = Path(re.findall(r"Report and plots: (.*)", output)[0])
    folder = folder if folder.is_absolute() else ROOT / folder
    assert {"results.csv", "results.md", "perplexity.png"} <= {
        path.name for path in folder.iterdir()
    }
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "is noise for demo" in page  # the floor is no choice of the table, but is said
    assert "bfloat16" not in (folder / "results.md").read_text(encoding="utf-8").partition("##")[0]
    assert "\x1b" not in output  # a pipe is no terminal


def test_mlflow_has_what_ran(swept):
    storage, *_ = swept
    parents, children = runs(storage)
    assert len(parents) == 1
    assert len(children) == 6
    assert all(
        child.data.tags["mlflow.parentRunId"] == parents[0].info.run_id for child in children
    )
    by_trial = {child.data.tags["q3q.trial"]: child for child in children}
    for record in records(storage).values():
        child = by_trial[TrialRecord.from_json(record).spec.id]
        assert child.data.metrics["perplexity/stories"] == pytest.approx(
            record["metrics"]["perplexity/stories"]
        )
        assert child.data.metrics["bits_per_weight"] == pytest.approx(
            record["metrics"]["bits_per_weight"]
        )
        assert child.data.tags["q3q.method"] == record["spec"]["method"]["name"]
        assert child.data.params["seed"] == "0"
        assert child.info.status == "FINISHED"
        names = {artifact.path for artifact in client(storage).list_artifacts(child.info.run_id)}
        assert {"record.json", "samples.parquet"} <= names
        assert ("sites.csv" in names) == (record["spec"]["scheme"] is not None)
    names = {artifact.path for artifact in client(storage).list_artifacts(parents[0].info.run_id)}
    assert {"config.yaml", "results.csv", "table.md", "perplexity.png"} <= names


def test_the_same_command_again_runs_nothing(swept):
    storage, *_ = swept
    before = {path: path.stat().st_mtime_ns for path in storage.glob("trials/*/record.json")}
    code, output = launch(storage, "-m", "method=rtn,gptq", "bits=2,4", "evaluation.floor=true")
    assert code == 0, output
    assert "done already" in output
    assert {
        path: path.stat().st_mtime_ns for path in storage.glob("trials/*/record.json")
    } == before
    parents, children = runs(storage)
    assert (len(parents), len(children)) == (1, 6)


def test_another_evaluation_says_when_it_has_to_quantize_again(swept):
    storage, *_ = swept
    shutil.rmtree(storage / "trials/blocks")
    code, output = launch(
        storage, "-m", "method=rtn,gptq", "bits=2,4", "evaluation.drift=false", "plan=true"
    )
    assert code == 0, output
    assert "4 trials repeat the quantization of finished trials" in output
    assert "keep=blocks" in output


def test_equal_jobs_run_once_and_incompatible_pairs_are_counted(tmp_path):
    code, output = launch(tmp_path, "-m", "method=none,rtn", "bits=1,8", "keep=none", "plan=true")
    assert code == 0, output
    assert "Quantized blocks stay" not in output
    assert "1 of 4 combinations left out: method=rtn cannot do bits=1" in output
    assert "2 to run on this machine" in output  # none at 1 and at 8 bits are one trial


@pytest.mark.slow
def test_a_saved_study_runs_with_another_launcher_too(tmp_path):
    """Hydra's own launcher runs each job in this process, with the study's choice in its config."""
    words = ["+study=tensors", "bits=4", 'skip=["*.q_proj"]', "name=mine", "method=rtn"]
    code, output = launch(tmp_path, "-m", *words, "hydra/launcher=basic")
    assert code == 0, output
    assert set(records(tmp_path)) == {"rtn4", "none"}


@pytest.mark.slow
def test_a_trial_that_fails_costs_no_other_and_the_exit_code_says_so(tmp_path):
    """With a NaN in its model's weights, one trial fails with its error; the other is done."""
    import torch
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(ROOT / "q3q/models/demo/dense", broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(weights, broken / "model.safetensors")
    path = f"model.path='{broken}','{ROOT}/q3q/models/demo/dense'"
    alone = ("evaluation.baseline=false", "evaluation.drift=false")
    code, output = launch(tmp_path, "-m", "model=local", path, "method=rtn", "bits=4", *alone)
    assert code == 1, output
    assert "blocks.1.mlp.up_proj" in output
    assert "1 of 2 trials failed" in output
    assert sorted(record["status"] for record in _all(tmp_path)) == ["COMPLETED", "FAILED"]
    failed = next(record for record in _all(tmp_path) if record["status"] == "FAILED")
    assert "not finite" in failed["reason"]
    _, children = runs(tmp_path)
    assert sorted(child.info.status for child in children) == ["FAILED", "FINISHED"]


def _all(storage: Path) -> list[dict]:
    paths = [*storage.glob("trials/*/record.json"), *storage.glob("trials/*/failed.json")]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_finished_and_the_same_command_goes_on(tmp_path):
    command = ("-m", "method=gptq", "bits=2,3,4,5,6,8", "evaluation.baseline=false")
    process = start(tmp_path, *command)
    deadline = time.monotonic() + 120
    while len(_all(tmp_path)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130, output
    assert "the same command continues" in output
    assert "Traceback" not in output
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("trials/*/record.json")}
    assert 2 <= len(kept) < 6
    assert not working(process.pid)
    code, output = launch(tmp_path, *command)
    assert code == 0, output
    assert len(_all(tmp_path)) == 6
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    parents, children = runs(tmp_path)
    assert (len(parents), len(children)) == (1, 6)


def test_one_trial_without_a_sweep(tmp_path):
    code, output = launch(tmp_path, "method=rtn", "bits=3")
    assert code == 0, output
    assert set(records(tmp_path)) == {"rtn3"}
    assert "Nothing to compare with yet: run the same command with method=none once" in output
    parents, children = runs(tmp_path)
    assert (len(parents), len(children)) == (1, 1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("method=gtpq",), "method=gtpq is not known; did you mean gptq?"),
        (("-m", "model=demo,demmo"), "model=demmo is not known; did you mean demo"),
        (("bits=four",), "bits=four is not a number: give whole bits"),
        (("-m", "bits=2,9"), "bits=9 is out of range"),
        (("bits=2", "bits=3"), "contradict each other"),
        (("-m", "bits=2", "bits=3"), "contradict each other"),
        (("model=qwen3_0_6b",), "model=local model.path=DIR"),
        (("-m", "method=rtn,gptq", "bits=1"), "cannot do bits=1"),
        (("track.uri=http://127.0.0.1:9",), "http://127.0.0.1:9"),
        (("+bitz=3",), "bitz is not a setting; did you mean bits"),
        (("bits=2,3",), "several values need -m: python launch.py -m bits=2,3 "),
        (("track.uri=htp://x", "plan=true"), "track.uri=htp://x: give sqlite:///FILE"),
        (("method.act_order=false",), "method=rtn does not have the setting act_order, but gptq"),
        (("name='a\nb'",), "has a character that cannot be printed"),
        (("evaluation=mmlu",), "mmlu is a task: python launch.py evaluation=tasks 'evaluation."),
        (("method=GPTQ",), "method=GPTQ is not known; did you mean gptq?"),
        (("method=all",), "for every method: python launch.py -m 'method=glob(*)'"),
        (("+study=nosuch", "-m"), "study=nosuch is not known. Choose from: budget, calibration"),
    ],
)
def test_bad_input_gets_one_line_and_exit_code_2(arguments, words, tmp_path):
    code, output = launch(tmp_path, *arguments)
    assert code == 2, output
    assert words in output
    assert "Traceback" not in output
    assert len(output.strip().splitlines()) == 1
    assert not list(tmp_path.glob("trials/*/record.json"))
    assert not (tmp_path / "mlflow.db").exists()


def test_a_setting_of_one_method_is_for_its_trials_alone(tmp_path):
    def planned(*arguments):
        code, output = launch(tmp_path, *arguments, "plan=true")
        assert code == 0, output
        lines = [line.split() for line in output.splitlines() if " resident " in line]
        return {" ".join(words[1:3]): words[0] for words in lines}

    together = planned("-m", "method=gptq,awq", "method.gptq.damping=0.05", "bits=2")
    assert together["gptq w2"] == planned("method=gptq", "method.damping=0.05", "bits=2")["gptq w2"]
    assert together["awq w2"] == planned("method=awq", "bits=2")["awq w2"]


def test_plan_starts_nothing(tmp_path):
    code, output = launch(tmp_path, "-m", "method=gptq,awq", "bits=2,3", "plan=true")
    assert code == 0, output
    assert output.count(" resident ") == 5
    assert "5 to run on this machine" in output
    blocks = tmp_path / "trials/blocks"
    assert f"Quantized blocks stay in {blocks} for later evaluations: at most" in output
    assert output.index("none ") < output.index("gptq w2")  # what all are compared with runs first
    assert not (tmp_path / "mlflow.db").exists()
    assert not list(tmp_path.glob("trials/*/spec.json"))
