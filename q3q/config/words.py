"""Tell a command line's flags from its settings, and find settings that the shell tore apart."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from q3q import quoting
from q3q.config.guard import REFUSED_FLAGS, abbreviates
from q3q.config.known import takes_text, type_of
from q3q.config.pages import CHOICES, pages
from q3q.errors import ConfigError

ALONE = (
    *("--help", "-h", "--hydra-help", "--version", "--resolve", "--run", "-r"),
    *("--multirun", "-m", "--shell-completion", "-sc"),
)
WITH_VALUE = ("--cfg", "-c", "--package", "-p", "--info", "-i")
OVERRIDE = re.compile(r"[+~]*[\w./@:$-]+=|~")


@dataclass
class Line:
    """A command line: Hydra's flags, with their values, and all other words."""

    flags: list[str] = field(default_factory=list)
    words: list[str] = field(default_factory=list)

    @property
    def sweeps(self) -> bool:
        asked = self.has("--multirun", "-m")
        return asked or any(word.lower() == "hydra.mode=multirun" for word in self.words)

    def has(self, *options: str) -> bool:
        return any(_stands_for(flag, options) for flag in self.flags)


def split(arguments: Sequence[str]) -> Line:
    """Tell flags from words, wherever they stand.

    Raises:
        ConfigError: an unknown flag.
    """
    line, rest = Line(), list(arguments)
    while rest:
        argument = rest.pop(0)
        if argument == "--":
            line.words += rest
            break
        if not argument.startswith("-"):
            line.words.append(argument)
            continue
        line.flags.append(argument)
        flag, equals, _ = argument.partition("=")
        if _stands_for(flag, WITH_VALUE):
            glued = equals or (not argument.startswith("--") and len(flag) > 2)
            if not glued and rest and not rest[0].startswith("-") and "=" not in rest[0]:
                line.flags.append(rest.pop(0))
        elif not _stands_for(flag, ALONE) and not any(
            abbreviates(flag, option) for option in REFUSED_FLAGS
        ):
            raise ConfigError(_unknown_flag(argument, rest))
    return line


def refuse_torn(line: Line) -> None:
    """Refuse settings that the shell split at spaces, and print the command with whole ones.

    Raises:
        ConfigError: a word is not a setting.
    """
    whole: list[str] = []
    torn = False
    for number, word in enumerate(line.words):
        last = whole[-1] if whole else ""
        after = line.words[number + 1] if number + 1 < len(line.words) else ""
        if OVERRIDE.match(word) and not _is_open(last):
            whole.append(word)
        elif whole and (_is_open(last) or "=" not in last or last[-1:] in ",=" or _joins(word)):
            whole[-1], torn = last + word, True
        elif whole and takes_text(_key(last)):
            whole[-1], torn = f"{last} {word}", True
        elif after.startswith("="):
            whole.append(word)
        else:
            raise ConfigError(_no_setting(word))
    if torn or any(word.endswith(",") and not takes_text(_key(word)) for word in whole):
        repaired = [_whole(word) for word in whole]
        raise ConfigError(
            "the shell splits arguments at spaces. Write each setting without spaces, or put it in "
            "quotes: "
            f"{quoting.launch(repaired, line.sweeps)}"
        )
    if whole and _is_open(whole[-1]):
        raise ConfigError(f"{whole[-1]}: a bracket is never closed")


def _stands_for(flag: str, options: Sequence[str]) -> bool:
    """Return True if argparse takes the flag for one of these options, or for a prefix of one."""
    flag = flag.partition("=")[0]
    for option in options:
        long = option.startswith("--")
        if flag == option or (long and len(flag) > 2 and option.startswith(flag)):
            return True
        glued = option in WITH_VALUE and not long and flag.startswith(option)
        if glued and not any(abbreviates(flag, refused) for refused in REFUSED_FLAGS):
            return True
    return False


def _unknown_flag(argument: str, rest: Sequence[str]) -> str:
    key, _, value = argument.lstrip("-").partition("=")
    key = key.replace("-", "_")
    follows = rest[0] if rest and "=" not in rest[0] and not rest[0].startswith("-") else "VALUE"
    if key not in CHOICES and type_of(key) is None:
        return (
            f"{argument} is not a flag. The flags are -m, --cfg job, --help and --version; "
            "settings are written KEY=VALUE. See python launch.py --help"
        )
    value = value or ("true" if type_of(key) is bool else follows)
    instead = quoting.launch([f"{key}={value}"])
    return f"{argument} is not a flag; settings are written without dashes: {instead}"


def _key(word: str) -> str:
    return word.partition("=")[0]


def _joins(word: str) -> bool:
    return word[:1] in (",", "]", "}", "=")


def _whole(word: str) -> str:
    """Return a word without a comma at its end; a text with a space in quotes."""
    key, _, value = word.partition("=")
    if not takes_text(key):
        return word.rstrip(",")
    return quoting.override(key, value) if " " in value and value[0] not in "\"'" else word


def _is_open(word: str) -> bool:
    """Return True if brackets of a word's value are not closed yet."""
    key, _, value = word.partition("=")
    if takes_text(key):
        return False
    value = re.sub(r"\\.|'[^']*'|\"[^\"]*\"", "", value)
    return any(value.count(left) > value.count(right) for left, right in ("[]", "{}", "()"))


def _no_setting(word: str) -> str:
    group = next((group for group in CHOICES if word in pages(group)), None)
    if group == "study":
        instead = f"run {quoting.launch([f'+study={word}'], sweep=True)}"
    elif group is not None:
        instead = f"did you mean {group}={word}?"
    else:
        instead = "write KEY=VALUE. See python launch.py --help"
    return f"{word} is not a setting: {instead}"
