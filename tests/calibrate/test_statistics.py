"""Statistics: sums whose bits do not depend on who adds them up, in bounded memory."""

import pickle
from functools import partial

import pytest
import torch

from q3q.models.anatomy import SiteInput
from q3q.models.qwen3_moe import EveryExpert
from q3q.quantize.statistics import (
    LANES,
    MIN_EXPERT_TOKENS,
    Gram,
    Kept,
    LaneSum,
    Peak,
    lane_of,
    lanes_of,
)

WINDOWS, LENGTH, COLUMNS, EXPERTS = 21, 10, 40, 4


def kept_on_disk(memory=3000):
    kept = Kept(25)
    kept.bound(memory)
    return kept


KINDS = {
    "Gram": Gram,
    "Peak": Peak,
    "Kept": partial(Kept, 25),
    "Kept, all": partial(Kept, 1000),
    "Kept, on disk": kept_on_disk,
}


def every_expert(x):
    """What each expert's down reads if all tokens go to it."""
    generator = torch.Generator().manual_seed(5)
    gate, up = torch.randn(2, EXPERTS, COLUMNS // 2, COLUMNS, generator=generator)
    return EveryExpert(x, gate, up)


def batches(routing, per_batch=2):
    """Windows of tokens on their way into a site, as a walk shows them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(WINDOWS * LENGTH, COLUMNS, generator=generator) * 10 ** torch.rand(
        COLUMNS, generator=generator
    )
    expert = torch.randint(EXPERTS, (len(x),), generator=generator)
    expert[: len(x) // 2].clamp_(max=EXPERTS - 2)  # the last one sees nothing for long
    for first in range(0, WINDOWS, per_batch):
        last = min(first + per_batch, WINDOWS)
        part, of = x[first * LENGTH : last * LENGTH], expert[first * LENGTH : last * LENGTH]
        routed = [part[of == e] for e in range(EXPERTS)]
        made = {
            "dense": SiteInput(part, [part], linears=3),
            "dense, one linear": SiteInput(part, [part], linears=1),
            "routed, gate and up": SiteInput(part, routed, linears=2),
            "routed, down": SiteInput(None, routed, linears=1),
            "all, gate and up": SiteInput(part, [part] * EXPERTS, linears=2),
            "all, down": SiteInput(None, every_expert(part), linears=1, unrouted=True),
        }[routing]
        yield first, SiteInput(**vars(made) | {"windows": last - first, "of_windows": WINDOWS})


ROUTINGS = [
    "dense",
    "dense, one linear",
    "routed, gate and up",
    "routed, down",
    "all, gate and up",
    "all, down",
]


def by_one(make, routing):
    statistics = make()
    for _, inputs in batches(routing):
        statistics.update(inputs)
    return statistics


def part_of(rank, ranks, make, routing):
    """What one rank of a gang hands over, having seen its own lanes alone."""
    statistics = make()
    statistics.keep_lanes()
    for first, inputs in batches(routing):
        if lane_of(first, WINDOWS) in lanes_of(rank, ranks):
            statistics.update(SiteInput(**vars(inputs) | {"first_window": first}))
    return pickle.loads(pickle.dumps(statistics))


def numbers(statistics):
    """All that methods read of statistics."""
    if isinstance(statistics, Peak):
        return [statistics.tokens_E, statistics.peak_EI]
    if isinstance(statistics, Gram):
        return [
            statistics.tokens_E,
            torch.tensor(statistics.windows),
            statistics.sum_EII,
            statistics.mean_EII(),
        ]
    return [
        *numbers(statistics.gram),
        statistics.mean_absolute_EI(),
        *statistics.samples(),
        *statistics.windows(),
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("ranks", [1, 2, 3, 11])
def test_ranks_that_share_the_windows_have_the_bits_of_one_that_saw_all(kind, routing, ranks):
    make = KINDS[kind]
    total = make()
    for rank in range(ranks):
        total.absorb(part_of(rank, ranks, make, routing))
    expected = numbers(by_one(make, routing))
    for found, wanted in zip(numbers(total), expected, strict=True):
        assert torch.equal(found, wanted)
    assert any(bool(one.any()) for one in expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sum_may_go_from_rank_to_rank_too(kind):
    make = KINDS[kind]
    total = make()
    for rank in range(3):
        total.absorb(part_of(rank, 3, make, "routed, down"))
        total = pickle.loads(pickle.dumps(total))
        fresh = make()
        fresh.absorb(total)  # begins with what it is handed
        total = fresh
    for found, wanted in zip(numbers(total), numbers(by_one(make, "routed, down")), strict=True):
        assert torch.equal(found, wanted)


def test_the_order_of_lanes_is_what_makes_the_bits():
    """Or the tests above could not fail: one run over all tokens gives other last bits."""
    gram, plain = by_one(Gram, "dense"), Gram()
    for _, inputs in batches("dense"):
        plain.update(SiteInput(**vars(inputs) | {"of_windows": 0}))  # one lane
    torch.testing.assert_close(gram.sum_EII, plain.sum_EII, rtol=1e-4, atol=1e-3)
    assert not torch.equal(gram.sum_EII, plain.sum_EII)


def test_a_sum_is_lane_by_lane_in_order_written_out():
    lanes = {}
    for first, inputs in batches("dense, one linear"):
        product = inputs.whole_TI.T @ inputs.whole_TI
        lane = lane_of(first, WINDOWS)
        lanes[lane] = lanes[lane] + product if lane in lanes else product
    assert list(lanes) == sorted(lanes)
    assert len(lanes) == LANES
    total = lanes[0]
    for lane in range(1, LANES):
        total = total + lanes[lane]
    upper = by_one(Gram, "dense, one linear").sum_EII[0].triu()
    torch.testing.assert_close(upper, total.triu(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("ranks", range(1, 12))
def test_every_lane_is_one_ranks_and_ranks_have_them_in_order(ranks):
    assert [lane for rank in range(ranks) for lane in lanes_of(rank, ranks)] == list(range(LANES))
    shares = [len(lanes_of(rank, ranks)) for rank in range(ranks)]
    assert max(shares) - min(shares) <= 1


def test_a_lane_is_a_run_of_windows():
    for windows in (1, 5, 8, 21, 128):
        lanes = [lane_of(window, windows) for window in range(windows)]
        assert lanes == sorted(lanes)
        assert lanes[0] == 0
        assert lanes[-1] < LANES
    assert {lane_of(window, 128) for window in range(128)} == set(range(LANES))


def test_one_process_holds_two_matrices_at_most_and_a_rank_its_lanes():
    held, gram = [], Gram()
    for _, inputs in batches("dense", per_batch=1):
        gram.update(inputs)
        held.append(len({one.data_ptr() for one in tensors(gram._sum)}))
    assert max(held) == 2
    assert gram.sum_EII.shape == (1, COLUMNS, COLUMNS)
    assert len(tensors(gram._sum)) == 1
    assert [len(part_of(rank, 3, Gram, "dense")._sum.lanes) for rank in range(3)] == [2, 3, 3]


def tensors(lane_sum):
    found = [*lane_sum.lanes.values(), lane_sum._total, lane_sum._spare]
    return [one for one in found if one is not None]


def test_windows_out_of_order_and_parts_out_of_order_are_refused():
    shown = [
        SiteInput(**vars(inputs) | {"first_window": first}) for first, inputs in batches("dense")
    ]
    gram = Gram()
    gram.update(shown[-1])
    with pytest.raises(ValueError, match="show windows in order"):
        gram.update(shown[0])
    total = Gram()
    total.absorb(part_of(1, 2, Gram, "dense"))
    with pytest.raises(ValueError, match="in the order of their lanes"):
        total.absorb(part_of(0, 2, Gram, "dense"))
    total = LaneSum(None)
    assert total.total().numel() == 0


@pytest.mark.parametrize("sample", [25, 60, WINDOWS * LENGTH, 1000])
def test_of_experts_that_all_read_all_tokens_only_a_sample_is_held(sample):
    """And it says what one says that holds everything (to which nobody told how many windows will come)."""
    bounded, whole = by_one(partial(Kept, sample), "all, down"), Kept(sample)
    for first, inputs in batches("all, down"):
        whole.gram.place = lambda inputs, first=first: first
        whole.gram.lane = lambda inputs, first=first: lane_of(first, WINDOWS)
        whole.update(SiteInput(**vars(inputs) | {"of_windows": 0}))
    del whole.gram.place, whole.gram.lane
    for scale in (None, torch.rand(EXPERTS, COLUMNS // 2) + 0.5):
        if scale is not None:
            bounded.rescale(scale)
            whole.rescale(scale)
        for found, wanted in zip(numbers(bounded), numbers(whole), strict=True):
            assert torch.equal(found, wanted)
    everything = EXPERTS * WINDOWS * LENGTH * COLUMNS // 2
    assert held(whole) == everything
    assert held(bounded) <= min(everything, EXPERTS * 2 * sample * COLUMNS // 2)


@pytest.mark.parametrize(
    "routing", ["dense", "routed, gate and up", "routed, down", "all, gate and up"]
)
@pytest.mark.parametrize("memory", [0, 3000])
def test_inputs_beyond_their_memory_lie_on_disk_and_change_no_bit(routing, memory):
    bounded, whole = (
        by_one(partial(kept_on_disk, memory), routing),
        by_one(partial(Kept, 25), routing),
    )
    for found, wanted in zip(numbers(bounded), numbers(whole), strict=True):
        assert torch.equal(found, wanted)
    assert whole._inputs.spilled == 0
    assert bounded._inputs.spilled > 0
    in_memory = sum(one.nbytes for one in bounded._inputs._items if isinstance(one, torch.Tensor))
    assert in_memory <= memory
    assert (in_memory > 0) == (memory > 0)


def held(kept):
    """Numbers that are held of a site's inputs."""
    return sum(
        one.numel()
        for one in [*kept._inputs, *(one for taken in kept.taken.values() for one in taken)]
    )


def test_what_is_made_on_the_way_is_made_once(monkeypatch):
    made = []
    make = EveryExpert.__getitem__
    monkeypatch.setattr(EveryExpert, "__getitem__", lambda self, e: made.append(e) or make(self, e))
    kept = Kept(25)
    for count, (_, inputs) in enumerate(batches("all, down"), 1):
        kept.update(inputs)
        assert [e for e in made if e < EXPERTS] == count * list(
            range(EXPERTS)
        )  # one beyond the last ends a loop


def test_hessians_come_in_chunks_and_a_starved_experts_is_the_identity(monkeypatch):
    gram = by_one(Gram, "routed, down")
    mean, columns = gram.mean_EII(), gram.sum_EII.shape[-1]
    monkeypatch.setattr("q3q.quantize.statistics.HESSIAN_BYTES", 3 * 4 * columns**2)
    chunks = list(gram.hessians(starved=[3]))
    assert [(one.experts.start, one.experts.stop) for one in chunks] == [(0, 3), (3, 4)]
    assert torch.equal(chunks[0].mean_MII, mean[:3])
    assert torch.equal(chunks[1].mean_MII[0], torch.eye(columns))
    dead = torch.cat([one.dead_diagonal_M for one in chunks])
    assert torch.equal(dead, WINDOWS / (2 * gram.tokens_E))
    chunks[0].mean_MII.zero_()  # theirs who asked
    assert torch.equal(gram.mean_EII(), mean)


def test_a_hessian_that_all_experts_share_comes_once():
    gram = by_one(Gram, "all, gate and up")
    assert WINDOWS * LENGTH > MIN_EXPERT_TOKENS
    [only] = gram.hessians()
    assert only.experts == slice(0, EXPERTS)
    assert torch.equal(only.mean_MII, gram.mean_EII()[:1])
    assert only.dead_diagonal_M.shape == (1,)
    [starved] = gram.hessians(starved=list(range(EXPERTS)))
    assert torch.equal(starved.mean_MII[0], torch.eye(COLUMNS))
