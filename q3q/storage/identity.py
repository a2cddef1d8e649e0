"""A storage's own id, by which a tracker that several storages share tells their runs apart."""

import os
import secrets
from contextlib import suppress
from functools import partial
from pathlib import Path

from q3q.errors import UNREADABLE
from q3q.storage.aside import put_aside
from q3q.storage.files import sealed, unsealed, write_atomically
from q3q.storage.mirror import Mirror, mirror_at
from q3q.storage.stores import with_retries

NAME = "storage.json"


def storage_id(storage: str) -> str:
    """Return the random id of a storage, a folder or a URL; make it the first time.

    It moves along with the folder. A copy beside the original gets an id of its own, since both
    may run other trials from then on.
    """
    mirror = mirror_at(storage)
    return _of_folder(Path(storage).absolute()) if mirror is None else _of_store(mirror)


def _of_store(mirror: Mirror) -> str:
    content = sealed({"id": secrets.token_hex(8)})
    if not with_retries(mirror.url, partial(mirror.store.create, NAME, content)):
        content = with_retries(mirror.url, partial(mirror.store.read, NAME))
    return str(unsealed(content)["id"])


def _of_folder(folder: Path) -> str:
    path = folder / NAME
    identity = _read(path)
    if identity is None:
        identity = _make(path)
    own, place = identity
    if place != str(folder):
        if _is_copy(path, own, Path(place)):
            own = secrets.token_hex(8)
        _write(path, own)
    return own


def _make(path: Path) -> tuple[str, str]:
    """Write a new id, unless another process was quicker: then return its id."""
    own = secrets.token_hex(8), str(path.parent)
    if os.path.lexists(path) and _read(path) is None:
        put_aside(path, "is damaged")
    draft = path.with_name(f".{NAME}.{secrets.token_hex(8)}")
    _write(draft, own[0])
    try:
        with suppress(FileExistsError):
            os.link(draft, path)
    finally:
        draft.unlink(missing_ok=True)
    return _read(path) or own


def _is_copy(path: Path, own: str, original: Path) -> bool:
    """Return True if the folder where the id was made still has it, and is another folder."""
    theirs = original / NAME
    identity = _read(theirs)
    with suppress(OSError):
        return identity is not None and identity[0] == own and not theirs.samefile(path)
    return False


def _write(path: Path, own: str) -> None:
    write_atomically(path, sealed({"id": own, "folder": str(path.parent)}))


def _read(path: Path) -> tuple[str, str] | None:
    """Return the id and the folder where it was written; None if there is no such file."""
    with suppress(*UNREADABLE):
        facts = unsealed(path.read_bytes())
        return str(facts["id"]), str(facts["folder"])
    return None
