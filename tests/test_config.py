"""Every file in conf/ is a promise; every bad value is refused with a line that says what to do."""

import itertools
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from q3q.config import calibration as config_calibration
from q3q.config import evaluation as config_evaluation
from q3q.config import model as config_model
from q3q.config import schema
from q3q.config import texts as config_texts
from q3q.config.command import command_of
from q3q.config.patterns import linears
from q3q.data import texts as data_texts
from q3q.errors import CalibrationError, CheckpointError, ConfigError, IncompatibleError
from q3q.evaluate import catalogue, version
from q3q.models.facts import read_facts
from q3q.placement import Trial
from q3q.quantize.methods.settings import SETTINGS
from q3q.spec import TrialSpec
from q3q.sweep.grid import choices_of, trials_of
from q3q.sweep.launcher import Job
from q3q.sweep.settings import refuse_margin
from tests.composed import compose
from tests.composed import composed_trial as trial
from tests.specs import qwen3_config

CONF = Path(__file__).parent.parent / "conf"


@pytest.fixture
def hub(monkeypatch):
    """Let each model of the Hub have the shape of Qwen3-8B."""
    facts = read_facts(qwen3_config())
    monkeypatch.setattr(config_model, "_hub_model", lambda source, revision: ("c0ffee", facts))


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "my text.txt"
    path.write_text("A small text, said again and again. " * 200, encoding="utf-8")
    return path


def spec(*overrides: str) -> TrialSpec:
    return trial(*overrides).spec


def baseline(*overrides: str) -> str | None:
    return trial(*overrides).placement.baseline


def options(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


@pytest.mark.parametrize("name", options("method"))
def test_every_method_becomes_a_spec(name):
    made = spec(f"method={name}")
    assert made.method.name == name
    assert made.method.to_json() == {
        **SETTINGS[name]().knobs(made.scheme),
        "version": made.method.version,
    }
    assert TrialSpec.from_json(made.to_json()) == made


@pytest.mark.parametrize("name", options("method"))
def test_the_yaml_says_what_the_dataclass_says(name):
    composed = compose("config", [f"method={name}"]).method
    assert dict(composed) == vars(SETTINGS[name]())


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("name", options("model"))
def test_every_model_becomes_a_spec(name, tmp_path):
    overrides = [f"model={name}", f"storage={tmp_path}"]
    own = {
        "local": ([f"model.path={config_model.DEMO_MODELS / 'dense'}"], "dense"),
        "hub": (["model.source=Qwen/Qwen3-4B-Instruct-2507"], "Qwen3-4B-Instruct-2507"),
        "judge": (["model.source=demo", "model.reference=demo", "method=none"], "demo"),
    }
    words, label = own.get(name, ([], name))
    made = spec(*overrides, *words)
    assert made.model.name == label
    if name.startswith("qwen3"):
        assert made.model.source is not None
        assert made.model.source.startswith(("Qwen/Qwen3-", "Qwen/Qwen3."))
        assert made.model.dtype == "bfloat16"


@pytest.mark.parametrize("name", options("calibration"))
def test_every_calibration_becomes_a_spec(name, monkeypatch, text_file, tmp_path):
    if name in ("c4", "pile", "wikitext2"):
        plain = data_texts.load_text
        monkeypatch.setattr(
            config_texts,
            "load_text",
            lambda source, **rest: plain("file", split="calibration", path=text_file),
        )
        config_texts.open_text.cache_clear()
    talk = tmp_path / "talk.jsonl"
    if name == "chat":
        monkeypatch.setattr(config_calibration, "chat_template", lambda *_: "a template")
        message = {"role": "user", "content": "Why? " * 100_000}
        talk.write_text(json.dumps([message]), encoding="utf-8")
    own = {
        "file": [f"calibration.path={text_file}".replace(" ", "\\ ")],
        "chat": [f"calibration.path={talk}"],
        "mix": ["calibration.mix={demo: 1}"],
    }
    made = spec("method=gptq", f"calibration={name}", *own.get(name, []))
    assert made.calibration is not None
    assert made.calibration.source == name
    assert made.calibration.samples > 0
    config_texts.open_text.cache_clear()


@pytest.mark.parametrize("name", options("evaluation"))
def test_every_evaluation_becomes_a_spec(name, study_data, text_file):
    more = {
        "file": [f"evaluation.path={text_file}".replace(" ", "\\ ")],
        "tasks": [
            "evaluation.tasks=[piqa,stories_who]",
            "evaluation.num_fewshot=0",
            "evaluation.limit=3",
        ],
    }.get(name, [])
    data = (
        []
        if name in ("demo", "file", "none")
        else [f"data.path={study_data}", "evaluation.window=256"]
    )
    if name in ("paper", "quick"):  # of our own data sets, which are not whole
        data += ["evaluation.task_limit=6", "evaluation.limits={mmlu:2,mmlu_paper:2}"]
    made = spec(f"evaluation={name}", *more, *data)
    study = ["wikitext2", "c4"]
    texts = {"demo": ["stories", "library"], "file": ["my_text"], "none": [], "tasks": []}
    assert [text.name for text in made.evaluation.texts] == texts.get(name, study)
    assert TrialSpec.from_json(made.to_json()) == made
    if name in ("paper", "quick"):
        assert made.evaluation.to_json()["shots"] == {"mmlu": 5}
        assert len(made.evaluation.data) == (57 + 7 if name == "paper" else 57 + 6)
        assert made.evaluation.quick == (name == "quick")
    if name == "tasks":
        assert made.evaluation.task_names == ("piqa", "stories_who")
        assert made.evaluation.task_limit == 3


def write_task(folder, **settings):
    """A task file of the user's, and the settings that ask for it."""
    task = {"task": "mine", "include": str(catalogue.OWN_TASKS / "stories_who.yaml"), **settings}
    (folder / "mine.yaml").write_text(json.dumps(task), encoding="utf-8")
    config_evaluation._data_sets.cache_clear()
    config_evaluation._check_tasks.cache_clear()
    return [
        "evaluation=tasks",
        f"evaluation.tasks=[{task['task']}]",
        f"evaluation.include_path={folder}",
    ]


def test_a_trial_knows_its_baseline(tmp_path):
    """All trials of a model and an evaluation share one, whatever it cannot depend on."""
    base = spec("method=none")
    for overrides in (
        ["method=gptq", "bits=2", "seed=3"],
        ["bits=4", "act_bits=8"],
        ["head_bits=8", "embedding_bits=8"],
    ):
        assert baseline(*overrides) == base.id
    assert base.id == spec("method=none", "seed=3").id
    for without in ("method=none", "evaluation.baseline=false", "evaluation=none"):
        assert baseline(without) is None
    for change in (
        "evaluation.limit=3",
        "evaluation.task_limit=3",
        "dtype=bfloat16",
        "model=demo_moe",
    ):
        assert baseline(change) not in (base.id, spec(change).id)
    drawn = write_task(tmp_path)  # a task that is not known may show examples
    assert baseline(*drawn, "seed=1") != baseline(*drawn, "seed=2")


@pytest.mark.parametrize(
    "knob",
    ["evaluation.chat=thinking", "evaluation.limits={stories_who:3}", "evaluation.drift=false"],
)
def test_how_it_is_evaluated_is_part_of_a_trial(knob, monkeypatch):
    monkeypatch.setattr(config_evaluation, "chat_template", lambda *_: "a template")
    assert spec(knob).id != spec().id
    assert spec(knob).quantization_id == spec().quantization_id


def test_task_files_of_the_users_are_known_by_their_content(tmp_path):
    one = trial(*write_task(tmp_path))
    assert one.placement.tasks == tmp_path
    assert spec(*write_task(tmp_path, description="Think.")).id != one.id


def test_whoever_makes_the_prompts_and_scores_the_answers_is_part_of_a_trial(monkeypatch):
    made = spec()
    assert made.evaluation.version == version.EVALUATION_VERSION
    monkeypatch.setattr(config_evaluation, "EVALUATION_VERSION", version.EVALUATION_VERSION + 1)
    mended = spec()
    assert mended.id != made.id
    monkeypatch.setattr(config_evaluation, "lm_eval_version", lambda: "9.9")
    assert spec().id not in (made.id, mended.id)
    assert spec("evaluation.tasks=[]").evaluation.lm_eval is None
    assert spec().quantization_id == made.quantization_id


GENERATES: dict[str, Any] = {
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{choices[answer]}}",
}
GENERATES |= {"doc_to_choice": None, "metric_list": [{"metric": "exact_match"}]}


@pytest.mark.parametrize(
    ("settings", "overrides", "words"),
    [
        (
            {"task": "piqa"},
            [],
            "mine.yaml defines piqa, which is a name of lm-eval's; give it another",
        ),
        ({"task": "stories_who"}, [], "mine.yaml defines stories_who, which is a name of q3q's"),
        ({"task": "gsm8k"}, [], "mine.yaml defines gsm8k, which is a name of lm-eval's"),
        (
            {"tag": "ai2_arc"},
            ["evaluation.tasks=[ai2_arc]"],
            "mine.yaml defines ai2_arc, which is a name of lm-eval's",
        ),
        ({"include": "nowhere.yaml"}, [], "mine.yaml cannot be read: FileNotFoundError"),
        (
            {"doc_to_text": "{{question"},
            [],
            "mine .*mine.yaml. cannot be loaded: TemplateSyntaxError",
        ),
        ({"output_type": "none"}, [], "mine .*mine.yaml. cannot be loaded: ValueError"),
        ({"metric_list": [{"metric": "no_such"}]}, [], "mine .*mine.yaml. cannot be loaded"),
        ({"doc_to_choice": "{{choices[9]}}"}, [], "mine .*mine.yaml. cannot be loaded"),
        (
            {},
            ["evaluation.num_fewshot=1"],
            "mine has no examples but the questions themselves, so it cannot show 1",
        ),
        (
            {"num_fewshot": 0, "training_split": "test"},
            ["evaluation.num_fewshot=1"],
            "says num_fewshot: 0 in its file",
        ),
        ({"unsafe_code": True}, [], "mine runs the code that a model writes"),
        ({"doc_to_image": ["picture"]}, [], "mine shows images or sound"),
        (
            {},
            ["evaluation.max_gen_toks=9"],
            "evaluation.max_gen_toks=9: none of evaluation.tasks generates text",
        ),
        (
            {
                **GENERATES,
                "generation_kwargs": {"do_sample": True, "temperature": 0.7, "until": []},
            },
            [],
            "mine asks for sampled text",
        ),
        (
            {**GENERATES, "generation_kwargs": {"num_beams": 2, "until": []}},
            [],
            "mine sets num_beams",
        ),
        (
            {**GENERATES, "generation_kwargs": {"max_gen_toks": 4096, "until": []}},
            [],
            "mine wants 4096 generated tokens, the window has 2048; "
            "evaluation.max_gen_toks=N takes fewer",
        ),
        (
            {**GENERATES, "generation_kwargs": {"until": []}},
            ["evaluation.chat=thinking"],
            "evaluation.chat=thinking needs evaluation.max_gen_toks=N",
        ),
    ],
)
def test_a_task_that_no_trial_could_run_is_refused_before_any_starts(
    settings, overrides, words, tmp_path, monkeypatch
):
    monkeypatch.setattr(config_evaluation, "chat_template", lambda *_: "a template")
    with pytest.raises(ConfigError, match=words) as caught:
        spec(*write_task(tmp_path, **settings), *overrides)
    assert "\n" not in str(caught.value)


def test_how_much_a_task_may_generate_is_part_of_a_trial(tmp_path, monkeypatch):
    mine = write_task(tmp_path, **GENERATES, generation_kwargs={"max_gen_toks": 4096, "until": []})
    one, other = (spec(*mine, f"evaluation.max_gen_toks={most}") for most in (100, 200))
    assert one.id != other.id
    monkeypatch.setattr(
        config_evaluation,
        "chat_template",
        lambda *_: "{% if enable_thinking is false %}<think></think>",
    )
    with pytest.raises(
        ConfigError, match=r"evaluation.chat=template needs evaluation.max_gen_toks"
    ):
        # Qwen3 thinks if it is not told not to.
        spec(
            *write_task(tmp_path, **GENERATES, generation_kwargs={"until": []}),
            "evaluation.chat=template",
        )
    assert one.evaluation.generates == ("mine",)
    assert one.evaluation.max_gen_toks == 100
    assert "evaluation.max_gen_toks=100" in command_of(Trial(one))


def test_a_task_has_one_place_in_the_record(tmp_path):
    group = {"group": "several", "task": ["stories_who", "stories_where"]}
    mine = write_task(tmp_path)
    (tmp_path / "mine.yaml").write_text(json.dumps(group), encoding="utf-8")
    with pytest.raises(
        ConfigError, match=r"stories_who is in both .* and .*; leave one of them out"
    ):
        spec(*mine, "evaluation.tasks=[several,stories_who]")


@pytest.mark.usefixtures("hub")
def test_a_hub_models_chat_template_is_looked_for_before_any_download(monkeypatch, tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    files = {"tokenizer_config.json": tmp_path / "tokenizer_config.json"}
    monkeypatch.setattr(config_texts, "fetch_file", lambda source, name, revision: files.get(name))
    with pytest.raises(ConfigError, match="the tokenizer in Qwen/Qwen3-8B has no chat template"):
        spec("model=qwen3_8b", "evaluation.chat=template", "evaluation.texts=[]")
    config_texts.chat_template.cache_clear()
    files["chat_template.jinja"] = tmp_path / "chat_template.jinja"
    files["chat_template.jinja"].write_text("{{ messages }}", encoding="utf-8")
    assert (
        spec("model=qwen3_8b", "evaluation.chat=template", "evaluation.texts=[]").evaluation.chat
        == "template"
    )


@pytest.mark.parametrize("name", options("cluster"))
def test_every_cluster_composes(name):
    assert compose("config", [f"cluster={name}"]).cluster.name == name


def test_null_means_the_methods_own_default_and_is_resolved():
    gptq, awq = (
        spec(f"method={name}", "calibration.length=null", "calibration.draw=null")
        for name in ("gptq", "awq")
    )
    assert gptq.calibration is not None
    assert awq.calibration is not None
    assert gptq.scheme is not None
    assert (gptq.calibration.length, gptq.calibration.draw) == (2048, "random")
    assert (awq.calibration.length, awq.calibration.draw) == (512, "documents")
    assert gptq.scheme.bits == 4
    assert gptq.scheme.group_size == 128


def test_what_cannot_change_a_number_does_not_change_the_id(tmp_path):
    one = spec("method=gptq", "bits=4")
    assert (
        one.id
        == spec(
            "method=gptq",
            f"storage={tmp_path}",
            "cluster=existing",
            "track.uri=http://x",
            "keep=blocks",
        ).id
    )
    # null and the default it stands for; what a method ignores
    assert one.id == spec("method=gptq", "group_size=128", "symmetric=false").id
    assert (
        spec("method=none", "bits=4").id
        == spec("method=none", "bits=3", "calibration.samples=7").id
    )
    assert spec("method=rtn").id == spec("method=rtn", "calibration.samples=7").id


@pytest.mark.parametrize(
    "change",
    [
        "bits=3",
        "seed=1",
        "method.damping=0.02",
        "group_size=64",
        "act_bits=8",
        "calibration.samples=8",
        "dtype=bfloat16",
    ],
)
def test_what_can_change_a_number_changes_the_id(change):
    assert (
        spec("method=gptq", "bits=4").id
        != spec("method=gptq", "bits=4" if change != "bits=3" else "seed=0", change).id
    )


def test_patterns_are_filed_as_what_they_mean():
    plain = spec("method=gptq", "bits=3")
    mixed = spec(
        "method=gptq",
        "bits=3",
        "overrides={blocks.0:{bits:8},*.down:{bits:4}}",
        "skip=[blocks.5.o]",
    )
    assert mixed.overrides["blocks.0.self_attn.q_proj"] == {"bits": 8}
    assert mixed.overrides["blocks.0.mlp.down_proj"] == {"bits": 4}  # the last pattern wins
    assert len(mixed.overrides) == 7 + 5
    assert mixed.skip == ("blocks.5.self_attn.o_proj",)
    assert mixed.name == "gptq w3 g128 blocks.0:w8 *.down:w4 -blocks.5.o"
    assert mixed.id != plain.id
    same = [
        [
            "overrides={blocks.0.*:{bits:8},*.down_proj:{bits:4}}",
            "skip=[blocks.5.self_attn.o_proj]",
        ],
        ["overrides={*:{bits:8},blocks.[1-5]:{bits:3},*.down:{bits:4}}", "skip=[blocks.5.o,*.5.o]"],
        [
            "overrides={blocks.0:{bits:8,group_size:128},*.down:{bits:4},blocks.5.o:{bits:2}}",
            "skip=[blocks.5.o]",
        ],
    ]
    for overrides in same:
        escaped = [one.replace("[1-5]", r"\[1-5\]") for one in overrides]
        assert spec("method=gptq", "bits=3", *escaped).id == mixed.id
    # What changes nothing is not there, in the name neither.
    assert spec("method=gptq", "bits=3", "overrides={*.o:{bits:3}}").to_json() == plain.to_json()
    assert (
        spec("method=none", "overrides={*.o:{bits:8}}", "skip=[blocks.0]").to_json()
        == spec("method=none").to_json()
    )


def test_settings_of_several_patterns_add_up_one_by_one():
    mixed = spec("overrides={*.down:{group_size:64,bits:8},blocks.0.down:{bits:2}}")
    assert mixed.overrides["blocks.0.mlp.down_proj"] == {"group_size": 64, "bits": 2}
    assert mixed.overrides["blocks.1.mlp.down_proj"] == {"group_size": 64, "bits": 8}


@pytest.mark.usefixtures("hub")
def test_a_block_without_a_star_is_that_block_alone():
    one = spec("model=qwen3_8b", "skip=[blocks.1]", "evaluation=none")
    assert {name.split(".")[1] for name in one.skip} == {"1"}
    some = spec("model=qwen3_8b", "skip=[blocks.1?]", "evaluation=none")
    assert {name.split(".")[1] for name in some.skip} == {str(k) for k in range(10, 20)}


def test_experts_are_one_linear_of_their_site():
    moe = spec("model=demo_moe", "skip=[*.gate_up]", "method=gptq")
    assert {name.split(".", 2)[2] for name in moe.skip} == {
        "mlp.experts.gate_proj",
        "mlp.experts.up_proj",
    }


def test_sites_of_patterns_are_the_models_sites():
    for model in ("demo", "demo_moe"):
        facts = config_model.facts_of(compose("config", [f"model={model}"]))
        for k in range(facts.layers):
            expected = {
                weight.removesuffix(".weight"): site.name
                for site in facts.sites(k)
                for weight in site.weights
            }
            mine = {
                linear.name: linear.site for linear in linears(facts).values() if linear.block == k
            }
            assert mine == expected


def test_a_skip_list_that_leaves_nothing_needs_no_text():
    ends = ["head_bits=8", "embedding_bits=8", "skip=[blocks.*]"]
    assert spec("method=gptq", *ends).calibration is None
    assert spec("method=gptq", *ends[:2]).calibration is not None


@pytest.mark.usefixtures("hub")
def test_head_and_embedding_of_a_model_that_does_not_tie_them():
    alone = spec("model=qwen3_8b", "head_bits=8", "evaluation=none")
    assert (alone.head_bits, alone.embedding_bits) == (8, None)
    assert alone.name == "rtn w4 g128 head:w8"


@pytest.mark.parametrize(
    ("words", "meaning"),
    [
        ("""'overrides={"blocks.0":{bits:8},"*.down":{bits:4}}'""", "blocks.0:w8 *.down:w4"),
        (
            """'overrides={blocks.0: {bits: 8, symmetric: true}, *.down: {group_size: 64}}'""",
            "blocks.0:w8sym *.down:g64",
        ),
        (
            """'overrides={"blocks.[0-2]":{bits:8}}' 'skip=["*.o",blocks.5]'""",
            "blocks.[0-2]:w8 -*.o -blocks.5",
        ),
    ],
)
def test_what_a_shell_hands_over_is_understood(words, meaning):
    given = [schema.with_plain_keys(word) for word in shlex.split(words)]
    assert spec(*given).name == f"rtn w4 g128 {meaning}"


def test_a_grid_leaves_out_what_makes_no_sense_and_counts_it():
    given = OverridesParser.create().parse_overrides(["method=gptq,billm", "bits=1,4"])
    jobs = []
    for number, overrides in enumerate(itertools.product(*map(choices_of, given))):
        jobs.append(
            Job(number=number, overrides=overrides, config=compose("config", list(overrides)))
        )
    trials, left_out = trials_of(jobs)
    assert [entry.trial.spec.name for entry in trials.values()] == ["gptq w4 g128", "billm w1 g128"]
    assert left_out == (
        "2 of 4 combinations left out: method=gptq cannot do bits=1; it takes 2 to 8; "
        "method=billm cannot do bits=4; it takes 1"
    )
    with pytest.raises(IncompatibleError, match="method=gptq cannot do bits=1"):
        trials_of([jobs[0]])
    wrong = Job(number=4, overrides=("bits=9",), config=compose("config", ["bits=9"]))
    with pytest.raises(ConfigError, match="bits=9 is out of range"):
        trials_of([*jobs, wrong])


def test_a_new_evaluation_keeps_the_quantization():
    one, other = spec("method=gptq"), spec("method=gptq", "evaluation.limit=3")
    assert one.id != other.id
    assert one.quantization_id == other.quantization_id


WRONG = [  # (the command line, what the message must say)
    ("bits=0", "bits=0 is out of range: give 1 to 8"),
    ("bits=9", "bits=9 is out of range"),
    ("group_size=96", r"group_size=96 does not divide qkv .*down.*: \[16, 32, 64, 128\] or -1"),
    ("group_size=0", "group_size=0"),
    ("act_bits=1", "act_bits=1"),
    ("overrides={*.dwon:{bits:8}}", r"overrides: \*.dwon matches nothing .*did you mean \*.down "),
    ("skip=[blocks.6]", "skip: blocks.6 matches nothing .*did you mean blocks.5 .*Names go from"),
    ("skip=[lm_head]", "skip: lm_head is not in a block; .*head_bits"),
    ("overrides={*.o:{bits:9}}", r"overrides: \*.o: bits=9 is out of range"),
    ("overrides={*.o:{group_size:0}}", r"overrides: \*.o: group_size=0"),
    ("overrides={*.o:{}}", r"overrides: \*.o sets nothing; give bits, group_size, symmetric"),
    (
        "overrides={blocks.0:{group_size:96},*.down:{group_size:512}}",
        r"group_size=96 does not divide qkv of block 0, gate_up of block 0 \(256 columns\); .*"
        r"group_size=512 does not divide down of blocks 0-5 \(640 columns\); "
        r"sizes that do: \[16, 32, 64, 128\]",
    ),
    ("storage=nowhere://bucket/x", "storage=nowhere://bucket/x is of no kind that fsspec knows"),
    ("storage=memory://x", "only one of two processes gets"),
    ("head_bits=9 embedding_bits=9", "head_bits=9 is out of range"),
    ("method.name=gptq", "choose the method with method="),
    ("method=gptq method.damping=0", "method.damping=0"),
    ("seed=-1", "seed must be 0 or more"),
    ("dtype=float8", "dtype=float8 is not known"),
    ("keep=all", "keep=all is not known"),
    ("model=local", "model.path=DIR"),
    ("model=hub", "model=hub model.source=ORGANIZATION/NAME"),
    (
        "model=qwen3_4b model.source=Qwen/Qwen3-8B",
        "not qwen3_4b, which is Qwen/Qwen3-4B. .*model=hub model.source=Qwen/Qwen3-8B",
    ),
    ("model=hub model.source=ada/mine model.name=demo", "not demo, which is q3q's own"),
    ("method=gptq calibration.draw=rnadom", "did you mean random"),
    ("method=gptq calibration.samples=0", "calibration.samples=0"),
    *(
        (f"evaluation=file evaluation.path=NAMED/{name}.txt", f"a file called {name} would be")
        for name in ("wikitext2", "c4", "stories", "library")
    ),
    ("evaluation.texts=[library,demo,library]", "texts: library is given more than once"),
    ("evaluation.texts=[file,file] evaluation.path=NAMED/demo.txt", "demo is given more than once"),
    ("evaluation.window=1", "evaluation.window=1"),
    ("evaluation.window=4096", "takes at most 2048 tokens"),
    ("evaluation=tasks", r"evaluation.tasks=\[piqa"),
    ("evaluation.chat=template", "has no chat template"),
    ("evaluation.chat=polite", "evaluation.chat=polite is not known"),
    ("evaluation.shots={piqa:2}", "piqa is not one of evaluation.tasks"),
    ("evaluation.limits={stories_who:0}", "0 is too few"),
    ("evaluation.drift_windows=0", "evaluation.drift_windows=0: give 1 or more"),
    ("evaluation.quick=true evaluation.limit=null", "give evaluation.limit"),
    ("evaluation=tasks evaluation.tasks=[mmlu_paper] evaluation.num_fewshot=0", "not 0; mmlu"),
    (
        "evaluation=tasks evaluation.tasks=[piqa] data.path=/nowhere",
        "data.path=/nowhere is not",
    ),
    (
        "evaluation=tasks evaluation.tasks=[piqa]",
        "baber/piqa is neither .* data.path=DIR with DIR/piqa",
    ),
    ("evaluation.include_path=/nowhere", "include_path=/nowhere is not a folder"),
]
IMPOSSIBLE = [
    ("bits=1 method=gptq", "method=gptq cannot do bits=1; it takes 2 to 8"),
    ("method=none act_bits=8", "quantizes nothing"),
    ("method=smoothquant symmetric=false", "symmetric=false makes no sense"),
    (
        "method=smoothquant format=q4_k",
        r"format=q4_k has offsets; .* format=int,.*,q6_k,q3_k,q4_0$",
    ),
    (
        "method=gptq overrides={blocks.[0-2]:{bits:1},blocks.4.self_attn.q_proj:{bits:1}}",
        "method=gptq cannot do bits=1; .*qkv of blocks 0-2, .*down of blocks 0-2, "
        "self_attn.q_proj of block 4",
    ),
    ("method=awq overrides={blocks.3.*.q_proj:{bits:8}}", "give qkv of block 3 one setting"),
    ("skip=[*]", "leaves nothing to quantize: that is method=none"),
    ("skip=[*.q_proj] act_bits=8", "skip all of .*, or none"),
    ("head_bits=8", "demo ties head and embedding.*head_bits=8 must be two equal"),
    ("head_bits=8 embedding_bits=4", "ties head and embedding"),
    ("method=none head_bits=8 embedding_bits=8", "method=rtn skip="),
]
WITHOUT_MODEL = [
    ("model=local model.path=/nowhere", "/nowhere is not a folder"),
    ("model=local model.path=/nowhere.gguf", "there is no file /nowhere.gguf$"),
    ("model=judge model.reference=demo model.source=./none.gguf", "no file .*none.gguf$"),
    ("model=qwen3_8b", "model=local model.path=DIR"),
]
WITHOUT_TEXT = [
    ("method=gptq calibration=file", "calibration.path=FILE"),
    ("method=gptq calibration=file calibration.path=/nowhere.txt", "no such file"),
    ("method=gptq calibration=file calibration.path=NAMED/SHORT", "SHORT.*2048|tokens"),
    ("evaluation=file evaluation.path=NAMED/SHORT", "tokens"),
    ("evaluation=file evaluation.path=NAMED/EMPTY", "holds no text"),
    ("evaluation=paper", "Salesforce/wikitext.*data.path=DIR with DIR/wikitext2"),
    ("evaluation.texts=[wikitext]", "did you mean 'wikitext2'|did you mean wikitext2"),
]
REFUSED = {
    ConfigError: WRONG,
    IncompatibleError: IMPOSSIBLE,
    CheckpointError: WITHOUT_MODEL,
    CalibrationError: WITHOUT_TEXT,
}


@pytest.mark.parametrize(
    ("error", "command", "message"),
    [(error, *row) for error, rows in REFUSED.items() for row in rows],
)
def test_bad_values_are_refused_in_one_line(error, command, message, tmp_path):
    (tmp_path / "SHORT").write_text("Too short for a window.", encoding="utf-8")
    (tmp_path / "EMPTY").touch()
    for name in ("wikitext2", "c4", "stories", "library", "demo"):
        (tmp_path / f"{name}.txt").write_text("Long enough for two windows. " * 1000)
    words = command.replace("[0-2]", r"\[0-2\]").replace("NAMED", str(tmp_path)).split()
    with pytest.raises(error, match=message) as caught:
        spec(*words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("report.margin=0", "report.margin=0 is not a margin: give a number above zero"),
        ("report.margin=-1", "report.margin=-1 is not a margin"),
        ("report.margin=1 evaluation=none", "evaluation=none measures nothing"),
        ("report.margin=1 evaluation.baseline=false", "evaluation.baseline=false leaves it out"),
    ],
)
def test_a_margin_that_nothing_could_be_tested_against_is_refused(words, message):
    refuse_margin(compose("config", ["report.margin=0.5"]))
    with pytest.raises(ConfigError, match=message):
        refuse_margin(compose("config", words.split()))


def test_a_margin_belongs_to_the_report_and_not_to_the_trial():
    assert trial("report.margin=0.5").id == trial().id


@pytest.mark.usefixtures("hub")
def test_a_text_too_short_for_a_hub_model_is_refused_before_any_download(tmp_path):
    (tmp_path / "short.txt").write_text("Too short for a window.", encoding="utf-8")
    file = ["calibration=file", f"calibration.path={tmp_path}/short.txt"]
    with pytest.raises(CalibrationError, match="short has 23 bytes, so fewer than the 2048 tokens"):
        spec("model=qwen3_8b", "method=gptq", *file)
