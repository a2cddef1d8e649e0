"""What a format cannot hold is refused at composition; the docs' table; bytes by the layouts."""

import json
import re
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest

from q3q.config import resolve
from q3q.errors import ConfigError, ExportError, IncompatibleError
from q3q.export.formats import FORMATS, schemes_of, stored_scales
from q3q.export.layouts import group_of
from q3q.export.reload.configs import AS_IT_IS, UNPACKED, Group, groups_of, reading_of
from q3q.export.table import table
from q3q.export.tensors import expected_bytes
from q3q.models.checkpoint import Checkpoint
from q3q.models.published.compressed_tensors import read_compressed_tensors
from q3q.spec import TrialSpec
from tests.composed import composed_trial
from tests.export.conftest import DEMO

ROOT = Path(__file__).parents[2]


@pytest.fixture
def trial(tmp_path):
    return partial(composed_trial, "evaluation=none", f"storage={tmp_path}/s")


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "conf" / "export").glob("*.yaml")))
def test_every_export_config_becomes_a_spec(trial, name):
    types = ["format=q4_k"] if name == "gguf" else []
    spec = trial("method=rtn", f"export={name}", *types).spec
    assert spec.export == (None if name == "none" else name)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["method=gptq", "export=compressed_tensors"],
            "act-order.*static_groups=true.*these can: export=hf, gptq",
        ),
        (
            ["method=gptq", "export=awq", "method.static_groups=true", "bits=3"],
            "bits=3.*hf, compressed_tensors, gptq",
        ),
        (
            ["method=rtn", "export=gptq", "bits=5"],
            "bits=5.*it takes 2, 3, 4, 8.*hf, compressed_tensors",
        ),
        (["method=billm", "export=gptq"], "binarized.*these can: export=hf"),
        (["method=smoothquant", "export=hf"], "act_bits=8.*these can: export=compressed_tensors"),
        (
            ["method=smoothquant", "bits=4", "export=compressed_tensors"],
            "act_bits=8.*no format can",
        ),
        (
            ["method=rtn", "export=gptq", "symmetric=true", "overrides={*.down:{bits:8}}"],
            "overrides; these can: export=hf, compressed_tensors",
        ),
        (
            ["method=rtn", "export=awq", "head_bits=8", "embedding_bits=8"],
            "head or embedding.*these can: export=hf",
        ),
        (["method=none", "export=hf"], "no effect"),
        (
            ["model=demo_moe", "method=rtn", "export=awq", "skip=[*.down]"],
            "overrides or skip.*these can: export=hf",
        ),
        (
            ["model=demo_moe", "method=rtn", "export=compressed_tensors", "skip=[*.down]"],
            "experts, which loaders fuse",
        ),
        (
            ["method=rtn", "export=compressed_tensors", "skip=[*.q_proj]"],
            r"within a site \(blocks.0.qkv\).*export=hf",
        ),
        (
            [
                "method=rtn",
                "export=compressed_tensors",
                "overrides={blocks.2.mlp.up_proj:{bits:8}}",
            ],
            r"within a site \(blocks.2.gate_up\).*export=hf",
        ),
        (
            ["method=rtn", "export=compressed_tensors", "overrides={*.down:{bits:8}}"],
            "several settings when any is asymmetric.*these can: export=hf",
        ),
        (
            [
                "method=rtn",
                "symmetric=true",
                "export=compressed_tensors",
                "overrides={*.down:{symmetric:false}}",
            ],
            "several settings when any is asymmetric.*these can: export=hf",
        ),
        (
            ["method=rtn", "export=compressed_tensors", "format=nvfp4", "act_format=nvfp4"],
            r"act_format=nvfp4 with a factor per token .*: act_scales=calibrated\).*no format can",
        ),
        (
            ["method=rtn", "export=compressed_tensors", "format=mxfp4", "act_format=mxfp8"],
            "act_format=mxfp8 with format=mxfp4 .it takes act_format=mxfp4 or act_format=fp8_e4m3",
        ),
        (
            ["method=rtn", "export=compressed_tensors", "format=fp8_e5m2"],
            r"format=fp8_e5m2 \(it takes int, fp8_e4m3, mxfp8, .*these can: export=hf",
        ),
        (
            ["method=rtn", "export=compressed_tensors", "format=fp8_e4m3", "group_rows=16"],
            "group_rows=16 with group_size=-1 .it takes a scale for each row",
        ),
        (["method=rtn", "export=awq", "format=nvfp4"], r"format=nvfp4 \(it takes int\)"),
        (
            ["method=gptq", "export=compressed_tensors", "format=fp8_e4m3", "group_size=64"],
            "act-order's groups of columns that lie apart",
        ),
        (
            ["method=smoothquant", "export=compressed_tensors", "overrides={blocks.1:{bits:4}}"],
            "act_bits=8 with these weights.*no format can",
        ),
    ],
)
def test_what_a_format_cannot_hold_is_refused_naming_those_that_can(trial, overrides, says):
    with pytest.raises(IncompatibleError, match=says):
        trial(*overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["symmetric=true", "overrides={*.down:{bits:8,group_size:64}}"],
        ["overrides={blocks.*:{bits:8}}"],  # of every linear: one setting
        ["skip=[*.down]"],
    ],
)
def test_settings_that_every_loader_tells_apart_are_not_refused(trial, overrides):
    assert (
        trial("method=rtn", "export=compressed_tensors", *overrides).spec.export
        == "compressed_tensors"
    )


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("settings", [1, 2])
@pytest.mark.parametrize("method", ["rtn", "smoothquant"])
def test_what_transformers_reads_wrong_of_a_dense_model_is_refused(
    trial, method, settings, symmetric
):
    overrides = [f"method={method}", "bits=8", f"symmetric={symmetric}"]
    overrides += ["overrides={*.down:{group_size:64}}"] if settings == 2 else []
    groups = [Group(8, False, symmetric, rounded=method == "smoothquant")] * settings
    if reading_of(groups, experts=False, dtype="float32") is None:
        with pytest.raises(IncompatibleError):
            trial("export=compressed_tensors", *overrides)


def test_what_it_does_not_take_of_experts_the_table_says():
    def takes(*words, **kind):
        return reading_of([Group(*words, **kind)], experts=True, dtype="bfloat16") is not None

    kinds = [(symmetric, rounded) for symmetric in (True, False) for rounded in (False, True)]
    whole = [takes(4, False, symmetric, rounded=rounded) for symmetric, rounded in kinds]
    assert whole == [True, False, False, False]
    assert takes(8, True, True, rounded=True, wide_groups=True)
    assert not takes(8, True, True)  # groups or blocks
    assert not takes(8, True, True, scales="e8m0")
    assert not takes(4, True, True, scales="e4m3")
    assert "experts: int symmetric, weights only, and `fp8_e4m3` with one scale per row" in table()


FLOATS = [
    "format=fp8_e4m3",
    "format=fp8_e4m3 group_rows=-1 act_format=fp8_e4m3",
    "format=fp8_e4m3 group_size=128 group_rows=128 act_format=fp8_e4m3 act_group_size=128",
    "format=mxfp8 act_format=mxfp8",
    "format=mxfp6",
    "format=mxfp4 act_format=mxfp4",
    "format=nvfp4",
    "format=nvfp4 act_format=nvfp4 act_scales=calibrated calibration=demo",
    "bits=4 symmetric=true overrides={*.down:{format:nvfp4}}",
]


@pytest.mark.parametrize("words", FLOATS)
def test_the_config_says_of_floats_what_the_refusals_assume(trial, words):
    """What `formats` takes for granted of a config is what a reader finds in the written one."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    arguments = import_module("q3q.export.compressed_tensors")._arguments
    spec = trial("method=rtn", "export=compressed_tensors", *words.split()).spec
    facts = Checkpoint(DEMO).facts
    layout_of = FORMATS["compressed_tensors"].layout
    assert layout_of is not None
    layouts = [layout_of(scheme) for scheme in schemes_of(spec, facts)]
    written = quantization.QuantizationConfig(
        config_groups={
            f"group_{k}": quantization.QuantizationScheme(targets=["Linear"], **arguments(layout))
            for k, layout in enumerate(layouts)
        }
    )
    packed = json.loads(written.model_dump_json())
    assert groups_of(packed) == [group_of(layout) for layout in layouts]
    rules = read_compressed_tensors(packed).rules
    assert {layout for _, layout in rules if layout is not None} == set(layouts)


@pytest.mark.parametrize(
    ("words", "reading"),
    [
        ("format=fp8_e4m3", AS_IT_IS),
        ("format=nvfp4", UNPACKED),  # the demo model is float32
        ("format=mxfp4 dtype=bfloat16", AS_IT_IS),
        ("bits=4 symmetric=true overrides={*.down:{format:nvfp4}}", None),
        ("bits=4 symmetric=true overrides={*.down:{format:nvfp4}} dtype=bfloat16", AS_IT_IS),
    ],
)
def test_the_plan_says_how_transformers_reads_floats(trial, capsys, words, reading):
    resolve._note_once.cache_clear()
    trial("method=rtn", "export=compressed_tensors", *words.split())
    said = capsys.readouterr().err
    assert ("dequantize=True" in said) == (reading == UNPACKED)
    assert ("does not load in transformers" in said) == (reading is None)


def test_scales_are_part_of_the_quantization_and_the_format_is_part_of_the_trial(trial):
    alone, gptq, awq, hf = (
        trial("method=awq", f"export={name}").spec for name in ("none", "gptq", "awq", "hf")
    )
    assert len({spec.id for spec in (alone, gptq, awq, hf)}) == 4
    assert (
        alone.quantization_id == hf.quantization_id
    )  # plain numbers: nothing is rounded that was not
    assert gptq.quantization_id == awq.quantization_id != alone.quantization_id
    assert TrialSpec.from_json(gptq.to_json()) == gptq
    assert stored_scales("gptq", "bfloat16") == "bfloat16 float16"
    assert stored_scales("compressed_tensors", "bfloat16") == "bfloat16"


def test_bad_destinations_are_refused_before_anything_runs(trial, tmp_path, monkeypatch):
    taken = tmp_path / "taken"
    taken.mkdir()
    with pytest.raises(ExportError, match=r"taken is there already"):
        trial("method=rtn", "export=hf", f"export.path={taken}")
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(ExportError, match=r"file is not a folder"):
        trial("method=rtn", "export=hf", f"export.path={file}/out")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(ExportError, match="not writable"):
        trial("method=rtn", "export=hf", f"export.path={tmp_path}/out")
    monkeypatch.undo()
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10**6})())
    with pytest.raises(ExportError, match=r"needs .* MB and .* has 1.00 MB free"):
        trial("method=rtn", "export=hf", f"export.path={tmp_path}/out")


def test_settings_that_nobody_would_read_are_refused(trial):
    with pytest.raises(ConfigError, match="not read by export=none"):
        trial("method=rtn", "export.path=out")
    with pytest.raises(ConfigError, match="Choose from: none, hf"):
        trial("method=rtn", "export=hf", "export.name=onnx")


def test_the_page_has_the_table_of_what_is_refused():
    assert table() in (ROOT / "docs" / "EXPORT.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["method=gptq", "export=gptq"],
            "export=gptq with symmetric=false, which is gptq_v2.*export=hf",
        ),
        (
            ["method=rtn", "export=gptq"],
            "to serve these settings: export=hf or compressed_tensors or awq",
        ),
        (["method=rtn", "export=awq", "group_size=64"], None),
        (["method=gptq", "export=gptq", "symmetric=true"], None),
        (
            ["model=demo_moe", "method=rtn", "export=compressed_tensors"],
            "symmetric=false of experts",
        ),
        (
            ["method=rtn", "bits=8", "export=compressed_tensors"],
            "symmetric=false and bits=8 \\(it takes 4 bits, 2 to 8 bits symmetric\\).*=hf$",
        ),
        (["method=rtn", "bits=8", "symmetric=true", "export=compressed_tensors"], None),
    ],
)
def test_who_exports_what_servers_refuse_or_misread_is_told_once(trial, capsys, overrides, says):
    resolve._note_once.cache_clear()
    for _ in range(2):
        trial(*overrides)
    lines = capsys.readouterr().err.splitlines()
    assert all(line.startswith("Note: ") for line in lines)  # it is no error: the run goes on
    notices = [line for line in lines if "vLLM" in line]
    assert len(notices) == (says is not None)
    assert says is None or re.search(says, notices[0])


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["export=compressed_tensors"], "CompressedTensorsConfig(dequantize=True)"),
        (["export=compressed_tensors", "symmetric=true"], None),
        (["export=compressed_tensors", "skip=[blocks.0.o]"], "CompressedTensorsConfig(dequantize"),
        (["export=compressed_tensors", "model=demo_moe"], "does not load in transformers"),
        (["export=compressed_tensors", "model=demo_moe", "symmetric=true"], None),
        (["export=awq"], None),
        (["export=hf"], None),
    ],
)
def test_the_plan_says_what_a_loader_has_to_be_told(trial, capsys, overrides, says):
    resolve._note_once.cache_clear()
    for _ in range(2):
        trial("method=rtn", *overrides)
    lines = [line for line in capsys.readouterr().err.splitlines() if "transformers" in line]
    assert len(lines) == (says is not None)
    assert says is None or (says in lines[0] and lines[0].startswith("Note: "))


SETTINGS = [
    ("hf", {}),
    *(
        ("gptq", {"bits": bits, "symmetric": symmetric})
        for bits in (2, 3, 4, 8)
        for symmetric in (False, True)
    ),
    ("gptq", {"group_size": -1}),
    ("awq", {}),
    ("awq", {"symmetric": True, "group_size": -1}),
    *(
        ("compressed_tensors", {"bits": bits, "symmetric": symmetric})
        for bits in range(2, 9)
        for symmetric in (False, True)
    ),
    ("compressed_tensors", {"bits": 8, "symmetric": True, "group_size": -1, "act_bits": 8}),
]


@pytest.mark.parametrize(("moe", "tied"), [(False, False), (True, True)])
@pytest.mark.parametrize(("name", "scheme"), SETTINGS)
def test_bytes_on_disk_are_those_of_the_formats_definition(
    checkpoint, trial_of, export, tmp_path, name, scheme, moe, tied
):
    pytest.importorskip("compressed_tensors")
    original = checkpoint(moe=moe, tied=tied)
    trial = trial_of(original, name, tmp_path / "out", **scheme)
    facts, spec = original.facts, trial.spec
    made, _ = export(original, trial)
    sizes = made.sizes()
    assert sizes["export_bytes"] == expected_bytes(spec, facts)
    assert sizes["model_bytes"] == sizes["export_bytes"]
    if name == "hf":
        assert sizes["export_bytes"] == 2 * facts.parameters
        assert "bits_per_weight" not in sizes  # no codes are stored
        return
    bits, group, acts = spec.scheme.bits, spec.scheme.group_size, spec.scheme.act_bits
    # Codes, whose rows all fill whole words here, and a 16-bit scale a group; if the format has
    # zero points, they have as many bits as a code; GPTQ's group index of each column, and the
    # shape that compressed-tensors stores.
    packed = 0
    for rows, columns in matrices(facts):
        groups = rows * (1 if group == -1 else columns // group)
        packed += rows * columns * bits // 8 + 2 * groups
        packed += (
            groups * bits // 8 if name != "compressed_tensors" or not spec.scheme.symmetric else 0
        )
        packed += {"gptq": 4 * columns, "awq": 0, "compressed_tensors": 0 if acts else 16}[name]
    linears = facts.linear_parameters
    assert sizes["bits_per_weight"] == pytest.approx(8 * packed / linears)
    assert sizes["model_bytes"] == packed + 2 * (facts.parameters - linears)


def matrices(facts):
    """Rows and columns of each linear, an expert's counted by itself."""
    for k in range(facts.layers):
        for name, shape in facts.block_shapes(k).items():
            if name.endswith("_proj.weight"):
                yield from [shape[-2:]] * (shape[0] if len(shape) == 3 else 1)
