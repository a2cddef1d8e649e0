"""An export's shards: one safetensors file a block, and the facts that vouch for each.

A shard is written whole or not at all, and its facts after it, with its checksum: a killed trial
continues after the shards whose facts hold.
"""

import json
import math
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from q3q.errors import UNREADABLE, ExportError
from q3q.models.tensor_files import Rows, encode_tensors, read_header
from q3q.spec import Json
from q3q.storage.files import FileDigests, write_atomically


class Shards:
    """The shards of an unfinished export in `folder`, `count` of them."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count
        self._digests = FileDigests()

    def name(self, index: int) -> str:
        return f"model-{index + 1:05d}-of-{self.count:05d}.safetensors"

    def write(self, index: int, tensors: Mapping[str, Tensor | Rows], facts: Json) -> None:
        """Write one shard, and then its facts."""
        shard, parts = self.folder / self.name(index), encode_tensors(tensors, {"format": "pt"})
        digest = self._digests.write(shard, parts, wait=False)  # on the disk while the walk goes on
        size = sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in tensors.values())
        facts |= {"sha256": digest, "bytes": size, "names": sorted(tensors)}
        write_atomically(self._facts_file(index), json.dumps(facts).encode(), wait=False)

    def facts(self, index: int) -> Json | None:
        """Return the facts of a shard; None if it is missing or damaged."""
        try:
            facts: Json = json.loads(self._facts_file(index).read_text(encoding="utf-8"))
            whole = self._digests.of(self.folder / self.name(index)) == facts["sha256"]
        except UNREADABLE:
            return None
        return facts if whole else None

    def all_facts(self) -> list[Json]:
        """Return the facts of all shards in order.

        Raises:
            ExportError: a shard is missing or damaged.
        """
        shards = []
        for index in range(self.count):
            if (facts := self.facts(index)) is None:
                raise ExportError(
                    f"{self.folder}: {self.name(index)} is missing or incomplete; was it removed "
                    "while the trial ran?"
                )
            shards.append(facts)
        return shards

    def digests(self) -> dict[str, str]:
        """Return the SHA-256 of each shard that was written or verified, by its file's name."""
        return {path.name: digest for path, (_, digest) in self._digests.known.items()}

    def finish(self) -> None:
        """Bring all shards to the disk, and remove the facts and what a dead process left."""
        for shard in self.folder.glob("*.safetensors"):
            with shard.open("rb") as file:
                os.fsync(file.fileno())
        shutil.rmtree(self.folder / "facts", ignore_errors=True)
        for unfinished in self.folder.glob(".*.partial"):
            unfinished.unlink(missing_ok=True)

    def _facts_file(self, index: int) -> Path:
        return self.folder / "facts" / f"{index:03d}.json"


def stored_bytes(folder: Path) -> dict[str, int]:
    """Return the bytes of each tensor in the folder's shards, by name, from their headers."""
    headers = [read_header(shard) for shard in sorted(folder.glob("*.safetensors"))]
    return {name: tensor.bits // 8 for header in headers for name, tensor in header.items()}
