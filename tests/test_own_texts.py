"""The user's own texts: several to evaluate on, by name, each with its numbers."""

import shlex

import pytest

from q3q.config.arguments import understood
from q3q.config.command import command_of
from q3q.errors import CalibrationError, ConfigError
from q3q.placement import Trial
from tests.composed import composed_trial


@pytest.fixture
def files(tmp_path):
    paths = {}
    for name, sentence in (
        ("code", "for x in range(9): print(x)\n"),
        ("german", "Es war einmal. "),
    ):
        paths[name] = tmp_path / f"{name} text.txt"
        paths[name].write_text(sentence * 300, encoding="utf-8")
    return paths


def evaluated(entry):
    """Return the trial that a person's words make, who types one `evaluation.texts`."""
    words = ["method=rtn", "evaluation=none", f"evaluation.texts={entry}"]
    return composed_trial(*understood([*words, "evaluation.window=128"]))


def test_each_text_has_its_own_name_and_file(files):
    trial = evaluated(f"{{code: '{files['code']}', german: '{files['german']}'}}")
    texts = trial.spec.evaluation.texts
    assert [text.name for text in texts] == ["code", "german"]
    assert [text.source for text in texts] == ["file", "file"]
    assert len({text.digest for text in texts}) == 2
    for name, path in files.items():
        assert trial.placement.evaluation_file(name) == path


def test_texts_of_both_kinds_stand_side_by_side(files):
    trial = evaluated(f"[library,{{code: '{files['code']}'}}]")
    assert [text.name for text in trial.spec.evaluation.texts] == ["library", "code"]


def test_a_text_by_its_own_name_is_the_trial_that_a_file_of_that_name_is(files):
    path = files["code"].rename(files["code"].with_name("code.txt"))
    named = evaluated(f"{{code: '{path}'}}")
    alone = composed_trial(
        *("method=rtn", "evaluation=file", f"evaluation.path='{path}'", "evaluation.window=128")
    )
    assert named.id == alone.id


def test_the_printed_command_and_the_record_give_the_trial_back(files):
    trial = evaluated(f"[demo,{{code: '{files['code']}', german: '{files['german']}'}}]")
    command = shlex.split(command_of(trial))[2:]
    again = composed_trial(*understood(command))
    assert again.id == trial.id
    assert again.placement.texts == trial.placement.texts
    assert Trial.from_json(trial.to_json()).placement.texts == trial.placement.texts


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("{a/b: FILE}", "a/b cannot be a text's name"),
        ("{9: FILE}", "9 cannot be a text's name"),
        ("{stories: FILE}", "q3q's text stories"),
        ("{code: null}", "give the text's file"),
        ("[[code]]", "neither the name of a text"),
        ("[{code: FILE},{code: FILE}]", "code is given more than once"),
    ],
)
def test_a_name_that_is_none_is_refused_in_a_line(files, entry, said):
    with pytest.raises(ConfigError) as refusal:
        evaluated(entry.replace("FILE", f"'{files['code']}'"))
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CalibrationError, match="no such file"):
        evaluated(f"{{code: '{tmp_path}/gone.txt'}}")
