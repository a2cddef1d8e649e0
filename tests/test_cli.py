"""The command without -m runs one trial in this process; a mistake gets a line and an exit code."""

import json
from types import SimpleNamespace

import pytest
import torch

from q3q.models.footprint import PROCESS_BYTES
from q3q.models.loading import keep_to_share
from tests.chaos.faults import SMALL, records
from tests.commands import python


def command(*arguments, **environment):
    done = python(*arguments, **environment)
    return done.returncode, done.stdout, done.stderr


def launch(storage, model, *arguments, **environment):
    return command(
        "launch.py", *arguments, *SMALL, f"model.path={model}", f"storage={storage}", **environment
    )


@pytest.mark.slow
def test_a_trial_alone_keeps_to_its_share_and_goes_on_where_its_storage_was_moved(tiny, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    asked = ("method=rtn", "cluster.cpus_per_trial=1")
    code, _, errors = launch(first, tiny, "bits=3", *asked, OMP_NUM_THREADS="2")
    assert code == 0, errors
    [record] = records(first).values()
    share, planned = record["spec"]["places"]["share"], record["environment"]["planned"]
    assert share == {
        "gpus": 0,
        "loader": "resident",
        "memory": record["environment"]["loading"]["memory"],
    }
    assert record["environment"]["loading"]["needs"] == planned["memory"] <= share["memory"]
    assert record["environment"]["hardware"]["threads"] == planned["cpus"] == 1
    first.rename(second)
    code, _, errors = launch(second, tiny, "bits=4", *asked)
    assert code == 0, errors
    assert (second / "mlflow.db.moved").is_file()
    code, told, errors = command("-m", "q3q.track", "sync", "--storage", str(second))
    assert code == 0, errors
    assert told.count("1 of 1 trials are in experiment") == 2
    assert not first.exists()
    assert len(records(second)) == 2


@pytest.mark.parametrize("how", [(), ("-m",)])
def test_a_storage_that_is_a_file_is_said_in_a_line(tiny, tmp_path, how):
    (tmp_path / "file").write_text("no folder")
    code, _, errors = launch(tmp_path / "file", tiny, *how, "method=rtn", "bits=3")
    line = errors.splitlines()[-1]
    assert code == 2
    assert "Traceback" not in errors
    assert line.startswith(f"q3q: {tmp_path / 'file'}")
    assert "Not a directory. storage= must be a folder" in line


def test_a_storage_that_cannot_be_made_is_said_in_a_line():
    for how in ([], ["-m"]):
        code, _, errors = command("launch.py", *how, "storage=/proc/q3q", "method=none")
        assert code == 2
        line = errors.splitlines()[-1]  # on a busy machine, others say how far composing is
        assert "Traceback" not in errors
        assert line.startswith("q3q: /proc/q3q: No such file or directory. storage= must be a ")


@pytest.mark.parametrize(
    "asked", ["cluster.ranks_per_trial=2", "cluster.gpus_per_trial=4", "cluster=existing"]
)
def test_what_takes_a_sweep_is_not_run_alone(tiny, tmp_path, asked):
    code, _, errors = launch(tmp_path, tiny, "method=rtn", "bits=3", asked)
    [line] = errors.splitlines()
    assert code == 2
    assert line.startswith(f"q3q: {asked} is for sweeps")
    assert "python launch.py -m " in line
    assert not records(tmp_path)


@pytest.mark.slow
def test_a_trial_that_was_planned_on_a_gpu_fails_clearly_where_there_is_none(tiny, tmp_path):
    code, _, errors = launch(tmp_path, tiny, "method=rtn", "bits=3")
    assert code == 0, errors
    folder = next(tmp_path.glob("trials/*/record.json")).parent
    spec = json.loads((folder / "spec.json").read_text())
    (folder / "record.json").unlink()
    share = {"gpus": 0.5, "loader": "resident", "memory": 10**9}
    run = (
        "import json, sys; from q3q.placement import Trial; from q3q.trial import attempt_trial\n"
        "record = attempt_trial(Trial.from_json(json.loads(sys.argv[1])))\n"
        "print(record.status, record.reason)"
    )
    given = json.dumps({**spec, "places": {**spec["places"], "share": share}})
    code, said, errors = command("-c", run, given, CUDA_VISIBLE_DEVICES="")
    assert code == 0, errors
    assert said.startswith("FAILED this trial was planned on a GPU, and torch on ")
    assert "cluster.gpus_per_trial=0" in said


def test_a_share_of_a_gpu_bounds_what_torch_allocates(monkeypatch):
    told: list[float] = []
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * 10**9)
    )
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", told.append)
    keep_to_share(0.25)
    assert 4 * (told[0] * 80e9 + PROCESS_BYTES["cuda"]) == pytest.approx(
        80e9
    )  # four of them, and what else they take


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_more_than_the_share_of_a_real_gpu_is_out_of_memory():
    run = (
        "import torch; from q3q.models.loading import keep_to_share; keep_to_share(0.25)\n"
        "total = torch.cuda.get_device_properties(0).total_memory\n"
        "small = torch.empty(total // 8, dtype=torch.uint8, device='cuda')\n"
        "try: torch.empty(total // 4, dtype=torch.uint8, device='cuda')\n"
        "except torch.OutOfMemoryError as error: print(error)\n"
    )
    code, told, errors = command("-c", run)
    assert code == 0, errors
    assert "out of memory" in told
