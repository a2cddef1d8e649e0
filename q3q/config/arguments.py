"""Read a command line as it was meant: rewrite what has one meaning, answer what has none.

Hydra reads the arguments that `understood` returns, after `guard` has looked at them.
"""

import re
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override
from hydra.errors import HydraException

from q3q import quoting
from q3q.config.known import (
    knobs,
    methods,
    not_a_setting,
    of_methods,
    owners,
    takes_list,
    takes_text,
)
from q3q.config.pages import default_page, page_of
from q3q.config.schema import with_plain_keys
from q3q.config.words import Line, refuse_torn, split
from q3q.errors import ConfigError

SHOWING = ("--cfg", "-c", "--help", "-h", "--info", "-i")  # they show one job and run nothing
JUDGE = "judge"  # the page of conf/model for published checkpoints
PROSE = ("question", "expectation")  # of the whole sweep, so a comma is a comma
# A method's setting, of whichever method is chosen or of one of a sweep's.
KNOB = re.compile(r"\+*method\.(?:(?P<method>\w+)\.)?(?P<knob>\w+)")
HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def understood(arguments: Sequence[str]) -> list[str]:
    """Return the arguments in Hydra's words.

    Raises:
        ConfigError: they cannot have been meant so; the line says what to type instead.
    """
    line = split(arguments)
    if line.has("--hydra-help", "--shell-completion", "-sc"):
        return list(arguments)
    refuse_torn(line)
    words = [re.sub(r"^budget=", "budget.bytes=", word) for word in line.words]
    words = [_in_hydras_grammar(word) for word in words]
    words = [part for word in words for part in _model(word, line.sweeps)]
    words += _nothing_quantized(words)
    words = [_listed(word) for word in words]
    _refuse_studies(words)
    if line.sweeps:
        words = _knobs_of_methods(words)
    else:
        _refuse_many(words, line)
        words = [_own_knob(word, words) for word in words]
    return [*line.flags, *words]


def as_typed(arguments: Sequence[str]) -> list[str]:
    """Return a sweep's overrides without the `choice()` that `understood` put around some."""
    return [
        re.sub(r"=choice\((.*)\)$", r"=\1", argument) if KNOB.match(argument) else argument
        for argument in arguments
    ]


def _parsed(word: str) -> Override | None:
    try:
        return OverridesParser.create().parse_override(word)
    except HydraException:
        return None


def _in_hydras_grammar(word: str) -> str:
    """Quote a text that Hydra's grammar does not take as it is, and add the plus of `+study`."""
    word = with_plain_keys(word)
    key, _, value = word.partition("=")
    if key == "study":
        return f"+{word}"
    if takes_text(key) and value:
        override = _parsed(word)
        if override is None or (key in PROSE and override.is_sweep_override()):
            return quoting.override(key, value)
    return word


def _model(word: str, sweeps: bool) -> list[str]:
    """Take the Hub's name of a model for its page, or for a model without a page.

    Raises:
        ConfigError: a sweep has several models, and only some have a page.
    """
    key, _, value = word.partition("=")
    if key != "model" or not any(map(HUB_NAME.fullmatch, value.split(","))):
        return [word]
    names = [page_of(name) or name for name in value.split(",")]
    others = [name for name in names if HUB_NAME.fullmatch(name)]
    if not others:
        return [f"model={','.join(names)}"]
    without_page = ["model=hub", f"model.source={','.join(others)}"]
    if len(others) == len(names):
        return without_page
    raise ConfigError(
        f"{word}: conf/model has no page for {', '.join(others)}, so a separate sweep is needed: "
        f"{quoting.launch(without_page, sweeps)}"
    )


def _nothing_quantized(words: Sequence[str]) -> list[str]:
    """Leave checkpoints that are judged as they are, where no method is named."""
    keys = {word.partition("=")[0].lstrip("+") for word in words}
    judged = f"model={JUDGE}" in words and not keys & {"method", "study"}
    return ["method=none"] if judged else []


def _listed(word: str) -> str:
    """Take a single value, or a mapping, for a list of one, where a setting takes a list.

    Raises:
        ConfigError: it names a part of a list.
    """
    override = _parsed(word)
    if override is not None and takes_list(override.key_or_group.rpartition(".")[0]):
        raise ConfigError(not_a_setting(override.key_or_group))
    if override is None or override.is_delete() or not takes_list(override.key_or_group):
        return word
    key, _, typed = word.partition("=")
    value = override.value()
    if isinstance(value, ChoiceSweep):
        if not value.simple_form or any(isinstance(choice, list) for choice in value.list):
            return word
        return f"{key}={','.join(f'[{choice}]' for choice in override.sweep_string_iterator())}"
    return (
        f"{key}=[{typed}]"
        if isinstance(value, str | int | float | dict) and "${" not in typed
        else word
    )


def _refuse_studies(words: Sequence[str]) -> None:
    """Refuse several saved studies in one sweep."""
    for word in words:
        key, _, value = word.partition("=")
        if key == "+study" and "," in value:
            studies = (quoting.launch([f"{key}={name}"], sweep=True) for name in value.split(","))
            raise ConfigError(f"run one study at a time: {', then '.join(studies)}")


def _refuse_many(words: Sequence[str], line: Line) -> None:
    """Refuse several values without -m.

    Raises:
        ConfigError: a setting has several.
    """
    for word in words:
        override = _parsed(word)
        if override is None or not override.is_sweep_override():
            continue
        key, _, value = word.partition("=")
        if line.has(*SHOWING):
            raise ConfigError(
                f"{word}: this shows a single job, so {key.lstrip('+')} can have only one value"
            )
        sweep = quoting.launch(line.words, sweep=True)
        typed = next((argument for argument in line.words if argument.startswith(f"{key}=")), word)

        def instead(setting: str, word: str = word) -> str:
            return quoting.launch([setting if argument == word else argument for argument in words])

        if takes_list(override.key_or_group) and "[" not in typed:
            values = typed.partition("=")[2]
            raise ConfigError(
                f"{typed} can mean two things. For one trial with all of these values: "
                f"{instead(f'{key}=[{values}]')}; for one trial per value: {sweep}"
            )
        comma = f"; if the comma is part of the text: {instead(quoting.override(key, value))}"
        raise ConfigError(f"several values need -m: {sweep}{comma if takes_text(key) else ''}")


def _own_knob(word: str, words: Sequence[str]) -> str:
    """Write `method.gptq.damping` as `method.damping`, for a single trial of GPTQ.

    Raises:
        ConfigError: the trial is of another method.
    """
    key, _, value = word.partition("=")
    knob = KNOB.fullmatch(key)
    if knob is None or knob["method"] not in methods():
        return word
    methods_typed = (
        argument.partition("=")[2] for argument in words if argument.startswith("method=")
    )
    chosen = next(methods_typed, default_page("method"))
    if chosen != knob["method"]:
        raise ConfigError(
            f"{word} is a setting of {knob['method']}, but this trial uses method={chosen}: leave "
            f"it out, or use method={knob['method']}"
        )
    return f"method.{knob['knob']}={value}"


def _knobs_of_methods(words: Sequence[str]) -> list[str]:
    """Leave the settings of a sweep's methods to the sweeper, which gives each to its own jobs.

    Hydra applies a setting with one value before the sweeper has chosen a method, so it becomes a
    sweep over one value.

    Raises:
        ConfigError: a method of the sweep does not have the setting.
    """
    selection = next((word for word in words if re.match(r"\+*method=", word)), "")
    chosen = _parsed(selection) if selection else None
    swept = _methods_of(chosen)
    varies = len(swept) != 1 if chosen else any(word.startswith("+study=") for word in words)
    marked = []
    for word in words:
        key, _, value = word.partition("=")
        knob, override = KNOB.fullmatch(key), _parsed(word)
        if knob is None or override is None or override.is_delete():
            marked.append(word)
            continue
        of_one, of_all = knob["method"] in methods(), knob["method"] is None
        if of_all and len(swept) > 1 and methods().keys() >= set(swept):
            _refuse_foreign(word, knob["knob"], swept)
        later = (of_one or (of_all and varies)) and not override.is_sweep_override()
        marked.append(f"{key}=choice({value})" if later else word)
    return marked


def _methods_of(chosen: Override | None) -> list[str]:
    """Return the methods that a `method=` names; none for a pattern of names."""
    if chosen is None:
        return []
    value = chosen.value()
    if isinstance(value, ChoiceSweep):
        return [name.strip("'\"") for name in chosen.sweep_string_iterator()]
    return [value] if isinstance(value, str) else []


def _refuse_foreign(word: str, knob: str, swept: Sequence[str]) -> None:
    """Refuse a setting that only some of a sweep's methods have, or none."""
    having = [name for name in swept if knob in knobs(name)]
    if len(having) == len(swept):
        return
    if not having:
        elsewhere = owners(knob)
        foreign = f"{word}: {of_methods(knob, elsewhere)}, not of {', '.join(swept)}"
        raise ConfigError(foreign if elsewhere else not_a_setting(f"method.{knob}", swept[0]))
    value = word.partition("=")[2]
    instead = " ".join(f"method.{name}.{knob}={value}" for name in having)
    others = " and ".join(name for name in swept if name not in having)
    raise ConfigError(f"{word}: {of_methods(knob, having)}, not of {others}: use {instead}")
