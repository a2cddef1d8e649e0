"""A memo of the digests of model files, so that 16 GB are read once."""

from pathlib import Path

from q3q.spec import Json
from q3q.storage.aside import clear_for_folder, put_aside
from q3q.storage.files import (
    SEAL,
    file_digest,
    file_state,
    read_file,
    sealed,
    unsealed,
    write_atomically,
)

MEMO = "digests.json"


class DigestMemo:
    """The SHA-256 of files, by their real paths, as long as their state is the same.

    The memo carries a checksum, because the ids of trials follow from it. A damaged one counts as
    empty.

    Args:
        folder: of the memo, in a storage folder's `trials`; None keeps no memo.
    """

    def __init__(self, folder: Path | None) -> None:
        self._path = None if folder is None else folder / MEMO
        self._changed = False
        self._entries: Json = {}
        if self._path is None:
            return
        try:
            content = read_file(self._path)
            entries = unsealed(content)
            if SEAL.encode() in content:  # older versions wrote no checksum: read the files again
                self._entries = entries
        except FileNotFoundError:
            return
        except NotADirectoryError:  # `save` puts aside what is there
            self._changed = True
        except (OSError, ValueError) as error:
            put_aside(self._path, f"cannot be read ({error})")
            self._changed = True

    def digest(self, file: Path) -> str:
        """Return a file's SHA-256 (hex).

        Raises:
            OSError: it cannot be read.
        """
        real, state = file.resolve(), list(file_state(file))
        match self._entries.get(str(real)):
            # The digest stays where older versions had it.
            case [size, time, str(digest), *rest] if [size, time, *rest] == state:
                return digest
        sha = file_digest(real)
        self._entries[str(real)] = [*state[:2], sha, *state[2:]]
        self._changed = True
        return sha

    def save(self) -> None:
        """Write the memo if it has changed, without files that are gone."""
        if self._path is None or not self._changed:
            return
        for folder in (self._path.parent.parent, self._path.parent):
            clear_for_folder(folder)
        entries = {file: entry for file, entry in self._entries.items() if Path(file).is_file()}
        write_atomically(self._path, sealed(entries))
