"""Make names and texts fit what MLflow takes."""

import json
import posixpath
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from q3q.canonical import sha256

if TYPE_CHECKING:
    from mlflow.entities import Metric, Param, RunTag

MAX_NAME = 250  # characters of the name of a metric or param
MAX_PARAM = 6000  # characters of a param's value; record.json holds longer texts in full
MAX_EXPERIMENT = 500  # characters of an experiment's name
MAX_REQUEST = 800_000  # bytes of one request; a server takes a million
MOST, MOST_IN_ALL = {"metrics": 1000, "params": 100, "tags": 100}, 1000  # in one request


def fitted_names(names: Iterable[str]) -> dict[str, str]:
    """Return the name in MLflow of each metric or param; no two of these share one.

    MLflow takes letters, digits and `_/.- `, and what is a path in its shortest form.
    """
    originals = list(dict.fromkeys(names))
    # A name that fits keeps its own, whatever else would be called so.
    taken = {name for name in originals if _fitted(name) == name}
    fitted: dict[str, str] = {}
    for name in originals:
        word = _fitted(name)
        if word != name and word in taken:
            word = f"{word[: MAX_NAME - 7]}_{sha256(name)[:6]}"
        taken.add(word)
        fitted[name] = word
    return fitted


def _fitted(name: str) -> str:
    word = re.sub(r"[^\w/.\- ]", "_", name)
    word = "/".join("_" * len(part) if part == ".." else part for part in word.split("/"))
    word = posixpath.normpath(word).strip("/")
    word = "_" if word in ("", ".") else word
    # Its end is cut: another name's may be too, and a path must not end with a slash.
    return word if len(word) <= MAX_NAME else f"{word[: MAX_NAME - 7]}_{sha256(name)[:6]}"


def experiment_name(name: str) -> str:
    """Return the name of an experiment, as it is unless MLflow or its databases refuse it."""
    word = fitted_text(name, len(name)).strip() or "q3q"
    long = len(word) > MAX_EXPERIMENT
    return f"{word[: MAX_EXPERIMENT - 7]}-{sha256(name)[:6]}" if long else word


def fitted_text(text: str, length: int) -> str:
    """Return a text of at most `length` characters, without any that a database refuses."""
    text = re.sub(r"[\x00\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", text)
    return text if len(text) <= length else text[: length - 1] + "…"


@dataclass
class LogRequest:
    """The metrics, params and tags that one request logs."""

    metrics: list["Metric"] = field(default_factory=list)
    params: list["Param"] = field(default_factory=list)
    tags: list["RunTag"] = field(default_factory=list)

    @property
    def count(self) -> int:
        return len(self.metrics) + len(self.params) + len(self.tags)


def batches(
    metrics: Sequence["Metric"], params: Sequence["Param"], tags: Sequence["RunTag"]
) -> Iterator[LogRequest]:
    """Yield all in as few requests as MLflow accepts, in this order."""
    batch, size = LogRequest(), 0
    for kind, entities in (("metrics", metrics), ("params", params), ("tags", tags)):
        for entity in entities:
            part: list[Any] = getattr(batch, kind)
            cost = len(json.dumps([entity.key, str(entity.value)])) + 100
            full = len(part) == MOST[kind] or batch.count == MOST_IN_ALL
            if full or size + cost > MAX_REQUEST:
                yield batch
                batch, size = LogRequest(), 0
                part = getattr(batch, kind)
            part.append(entity)
            size += cost
    yield batch
