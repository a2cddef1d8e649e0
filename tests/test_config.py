"""Every file in conf/ is a promise; every bad value is refused with a line that says what to do."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from q3q import config as schema
from q3q.errors import CalibrationError, CheckpointError, ConfigError, IncompatibleError
from q3q.models.checkpoint import read_facts
from q3q.quantize.methods.settings import SETTINGS
from q3q.spec import TrialSpec

CONF = Path(__file__).parent.parent / "conf"
HUB_CONFIG = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 12288,
    "num_hidden_layers": 36,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
}


@pytest.fixture(autouse=True)
def hydra():
    schema.register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "my text.txt"
    path.write_text("A small text, said again and again. " * 200, encoding="utf-8")
    return path


def spec(*overrides: str) -> TrialSpec:
    return schema.spec_from(compose("config", list(overrides)))


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@pytest.mark.parametrize("name", options("method"))
def test_every_method_becomes_a_spec(name):
    made = spec(f"method={name}")
    assert made.method["name"] == name
    assert set(made.method) - {"version"} == set(vars(SETTINGS[name]()))
    assert TrialSpec.from_json(made.to_json()) == made


@pytest.mark.parametrize("name", options("method"))
def test_the_yaml_says_what_the_dataclass_says(name):
    composed = compose("config", [f"method={name}"]).method
    assert dict(composed) == vars(SETTINGS[name]())


@pytest.mark.parametrize("name", options("model"))
def test_every_model_becomes_a_spec(name, monkeypatch, tmp_path):
    monkeypatch.setattr(schema, "_hub_model", lambda source, revision: ("c0ffee", read_facts(HUB_CONFIG)))
    overrides = [f"model={name}", f"storage={tmp_path}"]
    if name == "local":
        overrides.append(f"model.path={schema.DEMO_MODELS / 'dense'}")
    made = spec(*overrides)
    assert made.model["name"] == ("dense" if name == "local" else name)
    if name.startswith("qwen3"):
        assert made.model["source"].startswith("Qwen/Qwen3-")
        assert made.model["dtype"] == "bfloat16"


@pytest.mark.parametrize("name", options("calibration"))
def test_every_calibration_becomes_a_spec(name, monkeypatch, text_file):
    if name in ("c4", "pile", "wikitext2"):
        plain = schema.load_text
        monkeypatch.setattr(
            schema, "load_text", lambda source, **rest: plain("file", split="calibration", path=text_file)
        )
        schema._text.cache_clear()
    path = [f"calibration.path={text_file}".replace(" ", "\\ ")] if name == "file" else []
    made = spec("method=gptq", f"calibration={name}", *path)
    assert made.calibration["source"] == name
    assert made.calibration["samples"] > 0
    schema._text.cache_clear()


@pytest.mark.parametrize("name", options("evaluation"))
def test_every_evaluation_becomes_a_spec(name, monkeypatch, text_file):
    plain = schema.load_text
    if name == "perplexity":
        monkeypatch.setattr(
            schema, "load_text", lambda source, **rest: plain("file", split="evaluation", path=text_file)
        )
        schema._text.cache_clear()
    path = [f"evaluation.path={text_file}".replace(" ", "\\ ")] if name == "file" else []
    made = spec(f"evaluation={name}", *path)
    names = [text["name"] for text in made.evaluation["texts"]]
    assert (
        names
        == {"demo": ["stories", "library"], "perplexity": ["wikitext2", "c4"], "file": ["my_text"], "none": []}[name]
    )
    schema._text.cache_clear()


@pytest.mark.parametrize("name", options("cluster"))
def test_every_cluster_composes(name):
    assert compose("config", [f"cluster={name}"]).cluster.name == name


def test_null_means_the_methods_own_default_and_is_resolved():
    gptq, awq = (spec(f"method={name}", "calibration.length=null", "calibration.draw=null") for name in ("gptq", "awq"))
    assert (gptq.calibration["length"], gptq.calibration["draw"]) == (2048, "random")
    assert (awq.calibration["length"], awq.calibration["draw"]) == (512, "documents")
    assert gptq.scheme.bits == 4
    assert gptq.scheme.group_size == 128


def test_what_cannot_change_a_number_does_not_change_the_id(tmp_path):
    one = spec("method=gptq", "bits=4")
    assert (
        one.id == spec("method=gptq", f"storage={tmp_path}", "cluster=existing", "track.uri=http://x", "keep=blocks").id
    )
    # null and the default it stands for; what a method ignores
    assert one.id == spec("method=gptq", "group_size=128", "symmetric=false").id
    assert spec("method=none", "bits=4").id == spec("method=none", "bits=3", "calibration.samples=7").id
    assert spec("method=rtn").id == spec("method=rtn", "calibration.samples=7").id


@pytest.mark.parametrize(
    "change",
    [
        "bits=3",
        "seed=1",
        "method.damping=0.02",
        "group_size=64",
        "act_bits=8",
        "calibration.samples=8",
        "dtype=bfloat16",
    ],
)
def test_what_can_change_a_number_changes_the_id(change):
    assert (
        spec("method=gptq", "bits=4").id != spec("method=gptq", "bits=4" if change != "bits=3" else "seed=0", change).id
    )


def test_a_new_evaluation_keeps_the_quantization():
    one, other = spec("method=gptq"), spec("method=gptq", "evaluation.limit=3")
    assert one.id != other.id
    assert one.quantization_id == other.quantization_id


@pytest.mark.parametrize(
    ("overrides", "error", "words"),
    [
        (["bits=0"], ConfigError, "bits=0 is out of range: give 1 to 8"),
        (["bits=9"], ConfigError, "bits=9 is out of range"),
        (["bits=1", "method=gptq"], IncompatibleError, "method=gptq cannot do bits=1; it takes 2 to 8"),
        (
            ["group_size=96"],
            ConfigError,
            r"group_size=96 does not divide qkv .*down.*sizes that do: \[16, 32, 64, 128\] or -1",
        ),
        (["group_size=0"], ConfigError, "group_size=0"),
        (["act_bits=1"], ConfigError, "act_bits=1"),
        (["method=none", "act_bits=8"], IncompatibleError, "quantizes nothing"),
        (["method=gptq", "method.damping=0"], ConfigError, "method.damping=0"),
        (["seed=-1"], ConfigError, "seed must be 0 or more"),
        (["dtype=float8"], ConfigError, "dtype=float8 is not known"),
        (["keep=all"], ConfigError, "keep=all is not known"),
        (["model=local"], ConfigError, "model.path=DIR"),
        (["model=local", "model.path=/nowhere"], CheckpointError, "/nowhere is not a folder"),
        (["model=qwen3_8b"], CheckpointError, "model=local model.path=DIR"),
        (["method=gptq", "calibration=file"], CalibrationError, "calibration.path=FILE"),
        (["method=gptq", "calibration=file", "calibration.path=/nowhere.txt"], CalibrationError, "no such file"),
        (["method=gptq", "calibration.draw=rnadom"], ConfigError, "did you mean random"),
        (["method=gptq", "calibration.samples=0"], ConfigError, "calibration.samples=0"),
        (["method=gptq", "calibration=file", "calibration.path=SHORT"], CalibrationError, "SHORT.*2048|tokens"),
        (["evaluation=file", "evaluation.path=SHORT"], CalibrationError, "tokens"),
        (["evaluation=file", "evaluation.path=EMPTY"], CalibrationError, "holds no text"),
        (["evaluation.window=1"], ConfigError, "evaluation.window=1"),
        (["evaluation.window=4096"], ConfigError, "takes at most 2048 tokens"),
        (["evaluation.texts=[wikitext]"], CalibrationError, "did you mean 'wikitext2'|did you mean wikitext2"),
    ],
)
def test_bad_values_are_refused_in_one_line(overrides, error, words, tmp_path):
    (tmp_path / "SHORT").write_text("Too short for a window.", encoding="utf-8")
    (tmp_path / "EMPTY").write_text("", encoding="utf-8")
    overrides = [one.replace("SHORT", f"{tmp_path}/SHORT").replace("EMPTY", f"{tmp_path}/EMPTY") for one in overrides]
    with pytest.raises(error, match=words) as caught:
        spec(*overrides)
    assert "\n" not in str(caught.value)


def test_a_text_too_short_for_a_hub_model_is_refused_before_any_download(monkeypatch, tmp_path):
    monkeypatch.setattr(schema, "_hub_model", lambda source, revision: ("c0ffee", read_facts(HUB_CONFIG)))
    (tmp_path / "short.txt").write_text("Too short for a window.", encoding="utf-8")
    file = ["calibration=file", f"calibration.path={tmp_path}/short.txt"]
    with pytest.raises(CalibrationError, match="short has 23 bytes, so fewer than the 2048 tokens"):
        spec("model=qwen3_8b", "method=gptq", *file)
