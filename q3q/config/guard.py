"""What the command line may not do: Hydra calls whatever a `_target_`, a log handler or a callback names, and reads
pages and pickles from wherever it is told. Values are set there; code comes from the checkout and installed packages.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, QuotedString

from q3q.config.schema import GROUPS, Config
from q3q.errors import ConfigError

# Settings of Hydra's own that hold a value and no more. Others choose what is imported, called, or loaded.
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
PLUGINS = ("hydra.launcher.", "hydra.sweeper.")  # knobs of the chosen plugins: plain values only
PAGES = "pages from elsewhere can name code to run, put yours into conf/"
REFUSED_FLAGS = {
    **dict.fromkeys(("--config-dir", "--config-path", "--config-name", "-cd", "-cp", "-cn"), PAGES),
    "--experimental-rerun": "it loads a pickle, which can run code; give the command again",
}
TEXTS = {field.name for field in fields(Config)} - {
    *GROUPS,
    "method",
}  # keys without a dot that choose no page
PAGE = re.compile(r"[\w+-]*")  # no path that could lead out of conf/


def refuse_code(arguments: Sequence[str]) -> None:
    """Refuse, before Hydra reads them, arguments that could make it run code of their choosing.

    Raises:
        ConfigError: one of them does. HydraException: one is not in Hydra's grammar.
    """
    for argument in arguments:
        flag = argument.partition("=")[0]
        for known, why in REFUSED_FLAGS.items():
            if _means(flag, known):
                raise ConfigError(f"{argument} is not taken: {why}")
    overrides = [
        one for one in arguments if not one.startswith("-") and ("=" in one or one.startswith("~"))
    ]
    for override in OverridesParser.create().parse_overrides(overrides):
        _refuse(override)


def _means(flag: str, known: str) -> bool:
    """As argparse sees it: any beginning of a long option is that option, a short one's value may follow at once."""
    if known.startswith("--"):
        return len(flag) > 2 and known.startswith(flag)
    return flag.startswith(known)


def _refuse(override: Override) -> None:
    key, said = override.get_key_element().lstrip("+~"), override.input_line
    path, _, package = key.partition("@")
    if any(part.startswith("_") for part in path.replace("/", ".").split(".")) or any(
        _underscored(override.value())
    ):
        raise ConfigError(
            f"{said} is not taken: names like _target_ would run code, and the command line sets values"
        )
    if package.split(":")[-1].split(".")[0] in ("hydra", "_global_"):
        raise ConfigError(
            f"{said} is not taken: no page can be put under {package} from the command line"
        )
    choices = _choices(override.value())
    if "." not in path and path not in TEXTS and not all(map(_page, choices)):
        raise ConfigError(f"{said} is not taken: {path} chooses a page of conf/ by its name")
    if path.replace("/", ".").split(".")[0] != "hydra" or path in HARMLESS:
        return
    if not path.startswith(PLUGINS):
        raise ConfigError(
            f"{said} is not taken: of Hydra's own settings, these can be given: {', '.join(HARMLESS)}"
        )
    if not all(map(_plain, choices)):
        raise ConfigError(f"{said} is not taken: give {path} a plain value")


def _choices(value: Any) -> list[Any]:
    return value.list if isinstance(value, ChoiceSweep) else [value]


def _page(value: Any) -> bool:
    text = value.text if isinstance(value, QuotedString) else value
    return not isinstance(text, str) or PAGE.fullmatch(text) is not None


def _plain(value: Any) -> bool:
    """A number, a word, nothing: no mapping or list to hold a `_target_`, no `${...}` that could become one."""
    text = value.text if isinstance(value, QuotedString) else value
    return isinstance(text, (str, int, float, bool, type(None))) and "${" not in str(text)


def _underscored(value: Any) -> Iterator[bool]:
    """Of every key of every mapping inside a value, whether it begins with an underscore."""
    if isinstance(value, ChoiceSweep):
        value = value.list
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield str(key.text if isinstance(key, QuotedString) else key).startswith("_")
            yield from _underscored(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _underscored(inner)
