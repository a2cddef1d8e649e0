"""model=judge: published checkpoints beside the original that they were made of."""

import json
import shlex
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from q3q.config.arguments import understood
from q3q.config.command import command_of
from q3q.config.judged import original_job
from q3q.config.model import DEMO_MODELS
from q3q.config.noise_floor import floor_job, floor_of
from q3q.data.windows import evaluation_windows
from q3q.errors import CheckpointError, ConfigError, IncompatibleError
from q3q.evaluate.compare import compare
from q3q.export.gguf_vocabulary import vocabulary_of
from q3q.export.gguf_writing import tensors_of, write_model
from q3q.kv_scheme import KvScheme
from q3q.models.checkpoint import Checkpoint, load_tokenizer
from q3q.models.decoder import load_decoder
from q3q.models.likeness import compare_weights, note_of
from q3q.models.tensor_files import read_header
from q3q.numerics.divergence import kl_divergence
from q3q.placement import Trial
from q3q.record import JUDGED
from q3q.report.changes import UNTESTED
from q3q.report.divergences import NOISE, noise_floors
from q3q.report.judged import OVER_FLOOR, UNTOLD, benches, findings_of
from q3q.spec import MEAN_ACCURACY
from q3q.sweep.grid import unquantized
from q3q.trial import run_trial
from tests.commands import python
from tests.composed import composed_trial

DEMO = DEMO_MODELS / "dense"
WEIGHTS = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
INPUTS = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True, "symmetric": True}
DOWN = "model.layers.1.mlp.down_proj"


def fp8_copy(folder, change=lambda tensors, quantization: None, inputs=INPUTS):
    """Write the demo model with linears in fp8, a scale for each row, and return the folder."""
    shutil.copytree(DEMO, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors.pop(name).float()
        scale = weight.abs().amax(1, keepdim=True) / 448
        tensors[name] = (weight / scale).to(torch.float8_e4m3fn)
        tensors[f"{name}_scale"] = scale
    group = {"targets": ["Linear"], "weights": WEIGHTS, "input_activations": inputs}
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }
    change(tensors, quantization)
    save_file(tensors, folder / "model.safetensors")
    config["quantization_config"] = quantization
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    return fp8_copy(tmp_path_factory.mktemp("fp8") / "demo-FP8")


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """Returns the trial that judges a place."""
    storage = tmp_path_factory.mktemp("storage")
    words = ["evaluation.tasks=[]", "evaluation.texts=[library]", "evaluation.limit=8"]
    words += ["evaluation.window=64", "model=judge", "model.reference=demo", f"storage={storage}"]
    # In bfloat16, as the file says, sums of other batches round otherwise: 3e-5 nats.
    words += ["method=none", "model.dtype=float32"]

    def trial_of(place, *more):
        return composed_trial(*words, f"model.source={place}", *more)

    return trial_of


@pytest.fixture(scope="module")
def records(judge, fp8):
    """The records of the checkpoint, of the original and of its noise floor."""
    trial = judge(fp8)
    original = replace(trial.spec, model=trial.spec.reference, reference=None)
    floor = floor_of(trial)
    assert floor is not None
    placed = trial.placed(model=trial.placement.reference, baseline=None)
    return [run_trial(one) for one in (trial, replace(placed, spec=original), floor)]


def test_a_checkpoints_kl_is_that_of_its_files_beside_the_originals(judge, fp8, records):
    trial, [record, *_] = judge(fp8), records
    tokenizer = load_tokenizer(DEMO)
    windows = evaluation_windows(tokenizer, trial, trial.spec.evaluation.texts[0])
    logits = []
    for folder in (DEMO, fp8):
        model = load_decoder(Checkpoint(folder), torch.float32)
        rows = [
            part for ids in windows for _, part in model.logits(model.hidden(ids[None])[0, :-1])
        ]
        logits.append(torch.cat(rows))
    expected = float(kl_divergence(*logits).mean())
    # Equal bits on most processors; on others a sum's last bit may move an input to the next code.
    assert record.metrics["kl/library"] == pytest.approx(expected, abs=1e-6)
    assert expected > 1e-3  # inputs are rounded, too
    shares = [value for name, value in record.metrics.items() if name.startswith("share_conf")]
    assert sum(shares) == pytest.approx(1)
    assert record.notes[JUDGED]["format"] == "compressed-tensors, fp8 with inputs in fp8"
    assert findings_of(record) == []


def test_the_noise_floor_is_the_original_in_another_type(judge, fp8, records):
    trial = judge(fp8)
    floor, [_, _, measured] = floor_of(trial), records
    assert floor is not None
    assert (floor.spec.model.dtype, floor.spec.reference) == ("bfloat16", trial.spec.reference)
    assert 0 < measured.metrics["kl_floor/library"] < records[0].metrics["kl/library"]
    words = [f"model.source={fp8}", "model.reference=demo", "model=judge", "evaluation=demo"]
    assert original_job(words) == ["evaluation=demo", "model=demo"]
    assert composed_trial(*floor_job([*words, "kv_bits=2", "method=none"], floor)).id == floor.id
    assert judge("demo", "model.dtype=bfloat16").id == floor.id


@pytest.mark.parametrize("model", ["demo", "local"])
def test_the_floor_of_any_trial_is_its_model_beside_itself(tmp_path, model):
    words = ["method=rtn", "evaluation=demo", "evaluation.limit=2", "evaluation.window=64"]
    words += [f"storage={tmp_path}", "kv_bits=4", "bits=3"]
    words += ["model=demo"]
    if model == "local":
        words[-1:] = ["model=local", f"model.path={DEMO}", "model.name=mine", "dtype=bfloat16"]
    trial = composed_trial(*words)
    floor = floor_of(trial)
    assert floor is not None
    assert floor.spec.reference == trial.spec.model
    assert floor.spec.model.dtype != trial.spec.model.dtype
    assert not floor.spec.evaluation.tasks
    composed = composed_trial(*floor_job(unquantized(words), floor))
    assert composed.spec == floor.spec
    assert composed.placement.baseline is None
    record = run_trial(composed)
    floors = {name for name in record.metrics if name.startswith("kl_floor")}
    assert floors == {"kl_floor/stories", "kl_floor/library"}
    assert any(f"noise for {trial.spec.model.label}" in line for line in noise_floors([record]))
    # Another evaluation without KL has no floor.
    assert floor_of(composed_trial(*words, "evaluation.drift=false")) is None


def test_the_report_ranks_checkpoints_and_says_what_is_noise(records):
    candidate, _, floor = records
    kls = {name: 1e-7 for name in candidate.metrics if name.startswith("kl")}
    near = replace(
        candidate,
        spec=replace(candidate.spec, model=replace(candidate.spec.model, name="near", digest="n")),
        metrics=candidate.metrics | kls,
        intervals=candidate.intervals | {"kl/library": (9e-8, 1.1e-7)},
    )
    [bench] = benches([*records, near])
    assert [pool.label for pool in bench.candidates] == ["near", "demo-FP8"]
    verdict, *_ = bench.tables()
    place = verdict.columns.index(OVER_FLOOR)
    assert verdict.rows[0][place] == NOISE
    assert verdict.rows[1][place].endswith(" times")
    assert (
        verdict.rows[1][verdict.columns.index(UNTOLD)] == "none"
    )  # its interval and near's do not overlap
    assert "1. near" in bench.card()
    assert "noise floor" in verdict.rows[2][0]
    assert bench.sentence().startswith("near is nearest to demo")
    assert floor.spec.model.dtype in verdict.rows[2][0]


def test_a_rounded_cache_is_the_checkpoints_alone(judge, fp8, records):
    trial = judge(fp8, "kv_bits=2")
    floor, plain = floor_of(trial), floor_of(judge(fp8))
    assert floor is not None
    assert plain is not None
    assert floor.spec == plain.spec
    candidate, _, measured = records
    rounded = [
        replace(record, spec=replace(record.spec, kv=KvScheme(bits=bits)))
        for record, bits in ((candidate, 2), (candidate, 4), (measured, 2))
    ]
    [bench] = benches([*rounded, *records])
    assert bench.floor is not None
    assert bench.floor.records == (measured,)
    names = {pool.label for pool in bench.candidates}
    assert names == {"demo-FP8", "demo-FP8, kv2", "demo-FP8, kv4", "demo, kv2"}


def test_without_a_kl_the_report_compares_what_was_measured(records):
    alone = []
    for record in records[:2]:
        spec = replace(record.spec, evaluation=replace(record.spec.evaluation, drift=None))
        numbers = {key: x for key, x in record.metrics.items() if key.startswith("perplexity")}
        alone.append(replace(record, spec=spec, metrics=numbers))
    [bench] = benches(alone)
    assert bench.sentence() == "1 checkpoint of demo: no KL was measured."
    [verdict] = bench.tables()
    assert not any("KL" in column for column in verdict.columns)
    assert "Measured by q3q on library (8 windows" in bench.card()


@pytest.mark.parametrize(
    ("metric", "drift", "first"), [("kl/library", "auto", "low"), (MEAN_ACCURACY, None, "high")]
)
def test_checkpoints_without_a_number_come_after_those_with_one(records, metric, drift, first):
    candidate, original, _ = records
    evaluation = replace(candidate.spec.evaluation, drift=drift)
    others = []
    for name, value in (("none", None), ("low", 0.25), ("high", 0.5)):
        model = replace(candidate.spec.model, name=name, digest=name)
        spec = replace(candidate.spec, model=model, evaluation=evaluation)
        numbers = {} if value is None else {metric: value}
        others.append(replace(candidate, spec=spec, metrics=numbers, intervals={}))
    own = replace(original, spec=replace(original.spec, evaluation=evaluation))
    [bench] = benches([*others, own])
    second = {"low": "high", "high": "low"}[first]
    assert [pool.label for pool in bench.candidates] == [first, second, "none"]


def test_a_test_of_too_few_windows_says_nothing(records, monkeypatch):
    def of_three_windows(ours, theirs, metric):
        scores = ({str(k): value + k for k in range(3)} for value in (1.0, 2.0))
        return compare(metric, *scores)

    monkeypatch.setattr("q3q.report.judged.difference", of_three_windows)
    candidate = replace(records[0], intervals={})
    other = replace(
        candidate,
        spec=replace(candidate.spec, model=replace(candidate.spec.model, name="far", digest="f")),
        metrics={name: 2 * value for name, value in candidate.metrics.items()},
    )
    [bench] = benches([candidate, *records[1:], other])
    verdict, *_ = bench.tables()
    place, untold = (verdict.columns.index(column) for column in (OVER_FLOOR, UNTOLD))
    assert [row[place].endswith(" times") for row in verdict.rows[:2]] == [True, True]
    assert [row[untold] for row in verdict.rows[:2]] == [UNTESTED, UNTESTED]
    assert "Not told apart" not in bench.sentence()


def test_what_is_odd_about_the_files_is_named(tmp_path):
    def change(tensors, quantization):
        other = torch.randn(tensors[f"{DOWN}.weight"].shape, generator=torch.manual_seed(0))
        tensors[f"{DOWN}.weight"] = other.to(torch.float8_e4m3fn)
        up = "model.layers.0.mlp.up_proj"
        tensors[f"{up}.weight"] = tensors[f"{up}.weight"].float() * tensors.pop(
            f"{up}.weight_scale"
        )
        tensors["model.layers.0.mlp.gate_proj.weight_scale"][3] = 0
        quantization["ignore"].append(up)

    folder = fp8_copy(tmp_path / "odd", change)
    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    settings["chat_template"] = "{{ messages }}"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    note = note_of(Checkpoint(folder), Checkpoint(DEMO), load_tokenizer(DEMO))
    assert list(note["unlike"]) == ["blocks.1.mlp.down_proj"]
    assert abs(note["unlike"]["blocks.1.mlp.down_proj"]) < 0.1
    assert (note["plain_count"], note["plain_linears"]) == (1, "mlp.up_proj of block 0")
    assert note["tokenizer"] == ["another chat template"]
    assert note["doubts"][0].startswith("model.layers.0.mlp.gate_proj.weight_scale: 1 of ")


def spoiled(value, part="weight_scale", rows=slice(None)):
    def change(tensors, quantization):
        tensors[f"{DOWN}.{part}"][rows] = value

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (spoiled(float("nan"), rows=slice(1, 2)), "not finite"),
        (spoiled(0.0), "scales are zero"),
    ],
)
def test_scales_that_are_no_numbers_or_zero_are_refused(tmp_path, change, said):
    folder = fp8_copy(tmp_path / "spoiled", change)
    with pytest.raises(CheckpointError, match=rf"{DOWN}.weight_scale.*{said}"):
        Checkpoint(folder).block(1)


def in_16_bits(tensors, quantization):
    """Leave a linear in 16 bits, with a number that is none."""
    plain = torch.ones(tensors[f"{DOWN}.weight"].shape, dtype=torch.bfloat16)
    plain[3, 4] = float("inf")
    tensors[f"{DOWN}.weight"] = plain
    del tensors[f"{DOWN}.weight_scale"]
    quantization["ignore"].append(DOWN)


def at_once(name, value, place=5):
    def change(tensors, quantization):
        tensors[name].view(-1)[place] = value

    return change


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (in_16_bits, f"{DOWN}.weight"),
        (at_once(f"{DOWN}.weight", float("nan")), f"{DOWN}.weight"),
        *(
            (at_once(name, float("nan")), name)
            for name in (
                "model.layers.1.input_layernorm.weight",
                "model.embed_tokens.weight",
            )
        ),
    ],
)
def test_a_tensor_with_numbers_that_are_none_is_refused_by_its_name(tmp_path, change, name):
    folder = fp8_copy(tmp_path / "spoiled", change)
    with pytest.raises(CheckpointError, match=rf"^{name} holds numbers that are not finite"):
        compare_weights(Checkpoint(folder), Checkpoint(DEMO))


def test_numbers_that_rounding_does_not_explain_are_named(tmp_path):
    def change(tensors, quantization):
        tensors[f"{DOWN}.weight_scale"] *= 100
        tensors["model.layers.0.mlp.up_proj.weight_scale"][7] *= -1
        norm = tensors["model.layers.1.input_layernorm.weight"]
        norm.copy_(torch.rand(norm.shape, generator=torch.manual_seed(0)))
        tensors["model.norm.weight"] *= 1.1
        tensors["model.layers.2.self_attn.v_proj.weight_scale"] *= 1e25  # squares exceed float32

    checkpoint = Checkpoint(fp8_copy(tmp_path / "odd", change))
    likeness = compare_weights(checkpoint, Checkpoint(DEMO))
    assert likeness.unlike == {}
    assert set(likeness.far) == {"blocks.1.mlp.down_proj", "blocks.2.self_attn.v_proj"}
    assert likeness.far["blocks.1.mlp.down_proj"] == pytest.approx(99, rel=0.01)
    assert likeness.far["blocks.2.self_attn.v_proj"] == pytest.approx(1e25, rel=0.01)
    assert set(likeness.moved) == {"blocks.1.input_layernorm", "final norm"}
    assert likeness.moved["final norm"] == pytest.approx(0.1, rel=0.01)
    far, moved = likeness.doubts()
    assert far.startswith("mlp.down_proj of block 1; self_attn.v_proj of block 2: not of the orig")
    assert moved.startswith("final norm; input_layernorm of block 1: not the original's numbers")
    rows = len(checkpoint.matrix(0, "mlp.up_proj.weight"))
    assert list(checkpoint.doubts) == [
        f"model.layers.0.mlp.up_proj.weight_scale: 1 of {rows} scales are negative, and the "
        "format's are magnitudes"
    ]


def test_a_missing_scale_is_named_with_what_is_there(tmp_path):
    folder = fp8_copy(tmp_path / "less", lambda tensors, _: tensors.pop(f"{DOWN}.weight_scale"))
    with pytest.raises(CheckpointError, match=rf"{DOWN}.weight_scale \(compressed.*hold weight th"):
        Checkpoint(folder)


STATIC = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}


@pytest.mark.parametrize("scale", [0.0, float("nan"), 0.02])
def test_a_stored_scale_of_inputs_is_read_when_the_folder_is_opened(tmp_path, scale):
    def change(tensors, quantization):
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            own = scale if name.startswith(DOWN) else 0.01
            tensors[name.replace(".weight", ".input_scale")] = torch.tensor([own])

    folder = fp8_copy(tmp_path / "static", change, {**STATIC, "symmetric": True})
    if not scale > 0:
        with pytest.raises(CheckpointError, match=rf"{DOWN}.input_scale .* nothing can be rounded"):
            Checkpoint(folder)
        return
    block = load_decoder(Checkpoint(folder), torch.float32).blocks[1]
    assert block.own_rounding["down"].number == pytest.approx(0.02)
    assert block.own_rounding["o"].number == pytest.approx(0.01)
    x = torch.linspace(-1, 1, 50)
    site = next(site for site in block.sites if site.name == "down")
    expected = (x / 0.02).to(torch.float8_e4m3fn).float() * 0.02
    assert torch.allclose(block.round_inputs(site, x), expected, atol=1e-7)


def test_another_model_is_no_candidate(judge, fp8):
    with pytest.raises(ConfigError, match=r"demo_moe cannot have been made from demo: .*experts"):
        judge("demo_moe")
    with pytest.raises(IncompatibleError, match="model=judge evaluates checkpoints as they are"):
        judge(fp8, "method=rtn")
    with pytest.raises(ConfigError, match=r"name them, model=judge model\.source="):
        composed_trial("model=judge", "model.reference=demo", "method=none")


def test_a_quantized_model_is_refused_also_where_only_its_files_say_it(fp8, tmp_path):
    """As of a Hub model whose config.json is all that a plan reads."""
    trial = composed_trial("method=rtn", "evaluation=none", f"storage={tmp_path}")
    spec = replace(trial.spec, model=replace(trial.spec.model, digest=None))
    with pytest.raises(CheckpointError, match=r"quantized already \(compressed-tensors\)"):
        run_trial(Trial(spec, replace(trial.placement, model=fp8)))


@pytest.mark.slow
def test_the_command_ranks_checkpoints_beside_their_original(tmp_path):
    checkpoint, file = Checkpoint(DEMO), tmp_path / "demo.gguf"
    tensors = tensors_of(checkpoint.facts, read_header(DEMO / "model.safetensors"), {})
    vocabulary = vocabulary_of(load_tokenizer(DEMO), checkpoint.facts.vocab)
    write_model(file, checkpoint.facts, vocabulary, tensors, name="demo", most="q8_0")
    odd = fp8_copy(tmp_path / "odd-FP8", at_once(f"{DOWN}.weight_scale", -0.001))
    words = ["model=judge", "model.reference=demo", "evaluation.texts=[library]"]
    words += ["evaluation.limit=2", "evaluation.window=64", "evaluation.task_limit=4"]
    words += ["evaluation.tasks=[stories_who]", f"storage={tmp_path}/s", "name=it"]
    done = python("launch.py", "-m", *words, f"model.source={odd},{file}")
    assert done.returncode == 0, done.stderr[-2000:]
    records = list((tmp_path / "s" / "trials").glob("*/record.json"))
    assert len(records) == 4  # with the original and its noise floor
    [card] = (tmp_path / "s" / "reports").glob("*/model_card.md")
    assert (card.parent / "report.html").is_file()
    said = card.read_text(encoding="utf-8")
    assert "| 1. demo.gguf |" in said
    assert "| 2. odd-FP8 |" in said
    assert "| checkpoint | stories_who |" in said
    assert f"odd-FP8: {DOWN}.weight_scale: 1 of " in said
    assert "noise floor" in said


def test_judging_needs_no_method_on_the_command_line():
    words = ["-m", "model=judge", "model.reference=demo", "model.source=A/one,./two.gguf"]
    assert understood(words) == [*words, "method=none"]
    assert understood([*words, "method=rtn"]) == [*words, "method=rtn"]


def test_a_checkpoints_trial_is_known_by_its_files_and_its_original(judge, fp8, tmp_path):
    trial = judge(fp8)
    moved = shutil.copytree(fp8, tmp_path / "elsewhere")
    assert judge(moved).id == trial.id
    assert replace(trial.spec, reference=None).id != trial.id
    assert Trial.from_json(trial.to_json()).spec == trial.spec
    other = fp8_copy(tmp_path / "other", spoiled(1.0, rows=slice(0, 1)))
    assert judge(other).id != trial.id
    original = replace(trial.spec, model=trial.spec.reference, reference=None)
    assert trial.placement.baseline == original.id
    # The command that is shown for it makes it again.
    words = shlex.split(command_of(trial))[2:]
    assert composed_trial(*words, f"storage={trial.placement.storage}").id == trial.id
