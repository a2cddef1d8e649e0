"""Write files so that a crash leaves the old content or the new; seal facts; name sizes."""

import json
import os
import platform
from collections.abc import Iterable
from pathlib import Path

from q3q.spec import Json, digest

SEAL = "sha256"  # of all else in a file, as canonical JSON


def write_atomically(path: Path, content: bytes | Iterable[bytes], *, wait: bool = True) -> None:
    """Write a file, or its parts one by one; a crash leaves the old content or the new.

    Args:
        wait: wait until the disk has it. Without, a machine that dies may leave half a file, which
            is for content that carries a checksum and is checked later.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            for part in [content] if isinstance(content, bytes) else content:
                file.write(part)
            file.flush()
            if wait:
                os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)  # it would take a full disk's last room
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def sealed(facts: Json, *, finite: bool = False) -> bytes:
    """Return JSON that carries its own checksum, so that a flipped bit cannot pass for a number.

    Raises:
        ValueError: a number is not finite although `finite` asks for it.
    """
    # As it will be read: tuples are lists.
    plain: Json = json.loads(json.dumps(facts, allow_nan=not finite))
    return json.dumps({**plain, SEAL: digest(plain, spaced=True)}, indent=1).encode()


def unsealed(content: bytes) -> Json:
    """Return what `sealed` received.

    Raises:
        ValueError: the content is torn, or not what was written.
    """
    facts = json.loads(content)
    if not isinstance(facts, dict):
        raise ValueError("not what q3q writes")
    seal = facts.pop(SEAL, None)
    if seal is not None and seal != digest(facts, spaced=True):  # old files have none
        raise ValueError("damaged: its checksum does not fit")
    return facts


def in_words(count: float) -> str:
    """Return `512 B`, `1.5 KB`, `203 MB`."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
