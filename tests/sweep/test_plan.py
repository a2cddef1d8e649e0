"""Resources from true byte counts, order, packing and refusals, for Qwen3's shapes."""

import math
import os
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest

from q3q.errors import ConfigError
from q3q.kv_scheme import KvScheme
from q3q.models.facts import read_facts
from q3q.models.footprint import need
from q3q.quantize.methods import registry
from q3q.quantize.methods.registry import Offer, method_ref
from q3q.quantize.methods.settings import GptqSettings, MethodSettings, RtnSettings
from q3q.record import TrialRecord
from q3q.sweep.allocation import Allocation
from q3q.sweep.costs import CostModel, Rate, forward
from q3q.sweep.disk import left_behind
from q3q.sweep.machines import Machine, ResourceRequest, expected, request_of, size, sized
from q3q.sweep.made import Made
from q3q.sweep.packing import Load, simulate
from q3q.sweep.plan import describe, plan, simulated
from q3q.sweep.shares import (
    FRACTIONS,
    ROOM,
    choices_of,
    fits,
)
from tests.commands import python
from tests.specs import (
    OBSERVING,
    calibration_of,
    evaluation_of,
    hub_model_of,
    make_trial,
    qwen3_config,
    text_of,
)

SHAPES = {  # hidden, layers, heads, kv_heads, intermediate, tied
    "qwen3_0_6b": (1024, 28, 16, 8, 3072, True),
    "qwen3_8b": (4096, 36, 32, 8, 12288, False),
    "qwen3_32b": (5120, 64, 64, 8, 25600, False),
    "qwen3_30b_a3b": (2048, 48, 32, 4, 6144, False),
}
EXPERTS: dict[str, Any] = {
    "model_type": "qwen3_moe",
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
}


def facts(name):
    experts: dict[str, Any] = EXPERTS if name == "qwen3_30b_a3b" else {}
    return read_facts(qwen3_config(*SHAPES[name], **experts))


WIKITEXT2 = text_of("wikitext2", window=2048, limit=10)
PLACEMENT, EVALUATION = {"loader", "memory", "keep"}, {"generates", "drift"}


def trial(model="qwen3_8b", method="gptq", bits=4, text=WIKITEXT2, tasks=(), **changes):
    """Return a trial of a model of the Hub; changes: to its placement, evaluation or spec."""
    placement = {key: changes.pop(key) for key in PLACEMENT & changes.keys()}
    evaluation = {key: changes.pop(key) for key in EVALUATION & changes.keys()}
    calibration = calibration_of("c4", samples=128, length=2048)
    return make_trial(
        method,
        bits,
        model=hub_model_of(model),
        calibration=calibration if method in OBSERVING else None,
        evaluation=evaluation_of(text, tasks=tasks, **evaluation),
        placement=placement,
        **changes,
    )


def allocations_of(one, shape, machines, request):
    """Return the least that a trial can be given, and what it gets if that was too little."""
    choices = choices_of(one, shape, machines, request)
    return choices.least, choices.larger(choices.least)


def allocated(one, machines, **request):
    """Return a trial's allocation, and that of its second try."""
    shape = facts(one.spec.model.name)
    return allocations_of(one, shape, machines, ResourceRequest(**request))


def planned_for(trials, machines, request=None, finished=None, model=None, fresh=False):
    return plan(
        trials,
        finished or {},
        {one.id: facts(one.spec.model.name) for one in trials},
        machines=machines,
        request=request or ResourceRequest(),
        model=model or CostModel(),
        fresh=fresh,
    )


def disk_of(one, shape):
    return sum(left_behind(one, shape).values())


NODE = Machine(cpus=64, gpus=8, memory=1_000_000_000_000, gpu_memory=80_000_000_000)


@pytest.mark.parametrize(
    ("model", "gpus", "ranks", "loader"),
    [
        ("qwen3_0_6b", 0.25, 1, "resident"),
        ("qwen3_8b", 0.5, 1, "resident"),
        ("qwen3_32b", 1, 2, "sharded"),
    ],
)
def test_a_trial_gets_the_gpus_that_its_bytes_need(model, gpus, ranks, loader):
    allocation, larger = allocated(trial(model), [NODE])
    assert (allocation.gpus, allocation.ranks, allocation.loader) == (gpus, ranks, loader)
    # It is the least that holds the model: a half of it would not.
    weights = facts(model).weight_bytes("bfloat16") / ranks
    usable = ROOM * 80e9 * gpus
    assert weights < allocation.needs <= usable
    assert allocation.needs > usable / 2 or gpus == min(FRACTIONS)
    # If that was too little, the second try gets twice as much.
    assert larger.gpus * larger.ranks == 2 * gpus * ranks


def test_the_needs_of_a_known_model_are_what_one_computes_by_hand():
    """Qwen3-8B on a GPU while RTN quantizes its largest site, gate and up of a block."""
    allocation, _ = allocated(trial(method="rtn"), [NODE])
    process, weights = 600 * 2**20, 2 * 8_190_735_360  # its parameters in bfloat16
    attention = 2 * 4096 * 4096 + 2 * 1024 * 4096
    block = 2 * (attention + 3 * 12288 * 4096 + 2 * 4096 + 2 * 128)
    gate_up = 4 * 2 * 12288 * 4096  # float32
    assert allocation.needs == process + weights + 2.5 * block + 5 * gate_up


def test_a_quantized_head_beside_the_original_is_counted_for_its_trial_alone():
    plain = trial("qwen3_8b", bits=4)
    both = trial("qwen3_8b", bits=3, head_bits=8, drift="auto")
    needs = {one.trial.id: one.allocation.needs for one in planned_for([plain, both], [NODE])}
    assert needs[both.id] - needs[plain.id] == 2 * 151936 * 4096


def test_awq_gets_room_for_the_hidden_states_and_for_each_input_that_its_walk_keeps():
    from q3q.quantize.activations import SPOOLS_PER_BLOCK

    machine = replace(NODE, gpus=0, gpu_memory=None)
    gptq, awq = (allocated(trial("qwen3_0_6b", name), [machine])[0] for name in ("gptq", "awq"))
    hidden = 128 * 2048 * 1024 * 2
    assert gptq.memory - gptq.needs == hidden
    assert awq.memory - awq.needs == (1 + SPOOLS_PER_BLOCK) * hidden


@dataclass
class ForeignSettings(MethodSettings):
    """The settings of another package's method."""

    name: str = "foreign"
    implementation: ClassVar[str] = "foreign:Foreign"
    block_copies: ClassVar[float] = GptqSettings.block_copies
    sequential: ClassVar[bool] = True


@dataclass
class ForeignWithoutHessian(MethodSettings):
    name: str = "foreign"
    implementation: ClassVar[str] = "foreign:Foreign"
    keeps_hessian: ClassVar[bool] = False


@pytest.mark.parametrize(
    ("settings", "twin"), [(ForeignSettings, GptqSettings), (ForeignWithoutHessian, RtnSettings)]
)
@pytest.mark.parametrize("machine", [NODE, replace(NODE, gpus=0, gpu_memory=None)])
@pytest.mark.parametrize("model", ["qwen3_8b", "qwen3_30b_a3b"])
def test_a_foreign_method_is_planned_like_ours_that_needs_the_same(
    monkeypatch, settings, twin, machine, model
):
    offer = Offer("foreign", "foreign 1.0", settings, None)
    monkeypatch.setattr(registry, "offers", lambda: {"foreign": offer})
    ours = trial(model)
    foreign, ours = (
        replace(ours, spec=replace(ours.spec, method=method_ref(kind(), None)))
        for kind in (settings, twin)
    )
    assert foreign.spec.method.package == "foreign 1.0"
    [planned], [expected_plan] = (planned_for([one], [machine]) for one in (foreign, ours))
    assert planned.allocation == expected_plan.allocation
    assert planned.larger == expected_plan.larger
    assert planned.phases == expected_plan.phases


def test_a_foreign_methods_memory_follows_what_its_settings_say():
    @dataclass
    class SeesAllExperts(ForeignSettings):
        rebalances: ClassVar[bool] = True

    @dataclass
    class KeepsNoHessian(ForeignSettings):
        keeps_hessian: ClassVar[bool] = False

    shape = facts("qwen3_30b_a3b")
    without, chunked, whole = (
        need(shape, "bfloat16", method=settings().memory(), loader="streamed")
        for settings in (KeepsNoHessian, ForeignSettings, SeesAllExperts)
    )
    assert without < chunked
    # The Hessians of all 128 experts' gate and up, where chunks are of 2^28 bytes at most.
    assert whole - chunked > 128 * 4 * 2048**2 - 2**28


def test_without_enough_gpus_for_a_gang_the_model_is_streamed_through_one():
    allocation, _ = allocated(trial("qwen3_32b"), [replace(NODE, gpus=1)])
    assert (allocation.gpus, allocation.ranks, allocation.loader) == (1, 1, "streamed")


def test_a_gpu_of_unknown_size_is_given_whole():
    allocation, _ = allocated(trial("qwen3_0_6b"), [replace(NODE, gpu_memory=None)])
    assert allocation.gpus == 1


def test_what_is_asked_for_wins():
    def first(**request):
        return allocated(trial(), [NODE], **request)[0]

    assert (first(gpus=4).ranks, first(gpus=4).loader) == (4, "sharded")
    assert first(gpus=1).gpus == 1
    assert first(cpus=3).cpus == 3
    assert first(gpus=0).gpus == 0
    assert first(memory=123_000_000_000).memory == 123_000_000_000


def test_on_cores_a_trial_takes_the_part_of_them_that_it_takes_of_the_memory():
    machine = Machine(cpus=32, memory=64_000_000_000)
    large, small = (allocated(trial(name), [machine])[0] for name in ("qwen3_8b", "qwen3_0_6b"))
    assert large.cpus == math.floor(32 * large.memory / machine.memory) > small.cpus >= 1
    assert large.loader == "resident"


def test_on_cores_what_does_not_fit_is_streamed_and_a_second_try_gets_more():
    resident = allocated(trial(loader="resident"), [Machine(cpus=2)])[0].needs
    roomy, tight = (Machine(cpus=2, memory=int(times * resident)) for times in (1.5, 0.9))
    assert [one.loader for one in allocated(trial(), [roomy])] == ["resident", "streamed"]
    first, larger = allocated(trial(), [tight])
    assert (first.loader, larger.loader) == ("streamed", "streamed")
    assert larger.memory == 2 * first.memory
    _, again = allocated(trial(), [Machine(cpus=2, memory=4 * resident)])
    assert (again.loader, again.memory >= 2 * resident) == ("resident", True)


@pytest.mark.parametrize(
    ("machine", "placement", "requested", "advice"),
    [
        (Machine(cpus=8, memory=3_000_000_000), {}, {}, "a cluster whose machines have"),
        (Machine(cpus=8, memory=12_000_000_000), {"loader": "resident"}, {}, "loader=streamed"),
        (
            Machine(cpus=8, memory=99_000_000_000),
            {},
            {"memory": 3_500_000_000},
            "cluster.memory_per_trial=auto",
        ),
        (Machine(cpus=8, memory=99_000_000_000), {"memory": 1_000_000_000}, {}, "memory="),
        (Machine(cpus=8, memory=99_000_000_000), {}, {"cpus": 9}, "cluster.cpus_per_trial=8"),
        (
            replace(NODE, gpus=1, gpu_memory=9_000_000_000),
            {"loader": "sharded"},
            {},
            "such GPUs (cluster.gpus_per_trial=",
        ),
        (
            replace(NODE, gpu_memory=20_000_000_000),
            {"loader": "resident"},
            {"gpus": 0.25},
            "cluster.gpus_per_trial=1",
        ),
    ],
)
def test_what_fits_nowhere_is_refused_with_what_would_make_it_fit(
    machine, placement, requested, advice
):
    with pytest.raises(ConfigError, match="fits nowhere") as refused:
        allocated(trial(**placement), [machine], **requested)
    assert advice in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_model_that_generates_is_held_whole_or_refused():
    plain = trial()
    generating = trial(tasks=("gsm8k",), generates=("gsm8k",))
    resident = allocated(trial(loader="resident"), [Machine(cpus=2)])[0].needs
    roomy, tight = (Machine(cpus=2, memory=part * resident // 4) for part in (8, 3))
    assert planned_for([plain], [tight])[0].allocation.loader == "streamed"
    assert planned_for([generating], [roomy])[0].allocation.loader == "resident"
    for machine in (tight, replace(NODE, gpu_memory=12_000_000_000)):
        with pytest.raises(
            ConfigError, match=r"without gsm8k, which generates text and so needs a resident"
        ) as refused:
            planned_for([plain, generating], [machine])
        assert "streamed" not in str(refused.value)


@pytest.mark.parametrize("model", ["qwen3_0_6b", "qwen3_8b", "qwen3_32b"])
@pytest.mark.parametrize("machine", [NODE, replace(NODE, gpus=1)])
def test_patience_changes_nothing_where_the_trial_fits_already(model, machine):
    at_once, patient = (
        allocated(trial(model), [machine], patience=seconds) for seconds in (0, 300)
    )
    assert patient == at_once
    assert patient[0].needs <= 80e9 * patient[0].gpus


def test_patience_asks_for_no_number_of_machines_but_for_their_size():
    single, large = replace(NODE, gpus=1), trial("qwen3_32b")
    with pytest.raises(ConfigError, match="fits nowhere"):
        allocated(large, [single], gpus=4)
    assert allocated(large, [single], gpus=4, patience=60)[0].ranks == 4
    small = replace(NODE, gpus=1, gpu_memory=6_000_000_000)
    with pytest.raises(ConfigError, match="fits nowhere"):
        allocated(trial("qwen3_32b", loader="resident"), [small], patience=60)
    with pytest.raises(ConfigError, match="memory="):
        allocated(trial(memory=10**9), [NODE], patience=60)


HEAD = Machine(cpus=0, memory=16_000_000_000)


@pytest.mark.parametrize("model", ["qwen3_0_6b", "qwen3_8b", "qwen3_32b"])
def test_a_cluster_without_machines_is_planned_for_those_that_will_come(model):
    request = ResourceRequest(patience=1200, gpu_memory=44 * 2**30)
    machines = expected([HEAD], request)
    allocation, _ = allocations_of(trial(model), facts(model), machines, request)
    assert (allocation.gpus, allocation.loader) == {
        "qwen3_0_6b": (0.25, "resident"),
        "qwen3_8b": (1, "resident"),  # a half holds the model, but not its activations
        "qwen3_32b": (1, "streamed"),
    }[model]
    assert allocation.cpus == max(1, 4 * allocation.gpus)
    gang = replace(request, gpus=4)
    four, _ = allocations_of(trial(model), facts(model), expected([HEAD], gang), gang)
    assert (four.gpus, four.ranks, four.cpus) == (1, 4, 4)


def test_without_patience_no_machine_is_expected():
    request = ResourceRequest(gpu_memory=44 * 2**30)
    assert expected([HEAD], request) == [HEAD]
    with pytest.raises(ConfigError, match="fits nowhere"):
        allocations_of(trial(), facts("qwen3_8b"), expected([HEAD], request), request)


def test_without_a_request_for_gpus_machines_with_cores_are_expected():
    [_, coming] = expected([HEAD], ResourceRequest(patience=60))
    assert (coming.gpus, coming.cpus > 0) == (0, True)


@pytest.mark.parametrize(
    ("kind", "gib"), [("L40S", 44), ("A100", 40), ("", 24), ("H100", 80), ("Unheard", None)]
)
def test_a_gpu_of_another_machine_is_known_by_its_kind(kind, gib):
    here = Machine(
        cpus=8,
        gpus=1,
        gpu_memory=(80 if kind == "H100" else 24) * 2**30,
        name="NVIDIA H100 80GB HBM3",
    )
    assert sized(kind, here) == (None if gib is None else gib * 2**30)


LARGE = replace(NODE, gpus=2, kind="H100")
MIXED = [LARGE, replace(NODE, gpu_memory=24_000_000_000, kind="A10G")]


def test_of_different_gpus_a_trial_fits_on_each_that_it_may_land_on():
    small, _ = allocated(trial("qwen3_0_6b"), MIXED)
    assert (small.kind, small.room <= 0.25 * 24e9) == ("", True)
    middle, larger = allocated(trial("qwen3_8b"), MIXED)
    assert (middle.kind, middle.gpus, middle.needs <= 24e9) == ("", 1, True)
    assert (larger.kind, larger.gpus, larger.room > middle.room) == ("H100", 0.5, True)
    machines = [LARGE, replace(MIXED[1], gpu_memory=15 * 10**9)]
    pinned, _ = allocated(trial("qwen3_8b", "awq", loader="resident"), machines)
    assert (pinned.kind, pinned.room > 0.5 * 15e9) == ("H100", True)
    assert not fits(replace(pinned, kind=""), machines)
    assert packed([pretend(10, kind="H100")] * 4, MIXED) == (20, 2)


def test_one_gpu_is_no_gang():
    tight = replace(NODE, gpu_memory=30_000_000_000)
    allocation, larger = allocated(trial("qwen3_32b"), [tight], gpus=1)
    assert (allocation.gpus, allocation.ranks, allocation.loader, larger) == (
        1,
        1,
        "streamed",
        None,
    )


def test_a_share_that_was_asked_for_is_not_made_another():
    resident = trial("qwen3_8b", loader="resident")
    why = r"and 0\.25 of a GPU of 80\.0 GB has 18\.4 GB for it.*gpus_per_trial=1"
    with pytest.raises(ConfigError, match=why):
        allocated(resident, [NODE], gpus=0.25)
    allocation, larger = allocated(resident, [NODE], gpus=0.5)
    assert (allocation.gpus, larger.gpus) == (0.5, 1)


def test_baselines_come_first_then_the_longest():
    others = [trial("qwen3_0_6b"), trial("qwen3_0_6b", "awq"), trial("qwen3_8b", "rtn")]
    ordered = planned_for([*others, trial("qwen3_0_6b", "none")], [NODE])
    assert ordered[0].spec.scheme is None
    seconds = [one.seconds for one in ordered[1:]]
    assert seconds == sorted(seconds, reverse=True)


def test_a_plan_counts_caches_where_one_is_rounded_or_a_context_is_given():
    def cells(*trials):
        text = describe(planned_for(trials, [NODE]), machines=[NODE], where="here", storage="there")
        return [line for line in text.splitlines() if "cache" in line or "bytes" in line]

    kv8 = KvScheme(bits=8)
    assert not cells(trial())
    heads, *rows = cells(trial(), trial(kv=kv8))
    assert heads.endswith("cache a token")
    assert [row.split()[-2:] for row in rows] == [["147,456", "bytes"], ["76,032", "bytes"]]
    heads, row = cells(trial(kv=kv8).placed(context=32768))
    assert heads.endswith("cache a token  cache of 32768 tokens")
    assert row.endswith("76,032 bytes   2.49 GB")


def pretend(seconds, gpus=1.0, ranks=1, kind="", idle=0.0, makes=None):
    allocation = Allocation(cpus=1, gpus=gpus, memory=1, needs=1, ranks=ranks, kind=kind)
    return Load(allocation=allocation, idle=idle, busy=seconds, makes=makes or {})


def packed(loads, machines):
    """Return the seconds of a simulated sweep, and the most trials that run at once."""
    sweep = simulate(loads, machines)
    return sweep.seconds, sweep.at_once


def test_the_simulated_sweep_packs_gangs_and_single_gpus():
    machine = replace(NODE, gpus=4)
    assert packed([pretend(10)] * 8, [machine]) == (20, 4)
    assert packed([pretend(10, ranks=4), pretend(10)], [machine]) == (20, 1)
    # The ranks of a gang of eight run on two machines.
    assert packed([pretend(10, ranks=8)], [machine, machine]) == (10, 1)
    # The gang has to wait for the long one; the short one does not wait behind it.
    assert packed([pretend(30), pretend(10, ranks=4), pretend(5)], [machine]) == (40, 2)
    # A machine whose memory nobody knows, as on macOS, holds as many as its cores and GPUs do.
    assert packed([pretend(10)] * 8, [replace(machine, memory=None)]) == (20, 4)


def test_trials_on_one_gpu_take_turns_and_one_alone_has_all_of_it(monkeypatch):
    from q3q.sweep import packing

    monkeypatch.setattr(packing, "TOGETHER", 1.0)
    machine = replace(NODE, gpus=2)
    assert packed([pretend(10, 0.5)], [machine]) == (10, 1)
    # Ray fills a GPU before it begins the next: two share one, beside an idle one.
    assert packed([pretend(10, 0.5)] * 2, [machine]) == (20, 2)
    # Each computes while the other's processor prepares: 4 + 2 x 6, in place of 2 x (4 + 6).
    assert packed([pretend(6, 0.5, idle=4)] * 2, [machine]) == (16, 2)
    # After the shorter one has ended, the longer one is alone: 2 x 10, and 20 more.
    assert packed([pretend(30, 0.5), pretend(10, 0.5)], [machine]) == (40, 2)
    monkeypatch.setattr(packing, "TOGETHER", 0.5)
    assert packed([pretend(10, 0.5)] * 2, [machine]) == (40, 2)


def test_the_simulated_trials_wait_for_what_the_first_of_them_makes_and_no_longer(monkeypatch):
    from q3q.sweep import packing

    machine = replace(NODE, gpus=4)
    first, second = pretend(10, makes={"q": 6}), pretend(5, makes={"q": 1})
    assert packed([first, second], [machine]) == (11, 2)
    # All others begin then at once; one with nothing in common has passed them.
    assert packed([first, second, second, pretend(5)], [machine]) == (11, 3)
    # With all GPUs taken, the others wait no longer than anyone.
    assert packed([first, second], [replace(NODE, gpus=1)]) == (15, 1)
    # A name that one trial gives holds up nobody; of two names, both have to be made.
    assert packed([first, pretend(10, makes={"p": 6})], [machine]) == (10, 2)
    both = pretend(10, makes={"s": 2, "q": 6}), pretend(8, makes={"s": 1, "p": 3})
    for name, start in (("q", 6), ("p", 5)):
        runs = simulate([*both, pretend(1, makes={"s": 0, name: 0})], [machine]).runs
        assert [run.start for run in runs] == [0, 2, start]
    # On a shared GPU the first takes turns with another one until then.
    monkeypatch.setattr(packing, "TOGETHER", 1.0)
    halves = [replace(one, allocation=pretend(1, 0.5).allocation) for one in (first, second)]
    *_, waited = simulate([halves[0], pretend(30, 0.5), halves[1]], [replace(NODE, gpus=2)]).runs
    assert (waited.start, waited.end) == (12, 17)


def test_longest_first_ends_earlier_than_shortest_first():
    lengths = [pretend(seconds) for seconds in (1, 1, 1, 1, 4)]
    longest_first = sorted(lengths, key=lambda one: -one.busy)
    machine = replace(NODE, gpus=2)
    assert packed(longest_first, [machine])[0] == 4 < packed(lengths, [machine])[0]


EPYC = Rate("EPYC", False, 2.0)


def record_of(one, seconds, processor="EPYC", threads=2, **other):
    hardware = {"processor": processor, "threads": threads}
    metrics = {f"seconds/{phase}": took for phase, took in seconds.items()}
    return TrialRecord(
        spec=one.spec,
        placement=one.placement,
        status="COMPLETED",
        metrics=metrics,
        environment={"hardware": hardware},
        **other,
    )


def phases(costs, one, where=EPYC, loader="resident", ranks=1):
    shape = facts(one.spec.model.name)
    return costs.phases(one.spec, shape, where, loader=loader, ranks=ranks)


def learned_from(records):
    return CostModel().learned(records, lambda one: facts(one.spec.model.name))


def test_what_a_small_model_took_at_4_bits_corrects_what_a_large_one_will_take_at_2():
    small, large = trial("qwen3_0_6b"), trial("qwen3_8b", bits=2)
    measured, plain = phases(CostModel(), small), phases(CostModel(), large)
    took = {"quantize": 3 * measured["quantize"], "evaluate": 0.5 * measured["evaluate"]}
    corrected = phases(learned_from([record_of(small, took)]), large)
    assert corrected["quantize"] == pytest.approx(3 * plain["quantize"])
    assert corrected["evaluate"] == pytest.approx(0.5 * plain["evaluate"])
    assert corrected["load"] == plain["load"]


def test_a_busy_hour_a_resumed_phase_or_a_failure_does_not_spoil_the_correction():
    one = trial("qwen3_0_6b")
    plain = phases(CostModel(), one)["quantize"]
    normal = [record_of(one, {"quantize": 2 * plain})] * 3
    busy = record_of(one, {"quantize": 100 * plain})
    resumed = [record_of(one, {"quantize": 0.06 * plain}, notes={"blocks_from_disk": 27})] * 9
    failed = [replace(record_of(one, {"quantize": 0.06 * plain}), status="FAILED")] * 9
    learned = learned_from([*normal, busy, *resumed, *failed])
    assert phases(learned, one)["quantize"] == pytest.approx(2 * plain)


def test_another_kind_of_machine_is_corrected_only_while_nothing_nearer_is_known():
    one = trial("qwen3_0_6b", "rtn")
    plain = phases(CostModel(), one)["evaluate"]
    learned = learned_from(
        [
            record_of(one, {"evaluate": 2 * plain}),
            record_of(one, {"evaluate": 6 * plain}, "i386"),
        ]
    )

    def evaluate(name):
        return phases(learned, one, Rate(name, False, 2.0))["evaluate"]

    assert evaluate("EPYC") == pytest.approx(2 * plain)
    assert evaluate("i386") == pytest.approx(6 * plain)
    assert evaluate("unheard of") == pytest.approx(4 * plain)
    gpu = Rate("A100", True, 2.0)  # of which cores say nothing
    assert phases(learned, one, gpu) == phases(CostModel(), one, gpu)


@pytest.mark.parametrize(("loader", "ranks"), [("streamed", 1), ("sharded", 2)])
def test_what_streaming_or_a_gang_took_corrects_no_resident_trial(loader, ranks):
    one = trial("qwen3_0_6b", "rtn")

    def evaluate(costs, loader="resident", ranks=1):
        return phases(costs, one, EPYC, loader, ranks)["evaluate"]

    plain = CostModel()
    resident = record_of(one, {"evaluate": 2 * evaluate(plain)})
    other = record_of(one, {"evaluate": 5 * evaluate(plain, loader, ranks)})
    planned = {"loader": loader, "ranks": ranks}
    other = replace(other, environment={**other.environment, "planned": planned})
    learned = learned_from([resident, other])
    assert evaluate(learned) == pytest.approx(2 * evaluate(plain))
    assert evaluate(learned, loader, ranks) == pytest.approx(5 * evaluate(plain, loader, ranks))
    # Unless nothing nearer is known.
    assert evaluate(learned_from([other])) == pytest.approx(5 * evaluate(plain))


def test_operations_of_a_forward_are_two_a_weight_and_token():
    shape = facts("qwen3_8b")
    assert forward(shape, 1000, 0) == 2 * 1000 * shape.linear_parameters
    assert forward(shape, 1000, 2048) > forward(shape, 1000, 0)


def test_the_methods_stand_in_their_order_of_cost():
    shape, costs = facts("qwen3_0_6b"), CostModel()
    took = [
        costs.operations(trial("qwen3_0_6b", method).spec, shape)["quantize"]
        for method in ("none", "rtn", "gptq", "awq")
    ]
    assert took == sorted(took)
    assert took[0] == 0


def test_disk_counts_kept_blocks_exports_and_baselines():
    shape = facts("qwen3_8b")
    assert disk_of(trial(), shape) == 0
    kept = disk_of(trial(keep="blocks"), shape)
    # Half a byte a code, and a scale and a zero point for 128 of them.
    assert kept >= shape.linear_parameters / 2 + shape.linear_parameters // 128 * 8
    assert kept < 0.6 * shape.linear_parameters
    assert disk_of(trial(export="hf"), shape) == shape.weight_bytes()
    assert 0.25 < disk_of(trial(export="gptq"), shape) / shape.weight_bytes() < 0.5
    assert disk_of(trial(method="none", drift="auto"), shape) == 10 * 2047 * 4096 * 2


def test_what_trials_share_on_disk_is_counted_once():
    kept = trial(keep="blocks", drift="auto")
    c4 = replace(WIKITEXT2, name="c4", source="c4", digest="c4-digest")
    other = trial(keep="blocks", drift="auto", text=c4)
    shape = facts("qwen3_8b")
    [first, second] = planned_for([kept, other], [NODE])
    baseline, made = 10 * 2047 * 4096 * 2, Made()
    prepared = [made.add(one, shape)[1] for one in (kept, other)]
    assert prepared[0] > prepared[1] > 0  # both trials' windows, and the second text's
    assert first.disk == disk_of(kept, shape) + prepared[0]
    assert disk_of(kept, shape) > shape.linear_parameters / 2 + baseline
    assert second.disk == baseline + prepared[1]  # of its own text; the blocks are there
    [more, done] = planned_for([kept, other], [NODE], finished={kept.id: record_of(kept, {})})
    assert (more.disk, done.disk) == (baseline + Made().add(other, shape)[1], 0)


def test_the_plan_is_printed_with_all_that_it_costs(tmp_path):
    finished = trial("qwen3_0_6b", "rtn")
    trials = [trial("qwen3_32b"), trial("qwen3_0_6b", "awq"), finished]
    ordered = planned_for(trials, [NODE], finished={finished.id: record_of(finished, {})})
    shown = describe(ordered, machines=[NODE], where="this machine", storage=tmp_path)
    lines = shown.splitlines()
    [gang] = [line for line in lines if "qwen3_32b" in line]
    assert "2 GPUs" in gang
    assert "sharded" in gang
    assert "(rough)" in gang
    [fraction] = [line for line in lines if "awq" in line]
    assert "1 GPU + 8 CPUs" in fraction
    assert f"{ordered[1].allocation.memory / 1e9:.1f} GB" in fraction
    assert f"{ordered[0].blocks / 1e9:.1f} GB" in gang
    [done] = [line for line in lines if "rtn" in line]
    assert done.split()[-1] == "done"
    assert "2 to run on this machine, 2 at a time at most" in shown
    assert "GPU-hours" in lines[-2]
    nothing = describe([ordered[-1]], machines=[NODE], where="this machine", storage=tmp_path)
    assert nothing.startswith(f"Nothing to run: the trial is finished, in {tmp_path}. The same ")


def test_two_thousand_trials_for_64_nodes_of_8_gpus_are_planned_in_seconds():
    trials = [
        trial(name, method, seed=seed)
        for name in SHAPES
        for method in ("rtn", "gptq")
        for seed in range(100)
    ]
    ordered = planned_for(trials, [NODE] * 64)
    sweep = simulated(ordered, [NODE] * 64)
    wall, at_once = sweep.seconds, sweep.at_once
    busy = sum(one.gpu_hours for one in ordered) * 3600
    assert wall >= busy / 512
    # Graham's bound of list scheduling.
    assert wall <= busy / 512 + max(one.seconds for one in ordered)
    assert at_once <= 64 * 8 * 4


@pytest.mark.parametrize(
    ("given", "bytes_"),
    [("16GB", 16e9), ("512MiB", 512 * 2**20), (1000, 1000), ("1.5 gb", 1.5e9), ("auto", None)],
)
def test_sizes_are_read_as_people_write_them(given, bytes_):
    assert size("cluster.gpu_memory", given) == bytes_


@pytest.mark.parametrize(
    "knobs",
    [
        {"cpus_per_trial": "many"},
        {"cpus_per_trial": 0},
        {"gpus_per_trial": 1.5},
        {"gpus_per_trial": -1},
        {"memory_per_trial": "16 potatoes"},
        {"gpu_memory": "-1GB"},
        {"patience": -1},
    ],
)
def test_a_knob_that_cannot_be_meant_is_refused_by_name(knobs):
    [key] = knobs
    with pytest.raises(ConfigError, match=f"cluster.{key}="):
        request_of(knobs.get)


def test_a_share_too_small_for_its_model_fits_nowhere():
    allocation = Allocation(cpus=1, gpus=0.25, memory=1, needs=30_000_000_000)
    assert not fits(allocation, [NODE])
    assert fits(replace(allocation, gpus=0.5), [NODE])


def test_the_plan_counts_the_cores_that_the_sweeps_own_ray_hands_out():
    from omegaconf import OmegaConf

    from q3q.limits import cores
    from q3q.sweep.launcher import RayLauncher
    from q3q.sweep.on_ray import OnRay, work

    settings = OmegaConf.create({"cluster": {"address": None}, "hydra": {"job": {"env_copy": []}}})
    for launcher, count in ((RayLauncher(), cores()), (RayLauncher(cpus=3), 3)):
        launcher.config = settings
        host = OnRay(launcher, settings, {}, work)
        [machine], _ = host.machines(ResourceRequest())
        assert host.cluster.cpus == machine.cpus == count
        assert host.cluster.gpus == machine.gpus


def test_cores_are_those_that_a_process_may_use():
    code = f"import os; os.sched_setaffinity(0, [{min(os.sched_getaffinity(0))}])\n"
    code += "from q3q.limits import cores; print(cores())"
    assert python("-c", code).stdout.strip() == "1"
