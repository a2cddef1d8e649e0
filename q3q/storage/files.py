"""Write files so that a crash leaves the old content or the new, and seal facts with a checksum."""

import hashlib
import json
import os
import platform
from collections.abc import Iterable
from pathlib import Path

from q3q.spec import Json

SEAL = "sha256"  # of all else in a file, as canonical JSON


def write_atomically(path: Path, content: bytes | Iterable[bytes], *, wait: bool = True) -> None:
    """Write a file, or its parts one after the other, so that a crash at any moment leaves the old content or the new,
    never half of either.

    wait: until the disk has it. If not, a process that dies leaves no half either, but a machine may: for what carries
    a checksum and is seen to be on the disk later.
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
        partial.unlink(missing_ok=True)  # of a full disk it would take the last room
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def sealed(facts: Json, *, finite: bool = False) -> bytes:
    """As JSON that carries its own checksum, so that a flipped bit in a number is no other number.

    Raises:
        ValueError: a number is not finite, and they must be.
    """
    plain: Json = json.loads(
        json.dumps(facts, allow_nan=not finite)
    )  # as it will be read: tuples are lists
    return json.dumps({**plain, SEAL: _checksum(plain)}, indent=1).encode()


def unsealed(content: bytes) -> Json:
    """What `sealed` was given.

    Raises:
        ValueError: it is torn, or not what was written.
    """
    facts = json.loads(content)
    if not isinstance(facts, dict):
        raise ValueError("not what q3q writes")
    seal = facts.pop(SEAL, None)
    if seal is not None and seal != _checksum(facts):  # none: from before files were sealed
        raise ValueError("damaged: its checksum does not fit")
    return facts


def _checksum(facts: Json) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
