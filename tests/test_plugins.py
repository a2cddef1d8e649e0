"""Methods from other packages.

The package of docs/METHOD_GUIDE.md is really installed and run; broken ones are named.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra

from q3q.config import resolve, schema
from q3q.errors import ConfigError
from q3q.models.facts import read_facts
from q3q.models.footprint import MethodMemory, need
from q3q.quantize.methods import registry
from q3q.quantize.methods.build import build_method
from q3q.sweep.costs import CostModel
from q3q.sweep.machines import Machine, ResourceRequest
from q3q.sweep.plan import plan
from tests.commands import python
from tests.printed import pip_install, write_printed
from tests.sweep.test_plan import facts as facts_of

ROOT = Path(__file__).parent.parent
GUIDE = ROOT / "docs" / "METHOD_GUIDE.md"
DEMO_MOE = ROOT / "q3q" / "models" / "demo" / "moe"
SETTINGS = """
from dataclasses import dataclass
from typing import Any, ClassVar
from q3q.quantize.methods.settings import MethodSettings

@dataclass
class Fine(MethodSettings):
    name: str = "fine"
    knob: int = 1
    implementation: ClassVar[str] = "outside_methods:Nowhere"

@dataclass
class WrongName(MethodSettings):
    name: str = "other"

@dataclass
class Reserved(MethodSettings):
    name: str = "reserved"
    version: int = 2
    implementation: ClassVar[str] = "outside_methods:Nowhere"

@dataclass
class Unheld(MethodSettings):
    name: str = "unheld"
    knob: set[int] = frozenset()
    implementation: ClassVar[str] = "outside_methods:Nowhere"

@dataclass
class Nothing(MethodSettings):
    name: str = "nothing"

class Plain:
    pass
"""


def pretend_to_install(
    folder: Path,
    package: str,
    points: dict[str, str],
    version: str = "1.0",
    group: str = "q3q.methods",
) -> None:
    """Write the metadata that an installer leaves of a package."""
    info = folder / f"{package.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n", encoding="utf-8"
    )
    lines = [f"{name} = {value}" for name, value in points.items()]
    (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines, ""]), encoding="utf-8")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Return the guide's package as a source folder, and the folder where pip installed it.

    Beside it lies a package that does not load.
    """
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    write_printed(GUIDE, source)
    assert sorted(path.name for path in source.iterdir()) == [
        "pyproject.toml",
        "q3q_tiny",
        "test_tiny.py",
    ]
    pip_install(source, target)
    pretend_to_install(target, "q3q-broken", {"broken": "q3q_broken.settings:Broken"})
    return source, target


def launch(target: Path, *words: str) -> subprocess.CompletedProcess:
    return python("launch.py", *words, PYTHONPATH=str(target))


def records(storage: Path) -> dict[str, dict]:
    texts = [path.read_text() for path in storage.glob("trials/*/record.json")]
    return {record["spec"]["method"]["name"]: record for record in map(json.loads, texts)}


SMALL = ["evaluation=none", "calibration.samples=2", "bits=3"]
BROKEN = (
    "method=broken of the package q3q-broken 1.0 cannot be used: q3q_broken.settings:Broken "
    "does not load"
)


def test_the_guides_test_passes(installed):
    source, target = installed
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        str(source / "test_tiny.py"),
    ]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(target), str(ROOT)])}
    ran = subprocess.run(
        command, cwd=source, env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == 0, ran.stdout
    assert "1 passed" in ran.stdout


@pytest.mark.slow
def test_an_installed_method_runs_from_the_command_line_and_on_ray(installed, tmp_path):
    ran = launch(installed[1], "method=tiny", "method.shrinks=7", f"storage={tmp_path}", *SMALL)
    assert ran.returncode == 0, ran.stderr
    assert ran.stderr.count(f"Note: {BROKEN}") == 1
    tiny = records(tmp_path)["tiny"]
    assert tiny["spec"]["method"] == {
        "name": "tiny",
        "shrinks": 7,
        "version": 1,
        "package": "q3q-tiny 0.1.0",
    }
    assert tiny["spec"]["scheme"]["group_size"] == 64
    assert tiny["status"] == "COMPLETED"

    swept = launch(
        installed[1],
        "-m",
        "method=tiny,rtn",
        f"storage={tmp_path / 'ray'}",
        "group_size=64",
        *SMALL,
    )
    assert swept.returncode == 0, swept.stderr
    assert swept.stderr.count(f"Note: {BROKEN}") == 1
    both = records(tmp_path / "ray")
    errors = {
        name: sum(site["weight_error"] for site in record["sites"]) for name, record in both.items()
    }
    assert errors["tiny"] < errors["rtn"]  # it did something


def test_an_installed_method_is_shown_and_a_broken_one_refused_when_asked_for(installed, tmp_path):
    assert re.search(r"(?m)^  tiny +q3q-tiny", launch(installed[1], "--help").stdout)
    refused = launch(installed[1], "-m", "method=broken,rtn", f"storage={tmp_path}", *SMALL)
    assert refused.returncode == 2
    assert (
        refused.stderr.strip()
        == f"q3q: {BROKEN} (ModuleNotFoundError: No module named 'q3q_broken')"
    )
    assert not list(tmp_path.rglob("record.json"))


@pytest.fixture
def outside(tmp_path, monkeypatch):
    """Return a function that installs methods of `SETTINGS` as if q3q were started after it."""
    store = ConfigStore.instance()
    before = {group: dict(store.repo.get(group, {})) for group in ("method", "schema")}
    (tmp_path / "outside_methods.py").write_text(SETTINGS, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)

    def install(points, package="outside", version="1.0"):
        pretend_to_install(tmp_path, package, points, version)
        registry.offers.cache_clear()
        resolve._warn_of_broken_methods.cache_clear()
        schema.register()

    yield install
    store.repo.update(before)
    sys.modules.pop("outside_methods", None)
    for cached in (registry.offers, resolve._warn_of_broken_methods):
        cached.cache_clear()


def trial(*overrides):
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return resolve.trial_from(compose("config", ["evaluation=none", *overrides]))


def spec(*overrides):
    return trial(*overrides).spec


@pytest.mark.parametrize("shape", ["demo", "128 experts"])
def test_an_installed_method_is_planned_on_a_moe_as_its_settings_declare(
    installed, outside, monkeypatch, shape
):
    """It keeps no Hessian and treats experts in chunks, as RTN does; each range is a rounding."""
    monkeypatch.syspath_prepend(installed[1])
    outside({})
    facts = read_facts(DEMO_MOE) if shape == "demo" else facts_of("qwen3_30b_a3b")
    trials = {
        name: trial("model=demo_moe", "bits=3", "group_size=64", *overrides)
        for name, overrides in {
            "tiny": ["method=tiny"],
            "tiny with 5 more": ["method=tiny", "method.shrinks=25"],
            "rtn": ["method=rtn"],
        }.items()
    }
    planned = plan(
        list(trials.values()),
        {},
        {one.id: facts for one in trials.values()},
        machines=[Machine(cpus=8)],
        request=ResourceRequest(),
        model=CostModel(),
    )
    by_id = {one.trial.id: one for one in planned}
    tiny, more, rtn = (by_id[one.id] for one in trials.values())
    assert tiny.allocation is not None
    assert rtn.allocation is not None
    assert tiny.allocation.loader == rtn.allocation.loader == "resident"
    assert tiny.allocation.needs == rtn.allocation.needs
    tiny_seconds, more_seconds, rtn_seconds = (one.phases["quantize"] for one in (tiny, more, rtn))
    assert more_seconds - tiny_seconds == pytest.approx(5 * rtn_seconds)
    if shape == "128 experts":
        dtype = tiny.spec.model.dtype
        chunked, unchunked = (
            need(facts, dtype, method=MethodMemory(chunks_experts=chunks), loader="resident")
            for chunks in (True, False)
        )
        assert tiny.allocation.needs < chunked - 5 * 10**8
        assert tiny.allocation.needs < unchunked - 128 * 4 * 2048**2


def test_the_packages_version_is_part_of_what_a_trial_is(outside, tmp_path):
    outside({"fine": "outside_methods:Fine"})
    first = spec("method=fine", "method.knob=2")
    assert first.method.package == "outside 1.0"
    settings: Any = registry.settings_of(first.method)
    assert settings.knob == 2
    (tmp_path / "outside-1.0.dist-info").rename(tmp_path / "gone")
    outside({"fine": "outside_methods:Fine"}, version="1.1")
    second = spec("method=fine", "method.knob=2")
    assert second.id != first.id
    with pytest.raises(
        ConfigError,
        match=r"needs method=fine of outside 1\.0 on this machine; here is that of outside 1\.1",
    ):
        registry.settings_of(first.method)
    with pytest.raises(
        ConfigError, match=r"method=fine of outside 1\.1: outside_methods:Nowhere is not there"
    ):
        build_method(second)


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("gone", "outside_methods:Gone", r"does not load \(AttributeError: "),
        ("plain", "outside_methods:Plain", "is not a dataclass derived from MethodSettings"),
        (
            "wrong",
            "outside_methods:WrongName",
            'must declare name: str = "wrong", as its entry point does',
        ),
        (
            "reserved",
            "outside_methods:Reserved",
            "has a setting named version, which q3q uses itself",
        ),
        ("unheld", "outside_methods:Unheld", "has a setting of a type that a config cannot hold"),
        ("nothing", "outside_methods:Nothing", "must declare implementation"),
        ("gptq", "outside_methods:Fine", "q3q has a method of that name itself"),
    ],
)
def test_what_cannot_be_used_is_named_warned_of_and_refused_when_asked_for(
    outside, capsys, name, value, why
):
    outside({name: value, "fine": "outside_methods:Fine"})
    with pytest.raises(
        ConfigError, match=f"method={name} of the package outside 1.0 cannot be used: .*{why}"
    ) as caught:
        spec(f"method={name}")
    assert "\n" not in str(caught.value)
    for other in ("method=rtn", "method=fine"):
        spec(other)
    assert capsys.readouterr().err == f"Note: {caught.value}. Other methods are not affected\n"


def test_two_packages_with_one_name_are_refused(outside):
    outside({"fine": "outside_methods:Fine"})
    outside({"fine": "outside_methods:Fine"}, package="another")
    with pytest.raises(
        ConfigError,
        match=r"offered by another 1\.0 and by outside 1\.0|by outside 1\.0 and by another 1\.0",
    ):
        spec("method=fine")
