"""The likeliest mistakes are understood, or answered in a line that says what to type."""

import shlex

import pytest
from hydra._internal.utils import get_args_parser

from q3q.config import schema, words
from q3q.config.arguments import as_typed, understood
from q3q.config.guard import REFUSED_FLAGS
from q3q.errors import ConfigError

UNDERSTOOD = [
    ("method=gptq bits=4", None),
    ("-m method=gptq,awq bits=2,3,4", None),
    ("bits=4 -m", "-m bits=4"),
    ("--cfg job method=gptq", None),
    ("-m +study=paper model=qwen3_8b bits=4", None),
    ("-m study=demo", "-m +study=demo"),
    ("model=Qwen/Qwen3-8B", "model=qwen3_8b"),
    ("model=qwen/qwen3-0.6b-base", "model=qwen3_0_6b_base"),
    ("-m model=demo,Qwen/Qwen3-30B-A3B", "-m model=demo,qwen3_30b_a3b"),
    ("model=ada/My-Qwen3", "model=hub model.source=ada/My-Qwen3"),
    ("-m model=ada/a,ada/b", "-m model=hub model.source=ada/a,ada/b"),
    ("evaluation.tasks=mmlu", "evaluation.tasks=[mmlu]"),
    ("skip=*.down", "skip=[*.down]"),
    ("skip=", "skip=[]"),
    ("evaluation.tasks=[mmlu,piqa]", None),
    ("-m evaluation.tasks=mmlu,piqa", "-m evaluation.tasks=[mmlu],[piqa]"),
    ("-m evaluation.texts=[demo],[demo,library]", None),
    ("method=smoothquant method.alpha_grid=0.5", "method=smoothquant method.alpha_grid=[0.5]"),
    ("'question=Which, and why?'", """'question="Which, and why?"'"""),
    ("-m 'question=Which, and why?'", """-m 'question="Which, and why?"'"""),
    ("""storage=~/x "question=What's best" """, """'storage="~/x"' 'question="What'"'"'s best"'"""),
    ("method=gptq method.gptq.damping=0.05", "method=gptq method.damping=0.05"),
    ("method.rtn.mse=true", "method.mse=true"),
    (
        "-m method=gptq,awq method.gptq.damping=0.05",
        "-m method=gptq,awq method.gptq.damping=choice(0.05)",
    ),
    (
        "-m method=gptq,billm method.damping=0.05",
        "-m method=gptq,billm method.damping=choice(0.05)",
    ),
    ("-m method=gptq method.damping=0.05", None),
    ("-m method=gptq,billm method.damping=0.05,0.1", None),
    ("-m method=gptq,awq method.gptq.damping=0.05,0.1", None),
    ("'overrides={\"blocks.[0-2]\":{bits:8}}'", r"'overrides={blocks.\[0-2\]:{bits:8}}'"),
    ("--hydra-help", None),
    ("-sc install=bash", None),
]

ANSWERED = [
    ("skip.x=1", "skip.x is not a setting. See python launch.py --help"),
    ("bits=2,3", "several values need -m: python launch.py -m bits=2,3"),
    (
        "method=rtn bits=range(2,4)",
        "several values need -m: python launch.py -m method=rtn 'bits=range(2,4)'",
    ),
    ("method=glob(*)", "several values need -m: python launch.py -m 'method=glob(*)'"),
    (
        "name=a,b",
        "python launch.py -m name=a,b; if the comma is part of the text: python launch.py",
    ),
    ("--cfg job bits=2,3", "bits=2,3: this shows a single job, so bits can have only one value"),
    (
        "evaluation.tasks=mmlu,piqa seed=1",
        "evaluation.tasks=mmlu,piqa can mean two things. For one trial with all of these values: "
        "python launch.py 'evaluation.tasks=[mmlu,piqa]' seed=1; for one trial per value: "
        "python launch.py -m evaluation.tasks=mmlu,piqa seed=1",
    ),
    ("-m bits=2, 3, 4", "python launch.py -m bits=2,3,4"),
    ("-m bits=2 , 3 method=gptq", "python launch.py -m bits=2,3 method=gptq"),
    ("-m bits=2, method=gptq", "python launch.py -m bits=2 method=gptq"),
    ("bits=4,", "python launch.py bits=4"),
    ("bits = 4", "python launch.py bits=4"),
    ("bits= 4", "python launch.py bits=4"),
    ("bits =4 seed=1", "python launch.py bits=4 seed=1"),
    ("evaluation.tasks=[mmlu, piqa]", "python launch.py 'evaluation.tasks=[mmlu,piqa]'"),
    (
        "overrides={blocks.0: {bits: 8}, *.down: {bits: 4}} seed=1",
        "python launch.py 'overrides={blocks.0:{bits:8},*.down:{bits:4}}' seed=1",
    ),
    ("storage=/my folder/x bits=4", """python launch.py 'storage="/my folder/x"' bits=4"""),
    ("evaluation.tasks=[mmlu", "evaluation.tasks=[mmlu: a bracket is never closed"),
    ("gptq", "gptq is not a setting: did you mean method=gptq?"),
    ("bits=4 moe", "moe is not a setting: run python launch.py -m +study=moe"),
    ("hello", "hello is not a setting: write KEY=VALUE"),
    (
        "--plan",
        "--plan is not a flag; settings are written without dashes: python launch.py plan=true",
    ),
    ("--bits 4", "python launch.py bits=4"),
    ("--head-bits=8", "python launch.py head_bits=8"),
    ("--model", "python launch.py model=VALUE"),
    ("--verbose", "--verbose is not a flag. The flags are -m"),
    (
        "-m +study=demo,moe",
        "run one study at a time: python launch.py -m +study=demo, then python launch.py -m "
        "+study=moe",
    ),
    ("study=demo,moe", "run one study at a time"),
    (
        "-m model=demo,ada/x",
        "no page for ada/x, so a separate sweep is needed: python launch.py -m",
    ),
    (
        "-m method=gptq,awq method.damping=0.05",
        "damping is a setting of gptq, not of awq: use method.gptq.damping=0.05",
    ),
    ("-m method=rtn,awq method.act_order=true", "act_order is a setting of gptq, not of rtn, awq"),
    ("-m method=gptq,awq method.dampin=0.05", "did you mean damping?"),
    ("method=awq method.gptq.damping=0.05", "is a setting of gptq, but this trial uses method=awq"),
]


@pytest.fixture(autouse=True)
def registered():
    schema.register()


@pytest.mark.parametrize(("typed", "meant"), UNDERSTOOD)
def test_what_has_one_meaning_is_taken(typed, meant):
    read = understood(shlex.split(typed))
    assert shlex.join(read) == shlex.join(shlex.split(meant or typed))
    assert understood(read) == read  # so the command that a sweep shows can be given again


@pytest.mark.parametrize(("typed", "answer"), ANSWERED)
def test_what_has_none_is_answered_in_a_line(typed, answer):
    with pytest.raises(ConfigError) as refusal:
        understood(shlex.split(typed))
    assert answer in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(("typed", "answer"), ANSWERED)
def test_the_command_in_an_answer_gets_no_answer(typed, answer):
    """Where an answer ends in a whole command, that command is understood."""
    words_of = shlex.split(answer.rpartition("python launch.py ")[2])
    if "python launch.py " in answer and "VALUE" not in answer and "text" not in answer:
        understood(words_of)


def test_a_sweep_shows_its_settings_as_they_were_typed():
    typed = ["method=gptq,awq", "method.gptq.damping=0.05", "bits=choice(2,3)"]
    assert as_typed(understood(["-m", *typed])[1:]) == typed


def test_hydras_flags_are_known():
    known = {option for action in get_args_parser()._actions for option in action.option_strings}
    assert known == {*words.ALONE, *words.WITH_VALUE, *REFUSED_FLAGS}
