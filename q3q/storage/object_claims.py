"""Claims in a folder of an object store, for `q3q.storage.claim`."""

import re
import secrets

from q3q.masking import masked
from q3q.storage.stores import FolderStore, Store, StoreError, one_line, with_retries

HEARTBEAT_SECONDS, SILENT_SECONDS, POLL_SECONDS = 15.0, 120.0, 5.0  # each is a paid request


def is_claim(name: str) -> bool:
    return re.search(r"\.claim\.\d+$", name) is not None


class ObjectClaimStore:
    """Claims in a folder of a store: `q3q.storage.claim.ClaimStore`."""

    def __init__(self, url: str, store: Store, folder: str) -> None:
        self.url, self.store, self.folder = url, store, folder
        self.heartbeat, self.silence = HEARTBEAT_SECONDS, SILENT_SECONDS
        self.poll = 0.5 if isinstance(store, FolderStore) else POLL_SECONDS

    def __str__(self) -> str:
        return f"{masked(self.url)}/{self.folder}"

    def create(self, name: str) -> "ObjectClaimFile | None":
        """Create a claim; until it is written it holds a number that no other process draws."""
        content = secrets.token_hex(16).encode()
        made = with_retries(self.url, lambda: self.store.create(f"{self.folder}/{name}", content))
        return ObjectClaimFile(self.store, f"{self.folder}/{name}") if made else None

    def names(self) -> list[str]:
        return with_retries(self.url, lambda: self.store.names(self.folder))

    def read(self, name: str) -> bytes:
        return with_retries(self.url, lambda: self.store.read(f"{self.folder}/{name}"))

    def remove(self, name: str) -> None:
        with_retries(self.url, lambda: self.store.remove(f"{self.folder}/{name}"))

    def clear(self) -> None:
        """Remove all claims of a folder that is deleted."""
        for name in self.names():
            if is_claim(name):
                self.remove(name)


class ObjectClaimFile:
    """A claim in a store: since an object cannot be written in part, all of it is written."""

    def __init__(self, store: Store, name: str) -> None:
        self._store, self._name, self._content = store, name, ""

    def write(self, text: str) -> None:
        self._content = text + self._content[len(text) :]
        try:
            self._store.write(self._name, self._content.encode())
        except Exception as error:
            raise StoreError(f"{self._name}: {one_line(error)}") from None

    def close(self) -> None:
        pass
