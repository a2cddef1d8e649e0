"""What a method is calibrated on: exact shares of a mix, conversations, and what is refused."""

import json
import shlex

import pytest
import torch

from q3q.config.arguments import understood
from q3q.config.calibration import counts
from q3q.config.command import command_of
from q3q.data.calibration import calibration_windows
from q3q.data.chats import conversations, rendered
from q3q.errors import CalibrationError, ConfigError
from q3q.models.checkpoint import load_tokenizer
from q3q.placement import Trial
from q3q.spec import CalibrationPart
from tests.composed import composed_trial

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def trial_of(*words, method="gptq"):
    typed = [f"method={method}", *words, "calibration.length=32", "evaluation=none"]
    return composed_trial(*understood(typed))


@pytest.fixture
def code(tmp_path):
    path = tmp_path / "code.py.txt"
    path.write_text("for x in range(9): print(x)\n" * 200, encoding="utf-8")
    return path


@pytest.fixture
def chat(tmp_path):
    path = tmp_path / "talk.jsonl"
    said = [[{"role": "user", "content": f"{n}?"}] for n in range(300)]
    path.write_text("\n".join(json.dumps({"messages": one}) for one in said), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("weights", "samples", "expected"),
    [
        ({"a": 1, "b": 1}, 8, {"a": 4, "b": 4}),
        ({"a": 0.5, "b": 0.5}, 7, {"a": 4, "b": 3}),
        ({"b": 2, "a": 1}, 4, {"a": 1, "b": 3}),
        ({"a": 0.1, "b": 0.2, "c": 0.7}, 10, {"a": 1, "b": 2, "c": 7}),
        ({"a": 0, "b": 3}, 5, {"b": 5}),
    ],
)
def test_windows_are_divided_exactly(weights, samples, expected):
    assert counts(weights, samples) == expected
    tenfold = {name: 10 * weight for name, weight in weights.items()}
    assert counts(tenfold, samples) == expected


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"a": -1.0, "b": 2.0}, "a has the weight -1: give 0 or more"),
        ({"a": float("nan")}, "a has the weight nan"),
        ({"a": 0.0, "b": 0.0}, "sum to zero"),
        ({"a": 1.0, "b": 99.0}, "calibration.samples=100 or more"),
    ],
)
def test_weights_that_make_no_mix_are_refused(weights, said):
    with pytest.raises(ConfigError) as refusal:
        counts(weights, 10)
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_mix_has_the_windows_of_its_parts(tmp_path, code):
    mix = f"calibration.mix={{demo: 3, file:{code}: 1}}"
    storage = f"storage={tmp_path}"
    trial = trial_of("calibration=mix", mix, "calibration.samples=8", storage)
    tokenizer = load_tokenizer(trial.placement.model)
    windows = calibration_windows(trial, tokenizer)
    alone = [
        calibration_windows(trial_of(*words, "calibration.draw=random", storage), tokenizer)
        for words in (
            ("calibration=demo", "calibration.samples=6"),
            ("calibration=file", f"calibration.path={code}", "calibration.samples=2"),
        )
    ]
    drawn = [one for one in alone if one is not None]
    assert windows is not None
    assert torch.equal(windows, torch.cat(drawn))
    parts = trial.spec.calibration.parts
    assert [(part.source, part.samples) for part in parts] == [("demo", 6), ("file", 2)]
    assert len({part.digest for part in parts}) == 2
    assert trial.spec.to_json()["calibration"]["parts"][1]["samples"] == 2


def test_the_same_mix_is_the_same_trial_however_it_is_written(code):
    one = trial_of("calibration=mix", f"calibration.mix={{demo: 0.5, file:{code}: 0.5}}")
    other = trial_of("calibration=mix", f'calibration.mix={{"file:{code}": 7, demo: 7}}')
    assert one.id == other.id
    third = trial_of("calibration=mix", f"calibration.mix={{demo: 1, file:{code}: 2}}")
    assert third.id != one.id


def test_the_printed_command_and_the_record_give_a_mix_back(code, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('"Once"\n"Then"\n', encoding="utf-8")
    trial = trial_of(
        "calibration=mix",
        f"calibration.mix={{library: 1, file:{code}: 2, traces: 1}}",
        f"calibration.prompts={prompts}",
        "calibration.temperature=0.5",
        "calibration.samples=16",
    )
    again = composed_trial(*understood(shlex.split(command_of(trial))[2:]))
    assert again.id == trial.id
    assert again.placement.parts == trial.placement.parts
    read = Trial.from_json(json.loads(json.dumps(trial.to_json())))
    assert read.spec == trial.spec
    assert read.placement.parts == trial.placement.parts
    traces = next(part for part in trial.spec.calibration.parts if part.source == "traces")
    assert (traces.samples, traces.temperature, traces.prompts) == (4, 0.5, "file")


def test_a_trial_of_one_text_says_nothing_of_mixes():
    facts = trial_of("calibration=demo").to_json()
    assert facts["calibration"].keys() == {"source", "digest", "samples", "length", "draw"}
    assert "parts" not in facts["places"]


@pytest.mark.parametrize(
    ("words", "error", "said"),
    [
        (["calibration=mix"], ConfigError, "needs its sources"),
        (["calibration=mix", "calibration.mix={nowhere: 1}"], ConfigError, "nowhere is not known"),
        (["calibration.mix={demo: 1}"], ConfigError, "not read by calibration=demo"),
        (["calibration.prompts=x"], ConfigError, "not read by calibration=demo"),
        (
            ["calibration=mix", "calibration.mix={demo: 1}", "calibration.draw=documents"],
            ConfigError,
            "give calibration.draw=random or first",
        ),
        (
            ["calibration=mix", "calibration.mix={demo: 1, file:SHORT: 1}"],
            CalibrationError,
            "file:SHORT (64 of 128 windows): the text short has 2 tokens",
        ),
        (["calibration=traces", "calibration.temperature=-1"], ConfigError, "give 0"),
        (["calibration=traces", "calibration.temperature=0"], ConfigError, "repeat each other"),
        (["calibration=traces", "calibration.draw=first"], ConfigError, "not read"),
        (["calibration=traces", "calibration.prompts=chat:CHAT"], CalibrationError, "no chat"),
        (["calibration=chat", "calibration.path=CHAT"], CalibrationError, "no chat template"),
        (["calibration=chat"], CalibrationError, "calibration=chat needs conversations"),
        (["calibration=traces", "loader=streamed"], ConfigError, "calibrate on another text"),
    ],
)
def test_what_cannot_be_calibrated_on_is_refused_in_a_line(tmp_path, chat, words, error, said):
    short = tmp_path / "short.txt"
    short.write_text("a b", encoding="utf-8")
    words = [word.replace("SHORT", str(short)).replace("CHAT", str(chat)) for word in words]
    with pytest.raises(error) as refusal:
        trial_of(*words)
    assert said.replace("SHORT", str(short)) in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{broken", "line 2 is not JSON"),
        ('{"text": "plain"}', "line 2: neither a list of messages"),
        ('{"messages": []}', "line 2: neither a list of messages"),
        ('[{"role": "user"}]', "line 2: message 1 must be"),
        ('[{"role": "user", "content": [1]}]', "line 2: message 1 must be"),
    ],
)
def test_a_line_that_is_no_conversation_is_named(tmp_path, line, said):
    path = tmp_path / "bad.jsonl"
    path.write_text('[{"role": "user", "content": "Hi"}]\n' + line, encoding="utf-8")
    with pytest.raises(CalibrationError) as refusal:
        conversations(path)
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_conversations_are_written_by_the_models_own_template(chat):
    tokenizer = load_tokenizer(trial_of("calibration=demo").placement.model)
    tokenizer.chat_template = TEMPLATE
    first = conversations(chat)[:1]
    assert rendered(first, tokenizer, "talk") == ("<user>0?\n",)
    assert rendered(first, tokenizer, "talk", answers=True) == ("<user>0?\n<assistant>",)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(CalibrationError, match=r"conversation 1: .*roles must alternate"):
        rendered(first, tokenizer, "talk")
    tokenizer.chat_template = "{{ strftime_now('%d %b') }}"
    with pytest.raises(CalibrationError, match="today's date"):
        rendered(first, tokenizer, "talk")


def test_a_part_of_a_mix_is_named_in_labels():
    trial = trial_of("calibration=mix", "calibration.mix={demo: 3, library: 1}")
    assert trial.spec.calibration.label == "demo:96+library:32"
    part = trial.spec.calibration.parts[1]
    assert trial.spec.calibration.of_part(part).samples == 32
    assert part == CalibrationPart(source="library", digest=part.digest, samples=32)
