"""Formats as settings: what they mean, what is refused, and what names and ids make of them."""

import shlex
from dataclasses import asdict

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser

from q3q.config import resolve, schema
from q3q.config.command import command_of
from q3q.config.unread import unread, without_effect
from q3q.errors import ConfigError, IncompatibleError
from q3q.models.adjust import set_activations
from q3q.models.checkpoint import Checkpoint
from q3q.models.decoder import load_decoder
from q3q.number_formats import BLOCKS, FLOATS, FORMATS
from q3q.numerics.floats import floats_per_token
from q3q.quantize.methods.settings import SETTINGS
from q3q.report.measures import labels
from q3q.scheme import ACTIVATION_KEYS
from q3q.spec import SELDOM_OF_SCHEME, Scheme, TrialSpec
from q3q.track.mlflow_fields import trial_params
from tests.composed import compose as composed


@pytest.fixture(name="compose")
def fixture_compose(tmp_path):
    def compose(*words):
        settings = [schema.with_plain_keys(word) for word in words]
        # `storage` first: a test may name another.
        return resolve.trial_from(
            composed("config", [f"storage={tmp_path}", "evaluation=none", *settings])
        )

    return compose


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        ("method=rtn format=nvfp4", "rtn nvfp4 g16"),
        ("method=rtn format=nvfp4 four_over_six=true", "rtn nvfp4 4/6 g16"),
        ("method=gptq format=fp8_e4m3", "gptq fp8 pc"),
        ("method=gptq format=fp8_e5m2 group_size=32", "gptq fp8_e5m2 g32"),
        ("method=rtn format=fp8_e4m3 group_rows=-1", "rtn fp8 pt"),
        ("method=rtn format=fp8_e4m3 group_size=128 group_rows=128", "rtn fp8 128x128"),
        ("method=rtn format=mxfp6 act_format=mxfp8", "rtn mxfp6 amxfp8 g32"),
        ("method=rtn bits=4 act_format=fp8_e4m3", "rtn w4afp8 g128"),
        ("method=rtn bits=8 act_bits=8 act_group_size=64", "rtn w8a8g64 g128"),
        (
            "method=rtn format=nvfp4 act_format=nvfp4 act_scales=calibrated calibration=demo",
            "rtn nvfp4 anvfp4 calibrated g16",
        ),
        ("method=smoothquant format=fp8_e4m3", "smoothquant fp8 afp8 pc"),
        ("method=smoothquant format=fp8_e4m3 act_bits=8", "smoothquant fp8 a8 pc"),
        ("method=smoothquant format=mxfp4 act_bits=16", "smoothquant mxfp4 g32"),
        ("method=gptq format=q4_k", "gptq q4_k g32"),
        ("method=awq format=q8_0", "awq q8_0 g32"),
    ],
)
def test_a_format_brings_its_bits_and_groups(compose, overrides, name):
    trial = compose(*overrides.split())
    assert trial.spec.name == name
    again = TrialSpec.from_json(trial.spec.to_json())
    assert again == trial.spec
    assert again.id == trial.spec.id
    assert compose(*shlex.split(command_of(trial))[2:]).spec.id == trial.spec.id


@pytest.mark.parametrize(
    ("words", "changes", "name"),
    [
        (
            "bits=4 overrides={blocks.0.o:{format:nvfp4}}",
            {"group_size": 16, "symmetric": True, "format": "nvfp4"},
            "blocks.0.o:nvfp4",
        ),
        (
            "format=nvfp4 overrides={blocks.0.o:{format:int,bits:8,symmetric:true,group_size:32}}",
            {"bits": 8, "group_size": 32, "format": "int"},
            "blocks.0.o:intw8g32sym",
        ),
        (
            "format=mxfp4 act_format=mxfp4 overrides={*.o:{format:fp8_e4m3},blocks.0.o:"
            "{act_format:fp8_e4m3},blocks.?.o:{format:mxfp8}}",  # the last that matches wins
            {"bits": 8, "format": "mxfp8", "act_bits": 8, "act_format": "fp8_e4m3"}
            | {"act_group_size": -1},
            "*.o:fp8 blocks.0.o:afp8 blocks.?.o:mxfp8",
        ),
        (
            "format=mxfp4 act_format=mxfp4 overrides={blocks.0.o:{act_bits:16}}",
            {"act_bits": None, "act_format": "int", "act_group_size": -1},
            "blocks.0.o:a16",
        ),
    ],
)
def test_some_layers_take_another_format_with_its_own_bits_and_groups(
    compose, words, changes, name
):
    trial = compose("method=rtn", *words.split())
    spec = trial.spec
    assert spec.overrides["blocks.0.self_attn.o_proj"] == changes
    assert spec.departures == name
    schemes = TrialSpec.from_json(spec.to_json()).schemes
    assert schemes is not None
    assert schemes.of("blocks.0.self_attn.o_proj") == Scheme(**{**asdict(spec.scheme), **changes})
    assert compose(*shlex.split(command_of(trial))[2:]).spec.id == spec.id
    if not changes.keys() - set(ACTIVATION_KEYS):  # which come after the quantization
        plain = compose("method=rtn", "format=mxfp4", "act_format=mxfp4").spec
        assert spec.quantization_id == plain.quantization_id
        assert spec.id != plain.id


def test_each_site_reads_its_input_rounded_as_its_own_layers_say(compose):
    trial = compose(
        "method=rtn",
        "format=mxfp4",
        "act_format=mxfp4",
        "overrides={*.o:{act_format:fp8_e4m3},*.down:{act_bits:16}}",
        "skip=[blocks.1.o]",
    )
    model = load_decoder(Checkpoint(trial.placement.model), torch.float32)
    set_activations(model, trial.spec)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    for k in range(2):
        block = model.blocks[k]
        sites = {site.name: site for site in block.sites}
        mx = floats_per_token(x, FLOATS["mxfp4"], 32)
        for copy in (block, block.with_weights({})):
            assert torch.equal(copy.round_inputs(sites["qkv"], x), mx)
            assert torch.equal(copy.round_inputs(sites["down"], x), x)
            own = x if k else floats_per_token(x, FLOATS["fp8_e4m3"], -1)
            assert torch.equal(copy.round_inputs(sites["o"], x), own)


def test_a_scheme_of_whole_numbers_says_nothing_of_formats(compose):
    spec = compose("method=gptq", "bits=4").spec
    assert not set(SELDOM_OF_SCHEME) & spec.to_json()["scheme"].keys()
    assert not set(SELDOM_OF_SCHEME) & spec.to_json(complete=True)["scheme"].keys()
    assert "format" not in trial_params(spec)


def test_activations_are_no_part_of_the_quantization(compose):
    plain, rounded, other = (
        compose("method=rtn", "format=fp8_e4m3", f"act_format={act}").spec
        for act in ("null", "fp8_e4m3", "mxfp8")
    )
    assert plain.quantization_id == rounded.quantization_id == other.quantization_id
    assert len({plain.id, rounded.id, other.id}) == 3
    grouped = compose(
        "method=rtn", "format=fp8_e4m3", "act_format=fp8_e4m3", "act_group_size=32"
    ).spec
    assert grouped.id not in {plain.id, rounded.id}
    params = trial_params(grouped)
    assert params["format"] == "fp8_e4m3"
    assert params["act_group_size"] == "32"


def test_static_groups_is_no_setting_of_formats_whose_groups_are_always_static(compose):
    words = ("method=gptq", "format=mxfp4")
    default, given = (compose(*words, *more).spec for more in ((), ("method.static_groups=false",)))
    assert default.id == given.id
    assert "static_groups" not in default.method.knobs
    [line] = without_effect(
        OverridesParser.create().parse_overrides([*words, "method.static_groups=false"]), [given]
    )
    assert line == (
        "method.static_groups=false has no effect: groups of format=mxfp4 are always static runs "
        "of neighbours"
    )
    other = compose("method=gptq", "format=fp8_e4m3", "group_size=32").spec
    assert other.method.knobs["static_groups"] is False
    assert "method.static_groups" not in unread(other)


def test_labels_name_every_format_but_whole_numbers(compose):
    specs = [
        compose("method=rtn", f"format={form}", "group_size=null").spec
        for form in ("int", "nvfp4", "fp8_e4m3")
    ]
    assert labels(specs) == ["rtn g128", "rtn nvfp4", "rtn fp8 pc"]
    assert labels(specs[1:2]) == ["rtn nvfp4"]
    acts = [
        compose("method=rtn", "format=mxfp4", f"act_format={act}").spec for act in ("null", "mxfp8")
    ]
    assert labels(acts) == ["rtn mxfp4 a16", "rtn mxfp4 amxfp8"]


@pytest.mark.parametrize(
    ("overrides", "error", "words"),
    [
        (
            "format=mxfp4 group_size=128",
            ConfigError,
            "group_size=128: groups of format=mxfp4 have 32",
        ),
        ("format=fp8_e4m3 bits=3", ConfigError, "bits=3: numbers of format=fp8_e4m3 have 8 bits"),
        ("format=fp8", ConfigError, "format=fp8 is not known.*fp8_e4m3"),
        ("format=nvfp4 symmetric=false", ConfigError, "even around zero; only format=int"),
        ("format=mxfp8 four_over_six=true", ConfigError, "is for format=nvfp4"),
        ("format=q4_k symmetric=true", ConfigError, "groups of format=q4_k have offsets"),
        ("format=q4_0 symmetric=false", ConfigError, "groups of format=q4_0 have no offsets"),
        ("format=q6_k group_size=32", ConfigError, "groups of format=q6_k have 16"),
        ("act_format=q8_0", ConfigError, "act_format=q8_0 is not known"),
        ("format=q4_k method.mse=true", IncompatibleError, "mse=true has no effect with"),
        ("format=q4_k export=gptq", IncompatibleError, "format=q4_.*these can: export=hf, gguf"),
        ("format=mxfp4 export=gguf", IncompatibleError, "format=mxfp4 .it takes format=q8_0"),
        ("four_over_six=true", ConfigError, "no effect with format=int"),
        ("group_rows=128", ConfigError, "no effect with format=int; it is for format=fp8"),
        ("format=nvfp4 group_rows=16", ConfigError, "lie in one row"),
        ("format=fp8_e4m3 group_rows=0", ConfigError, "group_rows=0: give a positive number"),
        ("act_format=nvfp4 act_group_size=32", ConfigError, "groups of act_format=nvfp4 have 16"),
        ("act_format=mxfp8 act_scales=calibrated", ConfigError, "is for act_format=nvfp4, .* not"),
        ("act_scales=stored", ConfigError, "act_scales=stored is not known.*dynamic, calibrated"),
        ("act_format=mxfp8 act_bits=4", ConfigError, "act_bits=4: numbers of act_format=mxfp8"),
        ("act_group_size=32", ConfigError, "no effect without act_format="),
        ("act_bits=8 act_group_size=100", ConfigError, "act_group_size=100 does not divide"),
        ("method=none act_format=mxfp8", IncompatibleError, "act_format=mxfp8 has no effect"),
        (
            "method=billm format=mxfp4",
            IncompatibleError,
            "format=mxfp4; it takes format=int",
        ),
        (
            "format=nvfp4 four_over_six=true method.mse=true",
            IncompatibleError,
            "four_over_six=true chooses",
        ),
        (
            "method=awq format=fp8_e4m3 group_rows=-1",
            IncompatibleError,
            "give method.clip=false",
        ),
        ("format=fp8_e4m3 export=gptq", IncompatibleError, "format=fp8_e4m3.*these can: export=hf"),
        ("act_format=fp8_e4m3 export=hf", IncompatibleError, "act_format=fp8_e4m3.*no format can"),
        (
            "format=nvfp4 overrides={blocks.0:{bits:8}}",
            ConfigError,
            "bits=8: numbers of format=nvfp4",
        ),
        ("overrides={blocks.0:{format:fp9}}", ConfigError, "format=fp9 is not known"),
        (
            "bits=4 overrides={blocks.0:{format:mxfp4,group_size:64}}",
            ConfigError,
            "overrides: blocks.0: group_size=64: groups of format=mxfp4 have 32",
        ),
        (
            "act_bits=8 overrides={*.q_proj:{act_format:mxfp8}}",
            IncompatibleError,
            "what all linears of a site read: give all of qkv of blocks 0-5 the same",
        ),
    ],
)
def test_nonsense_is_refused_with_what_is_possible(compose, overrides, error, words):
    with pytest.raises(error, match=words) as raised:
        compose(*overrides.split())
    assert "\n" not in str(raised.value)


def test_groups_of_activations_must_fit_the_linears_that_are_quantized_alone(compose):
    words = ("method=rtn", "act_bits=8", "act_group_size=256")  # of 256, 384 and 640 columns
    with pytest.raises(ConfigError, match="does not divide"):
        compose(*words, "skip=[*.down_proj]")
    assert compose(*words, "skip=[*.o_proj,*.down_proj]").spec.scheme.act_group_size == 256


def test_linears_that_do_not_fill_ggufs_blocks_take_smaller_ones(compose):
    """Of the demo model's widths 256 divides one; o and down have 384 and 640 columns."""
    spec = compose("method=rtn", "format=q4_k", "skip=[blocks.0.down]").spec
    schemes = spec.schemes
    assert schemes is not None
    found = {
        name: schemes.of(f"blocks.{name}") for name in ("1.self_attn.q_proj", "1.mlp.down_proj")
    }
    assert [scheme and scheme.format for scheme in found.values()] == ["q4_k", "q4_1"]
    assert schemes.of("blocks.0.mlp.down_proj") is None
    again = TrialSpec.from_json(spec.to_json()).schemes
    assert again is not None
    down = again.of("blocks.2.mlp.down_proj")
    assert down is not None
    assert down.bits == 4
    narrow = compose("method=rtn", "format=q5_k").spec.schemes.of("blocks.0.self_attn.o_proj")
    assert (narrow.format, narrow.bits, narrow.symmetric) == ("q8_0", 8, True)


def test_the_table_of_formats_is_whole():
    for name, block in BLOCKS.items():
        scheme = Scheme(
            bits=block.bits, group_size=block.group_size, symmetric=not block.offsets, format=name
        )
        able = {method for method, kind in SETTINGS.items() if kind().clash(scheme) is None}
        own = set() if block.offsets else {"smoothquant"}  # which has no place for offsets
        assert able == {"rtn", "gptq", "awq"} | own
    for name, form in FLOATS.items():
        scheme = Scheme(
            bits=form.bits, group_size=form.group_size or -1, symmetric=True, format=name
        )
        able = {method for method, kind in SETTINGS.items() if kind().clash(scheme) is None}
        assert able == {"rtn", "gptq", "awq", "smoothquant"}
    assert FORMATS[0] == "int"
