"""A family is one file: what its facts say fits together, and another package can add one."""

import json
import pickle
import shutil
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from transformers import AutoConfig, AutoModelForCausalLM

from q3q.config.model import DEMO_MODELS
from q3q.errors import CheckpointError, ConfigError
from q3q.evaluate.integrity import check_weights
from q3q.models.checkpoint import Checkpoint
from q3q.models.decoder import load_decoder
from q3q.models.facts import read_facts
from q3q.models.families import registry
from q3q.models.loading import open_checkpoint
from q3q.models.streaming import StreamedDecoder
from q3q.quantize.ledger import Ledger, sizes
from q3q.quantize.walk import quantize_model
from q3q.spec import Scheme
from tests.commands import python
from tests.composed import composed_trial
from tests.methods import built
from tests.models.families import COMMON, KINDS, build
from tests.nowhere import Nowhere
from tests.printed import pip_install, write_printed
from tests.test_plugins import pretend_to_install

ROOT = Path(__file__).parents[2]
CONF, GUIDE = ROOT / "conf", ROOT / "docs" / "FAMILY_GUIDE.md"
GRID = Scheme(bits=4, group_size=4, symmetric=False)
METHODS = {
    "gptq": lambda: built("gptq"),
    "awq": lambda: built("awq", v_to_o=True, grid=3),
    "smoothquant": lambda: built("smoothquant", o_and_down=True),
}


# model_type, hidden, layers, heads, key-value heads, intermediate, vocabulary, tied, and the
# parameters that the Hub counts in the released files.
RELEASED = {
    "smollm2_135m": ("llama", 576, 30, 9, 3, 1536, 49152, True, 134_515_008),
    "smollm2_360m": ("llama", 960, 32, 15, 5, 2560, 49152, True, 361_821_120),
    "smollm2_1_7b": ("llama", 2048, 24, 32, 32, 8192, 49152, True, 1_711_376_384),
    "llama2_7b": ("llama", 4096, 32, 32, 32, 11008, 32000, False, 6_738_415_616),
    "llama2_13b": ("llama", 5120, 40, 40, 40, 13824, 32000, False, 13_015_864_320),
    "llama2_70b": ("llama", 8192, 80, 64, 8, 28672, 32000, False, 68_976_648_192),
    "llama3_8b": ("llama", 4096, 32, 32, 8, 14336, 128256, False, 8_030_261_248),
    "llama3_2_1b": ("llama", 2048, 16, 32, 8, 8192, 128256, True, 1_235_814_400),
    "llama3_2_3b": ("llama", 3072, 28, 24, 8, 8192, 128256, True, 3_212_749_824),
    "llama3_1_8b": ("llama", 4096, 32, 32, 8, 14336, 128256, False, 8_030_261_248),
    "llama3_1_70b": ("llama", 8192, 80, 64, 8, 28672, 128256, False, 70_553_706_496),
    "llama3_3_70b": ("llama", 8192, 80, 64, 8, 28672, 128256, False, 70_553_706_496),
    "qwen2_5_0_5b": ("qwen2", 896, 24, 14, 2, 4864, 151936, True, 494_032_768),
    "qwen2_5_1_5b": ("qwen2", 1536, 28, 12, 2, 8960, 151936, True, 1_543_714_304),
    "qwen2_5_3b": ("qwen2", 2048, 36, 16, 2, 11008, 151936, True, 3_085_938_688),
    "qwen2_5_7b": ("qwen2", 3584, 28, 28, 4, 18944, 152064, False, 7_615_616_512),
    "qwen2_5_14b": ("qwen2", 5120, 48, 40, 8, 13824, 152064, False, 14_770_033_664),
    "qwen2_5_32b": ("qwen2", 5120, 64, 40, 8, 27648, 152064, False, 32_763_876_352),
    "qwen2_5_72b": ("qwen2", 8192, 80, 64, 8, 29568, 152064, False, 72_706_203_648),
    "mistral_7b": ("mistral", 4096, 32, 32, 8, 14336, 32768, False, 7_248_023_552),
}
POST_TRAINED_ALONE = {"llama3_3_70b"}


@pytest.mark.parametrize("page", RELEASED)
def test_released_sizes_are_counted_from_config_json(page):
    """And conf/model has a page for each, and one for what was released before post-training."""
    kind, hidden, layers, heads, kv_heads, intermediate, vocab, tied, parameters = RELEASED[page]
    config = {
        "model_type": kind,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "intermediate_size": intermediate,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        **({"sliding_window": None} if kind == "mistral" else {}),
    }
    assert read_facts(config).parameters == parameters
    for name in (page, f"{page}_base")[: 1 if page in POST_TRAINED_ALONE else 2]:
        content = OmegaConf.load(CONF / "model" / f"{name}.yaml")
        assert content.name == name
        post_trained = "Instruct" in content.source or "-chat-" in content.source
        assert post_trained == (name == page)


@pytest.mark.parametrize("kind", KINDS)
def test_facts_fit_transformers_model_and_each_other(kind):
    theirs = build(kind)
    facts = read_facts(theirs.config.to_dict())
    assert facts.parameters == sum(tensor.numel() for tensor in theirs.parameters())
    assert facts == pickle.loads(pickle.dumps(facts))
    assert hash(facts) == hash(pickle.loads(pickle.dumps(facts)))
    for k in range(facts.layers):
        shapes, linears = facts.block_shapes(k), facts.linears(k)
        # Every tensor is quantized, or the family says why not.
        kept = tuple(facts.family.kept)
        assert all((name in linears) != name.endswith(kept) for name in shapes)
        for site in facts.sites(k):
            assert len({shapes[name][-1] for name in site.weights}) == 1
            assert set(site.scores) <= set(site.weights)
        for group in facts.family.scale_groups(facts, k):
            assert group.site in facts.sites(k)
            produced = shapes[group.producer][-2 if len(shapes[group.producer]) > 1 else 0]
            assert produced * group.repeat == shapes[group.site.weights[0]][-1]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["qwen2", "llama, biases", "mistral"])
@torch.inference_mode()
def test_methods_change_linears_and_what_takes_over_scales(kind, method, tmp_path):
    build(kind).save_pretrained(tmp_path)
    checkpoint = Checkpoint(tmp_path)
    decoder, original = (load_decoder(checkpoint, torch.float32) for _ in range(2))
    windows = torch.randint(97, (2, 24), generator=torch.Generator().manual_seed(0))
    blocks = quantize_model(decoder, METHODS[method](), GRID, windows, Nowhere())
    checks = check_weights(decoder, [block.quantized for block in blocks])
    assert all(check.passed for check in checks)
    producers = {"self_attn.v_proj.bias", "mlp.up_proj.bias"} if method != "gptq" else set()
    for before, after in zip(original.blocks, decoder.blocks, strict=True):
        biases = {name for name in before.weights if name.endswith(".bias")}
        assert bool(biases) == (kind != "mistral")
        changed = {n for n in biases if not torch.equal(before.weights[n], after.weights[n])}
        assert changed <= producers
    ledger = Ledger()
    for block in blocks:
        ledger.add(block)
    found = sizes(checkpoint, ledger, {})
    # Biases count with norms and embedding, by the 32 bits that they have on disk.
    facts = checkpoint.facts
    rest = facts.parameters - facts.linear_parameters
    of_linears = found["bits_per_weight"] * facts.linear_parameters
    assert found["model_bytes"] * 8 == pytest.approx(of_linears + 32 * rest, rel=1e-12)


@torch.inference_mode()
def test_a_streamed_model_with_biases_has_the_resident_ones_bits(tmp_path):
    build("llama, biases", tied=False).save_pretrained(tmp_path)
    checkpoint, ids = Checkpoint(tmp_path), torch.arange(40).view(2, 20)
    streamed = StreamedDecoder(checkpoint, torch.float32)
    assert torch.equal(streamed.hidden(ids), load_decoder(checkpoint, torch.float32).hidden(ids))


def test_a_checkpoint_whose_tensors_do_not_fit_its_config_is_refused(tmp_path):
    build("qwen2").save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    words = config.read_text()
    config.write_text(words.replace('"qwen2"', '"qwen3"'))
    with pytest.raises(CheckpointError, match=r"6 tensors .* first .*q_norm\.weight, which config"):
        Checkpoint(tmp_path)
    config.write_text(words.replace('"qwen2"', '"llama"'))
    (remark,) = Checkpoint(tmp_path).remarks
    assert "_proj.bias and 8 more are in the files, and not in this model: not read" in remark
    config.write_text(words.replace('"head_dim": 12', '"head_dim": 16'))
    with pytest.raises(CheckpointError, match=r"of a shape that config.json does not imply"):
        Checkpoint(tmp_path)


def test_windows_in_which_dynamic_frequencies_change_are_refused(tmp_path):
    folder = shutil.copytree(DEMO_MODELS / "dense", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    longest = config["max_position_embeddings"]
    scaling = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    (folder / "config.json").write_text(json.dumps(config | {"rope_parameters": scaling}))
    words = ("method=gptq", "model=local", f"model.path={folder}", "evaluation=none")
    composed_trial(*words, f"calibration.length={longest}", "calibration.samples=1")
    with pytest.raises(ConfigError, match=r"rope_type=dynamic. change in windows of more than"):
        composed_trial(*words, f"calibration.length={longest + 1}", "calibration.samples=1")


@pytest.fixture
def offered(tmp_path, monkeypatch):
    """Return a function that makes the guide's module a package, as if it were installed."""

    def install(**points):
        """points: others than those that the guide prints."""
        write_printed(GUIDE, tmp_path)
        project = tomllib.loads((tmp_path / "pyproject.toml").read_text())["project"]
        printed = project["entry-points"][registry.GROUP]
        site = tmp_path / "site"
        pretend_to_install(
            site, project["name"], points or printed, project["version"], registry.GROUP
        )
        for folder in (tmp_path, site):
            monkeypatch.syspath_prepend(folder)
        registry._offered.cache_clear()

    yield install
    registry._offered.cache_clear()


def olmo2(folder, **sizes):
    torch.manual_seed(0)
    settings = AutoConfig.for_model(**{**COMMON, "model_type": "olmo2", **sizes})
    model = AutoModelForCausalLM.from_config(settings).eval()
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "norm" in name:
                tensor.add_(torch.randn_like(tensor) * 0.3)
    model.save_pretrained(folder)
    return model


@torch.inference_mode()
def test_a_package_adds_a_family(offered, tmp_path):
    theirs, folder = olmo2(tmp_path / "model"), tmp_path / "model"
    with pytest.raises(CheckpointError, match=r"model_type 'olmo2' is of no family.*FAMILY_GUIDE"):
        Checkpoint(folder)
    offered()
    checkpoint = Checkpoint(folder)
    ours = load_decoder(checkpoint, torch.float32)
    ids = torch.randint(97, (2, 30), generator=torch.Generator().manual_seed(1))
    expected = theirs(input_ids=ids).logits.flatten(0, 1)
    logits = torch.cat([part for _, part in ours.logits(ours.hidden(ids).flatten(0, 1))])
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()
    for build_method in METHODS.values():
        decoder = load_decoder(checkpoint, torch.float32)
        blocks = quantize_model(decoder, build_method(), GRID, ids, Nowhere())
        assert {len(block.quantized) for block in blocks} == {7}
        away = (decoder.hidden(ids) - ours.hidden(ids)).norm() / ours.hidden(ids).norm()
        assert 0 < float(away) < 0.5


def test_a_trial_names_the_package_of_its_models_family(offered, tmp_path):
    olmo2(tmp_path / "model")
    shutil.copy(DEMO_MODELS / "dense" / "tokenizer.json", tmp_path / "model")
    offered()
    trial = composed_trial(
        *("method=rtn", "model=local", f"model.path={tmp_path / 'model'}", "evaluation=none"),
        *("evaluation.window=32", "group_size=-1", f"storage={tmp_path}"),
    )
    assert trial.spec.model.package == "q3q-olmo2 1.0"
    assert trial.spec.model.identity["package"] == "q3q-olmo2 1.0"
    assert open_checkpoint(trial).facts.hidden == COMMON["hidden_size"]
    newer = replace(trial.spec.model, package="q3q-olmo2 2.0")
    other = replace(trial, spec=replace(trial.spec, model=newer))
    assert other.id != trial.id
    with pytest.raises(ConfigError, match=r"needs the model's family of q3q-olmo2 2\.0"):
        open_checkpoint(other)
    own = composed_trial("method=rtn", "evaluation=none").spec.model
    assert "package" not in own.to_json()


@pytest.mark.slow
def test_the_printed_package_is_installed_and_goes_through_a_whole_trial(tmp_path):
    """Its plan, its evaluation on a file, an export that reads back, and the report."""
    source, target, folder = (tmp_path / name for name in ("source", "target", "model"))
    write_printed(GUIDE, source)
    pip_install(source, target)
    olmo2(folder, vocab_size=read_facts(DEMO_MODELS / "dense").vocab, head_dim=16)
    shutil.copy(DEMO_MODELS / "dense" / "tokenizer.json", folder)
    text = tmp_path / "text.txt"
    text.write_text(GUIDE.read_text(encoding="utf-8"), encoding="utf-8")
    words = (
        *("launch.py", "method=gptq", "method.static_groups=true", "bits=4", "model=local"),
        *(f"model.path={folder}", "group_size=16", "symmetric=true"),
        *("calibration.samples=2", "calibration.length=64"),
        *(f"evaluation.texts={{guide: {text}}}", "evaluation=perplexity", "evaluation.window=32"),
        *("export=compressed_tensors", f"storage={tmp_path / 'storage'}"),
    )
    planned = python(*words, "plan=true", PYTHONPATH=str(target))
    assert planned.returncode == 0, planned.stderr
    ran = python(*words, PYTHONPATH=str(target))
    assert ran.returncode == 0, ran.stderr
    [path] = (tmp_path / "storage").glob("trials/*/record.json")
    record = json.loads(path.read_text())
    assert record["status"] == "COMPLETED"
    assert record["spec"]["model"]["package"] == "q3q-olmo2 1.0"
    assert record["metrics"]["export_bytes"] > 0
    assert list((tmp_path / "storage").rglob("report*.html"))


def test_an_entry_point_that_is_no_family_is_named(offered):
    offered(olmo2="q3q_olmo2:Family.__name__", olmo3="q3q_olmo2:nothing")
    with pytest.raises(CheckpointError, match=r"olmo2 cannot be used: .* is not a class derived"):
        registry.find_family("olmo2")
    with pytest.raises(CheckpointError, match=r"olmo3 cannot be used: .* does not load"):
        registry.find_family("olmo3")
