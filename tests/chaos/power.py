"""What a disk has after a power cut: only what was flushed to it."""

import os
import shutil
import stat
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

Image = dict[str, bytes]  # files by path


@dataclass
class Disk:
    """A folder's disk, by what this process flushes to it with `os.fsync`.

    Nothing else is watched, so whatever writes a file, in whatever language, and does not flush it,
    leaves an empty file here, or none.

    after: called after each flush
    """

    root: Path
    after: Callable[["Disk"], None] = lambda disk: None
    _contents: dict[int, bytes] = field(default_factory=dict)  # of files, by their numbers
    _names: dict[int, dict[str, int]] = field(default_factory=dict)  # of folders, likewise
    _held: dict[int, int] = field(default_factory=dict)  # so that no number is used again
    _lock: threading.RLock = field(default_factory=threading.RLock)

    def fsync(self, file: int, really: Callable[[int], None] = os.fsync) -> None:
        """Stand in for `os.fsync`."""
        really(file)
        place, status = f"/proc/self/fd/{file}", os.fstat(file)
        if not Path(os.readlink(place)).is_relative_to(self.root):
            return
        with self._lock:
            self._held.setdefault(status.st_ino, os.dup(file))
            if stat.S_ISDIR(status.st_mode):
                self._names[status.st_ino] = {one.name: one.inode() for one in os.scandir(place)}
            else:
                self._contents[status.st_ino] = Path(place).read_bytes()
            self.after(self)

    def close(self) -> None:
        for file in self._held.values():
            os.close(file)

    def least(self) -> Image:
        """Return the files that were flushed, under names that were: all that POSIX promises."""
        files: Image = {}

        def walk(folder: int, path: str) -> None:
            for name, number in self._names.get(folder, {}).items():
                if number in self._contents:
                    files[path + name] = self._contents[number]
                elif number in self._names:
                    walk(number, f"{path}{name}/")

        walk(self.root.stat().st_ino, "")
        return files

    def names_first(self) -> Image:
        """Return all files, each with what was flushed of it: names may reach the disk early."""
        image: Image = {}
        for top, _, names in os.walk(self.root):
            for path in (Path(top, name) for name in names):
                with suppress(FileNotFoundError):  # another thread's, which has renamed it
                    content = self._contents.get(path.stat().st_ino, b"")
                    image[str(path.relative_to(self.root))] = content
        return image


def restore(image: Image, storage: Path) -> Path:
    """Write an image to a folder."""
    shutil.rmtree(storage, ignore_errors=True)
    storage.mkdir(parents=True)
    for name, content in image.items():
        path = storage / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return storage
