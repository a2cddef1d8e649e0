"""A whole trial that exports: stopped, gone on, proved, published, evaluated again, and not quantized again."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from q3q import config as schema
from q3q import trial
from q3q.attempt import finished_record
from q3q.errors import CheckpointError
from q3q.export.proof import PASSED, Proof
from q3q.record import Check

ROOT = Path(__file__).parents[2]
SMALL = ["evaluation.tasks=[]", "evaluation.texts=[demo]", "evaluation.limit=2", "calibration.samples=2"]


@pytest.fixture
def spec_of(tmp_path):
    schema.register()
    GlobalHydra.instance().clear()

    def make(*overrides):
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            return schema.spec_from(compose("config", [*SMALL, f"storage={tmp_path}/s", *overrides]))

    return make


class StoppedError(Exception):
    pass


def test_a_trial_that_was_stopped_exports_what_it_evaluated(spec_of, tmp_path):
    spec = spec_of("method=gptq", "export=gptq", f"export.path={tmp_path}/out")

    def stop(event):
        if event.phase == "quantize" and event.done == 2:
            raise StoppedError

    with pytest.raises(StoppedError):
        trial.run_trial(spec, stop)
    assert not (tmp_path / "out").exists()
    shards = sorted((tmp_path / "out.partial").glob("*.safetensors"))
    assert len(shards) == 2
    before = [shard.stat().st_mtime_ns for shard in shards]

    record = trial.run_trial(spec)
    assert record.completed, record.reason
    assert PASSED in [check.name for check in record.checks]
    assert [(tmp_path / "out" / shard.name).stat().st_mtime_ns for shard in shards] == before
    assert not (tmp_path / "out.partial").exists()
    export = record.notes["export"]
    assert (export["format"], export["path"]) == ("gptq", str(tmp_path / "out"))
    assert "plain unpacker of `gptq`" in export["reloaded_by"]
    linears = 6 * (256 * 384 + 2 * 256 * 192 + 384 * 256 + 3 * 256 * 640)
    index = 32 * 6 * (5 * 256 + 384 + 640)  # a group number a column, of each linear
    assert record.metrics["bits_per_weight"] == pytest.approx(4 + (16 + 4) / 128 + index / linears)
    assert record.metrics["export_bytes"] == record.metrics["model_bytes"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| {record.metrics['perplexity/stories']:.6g} |" in card

    again = trial.run_trial(spec_of("model=local", f"model.path={tmp_path}/out", "method=none"))
    same = pytest.approx(record.metrics["perplexity/stories"], rel=1e-6)  # sums depend on where in memory weights lie
    assert again.metrics["perplexity/stories"] == same
    with pytest.raises(CheckpointError, match=r"quantized already \(gptq\).*method=none"):
        spec_of("model=local", f"model.path={tmp_path}/out", "method=rtn")

    assert finished_record(spec) is not None
    (tmp_path / "out").rename(tmp_path / "moved")
    assert finished_record(spec) is None  # what was asked for is not there


def test_a_checkpoint_that_is_not_what_was_evaluated_fails_the_trial_and_is_gone(spec_of, tmp_path, monkeypatch):
    failed = Check(name=PASSED, passed=False, detail="worst site blocks.1.mlp.up_proj")
    monkeypatch.setattr(trial, "prove", lambda folder, model, sketches: Proof(failed))
    record = trial.run_trial(spec_of("method=rtn", "export=hf", f"export.path={tmp_path}/out"))
    assert not record.completed
    assert "worst site blocks.1.mlp.up_proj" in record.reason
    assert not list(tmp_path.glob("out*"))


def test_plain_numbers_are_known_to_be_quantized_too(spec_of, tmp_path, monkeypatch):
    proof = Proof(Check(name=PASSED, passed=True, detail=""), "a test", 0.0)
    monkeypatch.setattr(trial, "prove", lambda folder, model, sketches: proof)
    record = trial.run_trial(spec_of("method=billm", "export=hf", f"export.path={tmp_path}/out"))
    assert record.completed, record.reason
    again = trial.run_trial(spec_of("model=local", f"model.path={tmp_path}/out", "method=none"))
    same = pytest.approx(record.metrics["perplexity/stories"], rel=1e-6)  # sums depend on where in memory weights lie
    assert again.metrics["perplexity/stories"] == same
    with pytest.raises(CheckpointError, match=r"quantized already \(by q3q: billm w1 g128"):
        spec_of("model=local", f"model.path={tmp_path}/out", "method=rtn")
