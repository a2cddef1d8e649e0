"""Names of lm-eval's tasks, read off its files: its own index takes a quarter of a minute."""

import functools
import re
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

NAME = re.compile(r"""^[ -]*(?:task|group):[ ]*(["']?)([\w.+-]+)\1[ ]*$""", re.MULTILINE)


def is_mentioned(name: str, folders: Sequence[Path]) -> bool:
    """Return False if a name is in no task file, so that it can be no task's, group's or tag's."""
    word = re.compile(rf"(?<![\w-]){re.escape(name)}(?![\w-])")
    own = (text for folder in folders for text in _texts(folder))
    return any(map(word.search, own)) or any(map(word.search, _official()))


def task_names(folders: Sequence[Path]) -> list[str]:
    """Return the names of tasks and groups that the files of these folders and lm-eval's define."""
    texts = [*(text for folder in folders for text in _texts(folder)), *_official()]
    return list(dict.fromkeys(match[2] for text in texts for match in NAME.finditer(text)))


@functools.cache
def _official() -> tuple[str, ...]:
    package = find_spec("lm_eval")
    folders = package.submodule_search_locations if package is not None else None
    return tuple(text for folder in folders or () for text in _texts(Path(folder) / "tasks"))


def _texts(folder: Path) -> Iterator[str]:
    """Yield the texts of task files; some that others include have no suffix."""
    for path in folder.rglob("*yaml*"):
        if path.suffix in ("", ".yaml") and path.is_file():
            yield path.read_text(encoding="utf-8", errors="replace")
