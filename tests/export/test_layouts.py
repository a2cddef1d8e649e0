"""The words on disk against each format's definition by hand and against its own library."""

import json
from importlib import import_module

import pytest
import torch
from safetensors.torch import load_file

from q3q.errors import CheckpointError
from q3q.export.layouts import compressed_layout
from q3q.export.reload import unpackers
from q3q.models.packed import AwqWords, GptqWords, PackedInts, PlainInts
from q3q.models.packed_floats import FloatLayout
from q3q.models.published.readers import read_packing
from q3q.number_formats import FLOATS as NUMBERS
from q3q.numerics.float_weights import FloatWeight
from q3q.numerics.grid import into_groups
from q3q.numerics.weights import with_scales
from q3q.quantize.method import levels_for
from q3q.spec import Scheme


def random_parts(bits, rows=32, columns=64, groups=4, *, symmetric=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (rows, columns), generator=generator).to(torch.uint8)
    zero = torch.randint(2**bits, (rows, groups), generator=generator).float()
    if symmetric:
        zero = torch.full_like(zero, 2 ** (bits - 1))
    return codes, (torch.rand(rows, groups, generator=generator) + 0.1).half(), zero


def plain(codes, scale, zero, group=None):
    group = (
        torch.arange(codes.shape[1]) // (codes.shape[1] // scale.shape[1])
        if group is None
        else group.long()
    )
    return scale.float()[:, group] * (codes.float() - zero[:, group])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("below", [0, 1])
def test_gptq_reads_back_what_it_wrote_whatever_the_grouping(bits, below):
    codes, scale, zero = random_parts(bits)
    group = (torch.randperm(64, generator=torch.Generator().manual_seed(1)) // 16).int()
    for group_I in (None, group):
        layout = GptqWords(bits, 16, False, below=below)
        parts = layout.pack(codes, scale, zero, group_I)
        assert {name: tuple(t.shape) for name, t in parts.items()} == {
            name: shape for name, (_, shape) in layout.parts(32, 64).items()
        }
        assert torch.equal(layout.unpack(parts, 32, 64), plain(codes, scale, zero, group_I))


def test_gptqs_first_version_stores_zero_points_less_one():
    codes, scale, zero = random_parts(4, symmetric=True)
    first = GptqWords(4, 16, True, below=1).pack(codes, scale, zero, None)
    assert set(first["qzeros"].flatten().tolist()) == {0x77777777}
    second = GptqWords(4, 16, True, below=0).pack(codes, scale, zero, None)
    assert set(second["qzeros"].flatten().tolist()) == {0x88888888 - 2**32}
    # The code of column i, row o, is four bits of word i // 8.
    assert (int(first["qweight"][1, 3]) >> (4 * 2)) & 15 == int(codes[3, 10])


def test_awq_packs_rows_in_its_own_order():
    codes, scale, zero = random_parts(4)
    parts = AwqWords(4, 16, False).pack(codes, scale, zero, None)
    for number, shift in enumerate(
        (0, 16, 4, 20, 8, 24, 12, 28)
    ):  # number 1 lies in the fifth four bits
        assert (int(parts["qweight"][5, 2]) >> shift) & 15 == int(codes[16 + number, 5])
        assert (int(parts["qzeros"][3, 1]) >> shift) & 15 == int(zero[8 + number, 3])
    assert torch.equal(AwqWords(4, 16, False).unpack(parts, 32, 64), plain(codes, scale, zero))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_packed_ints_are_the_compressed_tensors_librarys(bits, symmetric):
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    codes, scale, zero = random_parts(bits, symmetric=symmetric)
    layout = PackedInts(bits, 16, symmetric)
    parts = layout.pack(codes, scale, zero, None)
    args = quantization.QuantizationArgs(
        num_bits=bits, group_size=16, strategy="group", symmetric=symmetric
    )
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=args)
    compressor = compressors.BaseCompressor.get_value_from_registry("pack-quantized")
    numbers = plain(codes, scale, zero)
    offset = {"weight_zero_point": (zero - 2 ** (bits - 1)).to(torch.int8)}
    theirs = compressor.compress({"weight": numbers, "weight_scale": scale, **offset}, scheme)
    for name, tensor in parts.items():
        assert torch.equal(tensor, theirs[name]), name
    assert torch.equal(layout.unpack(parts, 32, 64), numbers)


FLOATS = [
    ("fp8_e4m3", -1, 1),
    ("fp8_e4m3", -1, -1),
    ("fp8_e4m3", 16, 1),
    ("fp8_e4m3", 16, 24),  # of 32 rows: the last block has 8
    ("mxfp8", 32, 1),
    ("mxfp6", 32, 1),
    ("mxfp4", 32, 1),
    ("nvfp4", 16, 1),
]


@pytest.mark.parametrize(("name", "size", "rows"), FLOATS)
def test_floats_are_the_compressed_tensors_librarys(name, size, rows):
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    exporter = import_module("q3q.export.compressed_tensors")
    form = NUMBERS[name]
    scheme = Scheme(bits=form.bits, group_size=size, symmetric=True, format=name, group_rows=rows)
    weight = torch.randn(1, 32, 64, generator=torch.Generator().manual_seed(0))
    weight[0, 3, :40] = 0  # a group of zeros, and one in part
    weight[0, 5] *= 1e-3
    levels, groups = levels_for(scheme, weight), into_groups(weight, size)
    stored = with_scales(levels.rounded(groups, levels.minmax(groups)), "bfloat16")
    layout = compressed_layout(scheme)
    assert isinstance(stored, FloatWeight)
    assert isinstance(layout, FloatLayout)
    factor = stored.global_EO
    parts = layout.pack_floats(
        stored.codes_EOI[0],
        stored.stored_scale_EOG[0],
        None if factor is None else factor[0, :1],
    )
    assert {part: tuple(tensor.shape) for part, tensor in parts.items()} == {
        part: shape for part, (_, shape) in layout.parts(32, 64).items()
    }
    args = exporter._arguments(layout)
    described = quantization.QuantizationScheme(targets=["Linear"], **args)
    compressor = compressors.BaseCompressor.get_value_from_registry(args["format"])
    # Where scales were rounded after the codes were chosen, the library is given what they say.
    exact = stored.dequantize() if form.scale == "float" else weight
    given = {"weight": exact[0], "weight_scale": _scales(stored, layout)}
    if factor is not None:
        given["weight_global_scale"] = factor[0, :1]
    theirs = compressor.compress(given, described)
    assert parts.keys() == theirs.keys()
    for part, tensor in parts.items():
        bytes_of = [t.contiguous().view(torch.uint8) for t in (tensor, theirs[part])]
        assert torch.equal(*bytes_of), part
        assert part == "weight_scale" or tensor.dtype == theirs[part].dtype
    unpacked = compressor.decompress(parts, described)["weight"].float()
    assert torch.equal(unpacked, stored.dequantize()[0])
    assert torch.equal(layout.unpack(parts, 32, 64), stored.dequantize()[0])
    packed = {"config_groups": {"group_0": json.loads(described.model_dump_json())}}
    assert torch.equal(unpackers.from_floats(parts, packed).float(), stored.dequantize()[0])


def _scales(stored, layout):
    """The scales as the library's own quantizer would have them: numbers, with the factor in."""
    if stored.global_EO is None:
        return layout._shared_scales(stored.scale_EOG[0])
    return (stored.scale_EOG * stored.global_EO[..., None])[0]


def test_plain_ints_are_signed_bytes():
    codes, scale, zero = random_parts(8, groups=1, symmetric=True)
    parts = PlainInts(8, -1, True, 8).pack(codes, scale, zero, None)
    assert parts["weight"].dtype == torch.int8
    assert torch.equal(parts["weight"].int(), codes.int() - 128)
    assert torch.equal(PlainInts(8, -1, True).unpack(parts, 32, 64), plain(codes, scale, zero))


def test_a_layout_without_a_group_index_does_not_drop_one():
    codes, scale, zero = random_parts(4)
    with pytest.raises(ValueError, match="group index"):
        AwqWords(4, 16, False).pack(codes, scale, zero, torch.zeros(64))


def test_signed_bytes_do_not_drop_zero_points():
    codes, scale, zero = random_parts(8, groups=1)
    with pytest.raises(ValueError, match="no place for zero points"):
        PlainInts(8, -1, True, 8).pack(codes, scale, zero, None)


def w8a8(**how):
    weights = {"type": "int", "num_bits": 8, "strategy": "channel", "symmetric": True}
    inputs = {"type": "int", "num_bits": 8, "strategy": "token", "dynamic": True}
    group = {
        "targets": ["Linear"],
        "weights": weights,
        "input_activations": inputs,
        "format": "int-quantized",
    }
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, **how}


def test_whose_inputs_are_rounded_is_read_from_what_is_ignored():
    packing = read_packing(
        w8a8(ignore=["lm_head", "model.layers.0.self_attn.q_proj", r"re:.*layers\.1\..*o_proj$"])
    )
    rounded = packing.inputs(["model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj"])
    assert rounded is not None
    assert (rounded.bits, rounded.format, rounded.scales) == (8, "int", "dynamic")
    assert packing.inputs(["model.layers.1.self_attn.o_proj"]) is None
    with pytest.raises(
        CheckpointError,
        match=r"q_proj reads its input unrounded and .*k_proj reads the same one rounded",
    ):
        packing.inputs(["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"])


def test_a_name_goes_before_a_class_and_what_is_ignored_before_both():
    config = w8a8(ignore=["model.layers.0.mlp.down_proj"])
    first = config["config_groups"]["group_0"]
    named = {**first, "targets": ["model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"]}
    named["weights"] = {**first["weights"], "num_bits": 4}
    packing = read_packing({**config, "config_groups": {"group_0": first, "group_1": named}})
    assert packing.of("model.layers.0.mlp.down_proj") is None
    for layer, bits in ((0, 4), (10, 8)):
        layout = packing.of(f"model.layers.{layer}.mlp.up_proj")
        assert layout is not None
        assert layout.bits == bits


@pytest.mark.parametrize(
    "config",
    [
        {"quant_method": "hqq"},
        {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 0.0},
        {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": 128,
            "sym": True,
            "checkpoint_format": "marlin",
        },
        {"quant_method": "gptq", "bits": 16, "group_size": 128, "sym": True},
        {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemv"},
        {"quant_method": "awq", "bits": 8, "group_size": 128, "version": "gemm"},
        {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {"a": {"targets": []}},
        },
        w8a8(transform_config={"config_groups": {"u": {"type": "hadamard"}}}),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(config):
    with pytest.raises(CheckpointError, match=f"quantized already \\({config['quant_method']}"):
        read_packing(config)


@pytest.mark.parametrize(
    ("order", "read"), [(None, True), ("weight", True), ("group", False), ("dynamic", False)]
)
def test_groups_of_columns_that_lie_apart_are_not_read_as_neighbours(order, read):
    weights = {
        "type": "int",
        "num_bits": 4,
        "strategy": "group",
        "group_size": 32,
        "symmetric": True,
    }
    group = {
        "targets": ["Linear"],
        "weights": {**weights, "actorder": order},
        "format": "pack-quantized",
    }
    config = {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": group},
        "transform_config": {},
    }
    if read:
        assert read_packing(config).of("model.layers.0.mlp.up_proj") == PackedInts(4, 32, True)
    else:
        with pytest.raises(CheckpointError, match="q3q cannot read"):
            read_packing(config)


def test_awq_names_its_routers_in_full(exported):
    made, _ = exported("awq", kind={"moe": True})
    described = json.loads((made.path / "config.json").read_text())["quantization_config"]
    assert described["modules_to_not_convert"] == [
        "model.layers.0.mlp.gate",
        "model.layers.1.mlp.gate",
    ]
    assert read_packing(described).of("model.layers.1.mlp.gate") is None
    assert read_packing(described).of("model.layers.1.mlp.experts.0.gate_proj") is not None


def test_files_and_config_are_what_loaders_expect(exported):
    made, _ = exported("gptq", kind={"moe": True}, how={"act_order": True}, symmetric=True)
    config = json.loads((made.path / "config.json").read_text())
    described = config["quantization_config"]
    assert described == json.loads((made.path / "quantize_config.json").read_text())
    assert (described["checkpoint_format"], described["desc_act"], described["sym"]) == (
        "gptq",
        True,
        True,
    )
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    index = json.loads((made.path / "model.safetensors.index.json").read_text())["weight_map"]
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        assert f"model.layers.1.mlp.experts.3.gate_proj.{part}" in index
    assert "model.layers.0.mlp.gate.weight" in index  # the router stays as it is
    assert "lm_head.weight" not in index  # tied
    tensors = load_file(made.path / index["model.layers.0.self_attn.o_proj.scales"])
    assert tensors["model.layers.0.self_attn.o_proj.scales"].dtype == torch.float16
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "README.md"):
        assert (made.path / name).is_file()
