"""Every method on every format: against plain algorithms, through the walk, files and resume."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from q3q.evaluate.integrity import check_weights
from q3q.models.anatomy import ScaleGroup, Site, SiteInput
from q3q.models.block import Block
from q3q.models.spool import Spool
from q3q.number_formats import BLOCKS, FLOATS
from q3q.numerics.block_weights import BlockWeight
from q3q.numerics.float_weights import FloatWeight
from q3q.numerics.floats import decode, floats_per_token
from q3q.numerics.grid import absmax_per_token, into_groups
from q3q.numerics.levels import FloatLevels, RowPeaks
from q3q.quantize.block_store import BlockStore
from q3q.quantize.method import ScaleTask, SiteTask, levels_for, plain_levels
from q3q.quantize.methods import gptq
from q3q.quantize.methods.awq import PieceErrors, awq_round_plain
from q3q.quantize.methods.build import build_method
from q3q.quantize.methods.gptq import gptq_round, gptq_round_plain
from q3q.quantize.sites import _divided_by_rows
from q3q.quantize.walk import quantize_model
from q3q.scheme import InputRounding
from q3q.spec import Scheme, Schemes
from tests.methods import built
from tests.nowhere import Nowhere
from tests.quantize import conftest
from tests.quantize.conftest import copy, random_decoder
from tests.quantize.test_block_store import same
from tests.quantize.test_gptq import problem
from tests.quantize.test_walk import DiesAfter
from tests.specs import make_spec


def scheme_of(name, group_size=None, **others):
    form = FLOATS[name]
    size = group_size or form.group_size or 16
    return Scheme(bits=form.bits, group_size=size, symmetric=True, format=name, **others)


SCHEMES = {
    **{name: scheme_of(name) for name in FLOATS},
    "per row": scheme_of("fp8_e4m3", -1),
    "per linear": scheme_of("fp8_e5m2", -1, group_rows=-1),
    "blocks": scheme_of("fp8_e4m3", 16, group_rows=8),
    "4 or 6": scheme_of("nvfp4", four_over_six=True),
}


def nearest(value, scale, levels):
    """The index of the level that is nearest to a number, of equals the even one; in float64."""
    distance = (levels * scale - value).abs()
    closest = (distance <= distance.min() * (1 + 1e-12)).nonzero().flatten().tolist()
    return max(closest, key=lambda k: k % 2 == 0)


@pytest.mark.parametrize("kind", ["fp8_e4m3", "mxfp4", "nvfp4", "per linear"])
def test_gptq_is_algorithm_1_on_the_formats_levels(doubles, kind):
    """Row by row and column by column in float64, with nothing but the table of levels."""
    scheme, (weight, hessian) = SCHEMES[kind], problem(rows=3)
    form, size = FLOATS[scheme.format], 64 if scheme.group_size == -1 else scheme.group_size
    codes = torch.arange(2 ** (form.bits - 1), dtype=torch.uint8)
    table = decode(codes, form).double()
    table = table[table.isfinite()]
    fast = gptq_round(weight, hessian, scheme, damping=0.02, block_size=size).weight
    assert isinstance(fast, FloatWeight)
    scale = fast.scale_EOG.double()
    damped = hessian[0] + 0.02 * hessian[0].diagonal().mean() * torch.eye(64)
    factor = torch.linalg.cholesky(damped.inverse(), upper=True)
    for row in range(3):
        left = weight[0, row].clone()
        for j in range(64):
            step = scale[0, row, j // size]
            k = nearest(left[j].abs(), step, table)
            rounded = table[k] * step * left[j].sign()
            expected = k + (1 << (form.bits - 1) if left[j] < 0 else 0)
            assert int(fast.codes_EOI[0, row, j]) == expected, (row, j)
            left[j + 1 :] -= (left[j] - rounded) / factor[j, j] * factor[j, j + 1 :]


def block_scheme(name):
    form = BLOCKS[name]
    return Scheme(
        bits=form.bits, group_size=form.group_size, symmetric=not form.offsets, format=name
    )


@pytest.mark.parametrize("act_order", [True, False])
@pytest.mark.parametrize("name", BLOCKS)
def test_gptq_is_algorithm_1_on_ggufs_grids(doubles, name, act_order):
    """In float64, with nothing but the scales and offsets that are stored: they are taken first."""
    form, (weight, hessian) = BLOCKS[name], problem(rows=3, columns=256)
    options: dict[str, Any] = {"damping": 0.02, "act_order": act_order}
    fast = gptq_round(weight, hessian, block_scheme(name), **options).weight
    assert isinstance(fast, BlockWeight)
    assert fast.unsound(weight) is None
    before = plain_levels(block_scheme(name)).minmax(into_groups(weight, form.group_size))
    scale, offset = (part.squeeze(-1).double() for part in before)
    hessian = hessian[0]
    order = hessian.diagonal().argsort(descending=True, stable=True)
    order = order if act_order else torch.arange(256)
    damped = hessian[order][:, order]
    damped = damped + 0.02 * damped.diagonal().mean() * torch.eye(256)
    factor = torch.linalg.cholesky(damped.inverse(), upper=True)
    levels = torch.arange(2**form.bits) - form.middle
    for row in range(3):
        left = weight[0, row, order].clone()
        for j, column in enumerate(order.tolist()):
            group = column // form.group_size
            points = levels * scale[0, row, group] - offset[0, row, group]
            k = int((points - left[j]).abs().argmin())
            if scale[0, row, group]:
                assert int(fast.codes_EOI[0, row, column]) == k, (row, j)
            left[j + 1 :] -= (left[j] - points[k]) / factor[j, j] * factor[j, j + 1 :]
    stored = fast.dequantize()[0, :, :1]
    first = fast.codes_EOI[0, :, :1].double() - form.middle
    torch.testing.assert_close(stored.double(), first * scale[0, :, :1] - offset[0, :, :1])


@pytest.mark.parametrize("name", ["q6_k", "q4_k", "q4_1"])
def test_gptqs_fast_path_on_ggufs_grids_is_the_plain_one(doubles, name, monkeypatch):
    scheme, (weight, hessian) = block_scheme(name), problem(rows=10, columns=256)
    monkeypatch.setattr(gptq, "CPU_ROWS", 4)
    fast = gptq_round(weight, hessian, scheme).weight
    rounded, codes = gptq_round_plain(weight[0], hessian[0], scheme)
    assert torch.equal(fast.codes_EOI[0], codes.to(torch.uint8))
    torch.testing.assert_close(fast.dequantize()[0].double(), rounded, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp4", "per row", "per linear", "blocks", "4 or 6"])
@pytest.mark.parametrize("act_order", [True, False])
def test_gptqs_fast_path_is_the_plain_one(doubles, kind, act_order, monkeypatch):
    scheme, (weight, hessian) = SCHEMES[kind], problem(rows=10)
    hessian[0, :, 5] = hessian[0, 5, :] = 0  # a column that no token activates
    options: dict[str, Any] = {"act_order": act_order, "block_size": 32}
    monkeypatch.setattr(gptq, "CPU_ROWS", 4)  # rows are solved in parts
    fast = gptq_round(weight, hessian, scheme, **options).weight
    rounded, codes = gptq_round_plain(weight[0], hessian[0], scheme, **options)
    assert torch.equal(fast.codes_EOI[0], codes.to(torch.uint8))
    torch.testing.assert_close(fast.dequantize()[0].double(), rounded, rtol=1e-6, atol=0)
    assert isinstance(fast, FloatWeight)
    assert fast.unsound(weight) is None


@pytest.mark.parametrize("name", FLOATS)
def test_groups_that_a_format_defines_are_neighbours_whatever_gptqs_order(name):
    """A file of such a format has no place for an index of each column's group."""
    scheme, (weight, hessian) = SCHEMES[name], problem(rows=10)
    free, static = (
        gptq_round(weight, hessian, scheme, act_order=True, static_groups=fixed).weight
        for fixed in (False, True)
    )
    assert isinstance(free, FloatWeight)
    assert isinstance(static, FloatWeight)
    assert static.group_EI is None
    if FLOATS[name].group_size is None:
        assert free.group_EI is not None
        assert free.storage_bits() == static.storage_bits() + 64 * 32
    else:
        assert free.group_EI is None
        assert torch.equal(free.codes_EOI, static.codes_EOI)
        assert torch.equal(free.scale_EOG, static.scale_EOG)


@pytest.mark.parametrize("kind", ["fp8_e4m3", "nvfp4", "mxfp4", "4 or 6"])
@pytest.mark.parametrize("clip", [True, False])
def test_awq_is_the_plain_algorithm(kind, clip):
    generator = torch.Generator().manual_seed(3)
    scheme = SCHEMES[kind]
    weight = torch.randn(6, 64, generator=generator)
    x = torch.randn(300, 64, generator=generator) * torch.rand(64, generator=generator) ** 3
    method = built("awq", clip=clip, grid=6)
    kept = method.observe()
    kept.update(SiteInput(x, [x]))
    applied = torch.ones(1, 64)

    def apply(chosen):
        applied.copy_(chosen)
        kept.rescale(chosen)

    weights, group = {"down": weight, "up": weight}, ScaleGroup(Site("down", ("down",)), "up")
    run: Any = None  # nothing runs: the group has no windows
    method.rebalance(ScaleTask(group, weights, kept, [], 1, run, Spool, apply), scheme)
    assert applied.std() > 0.1 or kind == "mxfp4"  # whose scales take no other factor than 1 here
    task = SiteTask(0, "down", (weight * applied)[None], {"down": slice(0, 6)}, kept)
    fast = method.quantize(task, scheme).dequantize()[0]
    expected_scale, expected = awq_round_plain(
        weight.double(), x.double(), scheme, grid=6, clip=clip
    )
    torch.testing.assert_close(applied[0].double(), expected_scale, rtol=1e-4, atol=1e-5)
    differs = (fast - expected).abs() > 1e-3 * expected.abs().mean()
    assert differs.double().mean() < 0.01  # float32 decides a tie, or a scale's last bit


@torch.inference_mode()
def test_awq_judges_candidates_by_the_factor_that_linears_of_a_site_are_stored_with():
    scheme, draw = SCHEMES["nvfp4"], torch.Generator().manual_seed(0)
    site = Site("qkv", ("q", "k"))
    loud = {"q": 1.0, "k": 37.0}  # alone, each would have another factor
    weights = {name: size * torch.randn(16, 32, generator=draw) for name, size in loud.items()}
    seen: list[dict[str, torch.Tensor]] = []

    def run(inputs_RTI, replaced):
        seen.append(dict(replaced))
        return inputs_RTI

    window, group = torch.randn(4, 32, generator=draw), ScaleGroup(site, "norm")
    task = ScaleTask(group, weights, None, [window], 4, run, Spool, lambda _: None)
    scale_I = torch.rand(32, generator=draw) + 0.5
    piece = PieceErrors(task, scale_I[None, None], scheme, [0], Spool())
    list(piece.errors(0, [0]))
    stacked_EOI = torch.cat([weights["q"], weights["k"]])[None] * scale_I
    levels = levels_for(scheme, stacked_EOI, [16, 32])
    groups = into_groups(stacked_EOI, scheme.group_size)
    stored_OI = levels.rounded(groups, levels.awq(groups)).dequantize()[0] / scale_I
    assert torch.equal(torch.cat([seen[-1]["q"], seen[-1]["k"]]), stored_OI)


@pytest.mark.parametrize(("method", "kind"), [("awq", "moe"), ("gptq", "dense")])
@torch.inference_mode()
def test_a_walk_on_ggufs_blocks_resumes_with_the_same_bits(tmp_path, method, kind, monkeypatch):
    for key, width in {"hidden_size": 256, "num_attention_heads": 4, "head_dim": 64}.items():
        monkeypatch.setitem(conftest.CONFIG, key, width)
    for key in ("intermediate_size", "moe_intermediate_size"):
        monkeypatch.setitem(conftest.CONFIG, key, 256)
    monkeypatch.setitem(conftest.MOE, "moe_intermediate_size", 256)
    scheme, model = block_scheme("q4_k"), random_decoder(kind)
    windows = torch.randint(61, (4, 16), generator=torch.Generator().manual_seed(1))
    whole, stopped, resumed = copy(model), copy(model), copy(model)
    build, schemes = build_method(make_spec(method, scheme=scheme)), Schemes(scheme)
    blocks = quantize_model(whole, build, schemes, windows, Nowhere())
    with pytest.raises(KeyboardInterrupt), DiesAfter(tmp_path, 1) as store:
        quantize_model(stopped, build, schemes, windows, store)
    with BlockStore(tmp_path) as store:
        again = quantize_model(resumed, build, schemes, windows, store)
    for one, other in zip(blocks, again, strict=True):
        same(one, other)
        assert all(isinstance(code, BlockWeight) for code in one.quantized.values())
    checks = check_weights(resumed, [block.quantized for block in again])
    assert all(check.passed for check in checks), checks


QUICK = [
    ("rtn", "nvfp4"),
    ("rtn", "per linear"),
    ("gptq", "blocks"),
    ("gptq", "mxfp4"),
    ("awq", "nvfp4"),
    ("smoothquant", "fp8_e4m3"),
]
REST = [
    pytest.param(method, kind, marks=pytest.mark.slow)
    for method in ("rtn", "gptq", "awq", "smoothquant")
    for kind, scheme in SCHEMES.items()
    if (method, kind) not in QUICK and (method != "awq" or scheme.group_rows == 1)
]


@pytest.mark.parametrize(("method", "kind"), [*QUICK, *REST])
@torch.inference_mode()
def test_a_walk_that_was_stopped_ends_with_the_same_bits(
    tmp_path, method, kind, windows, monkeypatch
):
    scheme = SCHEMES[kind]
    for key, width in {"num_attention_heads": 4, "intermediate_size": 64}.items():
        monkeypatch.setitem(conftest.CONFIG, key, width)  # 32 divides all widths
    model = random_decoder("moe" if kind in ("nvfp4", "blocks") else "dense")
    whole, stopped, resumed = copy(model), copy(model), copy(model)
    spec = make_spec(method, scheme=scheme)
    blocks = quantize_model(whole, build_method(spec), Schemes(scheme), windows, Nowhere())
    with pytest.raises(KeyboardInterrupt), DiesAfter(tmp_path, 1) as store:
        quantize_model(stopped, build_method(spec), Schemes(scheme), windows, store)
    with BlockStore(tmp_path) as store:
        again = quantize_model(resumed, build_method(spec), Schemes(scheme), windows, store)
        for one, other in zip(blocks, again, strict=True):
            same(one, other)
        same(blocks[1], store.load(1))
    checks = check_weights(resumed, [block.quantized for block in again])
    assert all(check.passed for check in checks), checks
    for name, weight in again[0].quantized.items():
        assert isinstance(weight, FloatWeight), name
        assert weight.format == scheme.format


def test_a_file_holds_codes_and_scales_of_few_bits(tmp_path):
    weight = torch.randn(1, 64, 128, generator=torch.Generator().manual_seed(0))
    sizes = {}
    for name in ("mxfp4", "nvfp4", "mxfp6"):
        scheme = scheme_of(name)
        levels = levels_for(scheme, weight)
        groups = into_groups(weight, scheme.group_size)
        stored = levels.rounded(groups, levels.minmax(groups))
        parts = stored.to_tensors()
        sizes[name] = 8 * sum(parts[key].nbytes for key in parts if key != "codes")
        rows = 32 * 64 if name == "nvfp4" else 0  # the factor lies there for each row
        assert stored.storage_bits() == stored.nominal_bits() + sizes[name] - rows + rows // 64
        assert parts["scale"].dtype == torch.uint8


@pytest.mark.parametrize("kind", ["nvfp4", "per linear", "blocks"])
def test_rows_divided_among_ranks_share_their_scales(kind):
    """Each rank rounds some rows; what they share is that of all rows, as on one rank."""
    scheme = SCHEMES[kind]
    weight = torch.randn(1, 24, 64, generator=torch.Generator().manual_seed(0))
    weight[:, 20] *= 9
    task = SiteTask(0, "qkv", weight, {"q": slice(0, 9), "k": slice(9, 24)}, None)
    rtn = build_method(make_spec("rtn", scheme=scheme))

    class Rank:
        size = 2

        def __init__(self, rank):
            self.rank = rank

        def gather(self, codes):
            parts.append(codes)
            return [codes]

    parts: list[Any] = []
    for rank in range(2):
        _divided_by_rows(rtn, replace(task), scheme, Rank(rank))  # type: ignore[arg-type]
    together = torch.cat([part.dequantize() for part in parts], 1)
    assert torch.equal(together, rtn.quantize(task, scheme).dequantize())


def test_linears_of_a_site_share_nvfp4s_factor_but_no_block_of_rows():
    """Servers run them as one: vLLM takes the largest factor for all."""
    weight = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(0))
    nvfp4 = levels_for(SCHEMES["nvfp4"], weight, [5, 12])
    assert isinstance(nvfp4, FloatLevels)
    assert nvfp4.global_EO is not None
    assert nvfp4.global_EO.unique(dim=1).shape == (2, 1)
    assert torch.equal(nvfp4.global_EO[:, 0], 448 * 6 / weight.abs().amax((1, 2)))
    blocks = levels_for(scheme_of("fp8_e4m3", 32, group_rows=4), weight, [5, 12])
    assert isinstance(blocks, FloatLevels)
    assert blocks.range_EOG is not None
    own = weight[:, 4:5].abs().amax(2)  # a block of one row at the first linear's end
    assert torch.equal(blocks.range_EOG[:, 4], own)


def test_nvfp4s_factor_takes_no_memory_for_each_row():
    """The largest weight of a linear is that of its rows, also when columns are multiplied."""
    weight = torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(0))
    scale = torch.rand(2, 32, generator=torch.Generator().manual_seed(1)) + 0.5
    levels, ends = plain_levels(SCHEMES["nvfp4"]), [5, 12]
    assert isinstance(levels, FloatLevels)
    kept, by_row = levels.peaks(weight, ends), RowPeaks.measured(weight, ends, 1)
    assert kept.columns_EBI.shape == (2, 2, 32)  # a row of numbers for each linear
    for one, other in ((kept, by_row), (kept.times(scale), by_row.times(scale))):
        assert torch.equal(one.of_linear(), other.of_linear())
        found, expected = levels.of(one).global_EO, levels.of(other).global_EO
        assert found is not None
        assert expected is not None
        assert torch.equal(found, expected)
    blocks = plain_levels(SCHEMES["blocks"])
    assert isinstance(blocks, FloatLevels)
    assert blocks.peaks(weight, ends).columns_EBI.shape == (2, 2, 32)  # 5 rows; 7 of 8 rows


@pytest.mark.parametrize("name", FLOATS)
def test_activations_take_the_scales_of_weights_that_are_a_linear_each(name):
    """A token is rounded as the row of a linear of its own is; and not with its neighbours."""
    tokens = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)) ** 3
    tokens[2] = 0
    scheme = scheme_of(name)
    expected = []
    for token in tokens:
        levels = levels_for(scheme, token[None, None])
        groups = into_groups(token[None, None], scheme.group_size)
        expected.append(levels.rounded(groups, levels.minmax(groups)).dequantize()[0, 0])
    rounded = floats_per_token(tokens, FLOATS[name], scheme.group_size)
    assert torch.equal(rounded, torch.stack(expected))
    halves = floats_per_token(tokens.bfloat16(), FLOATS[name], scheme.group_size)
    assert halves.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["int", *FLOATS])
@pytest.mark.parametrize("infinite", [torch.inf, -torch.inf])
def test_an_infinite_activation_makes_nan_of_what_shares_its_scale(name, infinite):
    tokens = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    tokens[1, 40] = infinite
    size = -1 if name == "int" else SCHEMES[name].group_size

    def rounded(tokens):
        if name == "int":
            return absmax_per_token(tokens, 8)
        return floats_per_token(tokens, FLOATS[name], size)

    found = rounded(tokens)
    width = 64 if size == -1 or name == "nvfp4" else size  # nvfp4's factor is the token's
    first = 40 // width * width
    sharing = torch.zeros_like(found, dtype=torch.bool)
    sharing[1, first : first + width] = True
    assert torch.equal(found.isnan(), sharing)
    clean = tokens.nan_to_num(posinf=0, neginf=0)
    assert torch.equal(found[~sharing], rounded(clean)[~sharing])


def test_a_block_rounds_its_inputs_as_its_scheme_says():
    block = random_decoder("dense").blocks[0]
    assert isinstance(block, Block)
    x, site = torch.randn(3, 32), block.sites[0]
    assert block.round_inputs(site, x) is x
    block.rounding = InputRounding(4, "nvfp4", 16)
    expected = floats_per_token(x, FLOATS["nvfp4"], 16)
    assert torch.equal(block.round_inputs(site, x), expected)
    assert torch.equal(block.with_weights({}).round_inputs(site, x), expected)
    block.rounding = InputRounding(4, group_size=16)
    grouped = absmax_per_token(x.unflatten(1, (2, 16)), 4).flatten(1)
    assert torch.equal(block.round_inputs(site, x), grouped)
