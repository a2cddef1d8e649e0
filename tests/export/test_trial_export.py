"""A trial that exports: stopped, resumed, proved, published, and evaluated again."""

import re
import shutil
from functools import partial

import pytest
from safetensors.torch import load_file, save_file

from q3q import trial as trial_module
from q3q.attempt import finished_record
from q3q.errors import CheckpointError
from q3q.evaluate import measure
from q3q.export import proof, publish
from q3q.export.destination import partial_path
from q3q.export.measured import UNMEASURED
from q3q.export.proof import PASSED, Proof
from q3q.record import Check
from q3q.sweep.earlier import damaged_exports
from q3q.trial import attempt_trial, run_trial
from tests.composed import composed_trial
from tests.reloading import reload_here

SMALL = [
    "evaluation.tasks=[]",
    "evaluation.texts=[demo]",
    "evaluation.limit=2",
    "calibration.samples=2",
]


@pytest.fixture
def demo_trial_of(tmp_path):
    return partial(composed_trial, *SMALL, f"storage={tmp_path}/s")


@pytest.fixture
def trial_of(demo_trial_of, tiny):
    """Of a model of three blocks, each a file of the checkpoint; the fourth has the ends."""
    words = ["model=local", f"model.path={tiny}", "group_size=32"]
    return partial(demo_trial_of, *words, "evaluation.window=64", "calibration.length=64")


@pytest.fixture
def reloaded(monkeypatch):
    """Run the script in this process, which saves the start-up time of another."""
    monkeypatch.setattr(proof, "_reload", reload_here)


NVFP4_INPUTS = ["act_format=nvfp4", "act_scales=calibrated"]


class StoppedError(Exception):
    pass


@pytest.mark.slow
def test_a_trial_that_was_stopped_exports_what_it_evaluated(demo_trial_of, tmp_path):
    trial = demo_trial_of("method=gptq", "export=gptq", f"export.path={tmp_path}/out")

    def stop(event):
        if event.phase == "quantize" and event.done == 2:
            raise StoppedError

    with pytest.raises(StoppedError):
        run_trial(trial, stop)
    assert not (tmp_path / "out").exists()
    shards = sorted((tmp_path / "out.partial").glob("*.safetensors"))
    assert len(shards) == 2
    before = [shard.stat().st_mtime_ns for shard in shards]

    record = run_trial(trial)
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
    assert record.notes["stored"] == {"dtype": "bfloat16", "in_files": True}
    assert "use" not in export  # nothing public loads the format here
    files = [path.stat().st_size for path in (tmp_path / "out").iterdir()]
    assert export["disk_bytes"] == sum(files) > record.metrics["export_bytes"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"| perplexity, stories | {record.metrics['perplexity/stories']:.4g} (" in card

    again = run_trial(demo_trial_of("model=local", f"model.path={tmp_path}/out", "method=none"))
    same = pytest.approx(
        record.metrics["perplexity/stories"], rel=1e-6
    )  # sums depend on where in memory weights lie
    assert again.metrics["perplexity/stories"] == same
    for metric in ("bits_per_weight", "bits_per_weight_model", "model_bytes"):
        assert again.metrics[metric] == pytest.approx(record.metrics[metric])
    assert again.notes["stored"]["quantized"] == "gptq"
    with pytest.raises(CheckpointError, match=r"quantized already \(gptq\).*method=none"):
        demo_trial_of("model=local", f"model.path={tmp_path}/out", "method=rtn")

    assert finished_record(trial) is not None
    (tmp_path / "out").rename(tmp_path / "moved")
    assert finished_record(trial) is None  # the export is missing


WRONG = Check(name=PASSED, passed=False, detail="worst site blocks.1.mlp.up_proj")


def test_a_checkpoint_that_is_not_what_was_evaluated_fails_the_trial_and_is_gone(
    trial_of, tmp_path, monkeypatch, reloaded
):
    """But not the blocks and measurements, which are sound: the same command exports them again."""
    trial, how = trial_of("method=rtn", "export=hf", f"export.path={tmp_path}/out"), proof.prove
    monkeypatch.setattr(publish, "prove", lambda folder, model, gpu: Proof(WRONG))
    record = run_trial(trial)
    assert not record.completed
    assert "worst site blocks.1.mlp.up_proj" in record.reason
    assert not list(tmp_path.glob("out*"))
    assert len(list(trial.kept_blocks_folder.glob("*.safetensors"))) == 3
    measured = record.metrics["perplexity/stories"]

    monkeypatch.setattr(publish, "prove", how)
    monkeypatch.setattr(
        measure, "_measure_text", lambda *given: pytest.fail("it is measured already")
    )
    record = run_trial(trial)
    assert record.completed, record.reason
    assert record.notes["blocks_from_disk"] == 3
    assert record.metrics["perplexity/stories"] == measured
    assert not trial.blocks_folder.exists()


def test_codes_that_fail_a_check_of_their_own_do_not_stay(trial_of, tmp_path, monkeypatch):
    monkeypatch.setattr(
        trial_module,
        "check_weights",
        lambda *args, **kwargs: [Check(name="codes", passed=False, detail="bad")],
    )
    trial = trial_of("method=rtn", "export=hf", f"export.path={tmp_path}/out")
    assert not run_trial(trial).completed
    assert not trial.kept_blocks_folder.exists()
    assert not list(tmp_path.glob("out*"))


def test_a_proved_checkpoint_outlives_another_run_that_comes_to_other_codes(
    trial_of, tmp_path, monkeypatch, reloaded
):
    """With another storage, on another processor: last digits differ, and the path is the same."""
    trial = trial_of("method=rtn", "export=hf", f"export.path={tmp_path}/out")
    assert run_trial(trial).completed
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    shutil.rmtree(tmp_path / "s")
    monkeypatch.setattr(publish, "prove", lambda folder, model, gpu: Proof(WRONG))
    record = run_trial(trial)
    assert not record.completed
    assert (
        f"{tmp_path}/out was exported by another run, of other codes (worst site" in record.reason
    )
    assert "give fresh=true or another export.path" in record.reason
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


def test_what_could_not_be_proved_stays_and_the_same_command_goes_on(
    trial_of, tmp_path, monkeypatch, reloaded
):
    trial = trial_of("method=gptq", "export=gptq", f"export.path={tmp_path}/out")
    how = proof._reload

    def killed(folder, inputs, out, seconds, gpu):
        raise proof._not_proved(folder, "the process that loads it was ended by signal 9")

    monkeypatch.setattr(proof, "_reload", killed)
    record = attempt_trial(trial)
    assert not record.completed
    assert "is written but not proved: " in record.reason
    assert not (tmp_path / "out").exists()
    blocks = sorted(trial.kept_blocks_folder.glob("*.safetensors"))
    shards = sorted(partial_path(tmp_path / "out").glob("model-0000[1-3]*.safetensors"))
    assert len(blocks) == len(shards) == 3
    before = [path.stat().st_mtime_ns for path in shards]

    monkeypatch.setattr(proof, "_reload", how)
    record = attempt_trial(trial)
    assert record.completed, record.reason
    assert record.notes["blocks_from_disk"] == 3
    assert [(tmp_path / "out" / shard.name).stat().st_mtime_ns for shard in shards] == before


def test_an_export_that_was_damaged_since_is_made_again_by_the_same_command(
    trial_of, tmp_path, reloaded
):
    trial = trial_of("method=rtn", "export=hf", f"export.path={tmp_path}/out")
    record = attempt_trial(trial)
    assert record.completed, record.reason
    assert list(damaged_exports([trial])) == []
    out = tmp_path / "out"
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.name != "README.md"}
    shard = out / "model-00002-of-00004.safetensors"
    shard.write_bytes(shard.read_bytes()[:1000])

    trial = trial_of("method=rtn", "export=hf", f"export.path={tmp_path}/out")  # not refused
    assert finished_record(trial) is None
    [line] = damaged_exports([trial])
    assert line == (
        f"The export of {trial.spec.label} is made again: {out}: {shard.name} has 1000 bytes "
        f"instead of {len(before[shard.name])}."
    )
    again = attempt_trial(trial)
    assert again.completed, again.reason
    assert {name: (out / name).read_bytes() for name in before} == before
    same = again.notes["export"]["sha256"], again.metrics["perplexity/stories"]
    assert same == (record.notes["export"]["sha256"], record.metrics["perplexity/stories"])
    assert finished_record(trial) is not None
    # Drift's baseline is the unquantized model's measurement: the card has it beside its own.
    card = (out / "README.md").read_text()
    assert UNMEASURED not in card
    number = r"[\d.e+]+"
    assert re.search(
        rf"\| perplexity, stories \| {number} \(.*\) \| {number} \| [+-][\d.]+ % \|", card
    )


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_model_with_a_block_that_adds_nothing_is_exported(
    trial_of, tiny, tmp_path, reloaded, method
):
    """As depth expansion and pruning leave them; GPTQ observes that block's zeros, too."""
    folder = tmp_path / "expanded"
    shutil.copytree(tiny, folder)
    tensors = load_file(folder / "model.safetensors")
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        tensors[f"model.layers.2.{name}.weight"].zero_()
    save_file(tensors, folder / "model.safetensors")
    model = ["model=local", f"model.path={folder}", "symmetric=true"]
    record = run_trial(trial_of(*model, f"method={method}", f"export={method}"))
    assert record.completed, record.reason
    assert record.notes["export"]["logit_error"] < 1e-4
    zeros = [site for site in record.sites if site.block == 2 and site.linear.endswith("o_proj")]
    assert [(site.weight_error, site.output_error) for site in zeros] == [(0.0, 0.0)]


def test_plain_numbers_are_known_to_be_quantized_wherever_they_are(trial_of, tmp_path, reloaded):
    record = run_trial(trial_of("method=billm", "export=hf", f"export.path={tmp_path}/out"))
    assert record.completed, record.reason
    (
        tmp_path / "out" / "q3q.json"
    ).unlink()  # a copy from a hub may have the model's own files alone
    (tmp_path / "out").rename(tmp_path / "copy")
    again = run_trial(trial_of("model=local", f"model.path={tmp_path}/copy", "method=none"))
    same = pytest.approx(
        record.metrics["perplexity/stories"], rel=1e-6
    )  # sums depend on where in memory weights lie
    assert again.metrics["perplexity/stories"] == same
    with pytest.raises(CheckpointError, match=r"quantized already \(by q3q: billm w1 g32"):
        trial_of("model=local", f"model.path={tmp_path}/copy", "method=rtn")


@pytest.mark.slow
@pytest.mark.parametrize("model", ["demo", "demo_moe"])
@pytest.mark.parametrize(
    "settings",
    [
        ["export=hf", "method=rtn"],
        ["export=gptq", "method=rtn", "bits=3"],
        ["export=awq", "method=rtn", "group_size=64"],
        ["export=compressed_tensors", "method=rtn", "format=nvfp4", *NVFP4_INPUTS],
        ["export=compressed_tensors", "method=rtn", "format=fp8_e4m3", "act_format=fp8_e4m3"],
        ["export=compressed_tensors", "method=rtn", "format=mxfp4"],
        ["export=gguf", "method=gptq", "format=q4_k"],
        ["export=compressed_tensors", "method=smoothquant"],
        ["export=compressed_tensors", "method=smoothquant", "skip=[blocks.1.gate_up,*.o]"],
    ],
)
def test_evaluated_again_an_export_has_the_same_perplexity(
    demo_trial_of, tmp_path, reloaded, model, settings
):
    if model == "demo_moe" and "skip" in settings[-1]:
        pytest.skip("refused: loaders fuse experts")
    record = run_trial(demo_trial_of(f"model={model}", *settings, f"export.path={tmp_path}/out"))
    assert record.completed, record.reason
    assert record.notes["export"]["logit_error"] < 1e-4
    path = tmp_path / "out" / ("model.gguf" if "export=gguf" in settings else "")
    again = run_trial(demo_trial_of("model=local", f"model.path={path}", "method=none"))
    same = pytest.approx(
        record.metrics["perplexity/stories"], rel=1e-6
    )  # sums depend on where in memory weights lie
    assert again.metrics["perplexity/stories"] == same
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"python launch.py model={model} " in card
    assert "and the same logits." in card
