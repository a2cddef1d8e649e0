"""The saved studies: their questions, their trials, and what the command line may change."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

import q3q.config.calibration as config_calibration
import q3q.config.evaluation as config_evaluation
import q3q.config.model as config_model
import q3q.config.texts as config_texts
from q3q.data.texts import Text
from q3q.errors import ConfigError
from q3q.models.facts import ModelFacts, read_facts
from q3q.quantize.methods.settings import SETTINGS
from q3q.report.paper import GROUPS, cell_of, departures
from q3q.report.published import published
from q3q.sweep import packing
from q3q.sweep.costs import CostModel
from q3q.sweep.grid import choices_of, narrowed, replaced, trials_of
from q3q.sweep.launcher import Job
from q3q.sweep.machines import ResourceRequest, request_of
from q3q.sweep.plan import Planned, describe, plan, simulated
from tests.commands import python
from tests.composed import compose
from tests.specs import qwen3_config
from tests.sweep.test_packing import NODE, paper_trial

ROOT = Path(__file__).parent.parent
STUDIES = sorted(path.stem for path in (ROOT / "conf/study").glob("*.yaml"))


def rows_of(study: str) -> list[list[Any]]:
    """Return a study's rows as the sweeper has them."""
    sweeper = OmegaConf.load(ROOT / f"conf/study/{study}.yaml").hydra.sweeper
    params = dict(sweeper.get("params") or {})
    rows = [{**params, **row} for row in sweeper.get("rows") or [{}]]
    return [parse(*(f"{key}={value}" for key, value in row.items())) for row in rows]


def parse(*words: str) -> list[Any]:
    return OverridesParser.create().parse_overrides(list(words))


def jobs(rows: list[list[Any]]) -> list[dict[str, str]]:
    import itertools

    combined = itertools.chain.from_iterable(
        itertools.product(*map(choices_of, row)) for row in rows
    )
    return [dict(choice.split("=", 1) for choice in job) for job in combined]


def test_the_paper_study_is_the_papers_grid_and_nothing_else() -> None:
    """There are 239 trials, one for each row that the study prints."""
    printed = {(it.model, it.method, it.bits, it.act_bits, it.group) for it in published()}
    cells = []
    for job in jobs(rows_of("paper")):
        source = str(OmegaConf.load(ROOT / f"conf/model/{job['model']}.yaml").source)
        model = source.partition("/")[2]
        method, quantized = SETTINGS[job["method"]].appearance.title, job["method"] != "none"
        bits, group = int(job.get("bits", 16)), GROUPS[int(job["group_size"])] if quantized else ""
        cells.append((model, method, bits, int(job.get("act_bits", 16)), group))
    assert len(cells) == 239
    assert set(cells) == printed


# Hidden, intermediate, layers, heads, whether tied: as the models' config.json have them.
SHAPES = {
    "0.6B": (1024, 3072, 28, 16, True),
    "1.7B": (2048, 6144, 28, 16, True),
    "4B": (2560, 9728, 36, 32, True),
    "8B": (4096, 12288, 36, 32, False),
    "14B": (5120, 17408, 40, 40, False),
    "32B": (5120, 25600, 64, 64, False),
}


def shape_of(source: str) -> ModelFacts:
    """Return the shape of a model of the paper study: `Qwen/Qwen3-8B-Base`."""
    hidden, intermediate, layers, heads, tied = SHAPES[source.split("-")[1]]
    return read_facts(qwen3_config(hidden, layers, heads, 8, intermediate, tied))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answer what composing asks the Hub: models' shapes, and which texts and data sets exist."""

    def facts(source: str, revision: str | None) -> Any:
        return shape_of(source)

    def text(source: str, *_: Any) -> Text:
        return Text(source, (f"of {source}",))

    config_model._hub_model.cache_clear()
    monkeypatch.setattr(
        config_model, "resolve_revision", lambda source, revision: f"commit of {source}"
    )
    monkeypatch.setattr(config_model, "fetch_facts", facts)
    monkeypatch.setattr(config_texts, "open_text", text)
    for module in (config_calibration, config_evaluation):
        monkeypatch.setattr(module, "check_long_enough", lambda *_: None)
    monkeypatch.setattr(config_evaluation, "_data_sets", lambda *_: ({}, []))


@pytest.mark.slow
@pytest.mark.usefixtures("hub")
def test_the_paper_study_composes_into_239_trials_that_all_run_and_are_all_compared(
    tmp_path: Path,
) -> None:
    """From the yaml to the plan: no two are equal, none is left out, all follow the protocol."""
    words_of = [tuple(f"{k}={v}" for k, v in job.items()) for job in jobs(rows_of("paper"))]
    composed = [
        Job(
            number=number,
            overrides=words,
            config=compose("config", ["+study=paper", f"storage={tmp_path}", *words]),
        )
        for number, words in enumerate(words_of)
    ]
    trials, left_out = trials_of(composed)
    assert (len(trials), left_out) == (239, "")
    specs = [entry.trial.spec for entry in trials.values()]
    assert len({cell_of(spec) for spec in specs}) == 239
    assert None not in map(cell_of, specs)
    for spec in specs:
        for metric in (
            "perplexity/wikitext2",
            "perplexity/c4",
            "piqa/acc",
            "mmlu/acc",
            "mmlu_paper/acc",
        ):
            assert departures(spec, metric) == (), spec.name
    planned = plan(
        [entry.trial for entry in trials.values()],
        {},
        {key: entry.facts for key, entry in trials.items()},
        machines=[NODE],
        request=request_of(composed[0].config.cluster.get),
        model=CostModel(),
    )
    assert any(one.load.allocation.is_share for one in planned)
    shown = describe(planned, machines=[NODE], where="a cluster", storage=str(tmp_path))
    assert "239 to run on a cluster" in shown
    assert all(one.seconds > 0 for one in planned)


def test_the_paper_studys_small_models_share_eight_h100_which_ends_it_sooner(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trials, facts = [], {}
    for job in jobs(rows_of("paper")):
        of_scheme = {key: int(job[key]) for key in ("group_size", "act_bits") if key in job}
        model, method, bits = job["model"], job["method"], int(job.get("bits", 16))
        trials.append(paper_trial(model, method, bits, **of_scheme).placed(keep="auto"))
        source = str(OmegaConf.load(ROOT / f"conf/model/{model}.yaml").source)
        facts[trials[-1].id] = shape_of(source)
    assert len(facts) == 239

    def planned() -> list[Planned]:
        request, model = ResourceRequest(), CostModel()
        return plan(trials, {}, facts, machines=[NODE], request=request, model=model)

    sharing = planned()
    monkeypatch.setattr(packing, "LEVELS", ())  # whole GPUs alone
    whole = planned()
    shares = {one.spec.model.name for one in sharing if one.load.allocation.is_share}
    assert shares
    assert "qwen3_32b" not in shares
    assert not any(one.load.allocation.is_share for one in whole)
    assert simulated(sharing, [NODE]).seconds <= simulated(whole, [NODE]).seconds


@pytest.mark.parametrize("study", STUDIES)
def test_every_study_has_a_question_and_an_expectation_and_composes(study: str) -> None:
    lines = (ROOT / f"conf/study/{study}.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_"
    assert [line.partition(":")[0] for line in lines[2:4]] == ["question", "expectation"]
    for job in jobs(rows_of(study))[::17]:
        config = compose("config", [f"+study={study}", *(f"{k}={v}" for k, v in job.items())])
        assert (config.name, bool(config.question)) == (study, True)


def test_a_study_can_be_narrowed_to_some_of_its_own_values() -> None:
    rows = narrowed(
        "paper",
        rows_of("paper"),
        parse("+study=paper", "model=qwen3_8b,qwen3_32b", "method=gptq,smoothquant", "bits=4"),
    )
    kept = [
        (job["model"], job["method"], job["group_size"], job.get("act_bits")) for job in jobs(rows)
    ]
    assert kept == [
        ("qwen3_8b", "gptq", "-1", None),
        ("qwen3_8b", "gptq", "128", None),
        ("qwen3_32b", "gptq", "-1", None),
        ("qwen3_32b", "gptq", "128", None),
        ("qwen3_8b", "smoothquant", "-1", "8"),
        ("qwen3_8b", "smoothquant", "-1", "4"),
    ]


@pytest.mark.parametrize(
    "word",
    [
        *(
            "bits=5",
            "bits=4,5",
            "group_size=64",
            "seed=1",
            "calibration=pile",
            "method.damping=0.1",
        ),
        *("evaluation.limit=2", "dtype=float32"),
    ],
)
def test_what_would_change_every_row_is_refused(word: str) -> None:
    with pytest.raises(ConfigError, match="would change every row of study=paper") as refusal:
        narrowed("paper", rows_of("paper"), parse("+study=paper", word))
    assert "name=..." in str(refusal.value)


@pytest.mark.parametrize(
    "word", ["hydra.sweeper.params.bits=8", "+hydra.sweeper.params.seed=1", "hydra/sweeper=basic"]
)
def test_rows_are_not_changed_through_hydra_either(word: str) -> None:
    with pytest.raises(ConfigError, match="would change every row of study=paper"):
        narrowed(
            "paper", rows_of("paper"), parse("+study=paper"), parse("hydra.mode=MULTIRUN", word)
        )
    renamed = parse("+study=paper", "name=mine")
    assert (
        len(jobs(narrowed("paper", rows_of("paper"), renamed, parse("hydra.mode=MULTIRUN", word))))
        == 239
    )


def test_the_command_line_cannot_change_a_study_through_hydra(tmp_path: Path) -> None:
    study = ("-m", "+study=moe", "hydra.sweeper.params.bits=8")
    done = python("launch.py", *study, f"storage={tmp_path}")
    assert done.returncode == 2
    assert "hydra.sweeper.params.bits=8 would change every row of study=moe" in done.stderr
    assert not list(tmp_path.glob("trials/*/spec.json"))


def test_the_studys_own_name_makes_it_no_other_study() -> None:
    for name in ("paper", "'paper'"):
        with pytest.raises(ConfigError, match="seed=1 would change every row of study=paper"):
            narrowed("paper", rows_of("paper"), parse("+study=paper", f"name={name}", "seed=1"))


def test_a_name_of_its_own_makes_it_another_study() -> None:
    rows = narrowed(
        "paper", rows_of("paper"), parse("+study=paper", "name=mine", "seed=1", "model=qwen3_8b")
    )
    assert {(job["model"], job["seed"]) for job in jobs(rows)} == {("qwen3_8b", "1")}


def test_settings_of_the_sweep_may_be_given_with_a_study() -> None:
    places = [
        "memory=8GB",
        "loader=streamed",
        "data.path=/data",
        "evaluation.baseline=false",
        "hydra.sweep.dir=/tmp/y",
    ]
    given = parse(
        "+study=paper",
        "name=paper",
        "storage=/tmp/x",
        "cluster.address=host:1",
        "plan=true",
        *places,
    )
    assert len(jobs(narrowed("paper", rows_of("paper"), given))) == 239


def test_a_choice_that_leaves_no_row_is_refused() -> None:
    with pytest.raises(ConfigError, match="has no row with all of"):
        narrowed("paper", rows_of("paper"), parse("+study=paper", "method=billm", "bits=4"))


def test_without_a_study_the_command_line_replaces() -> None:
    assert jobs([replaced(parse("bits=2,3", "method=rtn"), parse("bits=4"))]) == [
        {"method": "rtn", "bits": "4"}
    ]


def test_a_study_without_m_and_the_plan_of_one(tmp_path: Path) -> None:
    launch = partial(python, "launch.py", f"storage={tmp_path}")
    alone = launch("+study=demo")
    assert alone.returncode == 2
    assert "study=demo is a sweep, give -m" in alone.stderr
    planned = launch("-m", "+study=demo", "plan=true")
    assert "66 to run on this machine" in planned.stdout, planned.stderr
