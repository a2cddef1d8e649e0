"""A setting that has no effect is named before the trials run, and none that has one is."""

import itertools
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from q3q.config import resolve
from q3q.config.unread import without_effect
from q3q.errors import ConfigError
from q3q.sweep.grid import choices_of, for_own_methods
from tests.composed import compose

CONF = Path(__file__).parent.parent / "conf"


@pytest.mark.parametrize(
    ("typed", "lines"),
    [
        ("method=none bits=4", ["bits=4 has no effect: method=none quantizes nothing"]),
        (
            "method=none bits=4 group_size=64 skip=[blocks.0]",
            ["bits=4 group_size=64 skip=[blocks.0] have no effect: method=none quantizes nothing"],
        ),
        (
            "method=rtn calibration=file calibration.path=/nowhere.txt",
            [
                "calibration=file calibration.path=/nowhere.txt have no effect: method=rtn uses "
                "no calibration text with these settings"
            ],
        ),
        (
            "method=smoothquant method.smooth=false method.alpha=0.3 evaluation=none",
            [
                "method.alpha=0.3 has no effect: method=smoothquant ignores it because of its "
                "other settings"
            ],
        ),
        (
            "method=gptq calibration.route=all",
            ["calibration.route=all has no effect: the model has no experts"],
        ),
        (
            "evaluation=none evaluation.task_limit=3 evaluation.window=128",
            [
                "evaluation.task_limit=3 has no effect: no task is evaluated",
                "evaluation.window=128 has no effect: no text is evaluated",
            ],
        ),
        (
            "kv_bits=4 evaluation=none",
            ["kv_bits=4 has no effect: nothing is evaluated"],
        ),
        (
            "kv_window=64",
            ["kv_window=64 has no effect: the cache is not rounded"],
        ),
        ("kv_bits=null,4 kv_window=64", []),
        ("method=none,rtn bits=2,3", []),
        ("method=rtn,gptq calibration.samples=4", []),
        ("model=demo_moe method=gptq calibration.route=all", []),
        ("method=none bits=null seed=3 evaluation.window=128", []),
        ("method=smoothquant method.search=true method.alpha_grid=[0.4]", []),
        ("bits=4 group_size=128 symmetric=false", []),
    ],
)
def test_what_no_trial_reads_is_named(typed, lines):
    given = OverridesParser.create().parse_overrides(typed.split())
    jobs = itertools.product(*map(choices_of, given))
    specs = [resolve.trial_from(compose("config", list(job))).spec for job in jobs]
    assert without_effect(given, specs) == lines


@pytest.mark.parametrize(
    ("typed", "jobs"),
    [
        (
            "method=gptq,awq method.gptq.damping=0.05 bits=2,3",
            [
                "method=gptq method.damping=0.05 bits=2",
                "method=gptq method.damping=0.05 bits=3",
                "method=awq bits=2",
                "method=awq bits=3",
            ],
        ),
        (
            "method=gptq,awq method.gptq.damping=0.05,0.1 method.awq.grid=4",
            [
                "method=gptq method.damping=0.05",
                "method=gptq method.damping=0.1",
                "method=awq method.grid=4",
            ],
        ),
        ("method.rtn.mse=true bits=2", ["method.mse=True bits=2"]),
        ("bits=2,2", ["bits=2", "bits=2"]),
    ],
)
def test_a_sweeps_job_gets_the_settings_of_its_method_alone(typed, jobs):
    given = OverridesParser.create().parse_overrides(typed.split())
    made = list(itertools.product(*map(choices_of, given)))
    assert [" ".join(job) for job in for_own_methods(made, "rtn", given)] == jobs


@pytest.mark.parametrize(
    ("typed", "answer"),
    [
        ("method=gptq,awq method.billm.damping=0.05", "no trial of this sweep is of method=billm"),
        ("method=gptq method.damping=0.1 method.gptq.damping=0.2", "contradict each other"),
    ],
)
def test_a_setting_for_no_job_or_twice_for_one_is_refused(typed, answer):
    given = OverridesParser.create().parse_overrides(typed.split())
    made = list(itertools.product(*map(choices_of, given)))
    with pytest.raises(ConfigError, match=answer):
        for_own_methods(made, "rtn", given)
