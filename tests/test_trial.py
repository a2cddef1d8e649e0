"""Whole trials on the demo models: order of methods and bits, records, resuming after a kill."""

import json
import math
import os
import re
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial

import pytest
import torch

from q3q.attempt import LOG, afresh
from q3q.evaluate.journal import Journal
from q3q.evaluate.samples import SAMPLES, read_samples
from q3q.models.adjust import set_activations
from q3q.quantize.walk import quantized_blocks
from q3q.record import Sweep, TrialRecord
from q3q.storage.block_cache import BlockCache
from q3q.storage.claim import claimed
from q3q.sweep.study import Study
from q3q.trial import attempt_trial, run_trial
from tests.composed import composed_trial
from tests.trackers import MemoryTracker

SMALL = [
    "evaluation.tasks=[]",
    "evaluation.texts=[demo]",
    "evaluation.limit=16",
    "calibration.samples=8",
]


@pytest.fixture(scope="module")
def trial_of(tmp_path_factory):
    storage = tmp_path_factory.mktemp("storage")
    return partial(composed_trial, *SMALL, f"storage={storage}")


@pytest.fixture(scope="module")
def run(trial_of):
    records = {}

    def get(*overrides) -> TrialRecord:
        if overrides not in records:
            records[overrides] = run_trial(trial_of(*overrides))
        return records[overrides]

    return get


@pytest.fixture
def tiny_trial_of(tiny, tmp_path):
    """Of a random model, where what is asked does not depend on what it learned."""
    words = ["model=local", f"model.path={tiny}", "group_size=32", "evaluation.window=64"]
    return partial(composed_trial, *SMALL, *words, f"storage={tmp_path}")


MODELS = ["demo", pytest.param("demo_moe", marks=pytest.mark.slow)]


def loss(record: TrialRecord) -> float:
    return math.log(record.metrics["perplexity/stories"])


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_gptq_and_awq_beat_rounding_at_3_bits(run, model):
    rtn, gptq, awq = (
        loss(run(f"model={model}", f"method={name}", "bits=3")) for name in ("rtn", "gptq", "awq")
    )
    assert gptq < rtn
    assert awq < rtn


def test_the_record_holds_what_it_promises(run, trial_of):
    record = run("model=demo", "method=gptq", "bits=3")
    assert record.completed
    assert {check.name for check in record.checks if check.passed} == {
        check.name for check in record.checks
    }
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
    assert TrialRecord.load(record.trial.folder / "record.json") == record


def test_drift_and_perplexity_come_from_one_pass_against_what_the_unquantized_model_said(run):
    none, two, eight = (
        run("model=demo", "method=none"),
        *(run("model=demo", "method=rtn", f"bits={bits}") for bits in (2, 8)),
    )
    assert 0 < eight.metrics["kl/stories"] < 1e-3
    assert 0.1 < two.metrics["kl/stories"] < two.metrics["kl_p99/stories"]
    assert two.metrics["top1_agreement/stories"] < 0.9
    assert 0.99 < eight.metrics["top1_agreement/stories"] < 1
    assert not [name for name in none.metrics if name.startswith(("kl", "top1"))]
    for record in (none, two, eight):
        rows = read_samples(record.trial.folder / SAMPLES, digest=record.files[SAMPLES])
        nlls = [row["scores"]["nll"] for row in rows]
        assert len(nlls) == 16
        assert record.metrics["perplexity/stories"] == pytest.approx(math.exp(sum(nlls) / 16))
    plain = run("model=demo", "method=rtn", "bits=8", "evaluation.drift=false")
    assert loss(plain) == pytest.approx(loss(eight), abs=1e-6)
    assert "kl/stories" not in plain.metrics
    # What was computed of the unquantized model is noted: a single trial shows it.
    said = [none.metrics["perplexity/stories"], *none.intervals["perplexity/stories"]]
    assert two.notes["unquantized"]["perplexity/stories"] == said
    assert "unquantized" not in none.notes | plain.notes


@pytest.mark.parametrize("dies", [False, True])
def test_a_trial_quantizes_while_another_computes_the_baseline_even_one_that_dies(
    tiny_trial_of, tmp_path, dies
):
    words = ("method=rtn", "bits=3", "keep=none", "evaluation.texts=[demo,library]")
    trial = tiny_trial_of(*words, "evaluation.limit=2")
    alone = run_trial(trial)
    [first, second] = sorted((tmp_path / "baselines").glob("*/"))
    holder, phases = ExitStack(), list[str]()
    for entry in (first, second):
        holder.enter_context(claimed(entry.parent, entry.name))
        entry.rename(tmp_path / entry.name)

    def report(event):
        phases.append(event.phase)
        if event.phase == "quantize" and event.done == event.total:
            for entry in () if dies else (first, second):
                (tmp_path / entry.name).rename(entry)
            holder.close()

    record = run_trial(afresh(trial, "now"), report)
    assert ("baseline" in phases[phases.index("quantize") :]) == dies  # else it only has to be read
    assert all(entry.is_dir() for entry in (first, second))
    assert measured(record) == measured(alone)


def measured(record):
    """Return what a record says that does not depend on when or how it was measured."""
    passing = ("seconds/", "peak_bytes/")
    metrics = {key: one for key, one in record.metrics.items() if not key.startswith(passing)}
    return metrics, record.intervals, record.notes


def test_the_unquantized_head_is_what_drift_is_measured_with(run):
    """Of a model whose head and embedding alone are rounded, the drift is theirs."""
    ends = run("model=demo", "method=rtn", "skip=[blocks.*]", "head_bits=3", "embedding_bits=3")
    assert ends.metrics["kl/stories"] > 0.01


def test_a_pair_of_trials_is_compared_when_both_are_there(run, trial_of):
    """The baseline may end last; a second look changes nothing and tells the tracker nothing."""
    none, two = run("model=demo", "method=none"), run("model=demo", "method=rtn", "bits=2")
    assert two.placement.baseline == none.spec.id
    tracker = MemoryTracker()
    notes: list[str] = []
    sweep = Sweep(id="s", name="s", command="c", config="", trials=(two.trial, none.trial))
    study = Study(sweep, two.placement.storage, tracker, notes.append)
    (none.trial.folder / "record.json").rename(none.trial.folder / "away.json")
    study.take(two)
    assert not study.records[two.spec.id].comparisons
    (none.trial.folder / "away.json").rename(none.trial.folder / "record.json")
    study.take(none)
    study._queue.settle()
    compared = tracker.records[two.spec.id].comparisons["perplexity/stories"]
    assert compared.difference == pytest.approx(loss(two) - loss(none))
    assert compared.distinguishable
    assert compared.low is not None
    assert compared.high is not None
    assert compared.difference is not None
    assert compared.low < compared.difference < compared.high
    assert TrialRecord.load(two.trial.folder / "record.json") == tracker.records[two.spec.id]
    damaged = none.trial.folder / SAMPLES
    kept = damaged.read_bytes()
    damaged.write_bytes(kept[:-9])
    study.take(two)
    assert "cannot be compared" in notes[-1]
    study._queue.settle()
    for record in (
        tracker.records[two.spec.id],
        TrialRecord.load(two.trial.folder / "record.json"),
    ):
        assert "samples.parquet cannot be read" in record.notes["not_compared"]
    damaged.write_bytes(kept)
    study.take(study.records[two.spec.id])
    assert "not_compared" not in study.records[two.spec.id].notes
    assert study.records[two.spec.id].comparisons["perplexity/stories"] == compared


def test_a_logit_that_is_not_finite_fails_the_trial_and_says_where(tiny_trial_of, monkeypatch):
    from q3q.evaluate import measure

    monkeypatch.setattr(measure, "window_losses", lambda *_: torch.tensor([1.0, torch.nan]))
    record = attempt_trial(tiny_trial_of("method=rtn", "bits=7", "evaluation.drift=false"))
    assert record.status == "FAILED"
    assert record.reason == "the model's logits in window 1 of stories are not finite"
    monkeypatch.setattr(measure, "window_losses", lambda *_: torch.tensor([1000.0, 1.0]).double())
    far_off = attempt_trial(tiny_trial_of("method=rtn", "bits=7", "evaluation.drift=false"))
    assert far_off.completed
    assert math.log(far_off.metrics["perplexity/stories"]) == pytest.approx(500.5)
    monkeypatch.setattr(measure, "window_losses", lambda *_: torch.tensor([2000.0, 1.0]).double())
    diverged = attempt_trial(afresh(far_off.trial, "once more"))
    assert diverged.completed
    assert diverged.diverged == ("perplexity/stories",)


def stop(event):
    if event.phase == "evaluate" and event.done > 3:
        raise KeyboardInterrupt


def test_an_evaluation_that_was_cut_off_goes_on_in_the_middle_of_a_task(tiny_trial_of):
    trial = tiny_trial_of("method=none", "evaluation.texts=[]", "evaluation.tasks=[stories_who]")
    with pytest.raises(KeyboardInterrupt):
        run_trial(trial, stop)
    told = []
    record = run_trial(trial, lambda event: told.append(event.done) if event.total > 1 else None)
    assert told[0] > 3  # scored already
    assert record.completed
    assert not (trial.folder / "evaluations").exists()
    told.clear()
    again = run_trial(trial, lambda event: told.append(event.done) if event.total > 1 else None)
    assert told[0] == 0  # its journal is gone: all is scored once more
    assert record.metrics["stories_who/acc"] == again.metrics["stories_who/acc"]
    assert record.intervals == again.intervals


@pytest.mark.parametrize("drift", ["true", "false"])
def test_an_evaluation_that_was_cut_off_goes_on_in_the_middle_of_a_text(tiny_trial_of, drift):
    wanted = ["method=rtn", "bits=6", "evaluation.window=256", f"evaluation.drift={drift}"]
    trial, told = tiny_trial_of(*wanted), []
    with pytest.raises(KeyboardInterrupt):
        run_trial(trial, stop)
    resumed = run_trial(
        trial,
        lambda event: (
            told.append(event.done) if event.phase == "evaluate" and event.total > 1 else None
        ),
    )
    assert told[0] > 3  # what was measured is not measured again
    assert told[-1] == 16
    whole = run_trial(trial)
    assert resumed.metrics["perplexity/stories"] == whole.metrics["perplexity/stories"]
    assert resumed.metrics.get("kl/stories") == whole.metrics.get("kl/stories")
    assert resumed.intervals == whole.intervals


def test_windows_of_another_text_of_the_same_name_are_not_taken_for_this_ones(tiny_trial_of):
    trial = tiny_trial_of("method=rtn", "bits=5", "evaluation.drift=false")
    with closing(
        Journal(trial.folder / "evaluations" / "windows_stories.jsonl", f"{trial.id} {'0' * 64}")
    ) as kept:
        kept.add([("0", 1.0)])
    remarks: list[str] = []
    record = attempt_trial(trial, lambda event: remarks.append(event.remark))
    assert record.completed
    assert any("holds scores of another model or text" in line for line in remarks)
    rows = read_samples(trial.folder / SAMPLES, digest=record.files[SAMPLES])
    assert 1.0 not in [row["scores"]["nll"] for row in rows]


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


MIXED = ["overrides={blocks.0:{bits:8},*.down:{bits:4,group_size:64}}", "skip=[blocks.5.o]"]


def test_mixed_settings_are_followed_counted_and_checked(run):
    ends = ["head_bits=8", "embedding_bits=8"]
    record = run("model=demo", "method=gptq", "bits=2", *MIXED, *ends)
    assert record.completed, record.reason
    assert loss(record) < loss(run("model=demo", "method=gptq", "bits=2"))
    assert len(record.sites) == 6 * 7 - 1
    assert ("o", 5) not in {(site.site, site.block) for site in record.sites}
    qkv, o, gate_up, down = 256 * (384 + 2 * 192), 384 * 256, 2 * 256 * 640, 640 * 256
    first = (qkv + o + gate_up) * (8 + (16 + 8) / 128)
    rest = (5 * (qkv + gate_up) + 4 * o) * (2 + (16 + 2) / 128)
    downs = 6 * down * (4 + (16 + 4) / 64)
    order = (
        32 * sum(640 if name == "down" else 384 if name == "o" else 256 for name in _linears())
        - 32 * 384
    )
    count = 6 * (qkv + o + gate_up + down) - o
    assert record.metrics["bits_per_weight"] == pytest.approx(
        (first + rest + downs + order) / count
    )
    norms, embedding = 6 * (2 * 256 + 2 * 64) + 256, 4096 * 256
    whole = 6 * (qkv + o + gate_up + down) + norms + embedding
    assert record.metrics["share_quantized"] == pytest.approx((count + embedding) / whole)
    bits = first + rest + downs + order + embedding * (8 + (16 + 8) / 128) + (norms + o) * 16
    assert record.metrics["bits_per_weight_model"] == pytest.approx(bits / whole)


def _linears():
    """Return each linear's site (demo model); act-order stores an index per column of each."""
    return 6 * ["qkv", "qkv", "qkv", "o", "gate_up", "gate_up", "down"]


@pytest.mark.parametrize(
    ("tampering", "named"),
    [
        (
            lambda model: setattr(model, "head_VH", model.head_VH * 1.01),
            "embedding|head, which is tied",
        ),
        (
            lambda model: setattr(model, "embedding_VH", model.embedding_VH.clone()),
            "head, which is tied",
        ),
        (lambda model: model.embedding_VH[7, 7].mul_(1.01), "embedding"),
    ],
)
def test_ends_that_are_not_their_codes_fail_the_trial(tiny_trial_of, monkeypatch, tampering, named):
    from q3q import trial as trial_module

    def tamper(model, spec, peaks):
        set_activations(model, spec, peaks)
        tampering(model)

    monkeypatch.setattr(trial_module, "set_activations", tamper)
    record = run_trial(
        tiny_trial_of(
            "method=rtn",
            "bits=7",
            "head_bits=8",
            "embedding_bits=8",
            "evaluation.texts=[]",
        )
    )
    assert record.status == "FAILED"
    assert re.search(named, record.reason)


def test_a_linear_that_was_to_be_left_out_and_was_not_fails_the_trial(tiny_trial_of, monkeypatch):
    from q3q import quantized

    monkeypatch.setattr(
        quantized,
        "quantized_blocks",
        lambda model, method, schemes, *rest: quantized_blocks(model, method, schemes.base, *rest),
    )
    record = run_trial(
        tiny_trial_of("method=rtn", "bits=7", "skip=[blocks.2.o]", "evaluation.texts=[]")
    )
    assert "blocks.2.self_attn.o_proj (which was to be left out)" in record.reason


def test_quantized_activations_cost_more_than_weights_alone(run):
    plain, rounded = (
        run("model=demo", "method=rtn", "bits=8", f"act_bits={act}") for act in ("null", "4")
    )
    assert loss(rounded) > loss(plain) + 0.01


def test_an_error_becomes_a_failed_record_that_says_why(tiny_trial_of, monkeypatch):
    trial = tiny_trial_of("method=rtn", "bits=5")
    monkeypatch.setattr("q3q.models.loading.load_decoder", lambda *_: 1 / 0)
    record = attempt_trial(trial)
    assert record.status == "FAILED"
    assert re.fullmatch(
        r"ZeroDivisionError at tests/test_trial\.py:\d+: division by zero; "
        rf"traceback: {trial.folder}/traceback\.txt",
        record.reason,
    )
    assert "load_decoder" in record.environment["traceback"]
    assert json.loads((trial.folder / "failed.json").read_text())["status"] == "FAILED"
    assert not (trial.folder / "record.json").exists()


def test_a_finished_trial_stays_finished_if_it_cannot_be_cleared(tiny_trial_of, monkeypatch):
    trial = tiny_trial_of("method=rtn", "bits=5")

    def refuse(cache, in_use):
        raise RuntimeError("connection refused")

    monkeypatch.setattr(BlockCache, "trim", refuse)
    assert attempt_trial(trial).completed
    assert attempt_trial(trial).completed  # it is done, and clears once more
    log = (trial.folder / LOG).read_text()
    assert log.count(" not cleared: RuntimeError: connection refused\n") == 2
    assert not (trial.folder / "failed.json").exists()


def test_weights_that_are_not_the_codes_fail_the_trial(tiny_trial_of, monkeypatch):
    """Something between quantizing and evaluating changed the model: the numbers must not count."""
    from q3q import trial as trial_module

    def tamper(model, spec, peaks):
        set_activations(model, spec, peaks)
        model.blocks[2].weights["mlp.up_proj.weight"] = (
            model.blocks[2].weights["mlp.up_proj.weight"] * 1.01
        )

    monkeypatch.setattr(trial_module, "set_activations", tamper)
    record = run_trial(tiny_trial_of("method=rtn", "bits=6"))
    assert record.status == "FAILED"
    assert "blocks.2.mlp.up_proj" in record.reason


def test_another_evaluation_of_kept_blocks_quantizes_nothing(run, trial_of):
    asked = ("model=demo", "method=rtn", "bits=3", "keep=blocks")
    reference = run(*asked, "evaluation.limit=2")
    kept = {path: path.stat().st_mtime_ns for path in reference.trial.kept_blocks_folder.iterdir()}
    again = trial_of(*asked, "evaluation.limit=3")
    found = run_trial(replace(again, placement=reference.placement))
    assert found.notes["blocks_from_disk"] == 6
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert found.sites == reference.sites
