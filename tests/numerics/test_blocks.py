"""GGUF's block types: their grids, and bytes that the gguf package reads as the same numbers."""

import gguf
import pytest
import torch

from q3q.errors import ShapeError
from q3q.export.gguf_packing import in_blocks, pack_rows
from q3q.number_formats import BLOCKS
from q3q.numerics.block_weights import BlockWeight
from q3q.numerics.grid import Grid, into_groups
from q3q.numerics.levels import levels_of
from q3q.numerics.weights import QuantizedWeight, refuse_unsound, stored_weight, with_scales

EVERY = pytest.mark.parametrize("name", BLOCKS)


def levels(name):
    form = BLOCKS[name]
    return levels_of(name, form.bits, form.group_size, symmetric=not form.offsets)


def weights(rows=12, columns=512, experts=1):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(experts, rows, columns, generator=generator) * 0.1
    weight *= torch.rand(experts, rows, 1, generator=generator).mul_(3).exp_()
    weight[0, 0, :32] = 0  # a group without a scale
    weight[0, 1, :256] = 0  # a block without one
    weight[0, 2, :32] = weight[0, 2, :32].abs() + 0.3  # all above zero
    weight[0, 3, :32] = 0.25  # all equal
    return weight


def rounded(name, weight, how="minmax"):
    groups, own = into_groups(weight, BLOCKS[name].group_size), levels(name)
    return own.rounded(groups, getattr(own, how)(groups))


def read(name, weight):
    kind = gguf.GGMLQuantizationType[name.upper()]
    return torch.from_numpy(gguf.quants.dequantize(pack_rows(weight).numpy(), kind))


@pytest.mark.parametrize("how", ["minmax", "awq"])
@EVERY
def test_the_package_reads_the_bytes_as_our_numbers(name, how):
    weight = weights()
    quantized = rounded(name, weight, how)
    refuse_unsound(quantized, weight, BLOCKS[name].bits, name)
    numbers = quantized.dequantize()
    assert torch.equal(read(name, quantized), numbers[0])
    assert pack_rows(quantized).numel() * 8 == quantized.storage_bits()
    error = (numbers - weight).norm() / weight.norm()
    assert error < 1.5 / 2 ** BLOCKS[name].bits
    if how == "minmax":  # what is rounded is what the levels say
        groups, own = into_groups(weight, BLOCKS[name].group_size), levels(name)
        assert torch.equal(own.on_grid(groups, own.minmax(groups)).flatten(2), numbers)


@EVERY
def test_every_code_of_every_group_keeps_its_place_in_the_bytes(name):
    """Each place has numbers of its own: a swap of two would change what is read."""
    form, generator = BLOCKS[name], torch.Generator().manual_seed(1)
    quantized = rounded(name, weights())
    codes = torch.randint(2**form.bits, quantized.shape, generator=generator, dtype=torch.uint8)
    tensors = quantized.to_tensors() | {"codes": codes}
    if form.groups > 1:
        top = form.scale_top if form.offsets else -form.scale_top - 1
        low = min(0, form.scale_top)
        for part in ("scale", "offset"):
            if part in tensors:
                shape = tensors[part].shape
                numbers = torch.randint(low, top + 1, shape, generator=generator)
                tensors[part] = numbers.to(torch.int8)
    weight = stored_weight(tensors, quantized.facts())
    assert torch.equal(read(name, weight), weight.dequantize()[0])


@pytest.mark.parametrize("name", ["q8_0", "q4_0", "q4_1"])
def test_bytes_are_those_of_the_packages_quantizer(name):
    """It divides by the scale before that is rounded to float16; so near a tie it may differ."""
    kind = gguf.GGMLQuantizationType[name.upper()]
    weight = weights(rows=64)
    weight[0, 3, :32] = 0.25 + 0.01 * torch.arange(32)  # q4_1 of equal weights has a scale of 0
    ours = rounded(name, weight)
    theirs = torch.from_numpy(gguf.quants.quantize(weight[0].numpy(), kind))
    bytes_of_block = gguf.GGML_QUANT_SIZES[kind][1]
    scales = bytes_of_block - 32 * BLOCKS[name].bits // 8
    packed, theirs = (part.view(-1, bytes_of_block) for part in (pack_rows(ours), theirs))
    whole = [part[:, :scales].contiguous().view(torch.float16) for part in (packed, theirs)]
    assert torch.equal(*whole)  # -0 and 0 are equal
    assert (packed[:, scales:] == theirs[:, scales:]).float().mean() > 0.99
    numbers = torch.from_numpy(gguf.quants.dequantize(theirs.view(64, -1).numpy(), kind))
    assert (ours.dequantize()[0] - weight[0]).norm() <= (numbers - weight[0]).norm()
    # Numbers that lie on the grid are the same bytes to both.
    again = gguf.quants.quantize(ours.dequantize()[0].numpy(), kind)
    assert torch.equal(torch.from_numpy(gguf.quants.dequantize(again, kind)), ours.dequantize()[0])


@EVERY
def test_a_stored_weight_comes_back(name):
    quantized = rounded(name, weights(experts=3))
    again = stored_weight(quantized.to_tensors(), quantized.facts())
    assert torch.equal(again.dequantize(), quantized.dequantize())
    part = quantized.experts(1, 2).rows(3, 7)
    assert torch.equal(part.dequantize(), quantized.dequantize()[1:2, 3:7])


@pytest.mark.parametrize("name", ["q6_k", "q5_k", "q4_k", "q3_k", "q2_k"])
def test_the_searched_grid_is_nearer_than_the_range(name):
    weight = weights(rows=64)
    errors = [
        (rounded(name, weight, how).dequantize() - weight).norm() for how in ("minmax", "awq")
    ]
    assert errors[0] < errors[1]


@EVERY
def test_scales_beyond_float16_are_refused(name):
    assert "beyond float16" in rounded(name, weights() * 1e9).unsound(weights())


@pytest.mark.parametrize(("bits", "kind"), [(4, "q4_0"), (8, "q8_0")])
def test_whole_numbers_even_around_zero_are_a_type_as_they_are(bits, kind):
    weight = weights()
    plain = levels_of("int", bits, 32, symmetric=True)
    groups = into_groups(weight, 32)
    quantized = with_scales(plain.rounded(groups, plain.minmax(groups)), "gguf")
    assert isinstance(quantized, QuantizedWeight)
    assert torch.equal(read(kind, in_blocks(quantized)), quantized.dequantize()[0])


def test_zero_points_become_offsets_of_float16():
    weight = weights()
    plain = levels_of("int", 4, 32, symmetric=False)
    groups = into_groups(weight, 32)
    before = plain.rounded(groups, plain.minmax(groups))
    after = with_scales(before, "gguf")
    assert isinstance(before, QuantizedWeight)
    assert isinstance(after, BlockWeight)
    assert torch.equal(after.codes_EOI, before.codes_EOI)
    assert torch.equal(read("q4_1", after), after.dequantize()[0])
    assert torch.allclose(after.dequantize(), before.dequantize(), rtol=2e-3, atol=4e-3)


def test_groups_that_lie_apart_have_no_place():
    quantized = rounded("q4_k", weights())
    with pytest.raises(ShapeError, match="runs of neighbours"):
        levels("q4_k").stored(
            quantized.codes_EOI, Grid(torch.ones(1), torch.ones(1)), torch.zeros(1, 512)
        )
