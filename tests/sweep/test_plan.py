"""Resources from true byte counts, order, packing, refusals; all arithmetic on Qwen3's own shapes."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from q3q.errors import ConfigError
from q3q.models.facts import read_facts
from q3q.models.footprint import need
from q3q.record import TrialRecord
from q3q.spec import Scheme, TrialSpec
from q3q.sweep.costs import CostModel, Rate, forward
from q3q.sweep.machines import Machine, ResourceRequest, expected, request_of, size, sized
from q3q.sweep.plan import Planned, describe, disk_of, plan, simulate
from q3q.sweep.shares import Allocation, allocations_of, fits

SHAPES = {  # hidden, layers, heads, kv_heads, intermediate, tied
    "qwen3_0_6b": (1024, 28, 16, 8, 3072, True),
    "qwen3_8b": (4096, 36, 32, 8, 12288, False),
    "qwen3_32b": (5120, 64, 64, 8, 25600, False),
}


def facts(name):
    hidden, layers, heads, kv_heads, intermediate, tied = SHAPES[name]
    return read_facts(
        {
            "model_type": "qwen3",
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": 128,
            "intermediate_size": intermediate,
            "vocab_size": 151936,
            "tie_word_embeddings": tied,
            "max_position_embeddings": 40960,
            "rms_norm_eps": 1e-6,
            "rope_theta": 1e6,
            "dtype": "bfloat16",
        }
    )


def spec(model="qwen3_8b", method="gptq", bits=4, places=None, **other):
    text = {
        "name": "wikitext2",
        "source": "wikitext2",
        "window": 2048,
        "limit": 10,
        "samples": None,
        "draw": "first",
    }
    observes = method in ("gptq", "awq")
    return TrialSpec(
        model={"name": model, "source": model, "revision": "x", "dtype": "bfloat16"},
        method={"name": method, "version": 1},
        scheme=None if method == "none" else Scheme(bits=bits, group_size=128, symmetric=False),
        calibration={"samples": 128, "length": 2048} if observes else None,
        evaluation={"texts": [{**text, "digest": ""}], "tasks": [], "task_limit": None},
        seed=0,
        places={"trials": "/nowhere", "keep": "none", **(places or {})},
        **other,
    )


def planned_for(specs, machines, wishes=None, finished=None, model=None):
    known = {one.id: facts(one.model["name"]) for one in specs}
    return plan(
        specs,
        finished or {},
        known,
        machines=machines,
        wishes=wishes or ResourceRequest(),
        model=model or CostModel(),
    )


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
    share, larger = allocations_of(spec(model), facts(model), [NODE], ResourceRequest())
    assert (share.gpus, share.ranks, share.loader) == (gpus, ranks, loader)
    assert share.needs == need(
        facts(model), "bfloat16", method="gptq", loader=loader, ranks=ranks, device="cuda"
    )
    assert share.needs <= 80e9 * share.gpus
    assert (
        larger.gpus * larger.ranks == 2 * share.gpus * share.ranks
    )  # what it is tried with if that was too little


def test_a_quantized_head_beside_the_original_is_counted_for_its_trial_alone():
    plain = spec("qwen3_8b", bits=4)
    both = spec("qwen3_8b", bits=3, head_bits=8)
    both = replace(both, evaluation={**both.evaluation, "drift": "auto"})
    needs = {one.spec.id: one.share.needs for one in planned_for([plain, both], [NODE])}
    assert needs[both.id] - needs[plain.id] == 2 * 151936 * 4096


def test_awq_is_given_room_for_the_inputs_that_it_keeps():
    machine = replace(NODE, gpus=0, gpu_memory=None)
    gptq, awq = (
        allocations_of(spec("qwen3_0_6b", name), facts("qwen3_0_6b"), [machine], ResourceRequest())[
            0
        ]
        for name in ("gptq", "awq")
    )
    hidden = 128 * 2048 * 1024 * 2
    assert gptq.memory - gptq.needs == hidden
    assert awq.memory - awq.needs == 5 * hidden


def test_without_enough_gpus_for_a_gang_the_model_is_streamed_through_one():
    share, _ = allocations_of(
        spec("qwen3_32b"), facts("qwen3_32b"), [replace(NODE, gpus=1)], ResourceRequest()
    )
    assert (share.gpus, share.ranks, share.loader) == (1, 1, "streamed")


def test_a_gpu_of_unknown_size_is_given_whole():
    share, _ = allocations_of(
        spec("qwen3_0_6b"), facts("qwen3_0_6b"), [replace(NODE, gpu_memory=None)], ResourceRequest()
    )
    assert share.gpus == 1


def test_what_is_asked_for_wins():
    def asked(**wishes):
        return allocations_of(spec(), facts("qwen3_8b"), [NODE], ResourceRequest(**wishes))[0]

    assert (asked(gpus=4).ranks, asked(gpus=4).loader) == (4, "sharded")
    assert asked(gpus=1).gpus == 1
    assert asked(cpus=3).cpus == 3
    assert asked(gpus=0).gpus == 0
    assert asked(memory=123_000_000_000).memory == 123_000_000_000


def test_on_cores_a_trial_takes_the_part_of_them_that_it_takes_of_the_memory():
    machine = Machine(cpus=32, memory=64_000_000_000)
    large, small = (
        allocations_of(spec(name), facts(name), [machine], ResourceRequest())[0]
        for name in ("qwen3_8b", "qwen3_0_6b")
    )
    assert large.cpus == math.floor(32 * large.memory / machine.memory) > small.cpus >= 1
    assert large.loader == "resident"


def test_on_cores_what_does_not_fit_is_streamed_and_a_second_try_gets_more():
    facts_8b = facts("qwen3_8b")
    resident = need(facts_8b, "bfloat16", method="gptq", loader="resident")
    roomy, tight = (Machine(cpus=2, memory=int(times * resident)) for times in (1.5, 0.9))
    assert [one.loader for one in allocations_of(spec(), facts_8b, [roomy], ResourceRequest())] == [
        "resident",
        "streamed",
    ]
    share, larger = allocations_of(spec(), facts_8b, [tight], ResourceRequest())
    assert (share.loader, larger.loader, larger.memory) == (
        "streamed",
        "streamed",
        2 * share.memory,
    )
    again = allocations_of(
        spec(), facts_8b, [Machine(cpus=2, memory=4 * resident)], ResourceRequest()
    )[1]
    assert (again.loader, again.memory >= 2 * resident) == ("resident", True)


@pytest.mark.parametrize(
    ("machine", "places", "wishes", "advice"),
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
def test_what_fits_nowhere_is_refused_with_what_would_make_it_fit(machine, places, wishes, advice):
    with pytest.raises(ConfigError, match="fits nowhere") as refused:
        allocations_of(spec(places=places), facts("qwen3_8b"), [machine], ResourceRequest(**wishes))
    assert advice in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_model_that_generates_is_held_whole_or_refused():
    plain = spec()
    talks = replace(
        plain, evaluation={**plain.evaluation, "tasks": ["gsm8k"], "generates": ["gsm8k"]}
    )
    resident = need(facts("qwen3_8b"), "bfloat16", method="gptq", loader="resident")
    roomy, tight = (Machine(cpus=2, memory=part * resident // 4) for part in (8, 3))
    assert planned_for([plain], [tight])[0].share.loader == "streamed"
    assert planned_for([talks], [roomy])[0].share.loader == "resident"
    for machine in (tight, replace(NODE, gpu_memory=12_000_000_000)):
        with pytest.raises(
            ConfigError, match=r"without gsm8k, which generates text and so needs a resident"
        ) as refused:
            planned_for([plain, talks], [machine])
        assert "streamed" not in str(refused.value)


@pytest.mark.parametrize("model", ["qwen3_0_6b", "qwen3_8b", "qwen3_32b"])
@pytest.mark.parametrize("machine", [NODE, replace(NODE, gpus=1)])
def test_patience_changes_nothing_where_the_trial_fits_already(model, machine):
    at_once, patient = (
        allocations_of(spec(model), facts(model), [machine], ResourceRequest(patience=one))
        for one in (0, 300)
    )
    assert patient == at_once
    assert patient[0].needs <= 80e9 * patient[0].gpus


def test_patience_asks_for_no_number_of_machines_but_for_their_size():
    one = replace(NODE, gpus=1)
    with pytest.raises(ConfigError, match="fits nowhere"):
        allocations_of(spec("qwen3_32b"), facts("qwen3_32b"), [one], ResourceRequest(gpus=4))
    share, _ = allocations_of(
        spec("qwen3_32b"), facts("qwen3_32b"), [one], ResourceRequest(gpus=4, patience=60)
    )
    assert share.ranks == 4
    small = replace(NODE, gpus=1, gpu_memory=6_000_000_000)
    held = spec("qwen3_32b", places={"loader": "resident"})
    with pytest.raises(ConfigError, match="fits nowhere"):
        allocations_of(held, facts("qwen3_32b"), [small], ResourceRequest(patience=60))
    with pytest.raises(ConfigError, match="memory="):
        allocations_of(
            spec(places={"memory": 10**9}), facts("qwen3_8b"), [NODE], ResourceRequest(patience=60)
        )


HEAD = Machine(cpus=0, memory=16_000_000_000)


@pytest.mark.parametrize("model", ["qwen3_0_6b", "qwen3_8b", "qwen3_32b"])
def test_a_cluster_without_machines_is_planned_for_those_that_will_come(model):
    wishes = ResourceRequest(patience=1200, gpu_memory=44 * 2**30)
    machines = expected([HEAD], wishes)
    share, _ = allocations_of(spec(model), facts(model), machines, wishes)
    assert (share.gpus, share.loader) == {
        "qwen3_0_6b": (0.25, "resident"),
        "qwen3_8b": (0.5, "resident"),
        "qwen3_32b": (1, "streamed"),
    }[model]
    assert share.cpus == max(1, 4 * share.gpus)
    gang = replace(wishes, gpus=4)
    asked, _ = allocations_of(spec(model), facts(model), expected([HEAD], gang), gang)
    assert (asked.gpus, asked.ranks, asked.cpus) == (1, 4, 4)


def test_who_gives_no_patience_gets_no_machines_that_are_not_there():
    wishes = ResourceRequest(gpu_memory=44 * 2**30)
    assert expected([HEAD], wishes) == [HEAD]
    with pytest.raises(ConfigError, match="fits nowhere"):
        allocations_of(spec(), facts("qwen3_8b"), expected([HEAD], wishes), wishes)


def test_without_a_word_of_gpus_machines_with_cores_are_expected():
    [_, one] = expected([HEAD], ResourceRequest(patience=60))
    assert (one.gpus, one.cpus > 0) == (0, True)


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
    small, _ = allocations_of(spec("qwen3_0_6b"), facts("qwen3_0_6b"), MIXED, ResourceRequest())
    assert (small.kind, small.room <= 0.25 * 24e9) == ("", True)
    middle, larger = allocations_of(spec("qwen3_8b"), facts("qwen3_8b"), MIXED, ResourceRequest())
    assert (middle.kind, middle.gpus, middle.needs <= 24e9) == ("", 1, True)
    assert (larger.kind, larger.gpus, larger.room > middle.room) == ("H100", 0.5, True)
    held = spec("qwen3_8b", "awq", places={"loader": "resident"})
    pinned, _ = allocations_of(
        held,
        facts("qwen3_8b"),
        [LARGE, replace(MIXED[1], gpu_memory=15 * 10**9)],
        ResourceRequest(),
    )
    assert (pinned.kind, pinned.room > 0.5 * 15e9) == ("H100", True)
    assert not fits(replace(pinned, kind=""), [LARGE, replace(MIXED[1], gpu_memory=15 * 10**9)])
    assert simulate([pretend(10, kind="H100")] * 4, MIXED) == (20, 2)


def test_one_gpu_is_no_gang():
    tight = replace(NODE, gpu_memory=30_000_000_000)
    share, larger = allocations_of(
        spec("qwen3_32b"), facts("qwen3_32b"), [tight], ResourceRequest(gpus=1)
    )
    assert (share.gpus, share.ranks, share.loader, larger) == (1, 1, "streamed", None)


def test_a_share_that_was_asked_for_is_not_made_another():
    held = spec("qwen3_8b", places={"loader": "resident"})
    with pytest.raises(
        ConfigError, match=r"and 0\.25 of a GPU of 80\.0 GB has 18\.4 GB for it.*gpus_per_trial=1"
    ):
        allocations_of(held, facts("qwen3_8b"), [NODE], ResourceRequest(gpus=0.25))
    share, larger = allocations_of(held, facts("qwen3_8b"), [NODE], ResourceRequest(gpus=0.5))
    assert (share.gpus, larger.gpus) == (0.5, 1)


def test_baselines_come_first_then_the_longest():
    specs = [
        spec("qwen3_0_6b"),
        spec("qwen3_0_6b", "awq"),
        spec("qwen3_0_6b", "none"),
        spec("qwen3_8b", "rtn"),
    ]
    ordered = planned_for(specs, [NODE])
    assert ordered[0].spec.scheme is None
    assert [one.seconds for one in ordered[1:]] == sorted(
        (one.seconds for one in ordered[1:]), reverse=True
    )


def pretend(seconds, gpus=1.0, ranks=1, kind=""):
    share = Allocation(cpus=1, gpus=gpus, memory=1, needs=1, ranks=ranks, kind=kind)
    return Planned(spec=spec(), share=share, phases={"evaluate": seconds}, basis="rough", disk=0)


def test_the_simulated_sweep_packs_fractions_gangs_and_single_gpus():
    machine = replace(NODE, gpus=4)
    assert simulate([pretend(10)] * 8, [machine]) == (20, 4)
    assert simulate([pretend(10, 0.25)] * 16, [machine]) == (10, 16)
    assert simulate([pretend(10, ranks=4), pretend(10)], [machine]) == (20, 1)
    assert simulate([pretend(10, ranks=8)], [machine, machine]) == (
        10,
        1,
    )  # its ranks sit on two machines
    # The gang has to wait for the long one; the short one does not wait behind it.
    assert simulate([pretend(30), pretend(10, ranks=4), pretend(5)], [machine]) == (40, 2)
    # 0.5 + 0.5 share a GPU rather than begin one each, so the gang of three has room at once.
    assert simulate([pretend(10, 0.5), pretend(10, 0.5), pretend(10, ranks=3)], [machine]) == (
        10,
        3,
    )


def test_longest_first_ends_earlier_than_shortest_first():
    lengths = [pretend(seconds) for seconds in (1, 1, 1, 1, 4)]
    longest_first = sorted(lengths, key=lambda one: -one.seconds)
    machine = replace(NODE, gpus=2)
    assert simulate(longest_first, [machine])[0] == 4 < simulate(lengths, [machine])[0]


def record_of(one, seconds, processor="EPYC", threads=2, **other):
    hardware = {"processor": processor, "threads": threads}
    metrics = {f"seconds/{phase}": took for phase, took in seconds.items()}
    return TrialRecord(
        spec=one, status="COMPLETED", metrics=metrics, environment={"hardware": hardware}, **other
    )


def test_what_a_small_model_took_at_4_bits_corrects_what_a_large_one_will_take_at_2():
    costs, where = CostModel(), Rate("EPYC", False, 2.0)
    small, large = spec("qwen3_0_6b"), spec("qwen3_8b", bits=2)
    plain = {
        one.id: costs.phases(one, facts(one.model["name"]), where, loader="resident")
        for one in (small, large)
    }
    took = {
        "quantize": 3 * plain[small.id]["quantize"],
        "evaluate": 0.5 * plain[small.id]["evaluate"],
    }
    learned = costs.learned([record_of(small, took)], lambda one: facts(one.model["name"]))
    corrected = learned.phases(large, facts("qwen3_8b"), where, loader="resident")
    assert corrected["quantize"] == pytest.approx(3 * plain[large.id]["quantize"])
    assert corrected["evaluate"] == pytest.approx(0.5 * plain[large.id]["evaluate"])
    assert corrected["load"] == plain[large.id]["load"]


def test_a_busy_hour_a_resumed_phase_or_a_failure_does_not_spoil_the_correction():
    costs, one = CostModel(), spec("qwen3_0_6b")
    plain = costs.phases(one, facts("qwen3_0_6b"), Rate("EPYC", False, 2.0), loader="resident")
    normal = [record_of(one, {"quantize": 2 * plain["quantize"]}) for _ in range(3)]
    busy = record_of(one, {"quantize": 100 * plain["quantize"]})
    resumed = [
        record_of(one, {"quantize": 0.06 * plain["quantize"]}, notes={"blocks_from_disk": 27})
    ] * 9
    failed = [replace(record_of(one, {"quantize": 0.06 * plain["quantize"]}), status="FAILED")] * 9
    learned = costs.learned([*normal, busy, *resumed, *failed], lambda _: facts("qwen3_0_6b"))
    now = learned.phases(one, facts("qwen3_0_6b"), Rate("EPYC", False, 2.0), loader="resident")
    assert now["quantize"] == pytest.approx(2 * plain["quantize"])


def test_another_kind_of_machine_is_corrected_only_while_nothing_nearer_is_known():
    costs, one = CostModel(), spec("qwen3_0_6b", "rtn")
    plain = costs.phases(one, facts("qwen3_0_6b"), Rate("EPYC", False, 2.0), loader="resident")
    learned = costs.learned(
        [
            record_of(one, {"evaluate": 2 * plain["evaluate"]}),
            record_of(one, {"evaluate": 6 * plain["evaluate"]}, "i386"),
        ],
        lambda _: facts("qwen3_0_6b"),
    )

    def evaluate(name, gpu=False):
        return learned.phases(one, facts("qwen3_0_6b"), Rate(name, gpu, 2.0), loader="resident")[
            "evaluate"
        ]

    assert evaluate("EPYC") == pytest.approx(2 * plain["evaluate"])
    assert evaluate("i386") == pytest.approx(6 * plain["evaluate"])
    assert evaluate("unheard of") == pytest.approx(4 * plain["evaluate"])
    gpu = costs.phases(one, facts("qwen3_0_6b"), Rate("A100", True, 2.0), loader="resident")[
        "evaluate"
    ]
    assert evaluate("A100", gpu=True) == pytest.approx(gpu)  # cores say nothing about a GPU


def test_what_streaming_or_a_gang_took_corrects_no_resident_trial():
    costs, one, where = CostModel(), spec("qwen3_0_6b", "rtn"), Rate("EPYC", False, 2.0)
    shape = facts("qwen3_0_6b")

    def took(model, loader):
        return model.phases(
            one, shape, where, loader=loader, ranks=2 if loader == "sharded" else 1
        )["evaluate"]

    records = []
    for loader, times in (("resident", 2), ("streamed", 3), ("sharded", 5)):
        record = record_of(one, {"evaluate": times * took(costs, loader)})
        planned = {"loader": loader, "ranks": 2 if loader == "sharded" else 1}
        records.append(replace(record, environment={**record.environment, "planned": planned}))
    learned = costs.learned(records, lambda _: shape)
    for loader, times in (("resident", 2), ("streamed", 3), ("sharded", 5)):
        assert took(learned, loader) == pytest.approx(times * took(costs, loader))
    [streamed] = [costs.learned(records[1:2], lambda _: shape)]
    assert took(streamed, "resident") == pytest.approx(
        3 * took(costs, "resident")
    )  # while nothing nearer is known


def test_operations_of_a_forward_are_two_a_weight_and_token():
    shape = facts("qwen3_8b")
    assert forward(shape, 1000, 0) == 2 * 1000 * shape.linear_parameters
    assert forward(shape, 1000, 2048) > forward(shape, 1000, 0)


def test_the_methods_stand_in_their_order_of_cost():
    shape, costs = facts("qwen3_0_6b"), CostModel()
    took = [
        costs.operations(spec("qwen3_0_6b", method), shape)["quantize"]
        for method in ("none", "rtn", "gptq", "awq")
    ]
    assert took == sorted(took)
    assert took[0] == 0


def test_disk_counts_kept_blocks_exports_and_baselines():
    shape = facts("qwen3_8b")
    assert disk_of(spec(), shape) == 0
    kept = disk_of(spec(places={"keep": "blocks"}), shape)
    assert (
        shape.linear_parameters < kept < 1.1 * shape.linear_parameters
    )  # a byte a code, and scales
    assert disk_of(spec(export="hf"), shape) == shape.weight_bytes()
    assert 0.25 < disk_of(spec(export="gptq"), shape) / shape.weight_bytes() < 0.5
    drifting = {**spec(method="none").evaluation, "drift": "auto"}
    assert disk_of(replace(spec(method="none"), evaluation=drifting), shape) == 10 * 2047 * 4096 * 2


def test_what_trials_share_on_disk_is_counted_once():
    drifting = {**spec().evaluation, "drift": "auto"}
    kept = replace(spec("qwen3_8b", places={"keep": "blocks"}), evaluation=drifting)
    text = kept.evaluation["texts"][0]
    other = replace(
        kept, evaluation={**drifting, "texts": [{**text, "name": "c4", "source": "c4"}]}
    )
    shape = facts("qwen3_8b")
    [first, second] = planned_for([kept, other], [NODE])
    baseline = 10 * 2047 * 4096 * 2
    assert first.disk == disk_of(kept, shape) > shape.linear_parameters + baseline
    assert second.disk == baseline  # of its own text; the blocks are there
    [more, done] = planned_for([kept, other], [NODE], finished={kept.id: record_of(kept, {})})
    assert (more.disk, done.disk) == (baseline, 0)


def test_the_plan_is_printed_with_all_that_it_costs(tmp_path):
    finished = spec("qwen3_0_6b", "rtn")
    specs = [spec("qwen3_32b"), spec("qwen3_0_6b", "awq"), finished]
    ordered = planned_for(specs, [NODE], finished={finished.id: record_of(finished, {})})
    shown = describe(ordered, machines=[NODE], where="this machine", storage=tmp_path)
    lines = shown.splitlines()
    [gang] = [line for line in lines if "qwen3_32b" in line]
    assert "2 GPUs" in gang
    assert "sharded" in gang
    assert "(rough)" in gang
    [fraction] = [line for line in lines if "awq" in line]
    assert "0.25 GPU + 2 CPUs" in fraction
    assert f"{ordered[1].share.memory / 1e9:.1f} GB" in fraction
    [done] = [line for line in lines if "rtn" in line]
    assert done.split()[-1] == "done"
    assert "2 to run on this machine, 2 at a time at most" in shown
    assert "GPU-hours" in lines[-2]


def test_two_thousand_trials_for_64_nodes_of_8_gpus_are_planned_in_seconds():
    specs = [
        replace(spec(name, method), seed=seed)
        for name in SHAPES
        for method in ("rtn", "gptq")
        for seed in range(100)
    ]
    ordered = planned_for(specs, [NODE] * 64)
    wall, at_once = simulate(ordered, [NODE] * 64)
    busy = sum(one.gpu_hours for one in ordered) * 3600
    assert wall >= busy / 512
    assert wall <= busy / 512 + max(
        one.seconds for one in ordered
    )  # Graham's bound of list scheduling
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
    share = Allocation(cpus=1, gpus=0.25, memory=1, needs=30_000_000_000)
    assert not fits(share, [NODE])
    assert fits(replace(share, gpus=0.5), [NODE])


def test_plan_needs_no_torch():
    import subprocess
    import sys

    root = Path(__file__).parent.parent.parent
    code = "import sys, q3q.sweep.plan; print('torch' in sys.modules)"
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == "False"


def test_the_plan_counts_the_cores_that_the_sweeps_own_ray_hands_out():
    from contextlib import ExitStack

    from omegaconf import OmegaConf

    from q3q.environment import cores
    from q3q.sweep.launcher import RayLauncher
    from q3q.sweep.sweeper import StudySweeper

    settings = OmegaConf.create({"cluster": {"address": None}, "hydra": {"job": {"env_copy": []}}})
    for asked, counted in (({}, cores()), ({"cpus": 3}, 3)):
        sweeper = StudySweeper()
        sweeper.launcher = RayLauncher(**asked)
        sweeper.launcher.config = settings
        cluster, [machine] = sweeper._machines(ExitStack(), settings, ResourceRequest())
        assert cluster.cpus == machine.cpus == counted
        assert cluster.gpus == machine.gpus


def test_cores_are_those_that_a_process_may_use():
    import os
    import subprocess
    import sys

    code = f"import os; os.sched_setaffinity(0, [{min(os.sched_getaffinity(0))}])\n"
    code += "from q3q.environment import cores; print(cores())"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "1"
