"""The saved studies: what they ask, which trials they mean, and what the command line may do to them."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from q3q import config as schema
from q3q.errors import ConfigError
from q3q.report.paper import GROUPS, METHODS, published
from q3q.sweep.sweeper import _choices, narrowed, replaced

ROOT = Path(__file__).parent.parent
STUDIES = sorted(path.stem for path in (ROOT / "conf/study").glob("*.yaml"))


def rows_of(study: str) -> list[list[Any]]:
    """A study's rows as the sweeper has them."""
    sweeper = OmegaConf.load(ROOT / f"conf/study/{study}.yaml").hydra.sweeper
    params = dict(sweeper.get("params") or {})
    rows = [{**params, **row} for row in sweeper.get("rows") or [{}]]
    return [parse(*(f"{key}={value}" for key, value in row.items())) for row in rows]


def parse(*words: str) -> list[Any]:
    return OverridesParser.create().parse_overrides(list(words))


def jobs(rows: list[list[Any]]) -> list[dict[str, str]]:
    import itertools

    combined = itertools.chain.from_iterable(itertools.product(*map(_choices, row)) for row in rows)
    return [dict(choice.split("=", 1) for choice in job) for job in combined]


def test_the_paper_study_is_the_papers_grid_and_nothing_else() -> None:
    """239 trials, each a row that the study prints, and every row that it prints."""
    printed = {(it.model, it.method, it.bits, it.act_bits, it.group) for it in published()}
    meant = []
    for job in jobs(rows_of("paper")):
        model = str(OmegaConf.load(ROOT / f"conf/model/{job['model']}.yaml").source).partition("/")[2]
        method, quantized = METHODS[job["method"]], job["method"] != "none"
        bits, group = int(job.get("bits", 16)), GROUPS[int(job["group_size"])] if quantized else ""
        meant.append((model, method, bits, int(job.get("act_bits", 16)), group))
    assert len(meant) == 239
    assert set(meant) == printed


@pytest.mark.parametrize("study", STUDIES)
def test_every_study_says_what_it_asks_and_composes(study: str) -> None:
    lines = (ROOT / f"conf/study/{study}.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_"
    assert [line.partition(":")[0] for line in lines[2:4]] == ["question", "expectation"]
    schema.register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for job in [tuple(job.items()) for job in jobs(rows_of(study))[::17]]:
            config = compose("config", [f"+study={study}", *(f"{key}={value}" for key, value in job)])
            assert (config.name, bool(config.question)) == (study, True)


def test_a_study_can_be_narrowed_to_some_of_its_own_values() -> None:
    rows = narrowed(
        "paper",
        rows_of("paper"),
        parse("+study=paper", "model=qwen3_8b,qwen3_32b", "method=gptq,smoothquant", "bits=4"),
    )
    kept = [(job["model"], job["method"], job["group_size"], job.get("act_bits")) for job in jobs(rows)]
    assert kept == [
        ("qwen3_8b", "gptq", "-1", None),
        ("qwen3_8b", "gptq", "128", None),
        ("qwen3_32b", "gptq", "-1", None),
        ("qwen3_32b", "gptq", "128", None),
        ("qwen3_8b", "smoothquant", "-1", "8"),
        ("qwen3_8b", "smoothquant", "-1", "4"),
    ]


@pytest.mark.parametrize(
    "word", ["bits=5", "bits=4,5", "group_size=64", "seed=1", "calibration=pile", "method.damping=0.1"]
)
def test_what_would_change_every_row_is_refused(word: str) -> None:
    with pytest.raises(ConfigError, match="would change every row of study=paper") as refusal:
        narrowed("paper", rows_of("paper"), parse("+study=paper", word))
    assert "name=..." in str(refusal.value)


def test_a_name_of_its_own_makes_it_another_study() -> None:
    rows = narrowed("paper", rows_of("paper"), parse("+study=paper", "name=mine", "seed=1", "model=qwen3_8b"))
    assert {(job["model"], job["seed"]) for job in jobs(rows)} == {("qwen3_8b", "1")}


def test_what_belongs_to_the_sweep_may_be_said_of_a_study() -> None:
    given = parse("+study=paper", "storage=/tmp/x", "cluster.address=host:1", "plan=true")
    assert len(jobs(narrowed("paper", rows_of("paper"), given))) == 239


def test_a_row_that_nothing_is_left_of_is_refused() -> None:
    with pytest.raises(ConfigError, match="has no row with all of"):
        narrowed("paper", rows_of("paper"), parse("+study=paper", "method=billm", "bits=4"))


def test_without_a_study_the_command_line_replaces() -> None:
    assert jobs([replaced(parse("bits=2,3", "method=rtn"), parse("bits=4"))]) == [{"method": "rtn", "bits": "4"}]


def test_a_study_without_m_and_the_plan_of_one(tmp_path: Path) -> None:
    def launch(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "launch.py", *words, f"storage={tmp_path}"]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)

    alone = launch("+study=demo")
    assert alone.returncode == 2
    assert "study=demo is a sweep, give -m" in alone.stderr
    planned = launch("-m", "+study=demo", "plan=true")
    assert "44 to run on this machine" in planned.stdout, planned.stderr
