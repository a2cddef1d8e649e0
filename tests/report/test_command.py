"""The command that a report shows for a trial means that very trial."""

import shlex
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from q3q.config import resolve, schema
from q3q.config.command import command_of

CONF = Path(__file__).parents[2] / "conf"


def trial(words: list[str]):
    schema.register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return resolve.trial_from(
            compose("config", [schema.with_plain_keys(word) for word in words])
        )


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["method=none"],
        [
            "method=gptq",
            "bits=3",
            "group_size=-1",
            "method.damping=0.05",
            "method.act_order=false",
            "seed=2",
        ],
        ["method=awq", "model=demo_moe", "calibration.route=all", "calibration.samples=4"],
        ["method=smoothquant", "method.smooth=false", "bits=4", "act_bits=4"],
        ["method=smoothquant", "method.search=true", "method.alpha_grid=[0.4,0.6]"],
        ["method=billm"],
        ["evaluation=none", "bits=8", "symmetric=true", "dtype=bfloat16"],
        [
            "evaluation.limit=4",
            "evaluation.task_limit=8",
            "evaluation.window=128",
            "evaluation.drift=false",
        ],
        [
            "evaluation.quick=true",
            "evaluation.limit=4",
            "evaluation.drift_windows=2",
            "evaluation.limits={stories_who:3}",
        ],
        [
            "overrides={blocks.0:{bits:8},*.down:{group_size:64}}",
            "skip=[blocks.5.o]",
            "head_bits=8",
            "embedding_bits=8",
        ],
    ],
)
def test_it_means_the_same_trial(words):
    command = command_of(trial(words))
    python, launch, *shown = shlex.split(command)
    assert (python, launch) == ("python", "launch.py")
    assert trial(shown).id == trial(words).id, command
