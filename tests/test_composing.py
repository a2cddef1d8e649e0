"""What `Composer` makes of a sweep's jobs is what Hydra itself makes of them."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra import initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from q3q.config.composing import Composer
from q3q.config.schema import register
from q3q.sweep.grid import choices_of, unquantized

CONF = Path(__file__).parent.parent / "conf"
STUDIES = sorted(path.stem for path in (CONF / "study").glob("*.yaml"))
METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
JOBS = [
    [],
    *([f"method={name}", "bits=3", "group_size=64"] for name in METHODS),
    ["method=gptq", "method.damping=0.02", "method.act_order=true"],
    ["model=local", "model.path=/a b/c", "model.name='two words'"],
    ["model=demo_moe", "calibration=file", "calibration.path=x.txt", "calibration.samples=null"],
    ["evaluation=tasks", "evaluation.tasks=[mmlu,piqa]", "evaluation.limits={mmlu:8,piqa:9}"],
    ["evaluation=tasks", "evaluation.tasks=[]", "evaluation.shots={}", "evaluation.window=1024"],
    ["overrides={blocks.0:{bits:8},*.down:{group_size:64}}", "skip=['*.up',blocks.1]"],
    ["overrides={blocks.0:{bits:8}}", "bits=4", "overrides={blocks.1:{bits:2}}", "bits=5"],
    ["name='a, \"b\" = ${c}'", 'question="why \\"so\\"?"', "expectation=null"],
    ["storage=${oc.env:HOME}/s", "track.uri=sqlite:///${storage}/x.db", "name=${method.name}"],
    ["bits=${oc.decode:3}", "seed=1_0", "memory=2.5GB", "symmetric=true"],
    ["cluster=existing", "cluster.address=auto", "cluster.cpus_per_trial=2", "plan=true"],
    ["export=gptq", "export.path=/out", "head_bits=8", "embedding_bits=4"],
    ["bits=4", "method=awq", "bits=8"],  # a page between two settings
    ["method=awq", "method=gptq"],
    # What is left to Hydra: additions, deletions, Hydra's own settings, a page by a dictionary.
    ["+bits=4", "seed=2"],
    ["++evaluation.limits.mmlu=3", "bits=2"],
    ["~overrides", "bits=2"],
    ["~export", "bits=2"],
    ["hydra.job.name=other", "bits=2"],
    ["method={damping:0.5}", "method=gptq"],
    ["model={source:a/b}", "bits=2"],
]
WRONG = [
    ["head_bits=x"],
    ["+overrides.a.bits=4", "bits=2"],
    ["seed=0x10"],
    ["bits=4", "bitz=4"],
    ["method=gptq", "method.dampling=1"],
    ["method=nobody"],
    ["method=1"],
    ["method=null"],
    ["bits=2,3"],
    ["bits=choice(2,3)"],
    ["evaluation.tasks={a:b}"],
    ["skip.x=1"],
    ["model@other=demo"],
    ["bits@other=3"],
    ["++method=rtn"],
    ["overrides={b:{bits:3}}", "+overrides.a={bits:4}", "bits=2"],
    ["bits=[1"],
    ["=3"],
]


@pytest.fixture(scope="module")
def loader() -> Iterator[ConfigLoader]:
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        yield GlobalHydra.instance().config_loader()


def sweep_of(loader: ConfigLoader, *words: str) -> DictConfig:
    """Return the sweep's own config, as Hydra makes it of a command line with -m."""
    return loader.load_configuration("config", list(words), RunMode.MULTIRUN)


def content(node: Any) -> Any:
    """Return all that a config has: values and interpolations as written, types and flags."""
    facts = node._metadata
    flags = {name: flag for name, flag in (facts.flags or {}).items() if flag is not None}
    own = (type(node), facts.key, facts.ref_type, facts.object_type, facts.optional, flags)
    value = node._value()
    children = value.values() if isinstance(value, dict) else value
    return *own, [content(one) for one in children] if isinstance(value, dict | list) else value


def resolved(config: DictConfig) -> Any:
    """Return the values, or the error of an interpolation that does not resolve."""
    shown = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    try:
        return OmegaConf.to_container(shown, resolve=True)
    except OmegaConfBaseException as error:
        return str(error)


def answer(compose: Callable[[Sequence[str]], DictConfig], words: Sequence[str]) -> Any:
    """Return a job's config with its words, or Hydra's whole error."""
    try:
        config = compose(words)
    # AssertionError: OmegaConf's answer to a part of a setting that is null.
    except (HydraException, OmegaConfBaseException, ValueError, AssertionError) as error:
        return WRONG, type(error), str(error), str(error.__cause__)
    assert config.hydra.overrides.task == list(words) or words[0].startswith("hydra.")
    return content(config), resolved(config)


def test_each_job_is_what_hydra_composes(loader: ConfigLoader) -> None:
    """One composer gets all jobs twice: none may see what another one changed."""
    sweep = sweep_of(loader)
    composer = Composer(loader, sweep)
    expected = [
        answer(lambda job: loader.load_sweep_config(sweep, list(job)), words)
        for words in [*JOBS, *WRONG]
    ]
    for words, answered in 2 * list(zip([*JOBS, *WRONG], expected, strict=True)):
        assert answer(composer.compose, words) == answered, words
        assert (answered[0] is WRONG) == (words in WRONG), words


def test_overrides_of_hydra_itself_come_first(loader: ConfigLoader) -> None:
    sweep = sweep_of(
        loader,
        "hydra.job.config.override_dirname.item_sep=__",
        "hydra.job.config.override_dirname.kv_sep=-",
        "hydra.job.config.override_dirname.exclude_keys=[seed]",
    )
    words = ["method=awq", "seed=3", "bits=4"]
    made = Composer(loader, sweep).compose(words)
    assert made.hydra.job.override_dirname == "bits-4__method-awq"
    assert content(made) == content(loader.load_sweep_config(sweep, words))


@pytest.mark.parametrize("study", STUDIES)
def test_each_job_of_a_study_is_what_hydra_composes(loader: ConfigLoader, study: str) -> None:
    sweep = sweep_of(loader, f"+study={study}")
    composer, parser = Composer(loader, sweep), OverridesParser.create()
    params, rows = sweep.hydra.sweeper.params or {}, sweep.hydra.sweeper.rows or [{}]
    jobs = [
        [f"+study={study}", *job]
        for row in ({**params, **row} for row in rows)
        for job in itertools.product(
            *(choices_of(parser.parse_override(f"{key}={value}")) for key, value in row.items())
        )
    ]
    for words in (jobs[0], jobs[-1], unquantized(jobs[-1])):
        expected = loader.load_sweep_config(sweep, words)
        assert content(composer.compose(words)) == content(expected), words


def test_jobs_with_the_same_pages_are_one_composition_of_hydras(
    loader: ConfigLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep, asked = sweep_of(loader), list[list[str]]()
    plain = loader.load_sweep_config

    def load_sweep_config(one: DictConfig, words: list[str]) -> DictConfig:
        asked.append(words)
        return plain(one, words)

    monkeypatch.setattr(loader, "load_sweep_config", load_sweep_config)
    composer = Composer(loader, sweep)
    made = [
        composer.compose([f"method={method}", f"bits={bits}"])
        for method in ("rtn", "gptq")
        for bits in (2, 3, 4)
    ]
    assert asked == [["method=rtn"], ["method=gptq"]]
    assert [(one.method.name, one.bits) for one in made] == [
        *(("rtn", bits) for bits in (2, 3, 4)),
        *(("gptq", bits) for bits in (2, 3, 4)),
    ]
