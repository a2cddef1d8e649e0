"""Open calibration and evaluation texts, and check that they are long enough."""

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from omegaconf import DictConfig

from q3q.config.schema import TEXT_NAMES
from q3q.data.calibration import as_read
from q3q.data.texts import FROM_FILES, SOURCES, Split, Text, load_text, text_is_here
from q3q.data.windows import Encode, Knobs, drawn_tokens
from q3q.errors import CalibrationError, ConfigError
from q3q.models.checkpoint import load_tokenizer
from q3q.models.hub import fetch_file

RANDOM_TEXTS = {"c4": 256}
# No text has longer tokens on average: with this many characters a token, it is long enough.
CHARACTERS_PER_TOKEN = 100
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_.-]{0,49}")  # of a user's text: a part of metrics' names
RESERVED = {*SOURCES["evaluation"], *TEXT_NAMES.values()}
# Stands in a plan for a text that is to be downloaded; the trial's id is then not yet known.
ABSENT = Text("absent", ())


def opened(config: DictConfig, source: str, split: Split, path: str | None) -> Text:
    """Return a text, or ABSENT for a plan that would have to download it."""
    if config.plan and not text_is_here(source, split, data_folder(config)):
        return ABSENT
    return open_text(source, split, path, config.data.path)


def absolute(path: str | None) -> Path | None:
    return None if path is None else Path(path).expanduser().absolute()


def data_folder(config: DictConfig) -> Path | None:
    folder = absolute(config.data.path)
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"data.path={config.data.path} is not a folder")
    return folder


@functools.cache
def check_long_enough(
    text: Text, folder: Path | None, samples: int, length: int, draw: str, knobs: Knobs
) -> None:
    """Draw the windows now if the text may be too short for them, so that no trial starts in vain.

    Args:
        knobs: the settings that an error names.

    Raises:
        CalibrationError: it is too short, or has no document of the length asked for.
    """
    if text is ABSENT:
        return
    needed = length * (samples if draw == "first" else 1)
    if draw != "documents" and sum(map(len, text.documents)) >= CHARACTERS_PER_TOKEN * needed:
        return
    if folder is None:  # a Hub model: its tokenizer may not be here yet, so refuse the certain
        if text.chat:  # nor its template, which writes more than the messages say
            return
        count = len(text.joined.encode())
        if count < needed:  # a byte-level tokenizer makes at most one token of each byte
            raise CalibrationError(
                f"{text.name} has {count} bytes, so fewer than the {needed} tokens asked for: give "
                "a longer text or ask for fewer"
            )
        return
    encode = _encoder_of(folder)
    if text.chat:
        text, encode = as_read(text, load_tokenizer(folder))
    drawn_tokens(text, encode, samples=samples, length=length, draw=draw, seed=0, knobs=knobs)


def _encoder_of(folder: Path) -> Encode:
    """Return a local model's tokenizer as a function, without what takes seconds to load."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))

    def encode(content: str) -> list[int]:
        return tokenizer.encode(content, add_special_tokens=False).ids

    return encode


@dataclass(frozen=True)
class EvaluatedText:
    """A text that `evaluation.texts` asks for.

    name: the user's own, in metrics; None for a text with a name already
    path: its file, where the user names it
    """

    source: str
    name: str | None = None
    path: str | None = None


def evaluated_texts(settings: DictConfig) -> list[EvaluatedText]:
    """Return the texts of `evaluation.texts`: names, and mappings of a name to a file.

    Raises:
        ConfigError: an entry is neither, or a name is none that a metric can have.
    """
    texts = []
    for entry in settings.texts:
        if isinstance(entry, DictConfig):
            texts += [_own_text(name, path) for name, path in entry.items()]
        elif isinstance(entry, str):
            texts.append(EvaluatedText(entry))
        else:
            raise ConfigError(
                f"evaluation.texts: {entry} is neither the name of a text nor {{NAME: FILE}}"
            )
    return texts


def _own_text(name: object, path: object) -> EvaluatedText:
    where = f"evaluation.texts={{{name}: {path}}}"
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise ConfigError(
            f"{where}: {name} cannot be a text's name: give a letter, then at most 49 letters, "
            "digits, dots, - or _, such as code"
        )
    if name in RESERVED:
        raise ConfigError(
            f"{where}: its numbers would be taken for those of q3q's text {name}: give another name"
        )
    if not isinstance(path, str) or not path:
        raise ConfigError(f"{where}: give the text's file, {{{name}: FILE}}")
    return EvaluatedText("file", name, path)


def name_of_text(source: str, text: Text) -> str:
    """Return a text's name in metrics: a file's own, in the few characters that trackers take.

    Raises:
        ConfigError: a file has the name of a well-known text, and its numbers would pass for that
            text's.
    """
    if source != "file":
        return TEXT_NAMES.get(source, source)
    name = re.sub(r"[^A-Za-z0-9_.-]", "_", text.name)
    reserved = [TEXT_NAMES.get(key, key) for key in SOURCES["evaluation"] if key != "file"]
    if name in reserved:
        raise ConfigError(
            f"evaluation.path: a file called {name} would be taken for q3q's text of that name; "
            "rename it"
        )
    return name


def check_path_is_read(path: str | None, split: str, sources: Sequence[str]) -> None:
    if path is not None and not set(FROM_FILES) & set(sources):
        if split == "evaluation":
            names = ",".join([*sources, "file"])
            raise ConfigError(
                f"evaluation.path={path} is not read by evaluation.texts=[{','.join(sources)}]: "
                f"give evaluation.texts=[{names}], or evaluation=file for this text alone"
            )
        raise ConfigError(
            f"{split}.path={path} is not read by {split}={sources[0]}: add {split}=file"
        )


@functools.cache
def open_text(source: str, split: Split, path: str | None, data: str | None) -> Text:
    if source in FROM_FILES and path is None:
        what = "conversations" if source == "chat" else "a text"
        raise CalibrationError(f"{split}={source} needs {what}: {split}.path=FILE")
    return load_text(
        source, split=split, path=path, data=None if data is None else Path(data).expanduser()
    )


@functools.cache
def chat_template(source: str | None, revision: str | None, folder: Path | None) -> str:
    """Return the chat template of the model's tokenizer; empty if it has none."""

    def read(name: str) -> str:
        path = fetch_file(str(source), name, revision) if folder is None else folder / name
        try:
            return "" if path is None else path.read_text(encoding="utf-8")
        except OSError:
            return ""

    try:
        inside = json.loads(read("tokenizer_config.json") or "{}").get("chat_template")
    except ValueError:
        inside = None
    return str(inside or read("chat_template.jinja"))
