"""Laws of AWQ, and its searches against plain transcriptions of the official ones."""

import pytest
import torch

from q3q.calibrate.statistics import Kept
from q3q.models.anatomy import SiteInput
from q3q.numerics.grid import awq_grid, into_groups, on_grid
from q3q.quantize.methods.awq import Awq, clip_search, scale_candidate, scaled_rounding
from q3q.quantize.methods.settings import AwqSettings
from q3q.quantize.walk import QuantizedBlock, _observe, _scale_task, migrate_scale
from q3q.spec import Scheme

SCHEME = Scheme(bits=3, group_size=16, symmetric=False)


def plain_rounding(w, group_size, bits):
    """pseudo_quantize_tensor, asymmetric, group by group."""
    out = torch.empty_like(w)
    for r in range(w.shape[0]):
        for g in range(0, w.shape[1], group_size):
            part = w[r, g : g + group_size]
            scale = max(float(part.max() - part.min()), 1e-5) / (2**bits - 1)
            zero = min(max(-round(float(part.min()) / scale), 0), 2**bits - 1)
            codes = torch.clamp(torch.round(part / scale) + zero, 0, 2**bits - 1)
            out[r, g : g + group_size] = (codes - zero) * scale
    return out


def test_rounding_of_scaled_weights_equals_the_plain_loops():
    generator = torch.Generator().manual_seed(0)
    w, s = torch.randn(6, 32, generator=generator), torch.rand(32, generator=generator) + 0.5
    torch.testing.assert_close(scaled_rounding(w, s, SCHEME), plain_rounding(w * s, 16, 3) / s, rtol=1e-4, atol=1e-5)


def test_scale_candidates():
    mean = torch.tensor([[1.0, 4.0, 16.0]])
    assert scale_candidate(mean, 0.0).tolist() == [[1.0, 1.0, 1.0]]
    torch.testing.assert_close(scale_candidate(mean, 0.5), torch.tensor([[0.5, 1.0, 2.0]]))


def test_clip_search_equals_the_plain_loops():
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(5, 32, generator=generator) ** 3
    x = torch.randn(70, 32, generator=generator)
    expected = w.clone()
    for r in range(5):
        for g in range(0, 32, 16):
            part, lowest = w[r, g : g + 16], float("inf")
            for i in range(10):
                limit = part.abs().max() * (1 - i / 20)
                tried = plain_rounding(part.clamp(-limit, limit)[None], 16, 3)[0]
                cost = float(((x[:, g : g + 16] @ (tried - part)) ** 2).mean())
                if cost < lowest:
                    lowest, best = cost, limit
            expected[r, g : g + 16] = part.clamp(-best, best)
    torch.testing.assert_close(clip_search(w, x, SCHEME), expected)
    assert not torch.equal(expected, w)


def observed(decoder, windows, index=0):
    """One block's sites with what AWQ keeps of them."""
    block, method = decoder.blocks[index].with_weights({}), Awq(AwqSettings())
    hidden = [decoder.embed(windows)]
    runs = [block.stages(x, decoder.rope) for x in hidden]
    return block, hidden, {site.name: _observe(method, site, runs, index) for site in block.sites}


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
            scale = scale[:, :, :1].expand_as(scale.clone().expand(-1, -1, group.repeat, -1)).flatten(1)
        changed = migrate_scale(block.weights, group, scale)
        assert not torch.equal(changed[group.producer], block.weights[group.producer])
        torch.testing.assert_close(block.with_weights(changed)(hidden[0], decoder.rope), before, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_the_scale_chosen_is_the_plain_searchs(decoder, windows, kind):
    """For each group: 20 exponents, the piece's output error of each, the first of the lowest."""
    block, hidden, statistics = observed(decoder, windows)
    for group in block.scale_groups:
        chosen = []
        task = _scale_task(
            block, group, statistics[group.site.name], decoder.rope, hidden, QuantizedBlock(0, {}, {}, [])
        )
        task.apply = chosen.append
        Awq(AwqSettings()).rebalance(task, SCHEME)
        if group.site.name == "o":
            assert not chosen  # v and o differ in shape under grouped-query attention: left alone by default
            continue
        per_expert = kind == "moe" and group.site.name == "down"
        for e in range(4 if per_expert else 1):
            inputs = (
                statistics[group.site.name].expert_tokens(e)
                if per_expert
                else statistics[group.site.name].batches[0].whole_TI
            )
            mean = inputs.abs().mean(0)
            costs = []
            for step in range(20):
                s = mean.pow(step / 20).clamp(min=1e-4)
                s = s / (s.max() * s.min()).sqrt()
                if len(group.site.weights) == 1:
                    w = block.weights[group.site.weights[0]]
                    w = w[e] if w.ndim == 3 else w
                    costs.append(((inputs @ (plain_rounding(w * s, 16, 3) / s - w).T) ** 2).sum())
                else:
                    tried = {}
                    for name in group.site.weights:
                        w = block.weights[name]
                        flat = w.flatten(0, -2)
                        tried[name] = (plain_rounding(flat * s, 16, 3) / s).view_as(w)
                    pairs = zip(task.run(tried), task.run({}), strict=True)
                    costs.append(sum(((new - old) ** 2).sum() for new, old in pairs))
            best = int(torch.stack(costs).argmin())
            s = mean.pow(best / 20).clamp(min=1e-4)
            torch.testing.assert_close(chosen[0][e], s / (s.max() * s.min()).sqrt(), rtol=1e-4, atol=1e-5)


def test_statistics_follow_a_scale():
    x = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    s = torch.arange(1.0, 9.0)[None]
    kept, direct = Kept(), Kept()
    kept.update(SiteInput(x, [x]))
    kept.rescale(s)
    direct.update(SiteInput(x / s, [x / s]))
    torch.testing.assert_close(kept.mean_absolute_EI(), direct.mean_absolute_EI())
    torch.testing.assert_close(kept.gram.mean_EII(), direct.gram.mean_EII())


@pytest.mark.parametrize("group_size", [-1, 16])
def test_clipping_never_moves_a_weight_beyond_its_groups_largest(group_size):
    scheme = Scheme(bits=2, group_size=group_size, symmetric=False)
    generator = torch.Generator().manual_seed(0)
    w, x = torch.randn(4, 32, generator=generator), torch.randn(600, 32, generator=generator)
    clipped = clip_search(w, x, scheme)
    assert (clipped.abs() <= w.abs() + 1e-6).all()
    groups = into_groups(clipped, group_size)

    def cost(weight_groups):
        rounded = on_grid(weight_groups, awq_grid(weight_groups, 2, symmetric=False), 2)
        wrong = (rounded - into_groups(w, group_size)).flatten(1)
        return float(((x @ wrong.T) ** 2).sum())

    assert cost(groups) <= cost(into_groups(w, group_size)) * 1.05
