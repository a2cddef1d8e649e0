"""Prepared input: what one trial tokenizes, and all later trials of a storage folder read.

Cutting a text into windows and building a suite's questions take processor time, while the device
waits, and give every trial with the same tokenizer the same numbers. They are kept as
`<storage>/prepared/<key>.safetensors`: arrays, with their identity and a checksum in the file's
metadata. The key is the digest of the identity, which names all that determines the arrays. A file
that is damaged or another's is put aside and made anew. One process at a time makes a file, under a
claim. The folder may be deleted at any time; of a storage that is a URL, each machine's mirror has
one of its own, which is not sent.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from q3q.canonical import sha256
from q3q.errors import UNREADABLE
from q3q.placement import Trial
from q3q.spec import Json, digest
from q3q.storage.aside import put_aside, tell
from q3q.storage.claim import claimed
from q3q.storage.files import read_file, write_atomically

if TYPE_CHECKING:  # a plan must not load numpy for them
    from numpy.typing import NDArray

Arrays = dict[str, "NDArray[Any]"]

FOLDER = "prepared"
SUFFIX = ".safetensors"
# Metadata of a file: what its arrays are, and the SHA-256 of that and of them.
IDENTITY, CHECKSUM = "identity", "sha256"
MOST_HEADER = 1 << 20  # bytes; a file's facts take a few thousand
# Packages whose versions may change what a tokenizer makes of a text.
PACKAGES = ("tokenizers", "transformers")

_backends: WeakKeyDictionary[Any, str] = WeakKeyDictionary()


@dataclass(frozen=True)
class Shelf:
    """The prepared input of one storage folder and one tokenizer.

    tokenizer: its digest
    """

    folder: Path
    tokenizer: str

    @classmethod
    def of(cls, trial: Trial, tokenizer: Any) -> "Shelf | None":
        """Return the shelf of a trial; None for a tokenizer that cannot be identified."""
        identity = tokenizer_digest(tokenizer)
        return None if identity is None else cls(trial.placement.storage / FOLDER, identity)

    def find(self, identity: Json) -> Arrays | None:
        """Return the arrays of this identity; None without them. A damaged file is put aside."""
        path = self.path(identity)
        try:
            return _arrays(read_file(path), self._complete(identity))
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            put_aside(path, f"cannot be read ({error})")
            return None

    def keep(self, identity: Json, arrays: Arrays) -> None:
        """Write arrays for all later trials. If the disk takes no more, a line says so."""
        path = self.path(identity)
        try:
            write_atomically(path, _content(arrays, self._complete(identity)))
        except OSError as error:
            tell(f"{path} cannot be written ({error.strerror or error}); later trials prepare anew")

    @contextmanager
    def turn(self, identity: Json, wait: Callable[[], object]) -> Iterator[None]:
        """Wait until no other process makes these arrays, and hold the claim on making them.

        wait: called at every poll; may raise to stop waiting
        """
        path = self.path(identity)
        with ExitStack() as held:
            try:
                held.enter_context(claimed(self.folder, path.stem, lambda holder: wait()))
            except OSError as error:  # two processes may then make the same
                tell(f"{self.folder} cannot be written ({error.strerror or error})")
            yield

    def path(self, identity: Json) -> Path:
        """Return the file of the arrays of this identity, whether it is there or not."""
        return self.folder / f"{digest(self._complete(identity))[:32]}{SUFFIX}"

    def _complete(self, identity: Json) -> Json:
        return {"tokenizer": self.tokenizer, **identity}


def prepared(
    shelf: Shelf | None,
    identity: Json,
    make: Callable[[], Arrays],
    wait: Callable[[], object] = lambda: None,
) -> Arrays:
    """Return a shelf's arrays of this identity. Without them, one process makes and keeps them.

    Args:
        shelf: None to make them without keeping them.
        identity: all that determines the arrays, but for the tokenizer; plain JSON.
        wait: called at every poll while another process makes them; may raise to stop waiting.
    """
    if shelf is None:
        return make()
    arrays = shelf.find(identity)
    if arrays is None:
        with shelf.turn(identity, wait):
            arrays = shelf.find(identity)  # another may have made them meanwhile
            if arrays is None:
                arrays = make()
                shelf.keep(identity, arrays)
    return arrays


def tokenizer_digest(tokenizer: Any) -> str | None:
    """Return the digest of all that decides on a fast tokenizer's ids; None of any other kind."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    if tokenizer not in _backends:
        _backends[tokenizer] = sha256(backend.to_str())
    kind = type(tokenizer)
    return digest(
        {
            "kind": f"{kind.__module__}.{kind.__qualname__}",
            "backend": _backends[tokenizer],
            "special": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
            "split_special": bool(getattr(tokenizer, "split_special_tokens", False)),
            "chat_template": tokenizer.chat_template,
            "packages": {name: metadata.version(name) for name in PACKAGES},
        }
    )


def kept_identity(path: Path) -> Json | None:
    """Return the identity of a prepared file, from its header; None if that cannot be read."""
    try:
        if not path.is_file():
            return None
        with path.open("rb") as file:
            beginning = file.read(8)
            header = file.read(min(int.from_bytes(beginning, "little"), MOST_HEADER))
        identity = json.loads(_metadata(beginning + header)[IDENTITY])
    except UNREADABLE:
        return None
    return identity if isinstance(identity, dict) else None


def kept_identities(folder: Path) -> dict[Path, Json]:
    """Return the identities of a folder's prepared files, without those that cannot be read."""
    identities = {path: kept_identity(path) for path in folder.glob(f"*{SUFFIX}")}
    return {path: identity for path, identity in identities.items() if identity is not None}


def _content(arrays: Arrays, identity: Json) -> bytes:
    import numpy as np
    from safetensors.numpy import save

    whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    facts = {IDENTITY: json.dumps(identity, sort_keys=True), CHECKSUM: _checksum(whole, identity)}
    return save(whole, metadata=facts)


def _arrays(content: bytes, identity: Json) -> Arrays:
    """Return a file's arrays.

    Raises:
        ValueError: the file is not whole, or of another identity.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        arrays: Arrays = load(content)
        facts = _metadata(content)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ValueError("it is incomplete, or not a file of q3q's") from error
    if facts.get(CHECKSUM) != _checksum(arrays, identity):
        raise ValueError("its checksum does not fit what it should hold")
    return arrays


def _metadata(content: bytes) -> Json:
    """Return the metadata of a safetensors file: its header is JSON behind its length."""
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return header["__metadata__"]


def _checksum(arrays: Mapping[str, "NDArray[Any]"], identity: Json) -> str:
    sha = hashlib.sha256(json.dumps(identity, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        sha.update(json.dumps([name, array.dtype.str, list(array.shape)]).encode())
        sha.update(array.data if array.size else b"")
    return sha.hexdigest()
