"""A command that q3q prints means, to a shell and to Hydra, what was meant."""

import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from q3q import quoting
from q3q.config.arguments import understood
from tests.composed import compose

CONF = Path(__file__).parent.parent / "conf"
TEXTS = [
    "/plain/path-1.0_x",
    "/with a space/and=equals,comma",
    "#hash",
    "single ' and double \" quotes",
    "'quoted'",
    '"',
    "{brace}[bracket](round)",
    "ends with a backslash \\",
    'a \\" b \\\\',
    "back\\slash\\",
    "$HOME and `id` and $(id)",
    "${oc.env:HOME}",
    "\\${storage} \\\\${storage}",
    "100 % ~/x !y; z & w | v < u > t ^ s",
    "~/models",
    "Größe 模型 é",
    "null",
    "True",
    "1e3",
    "1_000",
    "007",
    "nan",
    "-1",
    "+x",
    " leading and trailing ",
    "a\ttab",
    "two\nlines",
    "s3://bucket/prefix",
    "host:5000",
    "*.down?",
    "c0ffee0123456789",
    "",
]


def read_back(command):
    """The overrides that launch.py makes of the words that a shell makes of a command."""
    python, launch, *words = shlex.split(command)
    assert (python, launch) == ("python", "launch.py")
    return understood(words)


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_read_back(text):
    command = quoting.launch([quoting.override(key, text) for key in ("model.path", "name")])
    config = compose("config", read_back(command))
    assert (config.model.path, config.name) == (text, text)


def test_lists_and_mappings_are_read_back():
    command = quoting.launch(
        [
            quoting.override("evaluation.texts", TEXTS),
            quoting.override("evaluation.limits", {"a b": 1, "c,d:e=f": 2, "[g]{h}(i)\\": 3}),
            quoting.override("method.alpha_grid", (0.1, 1e-05, 2)),
            quoting.override("data.path", Path("/a b")),
            quoting.override("fresh", True),
            quoting.override("bits", None),
            "method=smoothquant",
        ]
    )
    config = compose("config", read_back(command))
    assert list(config.evaluation.texts) == TEXTS
    assert dict(config.evaluation.limits) == {"a b": 1, "c,d:e=f": 2, "[g]{h}(i)\\": 3}
    assert list(config.method.alpha_grid) == [0.1, 1e-05, 2]
    assert (config.data.path, config.fresh, config.bits) == ("/a b", True, None)


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_one_value_in_a_sweep(text):
    [_, _, flag, word] = shlex.split(quoting.launch([quoting.override("name", text)], sweep=True))
    assert flag == "-m"
    [override] = OverridesParser.create().parse_overrides([word])
    assert not override.is_sweep_override()


def test_names_of_other_programs_are_quoted():
    command = quoting.module("q3q.trials", "--storage", "/a b/$c", "attach")
    assert shlex.split(command) == [
        *("python", "-m", "q3q.trials"),
        *("--storage", "/a b/$c", "attach"),
    ]
