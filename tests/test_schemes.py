"""Settings are held against what is quantized, and against nothing else."""

import shutil
from pathlib import Path

import pytest

from q3q.config import resolve
from q3q.errors import ConfigError
from q3q.sweep.grid import unquantized
from tests.composed import compose

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "q3q" / "models" / "demo" / "dense"


@pytest.fixture
def narrow(random_checkpoint, tmp_path):
    """A model of widths 96 and 192, which 128 does not divide; return its settings."""
    folder = random_checkpoint(
        vocab_size=4096,
        hidden_size=96,
        intermediate_size=192,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=4096,
    )
    shutil.copy(DEMO / "tokenizer.json", folder)
    return ["model=local", f"model.path={folder}", "evaluation=none", f"storage={tmp_path}"]


QUANTIZED = [
    "method=rtn group_size=32",
    "method=rtn group_size=-1",
    "method=gptq group_size=48",
    "method=smoothquant",
    "method=billm group_size=96",
    "method=rtn group_size=64 skip=[*.qkv,*.o,*.gate_up]",
    "method=rtn group_size=128 skip=[*.down] overrides={*.qkv:{group_size:32},*.o:{group_size:32},"
    "*.gate_up:{group_size:96}}",
    # The method cannot do 1 bit, which no layer has.
    "method=gptq group_size=32 bits=1 overrides={blocks.*:{bits:4}}",
    "method=rtn group_size=32 bits=1 overrides={*.qkv:{bits:4},*.o:{bits:4},*.gate_up:{bits:4}} "
    "skip=[*.down]",
    "method=rtn group_size=32 export=gptq",
    "method=rtn group_size=32 head_bits=8 embedding_bits=8",
    "method=rtn group_size=96 skip=[blocks.*] head_bits=8 embedding_bits=8",
]


@pytest.mark.parametrize("words", QUANTIZED)
def test_what_is_left_out_needs_no_fitting_setting(narrow, words):
    overrides = [*narrow, *words.split()]
    assert resolve.trial_from(compose("config", overrides)).spec.scheme is not None
    # Nor does the unquantized model that a sweep adds.
    assert resolve.trial_from(compose("config", unquantized(overrides))).spec.scheme is None


@pytest.mark.parametrize("words", ["", "group_size=32", "group_size=100", "group_size=-1"])
def test_the_unquantized_model_needs_no_group_size(narrow, words):
    plain = resolve.trial_from(compose("config", [*narrow, "method=none"]))
    same = resolve.trial_from(compose("config", [*narrow, "method=none", *words.split()]))
    assert same.id == plain.id


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("method=rtn", r"group_size=128 does not divide .*\(96 columns\).*\(192 columns\)"),
        ("method=rtn group_size=64", r"64 does not divide .*\(96 columns\); sizes.*\[16, 32\] or"),
        ("method=billm", r"sizes that do: \[16, 32\]$"),
        ("method=gptq group_size=32 bits=1", "cannot do bits=1"),
        ("method=gptq group_size=32 bits=1 overrides={blocks.1:{bits:4}}", "cannot do bits=1"),
        ("method=none act_bits=8", "quantizes nothing"),
    ],
)
def test_what_is_quantized_needs_it(narrow, words, says):
    with pytest.raises(ConfigError, match=says):
        resolve.trial_from(compose("config", [*narrow, *words.split()]))
