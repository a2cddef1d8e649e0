"""Trials' names show what differs between them, and are never the same for two."""

import random
from dataclasses import replace

import pytest

from q3q.names import own_names, trial_names
from q3q.record import Sweep
from q3q.spec import Scheme
from q3q.sweep.allocation import Allocation
from q3q.sweep.machines import Machine
from q3q.sweep.plan import Planned, describe, unlike_methods
from q3q.trials.stored import find_trials, listed
from tests.specs import (
    calibration_of,
    changed,
    evaluation_of,
    hub_model_of,
    make_spec,
    make_trial,
    method_of,
    model_of,
    text_of,
)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ([{"seed": 0}, {"seed": 1}], ["seed 0", "seed 1"]),
        ([{"symmetric": True}, {"symmetric": False}], ["sym", "asym"]),
        ([{"method": method_of("gptq", damping=value)} for value in (0.01, 0.05)], "damping"),
        (
            [{"calibration": calibration_of(samples=n)} for n in (8, 64)],
            ["samples=8", "samples=64"],
        ),
        (
            [{"calibration": calibration_of(source)} for source in ("c4", "pile")],
            ["source=c4", "source=pile"],
        ),
        ([{"evaluation": evaluation_of(text)} for text in ("a", "b")], ["texts=a", "texts=b"]),
        (
            [{"evaluation": evaluation_of(text_of(limit=n))} for n in (4, 8)],
            ["limit=4", "limit=8"],
        ),
        (
            [
                {"evaluation": evaluation_of("a", tasks=["piqa"])},
                {"evaluation": evaluation_of("a")},
            ],
            ["tasks=piqa", "tasks=none"],
        ),
        ([{"model": model_of(dtype=name)} for name in ("float32", "bfloat16")], "float"),
        ([{"model": model_of(digest=name)} for name in ("a" * 64, "b" * 64)], ["digest=aaaaaaaa"]),
    ],
)
def test_names_show_what_differs_and_nothing_else(settings, words):
    specs = [make_spec(**{"method": "gptq", **one}) for one in settings]
    own = own_names(specs)
    assert len(set(own)) == 2
    assert all(name.startswith("gptq w4 g128 ") for name in own)
    if isinstance(words, str):
        assert any(words in name for name in own)
    for name, word in zip(own, words if isinstance(words, list) else [], strict=False):
        assert name.removeprefix("gptq w4 g128 ").startswith(word)
    assert all(len(name) < 60 for name in own)


def test_what_all_have_in_common_or_shows_already_is_not_repeated():
    specs = [make_spec("gptq", bits, seed=3) for bits in (2, 3)]
    assert list(trial_names(specs).values()) == ["gptq w2 g128 · demo", "gptq w3 g128 · demo"]
    assert own_names([]) == []


def test_a_digest_is_left_out_where_a_name_beside_it_differs_too():
    sources = ("c4", "pile")  # each with another digest as well
    names = own_names([make_spec("gptq", calibration=calibration_of(name)) for name in sources])
    assert names == ["gptq w4 g128 source=c4", "gptq w4 g128 source=pile"]


def test_what_no_short_word_tells_apart_gets_its_id():
    tasks = [[f"a_task_with_a_long_name_{n}" for n in range(9)] + [last] for last in "ab"]
    specs = [make_spec(evaluation=evaluation_of(tasks=names)) for names in tasks]
    assert all(spec.id in name for spec, name in zip(specs, own_names(specs), strict=True))


def random_spec(chance: random.Random):
    """A spec of few values, so that many are nearly alike; with names as hostile as can be."""
    method = chance.choice(["rtn", "gptq", "awq", "none"])
    texts = [
        text_of(
            chance.choice(["a", "b"]), window=chance.choice([8, 16]), limit=chance.choice([None, 4])
        )
        for _ in range(chance.choice([0, 1, 1]))
    ]
    spec = make_spec(
        method,
        bits=chance.choice([3, 4]),
        group_size=chance.choice([-1, 64]),
        symmetric=chance.choice([True, False]),
        act_bits=chance.choice([None, 8]),
        model=chance.choice(
            [
                model_of(),
                model_of(digest="other"),
                model_of(name="seed 1 · demo"),
                hub_model_of("demo"),
                hub_model_of("demo", source="Other/demo"),
            ]
        ),
        seed=chance.choice([0, 1]),
        evaluation=evaluation_of(*texts, tasks=chance.choice([[], ["piqa"], ["piqa", "boolq"]])),
    )
    if spec.calibration is not None:
        spec = changed(spec, calibration=calibration_of(samples=chance.choice([8, 16])))
    if spec.scheme is not None and chance.random() < 0.3:
        rules = chance.choice([{}, {"skip": ["seed 1"]}, {"skip": ["*.down"]}])
        spec = changed(spec, skip=chance.choice([(), ("blocks.0.mlp.down_proj",)]), rules=rules)
    return spec


@pytest.mark.parametrize("seed", range(20))
def test_no_two_trials_have_the_same_name(seed):
    chance = random.Random(seed)
    specs = list({spec.id: spec for spec in (random_spec(chance) for _ in range(60))}.values())
    names = trial_names(specs)
    assert len(set(names.values())) == len(specs)
    some = chance.sample(specs, 7)
    assert len(set(trial_names(some).values())) == 7
    # A name is no longer in a shorter list.
    assert all(len(name) <= len(names[key]) for key, name in trial_names(some).items())


def test_the_plan_and_the_list_of_stored_trials_tell_trials_apart(tmp_path):
    trials = [make_trial("gptq", storage=tmp_path, seed=seed) for seed in (0, 1)]
    third = make_trial("rtn", storage=tmp_path)
    planned = [
        Planned(trial=trial, allocation=None, phases={}, basis="done") for trial in trials
    ] + [
        Planned(
            trial=third,
            allocation=Allocation(cpus=1, gpus=0, memory=1, needs=1),
            phases={"load": 1.0},
            basis="rough",
        )
    ]
    shown = describe(planned, machines=[Machine(cpus=1)], where="here", storage=tmp_path)
    Sweep(id="1", name="s", command="c", config="", trials=tuple(trials)).save(tmp_path)
    listed_ = listed(find_trials(tmp_path), tmp_path)
    for seed in (0, 1):
        assert f"gptq w4 g128 seed {seed}  demo" in shown
        assert f"gptq w4 g128 seed {seed} · demo" in listed_


@pytest.mark.parametrize(
    ("specs", "words"),
    [
        ([make_spec("gptq"), make_spec("rtn"), make_spec("none")], None),
        # A sweep over groups, of each method.
        ([make_spec(name, group_size=n) for name in ("gptq", "rtn") for n in (32, 64)], None),
        (
            [
                make_spec("gptq"),
                make_spec("awq"),
                make_spec("smoothquant", act_bits=8, group_size=-1),
            ],
            "gptq, awq: 16-bit activations, groups of 128; "
            "smoothquant: 8-bit activations, a scale per row)",
        ),
        (
            [make_spec("gptq", group_size=32), make_spec("rtn", group_size=64)],
            "gptq: 16-bit activations, groups of 32; rtn: 16-bit activations, groups of 64)",
        ),
    ],
)
def test_methods_that_get_other_schemes_are_said_in_a_line(specs, words):
    line = unlike_methods(specs)
    assert line == "" if words is None else words in line
    assert "\n" not in line
    assert line == "" or line.endswith(" set act_bits= and group_size=.")


def test_the_advice_on_activations_does_not_change_their_format():
    """SmoothQuant's follow the format: act_bits=8 would make whole numbers of them."""
    fp8 = Scheme(bits=8, group_size=-1, symmetric=True, format="fp8_e4m3")
    rounded = replace(fp8, act_bits=8, act_format="fp8_e4m3")
    line = unlike_methods([make_spec("rtn", scheme=fp8), make_spec("smoothquant", scheme=rounded)])
    assert "rtn: 16-bit activations, a scale per row; smoothquant: fp8 activations" in line
    assert line.endswith(" set act_format= and group_size=.")
