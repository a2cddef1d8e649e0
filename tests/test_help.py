"""--help and --cfg explain every setting, from the one place where it is defined."""

import re
import sys
from functools import partial
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from q3q.cli import program_version
from q3q.config import schema
from q3q.config.help import commented, meanings
from q3q.config.known import methods, not_a_setting
from q3q.config.pages import CHOICES, pages
from tests.commands import output_of, python
from tests.composed import compose

ROOT = Path(__file__).parent.parent
PAGES = [(group, page) for group in CHOICES for page in pages(group) if group != "study"]


def keys_of(config, above=""):
    for key, value in config.items_ex(resolve=False):
        is_group = isinstance(value, DictConfig) and f"{above}{key}" in (*schema.GROUPS, "method")
        yield from keys_of(value, f"{key}.") if is_group else [f"{above}{key}"]


@pytest.mark.parametrize("page", [page for group, page in PAGES if group == "model"])
def test_every_setting_of_a_model_has_a_meaning(page):
    settings = OmegaConf.load(ROOT / "conf" / "model" / f"{page}.yaml")
    known = meanings("rtn")
    keys = {str(key) for key in settings} - {"defaults"}
    assert not [key for key in keys if not known.get(f"model.{key}")]
    assert pages("model")[page]


@pytest.mark.parametrize(("group", "page"), [one for one in PAGES if one[0] != "model"])
def test_every_setting_of_every_page_has_a_meaning(group, page):
    config = compose("config", [f"{group}={page}"])
    known = meanings(config.method.name)
    assert not [key for key in keys_of(config) if not known.get(key)]
    assert pages(group)[page]


@pytest.mark.parametrize("method", methods())
def test_comments_change_no_setting(method):
    plain = OmegaConf.to_yaml(
        compose("config", [f"method={method}", "overrides={blocks.0:{bits:8}}"])
    )
    explained = commented(plain)
    assert OmegaConf.create(explained) == OmegaConf.create(plain)
    assert re.search(r"(?m)^bits: null +# 1 to 8", explained)
    assert max(map(len, explained.splitlines())) <= 100


launch = partial(python, "launch.py")


def test_help_lists_choices_and_settings_and_no_internals():
    shown = launch("--help", "method=gptq")
    assert shown.returncode == 0, shown.stderr
    assert "schema" not in shown.stdout
    assert "  damping: 0.01                   # share of the mean Hessian diagonal" in shown.stdout
    assert re.search(r"(?m)^  billm +BiLLM: Huang et al", shown.stdout)
    for group in CHOICES:
        assert re.search(rf"(?m)^\+?{group}=$", shown.stdout)
        assert all(re.search(rf"(?m)^  {page} ", shown.stdout) for page in pages(group))


def test_cfg_is_yaml_with_comments_and_version_is_q3qs_own():
    shown = launch("--cfg", "job", "--package", "method", "method=awq")
    assert shown.returncode == 0, shown.stderr
    assert "grid: 20                          # number of exponents" in shown.stdout
    assert OmegaConf.create(shown.stdout).grid == 20
    assert launch("--version").stdout == f"{program_version()}\n"
    assert re.fullmatch(r"q3q \d+\.\d+.*", program_version())


def test_a_reader_that_stops_early_gets_no_traceback():
    for arguments in ("--help", "--cfg job"):
        command = f"{sys.executable} launch.py {arguments} | head -1"
        shown = output_of("sh", "-c", command, cwd=ROOT)
        assert (len(shown.stdout.splitlines()), shown.stderr) == (1, "")


@pytest.mark.parametrize(
    ("key", "method", "answer"),
    [
        ("method.act_order", "rtn", "rtn does not have the setting act_order, but gptq does: add"),
        ("method.damping", "rtn", "the setting damping, but gptq and billm do: add method=gptq"),
        ("method.dampng", "gptq", "did you mean damping?"),
        ("gptq.damping", None, "A method's settings are written method.damping or"),
        ("gptq", None, "method.gptq.SETTING"),
        ("damping", None, "damping is a setting of gptq and billm: use method.damping"),
        ("tasks", None, "did you mean evaluation.tasks?"),
        ("gpus_per_trial", None, "did you mean cluster.gpus_per_trial?"),
        ("bit", None, "did you mean bits or kv_bits?"),
        ("modle", None, "did you mean model?"),
        ("evaluation.task", None, "did you mean tasks"),
        ("xyzzy", None, "xyzzy is not a setting. See python launch.py --help"),
    ],
)
def test_a_setting_that_does_not_exist_is_found_where_it_is(key, method, answer):
    assert answer in not_a_setting(key, method)
