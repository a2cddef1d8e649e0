"""Every command that README and docs tell a reader to type is understood."""

import re
import shlex
import subprocess
from itertools import chain
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from q3q.config.arguments import understood
from q3q.sweep.grid import choices_of
from tests.composed import compose

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "q3q/models/demo/README.md",
]
COMMANDS = sorted(
    {
        (page.name, command)
        for page in PAGES
        for command in re.findall(
            r"(?m)python launch\.py ([^`\n#]+)", page.read_text(encoding="utf-8")
        )
    }
)


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_every_launch_command_composes(page, command):
    typed = [
        word
        for word in shlex.split(command)
        if not word.startswith("-") and word not in ("job", "...")
    ]
    words = [word for word in understood(["-m", *typed]) if word != "-m"]
    choices = [choices_of(one) for one in OverridesParser.create().parse_overrides(words)]
    for choice in chain.from_iterable(choices):
        compose("config", [choice])
    compose("config", [first for first, *_ in choices])


@pytest.mark.parametrize("target", ["demo", "test", "ui"])
def test_make_knows_every_target_that_readme_names(target):
    assert f"make {target}" in (ROOT / "README.md").read_text(encoding="utf-8")
    subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


def test_links_lead_somewhere():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_every_option_in_conf_is_named_in_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for group in ("model", "method", "calibration", "evaluation", "export", "cluster"):
        for path in (ROOT / "conf" / group).glob("*.yaml"):
            name = path.stem.removesuffix("_base")
            assert f"`{name}`" in text, f"{group}={name}"
