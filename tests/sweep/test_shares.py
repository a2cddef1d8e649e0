"""What a GPU does not hold: activations in main memory, and a second try after out-of-memory."""

import os
import sys
from dataclasses import replace

import pytest

from q3q.placement import Grant
from q3q.sweep.machines import Machine, ResourceRequest
from q3q.sweep.ray.worker import (
    ALLOCATOR,
    ALLOCATOR_SETTINGS,
    keep_to,
)
from q3q.sweep.shares import (
    HALTED,
    HOST_BYTES,
    MOST_ACTIVATIONS,
    PINNED_MARGIN,
    ROOM,
    activation_bytes,
    choices_of,
)
from tests.specs import text_of
from tests.sweep.test_plan import allocations_of, facts, trial

H100 = 81_559 * 2**20
NODE = Machine(cpus=192, gpus=8, memory=10**12, gpu_memory=H100)


def choices(model="qwen3_8b", method="gptq", machine=NODE, request=None, **changes):
    one = trial(model, method, **changes)
    return choices_of(one, facts(model), [machine], request or ResourceRequest())


def test_the_plan_and_the_walk_divide_the_memory_for_activations_alike():
    from q3q.quantize.activations import HIDDEN_SHARE

    assert pytest.approx(1 / HIDDEN_SHARE) == HALTED


def test_a_share_of_a_gpu_holds_its_activations_too():
    one = choices().least
    hidden = 128 * 2048 * 4096 * 2
    assert (one.gpus, one.pinned) == (0.5, 0)
    assert one.room - one.needs >= HALTED * hidden
    # On a GPU where half of it holds the model but not the activations beside it, it gets more.
    narrow = replace(NODE, gpu_memory=int((one.needs + hidden) / 0.92 / 0.5))
    assert choices(machine=narrow).least.gpus == 1
    # A share that was asked for is given, with main memory for the rest.
    asked = choices(machine=narrow, request=ResourceRequest(gpus=0.5)).least
    assert (asked.gpus, 0 < asked.pinned <= PINNED_MARGIN * hidden) == (0.5, True)


def test_main_memory_is_reserved_for_activations_that_a_whole_gpu_does_not_hold():
    one = choices("qwen3_32b").least
    spec, shape = trial("qwen3_32b").spec, facts("qwen3_32b")
    assert (one.gpus, one.ranks, one.loader) == (1, 1, "resident")
    held = (one.room - one.needs) // HALTED
    assert one.pinned == int(PINNED_MARGIN * (activation_bytes(spec, shape) - held)) > 0
    assert one.memory == HOST_BYTES + 2 * shape.block_bytes(0, "bfloat16") + one.pinned
    # The trial learns of it, and a grant without any is written as before.
    grant = one.grant()
    assert Grant(**grant.to_json()) == grant
    assert grant.pinned == one.pinned
    assert "pinned" not in Grant(gpus=1, loader="resident", memory=1).to_json()


def need_of_a_rank():
    [one] = choices("qwen3_32b", request=ResourceRequest(gpus=8)).requested
    return one.needs


def test_the_ranks_of_a_gang_hold_a_part_of_the_activations_each():
    request = ResourceRequest(gpus=8)
    tight = replace(NODE, gpu_memory=int((need_of_a_rank() + 10**9) / ROOM))
    [one] = choices("qwen3_32b", machine=tight, request=request).requested
    held = max(0, one.room - one.needs) // HALTED
    total = activation_bytes(trial("qwen3_32b").spec, facts("qwen3_32b"))
    assert (one.ranks, one.pinned) == (8, int(PINNED_MARGIN * (total // 8 - held)))
    assert one.pinned > 0


def test_states_of_a_text_that_a_gangs_rank_0_gets_have_main_memory_too():
    request, text = ResourceRequest(gpus=8), text_of("wikitext2", window=2048, limit=400)
    tight = replace(NODE, gpu_memory=int((need_of_a_rank() + 10**9) / ROOM))
    [one] = choices("qwen3_32b", "rtn", machine=tight, request=request, text=text).requested
    states = 400 * 2048 * 5120 * 2
    beyond = PINNED_MARGIN * (states - (one.room - one.needs))
    assert one.pinned == min(int(beyond), MOST_ACTIVATIONS) > 0
    resident = choices("qwen3_8b", "rtn", text=text).least  # runs them one after the other
    assert resident.pinned == 0


def test_after_out_of_memory_one_gpu_that_streams_comes_before_a_gang():
    options = choices("qwen3_32b")
    first = options.least
    tries = [(first.ranks, first.loader)]
    larger = options.larger(first)
    assert (larger.ranks, larger.gpus, larger.loader) == (1, 1, "streamed")
    while (following := options.larger(larger)) is not None:
        tries.append((larger.ranks, larger.loader))
        larger = following
    assert all(ranks > 1 for ranks, _ in tries[2:])
    # A gang that is too small is tried with more ranks, and streamed only after the largest.
    gang = next(option for option in options.fitting if option.ranks == 2)
    assert options.larger(gang).ranks == 4
    gang = next(option for option in options.fitting if option.ranks == 8)
    assert options.larger(gang).loader == "streamed"


def test_a_share_is_tried_again_with_a_larger_one_first():
    options = choices("qwen3_0_6b")
    assert options.least.gpus == 0.25
    assert [options.larger(options.at_least(share)).gpus for share in (0.25, 0.5)] == [0.5, 1]
    assert options.larger(options.at_least(1.0)).loader == "streamed"


def test_a_machine_with_fewer_cores_than_gpus_fills_its_gpus_all_the_same():
    few = replace(NODE, cpus=4)
    one, _ = allocations_of(trial("qwen3_8b"), facts("qwen3_8b"), [few], ResourceRequest(gpus=1))
    assert one.cpus * few.gpus <= few.cpus


@pytest.mark.parametrize("given", [*ALLOCATOR_SETTINGS, None])
def test_what_the_user_says_of_memory_stays(monkeypatch, given):
    """Of two names torch reads the newer one first, so the older one is left to decide too."""
    threads = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    for name in (*ALLOCATOR_SETTINGS, *threads):
        monkeypatch.setenv(name, "")  # what keep_to sets is undone in the end
        monkeypatch.delenv(name)
    monkeypatch.setitem(sys.modules, "torch", type("T", (), {"set_num_threads": lambda n: None}))
    if given is not None:
        monkeypatch.setenv(given, "the user's")
    keep_to(1, 0.5)
    found = {name: os.environ[name] for name in ALLOCATOR_SETTINGS if name in os.environ}
    ours = {ALLOCATOR_SETTINGS[0]: ALLOCATOR}
    assert found == (ours if given is None else {given: "the user's"})


def test_torch_knows_the_allocators_setting():
    import torch

    told = torch._C._accelerator_setAllocatorSettings
    name, _, value = ALLOCATOR.partition(":")
    told(ALLOCATOR)
    with pytest.raises(ValueError, match="Expected 'True' or 'False'"):
        told(f"{name}:neither")
    told(f"{name}:False")
    assert value == "True"
