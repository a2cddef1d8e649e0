"""Named texts to calibrate and evaluate on: generated, from the Hub, or the user's file.

A text's documents are its identity, which its digest states; its name and origin are for people.
"""

import difflib
import functools
import hashlib
import io
import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from q3q.data.chats import conversations
from q3q.data.files import file_documents, name_of_file, parsed, text_of
from q3q.errors import CalibrationError, UnavailableTextError, first_line
from q3q.models.demo.library import calibration_text, held_out_text
from q3q.models.demo.stories import stories
from q3q.models.hub import cache_folder, commit_of_data_set

Split = Literal["calibration", "evaluation"]
# Seed and number of the demo's stories. The models were trained on seed 0, without held-out ones.
_STORIES = {"calibration": (1, 1_500), "evaluation": (2, 400)}


@dataclass(frozen=True)
class Text:
    """Documents, and how they join into one text.

    running: the documents are pieces of one running text, so a window may cross their bounds.
    chat: the documents are conversations, see `chats`, that a model's template has yet to write.
    """

    name: str
    documents: tuple[str, ...]
    joiner: str = "\n\n"
    running: bool = False
    chat: bool = False

    @property
    def joined(self) -> str:
        """The documents as one string."""
        return self.joiner.join(self.documents)

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of what determines windows: documents, bounds, joiner, running, chat."""
        facts = [len(self.documents), self.joiner, self.running, *(["chat"] if self.chat else [])]
        sha = hashlib.sha256(json.dumps(facts).encode())
        for document in self.documents:
            content = document.encode()
            sha.update(len(content).to_bytes(8, "little"))
            sha.update(content)
        return sha.hexdigest()


@dataclass(frozen=True)
class _HubText:
    """A data set of the Hub at a fixed commit: each split's file, and how its rows make a text.

    evaluated: rows of the evaluation file, None if there is none; they decide the perplexity.
    """

    repository: str
    revision: str
    files: dict[Split, str]
    joiner: str
    running: bool
    evaluated: int | None = None


_HUB = {
    # Rows are lines. GPTQ and most later methods join them by an empty line and cut anywhere.
    "wikitext2": _HubText(
        repository="Salesforce/wikitext",
        revision="b08601e04326c79dfdd32d625aee71d232d685c3",
        files={
            "calibration": "wikitext-2-raw-v1/train-00000-of-00001.parquet",
            "evaluation": "wikitext-2-raw-v1/test-00000-of-00001.parquet",
        },
        joiner="\n\n",
        running=True,
        evaluated=4_358,
    ),
    # Rows are web pages. Joined by a space they are often called c4-new.
    "c4": _HubText(
        repository="allenai/c4",
        revision="1588ec454efa1a09f29cd18ddd04fe05fc8653a2",
        files={
            "calibration": "en/c4-train.00000-of-01024.json.gz",
            "evaluation": "en/c4-validation.00000-of-00008.json.gz",
        },
        joiner=" ",
        running=False,
        evaluated=45_576,
    ),
    # The Pile's validation set, which AWQ and SmoothQuant calibrate on: no evaluation text.
    "pile": _HubText(
        repository="mit-han-lab/pile-val-backup",
        revision="2f5e46ae6a69cf0dce4b12f78241c408936ca0e4",
        files={"calibration": "val.jsonl.zst"},
        joiner="\n\n",
        running=False,
    ),
}
FROM_FILES = ("file", "chat")  # sources that need a path
SOURCES: dict[Split, tuple[str, ...]] = {
    "calibration": ("demo", "library", "wikitext2", "c4", "pile", "file", "chat"),
    "evaluation": ("demo", "library", "wikitext2", "c4", "file"),
}


def load_text(
    source: str, *, split: Split, path: str | Path | None = None, data: str | Path | None = None
) -> Text:
    """Load a text by name.

    Args:
        source: `demo`, generated stories with their questions, for evaluation never those a demo
            model was trained on; `library`, modules of Python's own standard library, for
            evaluation those kept from training; `wikitext2`, `c4`, `pile` from the Hub or its local
            cache; `file`, at `path`; `chat`, conversations at `path`.
        split: the text's use. The two splits share no document, except of `file`.
        path: `file`'s, of a kind that `files.file_documents` reads; `chat`'s, see `chats`.
        data: a folder with data sets (data.path), searched first for `wikitext2`, `c4` and `pile`.

    Raises:
        CalibrationError: the split has no such source; the file is missing, empty, not UTF-8 or not
            what its name says; the data set is neither in the local cache nor available from the
            Hub; the evaluation file in `data` is a part of the data set, or another.
    """
    if source not in SOURCES[split]:
        exists = any(source in names for names in SOURCES.values())
        similar = () if exists else difflib.get_close_matches(source, SOURCES[split], n=1)
        choices = ", ".join(SOURCES[split])
        hint = f"did you mean {similar[0]}?" if similar else f"give one of {choices}"
        raise CalibrationError(f"{source!r} is not a text for {split}: {hint}")
    if source == "demo":
        return _demo_text(split)
    if source == "library":
        return Text("library", (_library_text(split),))
    if source in FROM_FILES:
        if path is None:
            raise CalibrationError(f"{split}={source} needs {split}.path=FILE")
        file = Path(path).expanduser()
        if source == "chat":
            return Text(name_of_file(file), conversations(file), joiner="", chat=True)
        return Text(name_of_file(file), file_documents(file))
    return _hub_text(source, split, None if data is None else Path(data))


@functools.cache  # telling them takes a tenth of a second
def _demo_text(split: Split) -> Text:
    seed, count = _STORIES[split]
    stream = stories(seed, held_out=split == "evaluation")
    documents = tuple(story.full_text() for story in itertools.islice(stream, count))
    return Text("demo", documents, joiner="\n", running=True)  # packed as for training


@functools.cache
def _library_text(split: Split) -> str:
    return held_out_text() if split == "evaluation" else calibration_text()


def _hub_text(source: str, split: Split, data: Path | None) -> Text:
    hub, local_copy = _HUB[source], _local_copy(source, split, data)
    file = local_copy or _cached_file(source, split) or download_text(source, split, data)
    try:
        rows = tuple(_parquet_rows(file) if file.suffix == ".parquet" else _json_rows(file))
    except (OSError, ValueError, KeyError) as error:
        raise CalibrationError(
            f"{file} is not a file of {source}, rows with a `text`: {error}"
        ) from error
    if local_copy and split == "evaluation" and len(rows) != hub.evaluated:
        raise CalibrationError(
            f"{file} has {len(rows)} rows, but {hub.files[split]} of {hub.repository}, which it "
            f"stands for, has {hub.evaluated}: give that file, or another text by its own name: "
            "evaluation=file evaluation.path=FILE"
        )
    return Text(source, rows, joiner=hub.joiner, running=hub.running)


def _local_copy(source: str, split: Split, data: Path | None) -> Path | None:
    """Return the user's file, named as on the Hub or after its split (`test.parquet`)."""
    if data is None:
        return None
    name = _HUB[source].files[split]
    part = next(part for part in ("train", "validation", "test", "val") if part in name)
    suffixes = (".parquet", ".jsonl", ".json.gz", ".jsonl.zst")
    names = [name, Path(name).name, *(f"{part}{suffix}" for suffix in suffixes)]
    return next((file for name in names if (file := data / source / name).is_file()), None)


def is_from_hub(source: str) -> bool:
    return source in _HUB


def text_is_here(source: str, split: Split, data: Path | None) -> bool:
    """Return True if a text needs no download."""
    if source not in _HUB:
        return True
    return (_local_copy(source, split, data) or _cached_file(source, split)) is not None


def text_bytes(source: str, split: Split, data: Path | None) -> int:
    """Return the bytes of a text's file on the Hub.

    Raises:
        CalibrationError: it is not available.
    """
    return int(_from_hub(source, split, data, dry_run=True).file_size or 0)


def download_text(source: str, split: Split, data: Path | None) -> Path:
    """Return a text's file, downloaded from the Hub.

    Raises:
        CalibrationError: it is not available.
    """
    return Path(_from_hub(source, split, data))


def text_cache(source: str) -> Path:
    """Return the folder of the local cache into which a text is downloaded."""
    return cache_folder(_HUB[source].repository, "datasets")


def _cached_file(source: str, split: Split) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    hub = _HUB[source]
    cached = try_to_load_from_cache(
        hub.repository, hub.files[split], repo_type="dataset", revision=hub.revision
    )
    return Path(cached) if isinstance(cached, str) else None


def _from_hub(source: str, split: Split, data: Path | None, dry_run: bool = False) -> Any:
    """Download a text's file; return its path or, of a dry run, what is known of it."""
    from huggingface_hub import hf_hub_download

    hub = _HUB[source]
    name, repository, revision = hub.files[split], hub.repository, hub.revision
    try:
        commit_of_data_set(repository, revision)  # does the Hub answer?
        return hf_hub_download(
            repository, name, repo_type="dataset", revision=revision, dry_run=dry_run
        )
    except Exception as error:  # the Hub client's, its HTTP library's or the disk's
        folder = data or "DIR"
        raise UnavailableTextError(
            f"{split}={source} needs {name} of the data set {repository}, which is neither in the "
            f"local cache nor available from the Hub: {first_line(error)}. To provide it: "
            f"data.path={folder} with {folder}/{source}/{Path(name).name}; for a text of your own: "
            f"{split}=file {split}.path=FILE"
        ) from error


def _parquet_rows(file: Path) -> Iterator[str]:
    from pyarrow import parquet

    rows = parquet.read_table(file, columns=["text"])["text"].to_pylist()
    yield from (text_of(f"{file}, row {n}", row) for n, row in enumerate(rows, 1))


def _json_rows(file: Path) -> Iterator[str]:
    import pyarrow

    with pyarrow.input_stream(str(file), compression="detect") as stream:  # .gz or .zst
        for n, line in enumerate(io.TextIOWrapper(stream, encoding="utf-8-sig"), 1):
            where = f"{file}, line {n}"
            yield text_of(where, parsed(where, line))
