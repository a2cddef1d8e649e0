"""What README, docs/ and other pages tell a reader exists: commands, settings, files, links."""

import re
import shlex
import subprocess
from itertools import chain
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from q3q.config.arguments import understood
from q3q.config.schema import GROUPS
from q3q.sweep.grid import choices_of
from tests.composed import compose

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "q3q/models/demo/README.md",
]
SOURCES = "\n".join(
    path.read_text(encoding="utf-8")
    for folder in ("q3q", "tests")
    for path in (ROOT / folder).rglob("*.py")
    if path != Path(__file__)
)
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


def headings(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"(?m)^#+ (.+)$", page.read_text(encoding="utf-8"))
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", [*PAGES, *ROOT.glob("C*.md")], ids=lambda page: page.name)
def test_links_lead_to_a_file_and_to_a_heading_in_it(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        file, _, anchor = link.partition("#")
        if "://" not in link:
            target = page.parent / file if file else page
            assert target.exists(), link
            assert not anchor or anchor in headings(target), link


def test_the_index_lists_every_page_and_each_page_begins_with_what_it_is_for():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        opening = page.read_text(encoding="utf-8").split("\n\n")[1]
        assert opening.startswith(("This page ", "This guide ", "This index ")), page.name
        assert page.name == "README.md" or f"]({page.name})" in index


def test_every_module_and_name_that_where_to_look_gives_exists():
    page = (ROOT / "docs" / "ARCHITECTURE.md").read_text(encoding="utf-8")
    table = page.split("## Where to look")[1].split("\n## ")[0]
    found = re.findall(r"`([\w/]+\.py)`(?: \(((?:`[\w.]+`(?:, )?)+)\))?", table)
    assert len(found) > 100
    for module, names in found:
        source = (ROOT / "q3q" / module).read_text(encoding="utf-8")
        for name in re.findall(r"`([\w.]+)`", names):
            for part in name.split("."):
                assert re.search(rf"\b{part}\b", source), f"{module}: {name}"


@pytest.mark.parametrize("page", [*PAGES, *ROOT.glob("C*.md")], ids=lambda page: page.name)
def test_settings_variables_and_flags_that_a_page_names_exist(page):
    text = page.read_text(encoding="utf-8")
    for group, name in re.findall(rf"(?<![\w./])({'|'.join(GROUPS)})\.(\w+)=", text):
        assert name in GROUPS[group].__dataclass_fields__, f"{group}.{name}"
    for module, words in re.findall(r"python -m q3q\.(\w+)([^`\n#]*)", text):
        package = ROOT / "q3q" / module
        door = package / "__main__.py" if package.is_dir() else package.with_suffix(".py")
        for flag in re.findall(r"(?<!\S)--[a-z-]+", words.split("&&")[0]):
            assert f'"{flag}"' in door.read_text(encoding="utf-8"), f"q3q.{module} {flag}"
    for variable in set(re.findall(r"\bQ3Q_[A-Z_]+", text)):
        assert variable in SOURCES, variable


def test_every_option_in_conf_is_named_in_readme():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for group in ("model", "method", "calibration", "evaluation", "export", "cluster"):
        for path in (ROOT / "conf" / group).glob("*.yaml"):
            name = path.stem.removesuffix("_base")
            assert f"`{name}`" in text, f"{group}={name}"
