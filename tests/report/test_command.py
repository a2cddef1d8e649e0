"""The command that a report shows for a trial means that very trial."""

import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from q3q.config import schema
from q3q.config.arguments import understood
from q3q.config.command import command_of, export_command
from q3q.config.model import DEMO_MODELS
from q3q.export.formats import format_of_choice
from q3q.quoting import override
from tests.composed import composed_trial

CONF = Path(__file__).parents[2] / "conf"


def trial(words: list[str]):
    return composed_trial(*map(schema.with_plain_keys, words))


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


def test_paths_with_any_characters_are_read_back_by_shell_and_hydra(tmp_path):
    folder = tmp_path / "a b,c=d#e'f\"g{h}[i](j)$k%l ${m} é \\"
    folder.mkdir()
    (folder / "model\\").symlink_to(DEMO_MODELS / "dense")
    (folder / "text, my own.txt").write_text("A small text, said again and again. " * 2000)
    words = [
        "model=local",
        override("model.path", folder / "model\\"),
        override("model.name", "it's {mine}, ${oc.env:HOME}"),
        "method=gptq",
        "calibration=file",
        override("calibration.path", folder / "text, my own.txt"),
        "calibration.samples=2",
        "calibration.length=16",
        override("data.path", folder),
    ]
    made = trial(words)
    python, launch, *shown = shlex.split(command_of(made))
    again = trial(understood(shown))
    assert (python, launch) == ("python", "launch.py")
    assert (again.id, again.spec.model, again.placement) == (
        made.id,
        made.spec.model,
        made.placement,
    )
    assert made.spec.model.name == "it's {mine}, ${oc.env:HOME}"


@pytest.mark.parametrize(
    ("words", "form"),
    [
        (["method=rtn", "bits=4"], "compressed_tensors"),
        (["method=gptq", "bits=3", "seed=2", "calibration.samples=4"], "gptq"),
        (["method=gptq", "bits=3", "method.act_order=false"], "compressed_tensors"),
        (["method=gptq", "bits=5"], "hf"),
        (["method=smoothquant", "bits=8", "act_bits=8"], "compressed_tensors"),
        (["method=rtn", "format=mxfp4"], "compressed_tensors"),
        (["method=rtn", "format=fp8_e5m2"], "hf"),
        (["method=rtn", "bits=4", "head_bits=8", "embedding_bits=8"], "hf"),
        (["method=billm"], "hf"),
    ],
)
def test_the_command_that_exports_quantizes_as_the_trial_did(words, form):
    made = trial(words)
    assert format_of_choice(made.spec) == form
    again = trial(shlex.split(export_command(made, form))[2:])
    assert (again.spec.export, again.spec.evaluation.texts) == (form, ())
    # An export rounds its scales to the type that it stores.
    scheme = replace(again.spec.scheme, scales=made.spec.scheme.scales)
    same = {"export": made.spec.export, "evaluation": made.spec.evaluation, "scheme": scheme}
    assert replace(again.spec, **same) == made.spec


def test_what_no_format_holds_has_no_command():
    assert format_of_choice(trial(["method=smoothquant", "bits=4", "act_bits=4"]).spec) is None
