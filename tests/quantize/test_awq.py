"""Laws of AWQ, one linear against the plain algorithm, and blocks against a transcription of
llm-awq.

The transcription of auto_scale_block and auto_clip_layer shares nothing with the code that it
judges: it has its own forward pass, and takes one head, one expert, one group at a time.
"""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from q3q.data.texts import load_text
from q3q.data.windows import draw_windows, encoder
from q3q.models.anatomy import ScaleGroup, Site, SiteInput
from q3q.models.checkpoint import Checkpoint, load_tokenizer
from q3q.models.decoder import load_decoder
from q3q.models.spool import Spool
from q3q.numerics.grid import awq_grid, into_groups, on_grid
from q3q.numerics.levels import IntegerLevels
from q3q.numerics.linalg import FiniteCheck
from q3q.numerics.weights import QuantizedWeight
from q3q.quantize.activations import Activations, show_inputs
from q3q.quantize.method import ScaleTask, SiteTask
from q3q.quantize.methods import awq
from q3q.quantize.methods.awq import (
    awq_round_plain,
    clip_search,
    first_lowest,
    piece_losses,
    scale_candidate,
    scaled_rounding,
    still_racing,
)
from q3q.quantize.scales import migrate_scale, scale_task
from q3q.quantize.statistics import StoredInputs
from q3q.quantize.walk import quantize_model
from q3q.spec import Scheme
from tests.methods import built
from tests.nowhere import Nowhere

SCHEME = Scheme(bits=3, group_size=16, symmetric=False)
QKV = [f"self_attn.{x}_proj.weight" for x in "qkv"]


def plain_codes(part, bits, symmetric):
    """pseudo_quantize_tensor of one group: codes, scale, zero point."""
    if symmetric:
        scale = max(float(part.abs().max()), 1e-5) / (2 ** (bits - 1) - 1)
        zero = 2 ** (bits - 1)
    else:
        scale = max(float(part.max() - part.min()), 1e-5) / (2**bits - 1)
        zero = min(max(-round(float(part.min()) / scale), 0), 2**bits - 1)
    return torch.clamp(torch.round(part / scale) + zero, 0, 2**bits - 1), scale, zero


def from_midpoint(steps):
    return (steps - steps.floor() - 0.5).abs()


def plain_rounding(w, group_size, bits, symmetric=False):
    out = torch.empty_like(w)
    for r in range(w.shape[0]):
        for g in range(0, w.shape[1], group_size):
            codes, scale, zero = plain_codes(w[r, g : g + group_size], bits, symmetric)
            out[r, g : g + group_size] = (codes - zero) * scale
    return out


def plain_clip(w, x, group_size, bits, symmetric=False):
    """auto_clip_layer: tokens with a stride of n // 512, ten ranges, strictly lower wins."""
    x = x[:: max(1, len(x) // 512)]
    clipped = w.clone()
    for r in range(w.shape[0]):
        for g in range(0, w.shape[1], group_size):
            part, lowest = w[r, g : g + group_size], math.inf
            for i in range(10):
                limit = part.abs().max() * (1 - i / 20)
                tried = plain_rounding(
                    part.clamp(-limit, limit)[None], group_size, bits, symmetric
                )[0]
                cost = float(((x[:, g : g + group_size] @ (tried - part)) ** 2).mean())
                if cost < lowest:
                    lowest, best = cost, limit
            clipped[r, g : g + group_size] = part.clamp(-best, best)
    return clipped


def plain_norm(x, gain):
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * gain


def plain_attention(w, windows, facts):
    """Return what o_proj reads and what it returns, for windows [T, H]."""
    read, returned = [], []
    heads, kv_heads, size = facts.heads, facts.kv_heads, facts.head_dim
    for x in windows:
        time = torch.arange(len(x)).float()[:, None] / facts.rope_theta ** (
            torch.arange(0, size, 2).float() / size
        )
        cos, sin = time.cos(), time.sin()

        def turned(y, cos=cos, sin=sin):
            a, b = y[:, : size // 2], y[:, size // 2 :]
            return torch.cat([a * cos - b * sin, b * cos + a * sin], 1)

        contexts = []
        for head in range(heads):
            own = slice(head * size, head * size + size)
            other = slice(
                head // (heads // kv_heads) * size, (head // (heads // kv_heads) + 1) * size
            )
            q = turned(plain_norm(x @ w[QKV[0]][own].T, w["self_attn.q_norm.weight"]))
            k = turned(plain_norm(x @ w[QKV[1]][other].T, w["self_attn.k_norm.weight"]))
            score = (q @ k.T / size**0.5).masked_fill(
                torch.ones(len(x), len(x)).triu(1).bool(), -math.inf
            )
            contexts.append(score.softmax(1) @ (x @ w[QKV[2]][other].T))
        read.append(torch.cat(contexts, 1))
        returned.append(read[-1] @ w["self_attn.o_proj.weight"].T)
    return torch.cat(read), torch.cat(returned)


def plain_mlp(w, x, facts):
    """Return the inputs of each expert's gate and up, those of its down (lists over experts), and
    the MLP's output.
    """
    if "mlp.gate.weight" not in w:
        names = ("mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight")
        gate, up, down = ([w[name]] for name in names)
        routes = [[(0, 1.0)]] * len(x)
    else:
        gate, up, down = (w[f"mlp.experts.{name}_proj.weight"] for name in ("gate", "up", "down"))
        routes = []
        for p in (x @ w["mlp.gate.weight"].T).softmax(1):
            top = sorted(range(facts.experts), key=lambda e: -float(p[e]))[: facts.top_k]
            routes.append([(e, float(p[e]) / sum(float(p[i]) for i in top)) for e in top])
    read: list[list[Any]] = [[] for _ in gate]
    gated: list[list[Any]] = [[] for _ in gate]
    out = torch.zeros_like(x)
    for t, route in enumerate(routes):
        for e, share in route:
            g = gate[e] @ x[t]
            middle = g * torch.sigmoid(g) * (up[e] @ x[t])
            read[e].append(x[t])
            gated[e].append(middle)
            out[t] += share * (down[e] @ middle)
    nothing = torch.zeros(0, x.shape[1]), torch.zeros(0, gate[0].shape[0])
    return *(
        [torch.stack(rows) if rows else none for rows in inputs]
        for inputs, none in zip((read, gated), nothing, strict=True)
    ), out


def plain_awq(block, hidden, scheme):
    """Return a block's scales by site, its codes, and each weight's distance from a midpoint.

    `hidden` is [B, T, H]. Grouped-query attention: v -> o is left out. An expert with fewer than
    128 tokens has no scale of its own, and is not clipped.
    """
    w, facts = dict(block.weights), block.facts
    experts = [name for name in w if "mlp.experts" in name]
    least = 128 if experts else 1

    def rounded(weight, s):
        flat = weight.reshape(-1, weight.shape[-1])
        return (
            plain_rounding(flat * s, scheme.group_size, scheme.bits, scheme.symmetric) / s
        ).view_as(weight)

    def search(x, weights, output):
        mean = sum(row.abs() for row in x) / len(x)
        original, lowest = output(weights), math.inf
        for step in range(20):
            s = mean.pow(step / 20).clamp(min=1e-4)
            s = s / (s.max() * s.min()).sqrt()
            loss = float(
                (output({name: rounded(weight, s) for name, weight in weights.items()}) - original)
                .pow(2)
                .mean()
            )
            if loss < lowest:
                lowest, best = loss, s
        return best

    normed = plain_norm(hidden, w["input_layernorm.weight"])
    o_input, attended = plain_attention(w, normed, facts)
    x = hidden.flatten(0, 1) + attended
    mlp_input = plain_norm(x, w["post_attention_layernorm.weight"])
    expert_inputs, down_inputs, _ = plain_mlp(w, mlp_input, facts)
    qkv_input = normed.flatten(0, 1)

    scales = {}
    s = search(
        qkv_input,
        {n: w[n] for n in QKV},
        lambda new: plain_attention({**w, **new}, normed, facts)[1],
    )
    for name in QKV:
        w[name] = w[name] * s
    scales["qkv"], qkv_input = s, qkv_input / s

    inner = "mlp.experts" if experts else "mlp"
    gate_up = [f"{inner}.gate_proj.weight", f"{inner}.up_proj.weight"]
    s = search(
        mlp_input,
        {n: w[n] for n in gate_up},
        lambda new: plain_mlp({**w, **new}, mlp_input, facts)[2],
    )
    for name in (*gate_up, *(["mlp.gate.weight"] if experts else [])):
        w[name] = w[name] * s
    scales["gate_up"], expert_inputs = s, [x / s for x in expert_inputs]

    up, down = f"{inner}.up_proj.weight", f"{inner}.down_proj.weight"
    three = {name: (w[name] if experts else w[name][None]).clone() for name in (*gate_up, down)}
    scales["down"] = []
    for e, x in enumerate(down_inputs):
        s = torch.ones(x.shape[1])
        if len(x) >= least:
            s = search(x, {"down": three[down][e]}, lambda new, x=x: x @ new["down"].T)
        three[down][e] *= s
        three[up][e] /= s[:, None]
        scales["down"].append(s)
        down_inputs[e] = x / s

    codes, from_tie = {}, {}
    reads = {QKV[0]: None, QKV[1]: None, QKV[2]: [qkv_input], "self_attn.o_proj.weight": [o_input]}
    reads |= dict.fromkeys(gate_up, expert_inputs) | {down: down_inputs}
    for name, x in reads.items():
        weight = three.get(name, w[name][None])
        codes[name], from_tie[name] = torch.empty_like(weight), torch.empty_like(weight)
        for e in range(len(weight)):
            clipped = weight[e]
            if x is not None and len(x[e]) >= (least if name in experts else 1):
                clipped = plain_clip(
                    weight[e], x[e], scheme.group_size, scheme.bits, scheme.symmetric
                )
            for r in range(clipped.shape[0]):
                for g in range(0, clipped.shape[1], scheme.group_size):
                    part = slice(g, g + scheme.group_size)
                    codes[name][e, r, part], scale, _ = plain_codes(
                        clipped[r, part], scheme.bits, scheme.symmetric
                    )
                    from_tie[name][e, r, part] = from_midpoint(clipped[r, part] / scale)
    return scales, codes, from_tie


@pytest.mark.parametrize("symmetric", [True, False])
@torch.inference_mode()
def test_a_block_comes_out_as_in_the_plain_transcription(decoder, windows, kind, symmetric):
    scheme, windows = (
        Scheme(bits=3, group_size=16, symmetric=symmetric),
        windows[: 3 if kind == "dense" else 6],
    )
    original = decoder.blocks[0]
    if not symmetric:
        # Otherwise clipping cuts both sides of a group, whose zero point is then a tie (-3.5 at
        # 3 bits) that the last bit decides. Here positive weights are longer: it cuts one side.
        longer = {
            name: torch.where(weight > 0, weight, weight / 4)
            for name, weight in original.weights.items()
            if name.endswith("_proj.weight")
        }
        original = decoder.blocks[0] = original.with_weights(longer)
    scales, codes, from_tie = plain_awq(original, decoder.embed(windows), scheme)
    block = quantize_model(decoder, built("awq"), scheme, windows, Nowhere())[0]
    if kind == "moe":  # some experts are starved, some are not
        assert 0 < len(block.notes["blocks.0.down"]["starved_experts"]) < 4
    for site, norm in (
        ("qkv", "input_layernorm.weight"),
        ("gate_up", "post_attention_layernorm.weight"),
    ):
        torch.testing.assert_close(
            original.weights[norm] / block.changed[norm], scales[site], rtol=1e-4, atol=1e-5
        )
    for name, expected in codes.items():
        quantized = block.quantized[name]
        assert isinstance(quantized, QuantizedWeight)
        differs = quantized.codes_EOI != expected
        assert (from_tie[name][differs] < 1e-3).all(), name


def test_rounding_of_scaled_weights_equals_the_plain_loops():
    generator = torch.Generator().manual_seed(0)
    w, s = torch.randn(6, 32, generator=generator), torch.rand(32, generator=generator) + 0.5
    torch.testing.assert_close(
        scaled_rounding(w, s, SCHEME), plain_rounding(w * s, 16, 3) / s, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("scale", "clip"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize(("group_size", "grid"), [(16, 20), (-1, 7)])
def test_one_linear_comes_out_as_in_the_plain_algorithm(
    monkeypatch, symmetric, scale, clip, group_size, grid
):
    generator = torch.Generator().manual_seed(1)
    weight, x = torch.randn(24, 64, generator=generator), torch.randn(1200, 64, generator=generator)
    # Clipped at one end only: no zero point is a tie. The best scale and range cost less than the
    # second best by at least 2e-4 of the cost, which no order of summation in float32 changes.
    weight = torch.where(weight > 0, weight, weight / 16)
    x = x @ torch.randn(64, 64, generator=generator) * torch.rand(64, generator=generator) ** 3
    scheme = Scheme(bits=3, group_size=group_size, symmetric=symmetric)
    method = built("awq", scale=scale, clip=clip, grid=grid)
    kept = method.observe()
    kept.update(SiteInput(x, [x]))
    applied = torch.ones(1, 64)

    def apply(chosen):
        applied.copy_(chosen)
        kept.rescale(chosen)

    weights, group = {"down": weight, "up": weight}, ScaleGroup(Site("down", ("down",)), "up")
    run: Any = None  # nothing runs: the group has no windows
    method.rebalance(ScaleTask(group, weights, kept, [], 1, run, Spool, apply), scheme)
    task = SiteTask(0, "down", (weight * applied)[None], {"down": slice(None)}, kept)
    fast = method.quantize(task, scheme).dequantize()[0]
    steps = torch.empty(0)

    def observed(levels, weight_EOGS, grid):
        nonlocal steps
        steps = (weight_EOGS / grid.scale)[0].flatten(1)  # the last call rounds the result
        return on_grid(weight_EOGS, grid, levels.bits)

    monkeypatch.setattr(IntegerLevels, "on_grid", observed)
    expected_scale, expected = awq_round_plain(
        weight.double(), x.double(), scheme, grid=grid, scale=scale, clip=clip
    )
    assert (expected_scale.std() > 0.1) == scale
    torch.testing.assert_close(applied[0].double(), expected_scale, rtol=1e-4, atol=1e-5)
    differs = (fast - expected).abs() > 1e-3 * expected.abs().mean()
    assert (from_midpoint(steps)[differs] < 1e-3).all()  # a tie may fall the other way


def test_scale_candidates():
    mean = torch.tensor([[1.0, 4.0, 16.0]])
    assert scale_candidate(mean, 0.0).tolist() == [[1.0, 1.0, 1.0]]
    torch.testing.assert_close(scale_candidate(mean, 0.5), torch.tensor([[0.5, 1.0, 2.0]]))


def test_the_first_of_equals_is_chosen_and_never_what_is_no_number():
    candidates = torch.arange(4.0)[:, None, None].expand(4, 3, 1)
    loss = torch.tensor(
        [
            [2.0, math.nan, math.nan],
            [1.0, 5.0, math.nan],
            [1.0, math.inf, math.nan],
            [3.0, 5.0, math.nan],
        ]
    )
    assert first_lowest(loss, candidates).flatten().tolist() == [1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("group_size", "tokens"), [(16, 9), (16, 70), (-1, 9), (-1, 70)]
)  # few columns, or few tokens
@pytest.mark.parametrize("at_once", [40, 2**19])
def test_clip_search_equals_the_plain_loops(monkeypatch, group_size, tokens, at_once):
    monkeypatch.setattr(awq, "WEIGHTS_AT_ONCE", {"cpu": at_once})
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(3, 5, 32, generator=generator) ** 3
    inputs = [torch.randn(n, 32, generator=generator) for n in (tokens, tokens // 2, 0)]
    clipped = clip_search(w, inputs, Scheme(bits=3, group_size=group_size, symmetric=False))
    size = 32 if group_size == -1 else group_size
    for e in range(2):
        expected = plain_clip(w[e], inputs[e], size, 3)
        torch.testing.assert_close(clipped[e], expected)
        assert not torch.equal(expected, w[e])
    assert torch.equal(clipped[2], w[2])  # no tokens to judge by: unclipped


def observed(decoder, windows, index=0):
    """Return a block, its inputs, and AWQ's statistics of its sites."""
    block, method = decoder.blocks[index].with_weights({}), built("awq")
    hidden = [decoder.embed(part) for part in windows.split(5)]
    statistics = {site.name: method.observe() for site in block.sites}
    for x in hidden:
        for site, inputs in block.stages(x, decoder.rope):
            counted = replace(inputs, windows=len(x), total_windows=len(windows))
            show_inputs(statistics[site.name], site, counted, slice(None), FiniteCheck())
    return block, hidden, statistics


def task_of(decoder, block, group, statistics, hidden):
    """Return one group's task, which applies a chosen scale at once."""

    def apply(scale):
        block.weights.update(migrate_scale(block.weights, group, scale))
        statistics.rescale(scale)

    counts = [len(part) for part in hidden]
    firsts = [sum(counts[:b]) for b in range(len(counts))]
    activations = Activations(hidden, firsts, sum(counts), hidden[0].shape[1])
    return scale_task(block, group, statistics, decoder.rope, activations, apply)


@pytest.mark.parametrize("kind", ["dense", "moe", "biased"])
@torch.inference_mode()
def test_migrating_scale_leaves_the_blocks_function_unchanged(decoder, windows):
    block, hidden, _ = observed(decoder, windows)
    before = block(hidden[0], decoder.rope)
    generator = torch.Generator().manual_seed(2)
    for group in block.scale_groups:
        reader = block.weights[group.site.weights[0]]
        rows = reader.shape[0] if reader.ndim == 3 and len(group.site.weights) == 1 else 1
        scale = torch.rand(rows, reader.shape[-1], generator=generator) + 0.5
        if group.repeat > 1:  # heads that read one value head share its scale
            scale = scale.unflatten(1, (-1, group.repeat, group.head_dim))
            scale = (
                scale[:, :, :1].expand_as(scale.clone().expand(-1, -1, group.repeat, -1)).flatten(1)
            )
        changed = migrate_scale(block.weights, group, scale)
        assert not torch.equal(changed[group.producer], block.weights[group.producer])
        torch.testing.assert_close(
            block.with_weights(changed)(hidden[0], decoder.rope), before, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("tokens_at_once", [80, 2**10])
@torch.inference_mode()
def test_a_candidate_is_dropped_only_if_it_cannot_be_the_first_lowest(
    decoder, windows, monkeypatch, tokens_at_once
):
    monkeypatch.setattr(awq, "TOKENS_AT_ONCE", {"cpu": tokens_at_once})
    block, hidden, statistics = observed(decoder, windows)
    for group in (group for group in block.scale_groups if len(group.site.weights) > 1):
        task = task_of(decoder, block, group, statistics[group.site.name], hidden)
        mean = task.statistics.mean_absolute_EI()
        candidates = torch.stack([scale_candidate(mean, step / 20) for step in range(20)])
        candidates = torch.cat([candidates[:8], candidates[7:8], candidates[8:]])  # two are equal
        rows = torch.cat(list(task.windows)).unflatten(0, (-1, task.row))
        original, errors = task.run(rows, {}), []
        for scale in candidates:
            tried = {
                name: scaled_rounding(block.weights[name], scale[0], SCHEME)
                for name in group.site.weights
            }
            errors.append((task.run(rows, tried) - original).double().square().sum())
        plain = torch.stack(errors)
        losses = piece_losses(task, candidates, SCHEME, race=False)[:, 0]
        assert int(losses.argmin()) == int(plain.argmin())
        finished = losses.isfinite()
        torch.testing.assert_close(losses[finished], plain[finished], rtol=1e-5, atol=0)
        if tokens_at_once == 80:  # with everything at once there is nothing to save
            assert not finished.all()


def chosen_scales(decoder, windows, index, scheme, race):
    """Return the scales that a block's sites get, and how often a token was run through a piece
    with tried weights.
    """
    block, hidden, statistics = observed(decoder, windows, index)
    method, scales, judged = built("awq", race=race), [], 0
    for group in block.scale_groups:
        task = task_of(decoder, block, group, statistics[group.site.name], hidden)
        run, apply = task.run, task.apply

        def counted(rows, exchanged, run=run):
            nonlocal judged
            judged += rows[..., 0].numel() if exchanged else 0
            return run(rows, exchanged)

        def noted(scale, apply=apply):
            scales.append(scale)
            apply(scale)

        task.run, task.apply = counted, noted
        method.rebalance(task, scheme)
    return scales, judged / windows.numel()


def same_scales_for_less(decoder, windows, index, scheme):
    (exact, all_judged), (raced, judged) = (
        chosen_scales(decoder, windows, index, scheme, race) for race in (False, True)
    )
    assert all(torch.equal(a, b) for a, b in zip(exact, raced, strict=True))
    assert judged < 0.9 * all_judged


@pytest.mark.parametrize("bits", [2, 4])
@torch.inference_mode()
def test_racing_chooses_what_all_tokens_choose(decoder, bits):
    decoder.embedding_VH[:, ::8] *= 10  # loud channels, so that scales matter
    windows = torch.randint(61, (64, 16), generator=torch.Generator().manual_seed(2))
    for index in range(2):
        same_scales_for_less(
            decoder, windows, index, Scheme(bits=bits, group_size=16, symmetric=False)
        )


@pytest.mark.parametrize("name", ["dense", "moe"])
@torch.inference_mode()
def test_racing_chooses_what_all_tokens_choose_in_a_trained_model(name):
    checkpoint = Checkpoint(Path(awq.__file__).parents[2] / "models/demo" / name)
    text = load_text("demo", split="calibration")
    text = replace(text, documents=text.documents[:20])
    encode = encoder(load_tokenizer(checkpoint.folder))
    windows = draw_windows(text, encode, samples=16, length=64, draw="random", seed=0)
    decoder = load_decoder(checkpoint, torch.float32)
    same_scales_for_less(decoder, windows, 0, Scheme(bits=3, group_size=128, symmetric=False))


def by_hand(monkeypatch, inputs_RI, windows):
    """Return the task of a piece that multiplies its inputs by a scale s, which costs |x (s -
    1)|**2.
    """
    monkeypatch.setattr(awq, "_scaled_rounding_by_parts", lambda weight, scale, *rest: scale)
    return ScaleTask(
        ScaleGroup(Site("gate_up", ("gate", "up")), "norm"),
        {"gate": inputs_RI, "up": inputs_RI},
        SimpleNamespace(tokens_E=torch.tensor([len(inputs_RI)])),
        inputs_RI.view(windows, -1, inputs_RI.shape[1]).unbind(),
        1,
        lambda rows, exchanged: rows * exchanged.get("gate", 1.0),
        Spool,
        lambda scale: None,
    )


def test_candidates_that_cost_the_same_all_run_to_the_end_and_the_first_wins(monkeypatch):
    task = by_hand(
        monkeypatch, torch.randn(128, 2, generator=torch.Generator().manual_seed(0)), windows=64
    )
    losses = piece_losses(task, torch.full((5, 1, 2), 1.5), SCHEME, race=True)
    assert losses.argmin() == 0
    assert losses[0].isfinite()
    loss = torch.rand(32, dtype=torch.float64).expand(5, 32)
    assert still_racing(loss, [0, 1, 3], 64) == [0, 1, 3]


def test_the_first_windows_are_not_taken_for_all(monkeypatch):
    # The first half activates one channel, the second half, more strongly, the other; each
    # candidate suits one.
    inputs = torch.rand(128, 2, generator=torch.Generator().manual_seed(0)) + 0.5
    inputs[:64, 1], inputs[64:, 0] = 0, 0
    inputs[64:] *= 2
    task = by_hand(monkeypatch, inputs, windows=64)
    candidates = torch.tensor([[[1.0, 2.0]], [[2.0, 1.0]], [[9.0, 9.0]]])
    losses = piece_losses(task, candidates, SCHEME, race=True).flatten().tolist()
    assert losses == [math.inf, pytest.approx(float((inputs[:, 0] ** 2).sum())), math.inf]


@pytest.mark.parametrize(
    ("windows", "races"), [(7, 0), (15, 0), (16, 1), (32, 2), (64, 3), (128, 3)]
)
def test_with_few_windows_nothing_is_raced(monkeypatch, windows, races):
    seen = []

    def all_race_on(loss, alive, windows):
        seen.append(loss.shape[1])
        return alive

    monkeypatch.setattr(awq, "still_racing", all_race_on)
    generator = torch.Generator().manual_seed(0)
    task = by_hand(monkeypatch, torch.randn(windows * 3, 2, generator=generator), windows)
    candidates = torch.rand(6, 1, 2, generator=generator)
    raced, exact = (piece_losses(task, candidates, SCHEME, race=race) for race in (True, False))
    assert raced.argmin() == exact.argmin()
    torch.testing.assert_close(raced.amin(), exact.amin())
    assert seen == [windows // 8, windows // 4, windows // 2][3 - races :]


def test_a_candidate_is_dropped_at_six_standard_errors_of_the_paired_difference():
    generator = torch.Generator().manual_seed(0)
    # Each window's loss with every candidate.
    shared = 100 * torch.rand(16, dtype=torch.float64, generator=generator)
    spread = torch.tensor([-1.0, 1.0], dtype=torch.float64).repeat(8)
    error = float(spread.std()) * math.sqrt(1 / 16 - 1 / 64)
    loss = torch.stack(
        [
            shared,
            shared + spread + 6.1 * error,
            shared + spread + 5.9 * error,
            shared * math.nan,
            shared + 1e-6,
        ]
    )
    assert still_racing(loss, [0, 1, 2, 3, 4], 64) == [0, 2]
    assert still_racing(loss, [1, 2], 64) == [2]
    assert still_racing(loss, [3, 0, 2], 64) == [0, 2]
    assert still_racing(loss, [1], 64) == [1]


@torch.inference_mode()
def test_scaling_v_and_o_shares_a_scale_among_the_heads_that_read_one_value(decoder, windows):
    before = decoder.blocks[0](decoder.embed(windows), decoder.rope)
    block, hidden, statistics = observed(decoder, windows)
    task = task_of(decoder, block, block.scale_groups[1], statistics["o"], hidden)
    chosen: list[torch.Tensor] = []
    apply, task.apply = task.apply, chosen.append
    built("awq").rebalance(task, SCHEME)
    assert not chosen  # v and o differ in shape (grouped-query attention): unscaled by default
    built("awq", v_to_o=True).rebalance(task, SCHEME)
    heads = chosen[0].view(2, 3, 8)
    torch.testing.assert_close(heads, heads[:, :1].expand_as(heads))
    assert heads.std() > 0.01
    apply(chosen[0])
    torch.testing.assert_close(
        block(decoder.embed(windows), decoder.rope), before, rtol=1e-4, atol=1e-4
    )


def test_statistics_follow_a_scale():
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    s = torch.arange(1.0, 9.0)[None]
    rescaled, direct = StoredInputs(10), StoredInputs(10)
    rescaled.update(SiteInput(x, [x]))
    rescaled.rescale(s)
    direct.update(SiteInput(x / s, [x / s]))
    torch.testing.assert_close(rescaled.mean_absolute_EI(), direct.mean_absolute_EI())
    torch.testing.assert_close(rescaled.gram.mean_EII(), direct.gram.mean_EII())
    torch.testing.assert_close(rescaled.samples()[0], direct.samples()[0])


def test_samples_are_evenly_spaced_whatever_the_batches():
    x = torch.arange(200.0)[:, None].expand(200, 4)
    statistics = StoredInputs(30)
    for part in x.split([7, 0, 1, 92, 50, 50]):
        statistics.update(SiteInput(None, [part, part[:1]]))
    assert torch.equal(statistics.samples()[0], x[::6])
    assert statistics.samples()[1].shape == (5, 4)
    torch.testing.assert_close(statistics.mean_absolute_EI()[0], x.mean(0))


@pytest.mark.parametrize("count", [30, 1000])
def test_of_what_one_dense_linear_reads_only_the_sample_is_kept(count):
    x = torch.arange(200.0)[:, None] * torch.tensor([1.0, 2.0, 3.0, 4.0])
    sampled, full = StoredInputs(count), StoredInputs(count)
    for windows in (x[:70], x[70:80], x[80:]):  # each window 10 tokens long
        inputs = SiteInput(
            windows, [windows], windows=len(windows) // 10, total_windows=20, linears=1
        )
        sampled.update(inputs)
        full.update(replace(inputs, linears=2))
    assert len(sampled.windows()) == 0
    assert len(full.windows()) == 20
    assert torch.equal(torch.cat(list(full.windows())), x)
    for statistics in (sampled, full):
        statistics.rescale(torch.tensor([[1.0, 2.0, 4.0, 8.0]]))
    assert torch.equal(
        sampled.samples()[0], (x / torch.tensor([1.0, 2.0, 4.0, 8.0]))[:: 6 if count == 30 else 1]
    )
    assert torch.equal(sampled.samples()[0], full.samples()[0])
    assert torch.equal(sampled.mean_absolute_EI(), full.mean_absolute_EI())
    assert torch.equal(sampled.gram.sum_EII, full.gram.sum_EII)


@pytest.mark.parametrize("group_size", [-1, 16])
def test_clipping_takes_the_cheapest_range_of_each_group_and_moves_no_weight_outwards(group_size):
    scheme = Scheme(bits=2, group_size=group_size, symmetric=False)
    generator = torch.Generator().manual_seed(0)
    w, x = torch.randn(64, 32, generator=generator), torch.randn(600, 32, generator=generator)
    w *= w.abs()
    clipped = clip_search(w[None], [x], scheme)[0]
    assert (clipped.abs() <= w.abs()).all()
    assert (clipped * w >= 0).all()
    groups = into_groups(w, group_size)
    x_GTS = into_groups(x[:: len(x) // 512], group_size).transpose(0, 1).double()

    def costs(range_OGS):
        """Round the clipped weights; return each group's squared output error, float64 [G, O]."""
        rounded = on_grid(range_OGS, awq_grid(range_OGS, 2, symmetric=False), 2)
        error_GOS = (rounded.double() - groups.double()).transpose(0, 1)
        return (error_GOS @ x_GTS.mT).square().sum(-1)

    largest = groups.abs().amax(-1, keepdim=True)
    limits = [largest * (1 - step / 20) for step in range(10)]
    costs_LGO = torch.stack([costs(groups.clamp(-limit, limit)) for limit in limits])
    cheapest, limit_GO = costs_LGO.min(0)
    assert {0, 9} <= set(limit_GO.flatten().tolist())  # from the full range to the narrowest
    clipped_costs = costs(into_groups(clipped, group_size))
    assert (clipped_costs <= cheapest * (1 + 1e-4)).all()  # float32 sums of 600 terms err by less
    assert (clipped_costs < 0.9 * costs(groups)).any()
