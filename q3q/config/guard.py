"""A guard that keeps command-line overrides from running code.

Hydra calls whatever a `_target_`, a log handler or a callback names, and reads config files and
pickles from any path. The command line may set values only; code comes from the checkout and
installed packages.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, Override, QuotedString

from q3q.config.known import not_a_setting
from q3q.config.pages import CONF
from q3q.config.schema import GROUPS, Config
from q3q.errors import ConfigError

# Hydra settings that merely hold a value. All others choose what is imported, called or loaded.
HARMLESS = (
    "hydra.run.dir",
    "hydra.sweep.dir",
    "hydra.sweep.subdir",
    "hydra.verbose",
    "hydra.mode",
    "hydra.job.name",
    "hydra.output_subdir",
    "hydra/launcher",
    "hydra/sweeper",
)
PLUGINS = ("hydra.launcher.", "hydra.sweeper.")  # settings of the chosen plugins: plain values only
PAGES = "a page from elsewhere can name code to run. Put your page into conf/"
REFUSED_FLAGS = {
    **dict.fromkeys(("--config-dir", "--config-path", "--config-name", "-cd", "-cp", "-cn"), PAGES),
    "--experimental-rerun": "it loads a pickle, which can run code. Type the command again instead",
}
TEXTS = {field.name for field in fields(Config)} - {*GROUPS, "method"}  # keys that choose no page
PAGE = re.compile(r"[\w+-]+")  # not a path, which could lead out of conf/
# Keys whose values a sweeper reads as overrides in turn.
SWEPT = re.compile(r"hydra\.sweeper\.(?:params|rows\.\d+)\.(.+)")


def refuse_code(arguments: Sequence[str]) -> None:
    """Refuse arguments that could make Hydra run arbitrary code, before Hydra reads them.

    Raises:
        ConfigError: an argument could.
        HydraException: an argument is not in Hydra's grammar.
    """
    for argument in arguments:
        flag = argument.partition("=")[0]
        for option, reason in REFUSED_FLAGS.items():
            if abbreviates(flag, option):
                raise ConfigError(f"{argument} is not accepted: {reason}")
    overrides = [
        argument
        for argument in arguments
        if not argument.startswith("-") and ("=" in argument or argument.startswith("~"))
    ]
    for override in OverridesParser.create().parse_overrides(overrides):
        _refuse(override)


def abbreviates(flag: str, option: str) -> bool:
    """Return True if argparse takes `flag` for `option`.

    It accepts any prefix of a long option, and a value right after a short one.
    """
    if option.startswith("--"):
        return len(flag) > 2 and option.startswith(flag)
    return flag.startswith(option)


def _refuse(override: Override, shown: str | None = None) -> None:
    """Refuse an override that could run code.

    Args:
        given: the words to name in the message, if the override is part of another.
    """
    shown = shown or str(override.input_line)
    refusal = f"{shown} is not accepted"
    path, at, package = override.get_key_element().lstrip("+~").partition("@")
    parts, value = path.replace("/", ".").split("."), override.value()
    if any(part.startswith("_") for part in parts) or any(_underscored(value)):
        raise ConfigError(
            f"{refusal}: a name like _target_ would run code, and the command line may only set "
            "values"
        )
    if at:
        raise ConfigError(f"{refusal}: the command line cannot place a page under {package}")
    choices = value.list if isinstance(value, ChoiceSweep) else [value]
    deletes = override.is_delete() and value is None
    if "." not in path and path not in TEXTS and not deletes and not all(map(_is_page, choices)):
        raise ConfigError(f"{refusal}: {_no_page(path, value)}")
    if parts[0] != "hydra" or path in HARMLESS:
        return
    if not path.startswith(PLUGINS):
        raise ConfigError(
            f"{refusal}: the only settings of Hydra itself that can be set here are "
            f"{', '.join(HARMLESS)}"
        )
    if not all(map(_is_plain, choices)):
        raise ConfigError(f"{refusal}: give {path} a plain value")
    if swept := SWEPT.fullmatch(path):
        for choice in choices:
            text = choice.text if isinstance(choice, QuotedString) else choice
            _refuse(OverridesParser.create().parse_override(f"{swept[1]}={text}"), shown)


def _no_page(path: str, value: Any) -> str:
    """Return a line on what a key takes, for a value that is no page's name."""
    if path not in GROUPS and "/" not in path and not (CONF / path).is_dir():
        return not_a_setting(path)
    apart = f". To change single settings, use {path}.KEY=VALUE"
    return (
        f"{path} chooses a page of conf/ by its name: one name or, with -m, several separated by "
        f"commas{apart if isinstance(value, Mapping) else ''}"
    )


def _is_page(value: Any) -> bool:
    """Return True for a page's name, or a pattern of the names that are in conf/."""
    text = value.text if isinstance(value, QuotedString) else value
    return isinstance(text, Glob) or (isinstance(text, str) and PAGE.fullmatch(text) is not None)


def _is_plain(value: Any) -> bool:
    """Return True for a scalar without `${...}`: nothing that can hold or become a `_target_`."""
    text = value.text if isinstance(value, QuotedString) else value
    return isinstance(text, (str, int, float, bool, type(None))) and "${" not in str(text)


def _underscored(value: Any) -> Iterator[bool]:
    """Yield, for each key of each mapping inside a value, True if it begins with an underscore."""
    if isinstance(value, ChoiceSweep):
        value = value.list
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key.text if isinstance(key, QuotedString) else key).startswith("_")
            yield from _underscored(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _underscored(inner)
