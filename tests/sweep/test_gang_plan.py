"""Gangs that `cluster.ranks_per_trial` requests, on GPUs and on cores."""

from pathlib import Path

import pytest

import q3q.models.demo
from q3q.errors import ConfigError
from q3q.models.facts import read_facts
from q3q.sweep.machines import Machine, ResourceRequest, request_of
from tests.specs import make_trial
from tests.sweep.test_plan import allocations_of

KNOBS = dict.fromkeys(
    ("cpus_per_trial", "gpus_per_trial", "ranks_per_trial", "memory_per_trial", "gpu_memory"),
    "auto",
) | {"patience": 0}
FACTS = read_facts(Path(q3q.models.demo.__file__).parent / "dense")
TRIAL = make_trial("rtn", group_size=64)
CORES = Machine(cpus=4, memory=16_000_000_000)
GPUS = Machine(cpus=32, gpus=4, memory=256_000_000_000, gpu_memory=80_000_000_000)


@pytest.mark.parametrize(("machine", "gpus"), [(CORES, 0), (GPUS, 1)])
def test_requested_ranks_share_the_model(machine, gpus):
    gang, _ = allocations_of(TRIAL, FACTS, [machine], ResourceRequest(ranks=2))
    assert (gang.ranks, gang.loader, gang.gpus) == (2, "sharded", gpus)
    alone, _ = allocations_of(TRIAL, FACTS, [machine], ResourceRequest())
    assert (alone.ranks, alone.loader) == (1, "resident")


def test_one_rank_is_no_gang():
    assert allocations_of(TRIAL, FACTS, [GPUS], ResourceRequest(ranks=1))[0].ranks == 1


def test_ranks_that_fit_nowhere_are_refused():
    with pytest.raises(ConfigError, match="fits nowhere"):
        allocations_of(TRIAL, FACTS, [CORES], ResourceRequest(ranks=5, cpus=1))


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"ranks_per_trial": 0}, "cluster.ranks_per_trial=0: give 1"),
        ({"ranks_per_trial": 1.5}, "cluster.ranks_per_trial=1.5"),
        ({"ranks_per_trial": 2, "gpus_per_trial": 4}, "contradict"),
    ],
)
def test_ranks_that_make_no_sense_are_refused(knobs, words):
    with pytest.raises(ConfigError, match=words):
        request_of({**KNOBS, **knobs}.__getitem__)


def test_ranks_are_read():
    assert request_of({**KNOBS, "ranks_per_trial": 2}.__getitem__).ranks == 2
    assert request_of(KNOBS.__getitem__).ranks is None
