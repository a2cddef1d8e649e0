"""An evaluation's scores so far, on disk, so that a killed evaluation can continue."""

import hashlib
import json
import math
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from q3q.storage.aside import clear_for_file, put_aside
from q3q.storage.files import make_folder

# All requests of an evaluation share a file, so a request of two tasks is scored once.
SCORES = "scores.jsonl"


class Journal:
    """A file of scores by key.

    The first line holds the identity of what was scored, each other one [key, score]; each ends in
    its checksum. Opening the file cuts it off at the first line that a crash tore or in which a bit
    flipped. A file of another identity is put aside. A key contains all that a score depends on
    beside the model (see `request_key`), so a changed task finds none of its old scores.
    """

    def __init__(self, path: Path, identity: str) -> None:
        """Open or create the file.

        Args:
            identity: the model and everything that was done to it; for windows, their text too.
        """
        self._scores: dict[str, Any] = {}
        make_folder(path.parent)
        clear_for_file(path)
        self._file = path.open("a+b")
        if (other := self._read(identity)) is not None:
            self._file.close()
            put_aside(path, f"holds scores of another model or text ({other}, not {identity})")
            self._file = path.open("a+b")
            self._read(identity)

    def _read(self, identity: str) -> Any:
        """Take the scores on file; return the identity that they have if it is not this one."""
        self._file.seek(0)
        valid_bytes = 0
        for number, line in enumerate(self._file):
            entry = _parse(line)
            if entry is None:
                break
            if number == 0 and entry != ["identity", identity]:
                return entry[1]
            if number:
                self._scores[entry[0]] = entry[1]
            valid_bytes += len(line)
        self._file.truncate(valid_bytes)
        if not valid_bytes:
            self.add([("identity", identity)])
            self._scores.clear()
        return None

    def get(self, key: str) -> Any:
        """Return the score under this key, None if there is none."""
        return self._scores.get(key)

    def consecutive(self) -> list[Any]:
        """Return the scores under "0", "1" and so on up to the first missing one."""
        scores: list[Any] = []
        while (score := self.get(str(len(scores)))) is not None:
            scores.append(score)
        return scores

    def add(self, scores: Iterable[tuple[str, Any]]) -> None:
        """Append scores and flush them to the operating system, where they survive this process."""
        new = dict(scores)
        self._scores |= new
        self._file.write(b"".join(_line(key, score) for key, score in new.items()))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def request_key(*parts: bytes) -> str:
    """Return a digest of a request's parts, in this order."""
    return end_key(begin_key(*parts))


def begin_key(*parts: bytes) -> Any:
    """Return the state of a digest after a request's first parts, for `end_key`."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest


def end_key(begun: Any, *parts: bytes) -> str:
    """Return the `request_key` of the parts that were begun with and these; `begun` stays."""
    digest = begun.copy()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return str(digest.hexdigest()[:32])


def _line(key: str, score: Any) -> bytes:
    content = _content(key, score)
    return f"{content} {zlib.crc32(content.encode()):08x}\n".encode()


def _content(key: str, score: Any) -> str:
    """Return `json.dumps([key, score])`; quickly for a request's, of which there are many."""
    if _is_plain(key, score):
        number, truth = score
        return f'["{key}", [{number!r}, {"true" if truth else "false"}]]'
    return json.dumps([key, score])


def _is_plain(key: str, score: Any) -> bool:
    return (
        type(score) is list
        and [type(part) for part in score] == [float, bool]
        and math.isfinite(score[0])
        and key.isascii()
        and key.isalnum()
    )


def _parse(line: bytes) -> list[Any] | None:
    """Return [key, score], or None for a line that is not what was written."""
    if not line.endswith(b"\n"):
        return None
    try:
        entry = json.loads(line.rpartition(b" ")[0])
    except ValueError:
        return None
    return entry if isinstance(entry, list) and len(entry) == 2 and _line(*entry) == line else None
