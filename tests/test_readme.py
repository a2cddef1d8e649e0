"""Every command that README and docs tell a reader to type is understood."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser

from q3q.config import schema
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
    words = [
        word
        for word in shlex.split(command)
        if not word.startswith("-") and word not in ("job", "...")
    ]
    schema.register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        for override in OverridesParser.create().parse_overrides(words):
            for choice in choices_of(override):
                compose("config", [choice])
        compose(
            "config",
            [choices_of(one)[0] for one in OverridesParser.create().parse_overrides(words)],
        )


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
