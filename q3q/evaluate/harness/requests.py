"""lm-eval's requests as token ids: encoded when they are built, or read from a prepared file.

lm-eval builds a prompt for each question by templates, which takes most of the processor time of an
evaluation, and then asks for it to be encoded. Both give the same for every trial of a tokenizer,
so the first trial keeps the ids. A later one has lm-eval load the tasks and their documents, which
the metrics need, and answers `build_all_requests` from the file. A task's own code may change a
document while it makes a prompt of it; the file then holds the changed document too.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import islice
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance

from q3q.canonical import sha256
from q3q.data.prepared import Arrays, Shelf
from q3q.evaluate.packing import pack_sequences, unpack_sequences
from q3q.evaluate.prefixes import Ids
from q3q.evaluate.scoring import Request
from q3q.spec import Json

REQUESTS_VERSION = 1  # of the file: raised when requests are built or encoded in another way
HASH_BYTES = 32
# Names of arrays: what those of the sequences begin with, and JSON, as bytes.
INPUTS, TARGETS, TABLE = "inputs.", "targets.", "table"


@dataclass(frozen=True)
class Prompt:
    """A prompt that the model continues.

    settings: lm-eval's of the generation
    opens_thought: it ends in the mark that opens a thought
    """

    ids: Ids
    settings: Json
    opens_thought: bool


# By task and number, documents that prompts changed.
Changed = dict[str, dict[int, Any]]
# Continuations whose log-likelihoods are asked for (one, or the windows of a whole text), or a
# prompt.
Encoded = tuple[Request, ...] | Prompt


@dataclass
class EncodedInstance(Instance):
    """A request of lm-eval's with its ids.

    prompt_hash: lm-eval's, of the text that `arguments` held
    """

    encoded: Encoded = ()
    prompt_hash: str = ""


@dataclass
class PreparedTasks:
    """The requests of tasks that lm-eval scores together.

    Each task's `build_all_requests` is replaced, on the task object alone.

    tasks: lm-eval's, by name
    encode: encodes instances of one task, in order
    found: a prepared file's arrays, None to build the requests
    built: receives the arrays once all tasks are built, None for requests that no file can hold;
        without it, no arrays are made
    builds: whether they will be built, and kept if they can be
    """

    tasks: Mapping[str, Any]
    encode: Callable[[Sequence[Instance]], list[Encoded]]
    found: Arrays | None = None
    built: Callable[[Arrays | None], object] | None = None
    builds: bool = field(init=False)
    _done: dict[str, list[EncodedInstance]] = field(default_factory=dict)
    _changed: Changed = field(default_factory=dict)

    def __post_init__(self) -> None:
        stored = None if self.found is None else unpack_requests(self.found)
        changed = {} if self.found is None else changed_documents(self.found)
        self.builds = stored is None and self.built is not None
        for name, task in self.tasks.items():
            if stored is None:
                task.build_all_requests = partial(self._build, name, task, task.build_all_requests)
            else:
                source = stored[name], changed.get(name, {})
                task.build_all_requests = partial(_take, task, *source)
        self.found = None

    def prompt_hashes(self, name: str, documents: Sequence[int]) -> dict[int, str]:
        """Return lm-eval's hash of each document's first prompt, by the document's number.

        documents: the numbers of the documents that are scored
        """
        instances = sorted(self.tasks[name].instances, key=lambda instance: -instance.idx)
        return {documents[instance.doc_id]: instance.prompt_hash for instance in instances}

    def _build(self, name: str, task: Any, build: Callable[..., None], **settings: Any) -> None:
        build(**settings)
        instances, prompt_hash = task.instances, lru_cache(maxsize=64)(sha256)
        encoded = self.encode(instances)
        task._instances = self._done[name] = [
            EncodedInstance(
                request_type=instance.request_type,
                doc=instance.doc,
                arguments=instance.arguments,
                idx=instance.idx,
                metadata=instance.metadata,
                encoded=ids,
                prompt_hash=prompt_hash(instance.args[0]),
            )
            for instance, ids in zip(instances, encoded, strict=True)
        ]
        if self.built is None:
            return
        unchanged = dict(_documents(task, settings))
        changed = {
            instance.doc_id: instance.doc
            for instance in instances
            if not _same(instance.doc, unchanged.get(instance.doc_id))
        }
        self._changed |= {name: changed} if changed else {}
        if len(self._done) == len(self.tasks):
            self.built(pack_requests(self._done, self._changed))
            self._done, self._changed = {}, {}


@contextmanager
def prepared_tasks(
    tasks: Mapping[str, Any],
    encode: Callable[[Sequence[Instance]], list[Encoded]],
    shelf: Shelf | None,
    identity: Json,
    wait: Callable[[], object],
    then: Callable[[], object] = lambda: None,
) -> Iterator[PreparedTasks]:
    """Have tasks take their requests from a shelf, or keep them there once they are built.

    One process at a time builds them; its turn ends when all are built, before any is scored.

    Args:
        shelf: None to keep nothing.
        identity: see `data.prepared.prepared`.
        wait: called at every poll while another process builds them; may raise to stop waiting.
        then: called once they are built, and kept if they can be; may raise to stop there.
    """
    if shelf is None:
        yield PreparedTasks(tasks, encode)
        return
    with ExitStack() as turn:
        stored = shelf.find(identity)
        if stored is None:
            turn.enter_context(shelf.turn(identity, wait))
            stored = shelf.find(identity)

        def built(arrays: Arrays | None) -> None:
            if arrays is not None:
                shelf.keep(identity, arrays)
            turn.close()
            then()

        if stored is not None:
            turn.close()
        yield PreparedTasks(tasks, encode, stored, built)


def _take(
    task: Any, stored: list[EncodedInstance], changed: Mapping[int, Any], **settings: Any
) -> None:
    """Give a task the requests of a prepared file, with its own documents or those changed."""
    documents = dict(_documents(task, settings)) | dict(changed)
    for instance in stored:
        instance.doc = documents[instance.doc_id]
    task._instances = stored


def _documents(task: Any, settings: Mapping[str, Any]) -> Iterator[tuple[int, Any]]:
    """Return the documents that lm-eval builds requests of, with their numbers among these."""
    return task.doc_iterator(limit=settings["limit"], samples=settings["samples"])


def _same(document: Any, other: Any) -> bool:
    try:
        return bool(document == other)
    except Exception:  # of whatever a task's documents hold
        return False


def pack_requests(
    instances: Mapping[str, Sequence[EncodedInstance]], changed: Changed
) -> Arrays | None:
    """Return tasks' requests as arrays; None if a setting or a document is no plain JSON."""
    every = [instance for task in instances.values() for instance in task]
    kinds = sorted({str(instance.request_type) for instance in every})
    settings: dict[str, int] = {}
    setting = []
    for instance in every:
        own: Json | None = None
        if isinstance(instance.encoded, Prompt):
            own = {
                "settings": instance.encoded.settings,
                "opens_thought": instance.encoded.opens_thought,
            }
        if (written := _plain_json(own)) is None:
            return None
        setting.append(settings.setdefault(written, len(settings)))
    listed = [[name, [list(pair) for pair in pairs.items()]] for name, pairs in changed.items()]
    if (documents := _plain_json(listed)) is None:
        return None
    parts = [_parts(instance.encoded) for instance in every]
    inputs, text = pack_sequences([ids for part in parts for ids, _ in part])
    targets, target = pack_sequences([ids for part in parts for _, ids in part])
    table = {
        "tasks": [[name, task[0].task_name, len(task)] for name, task in instances.items()],
        "kinds": kinds,
        "settings": [json.loads(written) for written in settings],
        **({"changed": json.loads(documents)} if changed else {}),
    }
    hashes = b"".join(bytes.fromhex(instance.prompt_hash) for instance in every)
    return {
        **{INPUTS + name: array for name, array in inputs.items()},
        **{TARGETS + name: array for name, array in targets.items()},
        TABLE: np.frombuffer(json.dumps(table).encode(), np.uint8),
        "kind": np.array([kinds.index(str(instance.request_type)) for instance in every], np.uint8),
        "document": np.array([instance.doc_id for instance in every], np.int32),
        "index": np.array([instance.idx for instance in every], np.int32),
        "repeats": np.array([instance.repeats for instance in every], np.int32),
        "setting": np.array(setting, np.int32),
        "prompt_hash": np.frombuffer(hashes, np.uint8).reshape(-1, HASH_BYTES),
        "parts": np.array([len(part) for part in parts], np.int32),
        "text": text,
        "target": target,
    }


def changed_documents(arrays: Arrays) -> Changed:
    """Return the documents that prompts changed, as `pack_requests` received them."""
    table = json.loads(arrays[TABLE].tobytes())
    return {name: dict(pairs) for name, pairs in table.get("changed", ())}


def _plain_json(content: Any) -> str | None:
    """Return JSON that reads as exactly this; None if there is none."""
    try:
        written = json.dumps(content)
        return written if _same(json.loads(written), content) else None
    except (TypeError, ValueError):
        return None


def _parts(encoded: Encoded) -> list[tuple[Ids, Ids]]:
    if isinstance(encoded, Prompt):
        return [(encoded.ids, np.zeros(0, np.int32))]
    return [(request.inputs, request.targets) for request in encoded]


def unpack_requests(arrays: Arrays) -> dict[str, list[EncodedInstance]]:
    """Return what `pack_requests` received, by task, without documents and texts."""
    inputs, targets = (unpack_sequences(_below(name, arrays)) for name in (INPUTS, TARGETS))
    table = json.loads(arrays[TABLE].tobytes())
    hashes = arrays["prompt_hash"].tobytes().hex()
    columns = ("kind", "document", "index", "repeats", "setting", "parts")
    rows = enumerate(zip(*(arrays[name].tolist() for name in columns), strict=True))
    pairs = zip(arrays["text"].tolist(), arrays["target"].tolist(), strict=True)
    by_task: dict[str, list[EncodedInstance]] = {}
    for name, task, count in table["tasks"]:
        by_task[name] = instances = []
        for number, (kind, document, index, repeats, setting, parts) in islice(rows, count):
            own, encoded = table["settings"][setting], islice(pairs, parts)
            begin = 2 * HASH_BYTES * number
            instances.append(
                EncodedInstance(
                    request_type=table["kinds"][kind],
                    doc={},
                    arguments=("",),  # nobody asks for the text
                    idx=index,
                    metadata=(task, document, repeats),
                    encoded=tuple(Request(inputs[a], targets[b], task) for a, b in encoded)
                    if own is None
                    else Prompt(inputs[next(encoded)[0]], **own),
                    prompt_hash=hashes[begin : begin + 2 * HASH_BYTES],
                )
            )
    return by_task


def _below(beginning: str, arrays: Arrays) -> Arrays:
    """Return the arrays whose names begin so, by the rest of their names."""
    return {
        name.removeprefix(beginning): array
        for name, array in arrays.items()
        if name.startswith(beginning)
    }
