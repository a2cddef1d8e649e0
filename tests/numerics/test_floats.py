"""Floating-point formats bit for bit: torch's float8 types and compressed-tensors' functions."""

import pytest
import torch
from compressed_tensors.compressors.mx_utils import compress_mx_scale, decompress_mx_scale
from compressed_tensors.compressors.mxfp6.helpers import pack_fp6_to_uint8, unpack_fp6_from_uint8
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationArgs, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.quant_args import FP4_E2M1_DATA, FP6_E2M3_DATA
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

from q3q.number_formats import FLOATS
from q3q.numerics.float_weights import FloatWeight
from q3q.numerics.floats import (
    E4M3,
    decode,
    encode,
    nearest_,
    power_scale,
    scale_codes,
    scale_numbers,
)
from q3q.numerics.grid import into_groups
from q3q.numerics.levels import FloatLevels, RowPeaks, levels_of
from q3q.numerics.packing import pack_bits, unpack_bits
from q3q.numerics.stored_scales import input_factor

EVERY = pytest.mark.parametrize("name", FLOATS)
FP8 = {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}


def every_16_bit_number(dtype):
    numbers = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).float()
    return numbers[numbers.isfinite()]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FP8)
def test_fp8_has_torchs_values_and_codes(name, dtype):
    form, numbers = FLOATS[name], every_16_bit_number(dtype)
    limited = numbers.clamp(-form.largest, form.largest)  # torch's own cast to E5M2 overflows
    theirs = limited.to(FP8[name])
    ours = nearest_(numbers.clone(), form)
    assert torch.equal(ours.view(torch.int32), theirs.float().view(torch.int32))  # zeros' signs too
    assert torch.equal(encode(ours, form), theirs.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("name", "cast"), [("mxfp4", FP4_E2M1_DATA.cast_to_fp4), ("mxfp6", FP6_E2M3_DATA.cast_to_fp6)]
)
def test_fp4_and_fp6_have_the_librarys_values_and_codes(name, cast, dtype):
    form, numbers = FLOATS[name], every_16_bit_number(dtype)
    ours = nearest_(numbers.clone(), form)
    assert torch.equal(ours, cast(numbers.clone()))
    codes, columns = encode(ours, form), len(ours) // 4 * 4
    rows, codes = ours[None, :columns], codes[None, :columns]
    pack, unpack = {
        4: (pack_fp4_to_uint8, unpack_fp4_from_uint8),
        6: (pack_fp6_to_uint8, unpack_fp6_from_uint8),
    }[form.bits]
    packed = pack(rows)
    assert torch.equal(pack_bits(codes, form.bits).view(torch.uint8)[:, : packed.shape[1]], packed)
    assert torch.equal(unpack(packed, 1, columns, torch.float32), decode(codes, form))


@EVERY
def test_ties_go_to_even_and_numbers_beyond_the_largest_to_it(name):
    form = FLOATS[name]
    levels = decode(torch.arange(2 ** (form.bits - 1), dtype=torch.uint8), form)
    levels = levels[levels.isfinite()]
    ties = (levels[1:] + levels[:-1]) / 2
    even = torch.where(torch.arange(len(ties)) % 2 == 0, levels[:-1], levels[1:])
    assert torch.equal(nearest_(ties.clone(), form), even)
    assert torch.equal(nearest_(-ties, form), -even)
    assert torch.equal(nearest_(ties.nextafter(levels[1:]), form), levels[1:])
    assert torch.equal(nearest_(ties.double().mul_(1 - 1e-12), form).float(), levels[:-1])
    assert levels[-1] == form.largest
    beyond = torch.tensor([1e30, torch.inf, -torch.inf])
    assert nearest_(beyond, form).tolist() == [form.largest, form.largest, -form.largest]


@EVERY
def test_every_code_survives_its_number_and_its_packing(name):
    form = FLOATS[name]
    codes = torch.arange(2**form.bits).to(torch.uint8)
    codes = codes[decode(codes, form).isfinite()]
    assert len(codes) >= 2**form.bits - 8
    assert torch.equal(encode(decode(codes, form), form), codes)
    assert torch.equal(encode(decode(codes, form).double(), form), codes)
    assert torch.equal(unpack_bits(pack_bits(codes, form.bits), form.bits, len(codes)), codes)


def test_stored_scales_are_torchs_types():
    powers = torch.ldexp(torch.ones(255), torch.arange(255) - 127)
    codes = scale_codes(powers, "e8m0")
    assert torch.equal(codes, powers.to(torch.float8_e8m0fnu).view(torch.uint8))
    assert torch.equal(scale_numbers(codes, "e8m0"), powers)
    normal = powers[1:]
    assert torch.equal(codes[1:], compress_mx_scale(normal, torch.uint8))
    assert torch.equal(decompress_mx_scale(codes[1:]).float(), normal)
    codes = torch.arange(1, 127).to(torch.uint8)
    numbers = scale_numbers(codes, "e4m3")
    assert torch.equal(numbers, codes.view(torch.float8_e4m3fn).float())
    assert torch.equal(scale_codes(numbers, "e4m3"), codes)


@pytest.mark.parametrize(("name", "preset"), [("mxfp4", "MXFP4"), ("mxfp6", "MXFP6A16"),
                                             ("mxfp8", "MXFP8")])  # fmt: skip
def test_power_of_two_scales_are_the_librarys(name, preset):
    args = preset_name_to_scheme(preset, ["Linear"]).weights
    largest = every_16_bit_number(torch.bfloat16)
    largest = largest[(largest > 1e-30) & (largest < 1e30)]
    theirs, _ = calculate_qparams(-largest, largest, args)
    assert torch.equal(power_scale(largest, FLOATS[name]), theirs.float())


PRESETS = {
    "fp8_e4m3": "FP8_DYNAMIC",
    "mxfp8": "MXFP8",
    "mxfp6": "MXFP6A16",
    "mxfp4": "MXFP4",
    "nvfp4": "NVFP4",
}


def weights():
    """Rows with ordinary, tiny, huge and zero groups, and an outlier."""
    weight = torch.randn(8, 128, generator=torch.Generator().manual_seed(0)) * 0.05
    weight[1] *= 1e-4
    weight[2, 32:64] = 0
    weight[3, 5] = 3.0
    weight[4] = 0
    return weight.bfloat16().float()


@pytest.mark.parametrize("name", PRESETS)
def test_rounding_is_the_librarys(name):
    """`fake_quantize` is what transformers and llm-compressor evaluate."""
    args: QuantizationArgs = preset_name_to_scheme(PRESETS[name], ["Linear"]).weights
    weight = weights()
    size = FLOATS[name].group_size or 128
    groups = weight.unflatten(1, (-1, size))
    low, high = groups.amin(-1), groups.amax(-1)
    factor = generate_gparam(weight.min(), weight.max()) if name == "nvfp4" else None
    scale, zero = calculate_qparams(low, high, args, global_scale=factor)
    theirs = fake_quantize(weight, scale, zero, args, global_scale=factor)
    ours = rounded(name, weight[None], size)
    own = scale_numbers(ours.stored_scale_EOG[0], FLOATS[name].scale)
    # A scale below the smallest is 2**-9 here, and 1/8 there, where all its weights become zero.
    tiny = (own == 2**-9) & (name == "nvfp4")
    same = (high - low > 0) & ~tiny
    assert torch.equal(own[same], scale.float()[same])
    differs = (ours.dequantize()[0] != theirs).unflatten(1, (-1, size)).any(-1)
    assert not (differs & ~tiny).any()
    if tiny.any():
        errors = [(each - weight)[1].abs().sum() for each in (ours.dequantize()[0], theirs)]
        assert errors[0] < errors[1]


def rounded(name, weight_EOI, size, *, group_rows=1, mse=False, four_over_six=False):
    levels = levels_of(
        name, 0, size, symmetric=True, group_rows=group_rows, four_over_six=four_over_six
    )
    assert isinstance(levels, FloatLevels)
    if levels.needs_peaks:
        levels = levels.of(RowPeaks.measured(weight_EOI, [weight_EOI.shape[1]], group_rows))
    groups = into_groups(weight_EOI, size)
    stored = levels.rounded(groups, levels.minmax(groups, mse=mse))
    assert isinstance(stored, FloatWeight)
    assert torch.equal(
        stored.dequantize(), levels.on_grid(groups, levels.minmax(groups, mse=mse)).flatten(2)
    )
    return stored


@pytest.mark.parametrize("name", FP8)
def test_the_tiniest_weights_have_a_scale_above_zero(name):
    weight = torch.full((1, 2, 16), 2.0**-149)
    weight[:, 1] = 1e-38
    stored = rounded(name, weight, 16)
    assert stored.unsound(weight) is None
    assert (stored.scale_EOG >= 2.0**-126).all()
    assert stored.dequantize().isfinite().all()
    assert torch.equal(stored.dequantize()[:, 1] > 0, weight[:, 1] > 0)


@EVERY
def test_a_search_never_errs_more_by_its_own_measure(name):
    weight, size = 9 * weights()[None] ** 3, FLOATS[name].group_size or 32

    def cost(stored, power):
        error = stored.dequantize() - weight
        return into_groups(error, size).abs().pow(power).sum(-1)

    plain, searched = (cost(rounded(name, weight, size, mse=mse), 2.4) for mse in (False, True))
    assert (searched <= plain).all()
    assert FLOATS[name].scale == "e8m0" or searched.sum() < plain.sum()
    if name == "nvfp4":
        four = rounded(name, weight, size, four_over_six=True)
        six = rounded(name, weight, size)
        assert cost(four, 2).sum() < cost(six, 2).sum()
        assert {4.0, 6.0} <= set(decode(four.codes_EOI, E2M1).unflatten(2, (-1, 16)).abs()
                                 .amax(-1).flatten().tolist())  # fmt: skip


E2M1 = FLOATS["nvfp4"]


def test_a_power_of_two_is_halved_where_many_small_weights_gain_more_than_the_largest_loses():
    weight = torch.full((1, 1, 32), 0.25)
    weight[..., 0] = 4.0
    plain, searched = (rounded("mxfp4", weight, 32, mse=mse) for mse in (False, True))
    assert (plain.scale_EOG.item(), searched.scale_EOG.item()) == (1.0, 0.5)
    assert plain.dequantize()[0, 0, :2].tolist() == [4.0, 0.0]
    assert searched.dequantize()[0, 0, :2].tolist() == [3.0, 0.25]


def test_four_over_six_chooses_as_the_papers_example():
    """10, 20, 30, 40 (arXiv 2512.02010, section 3): with 4 as the largest, all are levels."""
    weight = torch.tensor([10.0, 20.0, 30.0, 40.0] * 4)[None, None]
    four, six = (rounded("nvfp4", weight, 16, four_over_six=on) for on in (True, False))
    assert decode(four.codes_EOI, E2M1)[0, 0, :4].tolist() == [1, 2, 3, 4]
    assert (four.dequantize() - weight).abs().max() < 0.2
    assert (six.dequantize() - weight).abs().max() > 2


def test_a_scale_of_a_block_and_of_a_linear_is_that_of_its_largest_weight():
    weight = torch.randn(2, 10, 8, generator=torch.Generator().manual_seed(0))
    blocks = rounded("fp8_e4m3", weight, 4, group_rows=4)
    for rows in (slice(0, 4), slice(4, 8), slice(8, 10)):  # the last block is smaller
        for columns, g in ((slice(0, 4), 0), (slice(4, 8), 1)):
            largest = weight[:, rows, columns].abs().amax((1, 2))
            expected = (largest / 448).expand(rows.stop - rows.start, 2).T
            assert torch.equal(blocks.scale_EOG[:, rows, g], expected)
    whole = rounded("fp8_e4m3", weight, -1, group_rows=-1)
    assert torch.equal(
        whole.scale_EOG[:, :, 0], (weight.abs().amax((1, 2)) / 448)[:, None].expand(2, 10)
    )
    assert blocks.storage_bits() == 160 * 8 + 2 * 3 * 2 * 16
    assert whole.storage_bits() == 160 * 8 + 2 * 16


@EVERY
def test_a_weight_is_whole_after_rows_experts_and_its_tensors(name):
    size = FLOATS[name].group_size or 32
    weight = torch.stack([weights(), 2 * weights().flip(0)])
    stored = rounded(name, weight, size)
    restored = FloatWeight.from_tensors(stored.to_tensors(), stored.facts())
    assert torch.equal(restored.dequantize(), stored.dequantize())
    assert torch.equal(stored.rows(2, 5).dequantize(), stored.dequantize()[:, 2:5])
    assert torch.equal(stored.experts(1, 2).dequantize(), stored.dequantize()[1:])
    scale_bits = {"float": 16, "e8m0": 8, "e4m3": 8}[FLOATS[name].scale]
    factor = 32 if name == "nvfp4" else 0
    each = 8 * 128 * FLOATS[name].bits + 8 * 128 // size * scale_bits + factor
    assert stored.storage_bits() == 2 * each
    assert not stored.too_fine()
    assert stored.unsound(weight) is None
    wrong = FloatWeight(torch.full_like(stored.codes_EOI, 255), *list(vars(stored).values())[1:])
    assert "not a number" in (wrong.unsound(weight) or "")


def test_numbers_that_are_not_finite_are_no_codes():
    stored = rounded("fp8_e4m3", weights()[None], -1)
    broken = FloatWeight(stored.codes_EOI, stored.stored_scale_EOG * torch.nan, "fp8_e4m3")
    assert "finite" in (broken.unsound(weights()[None]) or "")
    zero = FloatWeight(stored.codes_EOI, stored.stored_scale_EOG * 0, "fp8_e4m3")
    assert "above 0" in (zero.unsound(weights()[None]) or "")
    assert torch.isnan(decode(torch.tensor([0x7F], dtype=torch.uint8), E4M3)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("peak", [0.0, 1e-40, 1e-37, 0.0173, 1.0, 11.375, 2688.0, 3e38])
def test_the_factor_of_an_input_is_what_llm_compressor_stores_of_its_largest_number(peak, dtype):
    largest = torch.tensor([peak], dtype=dtype)
    stored = generate_gparam(-largest, largest)
    assert input_factor(float(largest), "nvfp4", dtype) == float(stored)


def test_small_inputs_of_a_float16_model_have_a_factor_too():
    """In float16, 2688 over less than 0.041 is infinite, for which compressed-tensors stores 1."""
    assert input_factor(0.003, "nvfp4", torch.float16) == pytest.approx(2688 / 0.003, rel=1e-6)
