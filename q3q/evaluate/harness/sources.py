"""Find the files that make a user's tasks: included task files, prompts, code and its imports."""

import ast
import importlib.util
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lm_eval.tasks._yaml_loader import load_yaml

import q3q
from q3q.evaluate.harness.task_files import OFFICIAL

# Their versions are in the spec, or in the record as installed packages.
_PLACES = ("stdlib", "platstdlib", "purelib", "platlib")
INSTALLED = tuple(
    {
        OFFICIAL.parent,
        Path(q3q.__file__).parent,
        *(
            Path(sysconfig.get_path(name))
            for name in ("stdlib", "platstdlib", "purelib", "platlib")
        ),
    }
)


def source_files(include: Path) -> set[Path]:
    """Return all task files and Python files that the folder's task files consist of.

    These are the folder's task files, what they include, their prompt files, the modules of their
    `!function`s, and what these import, wherever that lies; without what is installed. A file that
    cannot be found or read is left out: whoever loads the task refuses it.
    """
    files: set[Path] = set()
    new = {path.resolve() for path in include.rglob("*.yaml")}
    while new:
        path = new.pop()
        files.add(path)
        read = _imported if path.suffix == ".py" else _named
        new |= {other for other in read(path) if other not in files and _is_the_users(other)}
    return files


def _is_the_users(path: Path) -> bool:
    return path.is_file() and not any(path.is_relative_to(folder) for folder in INSTALLED)


def _named(path: Path) -> Iterator[Path]:
    """Yield the files that a task file names."""
    try:
        content = load_yaml(path, resolve_func=False, recursive=False)
    except Exception:  # YAML's, or the system's
        return
    includes = content.get("include") or []
    for name in [includes] if isinstance(includes, str) else includes:
        yield (path.parent / str(name)).resolve()
    for text in _texts(content):
        head = text.partition(":")[0]
        if head.endswith((".yaml", ".yml")):  # a prompt: FILE.yaml:NAME
            yield from (Path(head).resolve(), (path.parent / head).resolve())
        # lm-eval reads `!function utils.name` as the task file's folder and `utils.name`.
        place, _, function = text.rpartition("/")
        module = function.rpartition(".")[0]
        if place == str(path.parent) and module:
            beside = path.parent / f"{module.replace('.', '/')}.py"
            yield from (
                [beside.resolve()] if beside.is_file() else _module_files(module, path.parent)
            )


def _texts(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, dict):
        for value in content.values():
            yield from _texts(value)
    elif isinstance(content, list):
        for value in content:
            yield from _texts(value)


def _imported(path: Path) -> Iterator[Path]:
    """Yield the files of what a Python file imports."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _module_files(alias.name, path.parent)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for name in (node.module, *(f"{node.module}.{alias.name}" for alias in node.names)):
                yield from _module_files(name, path.parent)


def _module_files(module: str, folder: Path) -> Iterator[Path]:
    """Yield the file of a module that lies in this folder or can be imported."""
    beside = folder / module.replace(".", "/")
    yield from (path.resolve() for path in (beside.with_suffix(".py"), beside / "__init__.py"))
    try:
        spec = importlib.util.find_spec(module)
    except (ImportError, AttributeError, ValueError):
        return
    if spec is not None and spec.origin not in (None, "built-in", "frozen"):
        yield Path(str(spec.origin)).resolve()
