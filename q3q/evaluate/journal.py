"""What an evaluation has scored so far, on disk: one line a request or window, so that a killed evaluation goes on."""

import hashlib
import json
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from q3q.errors import IntegrityError

SCORES = (
    "scores.jsonl"  # of all requests of an evaluation: what two of its tasks ask is scored once
)


class Journal:
    """One line each: the first names whose scores these are, every other is [key, score]; then its checksum.

    A line that a crash tore or in which a bit flipped, and whatever stands behind it, is cut off when the file is
    opened again. Keys say all that a score depends on beside the model (see `request_key`), so a changed task finds
    none of its old ones.
    """

    def __init__(self, path: Path, identity: str) -> None:
        """Open or create. identity: the model and everything that was done to it; of windows, their text too.

        Raises:
            IntegrityError: the file holds another identity's scores.
        """
        self._scores: dict[str, Any] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        self._file.seek(0)
        whole = 0
        for number, line in enumerate(self._file):
            entry = _parse(line)
            if entry is None:
                break
            if number == 0 and entry != ["identity", identity]:
                self._file.close()
                raise IntegrityError(
                    f"{path} holds scores of another model or text ({entry[1]}, not {identity}); remove it"
                )
            if number:
                self._scores[entry[0]] = entry[1]
            whole += len(line)
        self._file.truncate(whole)
        if not whole:
            self.add([("identity", identity)])
            self._scores.clear()

    def get(self, key: str) -> Any:
        """The score kept under this key, None if there is none."""
        return self._scores.get(key)

    def counted(self) -> list[Any]:
        """The scores kept under "0", "1" and so on, up to the first that is missing: of windows, which end in order."""
        found: list[Any] = []
        while (score := self.get(str(len(found)))) is not None:
            found.append(score)
        return found

    def add(self, scores: Iterable[tuple[str, Any]]) -> None:
        """Append, and hand to the operating system: what is here survives this process being killed."""
        for key, score in scores:
            self._scores[key] = score
            self._file.write(_line(key, score))
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def request_key(*parts: bytes) -> str:
    """A digest of a request's parts, in this order."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()[:32]


def _line(key: str, score: Any) -> bytes:
    content = json.dumps([key, score])
    return f"{content} {zlib.crc32(content.encode()):08x}\n".encode()


def _parse(line: bytes) -> list[Any] | None:
    """[key, score], or None for a line that is not what was written."""
    if not line.endswith(b"\n"):
        return None
    try:
        entry = json.loads(line.rpartition(b" ")[0])
    except ValueError:
        return None
    return entry if isinstance(entry, list) and len(entry) == 2 and _line(*entry) == line else None
