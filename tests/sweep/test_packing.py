"""No GPU waits for another trial: laws of shares on simulated nodes."""

import random
from collections import Counter
from dataclasses import replace
from functools import partial
from itertools import product

import pytest

from q3q.sweep.allocation import Allocation, Choices
from q3q.sweep.machines import Machine, ResourceRequest
from q3q.sweep.packing import WORTH, Load, share_out, simulate
from q3q.sweep.plan import simulated
from q3q.sweep.ray.cluster import Cluster
from q3q.sweep.ray.tasks import Resources, Task
from tests.specs import (
    STUDY_TASKS,
    calibration_of,
    evaluation_of,
    hub_model_of,
    make_trial,
    text_of,
)
from tests.sweep.test_plan import planned_for

H100 = 81_559 * 2**20
NODE = Machine(cpus=192, gpus=8, memory=10**12, gpu_memory=H100, name="NVIDIA H100 80GB HBM3")
PAPER = evaluation_of(
    text_of("wikitext2", window=2048), text_of("c4", window=2048), tasks=STUDY_TASKS, drift="auto"
)


def choices_from(least):
    """Return the choices of a trial that needs this share of a GPU."""
    options = tuple(
        Allocation(cpus=4 * share, gpus=share, memory=1, needs=1)
        for share in (0.25, 0.5, 1.0)
        if share >= least
    )
    return Choices(options, options)


def sweep_of(count, gpus, hosts):
    """Return the simulated sweep of random trials, longest first, and their loads.

    It runs on `gpus` GPUs of `hosts` machines.
    """
    draw = random.Random(f"{count} {gpus} {hosts}")
    choices = [choices_from(draw.choice((0.25, 0.5, 0.5, 1.0))) for _ in range(count)]
    loads = [
        Load(allocation=one.least, idle=draw.choice((0, 5, 60)), busy=draw.uniform(10, 600))
        for one in choices
    ]
    loads.sort(key=lambda load: -(load.idle + load.busy))
    choices = [choices_from(load.allocation.gpus) for load in loads]
    machines = [Machine(cpus=8 * gpus / hosts, gpus=gpus / hosts)] * hosts
    given = share_out(choices, loads, machines)
    whole, least = (
        simulate(
            [replace(load, allocation=pick(one)) for load, one in zip(loads, choices, strict=True)],
            machines,
        )
        for pick in (lambda one: one.at_least(1.0), lambda one: one.least)
    )
    loads = [replace(load, allocation=one) for load, one in zip(loads, given, strict=True)]
    return loads, simulate(loads, machines), whole.seconds, least.seconds


CASES = [
    *product((1, 2, 5, 7, 8, 9, 12, 15, 16, 17, 24, 33), ((1, 1), (2, 1), (2, 2), (8, 1), (8, 2)))
]


@pytest.mark.parametrize(("count", "node"), CASES)
def test_no_gpu_is_idle_while_a_trial_waits_or_computes_beside_another(count, node):
    gpus, hosts = node
    loads, sweep, whole, least = sweep_of(count, gpus, hosts)
    assert all(run.gpus for run in sweep.runs)
    for moment in sorted({run.start for run in sweep.runs} | {run.end for run in sweep.runs}):
        running = [run for run in sweep.runs if run.start <= moment < run.end]
        used = [gpu for run in running for gpu in run.gpus]
        if len(set(used)) == gpus:
            continue
        # A GPU is idle: nobody waits, since any of these trials would fit on it ...
        assert all(run.start <= moment for run in sweep.runs)
        # ... and nobody has just started on a GPU where another one runs.
        assert all(used.count(run.gpus[0]) == 1 for run in running if run.start == moment)
    assert sweep.seconds <= whole + 1e-6
    assert WORTH * sweep.seconds <= least + 1e-6
    if count <= gpus:
        assert not any(load.allocation.is_share for load in loads)


@pytest.mark.parametrize(("count", "node"), CASES)
def test_a_gpu_is_idle_only_while_all_that_wait_use_what_a_running_trial_still_makes(count, node):
    gpus, hosts = node
    draw = random.Random(f"{count} {gpus} {hosts}")
    whole = choices_from(1.0).least
    lengths = sorted((draw.uniform(10, 600) for _ in range(count)), reverse=True)
    makes = [{draw.choice("abcde"): draw.uniform(0, 1) * busy} for busy in lengths]
    loads = [
        Load(allocation=whole, idle=draw.choice((0, 60)), busy=busy, makes=names)
        for busy, names in zip(lengths, makes, strict=True)
    ]
    machines = [Machine(cpus=8 * gpus / hosts, gpus=gpus / hosts)] * hosts
    runs = simulate(loads, machines).runs
    made: dict[str, float] = {}
    for load, run in zip(loads, runs, strict=True):
        [(name, seconds)] = load.makes.items()
        made.setdefault(name, run.start + load.idle + seconds)
        # The first of a name makes it, and none of the others starts before it is made.
        assert run.start >= made[name] or made[name] == run.start + load.idle + seconds
    for moment in sorted({run.start for run in runs} | {run.end for run in runs}):
        if sum(run.start <= moment < run.end for run in runs) < gpus:
            waiting = [one for one, run in zip(loads, runs, strict=True) if run.start > moment]
            assert all(made[name] > moment for load in waiting for name in load.makes)


def paper_trial(model, method, bits=4, **scheme):
    length = 512 if method == "awq" else 2048
    return make_trial(
        method,
        bits,
        model=hub_model_of(model),
        calibration=None
        if method in ("none", "rtn")
        else calibration_of("c4", samples=128, length=length),
        evaluation=PAPER,
        **scheme,
    )


def test_the_readmes_sweep_of_8b_takes_eight_h100_less_than_a_quarter_of_an_hour():
    trials = [
        paper_trial("qwen3_8b", method, bits)
        for method, bits in [("none", 16), *product(("gptq", "awq"), (2, 3, 4))]
    ]
    planned = planned_for(trials, [NODE])
    assert [one.allocation.gpus for one in planned] == [1] * 7
    assert {gpu for run in simulated(planned, [NODE]).runs for gpu in run.gpus} == {
        (0, gpu) for gpu in range(7)
    }
    assert simulated(planned, [NODE]).seconds <= 14 * 60


def test_many_small_trials_share_gpus_where_that_ends_sooner():
    trials = [
        paper_trial(model, method, bits, seed=seed)
        for model in ("qwen3_0_6b", "qwen3_8b")
        for method, bits in [("none", 16), *product(("gptq", "awq", "rtn"), (2, 3, 4))]
        for seed in range(4)
    ]
    planned = planned_for(trials, [NODE])
    wholes = planned_for(trials, [NODE], ResourceRequest(gpus=1))
    together, alone = (simulated(one, [NODE]) for one in (planned, wholes))
    assert any(one.allocation.is_share for one in planned)
    assert together.seconds < WORTH * alone.seconds
    # What a trial is predicted to take is what it takes in the simulated sweep.
    for one, run in zip(planned, together.runs, strict=True):
        assert one.seconds == pytest.approx(run.seconds)
    assert sum(one.gpu_hours for one in planned) <= 8 * together.seconds / 3600


def test_a_trial_alone_in_its_process_gets_the_whole_gpu_and_few_threads(monkeypatch):
    from q3q.sweep import in_process
    from q3q.sweep.in_process import InProcess

    monkeypatch.setattr(in_process, "machine_here", lambda _: NODE)
    for host in (InProcess(), InProcess(all_cores=False)):
        machines, request = host.machines(ResourceRequest())
        trials = [paper_trial("qwen3_8b", "gptq", bits) for bits in (2, 3, 4)]
        for one in planned_for(trials, machines, request):
            assert (one.allocation.gpus, one.allocation.cpus) == (1, 16)
            assert one.allocation.grant().memory > 0.9 * H100
    machines, request = InProcess().machines(ResourceRequest(gpus=0))
    assert planned_for(trials[:1], machines, request)[0].allocation.cpus == 192


@pytest.mark.slow
def test_ray_places_shares_as_the_simulation_does(tmp_path):
    """Five trials on four GPUs: real workers, which wait until all five have one."""
    choices = [choices_from(0.5)] * 5
    loads = [Load(allocation=choices[0].least, idle=60, busy=60)] * 5
    machine = Machine(cpus=20, gpus=4)
    given = share_out(choices, loads, [machine])
    runs = simulate([replace(loads[0], allocation=one) for one in given], [machine]).runs

    def call(number, report):
        import os
        import time

        (tmp_path / str(number)).write_text(os.environ["CUDA_VISIBLE_DEVICES"])
        while len(list(tmp_path.iterdir())) < 5:
            time.sleep(0.05)

    with Cluster(cpus=20, gpus=4) as cluster:
        tasks = [
            Task(
                key=str(number),
                call=partial(call, number),
                resources=Resources(cpus=one.cpus, gpus=one.gpus),
            )
            for number, one in enumerate(given)
        ]
        outcomes = list(cluster.run(tasks, on_event=lambda *_: None))
    assert [outcome.error for outcome in outcomes] == [None] * 5
    placed = Counter(path.read_text() for path in tmp_path.iterdir())
    foreseen = Counter(run.gpus[0] for run in runs)
    assert sorted(placed.values()) == sorted(foreseen.values()) == [1, 1, 1, 2]
