"""Statistics: sums whose bits do not depend on who adds them up, in bounded memory."""

import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from q3q.models import experts
from q3q.models.anatomy import Computed, SiteInput
from q3q.models.footprint import LANES
from q3q.quantize.lanes import LaneSum, lane_of, lanes_of
from q3q.quantize.statistics import (
    MIN_EXPERT_TOKENS,
    Gram,
    Peak,
    StoredInputs,
)

# Files of `StoredInputs` are removed when it is garbage-collected, which warns.
pytestmark = pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning")
WINDOWS, LENGTH, COLUMNS, EXPERTS = 21, 10, 40, 4


def kept_on_disk(memory=3000):
    statistics = StoredInputs(25)
    statistics.bound(memory)
    return statistics


KINDS: dict[str, Callable[[], Any]] = {
    "Gram": Gram,
    "Peak": Peak,
    "StoredInputs": partial(StoredInputs, 25),
    "StoredInputs, all": partial(StoredInputs, 1000),
    "StoredInputs, on disk": kept_on_disk,
}


def every_expert(x):
    """The input of each expert's down if all tokens go to it."""
    generator = torch.Generator().manual_seed(5)
    gate, up = torch.randn(2, EXPERTS, COLUMNS // 2, COLUMNS, generator=generator)
    return experts.every_expert(x, gate, up)


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
        yield first, SiteInput(**vars(made) | {"windows": last - first, "total_windows": WINDOWS})


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
    """Return the statistics of one rank of a gang, which saw its own lanes only."""
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
def test_ranks_that_share_the_windows_have_the_bits_of_one_that_saw_all(kind, routing):
    make = KINDS[kind]
    expected = numbers(by_one(make, routing))
    for ranks in (1, 2, 3, 11):
        total = make()
        for rank in range(ranks):
            total.absorb(part_of(rank, ranks, make, routing))
        assert_same(numbers(total), expected)
    assert any(bool(tensor.any()) for tensor in expected)


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
    assert_same(numbers(total), numbers(by_one(make, "routed, down")))


def test_the_order_of_lanes_is_what_makes_the_bits():
    """Or the tests above could not fail: one run over all tokens gives other last bits."""
    gram, plain = by_one(Gram, "dense"), Gram()
    for _, inputs in batches("dense"):
        plain.update(SiteInput(**vars(inputs) | {"total_windows": 0}))  # one lane
    x = torch.cat([inputs.all_TI for _, inputs in batches("dense")]).double()
    # A float32 sum of n products errs by at most n u times the sum of their magnitudes, u = 2^-24.
    bound_II = len(x) * 2.0**-24 * (x.abs().T @ x.abs())
    for sum_II in (gram.sum_EII[0], plain.sum_EII[0]):
        assert ((sum_II - x.T @ x).abs() <= bound_II).all()
    assert not torch.equal(gram.sum_EII, plain.sum_EII)


def test_a_sum_is_lane_by_lane_in_order_written_out():
    """Each lane's tokens are small whole numbers times a power of two of its own.

    So float32 sums within a lane are exact in any order, and sums of lanes are rounded, in order.
    """
    lanes: dict[int, Any] = {}
    gram = Gram()
    for first, inputs in batches("dense, one linear"):
        lane = lane_of(first, WINDOWS)
        all_TI = inputs.all_TI.round().clamp(-8, 8) * 2.0 ** (5 * lane % 13)
        gram.update(SiteInput(**vars(inputs) | {"all_TI": all_TI, "experts": [all_TI]}))
        product = all_TI.T @ all_TI
        lanes[lane] = lanes[lane] + product if lane in lanes else product
    assert list(lanes) == list(range(LANES))
    total, backwards = lanes[0], lanes[LANES - 1]
    for lane in range(1, LANES):
        total, backwards = total + lanes[lane], backwards + lanes[LANES - 1 - lane]
    assert not torch.equal(total, backwards)
    assert torch.equal(gram.sum_EII[0], total)


def test_every_lane_is_one_ranks_and_ranks_have_them_in_order():
    for ranks in range(1, 12):
        lanes = [list(lanes_of(rank, ranks)) for rank in range(ranks)]
        assert [lane for own in lanes for lane in own] == list(range(LANES))
        assert max(map(len, lanes)) - min(map(len, lanes)) <= 1


def test_a_lane_is_a_run_of_windows():
    for windows in (1, 5, 8, 21, 128):
        lanes = [lane_of(window, windows) for window in range(windows)]
        assert lanes == sorted(lanes)
        assert lanes[0] == 0
        assert lanes[-1] < LANES
    assert {lane_of(window, 128) for window in range(128)} == set(range(LANES))


def test_one_process_holds_two_matrices_at_most_and_a_rank_its_lanes():
    counts, gram = [], Gram()
    for _, inputs in batches("dense", per_batch=1):
        gram.update(inputs)
        counts.append(len({tensor.data_ptr() for tensor in tensors(gram._sum)}))
    assert max(counts) == 2
    assert gram.sum_EII.shape == (1, COLUMNS, COLUMNS)
    assert len(tensors(gram._sum)) == 1
    assert [len(part_of(rank, 3, Gram, "dense")._sum.lanes) for rank in range(3)] == [2, 3, 3]


def assert_same(actual, expected):
    for tensor, other in zip(actual, expected, strict=True):
        assert torch.equal(tensor, other)


def tensors(lane_sum):
    parts = [*lane_sum.lanes.values(), lane_sum._total, lane_sum._spare]
    return [part for part in parts if part is not None]


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
    empty = LaneSum(lambda rows, columns: None)
    assert empty.total().numel() == 0


@pytest.mark.parametrize("sample", [25, 60, WINDOWS * LENGTH, 1000])
def test_of_experts_that_all_read_all_tokens_only_a_sample_is_held(sample):
    """It equals one that holds everything, as it must where the number of windows is unknown."""
    bounded = by_one(partial(StoredInputs, sample), "all, down")
    whole: Any = StoredInputs(sample)
    for first, inputs in batches("all, down"):
        whole.gram.first_window = lambda inputs, first=first: first
        whole.gram.lane = lambda inputs, first=first: lane_of(first, WINDOWS)
        whole.update(SiteInput(**vars(inputs) | {"total_windows": 0}))
    del whole.gram.first_window, whole.gram.lane
    for scale in (None, torch.rand(EXPERTS, COLUMNS // 2) + 0.5):
        if scale is not None:
            bounded.rescale(scale)
            whole.rescale(scale)
        assert_same(numbers(bounded), numbers(whole))
    everything = EXPERTS * WINDOWS * LENGTH * COLUMNS // 2
    assert stored_numbers(whole) == everything
    assert stored_numbers(bounded) <= min(everything, EXPERTS * 2 * sample * COLUMNS // 2)


@pytest.mark.parametrize(
    "routing", ["dense", "routed, gate and up", "routed, down", "all, gate and up"]
)
@pytest.mark.parametrize("memory", [0, 3000])
def test_inputs_beyond_their_memory_lie_on_disk_and_change_no_bit(routing, memory):
    bounded, whole = (
        by_one(partial(kept_on_disk, memory), routing),
        by_one(partial(StoredInputs, 25), routing),
    )
    assert_same(numbers(bounded), numbers(whole))
    assert whole._inputs.spilled == 0
    assert bounded._inputs.spilled > 0
    items = bounded._inputs._items
    in_memory = sum(item.nbytes for item in items if isinstance(item, torch.Tensor))
    assert in_memory <= memory
    assert (in_memory > 0) == (memory > 0)


def stored_numbers(statistics):
    """Count the numbers that are held of a site's inputs."""
    sampled = [tensor for part in statistics.sampled.values() for tensor in part]
    return sum(tensor.numel() for tensor in [*statistics._inputs, *sampled])


def test_what_is_made_on_the_way_is_made_once(monkeypatch):
    made = []
    make = Computed.__getitem__

    def recording(self, e):
        made.append(e)
        return make(self, e)

    monkeypatch.setattr(Computed, "__getitem__", recording)
    statistics = StoredInputs(25)
    for count, (_, inputs) in enumerate(batches("all, down"), 1):
        statistics.update(inputs)
        assert [e for e in made if e < EXPERTS] == count * list(
            range(EXPERTS)
        )  # one beyond the last ends a loop


def test_hessians_come_in_chunks_and_a_starved_experts_is_the_identity(monkeypatch):
    gram = by_one(Gram, "routed, down")
    mean, columns = gram.mean_EII(), gram.sum_EII.shape[-1]
    monkeypatch.setattr("q3q.quantize.statistics.HESSIAN_BYTES", 3 * 4 * columns**2)
    chunks = list(gram.hessians(starved=[3]))
    assert [(chunk.experts.start, chunk.experts.stop) for chunk in chunks] == [(0, 3), (3, 4)]
    assert torch.equal(chunks[0].mean_MII, mean[:3])
    assert torch.equal(chunks[1].mean_MII[0], torch.eye(columns))
    dead = torch.cat([chunk.dead_diagonal_M for chunk in chunks])
    assert torch.equal(dead, WINDOWS / (2 * gram.tokens_E))
    chunks[0].mean_MII.zero_()  # the caller's own
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
