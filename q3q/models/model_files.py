"""The tensors in a model folder's files, found as transformers finds them, without torch.

Where config.json, an index and the shards disagree, this follows transformers, and says so in a
remark. What transformers would fill with random numbers is missing, and `Checkpoint` refuses it.
"""

import re
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field, replace
from pathlib import Path

from q3q.errors import CheckpointError
from q3q.models.facts import ModelFacts
from q3q.models.model_json import INDEX_LIMIT, read_json
from q3q.models.tensor_files import StoredTensor, read_header, same_bytes

FLOATS = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}


@dataclass
class ModelFiles:
    """What lies in a folder's safetensors files.

    tensors: by name
    shards: all files that are read
    listed: where an index places each tensor; empty without an index
    remarks: disagreements, in a line each, with what was done
    """

    tensors: dict[str, StoredTensor]
    shards: list[Path]
    listed: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def whereabouts(self, name: str) -> str:
        """Return where the index has a missing tensor, for an error: nothing without one."""
        shard = self.listed.get(name)
        return "" if shard is None else f", which the index places in {shard}"


def read_model_files(folder: Path) -> ModelFiles:
    """Read all headers of a folder; like transformers, prefer model.safetensors to an index.

    All tensors of the files that an index names are taken, whatever it says of each.

    Raises:
        CheckpointError: there are no weights, or pickled ones; or the index is none, leads out of
            the folder, or names a file that is missing.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return ModelFiles(read_header(single), [single])
    if not index.is_file():
        names = sorted(path.name for path in folder.iterdir())
        if pickles := [name for name in names if name.endswith((".bin", ".pt", ".pth"))]:
            raise CheckpointError(
                f"{folder}: only pickled weights ({pickles[0]}), which can run code when loaded. "
                "Save the model as safetensors: model.save_pretrained(DIR)"
            )
        raise CheckpointError(f"{folder}: no model.safetensors and no model.safetensors.index.json")
    listed = read_json(index, INDEX_LIMIT).get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(shard, str) for shard in listed.values()):
        raise CheckpointError(f"{index}: no `weight_map` from tensor to shard")
    files = ModelFiles({}, [], listed)
    twice: list[str] = []
    for shard in sorted(set(listed.values())):
        if shard in (".", "..", "") or re.search(r"[/\\:\0]", shard):
            raise CheckpointError(
                f"{index}: the shard {shard!r} is not a file name; a shard lies beside its index"
            )
        if not (folder / shard).is_file():
            raise CheckpointError(f"{folder}: the shard {shard}, which the index lists, is missing")
        tensors = read_header(folder / shard)
        twice += [name for name in tensors if name in files.tensors]
        files.tensors |= tensors
        files.shards.append(folder / shard)
    if twice:
        files.remarks.append(f"{_some(twice)} in several shards: the last one counts")
    shards = {name: stored.shard.name for name, stored in files.tensors.items()}
    moved = [name for name in shards if name not in twice and listed.get(name) != shards[name]]
    if moved:
        files.remarks.append(
            f"{_some(moved)} not in the shard that the index names, and read anyway"
        )
    if lost := [name for name in listed if name not in shards]:
        files.remarks.append(f"{_some(lost)} listed in the index, and in no shard: not needed")
    return files


def settle(facts: ModelFacts, files: ModelFiles) -> tuple[ModelFacts, list[str]]:
    """Return the facts as the files have them, and a remark for each that config.json has not.

    Args:
        facts: of config.json.
        files: `tensors` gets the head as embedding if the head alone is stored.
    """
    tensors, remarks = files.tensors, list[str]()
    embedding, head = facts.family.embedding, facts.family.head
    if facts.tied and head in tensors and embedding not in tensors:
        tensors[embedding] = tensors[head]
        remarks.append("the embedding is stored as the head, to which config.json ties it")
    elif facts.tied and head in tensors and not _equal(tensors[head], tensors[embedding]):
        facts = replace(facts, tied=False)
        remarks.append(
            "config.json ties head and embedding, and the files hold two different ones: "
            "they are not tied"
        )
    kinds = Counter(FLOATS[tensor.dtype] for tensor in tensors.values() if tensor.dtype in FLOATS)
    if facts.packing is not None or not kinds:
        return facts, remarks
    usual = kinds.most_common(1)[0][0]
    if not facts.says_dtype:
        first = min(
            (tensor for tensor in tensors.values() if tensor.dtype in FLOATS),
            key=lambda tensor: (tensor.shard.name, tensor.start),
        )
        facts = replace(facts, dtype=FLOATS[first.dtype])
        remarks.append(f"config.json names no dtype: {facts.dtype}, as the weights are stored")
    elif usual != facts.dtype:
        remarks.append(
            f"config.json says {facts.dtype}, and the weights are stored as {usual}: they become "
            f"{facts.dtype}, unless dtype= says otherwise"
        )
    return facts, remarks


def unread(tensors: Collection[str], expected: Collection[str], facts: ModelFacts) -> list[str]:
    """Return remarks on stored tensors that this model has no place for, as a warning of them."""
    placed = {*expected, *([facts.family.head] if facts.tied else [])}
    extra = [name for name in tensors if name not in placed and "rotary_emb" not in name]
    return [f"{_some(extra)} in the files, and not in this model: not read"] if extra else []


def carried_over(names: Collection[str]) -> list[str]:
    """Return a remark on tensors of parts that the model has besides, by their parts."""
    if not names:
        return []
    parts = {
        name[: name.find(".", len("model.")) if name.startswith("model.") else name.find(".")]
        for name in names
    }
    return [
        f"{' and '.join(sorted(parts))} ({len(names)} tensors) are neither run nor quantized; "
        "exports carry them over as they are"
    ]


def _equal(one: StoredTensor, other: StoredTensor) -> bool:
    """Return True if transformers would tie two stored tensors: they hold the same numbers."""
    if one.shape != other.shape:
        return False
    if one.dtype == other.dtype:
        return same_bytes(one, other)
    import torch

    return torch.equal(one.read().float(), other.read().float())


def _some(names: list[str]) -> str:
    return f"{names[0]}{f' and {len(names) - 1} more are' if len(names) > 1 else ' is'}"
