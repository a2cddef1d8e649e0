"""Linears as other quantizers' files hold them, against the formats' own libraries or by hand."""

import json

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils import (
    calculate_qparams,
    compute_dynamic_scales_and_zp,
    generate_gparam,
)

from q3q.errors import CheckpointError
from q3q.models.block import rounded_as
from q3q.models.packed import Layout, doubts_of
from q3q.models.packed_tables import TableCodes
from q3q.models.published.packing import FP8_CACHE, Packing
from q3q.models.published.readers import read_packing
from q3q.scheme import InputRounding

ROWS, COLUMNS = 48, 64
NAME = "model.layers.0.mlp.down_proj"
FP8 = {"num_bits": 8, "type": "float"}
KINDS = {
    "pack-quantized": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 16},
    "int-quantized": {"num_bits": 8, "type": "int", "strategy": "channel"},
    "naive-quantized": {"num_bits": 8, "type": "int", "strategy": "channel"},
    "float-quantized": {**FP8, "strategy": "channel"},
    "float-quantized, tensor": {**FP8, "strategy": "tensor"},
    "float-quantized, block": {**FP8, "strategy": "block", "block_structure": [32, 32]},
    "naive-quantized, float": {**FP8, "strategy": "group", "group_size": 16},
    "mxfp8-quantized": {**FP8, "strategy": "group", "group_size": 32, "scale_dtype": "torch.uint8"},
    "mxfp6-pack-quantized": {**FP8, "num_bits": 6, "strategy": "group", "group_size": 32},
    "mxfp4-pack-quantized": {**FP8, "num_bits": 4, "strategy": "group", "group_size": 32},
    "nvfp4-pack-quantized": {**FP8, "num_bits": 4, "strategy": "tensor_group", "group_size": 16},
}


def layout_of(packing: Packing, name: str = NAME) -> Layout:
    """Return the layout of a linear that is quantized."""
    layout = packing.of(name)
    assert layout is not None, name
    return layout


def rounding_of(packing: Packing) -> InputRounding:
    """Return how the linear's input is rounded, where it is."""
    rounding = packing.inputs([NAME])
    assert rounding is not None
    return rounding


def weight_of(seed=0):
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed))
    return weight * torch.linspace(0.01, 3, ROWS)[:, None]


def grouped(weight, strategy, args):
    """Return each scale's numbers as a last axis, in the shape that the library's scales have."""
    if strategy == "tensor":
        return weight.reshape(1, -1)
    if strategy == "channel":
        return weight[:, None]
    if strategy == "block":
        rows, columns = args["block_structure"]
        padded = torch.nn.functional.pad(weight, (0, -COLUMNS % columns, 0, -ROWS % rows))
        tiles = padded.unflatten(0, (-1, rows)).unflatten(-1, (-1, columns))
        return tiles.transpose(1, 2).flatten(2)
    return weight.unflatten(-1, (-1, args["group_size"]))


def compressed(kind, args):
    """Return a linear's tensors as compressed-tensors stores them, what it reads, and a config."""
    weight, strategy = weight_of(), args["strategy"]
    form = kind.partition(",")[0]
    qargs = QuantizationArgs(**args)
    if "mx" in kind or "nv" in kind:
        dtype = torch.uint8 if "mx" in kind else torch.float8_e4m3fn
        qargs.scale_dtype = dtype
    parts = grouped(weight, strategy, args)
    state = {"weight": weight}
    if strategy == "tensor_group":
        state["weight_global_scale"] = generate_gparam(weight.min(), weight.max())
    scale, _ = calculate_qparams(
        parts.amin(-1), parts.amax(-1), qargs, global_scale=state.get("weight_global_scale")
    )
    state["weight_scale"] = scale
    scheme = QuantizationScheme(targets=["Linear"], weights=qargs)
    compressor = BaseCompressor.get_value_from_registry(form)
    stored = compressor.compress(state, scheme)
    read = compressor.decompress(stored, scheme)["weight"]
    group = {"targets": ["Linear"], "weights": qargs.model_dump(mode="json"), "format": form}
    config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    return stored, read, config


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_that_compressed_tensors_reads(kind):
    stored, read, config = compressed(kind, KINDS[kind])
    layout = layout_of(read_packing(config))
    parts = layout.parts(ROWS, COLUMNS)
    assert {name: shape for name, (_, shape) in parts.items()} == {
        name: tuple(tensor.shape) for name, tensor in stored.items() if name in parts
    }
    ours = layout.unpack(stored, ROWS, COLUMNS)
    assert torch.equal(ours, read.float())
    assert not torch.equal(ours, torch.zeros_like(ours))


INPUTS = {
    "fp8 token": {**FP8, "strategy": "token", "dynamic": True},
    "fp8 group": {**FP8, "strategy": "group", "group_size": 16, "dynamic": True},
    "fp8 tensor": {**FP8, "strategy": "tensor", "dynamic": False},
    "int8 tensor": {"num_bits": 8, "type": "int", "strategy": "tensor", "dynamic": False},
    "nvfp4": {
        **FP8,
        "num_bits": 4,
        "strategy": "tensor_group",
        "group_size": 16,
        "dynamic": "local",
        "scale_dtype": "torch.float8_e4m3fn",
    },
    "mxfp4": {
        **FP8,
        "num_bits": 4,
        "strategy": "group",
        "group_size": 32,
        "dynamic": True,
        "scale_dtype": "torch.uint8",
    },
}


@pytest.mark.parametrize("kind", INPUTS)
def test_inputs_are_rounded_as_compressed_tensors_rounds_them(kind):
    from dataclasses import replace

    args = QuantizationArgs(**INPUTS[kind])
    x_BTI = weight_of(3).view(2, ROWS // 2, COLUMNS)
    x_BTI[0, 0, :16] = 0  # a group without a scale
    x_BTI[0, 1, :16] *= 1e-6
    factor, number = None, None
    if kind == "nvfp4":
        factor = generate_gparam(x_BTI.min(), 0.7 * x_BTI.max())  # some scales saturate
        number = float(factor)
    if args.dynamic is False:
        scale, zero = calculate_qparams(x_BTI.min(), 0.7 * x_BTI.max(), args)
        number = float(scale)
    else:
        scale, zero = compute_dynamic_scales_and_zp(x_BTI, args, None, global_scale=factor)
    expected = fake_quantize(x_BTI, scale, zero, args, global_scale=factor)
    weights = QuantizationArgs(**KINDS["int-quantized"])
    group = {
        "targets": ["Linear"],
        "weights": weights.model_dump(mode="json"),
        "input_activations": args.model_dump(mode="json"),
        "format": "int-quantized",
    }
    packing = read_packing(
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    )
    rounding = rounding_of(packing)
    ours = rounded_as(x_BTI, replace(rounding, number=number))
    assert torch.equal(ours, expected)
    assert not torch.equal(ours, x_BTI)


def test_released_fp8_has_a_scale_for_each_block_even_where_blocks_are_cut():
    config = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [32, 32],
        "modules_to_not_convert": ["lm_head", "model.layers.0.self_attn"],
    }
    packing = read_packing(config)
    assert packing.of("model.layers.0.self_attn.q_proj") is None
    layout = layout_of(packing)
    weight = weight_of()[:40].to(torch.float8_e4m3fn)
    scale = torch.rand(2, 2, generator=torch.Generator().manual_seed(1)).bfloat16()
    assert layout.parts(40, COLUMNS)["weight_scale_inv"][1] == (2, 2)
    ours = layout.unpack({"weight": weight, "weight_scale_inv": scale}, 40, COLUMNS)
    expected = weight.float()
    for r, c in ((0, 0), (0, 1), (1, 0), (1, 1)):
        expected[32 * r : 32 * r + 32, 32 * c : 32 * c + 32] *= scale[r, c].float()
    assert torch.equal(ours, expected)
    rounding = rounding_of(packing)
    assert (rounding.format, rounding.group_size, rounding.scales) == ("fp8_e4m3", 32, "dynamic")


LEVELS = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6])


def test_modelopts_nvfp4_multiplies_by_its_second_scale():
    inner = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head", "*.o_proj"]}
    for config in (
        {"quant_method": "modelopt", "quantization": inner},
        {"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": inner["exclude_modules"]},
    ):
        packing = read_packing(config)
        assert packing.of("model.layers.0.self_attn.o_proj") is None
        layout = layout_of(packing)
        chance = torch.Generator().manual_seed(0)
        codes = torch.randint(16, (ROWS, COLUMNS), generator=chance)
        scale = (torch.rand(ROWS, COLUMNS // 16, generator=chance) * 400).to(torch.float8_e4m3fn)
        second = torch.tensor(0.003)
        stored = {
            "weight": (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8),
            "weight_scale": scale,
            "weight_scale_2": second,
        }
        levels = LEVELS[codes & 7] * torch.where(codes > 7, -1, 1)
        scales = (scale.float() * second).repeat_interleave(16, dim=1)
        assert torch.equal(layout.unpack(stored, ROWS, COLUMNS), levels * scales)
        assert layout.input_parts == ("input_scale",)
        assert layout.input_number(0.25) == 4.0  # compressed-tensors stores the inverse


def test_modelopts_layers_may_have_algorithms_of_their_own():
    layers = {"model.layers.0.mlp.down_proj": {"quant_algo": "FP8"}}
    config = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    packing = read_packing({"quant_method": "modelopt", "quantization": config})
    assert layout_of(packing).act_scales == "stored"
    assert packing.of("model.layers.1.mlp.down_proj") is None


@pytest.mark.parametrize(
    ("changes", "read"),
    [({}, True), ({"num_bits": 4}, False), ({"type": "int"}, False), ({"dynamic": True}, False)],
)
def test_modelopts_cache_is_fp8_with_a_stored_scale_or_refused(changes, read):
    scheme = {"num_bits": 8, "type": "float", "dynamic": False} | changes
    config = {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_scheme": scheme}
    if read:
        assert read_packing(config).kv == FP8_CACHE
        return
    with pytest.raises(CheckpointError, match=r"modelopt\), with a cache of keys and values \(.*"):
        read_packing(config)


def bnb_state(**facts):
    return torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)


@pytest.mark.parametrize("double", [False, True])
def test_bitsandbytes_takes_blocks_of_the_flat_weight_high_half_first(double):
    config = {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": double,
    }
    layout = layout_of(read_packing(config))
    chance = torch.Generator().manual_seed(0)
    codes = torch.randint(16, (ROWS * COLUMNS,), generator=chance)
    blocks = ROWS * COLUMNS // 64
    state = {"quant_type": "nf4", "blocksize": 64, "shape": [ROWS, COLUMNS]}
    stored = {
        "weight": (codes[::2] << 4 | codes[1::2]).to(torch.uint8)[:, None],
        "weight.quant_map": torch.linspace(-1, 1, 16),
    }
    absmax = torch.rand(blocks, generator=chance)
    if double:
        levels = torch.linspace(-1, 1, 256)
        own = torch.randint(256, (blocks,), generator=chance)
        stored |= {
            "weight.absmax": own.to(torch.uint8),
            "weight.nested_quant_map": levels,
            "weight.nested_absmax": torch.tensor([0.3]),
        }
        state |= {"nested_blocksize": 256, "nested_offset": 0.25}
        absmax = levels[own] * 0.3 + 0.25
    else:
        stored["weight.absmax"] = absmax
    assert isinstance(layout, TableCodes)
    stored[layout.state] = bnb_state(**state)
    assert {name: shape for name, (_, shape) in layout.parts(ROWS, COLUMNS).items()} == {
        name: (-1,) if name == layout.state else tuple(t.shape) for name, t in stored.items()
    }
    expected = stored["weight.quant_map"][codes] * absmax.repeat_interleave(64)
    ours = layout.unpack(stored, ROWS, COLUMNS)
    assert torch.equal(ours, expected.view(ROWS, COLUMNS))


def test_bitsandbytes_blocks_of_zeros_are_doubted_and_most_of_a_linear_refused():
    layout, absmax = TableCodes(4, 64, True), torch.ones(48)
    assert list(doubts_of(layout, {"weight.absmax": absmax}, NAME)) == []
    absmax[:24] = 0
    [doubt] = doubts_of(layout, {"weight.absmax": absmax}, NAME)
    assert doubt == f"{NAME}.weight.absmax: 24 of 48 scales are zero"
    absmax[24] = 0
    with pytest.raises(CheckpointError, match=r"absmax: 25 of 48 scales are zero"):
        list(doubts_of(layout, {"weight.absmax": absmax}, NAME))


def test_bitsandbytes_state_that_contradicts_the_config_is_refused():
    layout = TableCodes(4, 64, True, table="nf4")
    state = bnb_state(quant_type="nf4", blocksize=128, shape=[ROWS, COLUMNS])
    with pytest.raises(CheckpointError, match=r"says .*128.* the config"):
        layout.unpack({layout.state: state}, ROWS, COLUMNS)


def test_llm_int8_rounds_rows_and_keeps_large_inputs():
    packing = read_packing({"quant_method": "bitsandbytes", "load_in_8bit": True})
    layout = layout_of(packing)
    codes = torch.tensor([[127, -64], [1, 0]], dtype=torch.int8)
    scales = torch.tensor([2.54, 1.27])
    ours = layout.unpack({"weight": codes, "SCB": scales}, 2, 2)
    assert torch.allclose(ours, torch.tensor([[2.54, -1.28], [0.01, 0.0]]))
    assert packing.inexact  # columns of a batch, which no token of its own can know
    x = torch.tensor([[7.03, 0.5, 0.25031]])
    rounded = rounded_as(x, rounding_of(packing))
    assert rounded[0, 0] == x[0, 0]
    assert torch.allclose(rounded[0, 1:], torch.tensor([0.5, round(0.25031 * 254) / 254]))


def test_gptqs_exceptions_have_settings_of_their_own():
    config = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": True, "dynamic": {}}
    config["dynamic"] = {r"-:.*\.0\..*down": {}, r"+:.*\.1\.": {"bits": 8, "group_size": 32}}
    packing = read_packing(config)
    assert packing.of(NAME) is None
    eight = layout_of(packing, "model.layers.1.mlp.up_proj")
    assert (eight.bits, eight.group_size, eight.symmetric) == (8, 32, True)
    assert layout_of(packing, "model.layers.2.mlp.up_proj").bits == 4
    within = read_packing({**config, "dynamic": {}, "modules_in_block_to_quantize": [["mlp.up"]]})
    assert within.of(NAME) is None
    assert layout_of(within, "model.layers.2.mlp.up_proj").bits == 4


def test_auto_rounds_files_are_gptqs_with_exceptions():
    config = {
        "quant_method": "auto-round",
        "packing_format": "auto_round:auto_gptq",
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "data_type": "int",
        "block_name_to_quantize": "model.layers",
        "extra_config": {NAME: {"bits": 16}, "model.layers.1.mlp.up_proj": {"bits": 8}},
    }
    packing = read_packing(config)
    assert packing.of(NAME) is None
    assert packing.of("lm_head") is None
    assert layout_of(packing, "model.layers.1.mlp.up_proj").bits == 8
    assert (layout_of(packing, "model.layers.2.mlp.up_proj").bits, packing.method) == (
        4,
        "auto-round",
    )
