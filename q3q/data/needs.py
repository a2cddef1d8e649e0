"""What trials need from the Hub: whether it is here, how large it is, and how to get it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from q3q.data.question_files import SUFFIXES
from q3q.data.question_hub import unavailable
from q3q.data.questions import Library
from q3q.data.repositories import REPOSITORIES, DataSet
from q3q.data.texts import Split, download_text, text_bytes, text_cache, text_is_here
from q3q.errors import UnavailableError
from q3q.formatting import bytes_in_words, plural
from q3q.models.hub import (
    HUB_SECONDS,
    ask,
    bytes_to_download,
    cache_folder,
    is_downloaded,
    locate,
)
from q3q.reporter import Steps
from q3q.spec import TrialSpec
from q3q.storage.files import bytes_below

LINE_SECONDS = 10.0  # between two lines about one download
LOOK_SECONDS = 1.0  # between two looks at what a download has written


@dataclass(frozen=True)
class ModelNeed:
    """A model's weights, config and tokenizer."""

    source: str
    revision: str | None

    @property
    def name(self) -> str:
        return self.source if self.revision is None else f"{self.source} ({self.revision[:12]})"

    def missing(self) -> int:
        """Return the bytes to download, 0 if all is here.

        Raises:
            CheckpointError: it is not available.
        """
        return bytes_to_download(self.source, self.revision)

    def fetch(self, steps: Steps) -> None:
        """Download what is missing; continue what was cut off.

        Args:
            steps: receives bytes done and in all.

        Raises:
            CheckpointError: it is not available.
        """
        missing = self.missing()
        with _watched(cache_folder(self.source), missing, steps):
            locate(self.source, self.revision)


@dataclass(frozen=True)
class TextNeed:
    """A text of the Hub, to calibrate or evaluate on."""

    source: str
    split: Split
    data: Path | None

    @property
    def name(self) -> str:
        return f"{self.split} text {self.source}"

    def missing(self) -> int:
        """Return the bytes to download, 0 if it is here.

        Raises:
            CalibrationError: it is not available.
        """
        here = text_is_here(self.source, self.split, self.data)
        return 0 if here else text_bytes(self.source, self.split, self.data)

    def fetch(self, steps: Steps) -> None:
        """Download it; see `ModelNeed.fetch`."""
        if missing := self.missing():
            with _watched(text_cache(self.source), missing, steps):
                download_text(self.source, self.split, self.data)


@dataclass(frozen=True)
class QuestionsNeed:
    """One of the study's data sets of questions: configurations of one repository.

    folder: the user's, which is searched first
    """

    repository: str
    configurations: tuple[DataSet, ...]
    folder: Path | None

    @property
    def name(self) -> str:
        count = len(self.configurations)
        parts = "" if count == 1 else f" ({plural(count, 'configuration')})"
        return f"data set {self.repository}{parts}"

    def missing(self) -> int:
        """Return the bytes to download, 0 if all is here.

        Raises:
            ConfigError: it is not available.
        """
        library = Library(self.folder, settle=True)
        absent = [data for data in self.configurations if not library.is_here(data)]
        return _bytes_on_hub(absent, self.folder) if absent else 0

    def fetch(self, steps: Steps) -> None:
        """Download each configuration; check that it loads and has its splits.

        Raises:
            ConfigError: one is not available, or lacks a split.
        """
        library, missing = Library(self.folder, settle=True), self.missing()
        for number, data in enumerate(self.configurations):
            steps(missing * number // len(self.configurations), missing)
            library.identify(data)
        steps(missing, missing)


Need = ModelNeed | TextNeed | QuestionsNeed


def fetch_weights(specs: Iterable[TrialSpec], say: Callable[[str], None]) -> None:
    """Download what is missing of trials' models, before a trial holds a GPU for it.

    Args:
        say: receives lines that say how far it is.

    Raises:
        CheckpointError: a model is not available.
    """
    models = ((model.source, model.revision) for spec in specs for model in spec.models)
    for source, revision in dict.fromkeys(models):
        if source is not None and not is_downloaded(source, revision):
            ModelNeed(source, revision).fetch(downloading(source, say, time.monotonic))


def downloading(name: str, say: Callable[[str], None], clock: Callable[[], float]) -> Steps:
    """Return what says how far a download is, in a line now and then."""
    last = -LINE_SECONDS

    def steps(done: int, total: int) -> None:
        nonlocal last
        now = clock()
        if total and (done >= total or now - last >= LINE_SECONDS):
            last = now
            part = "" if done in (0, total) else f"{bytes_in_words(done)} of "
            say(f"{name}: {part}{bytes_in_words(total)} {'downloaded' if done else 'to download'}")

    return steps


def _bytes_on_hub(datasets: Sequence[DataSet], folder: Path | None) -> int:
    """Return the bytes that configurations of one of the study's repositories take on the Hub.

    Raises:
        ConfigError: the Hub does not say.
    """
    from huggingface_hub import HfApi

    name = datasets[0].repository
    commit = REPOSITORIES[name].commit
    try:
        info = ask(
            lambda: HfApi().dataset_info(
                name, revision=commit, files_metadata=True, timeout=HUB_SECONDS
            )
        )
    except Exception as error:  # the Hub client's or its HTTP library's
        raise UnavailableError(unavailable(datasets[0], folder, error)) from error
    files = {
        file.rfilename: file.size or 0
        for file in info.siblings or ()
        if Path(file.rfilename).suffix in SUFFIXES
    }
    # A configuration's files lie in a folder of its name, or all belong to the only one.
    names = {data.name for data in datasets}
    own = {path for path in files if names & {*Path(path).parts[:-1]}}
    return sum(size for path, size in files.items() if path in own or not own)


@contextmanager
def _watched(folder: Path, expected: int, steps: Steps) -> Iterator[None]:
    """Report how much a folder grows while something is downloaded into it, and the end."""
    ended, before = threading.Event(), bytes_below(folder)

    def look() -> None:
        while not ended.wait(LOOK_SECONDS):
            steps(min(max(0, bytes_below(folder) - before), expected - 1), expected)

    if not expected:
        yield
        return
    steps(0, expected)
    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
    steps(expected, expected)
