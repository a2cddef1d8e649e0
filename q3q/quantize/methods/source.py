"""Digests of methods' source code: has the code that made a record changed since? Without torch.

The digest is in the record, not in a trial's id: `version` and the package's version are what makes
another trial. While a method is written, people forget to raise it.
"""

import ast
import hashlib
import platform
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from q3q.canonical import sha256
from q3q.environment import packages
from q3q.errors import ConfigError
from q3q.quantize.methods.registry import settings_of
from q3q.record import TrialRecord
from q3q.spec import Json, MethodRef

# A package's other code, which is compared byte by byte.
NATIVE = (".c", ".cc", ".cpp", ".cu", ".cuh", ".h", ".hpp")
DIGEST = "digest"


def source_of(method: MethodRef) -> Json | None:
    """Return a digest of a method's code and whose code it is; None if there is none to see.

    Of an installed package all modules count, of q3q's own methods the method's module: whoever
    changes what lies below raises `version`. Comments, docstrings and layout do not count. The
    Python and, for q3q's own, the q3q that read the code are named, as another one may read the
    same code as something else, and a release may rewrite it.
    """
    try:
        settings = settings_of(method)
    except ConfigError:
        return None
    module = settings.implementation.partition(":")[0]
    if not module:
        return None
    python = ".".join(platform.python_version_tuple()[:2])
    if method.package is None:
        origin = {"of": module, "python": python, "q3q": packages().get("q3q")}
        digest = _digest_of((module,))
    else:
        tops = sorted({name.partition(".")[0] for name in (module, type(settings).__module__)})
        origin = {"of": "+".join(tops), "python": python}
        digest = _digest_of(tuple(tops))
    return None if digest is None else {**origin, DIGEST: digest}


def differ(recorded: Any, now: Json | None) -> bool:
    """Return True if two of `source_of` are of one method's code before and after a change.

    False where that cannot be told: an old record, another Python, a missing package.
    """
    if now is None or not isinstance(recorded, Mapping):
        return False
    one, other = (
        {key: fact for key, fact in of.items() if key != DIGEST} for of in (recorded, now)
    )
    return one == other and recorded.get(DIGEST) != now[DIGEST]


def code_changes(records: Iterable[TrialRecord]) -> list[str]:
    """Return a line for each method whose code is not the one that made these finished trials."""
    names: dict[str, list[str]] = {}
    for record in records:
        method = record.spec.method
        if differ(record.environment.get("method_source"), source_of(method)):
            names.setdefault(method.name, []).append(record.spec.name)
    return [
        f"method={method}: its code changed since {len(trials)} "
        f"trial{'s were' if len(trials) > 1 else ' was'} finished, {trials[0]}"
        f"{' and others' if len(trials) > 1 else ''} (raise version, or fresh=true)"
        for method, trials in names.items()
    ]


@cache
def _digest_of(names: tuple[str, ...]) -> str | None:
    """Return one digest of the source of modules and packages; None if no file is found."""
    sha, count = hashlib.sha256(), 0
    for name in names:
        for place, file in _files_of(name):
            try:
                content = file.read_bytes()
            except OSError:
                continue
            sha.update(f"{place} {sha256(_meaning(file, content))}\n".encode())
            count += 1
    return sha.hexdigest() if count else None


def _files_of(name: str) -> Iterator[tuple[str, Path]]:
    """Yield a module's file, or all of a package's, each with its place in it."""
    try:
        spec = find_spec(name)
    except (ImportError, ValueError):
        return
    if spec is None:
        return
    for folder in map(Path, spec.submodule_search_locations or ()):
        for file in sorted(folder.rglob("*")):
            if file.suffix in (".py", *NATIVE) and file.is_file():
                yield f"{name}/{file.relative_to(folder).as_posix()}", file
    if spec.submodule_search_locations is None and spec.origin:
        yield name, Path(spec.origin)


def _meaning(file: Path, content: bytes) -> bytes:
    """Return what Python reads, without docstrings; of another file, or broken code, the bytes."""
    if file.suffix != ".py":
        return content
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError):
        return content
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            match node.body:
                case [ast.Expr(value=ast.Constant(value=str())), *rest]:
                    node.body = rest
    return ast.dump(tree).encode()
