"""Whole models through q3q and through plain copies of the official drivers: the same codes.

The two share no code: the plain drivers run transformers' model with hooks, layer by layer and
sample by sample, and solve linear by linear. Both compute in float32, whose sums differ in the last
bits from code to code and from processor to processor, so a weight that close to the midpoint of
two codes may round the other way. Wherever codes differ the tests ask for such a tie. They do not
count ties: how many fall the other way depends on the processor. Where a code decides what later
linears see, the plain driver goes on with q3q's codes, so one tie excuses nothing behind it. With
q3q's weights, transformers' model must have the perplexity of q3q's decoder.
"""

import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import q3q.models.demo
from q3q.data.texts import load_text
from q3q.data.windows import consecutive_windows, draw_windows, encoder
from q3q.evaluate.perplexity import perplexity
from q3q.models.checkpoint import Checkpoint, load_tokenizer
from q3q.models.decoder import load_decoder
from q3q.quantize.walk import quantize_model
from q3q.spec import Scheme
from tests.fidelity import plain
from tests.fidelity.checkpoints import RELATIVES, windows_of
from tests.methods import built
from tests.nowhere import Nowhere

SAME_WORTH = 1e-5  # perplexity, relative, of the same weights
TIE = 1e-3  # from a midpoint, in units of the scale
NEAR = 1e-4  # of BiLLM's decisions, relative to what decides them


def walked(folder, method, scheme, windows):
    """Return q3q's decoder after quantization, and what it chose."""
    decoder = load_decoder(Checkpoint(folder), torch.float32)
    with torch.inference_mode():
        blocks = quantize_model(decoder, method, scheme, windows, Nowhere())
    for block in decoder.blocks:
        block.rounding = scheme.inputs
    return decoder, choices(blocks)


def choices(blocks):
    """Return what was chosen for every linear, an expert's as its own, by name."""
    found = {}
    for block in blocks:
        for name, weight in block.quantized.items():
            linear = f"{block.index}.{name.removesuffix('.weight')}"
            for e in range(weight.shape[0]):
                expert = linear.replace("experts.", f"experts.{e}.")
                found[expert] = one_expert(weight, e)
    return found


def one_expert(weight, e):
    if not hasattr(weight, "zero_EOG"):
        return weight.dequantize()[e]
    columns = weight.shape[2]
    if weight.group_EI is None:
        group = torch.arange(columns) // (columns // weight.scale_EOG.shape[2])
    else:
        group = weight.group_EI[e].long()
    return plain.Rounded(
        weight.codes_EOI[e].float(), weight.scale_EOG[e][:, group], weight.zero_EOG[e][:, group]
    )


def check(ours, theirs, decoder, model, held_out, *, sequential=False):
    """Ask for the same codes but for ties, and for the same perplexity of the same weights."""
    same_codes(ours, theirs, sequential=sequential)
    put(ours, model)
    assert worths_differ(decoder, model, held_out) < SAME_WORTH


def same_codes(ours, theirs, *, sequential=False):
    """Ask for a tie wherever a code differs, and for the same grids where none does.

    Codes are those of a tie too if their zero point is one.

    sequential: in a row what a code is decides what comes after it: the first to differ is a tie.
    """
    assert ours.keys() == theirs.keys()
    for name, one in theirs.items():
        other_zero = one.other_zero(ours[name])
        differs = one.differs(ours[name]) | other_zero
        decided = differs
        if sequential:
            first = differs[:, one.order].cumsum(1) == 1
            decided = first[:, one.order.argsort()] & differs
        if decided.any():
            distance = one.from_tie
            if other_zero.any():  # codes less another zero point differ only where one is cut off
                distance = torch.where(other_zero, one.zero_from_tie, distance)
            farthest = float(distance[decided].max())
            print(f"{name}: {int(differs.sum())} codes differ, {farthest:.1e} from a tie at most")
            assert farthest < TIE, f"{name}: a code differs {farthest:.1e} from a tie"
        same = ~differs.any(1)
        torch.testing.assert_close(
            ours[name].scale[same], one.scale[same], rtol=1e-3, atol=1e-6, msg=name
        )


def put(ours, model):
    """Give transformers' model q3q's weights."""
    for k, layer in enumerate(model.model.layers):
        for name, linear in plain.linears(layer).items():
            linear.weight.copy_(ours[f"{k}.{name}"].weight)


def worths_differ(decoder, model, windows):
    loss = abs(worth(decoder, windows) / plain.perplexity(model, windows) - 1)
    print(f"perplexity {loss:.1e}")
    return loss


def worth(decoder, held_out):
    with torch.inference_mode():
        return perplexity(decoder, held_out).value


@torch.inference_mode()
def test_the_unquantized_models_agree(folder, held_out):
    """And so does the list of experts that stands in for transformers' fused ones."""
    model = plain.load(folder)
    fused = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = held_out[:2]
    torch.testing.assert_close(
        model(input_ids=ids).logits, fused(input_ids=ids).logits, rtol=1e-4, atol=1e-4
    )
    decoder = load_decoder(Checkpoint(folder), torch.float32)
    assert worth(decoder, held_out) == pytest.approx(plain.perplexity(model, held_out), rel=1e-5)


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric", "mse"),
    [
        (2, -1, False, False),
        (4, 32, False, False),
        (3, 32, True, False),
        (8, -1, True, False),
        (3, 32, False, True),
    ],
)
def test_rtn(folder, held_out, bits, group_size, symmetric, mse):
    model = plain.load(folder)
    theirs = plain.rtn(model, bits, group_size, symmetric, mse)
    scheme = Scheme(bits=bits, group_size=group_size, symmetric=symmetric)
    decoder, ours = walked(folder, built("rtn", mse=mse), scheme, None)
    check(ours, theirs, decoder, model, held_out)


@pytest.mark.parametrize("family", RELATIVES)
def test_other_families(folders, windows, held_out, family):
    """Biases, other rotary embeddings, no norms of heads, delta rules: RTN's and GPTQ's codes."""
    scheme = Scheme(bits=4, group_size=32, symmetric=False)
    model = plain.load(folders[family])
    decoder, ours = walked(folders[family], built("rtn"), scheme, None)
    check(ours, plain.rtn(model, 4, 32), decoder, model, held_out)
    decoder, ours = walked(folders[family], built("gptq"), scheme, windows)
    model = plain.load(folders[family])
    theirs = plain.gptq(model, windows, bits=4, group_size=32, symmetric=False, follow=ours)
    check(ours, theirs, decoder, model, held_out, sequential=True)


GPTQ: dict[str, dict[str, Any]] = {
    "study": dict(),
    "study 8 bits": dict(bits=8),
    "study 2 bits": dict(bits=2),
    "study per channel": dict(group_size=-1),
    "official defaults": dict(act_order=False, true_sequential=False),
    "groups that start inside a block of columns": dict(act_order=False, block_size=48),
    "static groups": dict(static_groups=True),
    "symmetric, mse": dict(symmetric=True, mse=True),
}


@pytest.mark.parametrize(
    ("kind", "variant"),
    [
        *(("dense", variant) for variant in GPTQ),
        *(("moe", variant) for variant in ("study", "static groups", "symmetric, mse")),
    ],
)
def test_gptq(folder, windows, held_out, variant):
    knobs = {"bits": 4, "group_size": 32, "symmetric": False, **GPTQ[variant]}
    scheme = Scheme(**{key: knobs[key] for key in ("bits", "group_size", "symmetric")})
    own = {key: knobs[key] for key in knobs.keys() - {"bits", "group_size", "symmetric"}}
    decoder, ours = walked(folder, built("gptq", **own), scheme, windows)
    model = plain.load(folder)
    theirs = plain.gptq(model, windows, **knobs, follow=ours)
    check(ours, theirs, decoder, model, held_out, sequential=True)


def test_gptq_where_few_tokens_reach_an_expert(folders, windows, held_out):
    """q3q rounds it to nearest. The official code has no rule, and clears one without tokens."""
    folder, few = folders["moe starved"], windows[:8]
    model = plain.load(folder)
    starved = starved_linears(model, few)
    decoder, ours = walked(
        folder, built("gptq"), Scheme(bits=4, group_size=16, symmetric=False), few
    )
    theirs = plain.gptq(model, few, 4, 16, follow=ours)
    check(ours, theirs, decoder, model, held_out, sequential=True)
    assert all(ours[name].weight.abs().max() > 0 for name in starved)


def starved_linears(model, windows, experts=1):
    """Return the linears of the first layer's experts that too few tokens reach."""
    hidden, kwargs = plain.first_inputs(model, windows)
    layer = model.model.layers[0]
    seen = plain.hessians_of(layer, list(plain.linears(layer)), hidden, kwargs)
    starved = [name for name, one in seen.items() if one.tokens < plain.MIN_EXPERT_TOKENS]
    assert len(starved) == 3 * experts
    return [f"0.{name}" for name in starved]


@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_where_no_token_activates_a_channel(folders, kind, windows, held_out, act_order):
    """Such columns are cleared, and count as diagonal 1 in the order and in the damping's mean."""
    folder = folders[f"{kind} dead"]
    scheme = Scheme(bits=4, group_size=32, symmetric=False)
    decoder, ours = walked(folder, built("gptq", act_order=act_order), scheme, windows)
    model = plain.load(folder)
    theirs = plain.gptq(model, windows, 4, 32, act_order=act_order, follow=ours)
    check(ours, theirs, decoder, model, held_out, sequential=True)


AWQ: dict[str, dict[str, Any]] = {
    "study": dict(),
    "study 3 bits per channel": dict(bits=3, group_size=-1),
    "study 2 bits": dict(bits=2),
    "scales alone": dict(clip=False),
    "clipping alone": dict(scale=False),
}


@pytest.mark.parametrize(
    ("kind", "variant"),
    [*(("dense", variant) for variant in AWQ), ("moe", "study"), ("moe", "study 2 bits")],
)
def test_awq(folders, kind, windows, held_out, variant):
    """On weights whose positive side is longer, so that clipping never cuts both sides (below)."""
    knobs = {"bits": 4, "group_size": 32, **AWQ[variant]}
    ours, theirs, decoder, model = awq_on(folders[f"{kind} skewed"], knobs, windows)
    check(ours, theirs, decoder, model, held_out)


def test_awq_where_few_tokens_reach_an_expert(folders, windows, held_out):
    folder, few = folders["moe starved skewed"], windows[:8]
    starved_linears(plain.load(folder), few, experts=2)
    ours, theirs, decoder, model = awq_on(folder, {"bits": 4, "group_size": 32}, few)
    check(ours, theirs, decoder, model, held_out)


@pytest.mark.parametrize(("kind", "group_size"), [("dense", 32), ("dense", -1), ("moe", 32)])
def test_awq_where_clipping_cuts_both_sides(folder, windows, held_out, group_size):
    ours, theirs, decoder, model = awq_on(folder, {"bits": 4, "group_size": group_size}, windows)
    check_clipped(ours, theirs, decoder, model, held_out)


def check_clipped(ours, theirs, decoder, model, held_out):
    """Ask for the same codes, or for a grid that costs no more than the search may end with.

    A range cut to [-m, m] has its zero point at (2**bits - 1) / 2: the last bit of m decides it. So
    some groups end on another grid, whichever code runs, and no two machines need agree. But a
    search takes the cheapest range it sees, so no group may cost more than its cheapest range does
    when its ties fall the dearer way.
    """
    for name, one in ours.items():
        other = theirs[name]
        moved = (one.scale / other.scale - 1).abs() > 1e-3
        another_grid = moved | (one.zero != other.zero)
        assert other.from_tie[(one.codes != other.codes) & ~another_grid].le(TIE).all(), name
        if other.clipping is None:
            assert not moved.any(), name
            assert torch.equal(one.zero[another_grid], plain.other_zero(other)[another_grid]), name
        else:
            costs = other.clipping.costs_of(one.weight)
            for cost, highest in zip(costs, other.clipping.highest_G, strict=True):
                assert (cost <= 1.001 * highest).all(), name
    put(ours, model)
    assert worths_differ(decoder, model, held_out) < SAME_WORTH


def trained(which):
    """A trained model's folder, calibration windows and held-out windows."""
    folder = Path(q3q.models.demo.__path__[0]) / which
    encode = encoder(load_tokenizer(folder))
    text = load_text("demo", split="calibration")
    windows = draw_windows(text, encode, samples=4, length=256, draw="random", seed=0)
    return (
        folder,
        windows,
        consecutive_windows(encode(load_text("demo", split="evaluation").joined), 256, 4),
    )


@pytest.mark.slow
@pytest.mark.parametrize("which", ["dense", "moe"])
def test_gptq_on_a_trained_model(which):
    folder, windows, held_out = trained(which)
    scheme = Scheme(bits=4, group_size=128, symmetric=False)
    decoder, ours = walked(folder, built("gptq"), scheme, windows)
    model = plain.load(folder)
    theirs = plain.gptq(model, windows, 4, 128, follow=ours)
    check(ours, theirs, decoder, model, held_out, sequential=True)


@pytest.mark.slow
def test_awq_on_a_trained_model():
    folder, windows, held_out = trained("dense")
    ours, theirs, decoder, model = awq_on(folder, {"bits": 4, "group_size": 128}, windows)
    check_clipped(ours, theirs, decoder, model, held_out)


def awq_on(folder, knobs, windows):
    model = plain.load(folder)
    theirs = plain.awq(model, windows, **knobs)
    knobs = dict(knobs)
    scheme = Scheme(bits=knobs.pop("bits"), group_size=knobs.pop("group_size"), symmetric=False)
    decoder, ours = walked(folder, built("awq", **knobs), scheme, windows)
    return ours, theirs, decoder, model


SMOOTHQUANT: dict[str, dict[str, Any]] = {
    "w8a8": dict(bits=8, act_bits=8),
    "w4a8": dict(bits=4, act_bits=8),
    "w4a4, alpha 0.8": dict(bits=4, act_bits=4, alpha=0.8),
    "the study's script": dict(bits=4, act_bits=8, smooth=False),
}


@pytest.mark.parametrize("variant", SMOOTHQUANT)
def test_smoothquant(folder, windows, variant):
    """An activation near a midpoint is a coin toss, and changes all that follows it in its window.

    So windows are short and many, and what counts is the median one's perplexity. With 4 bits no
    coin falls in it; with 8, where midpoints are many, one code is worth little.
    """
    knobs = dict(SMOOTHQUANT[variant])
    model = plain.load(folder)
    theirs = plain.smoothquant(model, windows, **knobs)
    scheme = Scheme(
        bits=knobs.pop("bits"), group_size=-1, symmetric=True, act_bits=knobs.pop("act_bits")
    )
    method = built("smoothquant", **knobs)
    decoder, ours = walked(folder, method, scheme, windows if knobs.get("smooth", True) else None)
    same_codes(ours, theirs)
    put(ours, model)
    differences = [
        worths_differ(decoder, model, window_1T) for window_1T in windows_of(48, 8, seed=2).split(1)
    ]
    assert statistics.median(differences) < (SAME_WORTH if scheme.act_bits == 4 else 1e-3)


@pytest.mark.parametrize(
    ("which", "metric"),
    [("dense wide", "hessian"), ("dense wide", "magnitude"), ("moe starved", "hessian")],
)
def test_billm(folders, windows, held_out, which, metric):
    """Two and more blocks of columns a row. The weights are compared: means, scales, signs in one.

    An expert that few tokens reach is given the identity for a Hessian (q3q's rule).

    Ties: the border between small and large lies between two neighbouring weights, and a sign's
    lies at a mean. A last bit moves a weight across. Its row's levels follow, and so does what the
    search for a structure sees in the linear's later blocks.
    """
    folder = folders[which]
    model = plain.load(folder)
    if which == "moe starved":
        windows = windows[:8]
        starved_linears(model, windows)
    scheme = Scheme(bits=1, group_size=64, symmetric=False)
    decoder, ours = walked(folder, built("billm", salient_metric=metric), scheme, windows)
    theirs = plain.billm(model, windows, block_size=64, metric=metric, follow=ours)
    assert ours.keys() == theirs.keys()
    for name, (expected, _, near) in theirs.items():
        differs = (ours[name] - expected).abs() > 1e-3 * expected.abs().mean()
        rows_OB = differs.unflatten(1, (-1, 64)).any(2)
        for block in torch.where(rows_OB.any(0))[0][:1].tolist():
            farthest = float(near[rows_OB[:, block], block].max())
            print(f"{name}: {int(rows_OB[:, block].sum())} rows, {farthest:.1e} from a tie at most")
            assert farthest < NEAR, name
    assert worths_differ(decoder, model, held_out) < SAME_WORTH
