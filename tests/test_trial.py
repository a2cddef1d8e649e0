"""Whole trials on the demo models: the order of methods and bits, what a record holds, going on after a kill."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from q3q import config as schema
from q3q.record import TrialRecord, blocks_folder, kept_blocks_folder, trial_folder
from q3q.trial import attempt_trial, run_trial

ROOT = Path(__file__).parent.parent
SMALL = ["evaluation.tasks=[]", "evaluation.texts=[demo]", "evaluation.limit=16", "calibration.samples=8"]


@pytest.fixture(scope="module")
def spec_of(tmp_path_factory):
    storage = tmp_path_factory.mktemp("storage")
    schema.register()
    GlobalHydra.instance().clear()

    def make(*overrides):
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            return schema.spec_from(compose("config", [*SMALL, f"storage={storage}", *overrides]))

    return make


@pytest.fixture(scope="module")
def run(spec_of):
    records = {}

    def get(*overrides) -> TrialRecord:
        if overrides not in records:
            records[overrides] = run_trial(spec_of(*overrides))
        return records[overrides]

    return get


def loss(record: TrialRecord) -> float:
    return math.log(record.metrics["perplexity/stories"])


@pytest.mark.parametrize("model", ["demo", "demo_moe"])
@pytest.mark.parametrize(("method", "hurt"), [("rtn", 0.1), ("gptq", 0.01), ("awq", 0.05)])
def test_perplexity_falls_with_bits_and_8_bits_are_nearly_lossless(run, model, method, hurt):
    none = loss(run(f"model={model}", "method=none"))
    losses = [loss(run(f"model={model}", f"method={method}", f"bits={bits}")) for bits in (2, 3, 8)]
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > none + hurt  # 2 bits hurt
    assert abs(losses[-1] - none) < 0.005


@pytest.mark.parametrize("model", ["demo", "demo_moe"])
def test_gptq_and_awq_beat_rounding_at_3_bits(run, model):
    rtn, gptq, awq = (loss(run(f"model={model}", f"method={name}", "bits=3")) for name in ("rtn", "gptq", "awq"))
    assert gptq < rtn
    assert awq < rtn


def test_the_record_holds_what_it_promises(run, spec_of):
    record = run("model=demo", "method=gptq", "bits=3")
    assert record.completed
    assert {check.name for check in record.checks if check.passed} == {check.name for check in record.checks}
    assert len(record.checks) == 4
    assert len(record.sites) == 6 * 7
    assert all(0 < site.output_error < 1 and 0 < site.weight_error < 1 for site in record.sites)
    for phase in ("load", "calibrate", "quantize", "evaluate"):
        assert record.metrics[f"seconds/{phase}"] > 0
        assert record.metrics[f"peak_bytes/{phase}"] > 1e7
    low, high = record.intervals["perplexity/stories"]
    assert low < record.metrics["perplexity/stories"] < high
    assert record.environment["packages"]["torch"]
    assert record.environment["hardware"]["cores"] == os.cpu_count()
    assert TrialRecord.load(trial_folder(record.spec) / "record.json") == record


def test_bits_per_weight_counts_scales_and_zero_points(run):
    metrics = run("model=demo", "method=rtn", "bits=4").metrics
    assert metrics["bits_per_weight"] == pytest.approx(4 + (16 + 4) / 128)
    linears = 6 * (256 * 384 + 2 * 256 * 192 + 384 * 256 + 3 * 256 * 640)
    norms = 6 * (2 * 256 + 2 * 64) + 256
    whole = linears + norms + 4096 * 256
    assert metrics["share_quantized"] == pytest.approx(linears / whole)
    bits = linears * metrics["bits_per_weight"] + (whole - linears) * 16
    assert metrics["bits_per_weight_model"] == pytest.approx(bits / whole)
    assert metrics["model_bytes"] == pytest.approx(bits / 8)
    assert run("model=demo", "method=none").metrics["bits_per_weight_model"] == 16


def test_quantized_activations_cost_more_than_weights_alone(run):
    plain, rounded = (run("model=demo", "method=rtn", "bits=8", f"act_bits={act}") for act in ("null", "4"))
    assert loss(rounded) > loss(plain) + 0.01


def test_an_error_becomes_a_failed_record_that_says_why(spec_of, monkeypatch):
    spec = spec_of("model=demo", "method=rtn", "bits=5")
    monkeypatch.setattr("q3q.trial.load_decoder", lambda *_: 1 / 0)
    record = attempt_trial(spec)
    assert record.status == "FAILED"
    assert record.reason == "ZeroDivisionError: division by zero"
    assert "load_decoder" in record.environment["traceback"]
    assert json.loads((trial_folder(spec) / "failed.json").read_text())["status"] == "FAILED"
    assert not (trial_folder(spec) / "record.json").exists()


def test_weights_that_are_not_the_codes_fail_the_trial(spec_of, monkeypatch):
    """Something between quantizing and evaluating changed the model: the numbers must not count."""
    from q3q import trial

    plain = trial.set_activations

    def tamper(model, spec):
        plain(model, spec)
        model.blocks[2].weights["mlp.up_proj.weight"] = model.blocks[2].weights["mlp.up_proj.weight"] * 1.01

    monkeypatch.setattr(trial, "set_activations", tamper)
    record = run_trial(spec_of("model=demo", "method=rtn", "bits=6"))
    assert record.status == "FAILED"
    assert "blocks.2.mlp.up_proj" in record.reason


def test_a_trial_killed_by_sigkill_goes_on_at_its_block_and_ends_with_the_same_bits(spec_of, run, tmp_path):
    """A real process, killed between blocks; the second one takes the finished blocks and gets the same numbers."""
    reference = run("model=demo", "method=gptq", "bits=3", "calibration.samples=24")
    spec = spec_of("model=demo", "method=gptq", "bits=3", "calibration.samples=24")
    spec = spec.with_places({**spec.places, "trials": str(tmp_path)})
    code = """
import json, sys
from q3q.spec import TrialSpec
from q3q.trial import run_trial
run_trial(TrialSpec.from_json(json.load(open(sys.argv[1]))), lambda event: print(event.phase, event.done, flush=True))
"""
    path = tmp_path / "given.json"
    path.write_text(json.dumps(spec.to_json()), encoding="utf-8")
    process = subprocess.Popen([sys.executable, "-c", code, str(path)], cwd=ROOT, text=True, stdout=subprocess.PIPE)
    for line in process.stdout:
        if line.split() == ["quantize", "2"]:
            os.kill(process.pid, signal.SIGKILL)
            break
    assert process.wait(timeout=30) == -signal.SIGKILL
    blocks = sorted(blocks_folder(spec).glob("*.json"))
    assert 2 <= len(blocks) < 6
    untouched = [block.stat().st_mtime_ns for block in blocks[:2]]
    time.sleep(0.01)
    resumed = run_trial(spec.with_places({**spec.places, "keep": "blocks"}))
    kept = [kept_blocks_folder(spec) / block.name for block in blocks[:2]]
    assert [block.stat().st_mtime_ns for block in kept] == untouched
    assert resumed.notes["blocks_from_disk"] == len(blocks)
    assert resumed.metrics["perplexity/stories"] == reference.metrics["perplexity/stories"]
    assert resumed.sites == reference.sites
    # keep=blocks: another evaluation of the same quantization computes no block, and reads no calibration text.
    again = spec_of("model=demo", "method=gptq", "bits=3", "calibration.samples=24", "evaluation.limit=3")
    found = run_trial(again.with_places(spec.places))
    assert found.notes["blocks_from_disk"] == 6
    assert found.sites == reference.sites
