"""What --help and --cfg say: every setting with its meaning, from where the setting is defined.

The meaning of a top-level setting, or of one of q3q's methods' own, is the comment on it in conf/;
that of a group's setting, or of another package's method's, is its line in the docstring of its
dataclass.
"""

import inspect
import io
import re
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path

from omegaconf import OmegaConf

from q3q.config.known import methods
from q3q.config.pages import CHOICES, CONF, pages
from q3q.config.schema import GROUPS
from q3q.config.words import split

WIDTH, COLUMN = 100, 34
HEADER = """\
q3q studies post-training quantization of language models: Qwen, Llama, Mistral.

  python launch.py method=gptq bits=4                   one trial, in this process
  python launch.py -m method=rtn,gptq,awq bits=2,3,4    a sweep: every combination, in parallel
  python launch.py -m +study=demo                       a saved study
  python launch.py -m ... plan=true                     what would run, where and for how long
"""
FOOTER = """\
method.* are the settings of the chosen method: `python launch.py method=gptq --cfg job` shows
those of GPTQ. In a sweep of several methods, method.gptq.damping=0.05 sets one of GPTQ's alone.
Results: the table at the end of a sweep, mlruns/reports/, and the MLflow UI (make ui).
Tab completion: eval "$(python launch.py -sc install=bash)"
"""


def shows_settings(arguments: Sequence[str], main: Callable[[], object]) -> bool:
    """Print what --help or --cfg asks for; return False if the arguments ask for neither.

    Args:
        main: Hydra's, which reads `sys.argv` and prints the composed settings as YAML.
    """
    line = split(arguments)
    if line.has("--help", "-h"):
        sys.argv[1:] = ["--cfg", "job", *line.words]
        print(_help(_printed(main)))
    elif line.has("--cfg", "-c"):
        print(commented(_printed(main)), end="")
    else:
        return False
    return True


def _printed(main: Callable[[], object]) -> str:
    with redirect_stdout(io.StringIO()) as printed:
        main()
    return printed.getvalue()


def _help(settings: str) -> str:
    parts = [HEADER, "== Choices (GROUP=NAME; several with -m: GROUP=NAME,NAME) ==\n"]
    for group in CHOICES:
        parts.append(f"{'+' if group == 'study' else ''}{group}=")
        parts += [_beside(f"  {name}", about, "") for name, about in pages(group).items()]
    parts.append(
        "\n== Settings (KEY=VALUE, with dots between: model.path=DIR; several with -m) ==\n"
    )
    return "\n".join([*parts, commented(settings), FOOTER])


def commented(settings: str) -> str:
    """Return composed settings, as Hydra prints them, with each one's meaning as a comment.

    Args:
        settings: YAML; a first line `# @package GROUP` says where in the config it lies.
    """
    package = re.match(r"# @package (\S+)\n", settings)
    above = package[1].split(".") if package else []
    config = OmegaConf.create(settings)
    chosen = OmegaConf.select(config, "name" if above == ["method"] else "method.name")
    meaning_of = meanings(None if chosen is None else str(chosen))
    lines = []
    for keys, line in _lines(settings):
        meaning = meaning_of.get(".".join([*above, *keys])) if keys else None
        lines.append(_beside(line, meaning, "# ") if meaning else line)
    return "\n".join(lines) + "\n"


def meanings(method: str | None) -> dict[str, str]:
    """Return what each setting means, by its full name, with a method's own settings."""
    meaning_of = comments_in(CONF / "config.yaml")
    for group, kind in GROUPS.items():
        meaning_of |= {f"{group}.{key}": text for key, text in entries_of(kind).items()}
    if method is not None:
        page = CONF / "method" / f"{method}.yaml"
        own = comments_in(page) if page.is_file() else entries_of(methods()[method])
        meaning_of |= {f"method.{key}": text for key, text in own.items()}
        meaning_of["method.name"] = "chosen by method="
    return meaning_of


def comments_in(page: Path) -> dict[str, str]:
    """Return the comment on each key of a page: the lines right above it, and the rest of its line.

    A blank line ends a comment that belongs to no key.
    """
    comments: dict[str, str] = {}
    above: list[str] = []
    for keys, line in _lines(page.read_text(encoding="utf-8")):
        if not keys:
            above = [*above, line.strip()[1:].strip()] if line.strip().startswith("#") else []
            continue
        _, mark, beside = line.partition(" #")
        words = " ".join([*above, beside.strip()] if mark else above)
        if words:
            comments[".".join(keys)] = words
        above = []
    return comments


def entries_of(kind: type) -> dict[str, str]:
    """Return the lines `key, key: meaning` of a docstring, by key."""
    entries: dict[str, str] = {}
    names: list[str] = []
    for line in (inspect.getdoc(kind) or "").splitlines():
        entry = re.match(r"(\w+(?:, \w+)*): (.+)", line)
        if entry:
            names = entry[1].split(", ")
            entries |= dict.fromkeys(names, entry[2])
        elif line.startswith(" ") and names:
            entries |= {name: f"{entries[name]} {line.strip()}" for name in names}
        else:
            names = []
    return entries


def _lines(text: str) -> Iterator[tuple[list[str], str]]:
    """Yield each line of a YAML text, with the keys that lead to it; none for other lines."""
    keys: list[str] = []
    for line in text.splitlines():
        match = re.match(r"((?:  )*)([A-Za-z_]\w*):(?: |$)", line)
        if match is None:
            yield [], line
            continue
        keys = [*keys[: len(match[1]) // 2], match[2]]
        yield keys, line


def _beside(left: str, words: str, mark: str) -> str:
    """Put words beside a line, wrapped in a column of their own."""
    indent = max(COLUMN, len(left) + 2)
    wrapped = textwrap.wrap(words, max(40, WIDTH - indent - len(mark))) or [""]
    rest = (f"{' ' * indent}{mark}{line}" for line in wrapped[1:])
    return "\n".join([f"{left.ljust(indent)}{mark}{wrapped[0]}".rstrip(), *rest])
